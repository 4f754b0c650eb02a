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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from bayesian_merger.choices import Choice, Choices, Told

Array = NDArray[np.float64]
Prior: TypeAlias = tuple[float, float]
"""Mean and standard deviation of a logarithm."""

# Log-normal priors, mean and standard deviation of the logarithm; scores are standardised.
_AMPLITUDE = (0.0, 1.0)
_SLOPE = (-0.7, 1.0)
_PAYLOADS = (0.0, 1.0)
_IMAGES = (math.log(0.5), 0.7)
_NOISE = (math.log(0.8), 0.3)
_CHOSEN = ((1.0, 1.0), (0.3, 1.0), (1.0, 0.6))
_LENGTH = (0.3, 0.7)  # in 26 dimensions
# A slope tells at once of a weight that does not matter, so that its lengthscale may be far off.
_WIDE = 1.5
# So many times as large as they should be are the slopes that are measured, if they go through all that
# an image comes from or through a part of it, and their errors.
WHOLE = (0.0, 0.1)
PARTIAL = (-1.0, 1.0)
_MISFIT = (0.2, 0.5)
_MOST_LOG = 6.0
_JITTER = 1e-6


class Slopes(NamedTuple):
    """Derivatives of the expected score by each weight, as they were measured at some merges.

    Of merge `point[i]` they are `mean[i]` [d], with errors of the covariance `covariance[i]` [d, d].
    """

    point: Sequence[int]
    mean: Array
    covariance: Array


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
        slopes: Slopes | None = None,
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
        found = slopes or Slopes([], np.zeros((0, self.d)), np.zeros((0, self.d, self.d)))
        self.sloped = torch.tensor(found.point, dtype=torch.long)
        self.slopes = torch.from_numpy(found.mean / self.scale).flatten()
        errors = torch.from_numpy(found.covariance / self.scale**2)
        self.slope_errors = torch.block_diag(*errors)  # type: ignore[no-untyped-call]


class Chosen:
    """Choices between pictures of merges `points` [n_points, d], in place of scores.

    What is expected of a merge is told as its lead over the first of them.
    """

    mean, scale = 0.0, 1.0

    def __init__(self, points: Array, choices: Sequence[Choice]) -> None:
        self.points = torch.from_numpy(np.asarray(points, float))
        self.d = self.points.shape[1]
        self.choices = Choices(choices, len(points))
        self.sloped = torch.tensor([], dtype=torch.long)


def _means(values: Array, group: NDArray[np.intp]) -> Array:
    return np.bincount(group, values) / np.bincount(group)


def _prior(d: int, gain: Prior | None, is_chosen: bool) -> tuple[Array, Array]:
    """Mean and standard deviation of the logarithms of all hyperparameters.

    They are d lengthscales, then the amplitudes of the smooth and the linear function, the payloads' and
    the images' offsets, the noise; with slopes also their gain and misfit.
    """
    # In more dimensions random merges are further apart.
    mean, sd = _LENGTH[0] + math.log(d / 26) / 2, _LENGTH[1]
    others = [_AMPLITUDE, _SLOPE, _PAYLOADS, _IMAGES, _NOISE]
    if is_chosen:
        others = [*_CHOSEN[:2], _PAYLOADS, _IMAGES, _CHOSEN[2]]
    if gain:
        sd = _WIDE
        others += [gain, _MISFIT]
    both = np.array([(mean, sd)] * d + others)
    return both[:, 0], both[:, 1]


