"""How many decisions of a person a search takes, by marks and by pairs, in the embedded example.

    python bench/eye.py [--decisions 50 100 200] [--seeds 3]

The person is a program that likes what the example's scorer likes, and not always says so: its marks are
that score with an error, and of two pictures it chooses the better one by the odds of Bradley and Terry.
For each way to ask and each budget of decisions in the search it prints by how much the merge that was
found is better than the even merge, by that scorer on the same fresh images.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from demo import DEMO, ONE_SCORER, judged
from PIL import Image

from bayesian_merger import config as configuration
from bayesian_merger import run
from bayesian_merger.data import Prompt, Sample
from bayesian_merger.desk import Answer, Desk
from bayesian_merger.judging import Silence
from bayesian_merger.scorers import scorer
from bayesian_merger.setup import Setup, prepare
from bayesian_merger.study import Study

# A standard deviation of the error of marks, and the difference of scores that wins 73 % of pairs.
ERROR, TELLING = 0.5, 0.35


class Person(Silence):
    """An observer in whose place a taste answers what is asked."""

    def __init__(self, seed: int) -> None:
        self.taste, self.chance = scorer.build("demo", {}), np.random.default_rng(seed)

    def asked(self, desk: Desk) -> None:
        threading.Thread(target=self._answer, args=(desk,), daemon=True).start()

    def _answer(self, desk: Desk) -> None:
        version = -1
        while not (state := desk.state(version, 5.0))["over"]:
            version, asked = state["version"], state["question"]
            if asked:
                desk.answer(asked["key"], self._said(desk, asked))

    def _said(self, desk: Desk, asked: dict[str, object]) -> Answer:
        key = str(asked["key"])
        scores = []
        for number in range(int(str(asked["pictures"]))):
            data = desk.picture(key, number)
            assert data
            with Image.open(io.BytesIO(data)) as image:
                sample = Sample(image.convert("RGB"), Prompt(0, "", str(asked["prompt"]), 0))
            scores += self.taste([sample])
        if len(scores) == 1:
            return min(10, max(0, round(scores[0] + self.chance.normal(0, ERROR))))
        odds = np.exp((scores[0] - scores[1]) / TELLING)
        return "left" if self.chance.random() < odds / (1 + odds) else "right"


def setup_of(seed: int, ask: str, images: int) -> Setup:
    """The example judged by a person, who is shown no more than the search needs."""
    settings = [
        f"search.seed={seed}",
        f"search.images={images}",
        "output.save_best=false",
        "heldout.images=2",
        "heldout.select_images=2",
        "heldout.candidates=1",
        f"scorers.manual={{ ask = '{ask}', undo_s = 0.0 }}",
    ]
    config = configuration.load(DEMO / "config.toml", settings)
    # Of a table in a table an override cannot say that a key is gone.
    only = {name: one for name, one in config.scorers.items() if name == "manual"}
    return prepare(config.model_copy(update={"scorers": only}), DEMO, "demo")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--decisions", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=192, help="fresh images of each merge")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}")

    settings = ["search.seed=10000", f"heldout.images={options.images}"]
    base = prepare(configuration.load(DEMO / "config.toml", settings), DEMO, "demo")
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder) / "fresh.db")
        even = judged(study, base, base.heldout_panel, "even", base.baseline("even"))
        assert even.value
        print(f"the even merge has {even.value.mean:.3f} ± {even.value.se:.3f} on fresh images\n")
        print(
            "| asked for | decisions in the search | decisions before, of A, B and the even merge | "
            "over the even merge, mean of seeds | each |\n|---|---|---|---|---|"
        )
        for images in options.decisions:
            for ask in ("marks", "pairs"):
                gains: list[float] = []
                before: list[int] = []
                spent: list[int] = []
                for seed in range(options.seeds):
                    setup = setup_of(seed, ask, images)
                    outcome = run.run(setup, Path(folder) / f"{ask}{images}-{seed}", Person(seed))
                    assert outcome.best
                    scores = [(r.stage, s) for r in outcome.results for s in r.scores.values()]
                    before.append(sum(stage == "baseline" and bool(s) for stage, s in scores))
                    spent.append(sum(stage != "baseline" and bool(s) for stage, s in scores))
                    name = f"{ask} {images} {seed}"
                    best = judged(study, base, base.heldout_panel, name, outcome.best.recipe)
                    gains.append(ONE_SCORER.difference(best, even, base.heldout_panel).mean)
                mean = statistics.mean(gains)
                searched, first = (round(statistics.mean(some)) for some in (spent, before))
                each = ", ".join(f"{gain:+.2f}" for gain in gains)
                print(f"| {ask} | {searched} | {first} | {mean:+.3f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
