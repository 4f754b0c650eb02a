"""Measure the embedded example: its landscape, and what the search finds in it with several seeds.

    python bench/demo.py [--optimiser bayes --budget 300] [--seeds 4] [--picture FILE]

Prints the tables of docs/demo.md: A, B and even merges on fresh prompts and seeds; for each search
seed the merge found, compared on the same images with the best even merge; and the effect of each
block around the even merge. Runs stand in FOLDER and are gone on with when the script is
started again. `--picture` writes the first twelve held-out prompts of seed 0 in A, B, the even
merge and the best.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image

import bayesian_merger
from bayesian_merger import config as configuration
from bayesian_merger import judging, plots, run
from bayesian_merger.data import Interval, Outcome, Prompt, Recipe, Result
from bayesian_merger.judging import Silence
from bayesian_merger.outcome import mean
from bayesian_merger.setup import Setup, prepare
from bayesian_merger.study import Study
from bayesian_merger.values import Measure, Yardstick

DEMO = Path(bayesian_merger.__file__).parent / "demo"
EVEN = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
ONE_SCORER = Yardstick(Measure({"demo": 1.0}))


def setup_of(seed: int, *overrides: str) -> Setup:
    """The example with another search seed; held-out prompts and seeds come from that seed too."""
    settings = [f"search.seed={seed}", "output.save_best=false", *overrides]
    return prepare(configuration.load(DEMO / "config.toml", settings), DEMO, "demo")


def judged(
    study: Study, setup: Setup, panel: tuple[Prompt, ...], name: str, recipe: Recipe
) -> Result:
    trial = study.book("heldout", name, recipe)
    judging.judge(trial, panel, setup, Silence(), None)
    if not trial.is_complete:
        trial.complete(ONE_SCORER.estimate(trial.result(), panel))
    return trial.result()


def told(gain: Interval) -> str:
    """A difference with its 95 % interval, for a table."""
    return f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"


def draw(outcome: Outcome, path: Path, n: int = 12) -> None:
    """Write the first `n` held-out pictures of each model as rows of a contact sheet."""
    rows = {
        label: [Image.open(outcome.pictures[name][i]) for i in range(n)]
        for label, name in {"A": "a", "B": "b", "even": "even", "best": "best"}.items()
    }
    plots.save(plots.contact_sheet(rows), path)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--optimiser", default="auto")
    parser.add_argument("--budget", type=int, default=128, help="images of a search")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--effect-images", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-demo"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}")

    base = setup_of(10_000, f"heldout.images={options.images}")
    panel = base.heldout_panel
    blocks = base.merger.architecture.blocks

    def merge(alpha: float, **changed: float) -> Recipe:
        """An even merge, but for the alphas of some blocks."""
        alphas = {**dict.fromkeys(blocks, alpha), **changed}
        return base.recipe({f"{block}_alpha": value for block, value in alphas.items()})

    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder) / "landscape.db")
        print(f"\n{len(panel)} fresh prompt and seed pairs\n")
        print("| alpha in every block | mean | standard error |\n|---|---|---|")
        evens: dict[float, Result] = {}
        for alpha in EVEN:
            result = evens[alpha] = judged(study, base, panel, f"even {alpha}", merge(alpha))
            assert result.value is not None
            print(f"| {alpha} | {result.value.mean:.3f} | {result.value.se:.3f} |", flush=True)
        top = max(EVEN, key=lambda alpha: mean(evens[alpha]))

        print(
            f"\n| search seed | images of the search | time | found | over the best even merge "
            f"(alpha {top}) | over A | over B |\n|---|---|---|---|---|---|---|"
        )
        for seed in range(options.seeds):
            chosen = [f"search.optimiser={options.optimiser}", f"search.images={options.budget}"]
            setup = setup_of(seed, *chosen)
            outcome = run.run(setup, options.folder / str(seed), Silence())
            seconds = sum(outcome.seconds.values())
            assert outcome.best is not None
            if seed == 0 and options.picture:
                draw(outcome, options.picture)
            best = judged(study, base, panel, f"seed {seed}", outcome.best.recipe)
            assert best.value is not None
            gains = [
                ONE_SCORER.difference(best, other, panel)
                for other in (evens[top], evens[0.0], evens[1.0])
            ]
            found = f"{best.value.mean:.3f} ± {best.value.se:.3f}"
            spent = sum(len(result.scores) for result in outcome.results)  # with the baselines
            row = (str(seed), str(spent), f"{seconds:.0f} s", found, *map(told, gains))
            print("| " + " | ".join(row) + " |", flush=True)

        some = panel[: options.effect_images]
        print(
            f"\nOne block's alpha changed, the others at 0.5: change of the mean of {len(some)} images\n"
        )
        print("| block | to 0 (A's) | to 1 (B's) |\n|---|---|---|")
        for block in blocks:
            changes = []
            for alpha in (0.0, 1.0):
                end = judged(study, base, some, f"{block} {alpha}", merge(0.5, **{block: alpha}))
                changes.append(ONE_SCORER.difference(end, evens[0.5], some))
            print(f"| {block} | {told(changes[0])} | {told(changes[1])} |", flush=True)


if __name__ == "__main__":
    main()
