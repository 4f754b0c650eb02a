from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import DifferentiableScorer, classifiers, scorer
from bayesian_merger.towers import Preprocessing, ready


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.classifier(tmp_path_factory.mktemp("classifier"))


def samples(n: int = 20) -> list[Sample]:
    draw = np.random.default_rng(0)
    images = [
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)
    ]
    return [Sample(image, Prompt(i, "p", "a cat", i)) for i, image in enumerate(images)]


def logits(model: Path) -> Any:
    from transformers import BeitForImageClassification

    bare = BeitForImageClassification.from_pretrained(model).eval()
    images = [sample.image for sample in samples()]
    with torch.no_grad():
        return bare(ready(images, Preprocessing.read(model), torch.device("cpu"))).logits


def test_score_is_the_probability_of_the_wanted_label_and_not_of_the_top_one(model: Path) -> None:
    chances = logits(model).softmax(1)
    found = [
        scorer.build("classifier", {"model": str(model), "label": label, "device": "cpu"})(
            samples()
        )
        for label in ("aesthetic", "not_aesthetic")
    ]
    assert found[0] == pytest.approx(chances[:, 0].tolist(), abs=1e-5)
    assert [a + b for a, b in zip(*found, strict=True)] == pytest.approx([1.0] * 20)


def test_labels_that_do_not_exclude_each_other_have_their_own_probabilities(
    tmp_path: Path,
) -> None:
    model = tiny_models.classifier(tmp_path / "c", ("cute", "dark", "tall"))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(
        config.replace("{", '{"problem_type": "multi_label_classification",', 1)
    )
    judge = scorer.build("classifier", {"model": str(model), "label": "dark"})
    assert judge(samples()) == pytest.approx(logits(model).sigmoid()[:, 1].tolist(), abs=1e-5)


@pytest.mark.parametrize("row", classifiers.ROWS, ids=lambda row: row.name)
def test_rows_want_the_good_label(row: classifiers.Row, tmp_path: Path) -> None:
    model = tiny_models.classifier(tmp_path / "c", ("bad", row.label))
    judge = scorer.build(row.name, {"model": str(model)})
    assert judge(samples()) == pytest.approx(logits(model).softmax(1)[:, 1].tolist(), abs=1e-5)


def test_unknown_label_is_told_with_those_that_there_are(model: Path) -> None:
    with pytest.raises(ConfigError, match="no label 'asthetic'; did you mean 'aesthetic'"):
        scorer.build("classifier", {"model": str(model), "label": "asthetic"})


def test_classifier_without_a_model_is_told() -> None:
    with pytest.raises(ConfigError, match="name a repository of the hub, or a folder as model"):
        scorer.build("classifier", {"label": "good"})


@pytest.mark.parametrize(
    ("repository", "fault"),
    [
        ("nobody", "'nobody' is no repository; write it as 'owner/name@revision'"),
        ("owner/name@main", "names no revision, and a repository may change"),
        ("../x/y@" + "0" * 40, "is no repository"),
    ],
)
def test_repository_must_be_pinned(repository: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        scorer.build("classifier", {"repository": repository, "label": "good"})


def test_score_has_a_gradient_and_is_the_same_with_it(model: Path) -> None:
    judge = scorer.build("classifier", {"model": str(model), "label": "aesthetic"})
    assert isinstance(judge, DifferentiableScorer)
    images = np.stack([np.array(sample.image) for sample in samples(3)])
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255).requires_grad_()
    scores = judge.differentiable(pixels, ["a cat"] * 3)
    assert scores.tolist() == pytest.approx(judge(samples(3)), abs=1e-5)
    scores.sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    assert bool(pixels.grad.any())