class Belief(Protocol):
    """What is known of merges: mean and variance of each, covariance of any two."""

    kernel: _Kernel

    def mean(self, x: Tensor) -> Tensor:
        """Expected score [n] of merges [n, d], without offsets."""
        ...

    def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of merges [n, d], each by itself."""
        ...

    def covariance(self, one: Tensor, other: Tensor) -> Tensor:
        """Posterior covariance [n, m]."""
        ...

    def lead_over(self, one: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """By how much merges [n, d] are ahead of `one` [d]: mean and variance, each [n]."""
        here = one[None]
        with torch.no_grad():
            mean_here, variance_here = self.mean_and_variance(here)

        def lead(x: Tensor) -> tuple[Tensor, Tensor]:
            mean, variance = self.mean_and_variance(x)
            both = variance + variance_here - 2 * self.covariance(x, here)[:, 0]
            return mean - mean_here, both.clamp(min=1e-9)

        return lead


@dataclass(frozen=True)
class Posterior(Belief):
    """What the scores say of every merge, in units of the standardised score."""

    data: Data | Chosen
    kernel: _Kernel
    # Slopes are measured so many times as large as they are.
    gain: float
    # What the kernel at the judged merges is multiplied with.
    of_mean: Tensor
    of_covariance: Tensor
    # The average offset: its mean and variance, and for its covariance with a merge's score.
    level: float
    of_level: Tensor
    variance_of_level: float

    def with_data(self, x: Tensor) -> Tensor:
        """Prior covariance of merges [n, d] with the scores of the judged ones, then with slopes."""
        data = self.data
        of_scores = self.kernel.of_scores(x, data.points)
        if not len(data.sloped):
            return of_scores
        of_slopes = self.gain * self.kernel.with_slopes(x, data.points[data.sloped])
        return torch.cat([of_scores, of_slopes], 1)

    def mean(self, x: Tensor) -> Tensor:
        """Expected score [n] of merges [n, d], without offsets."""
        return self.with_data(x) @ self.of_mean

    def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of merges [n, d], each by itself."""
        k = self.with_data(x)
        prior = self.kernel.variance + self.kernel.slope * ((2 * x - 1) ** 2).mean(1)
        variance = prior - ((k @ self.of_covariance) * k).sum(1)
        return k @ self.of_mean, variance.clamp(min=1e-12)

    def expected(self, x: Tensor) -> tuple[float, float]:
        """Score to expect of one merge [d] over all images, and its standard error."""
        mean, variance = self.mean_and_variance(x[None])
        shared = float(self.with_data(x[None])[0] @ self.of_level)
        whole = max(float(variance) + self.variance_of_level + 2 * shared, 0.0)
        data = self.data
        return data.mean + data.scale * (float(mean) + self.level), data.scale * math.sqrt(whole)

    def covariance(self, one: Tensor, other: Tensor) -> Tensor:
        """Posterior covariance [n, m]."""
        left, right = self.with_data(one), self.with_data(other)
        return self.kernel.of_scores(one, other) - left @ self.of_covariance @ right.T

    @cached_property
    def at_points(self) -> Array:
        """Expected score of the merges that were judged."""
        return self.mean(self.data.points).numpy()


