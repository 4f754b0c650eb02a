from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from bayesian_merger.choices import Choice, Choices, strengths

# Merge 0 beats 1 on two prompts, 2 beats 1 on one of them, and 2 and 0 are alike on another.
SOME = [Choice(0, 0, 1, 1.0), Choice(1, 0, 1, 1.0), Choice(1, 1, 2, 0.0), Choice(2, 2, 0, 0.5)]


def log_density(choices: Choices, kernel: Tensor, luck: Tensor) -> Tensor:
    told = choices.told(kernel, luck)
    same = torch.eye(len(kernel), dtype=torch.float64)
    whole = torch.linalg.inv(torch.linalg.inv(kernel) + told.g)
    size = torch.linalg.slogdet(same + kernel @ told.g)[1]
    found: Tensor = -0.5 * (told.rest - told.h @ whole @ told.h + size)
    return found


@pytest.mark.parametrize(("size", "error"), [(0.01, 1e-3), (0.1, 0.01), (1.0, 0.15)])
def test_density_of_choices_is_nearly_that_of_all_strengths_they_may_come_from(
    size: float, error: float
) -> None:
    kernel = size * (torch.eye(3, dtype=torch.float64) + 0.5)
    found = float(log_density(Choices(SOME, 3), kernel, torch.tensor(0.5 * size)))
    chance = np.random.default_rng(0)
    merges = chance.normal(size=(200_000, 3)) @ np.linalg.cholesky(kernel.numpy()).T
    shown = sorted({(c.item, m) for c in SOME for m in (c.first, c.second)})
    lucky = {place: np.sqrt(0.5 * size) * chance.normal(size=200_000) for place in shown}
    density = np.ones(200_000)
    for item, first, second, share in SOME:
        lead = merges[:, first] + lucky[item, first] - merges[:, second] - lucky[item, second]
        density *= expit(lead) ** share * expit(-lead) ** (1 - share)
    assert found == pytest.approx(math.log(density.mean()), abs=error)


def test_density_has_the_derivatives_of_its_likeliest_strengths() -> None:
    data = Choices(SOME, 3)

    def density(sizes: Tensor) -> Tensor:
        return log_density(data, sizes[0] * torch.eye(3, dtype=torch.float64) + 0.2, sizes[1])

    sizes = torch.tensor([1.5, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(density, sizes)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_likeliest_strengths_are_found_however_far_merges_may_be_apart(size: float) -> None:
    data = Choices([Choice(i, 0, 1, 1.0) for i in range(30)], 2)
    kernel = size * torch.eye(2, dtype=torch.float64)
    told = data.told(kernel, torch.tensor(1e-6, dtype=torch.float64))
    mean = torch.linalg.inv(torch.linalg.inv(kernel) + told.g) @ told.h
    # Where what was chosen pulls as hard as what was believed before.
    lead = float(mean[0] - mean[1])
    assert 30 * expit(-lead) == pytest.approx(lead / 2 / size, rel=1e-3)


def test_who_is_chosen_is_stronger() -> None:
    means, covariance = strengths(SOME, 3)
    assert means[0] > means[2] > means[1]
    assert np.linalg.eigvalsh(covariance).min() > 0


def test_strengths_do_not_depend_on_who_is_named_first() -> None:
    turned = [Choice(c.item, c.second, c.first, 1 - c.share) for c in SOME]
    for one, other in zip(strengths(SOME, 3), strengths(turned, 3), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_without_choices_nothing_is_known() -> None:
    means, covariance = strengths([], 2)
    assert means.tolist() == [0, 0]
    assert covariance[0, 1] == 0 < covariance[0, 0] == covariance[1, 1]


def test_more_choices_make_surer() -> None:
    def error(n: int) -> float:
        some = [Choice(i, 0, 1, float(i % 4 > 0)) for i in range(n)]
        return lead_error(strengths(some, 2)[1])

    assert error(100) < 0.6 * error(12)


def test_one_lucky_picture_tells_less_of_its_merge_than_many_good_ones() -> None:
    lucky = [Choice(0, 0, other, 1.0) for other in range(2, 12)]
    good = [Choice(1 + i, 1, 2 + i, 1.0) for i in range(10)]
    means, covariance = strengths(lucky + good, 12)
    assert means[1] > means[0]
    assert covariance[1, 1] < covariance[0, 0]


def lead_error(covariance: NDArray[np.float64]) -> float:
    return math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])


def test_likeliest_strengths_are_found_from_wherever_the_last_ones_were() -> None:
    some = [Choice(i % 3, 0, 1, float(i % 5 > 0)) for i in range(30)]
    chance = np.random.default_rng(0)
    used = Choices(some, 2)
    for _ in range(200):
        size, luck = np.exp(2 * chance.uniform(-4, 4, 2))
        kernel = size * torch.eye(2, dtype=torch.float64)
        given = torch.tensor(luck, dtype=torch.float64)
        for one, other in zip(
            used.told(kernel, given), Choices(some, 2).told(kernel, given), strict=True
        ):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
