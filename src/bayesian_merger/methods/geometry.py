"""Methods that look at the angles and lengths of whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesian_merger.methods import Share, Weight, method

# Numbers that are summed in float64 at a time: few enough to stay in the processor's cache.
_PIECE = 2**16
# A length below this counts as this; its inverse is still a float32.
_TINY = 1e-38


@method
def slerp(a: Tensor, b: Tensor, *, alpha: Weight = 0.5) -> Tensor:
    """Turn `a` towards `b`: l (sin((1 - alpha) w) a / |a| + sin(alpha w) b / |b|) / sin(w).

    w is the angle between the tensors as vectors, and l = (1 - alpha) |a| + alpha |b|: the length
    does not shrink on the way, as that of a weighted sum does. `alpha` 0 gives `a`, 1 gives `b`.
    Where sin(w) is below 1e-6 it is the weighted sum: on parallel vectors both are the same, and
    opposite ones, like zeros, define no arc.
    Shoemake 1985, doi:10.1145/325334.325242; with the length, sd-mecha.
    """
    products = _products([a, b])
    lengths = products.diagonal().sqrt()
    angle = torch.arccos((products[0, 1] / lengths.prod()).clamp(-1, 1))
    sine = torch.sin(angle)
    if not sine > 1e-6:  # or not a number, since a length is 0
        return torch.lerp(a, b, alpha)
    length = torch.lerp(lengths[0], lengths[1], alpha)
    of_a = torch.sin((1 - alpha) * angle) / sine * (length / lengths[0])
    of_b = torch.sin(alpha * angle) / sine * (length / lengths[1])
    return (a * of_a.to(a.dtype)).addcmul_(b, of_b.to(a.dtype))


@method
def cosine_add_difference_a(a: Tensor, b: Tensor, *, alpha: Weight = 0.5) -> Tensor:
    """Add b - a to the columns that point elsewhere: a + (1 - k) (b - a), k = cos(a, b) - alpha.

    A column is what varies along the first axis; cos is that of the angle between a's and b's, or
    0 if one is zero, and k is kept in [0, 1]. `alpha` 0 changes least where both are alike; 1
    gives `b` exactly.
    The mode cosineA of supermerger in the form of sd-mecha, which leaves out the scaling of cos by
    its extremes over the whole model.
    """
    return _lerp_the_unlike(a, b, _cosines(*_column_products(a, b)), alpha)


@method
def cosine_add_difference_b(a: Tensor, b: Tensor, *, alpha: Weight = 0.5) -> Tensor:
    """Add b - a to what points elsewhere: a + (1 - k) (b - a), k = mean cos(a, b) - alpha.

    As `cosine_add_difference_a`, but cos is the mean of the column's and the whole tensor's.
    The mode cosineB of supermerger in the form of sd-mecha.
    """
    columns = _column_products(a, b)
    whole = _cosines(*(products.sum() for products in columns))
    return _lerp_the_unlike(a, b, (_cosines(*columns) + whole) / 2, alpha)


@method
def euclidean_add_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: Share = 0.5) -> Tensor:
    """Move `c` by the root of mean squares of two differences: c + |m| d / |d|.

    With e = (a - c) / |a - c|, f = (b - c) / |b - c| and m = (1 - alpha) (a - c) + alpha (b - c),
    d is sign(m) sqrt((1 - alpha) e^2 + alpha f^2): what only one model learnt is weakened less than
    by the weighted sum. A difference of length 0 counts as 0; where m is 0 the result is `c`.
    From sd-meh.
    """
    of_a, of_b = a - c, b - c
    lengths = _products([of_a, of_b]).diagonal().sqrt().clamp(min=_TINY)
    scale_a, scale_b = (lengths.new_tensor([1 - alpha, alpha]).sqrt() / lengths).to(a.dtype)
    mean = torch.lerp(of_a, of_b, alpha)
    moved = torch.hypot(of_a.mul_(scale_a), of_b.mul_(scale_b)) * mean.sign()
    length, length_moved = _products([mean, moved]).diagonal().sqrt()
    return moved.mul_((length / length_moved.clamp(min=_TINY)).to(a.dtype)).add_(c)


@method
def perpendicular_component(a: Tensor, b: Tensor, c: Tensor, *, alpha: Weight = 1.0) -> Tensor:
    """Add what `b` learnt and `a` did not: a + alpha (d - (d.e / e.e) e), d = b - c, e = a - c.

    This is the part of d perpendicular to e, both as vectors: what both learnt is not added again.
    If `a` is `c`, all of d is added. `alpha` 0 gives `a` exactly.
    From sd-mecha, where the whole is called add_perpendicular.
    """
    of_a, of_b = a - c, b - c
    products = _products([of_a, of_b])
    shared = (products[0, 1] / products[0, 0]).nan_to_num(0.0)
    return of_b.sub_(of_a.mul_(shared.to(a.dtype))).mul_(alpha).add_(a)


@method
def model_stock(a: Tensor, b: Tensor, c: Tensor, *more: Tensor, alpha: Weight = 1.0) -> Tensor:
    """Move the ancestor `a` towards the mean of n models: a + alpha t (mean(b, c, ...) - a).

    t = n cos / (1 + (n - 1) cos), where cos is the mean, kept in [0, 1], of the cosines between
    the models' differences from `a`, of all pairs: the more the models agree, the further `a` moves.
    `alpha` 1 is the paper's; 0 gives `a` exactly, and so do models that do not agree.
    Jang et al. 2024, arXiv:2403.19522; in this field, sd-mecha.
    """
    models = (b, c, *more)
    n = len(models)
    products = _products(models, origin=a)
    squares = products.diagonal()
    cosines = _cosines(products, squares, squares[:, None])
    cosine = ((cosines.sum() - cosines.trace()) / (n * (n - 1))).clamp(0, 1)
    ratio = n * cosine / (1 + (n - 1) * cosine)
    mean = sum(more, b + c).div_(n)
    return torch.lerp(a, mean, (alpha * ratio).to(a.dtype))


def _products(models: Sequence[Tensor], origin: Tensor | None = None) -> Tensor:
    """The dot products of all `models` with each other, seen from `origin`, in float64: [n, n].

    In float32, torch's norm of the 38 million numbers of a text encoder's embedding is off by half
    a percent. In pieces, since copies in float64 would take twice the room of all the models.
    """
    tensors = [tensor.flatten() for tensor in (*models, *([] if origin is None else [origin]))]
    total = tensors[0].new_zeros((len(models), len(models)), dtype=torch.float64)
    for start in range(0, tensors[0].numel(), _PIECE):
        rows = torch.stack([tensor[start : start + _PIECE] for tensor in tensors]).double()
        if origin is not None:
            rows = rows[:-1] - rows[-1]
        total += rows @ rows.T
    return total


def _column_products(a: Tensor, b: Tensor) -> Tensor:
    """The dot products a.b, a.a and b.b of a's and b's columns, in float64: [3, ...]."""
    columns_a, columns_b = (x.flatten(1) if x.ndim > 1 else x.reshape(-1, 1) for x in (a, b))
    n_rows, n_columns = columns_a.shape
    total = a.new_empty((3, n_columns), dtype=torch.float64)
    width = max(1, _PIECE // max(1, n_rows))
    for start in range(0, n_columns, width):
        piece = slice(start, start + width)
        x, y = columns_a[:, piece].double(), columns_b[:, piece].double()
        total[:, piece] = torch.stack([(x * y).sum(0), (x * x).sum(0), (y * y).sum(0)])
    return total.reshape(3, *a.shape[1:])


def _cosines(mixed: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """The cosines of the angles between vectors a and b with the dot products a.b, a.a and b.b.

    They are 0 where a or b is zero.
    """
    return (mixed / (of_a * of_b).sqrt()).nan_to_num(0.0)


def _lerp_the_unlike(a: Tensor, b: Tensor, cosines: Tensor, alpha: float) -> Tensor:
    kept = (cosines - alpha).clamp(0, 1)
    return torch.lerp(a, b, (1 - kept).to(a.dtype))
