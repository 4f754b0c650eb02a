"""Methods that add up shares of the models."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from bayesian_merger.methods import Share, Weight, linear, method


@method
@linear
def weighted_sum(a: Tensor, b: Tensor, *, alpha: Weight = 0.5) -> Tensor:
    """Interpolate from `a` to `b`: (1 - alpha) a + alpha b.

    `alpha` 0 gives `a` and 1 gives `b` exactly; values outside [0, 1] extrapolate.
    The webuis' 'weighted sum'; with weights per block, sdweb-merge-block-weighted-gui by bbc-mc.
    """
    return torch.lerp(a, b, alpha)


@method
@linear
def weighted_subtraction(a: Tensor, b: Tensor, *, alpha: Share = 0.5, beta: Share = 0.5) -> Tensor:
    """Take out of `a` the share s of `b` that was mixed in: (a - s b) / (1 - s), s = alpha beta.

    Undoes `weighted_sum`: if `a` is (1 - s) x + s b, the result is x. s 0 gives `a` exactly. At
    s 1 nothing of x is left in `a` and the formula has no value, so s ends at 1 - 1/1024.
    From sd-meh.
    """
    share = min(alpha * beta, 1 - 2**-10)
    return torch.lerp(a, b, -share / (1 - share))


@method
@linear
def add_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: Weight = 1.0) -> Tensor:
    """Move `a` by what `b` learnt since their common ancestor `c`: a + alpha (b - c).

    `alpha` 0 gives `a` exactly, 1 the full difference.
    Task arithmetic, Ilharco et al. 2023, arXiv:2212.04089, section 2.
    """
    return (b - c).mul_(alpha).add_(a)


@method
@linear
def sum_twice(
    a: Tensor, b: Tensor, c: Tensor, *, alpha: Weight = 0.5, beta: Weight = 0.5
) -> Tensor:
    """Interpolate from `a` to `b`, then to `c`: (1 - beta) ((1 - alpha) a + alpha b) + beta c.

    `alpha` 0 leaves out `b`; `beta` 0 leaves out `c`, and 1 gives `c` exactly.
    From supermerger.
    """
    return torch.lerp(a, b, alpha).lerp_(c, beta)


@method
@linear
def triple_sum(
    a: Tensor, b: Tensor, c: Tensor, *, alpha: Weight = 1 / 3, beta: Weight = 1 / 3
) -> Tensor:
    """Add up shares of three models: (1 - alpha - beta) a + alpha b + beta c.

    Both 0 give `a` exactly. The share of `a` is negative if alpha + beta exceeds 1.
    From supermerger.
    """
    return ((1 - alpha - beta) * a).add_(b, alpha=alpha).add_(c, alpha=beta)


@method
@linear
def n_average(a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
    """Average n models, each with the same share: (a + b + ...) / n. There are no weights.

    The uniform soup of Wortsman et al. 2022, arXiv:2203.05482, section 2; in this field, sd-mecha.
    """
    return reduce(Tensor.add_, more, a + b).div_(2 + len(more))