class Expecting(Belief):
    """A posterior once further merges [m, d] have the scores that are expected of them.

    What is expected of any merge stays as it is, and more is known of those that are near: so proposals
    that nothing has been heard of yet are not made twice. Desautels et al. 2014, Parallelizing
    Exploration-Exploitation Tradeoffs in Gaussian Process Bandit Optimization, section 4. Each merge has
    the `noise` variance, in units of the standardised score.
    """

    def __init__(self, posterior: Posterior, points: Tensor, noise: float) -> None:
        self.kernel, self._before, self._points = posterior.kernel, posterior, points
        with torch.no_grad():
            own = posterior.covariance(points, points)
            self._root = torch.linalg.cholesky(
                own + noise * torch.eye(len(points), dtype=own.dtype)
            )

    def _told(self, x: Tensor) -> Tensor:
        """[n, m], whose products are by how much a covariance of merges [n, d] is less than before."""
        across = self._before.covariance(x, self._points)
        told: Tensor = torch.linalg.solve_triangular(self._root, across.T, upper=False).T
        return told

    def mean(self, x: Tensor) -> Tensor:
        """Expected score [n] of merges [n, d], as before."""
        return self._before.mean(x)

    def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of merges [n, d], each by itself."""
        mean, variance = self._before.mean_and_variance(x)
        return mean, (variance - (self._told(x) ** 2).sum(1)).clamp(min=1e-12)

    def covariance(self, one: Tensor, other: Tensor) -> Tensor:
        """Posterior covariance [n, m]."""
        return self._before.covariance(one, other) - self._told(one) @ self._told(other).T


class _Kernel(NamedTuple):
    """Prior covariances of scores and slopes."""

    inverse_lengths: Tensor
    variance: Tensor
    slope: Tensor

    def smooth(self, one: Tensor, other: Tensor) -> Tensor:
        apart = _squares(one * self.inverse_lengths, other * self.inverse_lengths)
        return self.variance * torch.exp(-0.5 * apart)

    def of_scores(self, one: Tensor, other: Tensor) -> Tensor:
        """Of merges `one` [n, d] and `other` [m, d]: [n, m]."""
        return self.smooth(one, other) + self.slope * _products(one, other)

    def with_slopes(self, one: Tensor, other: Tensor) -> Tensor:
        """Of the scores of `one` with the slopes of `other`: [n, m d]."""
        apart = (one[:, None] - other[None]) * self.inverse_lengths**2
        linear = self.slope * 2 / one.shape[1] * (2 * one - 1)
        return (self.smooth(one, other)[:, :, None] * apart + linear[:, None]).flatten(1)

    def of_slopes(self, points: Tensor) -> Tensor:
        """Of the slopes of merges [n, d] with each other: [n d, n d]."""
        n, d = points.shape
        precision = self.inverse_lengths**2
        apart = (points[:, None] - points[None]) * precision
        pairs = torch.diag(precision) - apart[:, :, :, None] * apart[:, :, None, :]
        linear = self.slope * 4 / d * torch.eye(d, dtype=points.dtype)
        whole = self.smooth(points, points)[:, :, None, None] * pairs + linear
        return whole.permute(0, 2, 1, 3).reshape(n * d, n * d)


def _squares(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances [n, m]."""
    apart = (one * one).sum(1)[:, None] + (other * other).sum(1)[None] - 2 * one @ other.T
    return apart.clamp(min=0)


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Inner products [n, m] from the middle of the box; 1 for a corner with itself."""
    return (2 * one - 1) @ (2 * other - 1).T / one.shape[1]


class Model:
    """The process with its hyperparameters, which `fit` improves from where they are.

    For data with slopes `gain` says how large they are beside the function's.
    """

    def __init__(self, d: int, gain: Prior | None = None, is_chosen: bool = False) -> None:
        self.d = d
        self._mean, self._sd = _prior(d, gain, is_chosen)
        self.theta = self._mean.copy()

    @property
    def noise(self) -> float:
        """Variance of the score of one image beside its offset."""
        return math.exp(2 * self.theta[self.d + 4])

    def fit(self, data: Data | Chosen, n_steps: int = 30) -> None:
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

    def posterior(self, data: Data | Chosen) -> Posterior:
        with torch.no_grad():
            theta = torch.from_numpy(self.theta)
            parts = _parts(data, theta)
            g, h, root, known = parts.g, parts.h, parts.root, parts.known
            # 1 / (1 / kernel + g)
            half = torch.linalg.solve_triangular(parts.w, root.T, upper=False)
            at_points = half.T @ (half @ h)
            gh = g @ half.T
            of_mean, of_covariance = h - g @ at_points, g - gh @ gh.T
            if isinstance(data, Chosen):
                # Minus the strength of the merge that others are compared with.
                own = parts.kernel[0]
                of_level = of_covariance @ own
                variance = float(own[0] - own @ of_level)
                of_level[0] -= 1.0
                return Posterior(
                    data,
                    _kernel(theta, self.d),
                    1.0,
                    of_mean,
                    of_covariance,
                    -float(own @ of_mean),
                    of_level,
                    variance,
                )
            assert parts.inner is not None
            # Offsets given the scores if no merge differed, averaged over payloads and images.
            noise = torch.exp(2 * theta[self.d + 4])
            offset = torch.cholesky_solve(data.average[:, None], parts.inner)[:, 0]
            on_points = half @ (data.zu @ offset) / noise
            of_level = gh @ on_points - data.zu @ offset / noise
            if known:
                at_points = at_points + known.mean
                of_mean = known.lifted(of_mean)
                of_mean[len(g) :] += torch.linalg.solve_triangular(
                    known.root.T, known.of_mean[:, None], upper=True
                )[:, 0]
                of_level = known.lifted(of_level)
                of_covariance = known.lifted(known.lifted(of_covariance).T)
                of_covariance[len(g) :, len(g) :] += torch.cholesky_inverse(known.root)
            return Posterior(
                data,
                _kernel(theta, self.d),
                float(torch.exp(theta[self.d + 5])) if known else 1.0,
                of_mean,
                of_covariance,
                float(offset @ (data.uy - data.zu.T @ at_points) / noise),
                of_level,
                float(data.average @ offset + on_points @ on_points),
            )


def _kernel(theta: Tensor, d: int) -> _Kernel:
    return _Kernel(torch.exp(-theta[:d]), torch.exp(2 * theta[d]), torch.exp(2 * theta[d + 1]))


class _Known(NamedTuple):
    """What the slopes tell of the judged merges before their scores.

    `root` is the Cholesky root of the slopes' covariance, errors included, and L^-1 times their prior
    covariance with the scores is `across`, times what was measured `of_mean`; `mean` is the scores'
    mean by them.
    """

    root: Tensor
    across: Tensor
    of_mean: Tensor
    mean: Tensor

    def lifted(self, of_scores: Tensor) -> Tensor:
        """What the covariance with the scores given the slopes is multiplied with -> that of both.

        By its first axis.
        """
        solved = torch.linalg.solve_triangular(self.root.T, self.across, upper=True)
        return torch.cat([of_scores, -solved @ of_scores])


class _Parts(NamedTuple):
    """With N the covariance of offsets U and noise, Z the merge of each score, k their kernel.

    `rest` is -2 log density if no merge differed; `inner` the Cholesky root of U' U / noise + 1 / prior
    of the offsets; `g` is Z' N^-1 Z and `h` Z' N^-1 y; `root` is the Cholesky root of k, and `w` that of
    1 + root' g root. Rasmussen and Williams, equations 2.43 and 3.26. Where slopes are `known`, y is
    what they leave of the scores and k the covariance given them; section 9.4.
    """

    rest: Tensor
    inner: Tensor | None
    g: Tensor
    h: Tensor
    kernel: Tensor
    root: Tensor
    w: Tensor
    known: _Known | None


def _root(matrix: Tensor, scale: Tensor) -> Tensor:
    """Cholesky root; where rounding has made the matrix indefinite, that of one a little larger.

    `scale` is the diagonal of the largest matrix that it was made of.
    """
    more = scale.detach().mean() * torch.eye(len(matrix))
    for extra in (0.0, 1e-10, 1e-8, 1e-6, 1e-4):
        raised = matrix + extra * more if extra else matrix
        found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(raised)
        if not found[1]:
            return found[0]
    root: Tensor = torch.linalg.cholesky(matrix)  # says what is wrong
    return root


def _of_scores(data: Data, theta: Tensor) -> tuple[Told, Tensor]:
    """What the scores tell of the merges, and the root of their offsets."""
    d = data.d
    _, _, payload, image, noise = torch.exp(2 * theta[d : d + 5])
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
    return Told(rest, g, h), inner


def _parts(data: Data | Chosen, theta: Tensor) -> _Parts:
    d = data.d
    amplitude = torch.exp(2 * theta[d])
    same = torch.eye(len(data.points), dtype=theta.dtype)
    of_both = _kernel(theta, d)
    kernel = of_both.of_scores(data.points, data.points) + amplitude * _JITTER * same
    scale = kernel.diagonal()
    known, inner = None, None
    if isinstance(data, Chosen):
        rest, g, h = data.choices.told(kernel, torch.exp(2 * theta[d + 4]))
    else:
        (rest, g, h), inner = _of_scores(data, theta)
    if isinstance(data, Data) and len(data.sloped):
        known = _known(data, of_both, theta[d + 5].exp(), (2 * theta[d + 6]).exp())
        kernel = kernel - known.across.T @ known.across
        rest = rest - 2 * known.mean @ h + known.mean @ g @ known.mean
        rest = rest + known.of_mean @ known.of_mean + 2 * known.root.diagonal().log().sum()
        h = h - g @ known.mean
    root = _root(kernel, scale)
    whitened = same + root.T @ g @ root
    w = _root(whitened, whitened.diagonal())
    return _Parts(rest, inner, g, h, kernel, root, w, known)


def _known(data: Data, kernel: _Kernel, gain: Tensor, misfit: Tensor) -> _Known:
    points = data.points[data.sloped]
    covariance = gain**2 * kernel.of_slopes(points) + misfit * data.slope_errors
    root = _root(covariance, covariance.diagonal())
    right = torch.column_stack([gain * kernel.with_slopes(data.points, points).T, data.slopes])
    solved = torch.linalg.solve_triangular(root, right, upper=False)
    across, of_mean = solved[:, :-1], solved[:, -1]
    return _Known(root, across, of_mean, across.T @ of_mean)


def _loss(data: Data | Chosen, theta: Tensor) -> Tensor:
    """Minus the logarithm of the density of the scores."""
    parts = _parts(data, theta)
    solved = torch.linalg.solve_triangular(parts.w, (parts.root.T @ parts.h)[:, None], upper=False)
    found: Tensor = 0.5 * (parts.rest - (solved**2).sum()) + parts.w.diagonal().log().sum()
    return found
