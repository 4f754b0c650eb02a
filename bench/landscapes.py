"""Noisy functions of merge weights with a known optimum, to measure searches on.

f: [0, 1]^d -> the expected score of one image, of mean 0 and standard deviation 1 over uniformly random
weights. A single image adds the offset of its payload (standard deviation 1) and noise of standard
deviation 1. Families:

- smooth26: a few blocks matter much, the optimum lies inside, neighbours are coupled, a mild wiggle;
- corner26: many weights are best at exactly 0 or 1, pairs of blocks interact, returns diminish;
- barrier26: a valley on the straight line between the parents, two good regions away from it;
- smooth52: smooth26 for two weights per block, which are coupled within a block.

Optima of odd seeds of the smooth families vary smoothly over the blocks, those of even seeds do not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import norm

Array: TypeAlias = NDArray[np.float64]
Function: TypeAlias = Callable[[Array], Array]
Noise = Literal["fresh", "fixed"]

FAMILIES = ("smooth26", "corner26", "barrier26", "smooth52")
N_PAYLOADS = 5
_N_BLOCKS = 26


class Landscape:
    """One member of a family; the same family and seed give the same function everywhere."""

    def __init__(self, family: str, seed: int) -> None:
        self.family, self.seed = family, seed
        self.d = 52 if family.endswith("52") else _N_BLOCKS
        chance = _chance(f"{family}/{seed}")
        self._raw = _MAKERS[family](chance, seed)
        self._uniform = np.random.default_rng(12345).uniform(size=(20_000, self.d))
        self._values = self._raw(self._uniform)
        self._mean, self._sd = float(self._values.mean()), float(self._values.std())
        self._payloads = chance.normal(size=N_PAYLOADS)
        self._images: dict[int, Function] = {}

    def f(self, points: Array) -> Array:
        """The expected scores at `points` [n, d]."""
        return (self._raw(np.atleast_2d(points)) - self._mean) / self._sd

    def regret(self, point: Array) -> float:
        """How far f at `point` [d] is from the best: 0 there, 1 at the mean over random weights."""
        return float((self.best - self.f(point)[0]) / self.best)

    @cached_property
    def best(self) -> float:
        """The largest value of f, from eighteen local searches."""

        def with_gradient(point: Array) -> tuple[float, Array]:
            step = 1e-5
            around = np.repeat(point[None], 2 * self.d + 1, 0)
            i = np.arange(self.d)
            around[1 + i, i] += step
            around[1 + self.d + i, i] -= step
            found = self._raw(around)
            return -found[0], -(found[1 : 1 + self.d] - found[1 + self.d :]) / (2 * step)

        chance = np.random.default_rng(5)
        starts = [
            *self._uniform[np.argsort(-self._values)[:6]],
            *chance.integers(0, 2, (8, self.d)).astype(float),
            *chance.uniform(size=(4, self.d)),
        ]
        found = [
            minimize(
                with_gradient,
                np.clip(start, 0.02, 0.98),
                jac=True,
                bounds=[(0, 1)] * self.d,
                method="L-BFGS-B",
            ).fun
            for start in starts
        ]
        return float(-min(found) - self._mean) / self._sd

    def scores(
        self, point: Array, images: Sequence[int], noise: Noise, chance: np.random.Generator
    ) -> Array:
        """The scores of the images with these numbers; number modulo five is the payload.

        With "fresh" noise each comes from a seed of its own. With "fixed" seeds half of the noise's
        variance is a slowly varying function of the weights that belongs to the image, the other
        half changes with any change of the weights; equal weights give equal images.
        """
        numbers = np.asarray(images)
        if noise == "fresh":
            errors = chance.normal(size=len(numbers))
        else:
            key = np.round(point, 4).tobytes()
            own = np.array([self._image(int(n))(point[None])[0] for n in numbers])
            seeds = [zlib.crc32(key + str((self.seed, int(n))).encode()) for n in numbers]
            sudden = np.array([np.random.default_rng(seed).normal() for seed in seeds])
            errors = np.sqrt(0.5) * (own + sudden)
        scores: Array = self.f(point)[0] + self._payloads[numbers % N_PAYLOADS] + errors
        return scores

    def _image(self, number: int) -> Function:
        if number not in self._images:
            scale = 3.0 * np.sqrt(self.d / _N_BLOCKS)
            chance = _chance(f"img/{self.family}/{self.seed}/{number}")
            self._images[number] = _wiggle(chance, self.d, scale, 64)
        return self._images[number]


def _chance(text: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(text.encode()))


def _wiggle(chance: np.random.Generator, d: int, scale: float | Array, n: int = 128) -> Function:
    """A draw of a Gaussian process of variance 1 with an RBF kernel, by random Fourier features."""
    frequencies = chance.normal(size=(n, d)) / scale
    phases = chance.uniform(0, 2 * np.pi, n)
    amplitudes = chance.normal(size=n) * np.sqrt(2.0 / n)
    return lambda points: np.cos(points @ frequencies.T + phases) @ amplitudes


def _optima(chance: np.random.Generator, n: int, *, is_smooth: bool) -> Array:
    low, high = 0.12, 0.88
    if not is_smooth:
        return chance.uniform(low, high, n)
    walk = np.zeros(n)
    walk[0] = chance.normal()
    for i in range(1, n):
        walk[i] = 0.7 * walk[i - 1] + np.sqrt(1 - 0.49) * chance.normal()
    found: Array = low + (high - low) * norm.cdf(walk)
    return found


class _Bowl(NamedTuple):
    """A quadratic form about an optimum, and a wiggle, of one weight per block."""

    curvatures: Array
    optimum: Array
    matrix: Array
    wiggle: Function

    def __call__(self, offsets: Array) -> Array:
        found: Array = np.einsum("ni,ij,nj->n", offsets, self.matrix, offsets)
        return found


def _bowl(chance: np.random.Generator, n_important: int, *, is_smooth: bool) -> _Bowl:
    n = _N_BLOCKS
    important = chance.choice(n, n_important, replace=False)
    curvatures = chance.uniform(0.02, 0.08, n)
    curvatures[important] = chance.lognormal(0.0, 0.4, n_important)
    optimum = _optima(chance, n, is_smooth=is_smooth)
    roots = np.sqrt(curvatures)
    matrix = np.diag(curvatures)
    for i in range(n - 1):  # coupled neighbours; the matrix stays positive
        coupling = 0.35 * chance.choice([-1, 1]) * roots[i] * roots[i + 1]
        matrix[i, i + 1] += coupling
        matrix[i + 1, i] += coupling
    scales = np.where(np.isin(np.arange(n), important), 0.8, 4.0)
    return _Bowl(curvatures, optimum, matrix, _wiggle(chance, n, scales))


def _smooth26(chance: np.random.Generator, seed: int) -> Function:
    n_important = int(chance.integers(5, 9))
    bowl = _bowl(chance, n_important, is_smooth=bool(seed % 2))
    return lambda x: -bowl(x - bowl.optimum) + 0.10 * bowl.wiggle(x)


def _smooth52(chance: np.random.Generator, seed: int) -> Function:
    is_smooth, n = bool(seed % 2), _N_BLOCKS
    of_alpha = _bowl(chance, int(chance.integers(5, 9)), is_smooth=is_smooth)
    of_beta = _bowl(chance, int(chance.integers(3, 6)), is_smooth=is_smooth)
    coupling = chance.normal(size=n) * 0.5 * np.sqrt(of_alpha.curvatures * of_beta.curvatures)

    def function(x: Array) -> Array:
        alpha, beta = x[:, :n], x[:, n:]
        d, e = alpha - of_alpha.optimum, beta - of_beta.optimum
        wiggles = 0.10 * of_alpha.wiggle(alpha) + 0.07 * of_beta.wiggle(beta)
        return -of_alpha(d) - 0.7 * of_beta(e) + (d * e) @ coupling + wiggles

    return function


def _corner26(chance: np.random.Generator, _: int) -> Function:
    n = _N_BLOCKS
    fields = chance.standard_t(4, n) * 0.45
    neighbours = chance.normal(size=n - 1) * 0.45
    pairs = chance.choice(n, (10, 2))
    of_pairs = chance.normal(size=10) * 0.25
    bends = np.where(chance.random(n) < 0.35, chance.uniform(0.2, 0.8, n), 0.0)
    tops = chance.uniform(-0.7, 0.7, n)

    def linear(x: Array) -> Array:
        s = 2 * x - 1
        total: Array = s @ fields + (s[:, :-1] * s[:, 1:]) @ neighbours
        total = total + (s[:, pairs[:, 0]] * s[:, pairs[:, 1]]) @ of_pairs
        return total - ((s - tops) ** 2) @ bends

    spread = linear(np.random.default_rng(7).uniform(size=(5000, n))).std()
    return lambda x: 6.0 * (1 - np.exp(-linear(x) / spread / 6.0))


def _barrier26(chance: np.random.Generator, _: int) -> Function:
    n = _N_BLOCKS
    views = np.zeros((2, n))
    views[0, 1:13] = chance.dirichlet(np.full(12, 0.6))
    views[1, 14:26] = chance.dirichlet(np.full(12, 0.6))
    for view in views:  # base and the middle block are in both
        view[0], view[13] = chance.uniform(0, 0.12, 2)
    views /= views.sum(1, keepdims=True)
    is_flipped = chance.random() < 0.5
    first = np.array([0.2, 0.8]) + chance.uniform(-0.08, 0.08, 2)
    second = np.array([0.8, 0.2]) + chance.uniform(-0.08, 0.08, 2)
    if is_flipped:
        first, second = second, first
    height = chance.uniform(0.55, 0.8)
    at_a, at_b = chance.uniform(0.45, 0.65, 2)
    bowl = _bowl(chance, 6, is_smooth=False)

    def function(x: Array) -> Array:
        z = x @ views.T

        def bump(centre: Array, width: float) -> Array:
            found: Array = np.exp(-((z - centre) ** 2).sum(1) / (2 * width**2))
            return found

        middle, apart = z.mean(1), z[:, 0] - z[:, 1]
        valley = np.exp(-((middle - 0.5) ** 2) / (2 * 0.15**2) - apart**2 / (2 * 0.2**2))
        good = bump(first, 0.28) + height * bump(second, 0.28)
        ends = at_a * bump(np.zeros(2), 0.25) + at_b * bump(np.ones(2), 0.25)
        extra = 0.04 * bowl.wiggle(x) - 0.20 * bowl(x - bowl.optimum)
        total: Array = good + ends - 0.6 * valley + extra
        return total

    return function


_MAKERS = {
    "smooth26": _smooth26,
    "corner26": _corner26,
    "barrier26": _barrier26,
    "smooth52": _smooth52,
}
