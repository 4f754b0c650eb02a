"""Every number of a report, worked out anew from what the study's file holds."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import statistics
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from scipy.stats import t as student
from test_report import Page
from test_run import folder as folder
from test_run import start

from bayesian_merger import report

MODELS = {"a": "A", "b": "B", "even": "even", "best": "best"}


def stored(path: Path) -> Iterator[dict[str, Any]]:
    """What the database holds of each trial, without any code of ours or of Optuna."""
    with closing(sqlite3.connect(path)) as base:
        rows = base.execute(
            "SELECT s.study_name, t.trial_id, t.state, a.key, a.value_json FROM trials t "
            "JOIN studies s ON s.study_id = t.study_id "
            "JOIN trial_user_attributes a ON a.trial_id = t.trial_id ORDER BY t.trial_id"
        ).fetchall()
    trials: dict[int, dict[str, Any]] = {}
    for study, number, state, key, value in rows:
        trial = trials.setdefault(number, {"study": study, "state": state, "scores": {}})
        if key.startswith("score:"):
            trial["scores"][int(key.partition(":")[2])] = json.loads(value)["scores"]["likeness"]
        else:
            trial[key] = json.loads(value)
    yield from trials.values()


def about(path: Path, key: str) -> Any:
    with closing(sqlite3.connect(path)) as base:
        (value,) = base.execute(
            "SELECT value_json FROM study_user_attributes WHERE key = ?", (key,)
        ).fetchone()
    return json.loads(value)


def mean_and_se(scores: list[float]) -> tuple[str, str]:
    return (
        f"{statistics.mean(scores):.3f}".replace("-", "−"),
        f"{statistics.stdev(scores) / math.sqrt(len(scores)):.3f}",
    )


def interval(one: list[float], other: list[float]) -> tuple[str, str, str]:
    """The mean paired difference and the ends of its 95 % t interval."""
    pairs = [x - y for x, y in zip(one, other, strict=True)]
    se = statistics.stdev(pairs) / math.sqrt(len(pairs))
    reach = student.ppf(0.975, len(pairs) - 1) * se
    mean = statistics.mean(pairs)
    return tuple(f"{x:+.3f}".replace("-", "−") for x in (mean, mean - reach, mean + reach))  # type: ignore[return-value]


def rows(html: str, section: str) -> list[list[str]]:
    """The cells of the rows of the tables in a section."""
    (part,) = re.findall(rf'<section id="{section}".*?</section>', html, re.DOTALL)
    return [
        [
            " ".join(re.sub(r"<[^>]*>", " ", cell).split())
            for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)
    ]


def test_every_number_of_the_page_is_that_of_the_study(folder: Path) -> None:
    start(folder, report=True)
    html = (folder / "run" / "report.html").read_text(encoding="utf-8")
    trials = list(stored(folder / "run" / "study.db"))
    heldout = {t["name"]: t for t in trials if t.get("stage") == "heldout"}
    (best,) = set(heldout) - {"a", "b", "even"}
    scores = {
        key: list(heldout[best if key == "best" else key]["scores"].values()) for key in MODELS
    }

    # Held-out means with their errors, best first.
    ranked = sorted(MODELS, key=lambda key: -statistics.mean(scores[key]))
    table = rows(html, "heldout")
    assert table[1:5] == [
        [MODELS[key], *mean_and_se(scores[key]), str(len(scores[key]))] for key in ranked
    ]
    # The candidates, by what the search expected and what they had on fresh seeds.
    expected = {
        one["name"]: one["value"]
        for one in about(folder / "run" / "study.db", "candidates")["few"]
    }
    fresh = {t["name"]: list(t["scores"].values()) for t in trials if t.get("stage") == "select"}
    told = sorted(
        [
            f"{name} chosen" if name == best else name,
            "{} ± {}".format(
                *(f"{expected[name][k]:.3f}".replace("-", "−") for k in ("mean", "se"))
            ),
            "{} ± {}".format(*mean_and_se(own)),
        ]
        for name, own in fresh.items()
    )
    assert sorted(table[6:]) == told
    assert len(told) > 1

    # The gains, of which the smallest is in the headline.
    gains = {key: interval(scores["best"], scores[key]) for key in ("a", "b", "even")}
    page = Page(html)
    for key, (mean, low, high) in gains.items():
        assert f"over {MODELS[key]} {mean} {low} to {high}" in page.text
    mean, low, high = gains["even"]
    assert f": {mean} over the even merge (95 % interval {low} to {high})." in page.text

    # Time and images.
    judged = [t for t in trials if "stage" in t and "name" in t]
    seconds: dict[str, float] = {}
    for trial in judged:
        for phase, spent in trial.get("seconds", {}).items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    total = sum(seconds.values())
    n_images = sum(len(t["scores"]) for t in judged)
    assert f"{n_images} images, {report.duration(total)}." in page.text
    assert {row[0]: row[1:3] for row in rows(html, "cost")[1:]} == {
        phase: [report.duration(spent), f"{round(100 * spent / total, 1)} %"]
        for phase, spent in seconds.items()
    }

    # What is left are weights, seeds, names and explanations.
    weights = heldout[best]["recipe"]["weights"]["alpha"]
    assert ",".join(f"{w:.6g}" for w in weights.values()) in page.text
    panel = about(folder / "run" / "study.db", "about")["heldout_panel"]
    explained = {"0", "1", "2", "12", "24", "26", "95", "00", "11"}
    known = {number for row in (*table, *rows(html, "cost")) for c in row for number in numbers(c)}
    known |= {number for gain in gains.values() for one in gain for number in numbers(one)}
    known |= (
        {str(prompt["seed"]) for prompt in panel} | {str(n_images), str(len(panel))} | explained
    )
    known |= set(numbers(report.duration(total))) | {
        str(sum(t["study"] == "search" and "name" in t for t in trials))
    }
    before_weights = page.text.partition("base, then the blocks")[0]
    assert set(numbers(before_weights)) <= known


def numbers(text: str) -> list[str]:
    """The numbers in a text, without their signs."""
    return re.findall(r"\d+(?:\.\d+)?", text)
