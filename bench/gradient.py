"""How good a merge is found in how many images and seconds: the gradient beside searches by values.

    python bench/gradient.py [--pairs embedded halves bad equals] [--seeds 10] [--results FILE]

runs the program's own searches on the embedded example and on the pairs of tools/make_pairs.py, and
judges what each would recommend after so many images (those of A, B and the even merge, which all
searches make, not counted) on the same fresh prompts and seeds. Adam follows the same slopes without a
model of them. A search by bayes, which explores less when it may spend less, is begun anew for each
number of images. Prints the mean score of the recommended merges with its standard error over the
searches, how far gradient is ahead of each search with the same seed, and what each needs until given
scores. What was measured is kept in --results, so that the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from demo import DEMO, judged

from bayesian_merger import config as configuration
from bayesian_merger import run
from bayesian_merger.backends import Differentiable
from bayesian_merger.data import Prompt, Recipe
from bayesian_merger.judging import Silence
from bayesian_merger.outcome import mean
from bayesian_merger.scorers import DifferentiableScorer
from bayesian_merger.setup import Setup, prepare
from bayesian_merger.study import Study
from bayesian_merger.study.proposals import FRESH, Proposer

RESULTS = Path(__file__).with_name("results") / "gradient.jsonl"
MARKS = (32, 64, 96, 128, 256, 512, 1024)
TITLES = {
    "embedded": "the demo",
    "halves": "each right about two kinds of words",
    "equals": "two of one kind",
    "bad": "a good one and a spoilt one",
}
# Of the way from the even merge to the best that is found.
SHARES = (0.5, 0.75, 0.9, 0.95, 1.0)
# How many images searches by each may spend, and its settings.
SEARCHES: Mapping[str, tuple[Sequence[int], Sequence[str]]] = {
    "gradient": ((256,), ()),
    "gradient, last 4": ((256,), ("search.options={last=4}",)),
    "gradient, last 2": ((256,), ("search.options={last=2}",)),
    "gradient, last 1": ((256,), ("search.options={last=1}",)),
    "adam": ((1024,), ()),
    "bayes": ((64, 128, 256, 512, 1024), ("search.optimiser=bayes",)),
    "tpe": ((1024,), ("search.optimiser=tpe",)),
    "tpe, best seen": ((1024,), ("search.optimiser=tpe",)),
    "random, best seen": ((1024,), ("search.optimiser=random",)),
}
# These recommend what has scored best, as they do elsewhere, and not what our process expects most of.
BEST_SEEN = ("tpe, best seen", "random, best seen")
# Of Adam: images of a step, its length, the decay of the two means, and the share of the steps, the last
# ones, whose mean is recommended.
N_EACH, RATE, DECAY, TAIL = 6, 0.15, (0.8, 0.95), 0.5


class Task(NamedTuple):
    """One search, which may spend so many images."""

    pair: str
    search: str
    seed: int
    images: int


class Point(NamedTuple):
    """The score of what is recommended after so many images and seconds."""

    images: int
    seconds: float
    score: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", nargs="+", default=["embedded", "halves", "bad", "equals"])
    parser.add_argument("--folder", type=Path, default=Path("runs/pairs"), help="of the pairs")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--seeds", type=int, default=10, help="0 prints only what was measured")
    parser.add_argument("--most", type=int, default=max(MARKS), help="images of a search")
    parser.add_argument("--marks", type=int, nargs="+", default=MARKS, help="where it is judged")
    parser.add_argument(
        "--images",
        type=int,
        default=192,
        help="fresh ones, to judge a merge, the same for all in a file of results",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="read, then added to")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    found = read(options.results)
    for seed, pair, search in product(range(options.seeds), options.pairs, options.searches):
        budgets = {min(n, options.most) for n in SEARCHES[search][0]}
        for task in [Task(pair, search, seed, n) for n in sorted(budgets)]:
            if task not in found:
                even = next(
                    (points[0].score for known, points in found.items() if known.pair == pair),
                    None,
                )
                at = marks(task, options.marks)
                points = searched(task, at, options.folder, options.images, even)
                found[task] = list(points)
                with options.results.open("a") as file:
                    file.write(json.dumps({"task": task, "points": found[task]}) + "\n")
                told = " ".join(f"{p.images}: {p.score:.3f}" for p in found[task])
                print(*task, told, flush=True)
    for pair in options.pairs:
        table(pair, found, options.searches)
        until(pair, found, options.searches)
    if len(options.pairs) > 1:
        overall(options.pairs, found, options.searches)
    if options.figure:
        draw(found, options.pairs, options.searches, options.figure)


def marks(task: Task, known: Sequence[int]) -> list[int]:
    """After how many images a search is judged; after all that it may spend, if others spend less."""
    if len(SEARCHES[task.search][0]) > 1:
        return [task.images]
    return [mark for mark in known if mark <= task.images]


def read(path: Path) -> dict[Task, list[Point]]:
    """What earlier runs have measured."""
    lines = path.read_text().splitlines() if path.exists() else ()
    entries = [json.loads(line) for line in lines]
    return {Task(*entry["task"]): [Point(*p) for p in entry["points"]] for entry in entries}


def searched(
    task: Task, at: Sequence[int], folder: Path, n_fresh: int, even: float | None
) -> Iterator[Point]:
    """One search, and the scores of what it recommends at each mark; first that of the even merge."""
    setup = setup_of(task, folder)
    judge = task._replace(search="bayes", seed=10_000)
    fresh = setup_of(judge, folder, f"heldout.images={n_fresh}", "backend.batch=48")
    with tempfile.TemporaryDirectory() as place:
        study = Study(Path(place) / "study.db")
        judging = 0.0
        yardstick = run.baselines(study, setup, Path(place), Silence())
        proposer = run.searching(study, setup, yardstick)
        if even is None:
            even = fresh_score(fresh, study, setup.baseline("even"))
        yield Point(0, 0.0, even)
        start = time.monotonic()
        steps = adam(setup)
        for mark in at:
            if task.search == "adam":
                recipe = next(found for n, found in steps if n >= mark)
            else:
                while study.n_judged < mark:
                    _, error = run.attempt(
                        study, proposer, setup, yardstick, Path(place), Silence()
                    )
                    if error:
                        raise error
                recipe = recommended(task, study, proposer, setup)
            reached = time.monotonic()
            score = fresh_score(fresh, study, recipe)
            yield Point(mark, reached - start - judging, score)
            judging += time.monotonic() - reached


def adam(setup: Setup) -> Iterator[tuple[int, Recipe]]:
    """How many images were spent, and what Adam would recommend then, of steps inside the ranges."""
    engine, (scorer,) = setup.backend, setup.scorers.values()
    assert isinstance(engine, Differentiable)
    assert isinstance(scorer, DifferentiableScorer)
    judge = partial(by_texts, scorer)
    names, bounds = list(setup.plan.bounds), np.array(list(setup.plan.bounds.values()))
    low, span = bounds[:, 0], np.diff(bounds)[:, 0]
    here, mean_of, square_of, visited = np.full(len(names), 0.5), 0.0, 0.0, []
    for step in count(1):
        recipe = setup.recipe(dict(zip(names, low + span * here, strict=True)))
        engine.load(recipe, setup.merger.merge(recipe))
        prompts = [setup.prompt(FRESH + i) for i in range((step - 1) * N_EACH, step * N_EACH)]
        pieces = list(engine.follow(prompts, judge, setup.space.searched, None))
        found = [setup.space.slopes(piece.slopes) for piece in pieces if not piece.fault]
        slope = span * np.mean([[each[name] for name in names] for each in found], 0)
        mean_of = DECAY[0] * mean_of + (1 - DECAY[0]) * slope
        square_of = DECAY[1] * square_of + (1 - DECAY[1]) * slope**2
        size = np.sqrt(square_of / (1 - DECAY[1] ** step)) + 1e-3 * np.abs(slope).max()
        here = np.clip(here + RATE * mean_of / (1 - DECAY[0] ** step) / size, 0.0, 1.0)
        visited.append(here)
        last = np.mean(visited[-math.ceil(TAIL * step) :], 0)
        yield step * N_EACH, setup.recipe(dict(zip(names, low + span * last, strict=True)))


def by_texts(
    scorer: DifferentiableScorer, pixels: torch.Tensor, some: Sequence[Prompt]
) -> torch.Tensor:
    return scorer.differentiable(pixels, [prompt.prompt for prompt in some])


def recommended(task: Task, study: Study, proposer: Proposer, setup: Setup) -> Recipe:
    if task.search not in BEST_SEEN:
        return setup.recipe(proposer.few(1)[0][1])
    seen = [(result.value.mean, result.recipe) for result in study.searched() if result.value]
    return max(seen, key=lambda one: one[0])[1]


def setup_of(task: Task, folder: Path, *overrides: str) -> Setup:
    """The embedded example with the models of a pair."""
    models = []
    if task.pair != "embedded":
        files = {m: (folder / f"{task.pair}-{m}.safetensors").absolute() for m in ("a", "b")}
        models = [f"models.{m}={path.as_posix()}" for m, path in files.items()]
    settings = [
        *models,
        f"search.seed={task.seed}",
        f"search.images={task.images}",
        "output.save_best=false",
        *SEARCHES[task.search][1],
        *overrides,
    ]
    return prepare(configuration.load(DEMO / "config.toml", settings), DEMO, "demo")


def fresh_score(fresh: Setup, study: Study, recipe: Recipe) -> float:
    """The mean score of a merge on prompts and seeds that no search has seen."""
    return mean(judged(study, fresh, fresh.heldout_panel, recipe.digest(), recipe))


def points_of(
    pair: str, found: Mapping[Task, Sequence[Point]]
) -> dict[tuple[str, int, int], Point]:
    """By search, seed and number of images."""
    return {
        (task.search, task.seed, point.images): point
        for task, reached in found.items()
        if task.pair == pair
        for point in reached
    }


def table(pair: str, found: Mapping[Task, Sequence[Point]], searches: Sequence[str]) -> None:
    """Print a line for each search, and below it how far ahead the first of them is."""
    points = points_of(pair, found)
    seeds = sorted({seed for _, seed, _ in points})
    columns = sorted({images for _, _, images in points})
    print(f"\n{pair}: score of the recommended merge after so many images (standard error)")
    print(f"{'':20}" + "".join(f"{images:>16}" for images in columns) + f"{'seconds':>12}")
    for name in searches:
        scores = {key[1:]: point.score for key, point in points.items() if key[0] == name}
        cells = [[scores[s, n] for s in seeds if (s, n) in scores] for n in columns]
        most = max((n for _, n in scores), default=0)
        seconds = [points[name, s, most].seconds for s in seeds if (s, most) in scores]
        print(f"{name:20}" + "".join(f"{shown(cell):>16}" for cell in cells), end="")
        print(f"{statistics.mean(seconds):>12.0f}" if seconds else "")
        if name != searches[0]:
            first = {key[1:]: p.score for key, p in points.items() if key[0] == searches[0]}
            both = first.keys() & scores.keys()
            gains = [
                [first[s, n] - scores[s, n] for s in seeds if (s, n) in both] for n in columns
            ]
            print(f"{'  ahead of it by':20}" + "".join(f"{shown(gain):>16}" for gain in gains))


def overall(
    pairs: Sequence[str], found: Mapping[Task, Sequence[Point]], searches: Sequence[str]
) -> None:
    """Print how far the first search is ahead of each other in the mean over the pairs.

    At the same number of images, and at a quarter of theirs; where all pairs have two seeds of both.
    """
    print(f"\nmean over {', '.join(pairs)}: how far {searches[0]} is ahead (standard error)")
    points = [points_of(pair, found) for pair in pairs]
    for name, share in product(searches[1:], (1, 4)):
        cells = {}
        for images in MARKS:
            gains = [
                [
                    point.score - by[name, seed, share * images].score
                    for (one, seed, n), point in by.items()
                    if (one, n) == (searches[0], images) and (name, seed, share * images) in by
                ]
                for by in points
            ]
            if all(len(of_pair) > 1 for of_pair in gains):
                error = math.hypot(*map(error_of, gains)) / len(gains)
                cells[images] = f"{statistics.mean(map(statistics.mean, gains)):.3f} ({error:.3f})"
        told = ", ".join(f"{images}: {cell}" for images, cell in cells.items())
        if told:
            print(f"  of {name} with {share} times the images, at {told}")


def until(pair: str, found: Mapping[Task, Sequence[Point]], searches: Sequence[str]) -> None:
    """Print how many images and seconds the median search needs for given scores.

    These are shares of the way from the even merge to the best mean score of any search.
    """
    points = points_of(pair, found)
    even = next((point.score for (_, _, images), point in points.items() if not images), 0.0)
    of_search: dict[str, dict[int, list[Point]]] = {}
    for (name, seed, _), point in sorted(points.items(), key=lambda entry: entry[1].images):
        of_search.setdefault(name, {}).setdefault(seed, []).append(point)
    means = [
        statistics.mean(by[seed][i].score for seed in by)
        for name, by in of_search.items()
        if name in searches
        for i in range(min(map(len, by.values())))
    ]
    targets = [even + share * (max(means, default=even) - even) for share in SHARES]
    print(f"\n{pair}: images (seconds) until the median search has a merge that scores")
    print(f"{'':20}" + "".join(f"{target:>16.2f}" for target in targets))
    for name in (name for name in searches if name in of_search):
        cells = []
        for target in targets:
            first = [
                next(((p.images, p.seconds) for p in some if p.score >= target), (math.inf, 0.0))
                for some in of_search[name].values()
            ]
            images, seconds = sorted(first)[len(first) // 2]
            cells.append(f"{images} ({seconds:.0f})" if images < math.inf else "-")
        print(f"{name:20}" + "".join(f"{cell:>16}" for cell in cells))


def draw(
    found: Mapping[Task, Sequence[Point]],
    pairs: Sequence[str],
    searches: Sequence[str],
    path: Path,
) -> None:
    """A figure of the mean score over that of the even merge, against the images spent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * max(2, len(pairs)), 4.4), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, pair in zip(panels, pairs, strict=True):
        gains: dict[str, dict[int, list[float]]] = {}
        points = points_of(pair, found)
        for (name, seed, images), point in points.items():
            if images and name in searches:
                gain = point.score - points[name, seed, 0].score
                gains.setdefault(name, {}).setdefault(images, []).append(gain)
        for name in (name for name in searches if name in gains):
            marks = sorted(gains[name])
            means = [statistics.mean(gains[name][n]) for n in marks]
            errors = [error_of(gains[name][n]) for n in marks]
            is_first = name == searches[0]
            bold = {"lw": 2.6, "zorder": 3, "color": "#00786b"} if is_first else {"lw": 1.2}
            axes.errorbar(marks, means, errors, label=name, marker="o", ms=4, capsize=2, **bold)
        each = [gain for by in gains.values() for some in by.values() for gain in some]
        if min(each, default=0.0) < max(each, default=0.0) / 2:  # else it is far below all of them
            axes.axhline(0.0, color="#888888", lw=0.8)
        axes.set(title=TITLES.get(pair, pair), xlabel="images", xscale="log")
        ticks = sorted({images for by in gains.values() for images in by})
        axes.set_xticks(ticks, ticks, rotation=60)
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("score over that of the even merge")
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def error_of(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def shown(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({error_of(values):.3f})"


if __name__ == "__main__":
    main()
