"""Runs made up by hand: what the plots and the report are tested on."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from bayesian_merger.blocks import SD1
from bayesian_merger.data import (
    Estimate,
    Interval,
    Model,
    Outcome,
    Prompt,
    Recipe,
    Result,
    Slopes,
    State,
    Weights,
)

BLOCKS = SD1.blocks


def a_recipe(weights: Weights | None = None, method: str = "weighted_sum") -> Recipe:
    """A recipe of two models; every weight is 0.5 unless given."""
    return Recipe(
        method=method,
        architecture="sd1",
        models=(Model("shapes.safetensors", "a" * 64), Model("colours.safetensors", "b" * 64)),
        weights=weights or {"alpha": dict.fromkeys(BLOCKS, 0.5)},
    )


def a_result(
    name: str,
    stage: str = "exploit",
    value: float | None = None,
    *,
    state: State | None = None,
    reason: str = "",
    weights: Weights | None = None,
    number: int = 0,
) -> Result:
    """A result over 16 images with a standard error of 0.2, or a failed one without a value."""
    return Result(
        stage=stage,
        name=name,
        number=number,
        state=state or ("failed" if value is None else "complete"),
        recipe=a_recipe(weights),
        scores={},
        value=None if value is None else Estimate(value, 0.2, 16),
        reason=reason,
        seconds={"merge": 0.1, "generate": 1.5, "score": 0.2},
    )


def baselines() -> tuple[Result, ...]:
    """A 7.31, the even merge 7.91, B 7.18."""
    return (
        a_result("a", "baseline", 7.31, number=0),
        a_result("even", "baseline", 7.91, number=1),
        a_result("b", "baseline", 7.18, number=2),
    )


def searched(n_trials: int) -> tuple[Result, ...]:
    """Trials that get better: ten of exploration, then exploitation; each 13th fails."""
    chance = random.Random(1)
    results = []
    for n in range(1, n_trials + 1):
        stage = "explore" if n <= 10 else "exploit"
        weights = {"alpha": {block: round(chance.random(), 4) for block in BLOCKS}}
        value = 7.2 + 2.0 * (1 - math.exp(-n / 18)) + chance.gauss(0, 0.35 if n > 10 else 0.6)
        if n % 13 == 0:
            reason = "the back end ran out of memory (asked for 512 MB, 310 MB were free)"
            results.append(a_result(f"trial {n}", stage, reason=reason, number=n + 2))
        else:
            results.append(a_result(f"trial {n}", stage, value, weights=weights, number=n + 2))
    return tuple(results)


def followed(n_trials: int = 5) -> tuple[Result, ...]:
    """The baselines and trials of a search by the gradient; IN00 rises, a group of two falls."""
    names = ("IN00_alpha", "OUT10_alpha-OUT11_alpha", "base_alpha")
    results = []
    for n in range(n_trials):
        weights = {**dict.fromkeys(BLOCKS, 0.5), "IN00": 0.5 + n / 10, "OUT10": 0.5 - n / 10}
        pieces = tuple(
            Slopes((2 * k, 2 * k + 1), dict(zip(names, (2.0 + k, -1.0, 0.1 * k), strict=True)))
            for k in range(2)
        )
        stage = "exploit" if n else "explore"
        result = a_result(f"trial {n + 1}", stage, 7.9 + n / 10, weights={"alpha": weights})
        results.append(result.but(slopes=pieces))
    return (*baselines(), *results)


def a_panel(n_images: int, seed: int = 1000) -> tuple[Prompt, ...]:
    """Prompts of 64x64 images."""
    things = ("purple plus on grey", "blue square on teal", "striped red circle on white")
    return tuple(
        Prompt(i, "things", f"a {things[i % 3]}", seed + i, width=64, height=64)
        for i in range(n_images)
    )


def pictures(folder: Path, names: tuple[str, ...], n_images: int) -> dict[str, dict[int, Path]]:
    """A 64x64 PNG for each name and place in the panel."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, Path]] = {}
    for k, name in enumerate(names):
        found[name] = {}
        for i in range(n_images):
            image = Image.new("RGB", (64, 64), (40 * k, 120, 20 * i % 256))
            ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(250, 200, 20 * k))
            found[name][i] = folder / f"{name}-{i}.png"
            image.save(found[name][i])
    return found


def an_outcome(folder: Path, n_trials: int = 20, n_images: int = 4, **changes: Any) -> Outcome:
    """A finished run; its pictures are written to `folder`."""
    trials = searched(n_trials)
    complete = sorted((r for r in trials if r.value), key=_mean, reverse=True)
    selected = tuple(
        r.but(stage="select", number=k, value=Estimate(_mean(r) - 0.2 * k - 0.1, 0.15, 24))
        for k, r in enumerate(complete[:3])
    )
    fields: dict[str, Any] = {
        "title": "demo",
        "blocks": BLOCKS,
        "models": ("shapes.safetensors", "colours.safetensors"),
        "config": {
            "models": {"a": "/home/someone/models/shapes.safetensors"},
            "search": {"optimiser": "bayes", "init_points": 10},
            "scorers": {"demo": {"weight": 1.0}},
        },
        "panel": a_panel(16, seed=1),
        "heldout_panel": a_panel(n_images),
        "results": (*baselines(), *trials),
        "trials": max(n_trials, 40),
        "candidates": tuple(complete[:3]),
        "selected": selected,
        "leader": a_result("recommended", value=9.0),
        "expected": {n: Estimate(9.0 - 3 / n, 0.6 / n**0.5, n) for n in range(10, n_trials + 1)},
        "best": selected[0],
        "heldout": {
            "a": Estimate(7.29, 0.11, 64),
            "b": Estimate(7.11, 0.12, 64),
            "best": Estimate(8.88, 0.09, 64),
            "even": Estimate(7.95, 0.10, 64),
        },
        "gain": {
            "over_a": Interval(1.59, 1.31, 1.87),
            "over_b": Interval(1.77, 1.48, 2.06),
            "over_even": Interval(0.93, 0.70, 1.16),
        },
        "pictures": pictures(folder, ("a", "b", "even", "best"), n_images),
        "images": 16 * (n_trials + 3) + 3 * 24 + 4 * 64,
        "seconds": {"ask": 11.2, "merge": 3.4, "generate": 71.5, "score": 4.1},
        "finished": True,
    }
    return Outcome(**{**fields, **changes})


def an_unfinished_outcome(folder: Path, n_trials: int = 7, **changes: Any) -> Outcome:
    """A run in its search: baselines judged, no best, no held-out images."""
    unknown: dict[str, Any] = {
        "best": None,
        "selected": (),
        "heldout": {},
        "gain": {},
        "pictures": pictures(folder, ("a", "b", "even"), 4),
        "finished": False,
    }
    return an_outcome(folder, n_trials, **{**unknown, **changes})


def _mean(result: Result) -> float:
    assert result.value is not None
    return result.value.mean
