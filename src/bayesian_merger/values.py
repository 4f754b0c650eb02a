"""Scores -> values: what the optimiser sees, with its standard error, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from bayesian_merger.data import Estimate, Interval, Prompt, Result
from bayesian_merger.errors import RunError


@dataclass(frozen=True)
class Yardstick:
    """Turns the scores of one image into its value.

    With one scorer the value is its score. With several, each is first normalised by `scale`, the
    mean and spread of its scores over the baselines' images, then averaged by `weights`.
    """

    weights: Mapping[str, float]
    scale: Mapping[str, tuple[float, float]]

    @classmethod
    def from_baselines(
        cls, weights: Mapping[str, float], baselines: Sequence[Result]
    ) -> Yardstick:
        """The yardstick that the baselines' scores give; RunError if they have none."""
        scale = {}
        for name in weights:
            scores = [s[name] for result in baselines for s in result.scores.values()]
            if not scores:
                raise RunError("no baseline could be judged, so no merge can be compared to it")
            # Of equal scores the computed spread is not always 0, but rounding.
            spread = float(np.std(scores)) if max(scores) > min(scores) else 1.0
            scale[name] = (float(np.mean(scores)), spread)
        return cls(weights, scale)

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
