"""A Gaussian process of the scores of single images: merge weights -> expected score.

A score is the sum of a smooth function of the merge's weights, an offset of its payload, an offset of
its image (one prompt and seed is easier than another for every merge), and noise. So merges that were
shown different images can be compared. The function is a linear one, which leads on to the corners that
no merge was near, and one of the squared-exponential kernel with a lengthscale for each weight.
Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, chapters 2 and 5; the offsets are
the random effects of a mixed model.

With C merges an evaluation costs C^3, however many images they were shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

Array = NDArray[np.float64]

# Log-normal priors, mean and standard deviation of the logarithm; scores are standardised.
_AMPLITUDE = (0.0, 1.0)
_SLOPE = (-0.7, 1.0)
_PAYLOADS = (0.0, 1.0)
_IMAGES = (math.log(0.5), 0.7)
_NOISE = (math.log(0.8), 0.3)
_LENGTH = (0.3, 0.7)  # in 26 dimensions
_MOST_LOG = 6.0
_JITTER = 1e-6


class Data:
    """Scores of images by merges, as the sums that a Gaussian process needs.

    `points` [n_points, d] are the merges' weights, scaled to [0, 1]. Score i, `y[i]`, is that of merge
    `point[i]` on the panel's image `image[i]`, which is of payload `payload[i]`. A payload counts as
    `shares` says in the expected score over all images, or like every other.
    """

    def __init__(
        self,
        points: Array,
        point: Sequence[int],
        image: Sequence[int],
        payload: Sequence[str],
        y: Sequence[float],
        shares: Mapping[str, float] | None = None,
    ) -> None:
        values = np.asarray(y, float)
        self.points = torch.from_numpy(np.asarray(points, float))
        self.n, self.d = len(values), self.points.shape[1]
        payloads, payload_of = np.unique(payload, return_inverse=True)
        _, first_of_image, image_of = np.unique(image, return_index=True, return_inverse=True)
        self.n_payloads, self.n_images = len(payloads), int(image_of.max()) + 1
        residual = values - _means(values, payload_of)[payload_of]
        self.mean, self.scale = float(values.mean()), max(float(residual.std()), 1e-9)
        scaled = torch.from_numpy((values - self.mean) / self.scale)
        # Columns: the common mean, the payloads' offsets, the images'.
        offsets = torch.zeros(self.n, 1 + self.n_payloads + self.n_images, dtype=torch.float64)
        rows = torch.arange(self.n)
        offsets[:, 0] = 1
        offsets[rows, 1 + torch.from_numpy(payload_of)] = 1
        offsets[rows, 1 + self.n_payloads + torch.from_numpy(image_of)] = 1
        chosen = torch.zeros(self.n, len(self.points), dtype=torch.float64)
        chosen[rows, torch.as_tensor(point)] = 1
        # The offset of a score over all payloads by their shares, and their images alike.
        share = np.array([(shares or {}).get(str(name), 1.0) for name in payloads])
        share = share / share.sum() if share.any() else np.full(len(share), 1 / len(share))
        payload_of_image = payload_of[first_of_image]
        of_image = share[payload_of_image] / np.bincount(payload_of_image)[payload_of_image]
        self.average = torch.from_numpy(np.concatenate([[1.0], share, of_image]))
        self.counts = chosen.sum(0)
        self.zu, self.uu = chosen.T @ offsets, offsets.T @ offsets
        self.zy, self.uy, self.yy = chosen.T @ scaled, offsets.T @ scaled, scaled @ scaled


def _means(values: Array, group: NDArray[np.intp]) -> Array:
    return np.bincount(group, values) / np.bincount(group)


def _prior(d: int) -> tuple[Array, Array]:
    """Mean and standard deviation of the logarithms of all hyperparameters.

    They are d lengthscales, then the amplitudes of the smooth and the linear function, the payloads' and
    the images' offsets, the noise.
    """
    # In more dimensions random merges are further apart.
    mean, sd = _LENGTH[0] + math.log(d / 26) / 2, _LENGTH[1]
    both = np.array([(mean, sd)] * d + [_AMPLITUDE, _SLOPE, _PAYLOADS, _IMAGES, _NOISE])
    return both[:, 0], both[:, 1]


@dataclass(frozen=True)
class Posterior:
    """What the scores say of every merge, in units of the standardised score."""

    data: Data
    inverse_lengths: Tensor
    variance: float
    slope: float
    # What the kernel at the judged merges is multiplied with.
    of_mean: Tensor
    of_covariance: Tensor
    # The average offset: its mean and variance, and for its covariance with a merge's score.
    level: float
    of_level: Tensor
    variance_of_level: float

    def kernel(self, one: Tensor, other: Tensor) -> Tensor:
        """Prior covariance [n, m] of the merges `one` [n, d] and `other` [m, d]."""
        apart = _squares(one * self.inverse_lengths, other * self.inverse_lengths)
        return self.variance * torch.exp(-0.5 * apart) + self.slope * _products(one, other)

    def mean(self, x: Tensor) -> Tensor:
        """Expected score [n] of merges [n, d], without offsets."""
        return self.kernel(x, self.data.points) @ self.of_mean

    def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of merges [n, d], each by itself."""
        k = self.kernel(x, self.data.points)
        prior = self.variance + self.slope * ((2 * x - 1) ** 2).mean(1)
        variance = prior - ((k @ self.of_covariance) * k).sum(1)
        return k @ self.of_mean, variance.clamp(min=1e-12)

    def expected(self, x: Tensor) -> tuple[float, float]:
        """Score to expect of one merge [d] over all images, and its standard error."""
        mean, variance = self.mean_and_variance(x[None])
        shared = float(self.kernel(x[None], self.data.points)[0] @ self.of_level)
        whole = max(float(variance) + self.variance_of_level + 2 * shared, 0.0)
        data = self.data
        return data.mean + data.scale * (float(mean) + self.level), data.scale * math.sqrt(whole)

    def covariance(self, one: Tensor, other: Tensor) -> Tensor:
        """Posterior covariance [n, m]."""
        left, right = (self.kernel(x, self.data.points) for x in (one, other))
        return self.kernel(one, other) - left @ self.of_covariance @ right.T

    @cached_property
    def at_points(self) -> Array:
        """Expected score of the merges that were judged."""
        return self.mean(self.data.points).numpy()


