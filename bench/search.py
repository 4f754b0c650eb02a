"""How good a merge searches find in how many images, on landscapes with a known optimum.

    python bench/search.py --peers PYTHON [--instances 20] [--noise fixed fresh] [--results FILE]

runs every optimiser on the same instances of bench/landscapes.py and prints the normalised regret of
what it recommends (0: the best merge; 1: the mean of random ones) with its standard error, and the
difference to `bayes` of sd-webui-bayesian-merger on the same instances; then in how many images
ours finds what a peer finds in all of its own, by searches that have so many to spend. PYTHON is that of
an environment with bayesian-optimization, hyperopt, optuna and cmaes. What was measured is kept in
--results, so that the same command goes on with what is missing; --figure FILE draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from landscapes import FAMILIES
from numpy.typing import NDArray
from search_peers import OPTIMISERS, OURS

TOLD = (100, 200, 300, 500, 1000)
SHORT = (30, 40, 60, 80, 100, 150)
PEERS = Path(__file__).with_name("search_peers.py")


RESULTS = Path(__file__).with_name("results") / "search.jsonl"


class Task(NamedTuple):
    """One search."""

    optimiser: str
    family: str
    seed: int
    noise: str
    images: int


Regrets: TypeAlias = dict[int, float]
"""Images -> regret of what was then recommended."""

Found: TypeAlias = dict[Task, tuple[Regrets, float]]
"""Regrets of each search, and its median seconds of CPU to propose a point."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--optimisers", nargs="+", default=list(OPTIMISERS))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first instance")
    parser.add_argument("--noise", nargs="+", default=["fixed", "fresh"])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--short", nargs="*", type=int, default=SHORT, help="of searches of ours")
    parser.add_argument("--jobs", type=int, default=2, help="searches at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="read, then added to")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.instances)
    # Instance by instance, so that what there is after an interruption is paired.
    tasks = [
        Task(optimiser, family, seed, noise, images)
        for seed, noise, family, optimiser in product(
            seeds, options.noise, options.families, options.optimisers
        )
        for images in [options.images, *(options.short if optimiser == OURS else ())]
    ]
    everything = measured(tasks, options)
    found = {task: one for task, one in everything.items() if task.images == options.images}
    for noise in options.noise:
        for images in TOLD:
            if images <= options.images:
                table(found, options.optimisers, options.families, noise, images)
        for name in options.optimisers:
            if options.short and OURS in options.optimisers and name != OURS:
                print(saved(everything, name, noise, options.images))
    for name in options.optimisers:
        waits = {d: [s for t, (_, s) in found.items() if _is(t, name, d)] for d in ("26", "52")}
        shown = ", ".join(f"{d}: {statistics.median(w):.3f} s" for d, w in waits.items() if w)
        print(f"CPU to propose a point, {name}, {shown}")
    if options.figure:
        draw(everything, options.optimisers, options.noise, options.figure)


def measured(tasks: Sequence[Task], options: argparse.Namespace) -> Found:
    """What each task found; those that the results do not hold are run."""
    found: Found = {}
    if options.results.exists():
        for line in options.results.read_text().splitlines():
            entry = json.loads(line)
            regrets = {int(images): regret for images, regret in entry["regrets"].items()}
            found[Task(*entry["task"])] = (regrets, entry["ask_s"])
    todo = [task for task in tasks if task not in found]

    def run(task: Task) -> tuple[Task, str]:
        python = sys.executable if task.optimiser == OURS else str(options.peers)
        command = [python, str(PEERS), *map(str, task)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}:\n{done.stderr}")
        return task, done.stdout.splitlines()[-1]

    pool = ThreadPoolExecutor(options.jobs)
    try:
        for done in as_completed([pool.submit(run, task) for task in todo]):
            task, line = done.result()
            entry = json.loads(line)
            found[task] = ({int(n): r for n, r in entry["regrets"].items()}, entry["ask_s"])
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a") as file:
                file.write(json.dumps({"task": task, **entry}) + "\n")
    finally:
        pool.shutdown(cancel_futures=True)
    return {task: found[task] for task in tasks}


def table(
    found: Found, optimisers: Sequence[str], families: Sequence[str], noise: str, images: int
) -> None:
    """Print the regrets after so many images, an optimiser a line."""
    print(f"\nnormalised regret after {images} images, {noise} seeds (standard error)")
    print(
        f"{'':14}" + "".join(f"{family:>14}" for family in families) + f"{'all':>14}  less bayes"
    )

    def of(name: str) -> Mapping[tuple[str, int], float]:
        return {
            (task.family, task.seed): regrets[images]
            for task, (regrets, _) in found.items()
            if (task.optimiser, task.noise) == (name, noise)
        }

    reference = of("bayes")
    for name in optimisers:
        own = of(name)
        cells = [[r for (f, _), r in own.items() if f == family] for family in families]
        pairs = [own[key] - reference[key] for key in own if key in reference]
        print(
            f"{name:14}"
            + "".join(f"{shown(cell):>14}" for cell in [*cells, list(own.values())])
            + (f"  {shown(pairs)}" if pairs else "")
        )


def saved(found: Found, peer: str, noise: str, images: int) -> str:
    """How many images of ours do for the mean regret that a peer has after all of its own.

    The interval is that of 2,000 draws of instances, with the instances' own pairs.
    """
    last: dict[tuple[str, int], dict[tuple[str, int], float]] = {}
    for task, (regrets, _) in found.items():
        if task.noise == noise:
            of_search = last.setdefault((task.optimiser, task.images), {})
            of_search[task.family, task.seed] = regrets[task.images]
    places = list(last[peer, images])
    budgets = sorted(n for name, n in last if name == OURS)
    curves = np.array([[last[OURS, n][place] for n in budgets] for place in places])
    wanted = np.array([last[peer, images][place] for place in places])

    def factor(chosen: NDArray[np.intp]) -> float:
        curve, level = curves[chosen].mean(0), wanted[chosen].mean()
        below = np.flatnonzero(curve <= level)
        if not len(below):
            return images / budgets[-1]
        i = int(below[0])
        if i == 0:
            return images / budgets[0]
        share = (curve[i - 1] - level) / (curve[i - 1] - curve[i])
        return float(images / (budgets[i - 1] + share * (budgets[i] - budgets[i - 1])))

    chance = np.random.default_rng(0)
    drawn = [factor(chance.integers(len(places), size=len(places))) for _ in range(2000)]
    low, high = np.quantile(drawn, (0.1, 0.9))
    return (
        f"{noise} seeds, images saved at the regret of {peer} after {images}: a factor of "
        f"{factor(np.arange(len(places))):.1f} (80 % interval {low:.1f} to {high:.1f})"
    )


def shown(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ({error:.3f})"


def draw(found: Found, optimisers: Sequence[str], noises: Sequence[str], path: Path) -> None:
    """A figure of the mean regret over all instances against the images spent.

    Of ours also that of searches which had only so many images to spend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8 * len(noises), 5.2), layout="constrained")
    panels = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    for axes, noise in zip(panels, noises, strict=True):
        for name in optimisers:
            some = [
                (t.images, r)
                for t, (r, _) in found.items()
                if (t.optimiser, t.noise) == (name, noise)
            ]
            longest = max(images for images, _ in some)
            whole = [regrets for images, regrets in some if images == longest]
            of_marks = {n: [run[n] for run in whole] for n in set.intersection(*map(set, whole))}
            bold = {"lw": 2.6, "zorder": 3, "color": "#00786b"} if name == OURS else {"lw": 1.2}
            _line(axes, of_marks, label=name, marker="o", ms=4, **bold)
            ends: dict[int, list[float]] = {}
            for images, regrets in some:
                ends.setdefault(images, []).append(regrets[images])
            if len(ends) > 1:
                told = f"{name}, with so many to spend"
                _line(axes, ends, label=told, marker="o", ms=5, mfc="white", ls=":", **bold)
        axes.set(title=f"{noise} seeds", xlabel="images", xscale="log", ylim=(0, None))
        axes.set_xticks([30, 50, 100, 200, 300, 500], [30, 50, 100, 200, 300, 500])
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("normalised regret")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def _line(axes: Any, of_marks: Mapping[int, Sequence[float]], **style: Any) -> None:
    marks = sorted(of_marks)
    means = [statistics.mean(of_marks[n]) for n in marks]
    errors = [statistics.stdev(of_marks[n]) / len(of_marks[n]) ** 0.5 for n in marks]
    axes.errorbar(marks, means, errors, capsize=2, **style)


def _is(task: Task, name: str, d: str) -> bool:
    return task.optimiser == name and task.family.endswith(d)


if __name__ == "__main__":
    main()
