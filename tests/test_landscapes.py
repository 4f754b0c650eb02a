"""The landscapes that searches are measured on: what bench/search.py relies on."""

from __future__ import annotations

import numpy as np
import pytest
from landscapes import FAMILIES, N_PAYLOADS, Landscape

every_family = pytest.mark.parametrize("family", FAMILIES)


def points(
    landscape: Landscape, n: int, seed: int = 1
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.random.default_rng(seed).uniform(size=(n, landscape.d))


@every_family
def test_scores_of_random_weights_have_mean_0_and_spread_1(family: str) -> None:
    landscape = Landscape(family, 3)
    values = landscape.f(points(landscape, 20_000))
    assert values.mean() == pytest.approx(0, abs=0.03)
    assert values.std() == pytest.approx(1, abs=0.03)


@every_family
def test_nothing_tried_beats_the_optimum(family: str) -> None:
    landscape = Landscape(family, 4)
    tried = np.concatenate(
        [points(landscape, 5000), np.round(points(landscape, 5000)), np.eye(landscape.d)]
    )
    assert landscape.f(tried).max() < landscape.best
    assert 0 < landscape.regret(tried[0]) < 3


def test_one_family_and_seed_is_one_landscape_and_others_are_others() -> None:
    first, same, other = (Landscape("smooth26", seed) for seed in (0, 0, 1))
    at = points(first, 10)
    assert (first.f(at) == same.f(at)).all()
    assert (first.f(at) != other.f(at)).all()


@every_family
def test_noise_of_an_image_has_spread_1_and_fixed_seeds_repeat(family: str) -> None:
    landscape, chance = Landscape(family, 0), np.random.default_rng(2)
    at, images = points(landscape, 1)[0], list(range(1000))
    for noise in ("fresh", "fixed"):
        scores = landscape.scores(at, images, noise, chance)
        errors = scores - np.tile(
            [scores[k::N_PAYLOADS].mean() for k in range(N_PAYLOADS)], len(images) // N_PAYLOADS
        )
        assert errors.std() == pytest.approx(1, abs=0.1)
        repeated = landscape.scores(at, images, noise, chance)
        assert (repeated == scores).all() == (noise == "fixed")


def test_fixed_seeds_have_much_of_their_noise_in_common_between_near_weights() -> None:
    landscape, chance = Landscape("corner26", 0), np.random.default_rng(2)
    at = points(landscape, 1)[0]
    near = np.clip(at + 0.01, 0, 1)
    one, other = (landscape.scores(w, range(1000), "fixed", chance) for w in (at, near))
    differences = other - one
    assert differences.std() == pytest.approx(1, abs=0.1)  # of independent noise: 1.41
