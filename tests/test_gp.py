from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag
from scipy.special import expit
from torch import Tensor

from bayesian_merger.choices import Choice
from bayesian_merger.gp import (
    WHOLE,
    Array,
    Chosen,
    Data,
    Expecting,
    Model,
    Posterior,
    Slopes,
    _Kernel,
    _kernel,
    _loss,
)

D = 4
Scores = tuple[Array, list[int], list[int], list[str], list[float]]


def scores(n_points: int = 30, per_point: int = 3, noise: float = 0.3, seed: int = 0) -> Scores:
    """Points, and scores of a wave in the first dimension with offsets of payloads."""
    chance = np.random.default_rng(seed)
    points = chance.uniform(size=(n_points, D))
    point = [i for i in range(n_points) for _ in range(per_point)]
    image = [int(i) for i in chance.integers(0, 6, len(point))]
    payload = ["easy" if i % 2 else "hard" for i in image]
    offset = np.array([5.0 if name == "easy" else -5.0 for name in payload])
    y = wave(points)[point] + offset + chance.normal(0, noise, len(point))
    return points, point, image, payload, y.tolist()


def wave(points: Array) -> Array:
    found: Array = 2 * np.sin(3 * points[:, 0])
    return found


def fitted(*data: Any) -> Posterior:
    model, found = Model(D), Data(*data)
    model.fit(found)
    return model.posterior(found)


class Dense:
    """The same by the whole covariance of all scores."""

    def __init__(self, model: Model, data: Scores) -> None:
        self.points, self.point, image, payload, y = data
        self.theta, self.own = model.theta, Data(*data)
        sizes = np.exp(2 * self.theta[D:])
        self.amplitude, self.slope, self.of_payload, self.of_image, noise = sizes
        self.n_payloads, self.n_images = len(set(payload)), len(set(image))
        names, images = np.array(payload), np.array(image)
        same = self.amplitude * 1e-6 * np.eye(len(self.points))
        whole = (self.kernel(self.points, self.points) + same)[self.point][:, self.point]
        whole += 1.0 + noise * np.eye(len(y))
        whole += self.of_payload * (names[:, None] == names)
        whole += self.of_image * (images[:, None] == images)
        self.whole, self.y = whole, (np.array(y) - self.own.mean) / self.own.scale

    def kernel(self, one: Array, other: Array) -> Array:
        apart = (one[:, None] - other[None]) * np.exp(-self.theta[:D])
        smooth = self.amplitude * np.exp(-0.5 * (apart**2).sum(2))
        found: Array = smooth + self.slope * (2 * one - 1) @ (2 * other - 1).T / D
        return found

    def loss(self) -> float:
        solved = np.linalg.solve(self.whole, self.y)
        return 0.5 * float(self.y @ solved + np.linalg.slogdet(self.whole)[1])

    def mean_and_covariance(self, x: Array) -> tuple[Array, Array]:
        across = self.kernel(x, self.points)[:, self.point]
        covariance = self.kernel(x, x) - across @ np.linalg.solve(self.whole, across.T)
        return across @ np.linalg.solve(self.whole, self.y), covariance

    def expected(self, x: Array) -> tuple[float, float]:
        """With the average offset, in the units of the scores."""
        offset = 1.0 + self.of_payload / self.n_payloads + self.of_image / self.n_images
        across = self.kernel(x[None], self.points)[0, self.point] + offset
        mean = across @ np.linalg.solve(self.whole, self.y)
        prior = float(self.kernel(x[None], x[None])[0, 0]) + offset
        variance = prior - across @ np.linalg.solve(self.whole, across)
        scale = self.own.scale
        return self.own.mean + scale * float(mean), scale * math.sqrt(variance)


def test_sums_tell_what_the_whole_covariance_does() -> None:
    data, x = scores(), np.random.default_rng(1).uniform(size=(5, D))
    model = Model(D)
    model.theta = model.theta + 0.3 * np.random.default_rng(2).normal(size=len(model.theta))
    dense = Dense(model, data)
    mean, covariance = dense.mean_and_covariance(x)
    posterior, at = model.posterior(Data(*data)), torch.from_numpy(x)
    assert float(_loss(Data(*data), torch.from_numpy(model.theta))) == pytest.approx(
        dense.loss(), abs=1e-5
    )
    assert posterior.mean(at).numpy() == pytest.approx(mean, abs=1e-6)
    assert posterior.covariance(at, at).numpy() == pytest.approx(covariance, abs=1e-6)
    assert posterior.expected(at[0]) == pytest.approx(dense.expected(x[0]), abs=1e-5)
    both = posterior.mean_and_variance(at)
    assert both[0].numpy() == pytest.approx(mean, abs=1e-6)
    assert both[1].numpy() == pytest.approx(np.diag(covariance), abs=1e-6)


