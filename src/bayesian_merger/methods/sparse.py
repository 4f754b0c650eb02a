"""Methods that keep only some of what the models learnt: TIES, DARE and DELLA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from bayesian_merger.methods import Share, Weight, method

# What torch.rand draws are multiples of this.
_STEP = 2**-24


@method
def ties_add_difference(
    a: Tensor, b: Tensor, c: Tensor, *, alpha: Weight = 1.0, beta: Share = 0.2
) -> Tensor:
    """Add to `c` the large differences of `a` and `b` that agree: c + alpha mean(a - c, b - c).

    Of each difference the share `beta` of largest magnitude is kept; the mean is over those left.
    Where both are left and their signs differ, the result is `c`: each model has one vote, as in
    sd-meh; `ties` is the paper's. `alpha` or `beta` 0 gives `c` exactly.
    Yadav et al. 2023, arXiv:2306.01708, algorithm 1, except for the vote.
    """
    differences = [_trimmed(a - c, beta), _trimmed(b - c, beta)]
    votes = differences[0].sign().add_(differences[1].sign())
    return _mean_of_elected(differences, votes).mul_(alpha).add_(c)


@method
def ties(a: Tensor, b: Tensor, *more: Tensor, alpha: Weight = 1.0, density: Share = 0.2) -> Tensor:
    """Add to the ancestor `a` the large differences of n models that agree: a + alpha mean(b - a, ...).

    Trim: of each difference the share `density` of largest magnitude is kept. Elect: at each
    position, the sign of the sum of what is left. Merge: the mean of what has that sign.
    `alpha` or `density` 0 gives `a` exactly.
    Yadav et al. 2023, arXiv:2306.01708, algorithm 1; in this field, sd-mecha with vote_sgn.
    """
    differences = [_trimmed(model - a, density) for model in (b, *more)]
    return _mean_of_elected(differences, sum(differences[1:], differences[0])).mul_(alpha).add_(a)


@method
def dare_add_difference(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    alpha: Weight = 1.0,
    density: Share = 0.5,
    generator: Generator,
) -> Tensor:
    """Add a random part of b's difference, scaled up for the rest: a + alpha m (b - c) / density.

    At each position m is 1 with the probability `density` and else 0, so that on average it is
    `add_difference`, as it is with `density` 1. `alpha` or `density` 0 gives `a` exactly.
    Yu et al. 2024, arXiv:2311.03099, section 3, whose p is 1 - density; in this field, sd-mecha.
    """
    if density < _STEP:
        return a.clone()
    kept = _draw(a, generator) < density
    return (b - c).mul_(kept).mul_(alpha / density).add_(a)


@method
def della(
    a: Tensor,
    b: Tensor,
    *more: Tensor,
    alpha: Weight = 1.0,
    density: Share = 0.5,
    epsilon: Share = 0.14,
    generator: Generator,
) -> Tensor:
    """Add to the ancestor `a` random parts of n differences that agree: a + alpha mean(m d / p).

    Drop: in each row (along the first axis) of a difference d, each value is kept with a
    probability p that rises with the rank of its magnitude, from density - epsilon / 2 to
    density + epsilon / 2, or over less where that would leave [0, 1]. Elect and fuse: as in
    `ties`. `epsilon` 0 is DARE with TIES. `alpha` or `density` 0 gives `a` exactly, and `density` 1
    keeps everything.
    Deep et al. 2024, arXiv:2406.11617, section 3, whose p is the chance to be dropped; the default
    of `epsilon` is that of its README.
    """
    differences = [_sampled(model - a, density, epsilon, generator) for model in (b, *more)]
    return _mean_of_elected(differences, sum(differences[1:], differences[0])).mul_(alpha).add_(a)


def _trimmed(difference: Tensor, density: float) -> Tensor:
    """The share `density` of largest magnitude, or more if the least of these are equal; else 0."""
    n_kept = round(density * difference.numel())
    if n_kept == 0:
        return torch.zeros_like(difference)
    sizes = difference.detach().abs().flatten()
    least = sizes.kthvalue(difference.numel() - n_kept + 1).values
    # It keeps what is larger than its threshold.
    return torch.hardshrink(difference, float(least.nextafter(torch.zeros_like(least))))


def _sampled(difference: Tensor, density: float, epsilon: float, generator: Generator) -> Tensor:
    """What MAGPRUNE, the drop of DELLA, leaves of `difference`, divided by its chance to be left."""
    rows = difference.flatten(1) if difference.ndim > 1 else difference.reshape(1, -1)
    n = rows.shape[1]
    reach = min(epsilon / 2, density, 1 - density)
    ranks = torch.arange(n, device=rows.device)
    rising = density + reach * ((2 * ranks + 1) / max(1, n) - 1)
    order = rows.abs().argsort(dim=1, stable=True)
    chance = torch.empty_like(rows).scatter_(1, order, rising.expand_as(rows))
    kept = _draw(rows, generator) < chance
    return torch.where(kept, rows / chance.clamp_(min=_STEP), 0.0).reshape(difference.shape)


def _draw(like: Tensor, generator: Generator) -> Tensor:
    """Uniform numbers in [0, 1), drawn on the CPU, then moved to where `like` is."""
    return torch.rand(like.shape, generator=generator).to(like.device)


def _mean_of_elected(differences: Sequence[Tensor], votes: Tensor) -> Tensor:
    """At each position the mean of the differences that have the sign of `votes`; 0 if none has."""
    elected = votes.sign()
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for difference in differences:
        agreeing = (difference * elected).clamp_(min=0)
        total += agreeing
        count += agreeing.sign_()
    return total.mul_(elected).div_(count.clamp_(min=1))
