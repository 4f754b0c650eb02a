from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from test_cli import Command
from test_cli import command as command

from bayesian_merger import taste
from bayesian_merger.data import Prompt, Sample
from bayesian_merger.desk import JOURNAL
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import scorer
from bayesian_merger.taste import Pair, Ratings
from bayesian_merger.towers import tower


def rated(n: int, d: int = 40, noise: float = 0.5, seed: int = 0) -> tuple[Ratings, np.ndarray]:
    """Pictures of random features, marked by one direction of them, five of a prompt and seed."""
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(n, d))
    truth = x[:, 0] - 0.5 * x[:, 1]
    marks = np.clip(np.round(5 + 2 * (truth + noise * chance.normal(size=n))), 0, 10)
    found = Ratings([Path(str(i)) for i in range(n)], [str(i // 5) for i in range(n)])
    found.marks = {i: float(mark) for i, mark in enumerate(marks)}
    return found, x


def test_marks_are_learnt_and_predicted_for_pictures_never_seen() -> None:
    ratings, x = rated(300)
    found = taste.learn(ratings, x)
    assert found.rank_correlation is not None
    assert found.rank_correlation > 0.7
    _, fresh = rated(200, noise=0.0, seed=1)
    marks = fresh @ found.weight + found.bias
    truth = 5 + 2 * (fresh[:, 0] - 0.5 * fresh[:, 1])
    assert np.corrcoef(marks, truth)[0, 1] > 0.9
    assert float(np.mean(marks)) == pytest.approx(5, abs=0.5)


def test_correlation_of_no_taste_is_told_to_be_none() -> None:
    """What is fitted to noise correlates with it; left-out prompts show that it is worth nothing."""
    ratings, x = rated(120)
    chance = np.random.default_rng(3)
    ratings.marks = {i: float(chance.integers(0, 11)) for i in ratings.marks}
    found = taste.learn(ratings, x)
    assert found.rank_correlation is not None
    assert abs(found.rank_correlation) < 0.3


def test_choices_are_learnt() -> None:
    ratings, x = rated(200, noise=0.0)
    ratings.marks = {}
    truth = x[:, 0] - 0.5 * x[:, 1]
    chance = np.random.default_rng(5)
    for group in range(40):
        for _ in range(5):
            one, two = chance.choice(5, 2, replace=False) + 5 * group
            ratings.pairs.append(Pair(int(one), int(two), float(truth[one] > truth[two])))
    found = taste.learn(ratings, x)
    assert found.agreement is not None
    assert found.agreement > 0.85
    assert found.rank_correlation is None
    assert np.corrcoef(x @ found.weight, truth)[0, 1] > 0.8


def test_marks_and_choices_add_up() -> None:
    ratings, x = rated(60)
    alone = taste.learn(ratings, x)
    truth = x[:, 0] - 0.5 * x[:, 1]
    ratings.pairs = [
        Pair(5 * g + i, 5 * g + j, float(truth[5 * g + i] > truth[5 * g + j]))
        for g in range(12)
        for i in range(5)
        for j in range(i)
    ]
    both = taste.learn(ratings, x)
    _, fresh = rated(300, noise=0.0, seed=1)
    wanted = fresh[:, 0] - 0.5 * fresh[:, 1]
    rank = [np.corrcoef(fresh @ t.weight, wanted)[0, 1] for t in (alone, both)]
    assert rank[1] > rank[0]


def journal(folder: Path, n: int = 40) -> None:
    """A run folder whose pictures somebody has marked by how bright they are."""
    (folder / "rated").mkdir(parents=True)
    chance = np.random.default_rng(0)
    lines = []
    for i in range(n):
        level = int(chance.integers(0, 11))
        coarse = chance.integers(0, 60, (4, 4, 3)) + 19 * level
        picture = Image.fromarray(coarse.astype(np.uint8)).resize((32, 32))
        picture.save(folder / "rated" / f"{i}.png")
        told = {
            "answer": level,
            "pictures": [f"{i}.png"],
            "prompt": f"cat {i // 2}",
            "seed": i // 2,
        }
        lines.append(json.dumps({"key": str(i), **told}))
    (folder / JOURNAL).write_text("\n".join(lines) + "\n")


def test_scorer_is_trained_and_used_at_once(tmp_path: Path, command: Command) -> None:
    journal(tmp_path / "run", 60)
    clip = tiny_models.clip(tmp_path / "clip")
    file = tmp_path / "taste.safetensors"
    code, told, _ = command(
        "train-scorer", str(tmp_path / "run"), "-o", str(file), "--tower", str(clip)
    )
    assert code == 0
    assert "60 marks" in told
    correlation = float(told.split("rank correlation ")[1].split()[0].rstrip(",;"))
    assert correlation > 0.5
    assert "[scorers.taste]" in told
    judge = scorer.build("head", {"weights": str(file), "tower": str(clip)})
    pictures = [Image.new("RGB", (32, 32), (g, g, g)) for g in (30, 120, 230)]
    scores = judge([Sample(p, Prompt(i, "p", "cat", i)) for i, p in enumerate(pictures)])
    assert scores == sorted(scores)
    features = tower(clip, torch.device("cpu"), "fp32").of_images(pictures)
    assert features.shape[1] == 24
    with pytest.raises(ConfigError, match="was learnt on a model in a folder called 'clip'; name"):
        scorer.build("head", {"weights": str(file)})
    again = ("train-scorer", str(tmp_path / "run"), "-o", str(file), "--tower", str(clip))
    code, _, said = command(*again)
    assert code == 2
    assert "exists; choose another name or give --overwrite" in said
    assert command(*again, "--overwrite")[0] == 0
    lost = tmp_path / "nowhere" / "taste.safetensors"
    code, _, said = command("train-scorer", str(tmp_path / "run"), "-o", str(lost))
    assert code == 2
    assert f"the folder {lost.parent} does not exist" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / JOURNAL).unlink(), "no such file; rate the pictures"),
        (lambda run: (run / JOURNAL).write_text("{\n7\n"), "0 ratings, which are too few"),
        (lambda run: [p.unlink() for p in (run / "rated").glob("*.png")], "0 ratings"),
    ],
)
def test_ratings_that_are_none_are_told(tmp_path: Path, spoil: object, said: str) -> None:
    journal(tmp_path)
    assert callable(spoil)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=said):
        taste.read([tmp_path])


def test_journal_reads_no_pictures_elsewhere(tmp_path: Path) -> None:
    journal(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    text = (tmp_path / JOURNAL).read_text().replace('"0.png"', '"../secret.png"')
    (tmp_path / JOURNAL).write_text(text)
    found = taste.read([tmp_path])
    assert len(found.pictures) == 39
    assert all(path.parent.name == "rated" for path in found.pictures)


def test_answers_that_were_undone_do_not_count(tmp_path: Path) -> None:
    journal(tmp_path)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(json.dumps({"key": "3", "undone": True}) + "\n")
    assert taste.read([tmp_path]).n == 39
