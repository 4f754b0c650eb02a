"""Images with a graph behind them: the slopes of a score by the weights of the merge."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor

import bayesian_merger
from bayesian_merger import devices
from bayesian_merger.backends import Differentiable, Key, diffusers
from bayesian_merger.backends.diffusers import Diffusers
from bayesian_merger.checkpoint import Checkpoint
from bayesian_merger.data import Prompt, Recipe
from bayesian_merger.errors import TrialError
from bayesian_merger.merge import Merger
from bayesian_merger.scorers import scorer as scorers
from bayesian_merger.scorers.demo import Demo

DEMO = Path(bayesian_merger.__file__).parent / "demo"
N_STEPS = 4
STEP = 1e-5
BASE, FIRST, DEEP, LAST = (("alpha", block) for block in ("base", "IN00", "OUT03", "OUT11"))
SOME = {BASE, FIRST, DEEP, LAST}


@pytest.fixture(scope="module")
def merger() -> Merger:
    return Merger([Checkpoint(DEMO / "crisp.safetensors"), Checkpoint(DEMO / "vivid.safetensors")])


@pytest.fixture(scope="module")
def scorer() -> Demo:
    found = Demo()
    found._network.double()
    return found


@pytest.fixture
def live(merger: Merger) -> Iterator[Diffusers]:
    """In float64, so that differences tell derivatives; DDIM alone steps in it too."""
    back_end = Diffusers(device="cpu", batch=4, config=DEMO / "config")
    back_end._dtype = torch.float64
    yield back_end
    back_end.close()


def prompts(n: int = 2, sampler: str = "DDIM") -> list[Prompt]:
    texts = ["a plain red circle on a white background", "a dotted blue star on a pink background"]
    return [
        Prompt(i, "p", texts[i % 2], 100 + i, "", 64, 64, N_STEPS, 3.0, sampler) for i in range(n)
    ]


def load(back_end: Diffusers, merger: Merger, changes: Mapping[str, float] | None = None) -> None:
    weights = {"alpha": {**dict.fromkeys(merger.blocks, 0.5), **(changes or {})}}
    recipe = Recipe("weighted_sum", "sd1", merger.references(), weights, precision="fp32")
    back_end.load(recipe, merger.merge(recipe))


def judge_by(scorer: Demo) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    return lambda pixels, some: scorer.differentiable(pixels, [p.prompt for p in some])


def followed(
    back_end: Diffusers, scorer: Demo, last: int | None, wanted: set[Key] = SOME
) -> Mapping[Key, float]:
    assert isinstance(back_end, Differentiable)
    each = [one.slopes for one in back_end.follow(prompts(), judge_by(scorer), wanted, last)]
    return {key: mean(slopes[key] for slopes in each) for key in each[0]}


def mean_score(back_end: Diffusers, scorer: Demo) -> float:
    with torch.no_grad():
        pixels = back_end._pixels(prompts(), 0)
        return float(judge_by(scorer)((pixels / 2 + 0.5).clamp(0, 1), prompts()).mean())


def differences(back_end: Diffusers, merger: Merger, scorer: Demo) -> dict[Key, float]:
    """The slopes by central differences, of merges that are not rounded to a type of files."""
    models, found = [Checkpoint(model.path) for model in merger.models], {}
    for key in SOME:
        names = [
            name
            for name, place in merger.places.items()
            if place.block == key[1] and place.component != "vae" and name in back_end._live
        ]
        ends = []
        for alpha in (0.5 - STEP, 0.5 + STEP, 0.5):
            for name in names:
                a, b = (model[name].double() for model in models)
                live = back_end._live[name]
                live.copy_(torch.lerp(a, b, alpha).reshape(live.shape))
            ends.append(mean_score(back_end, scorer))
        found[key] = (ends[1] - ends[0]) / (2 * STEP)
    return found


def test_slopes_through_all_steps_are_the_derivatives(
    live: Diffusers, merger: Merger, scorer: Demo
) -> None:
    load(live, merger)
    found = followed(live, scorer, None)
    expected = differences(live, merger, scorer)
    for key in SOME:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


class Sum:
    """The sum of scorers, as the loop takes it of several."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return sum(
            (part.differentiable(pixels, prompts) for part in self._parts), pixels.new_zeros(())
        )


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Learnt scorers of random weights in float64, by name."""
    folder = tmp_path_factory.mktemp("learnt")
    clip, siglip = tiny_models.clip(folder / "clip"), tiny_models.siglip(folder / "siglip")
    for name, n_in in (("clip", 24), ("siglip", 32)):
        tiny_models.head_file(folder / f"{name}.pth", {"0": (16, n_in), "2": (1, 16)})
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "clipscore": ("clipscore", {"tower": clip}),
        "pickscore": ("pickscore", {"tower": clip}),
        "CLIP head": ("head", {"tower": clip, "weights": folder / "clip.pth", "last": "sigmoid"}),
        "SigLIP head": ("head", {"tower": siglip, "weights": folder / "siglip.pth"}),
        "classifier": (
            "classifier",
            {"model": tiny_models.classifier(folder / "beit"), "label": "aesthetic"},
        ),
    }

    def one(name: str) -> Any:
        if name == "sum":
            return Sum(one("clipscore"), one("CLIP head"), one("classifier"))
        kind, given = options[name]
        found = scorers.build(kind, {**given, "device": "cpu"})
        for part in (found, getattr(found, "_tower", None)):
            for attribute in ("_model", "_network", "_layers"):
                if isinstance(getattr(part, attribute, None), torch.nn.Module):
                    getattr(part, attribute).double()
            if part is not None and hasattr(part, "_dtype"):
                part._dtype = torch.float64
        return found

    return one


@pytest.mark.parametrize(
    "name",
    [
        "SigLIP head",
        "sum",
        *(
            pytest.param(name, marks=pytest.mark.slow)  # which the sum is of
            for name in ("clipscore", "pickscore", "CLIP head", "classifier")
        ),
    ],
)
def test_slopes_of_a_learnt_scorer_are_the_derivatives(
    live: Diffusers, merger: Merger, learnt: Callable[[str], Any], name: str
) -> None:
    judge = learnt(name)
    load(live, merger)
    found = followed(live, judge, None)
    expected = differences(live, merger, judge)
    for key in SOME:
        assert expected[key] != 0
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-8), key


def test_slopes_through_the_last_step_take_the_earlier_ones_as_given(
    live: Diffusers, merger: Merger, scorer: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(live, merger)
    found = followed(live, scorer, 1)
    given: list[Tensor] = []
    inner = live._noise

    def kept(latents: Tensor, time: Tensor, texts: diffusers._Texts) -> Tensor:
        given.append(inner(latents, time, texts))
        return given[-1]

    monkeypatch.setattr(live, "_noise", kept)
    mean_score(live, scorer)
    n_calls = 0

    def last_anew(latents: Tensor, time: Tensor, texts: diffusers._Texts) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        is_last = n_calls % N_STEPS == 0
        return inner(latents, time, texts) if is_last else given[n_calls % N_STEPS - 1]

    monkeypatch.setattr(live, "_noise", last_anew)
    expected = differences(live, merger, scorer)
    for key in SOME:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_graph_that_is_made_again_gives_the_same_slopes(
    live: Diffusers, merger: Merger, scorer: Demo
) -> None:
    load(live, merger)
    kept = followed(live, scorer, 2)
    live.close()
    live._makes_calls_again = True
    load(live, merger)
    assert followed(live, scorer, 2) == pytest.approx(kept, rel=1e-6)
    live._make_parts_again()
    assert followed(live, scorer, 2) == pytest.approx(kept, rel=1e-6)
    live.close()
    load(live, merger)
    assert followed(live, scorer, 2) == pytest.approx(kept, rel=1e-6)


def test_image_that_needs_too_much_memory_is_followed_with_less(
    live: Diffusers, merger: Merger, scorer: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(live, merger)
    kept = followed(live, scorer, 1)
    decode = live._pipe.vae.decode

    def short(*given: object) -> object:
        if not live._pipe.vae.decoder.gradient_checkpointing:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(*given)

    monkeypatch.setattr(live._pipe.vae, "decode", short)
    assert followed(live, scorer, 1) == pytest.approx(kept, rel=1e-6)


def test_memory_of_a_try_that_failed_is_free_at_the_next(
    live: Diffusers, merger: Merger, scorer: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(live, merger)
    made: list[weakref.ref[Tensor]] = []
    pixels_of = live._pixels

    def watched(some: Sequence[Prompt], last: int | None) -> Tensor:
        assert all(pixels() is None for pixels in made)
        found = pixels_of(some, last)
        made.append(weakref.ref(found))
        return found

    def short(pixels: Tensor, some: Sequence[Prompt]) -> Tensor:
        if len(made) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return judge_by(scorer)(pixels, some)

    monkeypatch.setattr(live, "_pixels", watched)
    list(live.follow(prompts(1), short, SOME, 1))
    assert len(made) == 2


def test_image_that_needs_too_much_memory_however_it_is_followed_fails_the_trial(
    live: Diffusers, merger: Merger, scorer: Demo
) -> None:
    load(live, merger)

    def short(pixels: Tensor, some: Sequence[Prompt]) -> Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(TrialError, match=r"an image of 64 x 64 pixels takes about 0\.0 GB"):
        list(live.follow(prompts(), short, SOME, 1))


@pytest.mark.parametrize(
    ("free", "is_short", "keeps"),
    [
        (64 * 64 * 5_000, True, False),
        (64 * 64 * 20_000, True, True),
        (1 << 32, False, True),
        (None, True, True),
    ],
)
def test_memory_is_spared_where_little_is_free_or_nobody_tells(
    live: Diffusers,
    merger: Merger,
    scorer: Demo,
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    is_short: bool,
    keeps: bool,
) -> None:
    for model in merger.aligned:  # that other tests use too
        monkeypatch.setattr(model, "_keeps", True)
    load(live, merger)
    plain = followed(live, scorer, 1)
    monkeypatch.setattr(devices, "free", lambda device: free)
    live._makes_calls_again = True
    assert followed(live, scorer, 1) == pytest.approx(plain, rel=1e-4)
    assert live._pipe.vae.decoder.gradient_checkpointing == is_short
    assert {model._keeps for model in merger.aligned} == {keeps}  # type: ignore[union-attr]


def test_a_cpu_does_not_keep_the_graph_of_many_large_calls(
    live: Diffusers, merger: Merger, scorer: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(live, merger)
    plain = followed(live, scorer, None)
    did = live._makes_calls_again
    monkeypatch.setattr(diffusers, "_KEPT", 1000)
    assert followed(live, scorer, None) == pytest.approx(plain, rel=1e-4)
    assert (did, live._makes_calls_again) == (False, True)
    assert live._pipe.vae.decoder.gradient_checkpointing


def test_no_gradient_is_kept(live: Diffusers, merger: Merger, scorer: Demo) -> None:
    load(live, merger)
    followed(live, scorer, 1)
    parts = [getattr(live._pipe, part) for part in live._tables]
    parameters = [p for part in parts for p in part.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in parameters)


def test_only_the_wanted_weights_have_slopes(
    live: Diffusers, merger: Merger, scorer: Demo
) -> None:
    load(live, merger)
    assert followed(live, scorer, 1, {FIRST}).keys() == {FIRST}
    assert followed(live, scorer, None, {BASE}).keys() == {BASE}


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "Heun", "DPM2", "DDIM", "UniPC", "LMS"])
def test_followed_images_are_the_ones_that_are_generated(
    merger: Merger, scorer: Demo, sampler: str
) -> None:
    back_end = Diffusers(device="cpu", batch=1, config=DEMO / "config")
    load(back_end, merger)
    wanted = prompts(4, sampler)
    plain = [np.asarray(sample.image) for sample in back_end.generate(wanted)]
    pieces = list(back_end.follow(wanted, judge_by(Demo()), SOME, 1))
    images = [np.asarray(sample.image) for piece in pieces for sample in piece.samples]
    assert [s.prompt for piece in pieces for s in piece.samples] == wanted
    assert np.array_equal(images, plain)
    assert all(piece.slopes[LAST] != 0 for piece in pieces)


def test_gradient_that_overflows_is_tried_again_with_a_smaller_factor(
    live: Diffusers, merger: Merger, scorer: Demo
) -> None:
    load(live, merger)
    plain = followed(live, scorer, 1)

    n_tried = 0

    def overflows(pixels: Tensor, some: Sequence[Prompt]) -> Tensor:
        nonlocal n_tried
        n_tried += 1
        # What half precision does to a large gradient.
        pixels.register_hook(lambda g: g.where(g.abs() < 30, float("inf")))  # type: ignore[no-untyped-call]
        return judge_by(scorer)(pixels, some)

    live._enlarged = 2.0**16
    each = [one.slopes for one in live.follow(prompts(), overflows, SOME, 1)]
    # The images after the first begin with what did for that.
    assert n_tried == len(each) + 3
    assert {key: mean(one[key] for one in each) for key in SOME} == pytest.approx(plain, rel=1e-6)


def test_image_whose_gradient_is_no_number_has_no_slopes_and_others_have(
    live: Diffusers, merger: Merger, scorer: Demo
) -> None:
    load(live, merger)
    expected = [one.slopes for one in live.follow(prompts(), judge_by(scorer), SOME, 1)]

    def broken(pixels: Tensor, some: Sequence[Prompt]) -> Tensor:
        return judge_by(scorer)(pixels, some) * (float("nan") if some[0].index == 1 else 1.0)

    good, bad = live.follow(prompts(), broken, SOME, 1)
    assert bad.slopes == {}
    assert re.search("the gradient of tensor '.*' is not finite", bad.fault)
    assert good.slopes == expected[0]
    assert good.fault == ""
    (picture,) = live.generate(prompts()[1:])
    assert bad.samples[0].prompt == prompts()[1]
    assert (np.asarray(bad.samples[0].image) == np.asarray(picture.image)).all()
    assert not any(p.requires_grad for p in live._pipe.unet.parameters())
