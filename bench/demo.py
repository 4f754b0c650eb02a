"""Measure the embedded example: its landscape, and what the search finds in it with several seeds.

    python bench/demo.py [--seeds 3] [--images 192] [--folder runs/bench-demo]

Prints a table for docs/demo.md: A, B and even merges on fresh prompts and seeds, the effect of each
block around the even merge, and for each search seed the merge found, compared on the same images
with the best even merge. Runs stand in FOLDER and are gone on with when the script is started again.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import bayesian_merger
from bayesian_merger import config as configuration
from bayesian_merger import run
from bayesian_merger.data import Prompt, Recipe, Result
from bayesian_merger.outcome import mean
from bayesian_merger.setup import Setup, prepare
from bayesian_merger.study import Study
from bayesian_merger.values import Yardstick

DEMO = Path(bayesian_merger.__file__).parent / "demo"
EVEN = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
ONE_SCORER = Yardstick({"demo": 1.0}, {})


class Silent:
    """An observer that says nothing."""

    def planned(self, images: int, trials: int) -> None: ...
    def started(self, stage: str, name: str, images: int) -> None: ...
    def judged(self, images: int, made: bool) -> None: ...
    def finished(self, result: Result, leader: Result | None) -> None: ...
    def noted(self, text: str) -> None: ...


def setup_of(seed: int, images: int) -> Setup:
    """The example with another search seed; held-out images come from that seed too."""
    overrides = [f"search.seed={seed}", f"heldout.images={images}", "output.save_best=false"]
    return prepare(configuration.load(DEMO / "config.toml", overrides), DEMO, "demo")


def judged(
    study: Study, setup: Setup, panel: tuple[Prompt, ...], name: str, recipe: Recipe
) -> Result:
    trial = study.book("heldout", name, recipe)
    run.judge(trial, panel, setup, Silent(), None)
    if not trial.is_complete:
        trial.complete(ONE_SCORER.estimate(trial.result(), panel))
    return trial.result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--effect-images", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-demo"))
    options = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}")

    base = setup_of(10_000, options.images)
    panel = base.heldout_panel
    blocks = base.merger.architecture.blocks

    def even(alpha: float) -> Recipe:
        return base.recipe({"alpha": dict.fromkeys(blocks, alpha)})

    with tempfile.TemporaryDirectory() as folder:
        study = Study(f"sqlite:///{Path(folder).as_posix()}/landscape.db")
        print(f"\n{len(panel)} fresh prompt and seed pairs\n")
        print("| alpha in every block | mean | standard error |\n|---|---|---|")
        evens: dict[float, Result] = {}
        for alpha in EVEN:
            result = evens[alpha] = judged(study, base, panel, f"even {alpha}", even(alpha))
            assert result.value is not None
            print(f"| {alpha} | {result.value.mean:.3f} | {result.value.se:.3f} |", flush=True)
        top = max(EVEN, key=lambda alpha: mean(evens[alpha]))

        some = panel[: options.effect_images]
        print(f"\nValue with one block at 1 minus at 0, the others at 0.5; {len(some)} images")
        for block in blocks:
            ends = [
                judged(
                    study,
                    base,
                    some,
                    f"{block} {alpha}",
                    base.recipe({"alpha": {**dict.fromkeys(blocks, 0.5), block: alpha}}),
                )
                for alpha in (0.0, 1.0)
            ]
            gain = ONE_SCORER.difference(ends[1], ends[0], some)
            print(
                f"  {block:6} {gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})", flush=True
            )

        print(
            f"\n| search seed | images of the search | found | over the best even merge (alpha {top}) | "
            f"over A | over B |\n|---|---|---|---|---|---|"
        )
        for seed in range(options.seeds):
            ready = setup_of(seed, 64)
            outcome = run.run(ready, options.folder / str(seed), Silent())
            assert outcome.best is not None
            best = judged(study, base, panel, f"seed {seed}", outcome.best.recipe)
            assert best.value is not None
            gains = [
                ONE_SCORER.difference(best, other, panel)
                for other in (evens[top], evens[0.0], evens[1.0])
            ]
            shown = " | ".join(f"{g.mean:+.2f} ({g.low:+.2f} to {g.high:+.2f})" for g in gains)
            spent = sum(len(result.scores) for result in outcome.results)
            print(
                f"| {seed} | {spent} | {best.value.mean:.3f} ± {best.value.se:.3f} | {shown} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
