"""Scores -> values: what the optimiser sees, with its standard error, and paired differences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.special import ndtr
from scipy.stats import t as student

from bayesian_merger.data import Estimate, Interval, Prompt, Result
from bayesian_merger.errors import RunError, TrialError

Normalise = Literal["none", "zscore", "rank"]
Combine = Literal["mean", "geometric", "minimum"]
# Of a rank, so that it has a logarithm.
_SMALLEST = 1e-12


JUNK = "junk."
"""The beginning of what stands among the scores of an image that is junk: "junk.blank" -> 1."""
DUPLICATE = f"{JUNK}duplicate"
"""Of one that another merge has made just so, which may be a good one."""


@dataclass(frozen=True)
class Measure:
    """How the scores of an image become its value.

    Each score is normalised: "zscore" by mean and spread of the baselines' images, "rank" by the share
    of them that it beats, in (0, 1). Then they are combined: the "mean" by `weights`, their "geometric"
    mean, or the "minimum" of those that have a weight. For None a single scorer's scores are taken as
    they are, and several are normalised. `penalties` are for marks of junk, in standard deviations of
    the baselines' images.
    """

    weights: Mapping[str, float]
    normalise: Normalise | None = None
    combine: Combine = "mean"
    penalties: Mapping[str, float] = field(default_factory=dict)

    @property
    def norm(self) -> Normalise:
        """How scores are normalised, where None leaves the choice."""
        if self.normalise:
            return self.normalise
        if self.combine == "geometric":
            return "rank"
        return "none" if len(self.weights) == 1 else "zscore"

    def require(self, scores: Mapping[str, float]) -> None:
        """TrialError for scores of which there is no value: a geometric mean of what is not positive."""
        if self.combine != "geometric" or self.norm != "none":
            return
        for name in self.weights.keys() & scores.keys():
            if scores[name] <= 0:
                raise TrialError(
                    f"scorer {name} gave {scores[name]:.4g}, of which there is no geometric mean; set "
                    f"value.normalise to 'rank', or value.combine to 'mean'"
                )

    @property
    def is_linear(self) -> bool:
        """Whether a value rises evenly with each score."""
        return self.combine == "mean" and self.norm != "rank"


@dataclass(frozen=True)
class Yardstick:
    """Turns the scores of one image into its value, as `measure` says.

    `known` holds the scores of the baselines' images by scorer, without which nothing is normalised.
    `offsets` says how much higher the baselines score on an image of the search's panel than on all of
    it, `noise` is the standard deviation of one image's value beside that, and `unit` of all of them.
    """

    measure: Measure
    known: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    offsets: Mapping[int, float] = field(default_factory=dict)
    noise: float = 0.0
    unit: float = 1.0

    @classmethod
    def from_baselines(
        cls, measure: Measure, baselines: Sequence[Result], panel: Sequence[Prompt]
    ) -> Yardstick:
        """The yardstick that the baselines' scores on `panel` give; RunError if they have none."""
        known = {}
        for name in measure.weights:
            scores = [s[name] for r in baselines for s in r.scores.values() if name in s]
            if not scores:
                raise RunError("no baseline could be judged, so no merge can be compared to it")
            known[name] = tuple(scores)
        bare = cls(replace(measure, penalties={}), known)
        every = [bare.value(scores) for result in baselines for scores in result.scores.values()]
        plain = cls(measure, known, unit=_spread(every))
        values = np.array(
            [
                [plain.value(result.scores[p.index]) for p in panel if p.index in result.scores]
                for result in baselines
                if len(result.scores) >= len(panel)
            ]
        )
        if not values.size:
            return plain
        shares = [prompt.weight for prompt in panel]
        means = np.average(values, axis=1, weights=shares)
        offsets = values.mean(0) - means.mean()
        rest = values - means[:, None] - offsets
        freedom = (len(values) - 1) * (len(panel) - 1)
        noise = math.sqrt(float((rest**2).sum()) / freedom) if freedom > 0 else 0.0
        places = (prompt.index for prompt in panel)
        found = dict(zip(places, map(float, offsets), strict=True))
        return replace(plain, offsets=found, noise=noise)

    def value(self, scores: Mapping[str, float]) -> float:
        """The value of one image, by those scorers that judge it."""
        weights = {name: w for name, w in self.measure.weights.items() if name in scores}
        terms = {name: self._normalised(name, scores[name]) for name in weights}
        total = sum(weights.values())
        if self.measure.combine == "minimum":
            found = min(terms.values())
        elif self.measure.combine == "geometric":
            logs = sum(weight * math.log(terms[name]) for name, weight in weights.items())
            found = math.exp(logs / total)
        else:
            found = sum(weight * terms[name] for name, weight in weights.items()) / total
        for name, penalty in self.measure.penalties.items():
            found -= penalty * self.unit * scores.get(f"{JUNK}{name}", 0.0)
        return found

    @cached_property
    def _scales(self) -> Mapping[str, tuple[float, float]]:
        """Mean and spread of the baselines' scores, of scorers that are normalised."""
        known = self.known if self.measure.norm != "none" else {}
        return {name: (float(np.mean(some)), _spread(some)) for name, some in known.items()}

    def _normalised(self, name: str, score: float) -> float:
        if name not in self._scales:
            return score
        mean, spread = self._scales[name]
        if self.measure.norm == "zscore":
            return (score - mean) / spread
        # Smoothed, so that it goes on beyond the best of them: Silverman 1986, Density Estimation,
        # equation 3.31.
        known = np.array(self.known[name])
        width = 0.9 * spread * len(known) ** -0.2
        return max(float(np.mean(ndtr((score - known) / width))), _SMALLEST)

    def factors(self, names: Sequence[str]) -> dict[str, float]:
        """How much the value of an image that these scorers judge rises with each of its scores."""
        weights = {name: w for name, w in self.measure.weights.items() if name in names}
        total = sum(weights.values())
        return {
            name: weight / total / self._scales.get(name, (0.0, 1.0))[1]
            for name, weight in weights.items()
        }

    def estimate(self, result: Result, panel: Sequence[Prompt]) -> Estimate:
        """The weighted mean value over the panel's images that `result` has."""
        seen = [p for p in panel if p.index in result.scores]
        values = [self.value(result.scores[p.index]) for p in seen]
        return weighted_mean(values, [p.weight for p in seen])

    def trial(
        self, result: Result, panel: Sequence[Prompt], further: Sequence[Prompt] = ()
    ) -> Estimate:
        """The value of a trial of the search, as if it had been judged on the whole panel.

        It may have been judged on `further` images, of which nobody knows how easy they are.

        A trial is shown few images, easy ones or hard ones, hence without their offsets; their own
        spread tells less of the error than that of the baselines.
        """
        seen = [p for p in (*panel, *further) if p.index in result.scores]
        share = shares(panel)
        n_seen = Counter(p.payload for p in seen)
        weights = [share[p.payload] / n_seen[p.payload] for p in seen]
        values = [
            self.value(result.scores[p.index]) - self.offsets.get(p.index, 0.0) for p in seen
        ]
        found = weighted_mean(values, weights)
        if not self.noise or not found.n:
            return found
        return Estimate(found.mean, self.noise / math.sqrt(effective_n(weights)), found.n)

    def difference(self, result: Result, other: Result, panel: Sequence[Prompt]) -> Interval:
        """`result` minus `other`, paired by prompt and seed, with a 95 % t interval."""
        both = [p for p in panel if p.index in result.scores and p.index in other.scores]
        pairs = [
            self.value(result.scores[p.index]) - self.value(other.scores[p.index]) for p in both
        ]
        found = weighted_mean(pairs, [p.weight for p in both])
        if found.n < 2:
            return Interval(found.mean, -math.inf, math.inf)
        freedom = effective_n([p.weight for p in both]) - 1
        if freedom <= 0:
            return Interval(found.mean, -math.inf, math.inf)
        reach = float(student.ppf(0.975, freedom)) * found.se
        return Interval(found.mean, found.mean - reach, found.mean + reach)


