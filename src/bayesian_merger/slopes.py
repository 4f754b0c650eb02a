"""The slopes of a score by each weight, from single images to what they tell of a merge.

Images differ more in their slopes than in their scores: of most the score would change a little, of a
few, which are about to become another picture, very much, and an image that is steep by one weight is
steep by most. So steep images count less in the mean of a merge, and the errors of its slopes go
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayesian_merger.gp import Array, Slopes

# Beyond this steepness, half that of the usual image, an image counts the less the steeper it is.
_STEEP = 0.5
# How many images the first guess of the slopes' variance counts for.
_PRIOR_FREEDOM = 4.0
# Variance of a slope that was not measured, beside the largest of those that were.
_UNKNOWN = 1e6


class Slope(NamedTuple):
    """Derivative [d] of the mean score of `n` images by each weight; NaN where it was not measured."""

    n: int
    slope: Array


def pooled(measured: Sequence[Sequence[Slope]]) -> Slopes | None:
    """What is known of the slopes of merges, of which each has those of its images or none.

    The covariance of one image's slopes is taken to be the same at all merges. Until images are many,
    its diagonal is drawn to the mean square of the slopes and the rest of it to 0, as if d images more
    had been seen whose slopes have nothing to do with each other.
    """
    point = [i for i, slopes in enumerate(measured) if slopes]
    if not point:
        return None
    merge = np.array([row for row, i in enumerate(point) for _ in measured[i]])
    n = np.array([[group.n] for i in point for group in measured[i]], float)
    told = np.array([group.slope for i in point for group in measured[i]])
    each = np.nan_to_num(told)
    weights = n * _shares(each * np.sqrt(n))
    totals = _sums(weights, merge)
    means = _sums(weights * each, merge) / totals
    rests = weights / np.sqrt(n) * (each - means[merge])
    around_zero = (weights**2 / n * each**2).mean(0)
    freedom = len(n) - len(point)
    variance = ((rests**2).sum(0) + _PRIOR_FREEDOM * around_zero) / (freedom + _PRIOR_FREEDOM)
    # Where a weight changes nothing, all its slopes are 0.
    variance = np.maximum(variance, 1e-6 * max(float(variance.max()), 1e-12))
    errors = variance * _sums(n, merge) / totals**2
    is_unknown = _sums(np.isnan(told), merge) > 0
    errors[is_unknown] = _UNKNOWN * errors.max()
    sd = np.sqrt(errors)
    related = _related(rests, freedom) * (~is_unknown[:, :, None] & ~is_unknown[:, None])
    related[:, np.arange(len(variance)), np.arange(len(variance))] = 1.0
    return Slopes(point, means, sd[:, :, None] * related * sd[:, None])


def _shares(each: Array) -> Array:
    """How much each row counts, [n, 1] up to 1, by its length; all columns count alike in that."""
    scale = np.sqrt((each**2).mean(0))
    length = np.sqrt(((each / np.where(scale > 0, scale, 1.0)) ** 2).mean(1, keepdims=True))
    reach = _STEEP * np.median(length)
    shares: Array = np.where(length > reach, reach / np.where(length > 0, length, 1.0), 1.0)
    return shares


def _related(rests: Array, freedom: int) -> Array:
    """Correlations of the columns, drawn to 0."""
    squares = rests.T @ rests
    scale = np.sqrt(squares.diagonal())
    scale = np.where(scale > 0, scale, 1.0)
    related: Array = freedom / (freedom + len(scale)) * squares / np.outer(scale, scale)
    return related


def _sums(rows: Array | NDArray[np.bool_], group: NDArray[np.intp]) -> Array:
    """The sum of each group's rows."""
    found = np.zeros((int(group.max()) + 1, rows.shape[1]))
    np.add.at(found, group, rows)
    return found
