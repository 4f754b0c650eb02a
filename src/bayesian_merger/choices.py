"""Which of two pictures is better -> how much is known of the merges that made them.

Each picture has a strength: that of its merge, and its own luck. The first of two is chosen with the
probability 1 / (1 + exp(-d)) for the difference d of their strengths; Bradley and Terry 1952, Biometrika
39:324. Both are Gaussian before anything was chosen, and so, about the most likely strengths, is what
the choices say of them (Laplace's approximation; Chu and Ghahramani 2005, Preference learning with
Gaussian processes; Rasmussen and Williams 2006, section 3.4).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

Array = NDArray[np.float64]

_MOST_STEPS = 50
_NEAR = 1e-8
# Mean and standard deviation of the logarithms of the merges' and of the luck's standard deviation.
_USUAL = ((0.5, 1.0), (0.3, 0.5))


class Choice(NamedTuple):
    """Merges `first` and `second`, by number, made the prompt and seed `item`.

    `share` is that of the first in the choice between its picture and the other: 1, 0, or 0.5 for alike.
    """

    item: Hashable
    first: int
    second: int
    share: float


class Told(NamedTuple):
    """What choices tell of the strengths f of merges [n], nearly: exp(h f - f g f / 2 - rest / 2)."""

    rest: Tensor
    g: Tensor
    h: Tensor


class Choices:
    """Choices between pictures of merges, of which each picture is judged as often as it is shown."""

    def __init__(self, choices: Sequence[Choice], n_merges: int) -> None:
        places: dict[tuple[Hashable, int], int] = {}
        for choice in choices:
            for merge in (choice.first, choice.second):
                places.setdefault((choice.item, merge), len(places))
        merge_of = torch.tensor([merge for _, merge in places], dtype=torch.long)
        self.made = torch.nn.functional.one_hot(merge_of, n_merges).double()
        n = len(choices)
        # Which picture is chosen [n, pictures]: 1 for the first, -1 for the second.
        self.lead = torch.zeros(n, len(places), dtype=torch.float64)
        rows = torch.arange(n)
        self.lead[rows, [places[c.item, c.first] for c in choices]] = 1.0
        self.lead[rows, [places[c.item, c.second] for c in choices]] -= 1.0
        self.shares = torch.tensor([c.share for c in choices], dtype=torch.float64)
        self._found = torch.zeros(len(places), dtype=torch.float64)

    def told(self, kernel: Tensor, luck: Tensor) -> Told:
        """By the covariance of the merges' strengths [n, n] and the variance of each picture's luck."""
        whole = self.made @ kernel @ self.made.T + luck * torch.eye(
            len(self._found), dtype=kernel.dtype
        )
        with torch.no_grad():
            self._found = self._likeliest(whole, self._found)
        # One more step, whose derivatives are those of the place where they all end.
        strength = self._step(whole, self._found)
        value, slope, root = self._about(strength)
        on_lead = root @ strength
        b = root.T @ on_lead + slope
        constant = value - b @ strength + 0.5 * on_lead @ on_lead
        # (1 + luck W)^-1 W and (1 + luck W)^-1 b of the curvature W = root' root
        spread = torch.linalg.cholesky(_one_and(luck * root @ root.T))
        half = torch.linalg.solve_triangular(spread, root, upper=False)
        narrowed = half.T @ half
        told = b - luck * narrowed @ b
        rest = -2 * constant - luck * b @ told + 2 * spread.diagonal().log().sum()
        return Told(rest, self.made.T @ narrowed @ self.made, self.made.T @ told)

    def _likeliest(self, whole: Tensor, strength: Tensor) -> Tensor:
        # From far away the steps may lead nowhere; from where all are equal they do not.
        for start in (strength, torch.zeros_like(strength)):
            strength = start
            for _ in range(_MOST_STEPS):
                found = self._step(whole, strength)
                if bool(((found - strength).abs() < _NEAR).all()):
                    return found
                strength = found
        return strength

    def _step(self, whole: Tensor, strength: Tensor) -> Tensor:
        """Newton's, from there to the likeliest strengths."""
        _, slope, root = self._about(strength)
        at_b = whole @ (root.T @ (root @ strength) + slope)
        across = root @ whole
        inner = torch.linalg.cholesky(_one_and(across @ root.T))
        found: Tensor = at_b - across.T @ torch.cholesky_solve((root @ at_b)[:, None], inner)[:, 0]
        return found

    def _about(self, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log likelihood, its slope, and a root [n, pictures] of its negative second derivative."""
        d = self.lead @ strength
        won = torch.sigmoid(d)
        value = (self.shares * d - softplus(d)).sum()
        root = (won * (1 - won)).sqrt()[:, None] * self.lead
        return value, self.lead.T @ (self.shares - won), root


def _one_and(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype)


def strengths(choices: Sequence[Choice], n_merges: int) -> tuple[Array, Array]:
    """Likely strengths of merges [n], and their covariance [n, n], from the choices alone.

    How much merges and luck differ is fitted to the choices too, from what is usual.
    """
    data, usual = Choices(choices, n_merges), torch.tensor(_USUAL, dtype=torch.float64)
    same = torch.eye(n_merges, dtype=torch.float64)

    def loss(theta: Array) -> tuple[float, Array]:
        x = torch.from_numpy(theta).requires_grad_()
        told = data.told(torch.exp(2 * x[0]) * same, torch.exp(2 * x[1]))
        precision = torch.linalg.cholesky(torch.exp(-2 * x[0]) * same + told.g)
        solved = torch.linalg.solve_triangular(precision, told.h[:, None], upper=False)
        total = 0.5 * (told.rest - (solved**2).sum()) + precision.diagonal().log().sum()
        total = total + n_merges * x[0] + 0.5 * (((x - usual[:, 0]) / usual[:, 1]) ** 2).sum()
        (slope,) = torch.autograd.grad(total, x)
        return float(total.detach()), slope.numpy()

    found = minimize(loss, usual[:, 0].numpy(), jac=True, method="L-BFGS-B", bounds=[(-4, 4)] * 2)
    amplitude, luck = torch.exp(2 * torch.from_numpy(found.x))
    with torch.no_grad():
        told = data.told(amplitude * same, luck)
        covariance = torch.linalg.inv(same / amplitude + told.g)
        return (covariance @ told.h).numpy(), covariance.numpy()
