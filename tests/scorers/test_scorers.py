"""The suite that every scorer passes; a new file is covered on arrival."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from PIL import Image

from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import classifiers, heads, scorer


def samples() -> list[Sample]:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    images = [
        Image.fromarray(noise),
        Image.new("RGB", (64, 64), (255, 0, 0)),
        Image.new("RGB", (8, 16), "black"),
    ]
    return [Sample(image, Prompt(i, "p", "a red circle", i)) for i, image in enumerate(images)]


# Other tests may have registered toys of theirs.
OWN = [n for n in scorer.names() if scorer.get(n).__module__.startswith("bayesian_merger.")]
# Those of other packages, and of people, have tests of their own.
ASIDE = ("bayesian_merger.scorers.extras", "bayesian_merger.scorers.manual")
BUILT = [n for n in OWN if scorer.get(n).__module__ not in ASIDE]
KNOWN_HEADS = [row.name for row in heads.ROWS]
KNOWN_CLASSIFIERS = {row.name: row.label for row in classifiers.ROWS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models in the place of the learnt ones."""
    found = tmp_path_factory.mktemp("models")
    for n in (512, 768, 1152):
        tiny_models.clip(found / f"clip{n}", n)
    for name, shapes in tiny_models.HEADS.items():
        tiny_models.head_file(found / f"{name}.pth", shapes)
    for label in {"good", *KNOWN_CLASSIFIERS.values()}:
        tiny_models.classifier(found / label, (label, "bad"))
    return found


def options(name: str, folder: Path) -> dict[str, Any]:
    """What a scorer needs to be built here."""
    if name in (*KNOWN_HEADS, "head"):
        known = "chad" if name == "head" else name
        place = folder / f"clip{tiny_models.n_features(known)}"
        return {"weights": str(folder / f"{known}.pth"), "tower": str(place)}
    if name in (*KNOWN_CLASSIFIERS, "classifier"):
        label = KNOWN_CLASSIFIERS.get(name, "good")
        return {"model": str(folder / label), "label": label}
    if name == "process":
        judge = "import json, sys\nfor line in sys.stdin: print(line[:-2] + ', \"score\": 1.5}')"
        return {"command": ["python", "-c", judge]}
    if name in ("clipscore", "pickscore"):
        return {"tower": str(folder / "clip768")}
    return {}


@pytest.mark.parametrize("name", BUILT)
def test_scorer_gives_one_finite_number_for_each_sample_and_the_same_again(
    name: str, folder: Path
) -> None:
    judge = scorer.build(name, options(name, folder))
    scores = judge(samples())
    assert [type(score) for score in scores] == [float] * 3
    assert all(math.isfinite(score) for score in scores)
    assert judge(samples()) == scores
    assert judge([]) == []


@pytest.mark.parametrize("name", BUILT)
def test_score_of_a_sample_does_not_depend_on_its_company(name: str, folder: Path) -> None:
    judge = scorer.build(name, options(name, folder))
    alone = [judge([sample])[0] for sample in samples()]
    assert judge(samples()) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_scorer_says_what_it_is(name: str) -> None:
    about = getattr(scorer.get(name), "about")  # noqa: B009 - of a factory of any kind
    assert about.range
    assert about.sees in ("image", "image and prompt")


@pytest.mark.parametrize("name", OWN)
def test_scorer_refuses_unknown_options(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown option 'colour'"):
        scorer.check(name, {"colour": 1})


def test_exposure_is_best_at_its_target() -> None:
    grey = Sample(Image.new("RGB", (4, 4), (51, 51, 51)), Prompt(0, "p", "x", 0))
    assert scorer.build("exposure", {"target": 0.2})([grey]) == [1.0]
    assert scorer.build("exposure", {"target": 1.0})([grey]) == pytest.approx([0.2])


def test_contrast_is_0_for_a_flat_image_and_1_for_black_and_white() -> None:
    board = np.zeros((4, 4, 3), np.uint8)
    board[:2] = 255
    flat, sharp = Image.new("RGB", (4, 4), "grey"), Image.fromarray(board)
    prompt = Prompt(0, "p", "x", 0)
    assert scorer.build("contrast", {})([Sample(flat, prompt), Sample(sharp, prompt)]) == [
        0.0,
        1.0,
    ]
