"""One trial, and the loop around it.

config -> space -> ask -> merge -> generate -> score -> tell -> report
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from bayesian_merger.data import Outcome, Prompt, Result, Sample
from bayesian_merger.errors import RunError, TrialError
from bayesian_merger.outcome import (
    leader,
    mean,
    open_study,
    pictures_of,
    read_outcome,
    save_image,
    write_outcome,
    write_recipe,
)
from bayesian_merger.scorers import Scorer
from bayesian_merger.setup import BASELINES, Setup
from bayesian_merger.study import Plan, Study, Trial, storage_errors
from bayesian_merger.values import Yardstick

_FAILURES_IN_A_ROW = 3
_REPORT_EVERY_S = 60.0


class Observer(Protocol):
    """Is told how the run goes on; the library itself prints nothing."""

    def planned(self, images: int, trials: int) -> None:
        """The run will have made so many images and trials when it is done."""
        ...

    def started(self, stage: str, name: str, images: int) -> None:
        """A recipe is being judged on so many images."""
        ...

    def judged(self, images: int, made: bool) -> None:
        """Scores of so many more images stand; `made` now, or by an earlier start of the run."""
        ...

    def finished(self, result: Result, leader: Result | None) -> None:
        """A recipe was judged or failed; `leader` is the best trial so far."""
        ...

    def noted(self, text: str) -> None:
        """Something that the user should know."""
        ...


def judge(
    trial: Trial, panel: Sequence[Prompt], setup: Setup, observer: Observer, keep: Path | None
) -> None:
    """One trial: merge, generate, score, image by image; what the trial has is not made again.

    Images go to the folder `keep`, if given, before their scores are stored. TrialError if the
    merge, an image or a score is not to be had.
    """
    # The panel is cut at the same places whatever is missing, so that each image repeats exactly.
    batches = list(_batches(panel, setup.backend.batch))
    observer.judged(sum(p.index in trial.scores for p in panel), made=False)
    todo = [batch for batch in batches if any(p.index not in trial.scores for p in batch)]
    if not todo:
        return
    start = time.monotonic()
    setup.backend.load(trial.recipe, setup.merger.merge(trial.recipe))
    trial.spend(merge=time.monotonic() - start)
    for batch in todo:
        start = time.monotonic()
        samples = list(setup.backend.generate(batch))
        generated = time.monotonic()
        scores = _score(setup.scorers, samples)
        scored = time.monotonic()
        fresh = 0
        for sample, found in zip(samples, scores, strict=True):
            if sample.prompt.index not in trial.scores:
                if keep:
                    save_image(sample, keep / f"{sample.prompt.index:03}.png")
                trial.record(sample.prompt.index, found, _digest(sample))
                fresh += 1
        trial.spend(generate=generated - start, score=scored - generated)
        observer.judged(fresh, made=True)


def run(setup: Setup, folder: Path, observer: Observer) -> Outcome:
    """The whole run in `folder`, from wherever an earlier start of it ended.

    RunError if it cannot go on, ConfigError if the folder belongs to another configuration.
    """
    with _locked(folder), storage_errors():
        for stale in folder.rglob(".*.part"):  # a killed process leaves what it was writing
            stale.unlink()
        check_folder(setup, folder)
        study = open_study(folder, create=True)
        study.begin(setup.identity(), setup.about())
        observer.planned(setup.n_images(), setup.n_trials)
        for warning in setup.warnings:
            observer.noted(warning)

        yardstick = _baselines(study, setup, folder, observer)
        _search(study, setup, yardstick, folder, observer)
        _confirm(study, setup, yardstick, folder, observer)

        outcome = read_outcome(folder, study)
        assert outcome.best is not None
        if setup.config.output.save_best:
            setup.merger.merge(outcome.best.recipe).save(folder / "best.safetensors")
        write_outcome(outcome, folder, setup.merger.references())
        return outcome


def _baselines(study: Study, setup: Setup, folder: Path, observer: Observer) -> Yardstick:
    """Judge A, the even merge and B; they set the scale of the values and anchor the search."""
    trials = [study.book("baseline", name, setup.baseline(name)) for name in BASELINES]
    for trial in trials:
        observer.started("baseline", trial.name, len(setup.panel))
        _must(trial, setup.panel, setup, observer, folder)
        _require_change(trial.result(), [t.result() for t in trials], setup.plan)
    yardstick = Yardstick.from_baselines(setup.weights, [t.result() for t in trials])
    for trial in trials:
        if not trial.is_complete:
            trial.complete(yardstick.estimate(trial.result(), setup.panel))
        study.observe(trial.result(), setup.plan)
        observer.finished(trial.result(), None)
    return yardstick


def _search(
    study: Study, setup: Setup, yardstick: Yardstick, folder: Path, observer: Observer
) -> None:
    """Ask, judge, tell, until the trials are spent; a failed trial only has no value."""
    failures = 0
    reported = -math.inf
    while _n_finished(study) < setup.n_trials:
        start = time.monotonic()
        trial = study.ask(setup.plan, setup.recipe)
        trial.spend(ask=time.monotonic() - start)
        observer.started(trial.stage, trial.name, len(setup.panel))
        keep = (
            pictures_of(folder, trial.stage, trial.name) if setup.config.output.save_imgs else None
        )
        before = leader(study.searched())
        try:
            judge(trial, setup.panel, setup, observer, keep)
        except TrialError as error:
            trial.fail(str(error))
            failures += 1
            if failures >= _FAILURES_IN_A_ROW:
                raise RunError(
                    f"{failures} trials in a row failed, the last with: {error}"
                ) from error
        else:
            failures = 0
            others = [*study.judged("baseline"), *study.searched()]
            _require_change(trial.result(), others, setup.plan)
            trial.complete(yardstick.estimate(trial.result(), setup.panel))
        best = leader(study.searched())
        observer.finished(trial.result(), best)
        if best is not None and (before is None or best.number != before.number):
            write_recipe(best.recipe, folder, setup.merger.references())
        if time.monotonic() - reported > _REPORT_EVERY_S:
            write_outcome(read_outcome(folder, study), folder, setup.merger.references())
            reported = time.monotonic()


def _confirm(
    study: Study, setup: Setup, yardstick: Yardstick, folder: Path, observer: Observer
) -> None:
    """Choose the best of the few best on fresh seeds, then measure it against the baselines on others.

    The luckiest trial wins a search, so its own score flatters it; seeds that no choice was made on
    do not.
    """
    complete = [r for r in study.searched() if r.state == "complete" and r.value]
    if not complete:
        raise RunError("no trial was completed, so there is no merge to confirm")
    complete.sort(key=mean, reverse=True)
    chosen = {r.recipe.digest(): r for r in reversed(complete)}
    candidates = sorted(chosen.values(), key=mean, reverse=True)[: setup.config.heldout.candidates]
    selected = []
    for candidate in candidates:
        trial = study.book("select", candidate.name, candidate.recipe)
        observer.started("select", trial.name, len(setup.select_panel))
        _must(trial, setup.select_panel, setup, observer, None)
        if not trial.is_complete:
            trial.complete(yardstick.estimate(trial.result(), setup.select_panel))
        observer.finished(trial.result(), None)
        selected.append(trial.result())
    best = max(selected, key=mean)
    recipes = {name: setup.baseline(name) for name in BASELINES} | {best.name: best.recipe}
    for name, recipe in recipes.items():
        trial = study.book("heldout", name, recipe)
        observer.started("heldout", name, len(setup.heldout_panel))
        _must(trial, setup.heldout_panel, setup, observer, folder)
        if not trial.is_complete:
            trial.complete(yardstick.estimate(trial.result(), setup.heldout_panel))
        observer.finished(trial.result(), None)


def _must(
    trial: Trial, panel: Sequence[Prompt], setup: Setup, observer: Observer, folder: Path | None
) -> None:
    """Judge a recipe that the run cannot do without; RunError if it fails."""
    keep = pictures_of(folder, trial.stage, trial.name) if folder else None
    try:
        judge(trial, panel, setup, observer, keep)
    except TrialError as error:
        trial.fail(str(error))
        raise RunError(f"{trial.stage} {trial.name} cannot be judged: {error}") from error


def _require_change(result: Result, others: Sequence[Result], plan: Plan) -> None:
    """RunError if another merge, of clearly other weights, has made the very same images."""
    for other in others:
        same = result.images and dict(result.images) == dict(other.images)
        if same and _distance(result, other, plan) > 0.1:
            raise RunError(
                f"{other.name} and {result.name} have different weights, but all their images are the "
                f"same: A and B are alike in what is searched, or the back end does not load the merge"
            )


def _distance(one: Result, other: Result, plan: Plan) -> float:
    """Mean difference of the searched weights; models count as wholly different ones."""
    if one.recipe.method != other.recipe.method:
        return float(one.recipe.digest() != other.recipe.digest())
    searched = [plan.space.names[member] for p in plan.space.parameters for member in p.members]
    apart = [abs(one.recipe.weights[w][b] - other.recipe.weights[w][b]) for w, b in searched]
    return sum(apart) / len(apart)


def check_folder(setup: Setup, folder: Path) -> None:
    """ConfigError or CheckpointError if `setup` cannot run in `folder`: another run's, or no space."""
    if (folder / "study.db").is_file():
        open_study(folder).require_same(setup.identity())
    if setup.config.output.save_best:
        setup.merger.merge(setup.baseline("a")).require_space(folder / "best.safetensors")


