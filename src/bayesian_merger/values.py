"""Scores -> values: what the optimiser sees, with its standard error, and paired differences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t as student

from bayesian_merger.data import Estimate, Interval, Prompt, Result
from bayesian_merger.errors import RunError


@dataclass(frozen=True)
class Yardstick:
    """Turns the scores of one image into its value.

    With one scorer the value is its score. With several, each is first normalised by `scale`, the
    mean and spread of its scores over the baselines' images, then averaged by `weights`.

    `offsets` says how much higher the baselines score on an image of the search's panel than on all of
    it, and `noise` is the standard deviation of one image's value beside that.
    """

    weights: Mapping[str, float]
    scale: Mapping[str, tuple[float, float]]
    offsets: Mapping[int, float] = field(default_factory=dict)
    noise: float = 0.0

    @classmethod
    def from_baselines(
        cls, weights: Mapping[str, float], baselines: Sequence[Result], panel: Sequence[Prompt]
    ) -> Yardstick:
        """The yardstick that the baselines' scores on `panel` give; RunError if they have none."""
        scale = {}
        for name in weights:
            scores = [s[name] for result in baselines for s in result.scores.values()]
            if not scores:
                raise RunError("no baseline could be judged, so no merge can be compared to it")
            # Of equal scores the computed spread is not always 0, but rounding.
            spread = float(np.std(scores)) if max(scores) > min(scores) else 1.0
            scale[name] = (float(np.mean(scores)), spread)
        plain = cls(weights, scale)
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
        return cls(weights, scale, dict(zip(places, map(float, offsets), strict=True)), noise)

    def value(self, scores: Mapping[str, float]) -> float:
        """The value of one image."""
        if len(self.weights) == 1:
            return next(scores[name] for name in self.weights)
        total = sum(self.weights.values())
        terms = (
            weight * (scores[name] - self.scale[name][0]) / self.scale[name][1]
            for name, weight in self.weights.items()
        )
        return sum(terms) / total

    def estimate(self, result: Result, panel: Sequence[Prompt]) -> Estimate:
        """The weighted mean value over the panel's images that `result` has."""
        seen = [p for p in panel if p.index in result.scores]
        values = [self.value(result.scores[p.index]) for p in seen]
        return weighted_mean(values, [p.weight for p in seen])

    @property
    def factors(self) -> dict[str, float]:
        """How much the value of an image rises with each of its scores."""
        if len(self.weights) == 1:
            return dict.fromkeys(self.weights, 1.0)
        total = sum(self.weights.values())
        return {name: w / total / self.scale[name][1] for name, w in self.weights.items()}

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
