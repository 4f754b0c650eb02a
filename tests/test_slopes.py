"""The slopes of images, and what they tell of a merge."""

from __future__ import annotations

import numpy as np
import pytest

from bayesian_merger.gp import Array
from bayesian_merger.slopes import Slope, pooled

D = 6


def images(n: int, mean: Array, root: Array, chance: np.random.Generator) -> list[Slope]:
    """Slopes of single images whose errors have the covariance root root'."""
    return [Slope(1, mean + root @ chance.normal(size=len(mean))) for _ in range(n)]


def test_slopes_of_equally_steep_images_are_averaged() -> None:
    one, other = np.array([3.0, 4.0]), np.array([4.0, 3.0])
    found = pooled([[Slope(1, one), Slope(1, other)], [], [Slope(1, other), Slope(1, one)]])
    assert found is not None
    assert found.point == [0, 2]
    assert found.mean == pytest.approx(np.array([[3.5, 3.5]] * 2))


def test_merges_without_slopes_tell_nothing() -> None:
    assert pooled([[], []]) is None
    assert pooled([]) is None


def test_covariance_of_the_errors_is_found() -> None:
    chance = np.random.default_rng(0)
    root = np.tril(chance.normal(size=(D, D)))
    found = pooled([images(400, np.full(D, 0.2), root, chance) for _ in range(3)])
    assert found is not None
    chance = np.random.default_rng(1)
    again = [pooled([images(40, np.full(D, 0.2), root, chance)]) for _ in range(400)]
    means = np.array([one.mean[0] for one in again if one])
    for covariance in found.covariance * 10:
        assert covariance == pytest.approx(np.cov(means.T), abs=0.02)


def test_more_images_make_a_merge_more_certain() -> None:
    chance = np.random.default_rng(0)
    found = pooled([images(n, np.ones(D), np.eye(D), chance) for n in (10, 40)])
    assert found is not None
    few, many = (np.trace(one) for one in found.covariance)
    assert few == pytest.approx(4 * many, rel=0.2)


def test_groups_count_as_their_images_do() -> None:
    chance = np.random.default_rng(0)
    each = images(600, np.ones(D), np.eye(D), chance)
    groups = [
        Slope(3, np.mean([s.slope for s in each[i : i + 3]], 0)) for i in range(0, len(each), 3)
    ]
    single, grouped = pooled([each]), pooled([groups])
    assert single is not None
    assert grouped is not None
    assert grouped.mean == pytest.approx(single.mean, abs=0.1)
    assert np.trace(grouped.covariance[0]) == pytest.approx(
        np.trace(single.covariance[0]), rel=0.3
    )


def test_a_few_steep_images_change_little() -> None:
    chance = np.random.default_rng(0)
    usual = images(20, np.ones(D), np.eye(D), chance)
    steep = [Slope(1, chance.normal(0, 1000, D)) for _ in range(2)]
    plain, found = pooled([usual]), pooled([usual + steep])
    assert plain is not None
    assert found is not None
    assert found.mean == pytest.approx(plain.mean, abs=0.3)
    assert np.trace(found.covariance[0]) < 3 * np.trace(plain.covariance[0])


def test_units_of_a_weight_do_not_matter() -> None:
    chance = np.random.default_rng(0)
    each = images(12, np.ones(D), np.eye(D), chance)
    units = np.array([0.1, 1, 1, 1, 10, 1])
    plain = pooled([each])
    found = pooled([[Slope(1, one.slope * units) for one in each]])
    assert plain is not None
    assert found is not None
    assert found.mean == pytest.approx(plain.mean * units)
    assert np.sqrt(found.covariance[0].diagonal()) == pytest.approx(
        np.sqrt(plain.covariance[0].diagonal()) * units, rel=1e-3
    )


def test_weight_without_a_slope_is_not_known_and_tells_nothing_of_others() -> None:
    chance = np.random.default_rng(0)
    each = images(12, np.ones(D), np.ones((D, D)) + np.eye(D), chance)
    lacking = [Slope(1, np.where(np.arange(D) == 2, np.nan, one.slope)) for one in each]
    found = pooled([each, lacking])
    assert found is not None
    assert np.isfinite(found.mean).all()
    covariance = found.covariance[1]
    assert covariance[2, 2] > 1e5 * covariance[0, 0]
    assert not covariance[2, [0, 1, 3, 4, 5]].any()
    assert covariance[0, 1] > 0


def test_weight_that_changes_nothing_is_certain_to_do_so() -> None:
    chance = np.random.default_rng(0)
    still = np.diag([1.0] * (D - 1) + [0.0])
    found = pooled([images(12, still @ np.ones(D), still, chance)])
    assert found is not None
    assert found.mean[0, -1] == 0
    assert 0 < found.covariance[0, -1, -1] < 1e-5 * found.covariance[0, 0, 0]
    assert np.linalg.eigvalsh(found.covariance[0]).min() > 0


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_images_leave_a_covariance_that_has_a_root(n: int) -> None:
    found = pooled([images(n, np.ones(D), np.eye(D), np.random.default_rng(n))])
    assert found is not None
    assert np.linalg.eigvalsh(found.covariance[0]).min() > 0