def _squares(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances [n, m]."""
    apart = (one * one).sum(1)[:, None] + (other * other).sum(1)[None] - 2 * one @ other.T
    return apart.clamp(min=0)


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Inner products [n, m] from the middle of the box; 1 for a corner with itself."""
    return (2 * one - 1) @ (2 * other - 1).T / one.shape[1]


class Model:
    """The process with its hyperparameters, which `fit` improves from where they are."""

    def __init__(self, d: int) -> None:
        self.d = d
        self._mean, self._sd = _prior(d)
        self.theta = self._mean.copy()

    def fit(self, data: Data, n_steps: int = 30) -> None:
        """Go to the nearest maximum of the hyperparameters' posterior density."""
        mean, sd = torch.from_numpy(self._mean), torch.from_numpy(self._sd)

        def loss(theta: Array) -> tuple[float, Array]:
            x = torch.from_numpy(theta).requires_grad_()
            total = _loss(data, x) + 0.5 * (((x - mean) / sd) ** 2).sum()
            (slope,) = torch.autograd.grad(total, x)
            return float(total.detach()), slope.numpy()

        bounds = [(-4.0, _MOST_LOG)] * len(self.theta)
        found = minimize(
            loss,
            self.theta,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": n_steps},
        )
        self.theta = found.x

    def posterior(self, data: Data) -> Posterior:
        with torch.no_grad():
            theta = torch.from_numpy(self.theta)
            parts = _parts(data, theta)
            g, h, root = parts.g, parts.h, parts.root
            # 1 / (1 / kernel + g)
            half = torch.linalg.solve_triangular(parts.w, root.T, upper=False)
            at_points = half.T @ (half @ h)
            gh = g @ half.T
            # Offsets given the scores if no merge differed, averaged over payloads and images.
            noise = torch.exp(2 * theta[-1])
            offset = torch.cholesky_solve(data.average[:, None], parts.inner)[:, 0]
            on_points = half @ (data.zu @ offset) / noise
            return Posterior(
                data,
                torch.exp(-theta[: self.d]),
                float(torch.exp(2 * theta[self.d])),
                float(torch.exp(2 * theta[self.d + 1])),
                h - g @ at_points,
                g - gh @ gh.T,
                float(offset @ (data.uy - data.zu.T @ at_points) / noise),
                gh @ on_points - data.zu @ offset / noise,
                float(data.average @ offset + on_points @ on_points),
            )


class _Parts(NamedTuple):
    """With N the covariance of offsets U and noise, Z the merge of each score, k their kernel.

    `rest` is -2 log density if no merge differed; `inner` the Cholesky root of U' U / noise + 1 / prior
    of the offsets; `g` is Z' N^-1 Z and `h` Z' N^-1 y; `root` is the Cholesky root of k, and `w` that of
    1 + root' g root. Rasmussen and Williams, equations 2.43 and 3.26.
    """

    rest: Tensor
    inner: Tensor
    g: Tensor
    h: Tensor
    root: Tensor
    w: Tensor


def _parts(data: Data, theta: Tensor) -> _Parts:
    d = data.d
    amplitude, slope, payload, image, noise = torch.exp(2 * theta[d:])
    spread = torch.cat(
        [
            torch.ones(1, dtype=theta.dtype),
            payload.expand(data.n_payloads),
            image.expand(data.n_images),
        ]
    )
    inner = torch.linalg.cholesky(data.uu / noise + torch.diag(1 / spread))
    right = torch.linalg.solve_triangular(
        inner, torch.column_stack([data.zu.T, data.uy]) / noise, upper=False
    )
    of_points, of_y = right[:, :-1], right[:, -1]
    g = torch.diag(data.counts) / noise - of_points.T @ of_points
    h = data.zy / noise - of_points.T @ of_y
    rest = (
        data.yy / noise
        - of_y @ of_y
        + data.n * torch.log(noise)
        + 2 * torch.log(torch.diagonal(inner)).sum()
        + torch.log(spread).sum()
    )
    scaled = data.points * torch.exp(-theta[:d])
    same = torch.eye(len(data.points), dtype=theta.dtype)
    kernel = amplitude * (torch.exp(-0.5 * _squares(scaled, scaled)) + _JITTER * same)
    kernel = kernel + slope * _products(data.points, data.points)
    root = torch.linalg.cholesky(kernel)
    w = torch.linalg.cholesky(same + root.T @ g @ root)
    return _Parts(rest, inner, g, h, root, w)


def _loss(data: Data, theta: Tensor) -> Tensor:
    """Minus the logarithm of the density of the scores."""
    parts = _parts(data, theta)
    solved = torch.linalg.solve_triangular(parts.w, (parts.root.T @ parts.h)[:, None], upper=False)
    found: Tensor = 0.5 * (parts.rest - (solved**2).sum()) + parts.w.diagonal().log().sum()
    return found
