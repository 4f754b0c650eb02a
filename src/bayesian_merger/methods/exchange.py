"""Methods that exchange parts of one model for parts of another."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesian_merger.methods import Share, method


@method
def tensor_sum(a: Tensor, b: Tensor, *, alpha: Share = 0.5, beta: Share = 0.0) -> Tensor:
    """Replace rows of `a` by those of `b`: b[i] if beta <= i / n < beta + alpha, else a[i].

    These are round(alpha n) of the n rows along the first axis, from row round(beta n) on; after
    the last comes the first. `alpha` 0 gives `a` and 1 gives `b` exactly. A number is one row.
    The mode tensor of supermerger.
    """
    if a.ndim == 0:
        return (b if round(alpha) else a).clone()
    merged = a.clone()
    start, stop = _window(alpha, beta, len(a))
    merged[start:stop] = b[start:stop]
    wrapped = max(0, stop - len(a))
    merged[:wrapped] = b[:wrapped]
    return merged


@method
def top_k_tensor_sum(a: Tensor, b: Tensor, *, alpha: Share = 0.5, beta: Share = 0.0) -> Tensor:
    """Put values of `a` in the order of b's: position i gets sorted(a)[rank of b[i] in b].

    Only where the new value's magnitude is in a window over those of `a`: a share `alpha` of
    them, smallest first, from `beta` on; after the largest comes the smallest. Elsewhere `a` stays.
    `alpha` 0 gives `a` exactly. Equal values of `b` rank in the order of their positions.
    From sd-meh.
    """
    values = a.flatten().sort().values
    places = b.flatten().argsort(stable=True)
    sizes = values.abs()
    n = len(values)
    start, stop = _window(alpha, beta, n)
    chosen = sizes > _kth_smallest(sizes, start)
    if stop <= n:
        chosen &= sizes <= _kth_smallest(sizes, stop)
    else:
        chosen |= sizes <= _kth_smallest(sizes, stop - n)
    merged = a.flatten().clone()
    merged[places[chosen]] = values[chosen]
    return merged.reshape(a.shape)


@method
def distribution_crossover(
    a: Tensor, b: Tensor, c: Tensor, *, alpha: Share = 0.5, beta: Share = 0.5
) -> Tensor:
    """Take low frequencies of `a` and high ones of `b`, in c's order: a + irfft(f rfft(b - a)).

    The positions are sorted by c's values. The filter f rises from 0 to 1 about the frequency
    `alpha` (0 the lowest, 1 the highest) over a width `beta`: (frequency - alpha) / beta + 1/2,
    kept in [0, 1]; `beta` 0 is a step, and then `alpha` 1 gives `a` exactly and 0 gives `b`. A
    single number has no frequencies: it is alpha a + (1 - alpha) b. Equal values of `c` are in
    the order of their positions.
    From sd-meh.
    """
    n = a.numel()
    if n < 2:
        return torch.lerp(b, a, alpha)
    order = c.flatten().argsort(stable=True)
    spectrum = torch.fft.rfft((b - a).flatten()[order])
    frequency = torch.arange(len(spectrum), device=a.device) / len(spectrum)
    if beta > torch.finfo(frequency.dtype).tiny:  # less is 0 in float32
        spectrum *= ((frequency - alpha) / beta + 0.5).clamp_(0, 1)
    else:
        spectrum *= frequency >= alpha
    merged = a.flatten().clone()
    merged[order] += torch.fft.irfft(spectrum, n)
    return merged.reshape(a.shape)


def _window(width: float, offset: float, n: int) -> tuple[int, int]:
    """First and end of a share `width` of `n` things in a circle, from `offset` on."""
    start = round(offset * n)
    return start, start + round(width * n)


def _kth_smallest(sizes: Tensor, k: int) -> Tensor:
    """The k-th smallest of `sizes`, which are not negative; below all of them if `k` is 0."""
    return sizes.kthvalue(k).values if k > 0 else sizes.new_tensor(-1.0)