@dataclass(frozen=True)
class TryOut:
    """What one merge and one image took, in seconds, with the first image's scores.

    `images` and `trials` are those of the whole run, `run_s` its estimated time.
    """

    merge_s: float
    image_s: float
    scores: Mapping[str, float]
    images: int
    trials: int

    @property
    def run_s(self) -> float:
        return self.images * self.image_s + self.trials * self.merge_s


def try_out(setup: Setup) -> TryOut:
    """One merge, one batch of images, their scores; TrialError if any is not to be had."""
    recipe = setup.baseline("even")
    # The first merge also builds the live model, so it is not the one that is timed.
    setup.backend.load(recipe, setup.merger.merge(recipe))
    start = time.monotonic()
    setup.backend.load(recipe, setup.merger.merge(recipe))
    merged = time.monotonic()
    batch = setup.panel[: setup.backend.batch]
    scores = _score(setup.scorers, list(setup.backend.generate(batch)))
    per_image = (time.monotonic() - merged) / len(batch)
    trials = setup.n_trials + 2 * len(BASELINES) + 1 + setup.config.heldout.candidates
    return TryOut(merged - start, per_image, scores[0], setup.n_images(), trials)


def _score(scorers: Mapping[str, Scorer], samples: Sequence[Sample]) -> list[dict[str, float]]:
    """The scores of each sample; TrialError for a scorer that returns anything but finite numbers."""
    table: list[dict[str, float]] = [{} for _ in samples]
    for name, judge_of in scorers.items():
        scores = judge_of(samples)
        if len(scores) != len(samples):
            raise TrialError(f"scorer {name} gave {len(scores)} scores for {len(samples)} images")
        for row, score in zip(table, scores, strict=True):
            if not math.isfinite(score):
                raise TrialError(f"scorer {name} gave {score}")
            row[name] = float(score)
    return table


def _n_finished(study: Study) -> int:
    return sum(result.state != "running" for result in study.searched())


def _batches(panel: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(panel), size):
        yield panel[start : start + size]


def _digest(sample: Sample) -> str:
    return hashlib.sha256(sample.image.tobytes()).hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the run folder; RunError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{folder}: another process is running here; wait for it or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()