def test_payload_counts_by_its_share_in_what_is_expected() -> None:
    points = np.random.default_rng(0).uniform(size=(40, D))
    payload = ["p", "q"] * 20
    y = [8.0 if name == "p" else 0.0 for name in payload]
    image = [i % 4 for i in range(40)]
    data = Data(points, list(range(40)), image, payload, y, {"p": 3.0, "q": 1.0})
    model = Model(D)
    model.fit(data)
    mean, _ = model.posterior(data).expected(torch.full((D,), 0.5, dtype=torch.float64))
    assert mean == pytest.approx(6.0, abs=0.3)


def test_fit_leads_to_a_more_likely_model() -> None:
    data = Data(*scores())
    model = Model(D)
    before = float(_loss(data, torch.from_numpy(model.theta)))
    model.fit(data)
    assert float(_loss(data, torch.from_numpy(model.theta))) < before - 1
    # The wave is in the first dimension; the others matter less, so they are longer.
    assert model.theta[0] < model.theta[1:D].min()


def test_mean_follows_the_function_and_not_the_payloads() -> None:
    posterior = fitted(*scores(n_points=60))
    x = np.random.default_rng(5).uniform(size=(50, D))
    found = posterior.data.scale * posterior.mean(torch.from_numpy(x)).numpy()
    truth = wave(x)
    assert np.abs((found - found.mean()) - (truth - truth.mean())).max() < 0.5


def test_shift_and_scale_of_the_scores_change_nothing_but_the_units() -> None:
    points, point, image, payload, y = scores()
    x = torch.from_numpy(np.random.default_rng(5).uniform(size=(5, D)))
    one = fitted(points, point, image, payload, y)
    other = fitted(points, point, image, payload, [1e4 * score - 3e6 for score in y])
    assert one.mean(x).numpy() == pytest.approx(other.mean(x).numpy(), abs=1e-4)
    assert other.data.scale == pytest.approx(1e4 * one.data.scale)


@pytest.mark.parametrize("n", [1, 2])
def test_few_scores_are_enough_to_go_on(n: int) -> None:
    points = np.random.default_rng(0).uniform(size=(n, D))
    posterior = fitted(points, list(range(n)), [0] * n, ["p"] * n, [float(i) for i in range(n)])
    mean, variance = posterior.mean_and_variance(torch.full((1, D), 0.5, dtype=torch.float64))
    assert torch.isfinite(mean).all()
    assert (variance > 0).all()


def test_equal_scores_are_no_error() -> None:
    points = np.random.default_rng(0).uniform(size=(8, D))
    posterior = fitted(points, list(range(8)), [0] * 8, ["p"] * 8, [7.5] * 8)
    assert np.isfinite(posterior.at_points).all()


def test_merge_that_was_judged_twice_is_no_error() -> None:
    points = np.full((6, D), 0.25)
    posterior = fitted(points, list(range(6)), [0] * 6, ["p"] * 6, [float(i) for i in range(6)])
    assert np.isfinite(posterior.at_points).all()


def sloped(seed: int = 3) -> tuple[Scores, Slopes]:
    """Scores, and slopes of the wave at some of their points."""
    data, chance = scores(), np.random.default_rng(seed)
    some = [2, 5, 11, 20]
    true = np.zeros((len(some), D))
    true[:, 0] = 6 * np.cos(3 * data[0][some, 0])
    root = chance.normal(0, 0.1, (len(some), D, D)) + 0.3 * np.eye(D)
    return data, Slopes(some, true + chance.normal(0, 0.3, true.shape), root @ root.mT)


