"""The scorer of the embedded example, on scenes drawn for it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from bayesian_merger.data import Prompt, Sample
from bayesian_merger.demo import scenes
from bayesian_merger.scorers.demo import WORDS, Demo


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(
    n: int, *, from_held_out: bool = False, wobble: float = 0.0
) -> tuple[torch.Tensor, list[str]]:
    """`n` pictures and their captions."""
    some = scenes.random_scenes(n, generator(), from_held_out=from_held_out)
    return scenes.draw(some, generator(), wobble=wobble), [scenes.caption(s) for s in some]


def as_samples(pixels: torch.Tensor, prompts: list[str]) -> list[Sample]:
    arrays = (pixels.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [
        Sample(Image.fromarray(array), Prompt(index, "test", prompt, seed=index))
        for index, (array, prompt) in enumerate(zip(arrays, prompts, strict=True))
    ]


def test_it_knows_the_words_of_the_scenes_in_their_order() -> None:
    assert list(WORDS) == [word for words in scenes.WORDS.values() for word in words]


@pytest.mark.parametrize("from_held_out", [False, True])
def test_clean_scenes_score_high(demo: Demo, from_held_out: bool) -> None:
    pixels, prompts = drawn(48, from_held_out=from_held_out)
    scores = demo(as_samples(pixels, prompts))
    assert all(0 <= score <= 10 for score in scores)
    assert sum(scores) / 48 > 9


def test_the_same_samples_get_the_same_scores(demo: Demo) -> None:
    samples = as_samples(*drawn(4))
    assert demo(samples) == demo(samples) == Demo()(samples)


def test_one_sample_scores_as_in_a_batch(demo: Demo) -> None:
    samples = as_samples(*drawn(4))
    assert demo(samples[:1])[0] == pytest.approx(demo(samples)[0], abs=1e-3)


def test_no_samples_get_no_scores(demo: Demo) -> None:
    assert demo([]) == []


@pytest.mark.parametrize("group", range(4))
def test_the_right_caption_beats_one_with_a_wrong_word(demo: Demo, group: int) -> None:
    some = scenes.random_scenes(48, generator(), from_held_out=True)
    wrong = some.clone()
    wrong[:, group] = (wrong[:, group] + 1) % scenes.SIZES[group]
    pixels = scenes.draw(some, generator())
    right_scores = demo.differentiable(pixels, [scenes.caption(s) for s in some])
    wrong_scores = demo.differentiable(pixels, [scenes.caption(s) for s in wrong])
    assert ((right_scores - wrong_scores) > 0.7).float().mean() > 0.95


def test_the_score_falls_as_the_outline_gets_sloppier(demo: Demo) -> None:
    means = []
    for wobble in (0.0, 0.06, 0.12, 0.25):
        means.append(float(demo.differentiable(*drawn(48, wobble=wobble)).mean()))
    assert means == sorted(means, reverse=True)
    assert means[0] - means[-1] > 2


def test_two_pictures_in_one_score_below_each(demo: Demo) -> None:
    pixels, prompts = drawn(48)
    ghosts = (pixels + pixels.roll(1, 0)) / 2
    assert demo.differentiable(ghosts, prompts).mean() < 5


def test_noise_and_blank_pictures_score_low(demo: Demo) -> None:
    _, prompts = drawn(16)
    noise = torch.rand(16, 3, 64, 64, generator=generator())
    blank = torch.linspace(0, 1, 16)[:, None, None, None].expand(-1, 3, 64, 64)
    assert demo.differentiable(noise, prompts).max() < 2.5
    assert demo.differentiable(blank, prompts).max() < 3


def test_unknown_words_do_not_count(demo: Demo) -> None:
    pixels, prompts = drawn(4)
    plain = demo.differentiable(pixels, prompts)
    adorned = demo.differentiable(pixels, [f"masterpiece, {p}, 8k" for p in prompts])
    assert torch.equal(plain, adorned)


def test_a_prompt_without_known_words_is_judged_by_quality_alone(demo: Demo) -> None:
    pixels, _ = drawn(4)
    assert (demo.differentiable(pixels, [""] * 4) > 8).all()


def test_larger_pictures_score_alike(demo: Demo) -> None:
    pixels, prompts = drawn(16)
    larger = torch.nn.functional.interpolate(pixels, scale_factor=4, mode="bilinear")
    small_scores, large_scores = (demo(as_samples(p, prompts)) for p in (pixels, larger))
    assert small_scores == pytest.approx(large_scores, abs=1.0)


def test_the_gradient_flows_to_the_pixels_and_raises_the_score(demo: Demo) -> None:
    pixels, prompts = drawn(4, wobble=0.12)
    pixels.requires_grad_(True)
    scores = demo.differentiable(pixels, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    moved = (pixels + 0.02 * gradient.sign()).clamp(0, 1)
    assert demo.differentiable(moved, prompts).mean() > scores.mean()
