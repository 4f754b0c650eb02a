"""Scorers of other packages. Where these are not installed only how that is told is tried."""

from __future__ import annotations

import importlib
import math
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tiny_models
from PIL import Image

from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import extras, scorer

with_imscore = pytest.mark.skipif(not find_spec("imscore"), reason="imscore is not installed")
with_pyiqa = pytest.mark.skipif(not find_spec("pyiqa"), reason="pyiqa is not installed")
SIZES = [(64, 64), (64, 64), (80, 64), (64, 64), (64, 64)]


def samples() -> list[Sample]:
    draw = np.random.default_rng(0)
    images = [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]
    return [Sample(image, Prompt(i, "p", f"cat {i}", i)) for i, image in enumerate(images)]


@pytest.mark.skipif(bool(find_spec("imscore")), reason="imscore is installed")
def test_package_that_is_not_there_is_told() -> None:
    with pytest.raises(
        ConfigError, match=r'imscore needs the package imscore, .* pip install (-e "\.\[)?imscore'
    ):
        scorer.build("imscore", {"model": "mps"})


@pytest.mark.skipif(bool(find_spec("pyiqa")), reason="pyiqa is installed")
def test_other_package_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="pyiqa needs the package pyiqa"):
        scorer.build("pyiqa", {"metric": "piqe"})


def test_unknown_model_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="'hpsv21', 'mps', 'imagereward'"):
        scorer.build("imscore", {"model": "hps"})
    assert set(get_args(extras.Reward)) == extras.REWARDS.keys()


def test_batches_are_of_images_of_one_size_and_in_order() -> None:
    found = extras._alike(samples(), 2)
    assert [[s.prompt.index for s in some] for some in found] == [[0, 1], [2], [3, 4]]
    assert extras._pixels(found[0]).shape == (2, 3, 64, 64)


@with_imscore
@pytest.mark.parametrize("model", extras.REWARDS)
def test_models_of_imscore_are_where_the_table_says(model: str) -> None:
    row = extras.REWARDS[model]
    module = importlib.import_module(f"imscore.{row.module}.model")
    assert hasattr(getattr(module, row.kind), "from_pretrained")


@with_imscore
def test_score_is_that_of_imscore(tmp_path: Path) -> None:
    from imscore.preference.model import CLIPPreferenceScorer

    bare = CLIPPreferenceScorer(str(tiny_models.clip(tmp_path / "clip")))
    bare.save_pretrained(tmp_path / "reward", config={"tag": str(tmp_path / "clip")})
    options = {"model": "pickscore-clip", "repository": str(tmp_path / "reward"), "device": "cpu"}
    scores = scorer.build("imscore", options)(samples())
    for sample, score in zip(samples(), scores, strict=True):
        expected = bare.score(extras._pixels([sample]), [sample.prompt.prompt])
        assert score == pytest.approx(float(expected), abs=1e-4)


@with_pyiqa
def test_score_is_that_of_pyiqa_and_more_is_better() -> None:
    import pyiqa

    scores = scorer.build("pyiqa", {"metric": "piqe", "device": "cpu"})(samples())
    bare = pyiqa.create_metric("piqe", device="cpu")
    for sample, score in zip(samples(), scores, strict=True):
        assert score == pytest.approx(-float(bare(extras._pixels([sample]))), rel=1e-4)
    entropies = scorer.build("pyiqa", {"metric": "entropy", "device": "cpu"})(samples())
    assert all(math.isfinite(e) and e > 0 for e in entropies)
    with pytest.raises(ConfigError, match="no measure 'ssim' that needs no reference"):
        scorer.build("pyiqa", {"metric": "ssim"})