def test_covariances_with_slopes_are_the_derivatives_of_the_kernel() -> None:
    chance = np.random.default_rng(0)
    x, points = (torch.from_numpy(chance.uniform(size=(n, D))) for n in (3, 2))
    lengths = torch.from_numpy(chance.uniform(0.5, 2.0, D))
    kernel = _Kernel(lengths, torch.tensor(1.3), torch.tensor(0.4))

    def of_one(one: Tensor, other: Tensor) -> Tensor:
        return kernel.of_scores(one[None], other[None])[0, 0]

    for i, one in enumerate(x):
        slopes = [torch.func.grad(of_one, 1)(one, point) for point in points]
        assert torch.allclose(kernel.with_slopes(x, points)[i], torch.cat(slopes))
    second = torch.func.jacrev(torch.func.grad(of_one, 0), 1)
    rows = [torch.cat([second(one, other) for other in points], 1) for one in points]
    assert torch.allclose(kernel.of_slopes(points), torch.cat(rows))


def test_slopes_tell_what_the_whole_covariance_with_them_does() -> None:
    data, slopes = sloped()
    found = Data(*data, slopes=slopes)
    model = Model(D, WHOLE)
    model.theta = model.theta + 0.3 * np.random.default_rng(2).normal(size=len(model.theta))
    own = model.theta
    model.theta = own[:-2]
    dense = Dense(model, data)
    model.theta = own
    gain, misfit = math.exp(own[-2]), math.exp(2 * own[-1])
    kernel = _kernel(torch.from_numpy(own), D)
    points, x = (
        torch.from_numpy(data[0]),
        torch.from_numpy(np.random.default_rng(1).random((5, D))),
    )
    at = points[slopes.point]
    across = gain * kernel.with_slopes(points, at).numpy()[data[1]]
    errors = misfit * block_diag(*slopes.covariance) / found.scale**2
    whole = np.block(
        [
            [dense.whole, across],
            [across.T, gain**2 * kernel.of_slopes(at).numpy() + errors],
        ]
    )
    y = np.concatenate([dense.y, slopes.mean.ravel() / found.scale])
    solved = np.linalg.solve(whole, y)
    offset = 1.0 + dense.of_payload / dense.n_payloads + dense.of_image / dense.n_images
    of_x = np.hstack(
        [dense.kernel(x.numpy(), data[0])[:, data[1]], gain * kernel.with_slopes(x, at).numpy()]
    )
    covariance = dense.kernel(x.numpy(), x.numpy()) - of_x @ np.linalg.solve(whole, of_x.T)

    posterior = model.posterior(found)
    loss = 0.5 * float(y @ solved + np.linalg.slogdet(whole)[1])
    assert float(_loss(found, torch.from_numpy(own))) == pytest.approx(loss, abs=1e-4)
    assert posterior.mean(x).numpy() == pytest.approx(of_x @ solved, abs=1e-5)
    assert posterior.covariance(x, x).numpy() == pytest.approx(covariance, abs=1e-5)
    of_level = of_x[0].copy()
    of_level[: len(dense.y)] += offset
    mean, variance = of_level @ solved, float(dense.kernel(x[:1].numpy(), x[:1].numpy())[0, 0])
    variance += offset - of_level @ np.linalg.solve(whole, of_level)
    expected = (found.mean + found.scale * mean, found.scale * math.sqrt(variance))
    assert posterior.expected(x[0]) == pytest.approx(expected, abs=1e-4)


def test_slopes_tell_at_once_which_weights_matter() -> None:
    (points, point, image, payload, y), slopes = sloped()
    model = Model(D, WHOLE)
    few = Data(points[:21], point[:6], image[:6], payload[:6], y[:6], slopes=slopes)
    model.fit(few, n_steps=60)
    assert model.theta[0] < model.theta[1:D].min() - 1


def chosen(n_points: int = 12, seed: int = 0) -> tuple[Array, list[Choice]]:
    """Points, and choices between pictures of them by the wave, on four prompts."""
    chance = np.random.default_rng(seed)
    points = chance.uniform(size=(n_points, D))
    value = wave(points)
    some = []
    for item in range(4):
        for first in range(1, n_points):
            second = int(chance.integers(first))
            won = chance.random() < expit(3 * (value[first] - value[second]))
            some.append(Choice(item, first, second, float(won)))
    return points, some


