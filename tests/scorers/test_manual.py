"""A run that a person judges, who here is a thread that answers what is asked."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_run import Silent, measured
from test_run import folder as folder

from bayesian_merger import config as configuration
from bayesian_merger import infotext, run, setup
from bayesian_merger import outcome as outcomes
from bayesian_merger.data import Outcome, Prompt, Sample
from bayesian_merger.desk import JOURNAL, Answer, Desk
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.scorers import scorer

OPTIONS = (
    "scorers={ manual = { undo_s = 0.0 } }",
    "search.init_points=3",
    "search.n_iters=2",
    "search.images_per_trial=2",
    "heldout.images=4",
    "heldout.select_images=2",
    "panel.batch_size=2",
)


class Person(Silent):
    """An observer in whose place somebody marks how bright a picture is, or does as `habit` says."""

    def __init__(
        self, patience: int = 10_000, skips: bool = False, skipped: range = range(0)
    ) -> None:
        super().__init__()
        self.patience, self.skips, self.skipped = patience, skips, skipped
        self.n_answered = 0
        self.desk: Desk | None = None

    def asked(self, desk: Desk) -> None:
        self.desk = desk
        threading.Thread(target=self._answer, args=(desk,), daemon=True).start()

    def judged(self, images: int, made: bool) -> None:
        super().judged(images, made)
        if self.n_answered >= self.patience:
            raise KeyboardInterrupt

    def _answer(self, desk: Desk) -> None:
        version = -1
        while not (state := desk.state(version, 1.0))["over"]:
            version, asked = state["version"], state["question"]
            if not asked:
                continue
            data = desk.picture(asked["key"], 0)
            assert data
            with Image.open(io.BytesIO(data)) as image:
                brightness = float(np.asarray(image).mean())
            mark = min(10, max(0, round((brightness - 64) / 12.8)))
            is_skipped = self.skips and asked["seed"] % 3 == 0
            is_skipped = is_skipped or self.n_answered in self.skipped
            answer: Answer = "skip" if is_skipped else mark
            self.n_answered += desk.answer(asked["key"], answer)


def start(folder: Path, observer: Silent, *more: str, into: str = "run") -> Outcome:
    config = configuration.load(folder / "config.toml", (*OPTIONS, *more))
    # Of a table in a table an override cannot say that a key is gone.
    config = config.model_copy(update={"scorers": {"manual": config.scorers["manual"]}})
    ready = setup.prepare(config, folder, "toy")
    return run.run(ready, folder / into, observer)


def test_run_finds_what_a_person_likes(folder: Path) -> None:
    person = Person()
    outcome = start(folder, person, "search.n_iters=10")
    assert outcome.finished
    assert outcome.gain["over_a"].low > 0  # brighter
    scores = {s["manual"] for r in outcome.results for s in r.scores.values()}
    assert scores <= set(range(11))
    assert (folder / "run" / JOURNAL).exists()


def test_run_that_was_stopped_does_not_ask_again(folder: Path) -> None:
    whole = start(folder, Person(), into="whole")
    hasty = Person(patience=13)
    with pytest.raises(KeyboardInterrupt):
        start(folder, hasty)
    lines = (folder / "run" / JOURNAL).read_text().splitlines()
    assert len(lines) == hasty.n_answered >= 13
    again = Person()
    outcome = start(folder, again)
    assert measured(outcome) == measured(whole)
    n_all = len((folder / "whole" / JOURNAL).read_text().splitlines())
    assert again.n_answered == n_all - hasty.n_answered


def test_pictures_that_are_rated_are_kept_with_their_prompts(folder: Path) -> None:
    start(folder, Person())
    line = json.loads((folder / "run" / JOURNAL).read_text().splitlines()[0])
    assert line["prompt"]
    [name] = line["pictures"]
    with Image.open(folder / "run" / "rated" / name) as image:
        assert infotext.read(image.info).prompt == line["prompt"]
        assert image.height == 16


def test_skipped_pictures_have_no_score(folder: Path) -> None:
    outcome = start(folder, Person(skips=True), "heldout.select_images=6", "heldout.images=8")
    stored = outcomes.read_outcome(folder / "run", outcomes.open_study(folder / "run"))
    answers = [
        json.loads(x)["answer"] for x in (folder / "run" / JOURNAL).read_text().splitlines()
    ]
    assert "skip" in answers
    assert all("manual" in s for r in stored.results for s in r.scores.values())
    # They are shown beside the others all the same.
    assert {len(pictures) for pictures in outcome.pictures.values()} == {8}
    report = (folder / "run" / "report.html").read_text()
    assert "picture missing" not in report.replace('class="missing"', "")
    assert outcome.finished


def test_trials_that_were_skipped_do_not_stop_the_run(folder: Path) -> None:
    # Twelve pictures of the baselines, then five trials of one each.
    person = Person(skipped=range(12, 17))
    outcome = start(folder, person, "search.images_per_trial=1", "search.n_iters=12")
    skipped = [r for r in outcome.results if r.state == "failed"]
    assert len(skipped) == 5
    assert all(r.reason == "all its images were skipped" for r in skipped)
    assert outcome.finished


def test_person_is_asked_in_a_run_only(folder: Path) -> None:
    sample = Sample(Image.new("RGB", (8, 8)), Prompt(0, "p", "a cat", 0))
    with pytest.raises(TrialError, match="you are asked in a run only"):
        scorer.build("manual", {})([sample])
    with pytest.raises(ConfigError, match="scorer manual asks a person, and here nobody"):
        start(folder, Silent())
    with pytest.raises(ConfigError, match="undo_s is -1"):
        scorer.build("manual", {"undo_s": -1})


def test_run_is_tried_without_asking_anybody(folder: Path) -> None:
    config = configuration.load(folder / "config.toml", OPTIONS)
    config = config.model_copy(update={"scorers": {"manual": config.scorers["manual"]}})
    tried = run.try_out(setup.prepare(config, folder, "toy"))
    assert tried.scores == {}
    assert tried.images > 0


def test_run_waits_and_tells_so_once_when_nobody_looks(tmp_path: Path) -> None:
    desk = Desk(tmp_path, undo_s=0.0)
    told: list[float] = []
    desk.away = lambda: told.append(time.monotonic())
    desk._seen_at -= 60
    sample = Sample(Image.new("RGB", (8, 8)), Prompt(0, "p", "a cat", 0))
    judge = scorer.build("manual", {"undo_s": 0.0})
    judge._desk = desk
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(judge([sample])))
    waiting.start()
    time.sleep(0.8)
    assert len(told) == 1
    desk.answer(desk.state()["question"]["key"], 4)
    waiting.join(10)
    assert found == [[4.0]]
    desk.close()