def _spread(values: Sequence[float]) -> float:
    """Standard deviation of the values; 1 of equal ones, whose computed spread may be rounding."""
    return float(np.std(values)) if max(values) > min(values) else 1.0


def mean_slopes(results: Sequence[Result]) -> dict[str, Estimate]:
    """The derivative of the mean value of all images of `results` by each parameter that was followed.

    The standard error is that between the groups of images whose slopes are known; 0 for a single one.
    """
    groups = [slopes for result in results for slopes in result.slopes if slopes.by]
    found = {}
    for name in dict.fromkeys(name for slopes in groups for name in slopes.by):
        some = [slopes for slopes in groups if name in slopes.by]
        estimate = weighted_mean([s.by[name] for s in some], [len(s.items) for s in some])
        found[name] = Estimate(estimate.mean, estimate.se, sum(len(s.items) for s in some))
    return found


def shares(panel: Sequence[Prompt]) -> dict[str, float]:
    """How much each payload counts in the mean over the panel."""
    found: dict[str, float] = {}
    for prompt in panel:
        found[prompt.payload] = found.get(prompt.payload, 0.0) + prompt.weight
    return found


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Weighted mean of independent values; its standard error by the sample's own spread.

    se^2 = n / (n - 1) sum(w^2 (x - m)^2) / sum(w)^2 with the effective n of the weights; the ratio
    estimator of Cochran 1977, Sampling Techniques, section 6.
    """
    x, w = np.asarray(values, float), np.asarray(weights, float)
    x, w = x[w > 0], w[w > 0]
    n = len(x)
    mean = float(np.average(x, weights=w))
    if n < 2:
        return Estimate(mean, 0.0, n)
    n_effective = effective_n(list(w))
    if n_effective <= 1:  # one weight outdoes the others by more than a float can tell
        return Estimate(mean, 0.0, n)
    spread = float(np.sum((w * (x - mean)) ** 2)) / float(w.sum()) ** 2
    return Estimate(mean, math.sqrt(n_effective / (n_effective - 1) * spread), n)


def effective_n(weights: Sequence[float]) -> float:
    """How many equal weights tell as much as these: sum(w)^2 / sum(w^2). Kish 1965."""
    w = np.asarray(weights, float)
    return float(w.sum() ** 2 / np.sum(w**2))
