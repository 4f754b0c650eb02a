from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import DifferentiableScorer, plain_words, scorer
from bayesian_merger.towers import Preprocessing, ready


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.clip(tmp_path_factory.mktemp("clip"))


def samples(*prompts: str) -> list[Sample]:
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in prompts]
    return [
        Sample(image, Prompt(i, "p", text, i))
        for i, (image, text) in enumerate(zip(images, prompts, strict=True))
    ]


@pytest.mark.parametrize("name", ["clipscore", "pickscore"])
def test_score_is_the_models_own_of_picture_and_prompt(name: str, clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    some = samples("a red circle", "two dogs on a beach, sunset")
    model = CLIPModel.from_pretrained(clip)
    words = CLIPTokenizer.from_pretrained(clip)(
        [s.prompt.prompt for s in some], padding=True, return_tensors="pt"
    )
    pixels = ready([s.image for s in some], Preprocessing.read(clip), torch.device("cpu"))
    with torch.no_grad():
        logits = model(pixel_values=pixels, **words).logits_per_image.diagonal()
        factor = 1.0 if name == "pickscore" else 100 / model.logit_scale.exp()
    judge = scorer.build(name, {"tower": str(clip), "device": "cpu"})
    assert judge(some) == pytest.approx((logits * factor).tolist(), abs=1e-3)


def test_score_is_that_of_the_prompt_without_the_marks_of_webuis(clip: Path) -> None:
    judge = scorer.build("clipscore", {"tower": str(clip)})
    one, other, another = samples("(a red:1.3) circle <lora:x:0.7>", "a red circle", "a cat")
    same = [Sample(one.image, s.prompt) for s in (one, other, another)]
    scores = judge(same)
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat", "a cat"),
        ("(masterpiece:1.2), ((a cat)), [blurry]", "masterpiece, a cat, blurry"),
        ("a cat <lora:fluffy_v2:0.8>, <hypernet:x:1>", "a cat"),
        (r"a \(red\) cat", "a (red) cat"),
        ("a cat BREAK on a mat AND a dog", "a cat on a mat a dog"),
        ("at 10:30, ratio 16:9", "at 10:30, ratio 16:9"),
        ("BRAND ANDROID", "BRAND ANDROID"),
        ("", ""),
    ],
)
def test_plain_words(prompt: str, words: str) -> None:
    assert plain_words(prompt) == words


def test_score_has_a_gradient_and_is_the_same_with_it(clip: Path) -> None:
    judge = scorer.build("pickscore", {"tower": str(clip)})
    assert isinstance(judge, DifferentiableScorer)
    some = samples("a red circle", "a cat")
    images = np.stack([np.array(s.image) for s in some])
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255).requires_grad_()
    scores = judge.differentiable(pixels, [s.prompt.prompt for s in some])
    assert scores.tolist() == pytest.approx(judge(some), abs=1e-4)
    scores.sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    assert bool(pixels.grad.any())
    assert judge([]) == []


@pytest.mark.parametrize("name", ["clipscore", "pickscore"])
def test_model_without_a_tokenizer_is_refused(name: str, clip: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for kept in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (bare / kept).write_bytes((clip / kept).read_bytes())
    with pytest.raises(ConfigError, match=r"bare: .*tokenizer"):
        scorer.build(name, {"tower": str(bare), "device": "cpu"})


def test_folder_that_is_not_there_is_told_before_anything_is_asked_for(tmp_path: Path) -> None:
    where = tmp_path / "nope"
    with pytest.raises(ConfigError, match=r"scorers.clipscore.tower: .*nope: no such file"):
        scorer.build("clipscore", {"tower": str(where)})
    with pytest.raises(ConfigError, match=r"scorers.chad.weights: .*nope: no such file"):
        scorer.build("chad", {"weights": str(where)})
    with pytest.raises(ConfigError, match=r"scorers.cafe_style.model: .*nope: no such file"):
        scorer.build("cafe_style", {"model": str(where)})