def test_posterior_by_choices_is_that_of_the_strengths_of_all_pictures() -> None:
    points, some = chosen()
    model = Model(D, is_chosen=True)
    model.fit(Chosen(points, some), n_steps=10)
    posterior = model.posterior(Chosen(points, some))
    luck = np.exp(2 * model.theta[D + 4])

    shown = sorted({(c.item, m) for c in some for m in (c.first, c.second)})
    merge = [m for _, m in shown]
    lead = np.zeros((len(some), len(shown)))
    for row, (item, first, second, _) in enumerate(some):
        lead[row, shown.index((item, first))], lead[row, shown.index((item, second))] = 1, -1
    at = torch.from_numpy(points)
    kernel = posterior.kernel.of_scores(at, at).numpy()
    kernel += 1e-6 * float(posterior.kernel.variance) * np.eye(len(points))
    whole = kernel[merge][:, merge] + luck * np.eye(len(shown))
    strength = np.zeros(len(shown))
    for _ in range(30):
        won = expit(lead @ strength)
        slope = lead.T @ (np.array([c.share for c in some]) - won)
        curvature = lead.T @ ((won * (1 - won))[:, None] * lead)
        precision = np.linalg.inv(whole) + curvature
        strength = np.linalg.solve(precision, curvature @ strength + slope)

    x = np.random.default_rng(1).uniform(size=(5, D))
    across = posterior.kernel.of_scores(torch.from_numpy(x), at).numpy()[:, merge]
    assert posterior.mean(torch.from_numpy(x)).numpy() == pytest.approx(across @ slope, rel=1e-5)
    known = curvature - curvature @ np.linalg.solve(precision, curvature)
    own = posterior.kernel.of_scores(torch.from_numpy(x), torch.from_numpy(x)).numpy()
    assert posterior.covariance(torch.from_numpy(x), torch.from_numpy(x)).numpy() == (
        pytest.approx(own - across @ known @ across.T, rel=1e-5)
    )


def test_lead_by_choices_is_that_over_the_first() -> None:
    points, some = chosen()
    model = Model(D, is_chosen=True)
    data = Chosen(points, some)
    model.fit(data)
    posterior = model.posterior(data)
    at = torch.from_numpy(points)
    assert posterior.expected(at[0]) == pytest.approx((0, 0), abs=1e-2)
    lead, error = posterior.expected(at[5])
    both = at[[5, 0]]
    mean, covariance = posterior.mean(both), posterior.covariance(both, both)
    assert lead == pytest.approx(float(mean[0] - mean[1]), rel=1e-4)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert error == pytest.approx(math.sqrt(float(variance)), rel=1e-3)
    found = posterior.lead_over(at[0])(at[[5, 0]])
    assert found[0].tolist() == pytest.approx([lead, 0], abs=1e-4)
    assert found[1].sqrt().tolist() == pytest.approx([error, 0], abs=1e-3)


def test_loss_of_choices_has_its_own_derivatives() -> None:
    points, some = chosen(6)
    data, theta = Chosen(points, some), torch.from_numpy(Model(D, is_chosen=True).theta)
    assert torch.autograd.gradcheck(lambda x: _loss(data, x), theta.requires_grad_())


def test_choices_tell_which_merges_are_better() -> None:
    points, some = chosen(40)
    model = Model(D, is_chosen=True)
    data = Chosen(points, some)
    model.fit(data)
    x = np.random.default_rng(1).uniform(size=(200, D))
    found = model.posterior(data).mean(torch.from_numpy(x)).numpy()
    assert np.corrcoef(found, wave(x))[0, 1] > 0.9


def test_nothing_chosen_tells_nothing() -> None:
    data = Chosen(np.random.default_rng(0).uniform(size=(3, D)), [])
    model = Model(D, is_chosen=True)
    model.fit(data)
    posterior = model.posterior(data)
    assert posterior.mean(torch.full((1, D), 0.5, dtype=torch.float64)).tolist() == [0.0]


def test_awaited_merges_change_no_mean_and_tell_of_what_is_near_them() -> None:
    posterior = fitted(*scores())
    awaited = torch.full((2, D), 0.9, dtype=torch.float64)
    later = Expecting(posterior, awaited, 0.5)
    x = torch.cat([awaited[:1], torch.from_numpy(np.random.default_rng(1).uniform(size=(20, D)))])
    (mean, variance), (mean_then, variance_then) = (
        known.mean_and_variance(x) for known in (posterior, later)
    )
    assert torch.equal(mean, mean_then)
    assert bool((variance_then <= variance + 1e-9).all())
    # Of a merge that is known by two images more: Rasmussen and Williams 2006, equation 2.24.
    assert float(variance_then[0]) == pytest.approx(1 / (1 / float(variance[0]) + 2 / 0.5))
    own = torch.diagonal(later.covariance(x, x))
    assert own.numpy() == pytest.approx(variance_then.numpy(), abs=1e-9)
