"""Methods that weigh the difference of two models position by position."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesian_merger.methods import Share, Weight, elementwise, method


@method
@elementwise
def multiply_difference(
    a: Tensor, b: Tensor, c: Tensor, *, alpha: Share = 0.5, beta: Weight = 0.5
) -> Tensor:
    """Move `c` by the geometric mean of two differences: c + s |a - c|^(1 - alpha) |b - c|^alpha.

    s is the sign of (1 - beta) a + beta b - c; where that is 0 the result is `c`. What only one
    model learnt is forgotten, unless `alpha` is 0 (a's difference counts alone) or 1 (b's).
    From sd-meh.
    """
    of_a, of_b = a - c, b - c
    sign = torch.lerp(of_a, of_b, beta).sign_()
    size = of_a.abs_().pow_(1 - alpha).mul_(of_b.abs_().pow_(alpha))
    return size.mul_(sign).add_(c)


@method
@elementwise
def similarity_add_difference(
    a: Tensor, b: Tensor, c: Tensor, *, alpha: Weight = 1.0, beta: Weight = 0.5
) -> Tensor:
    """Add b's difference where `a` and `b` disagree: a + alpha ((1 - s) (b - c) + s (b - a) / 2).

    The similarity s is beta (1 + a b / max(|a|, |b|)^2) / 2: `beta` where `a` and `b` are equal, 0
    where they are opposite, and there, as everywhere with `beta` 0, it is `add_difference`.
    `alpha` 0 gives `a` exactly.
    From sd-meh.
    """
    larger = torch.maximum(a.abs(), b.abs())
    # Not a number where both are 0, and thus equal.
    similarity = (a / larger).mul_(b / larger).nan_to_num_(nan=1.0).add_(1).mul_(beta / 2)
    return torch.lerp(b - c, (b - a).mul_(0.5), similarity).mul_(alpha).add_(a)


@method
@elementwise
def train_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: Weight = 1.0) -> Tensor:
    """Add b's difference where `a` is far from `b`: a + 1.8 alpha s (b - c).

    s is |b - a| / (|b - a| + |b - c|), and 0 where all three are equal: the nearer `a` already is
    to what `b` learnt, the less it moves. `alpha` 0 gives `a` exactly.
    The mode trainDifference of supermerger, whose own is the factor 1.8.
    """
    difference = b - c
    distance = (b - a).abs_()
    both = difference.abs().add_(distance)
    share = distance.div_(both.clamp_(min=torch.finfo(a.dtype).tiny))
    return share.mul_(difference).mul_(1.8 * alpha).add_(a)
