"""Methods that are linear in the tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesian_merger.methods import Weight, method


@method
def weighted_sum(a: Tensor, b: Tensor, *, alpha: Weight = 0.5) -> Tensor:
    """Interpolate from `a` to `b`: (1 - alpha) a + alpha b.

    `alpha` 0 gives `a` and 1 gives `b` exactly; values outside [0, 1] extrapolate.
    """
    return torch.lerp(a, b, alpha)


@method
def add_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: Weight = 1.0) -> Tensor:
    """Move `a` by what `b` learnt since their common ancestor `c`: a + alpha (b - c).

    `alpha` 0 gives `a`, 1 the full difference.
    Task arithmetic, Ilharco et al. 2023, arXiv:2212.04089, section 2.
    """
    return a + alpha * (b - c)
