from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import HEADS, head_file, n_features

from bayesian_merger.checkpoint import sha256_of
from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import DifferentiableScorer, heads, scorer
from bayesian_merger.towers import tower

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("towers")
    return {n: tiny_models.clip(folder / str(n), n) for n in (24, 512, 768, 1152)}


def pictures(n: int = 3) -> list[Sample]:
    draw = np.random.default_rng(0)
    images = [
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(n)
    ]
    return [Sample(image, Prompt(i, "p", "a red circle", i)) for i, image in enumerate(images)]


def by_hand(name: str, features: np.ndarray, state: dict[str, np.ndarray]) -> list[float]:
    """The forward of a head in NumPy: layers in the order of HEADS, the table's activations."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    places = list(HEADS[name])
    for place in places:
        prefix = f"{place}." if place else ""
        weight, bias = state[f"{prefix}weight"], state[f"{prefix}bias"]
        if weight.ndim == 1:
            spread = np.sqrt(state[f"{prefix}running_var"] + 1e-5)
            x = (x - state[f"{prefix}running_mean"]) / spread * weight + bias
            continue
        x = x @ weight.T + bias
        if place != places[-1] and name in ("ava_logos_relu", "aes", "waifu_v3"):
            x = np.maximum(x, 0)
    return list(1 / (1 + np.exp(-x[:, 0])) if name == "aes" else x[:, 0])


def test_every_row_of_the_table_is_covered() -> None:
    assert {row.name for row in heads.ROWS} == HEADS.keys()


@pytest.mark.parametrize("name", HEADS)
def test_head_of_the_true_shapes_gives_what_a_hand_computes(
    name: str, towers: dict[int, Path], tmp_path: Path
) -> None:
    state = head_file(tmp_path / "head.pth", HEADS[name])
    place = towers[n_features(name)]
    judge = scorer.build(
        name, {"weights": str(tmp_path / "head.pth"), "tower": str(place), "device": "cpu"}
    )
    features = tower(place, CPU, "fp32").of_images([s.image for s in pictures()])
    expected = by_hand(name, features.double().numpy(), state)
    assert judge(pictures()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_score_has_a_gradient_and_is_the_same_with_it(
    name: str, towers: dict[int, Path], tmp_path: Path
) -> None:
    head_file(tmp_path / "head.pth", HEADS[name])
    place = towers[n_features(name)]
    judge = scorer.build(name, {"weights": str(tmp_path / "head.pth"), "tower": str(place)})
    assert isinstance(judge, DifferentiableScorer)
    images = np.stack([np.array(sample.image) for sample in pictures()])
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255).requires_grad_()
    scores = judge.differentiable(pixels, [s.prompt.prompt for s in pictures()])
    assert scores.tolist() == pytest.approx(judge(pictures()), abs=1e-2)  # rounded to bytes
    scores.sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    assert bool(pixels.grad.any())


def test_scorers_on_one_model_share_it(towers: dict[int, Path], tmp_path: Path) -> None:
    head_file(tmp_path / "one.pth", HEADS["chad"])
    head_file(tmp_path / "two.pth", HEADS["laion_v1"])
    judges = [
        scorer.build(name, {"weights": str(tmp_path / file), "tower": str(towers[768])})
        for name, file in (("chad", "one.pth"), ("laion_v1", "two.pth"))
    ]
    assert judges[0]._tower is judges[1]._tower


def test_head_takes_batch_norms_and_another_output(
    towers: dict[int, Path], tmp_path: Path
) -> None:
    state = {
        "0.weight": torch.full((2, 24), 0.5),
        "0.bias": torch.tensor([1.0, -1.0]),
        "2.weight": torch.tensor([2.0, 3.0]),
        "2.bias": torch.tensor([0.0, 1.0]),
        "2.running_mean": torch.tensor([0.5, 0.5]),
        "2.running_var": torch.ones(2),
        "2.num_batches_tracked": torch.tensor(7),
        "10.weight": torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
        "10.bias": torch.tensor([0.0, 0.25]),
    }
    save_file(state, tmp_path / "head.safetensors")
    options = {
        "weights": str(tmp_path / "head.safetensors"),
        "tower": str(towers[24]),
        "activation": "relu",
        "normalised": False,
        "output": 1,
    }
    features = tower(towers[24], CPU, "fp32").of_images([pictures()[0].image])[0]
    half = 0.5 * float(features.sum())
    hidden = [max(half + 1, 0), max(half - 1, 0)]
    normed = [2 * (hidden[0] - 0.5), 3 * (hidden[1] - 0.5) + 1]
    [score] = scorer.build("head", options)(pictures(1))
    assert score == pytest.approx(sum(normed) + 0.25, abs=1e-3)
    with pytest.raises(ConfigError, match="output 2, but the file has 2 outputs, 0 to 1"):
        scorer.build("head", {**options, "output": 2})


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({"a.weight": torch.ones(2, 3, 3, 3)}, r"a\.weight \(2, 3, 3, 3\) are no linear layer"),
        ({"a.weight": torch.ones(2, 24), "b.weight": torch.ones(1, 3)}, "b takes 3 .* gets 2"),
        (
            {"a.weight": torch.ones(1, 24), "a.odd": torch.ones(1)},
            r"a\.odd \(1,\), a\.weight .* are no plain layer",
        ),
        ({"a.weight": torch.ones(1, 25)}, "takes 25 features, but .* gives 24"),
    ],
)
def test_file_that_is_no_head_is_one_line(
    state: dict[str, torch.Tensor], fault: str, towers: dict[int, Path], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(ConfigError, match=f"head.safetensors.*{fault}") as caught:
        scorer.build(
            "head", {"weights": str(tmp_path / "head.safetensors"), "tower": str(towers[24])}
        )
    assert "\n" not in str(caught.value)


def test_head_is_never_unpickled(towers: dict[int, Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    torch.save({"weight": Evil()}, tmp_path / "head.pth")
    with pytest.raises(ConfigError, match="only plain tensors are read"):
        scorer.build("head", {"weights": str(tmp_path / "head.pth"), "tower": str(towers[24])})


def test_missing_file_says_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(ConfigError) as caught:
        scorer.build("chad", {})
    place = tmp_path / "bayesian-merger" / "scorers" / "sac+logos+ava1-l14-linearMSE.pth"
    tower, head = str(caught.value).splitlines()
    assert tower.startswith("openai/clip-vit-large-patch14 is not here, and cannot")
    assert tower.endswith("name that by scorers.chad.tower")
    assert head.startswith("sac+logos+ava1-l14-linearMSE.pth is not here, and cannot")
    assert head.endswith(f"put it at {place}, or name it by scorers.chad.weights")
    with pytest.raises(ConfigError, match=r"scorers\.chad\.device: 'gpu'"):
        scorer.build("chad", {"device": "gpu"})
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with pytest.raises(ConfigError, match=rf"SHA-256 {sha256_of(place)[:12]}.* delete it"):
        scorer.build("chad", {})
