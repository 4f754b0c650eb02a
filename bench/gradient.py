"""How good a merge is found in how many images and seconds: the gradient beside searches by values.

    python bench/gradient.py [--pairs embedded halves bad equals] [--seeds 10] [--results FILE]

runs the program's own searches on the embedded example and on the pairs of tools/make_pairs.py, and
judges what each would recommend after so many images (those of A, B and the even merge, which all
searches make, not counted) on the same fresh prompts and seeds. Prints the mean score of the recommended
merges with its standard error over the searches, and how far gradient is ahead of each search with the
same seed. What was measured is kept in --results, so that the same command goes on with what is missing.
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
from itertools import product
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from demo import DEMO, Silent, judged

from bayesian_merger import config as configuration
from bayesian_merger import run
from bayesian_merger.data import Recipe
from bayesian_merger.outcome import mean
from bayesian_merger.setup import Setup, prepare
from bayesian_merger.study import Study

RESULTS = Path(__file__).with_name("results") / "gradient.jsonl"
MARKS = (32, 48, 64, 96, 128, 256, 512, 1024)
# Images that a search by each may spend, and its settings.
SEARCHES: Mapping[str, tuple[int, Sequence[str]]] = {
    "gradient": (256, ()),
    "gradient, last 4": (256, ("search.options={last=4}",)),
    "gradient, last 2": (256, ("search.options={last=2}",)),
    "gradient, last 1": (256, ("search.options={last=1}",)),
    "bayes": (1024, ("search.optimiser=bayes",)),
    "tpe": (1024, ("search.optimiser=tpe",)),
    "random": (1024, ("search.optimiser=random",)),
}


class Task(NamedTuple):
    """One search."""

    pair: str
    search: str
    seed: int


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
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--most", type=int, default=max(MARKS), help="images of a search")
    parser.add_argument("--images", type=int, default=192, help="fresh ones, to judge a merge")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="read, then added to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    found = read(options.results)
    for seed, pair, search in product(range(options.seeds), options.pairs, options.searches):
        task = Task(pair, search, seed)
        most = min(options.most, SEARCHES[search][0])
        if task not in found or max(found[task]) < max(m for m in MARKS if m <= most):
            points = list(searched(task, most, options.folder, options.images))
            with options.results.open("a") as file:
                file.write(json.dumps({"task": task, "points": points}) + "\n")
            found[task] = {point.images: point for point in points}
            print(*task, " ".join(f"{p.images}: {p.score:.3f}" for p in points), flush=True)
    for pair in options.pairs:
        table(pair, found, options.searches)


def read(path: Path) -> dict[Task, dict[int, Point]]:
    """What earlier runs have measured, by images."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        found[Task(*entry["task"])] = {p[0]: Point(*p) for p in entry["points"]}
    return found


def searched(task: Task, images: int, folder: Path, n_fresh: int) -> Iterator[Point]:
    """One search, and the scores of what it recommends at each mark; first that of the even merge."""
    setup = setup_of(task, images, folder)
    judge = Task(task.pair, "random", 10_000)
    fresh = setup_of(judge, images, folder, f"heldout.images={n_fresh}")
    with tempfile.TemporaryDirectory() as place:
        study = Study(Path(place) / "study.db")
        judging = 0.0
        yardstick = run.baselines(study, setup, Path(place), Silent())
        proposer = study.searching(setup.plan, yardstick.value)
        yield Point(0, 0.0, fresh_score(fresh, study, setup.baseline("even")))
        start = time.monotonic()
        for mark in (m for m in MARKS if m <= images):
            while study.n_judged < mark:
                if error := run.attempt(study, proposer, setup, yardstick, Path(place), Silent()):
                    raise error
            recipe = setup.recipe(proposer.few(1)[0][1])
            reached = time.monotonic()
            score = fresh_score(fresh, study, recipe)
            yield Point(mark, reached - start - judging, score)
            judging += time.monotonic() - reached


def setup_of(task: Task, images: int, folder: Path, *overrides: str) -> Setup:
    """The embedded example with the models of a pair."""
    models = []
    if task.pair != "embedded":
        files = {m: (folder / f"{task.pair}-{m}.safetensors").absolute() for m in ("a", "b")}
        models = [f"models.{m}={path.as_posix()}" for m, path in files.items()]
    settings = [
        *models,
        f"search.seed={task.seed}",
        f"search.images={images}",
        "output.save_best=false",
        *SEARCHES[task.search][1],
        *overrides,
    ]
    return prepare(configuration.load(DEMO / "config.toml", settings), DEMO, "demo")


def fresh_score(fresh: Setup, study: Study, recipe: Recipe) -> float:
    """The mean score of a merge on prompts and seeds that no search has seen."""
    return mean(judged(study, fresh, fresh.heldout_panel, recipe.digest(), recipe))


def table(pair: str, found: Mapping[Task, Mapping[int, Point]], searches: Sequence[str]) -> None:
    """Print a line for each search, and below it how far ahead the first of them is."""
    own = {task: points for task, points in found.items() if task.pair == pair}
    marks = sorted({mark for points in own.values() for mark in points})
    print(f"\n{pair}: score of the recommended merge after so many images (standard error)")
    print(f"{'':20}" + "".join(f"{mark:>16}" for mark in marks) + f"{'seconds':>12}")
    for name in searches:
        runs = {task.seed: points for task, points in own.items() if task.search == name}
        cells = [[p[mark].score for p in runs.values() if mark in p] for mark in marks]
        seconds = [p[max(p)].seconds for p in runs.values()]
        print(f"{name:20}" + "".join(f"{shown(cell):>16}" for cell in cells), end="")
        print(f"{statistics.mean(seconds):>12.0f}" if seconds else "")
        first = {task.seed: points for task, points in own.items() if task.search == searches[0]}
        gains = [
            [
                first[s][mark].score - runs[s][mark].score
                for s in runs
                if both(first, runs, s, mark)
            ]
            for mark in marks
        ]
        if name != searches[0]:
            print(f"{'  ahead of it by':20}" + "".join(f"{shown(gain):>16}" for gain in gains))


def both(
    one: Mapping[int, Mapping[int, Point]],
    other: Mapping[int, Mapping[int, Point]],
    seed: int,
    mark: int,
) -> bool:
    return seed in one and seed in other and mark in one[seed] and mark in other[seed]


def shown(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    if not values:
        return ""
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    return (
        f"{statistics.mean(values):.3f} ({statistics.stdev(values) / math.sqrt(len(values)):.3f})"
    )


if __name__ == "__main__":
    main()
