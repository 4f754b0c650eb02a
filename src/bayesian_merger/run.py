"""One trial, and the loop around it.

config -> space -> ask -> merge -> generate -> score -> tell -> report
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from bayesian_merger import album, junk, pairs
from bayesian_merger.backends import Backend, Differentiable, Exclusive
from bayesian_merger.checkpoint import remove_parts
from bayesian_merger.data import (
    MOST_SCORE,
    Compromise,
    Estimate,
    Outcome,
    Prompt,
    Recipe,
    Result,
    Sample,
)
from bayesian_merger.desk import Desk
from bayesian_merger.errors import (
    CheckpointError,
    ConfigError,
    MergerError,
    NothingChangedError,
    RunError,
    SkippedError,
    TrialError,
    first_line,
)
from bayesian_merger.merge import Merger
from bayesian_merger.outcome import (
    has_study,
    open_study,
    ranking,
    read_outcome,
    write_outcome,
    write_recipe,
)
from bayesian_merger.pairing import Rivals, compared
from bayesian_merger.scorers import Attended, DifferentiableScorer, Scorer
from bayesian_merger.setup import BASELINES, Setup, judges
from bayesian_merger.study import Stage, Study, Trial, storage_errors
from bayesian_merger.study.proposals import FRESH, RECOMMENDED, Objective, Plan, Proposer
from bayesian_merger.values import JUNK, Measure, Yardstick, weighted_mean

_FAILURES_IN_A_ROW = 3
# Errors of ours say what they mean for the run; a full disk or a lost server stops it.
_NOT_OF_ONE_TRIAL = (MergerError, OSError)
_REPORT_EVERY_S = 60.0
# How far apart a scorer's two ways to the same score may be, as a share of the largest.
_ALIKE = 0.1
_TELL_EVERY = 5
# So many images of merges whose weights differ by more on average are not the same by chance.
_TELLING, _NEAR = 3, 0.1
_MOST_COMPROMISES = 8
_BLANK = f"{JUNK}blank"
_T = TypeVar("_T")


class Observer(Protocol):
    """Is told how the run goes on; the library itself prints nothing."""

    def planned(self, images: int) -> None:
        """The run will have made about so many images when it is done."""
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


@runtime_checkable
class Host(Observer, Protocol):
    """An observer that lets a person answer what a scorer asks."""

    def asked(self, desk: Desk) -> None:
        """Show what is asked at this desk, from now until it is closed."""
        ...


class _Piece(NamedTuple):
    """Images that were made at once, and their slopes by each parameter, if these are wanted.

    Where they told none, `fault` is why, or else the score does not depend on the merge.
    """

    samples: Sequence[Sample]
    slopes: Mapping[str, float] | None
    fault: str = ""


def judge(
    trial: Trial,
    panel: Sequence[Prompt],
    setup: Setup,
    observer: Observer,
    folder: Path | None,
    yardstick: Yardstick | None = None,
    others: Sequence[Result] = (),
) -> None:
    """One trial: merge, generate, score, image by image; what the trial has is not made again.

    Images go to their place in the run's `folder`, if given, before their scores are stored. With a
    `yardstick` the slopes of the value by each parameter are measured too, a few images at once.
    `others` are what its images must differ from, and what they are compared with in pairs. TrialError
    if the merge, an image, a score or any slope is not to be had, or if an image is junk that fails it.
    """
    done = trial.scores.keys() if yardstick is None else trial.followed
    # What a person has skipped is missing from a complete one.
    todo = [p for p in panel if p.index not in done] if not trial.is_complete else []
    if yardstick and trial.fault:
        raise TrialError(trial.fault)
    observer.judged(len(panel) - len(todo), made=False)
    if not todo:
        return
    start = time.monotonic()
    _load(setup, trial.recipe)
    trial.spend(merge=time.monotonic() - start)
    pieces = _followed(setup, todo, yardstick) if yardstick else _plain(setup, panel, done)
    faults: list[str] = []
    marked: Counter[str] = Counter()
    keep = album.folder_of(folder, trial.stage, trial.name) if folder else None
    rivals = Rivals(setup, trial, others, folder)
    # Whatever fails, no image is made any more afterwards: an error keeps what it passes alive.
    with closing(_scored(setup, pieces, rivals)) as scored:
        for (samples, slopes, fault), scores, spent in scored:
            fresh = sum(sample.prompt in todo for sample in samples)
            for sample, found in zip(samples, scores, strict=True):
                if sample.prompt.index not in trial.scores:
                    if keep:
                        own = {
                            n: x for n, x in (found or {}).items() if n in setup.measure.weights
                        }
                        album.save(sample, keep, own, trial.recipe.digest())
                    if found is None:
                        continue
                    made_of = sample.prompt.to_dict() if sample.prompt.index >= FRESH else None
                    digest = album.digest_of(sample.image)
                    marks = [key for key in found if key.startswith(JUNK)]
                    if not marks and _is_double(sample, digest, trial.result(), others, setup):
                        marks = _fined(setup, sample, ["duplicate"])
                    told = {**found, **dict.fromkeys(marks, 1.0)}
                    trial.record(sample.prompt.index, told, digest, made_of)
                    marked.update(marks)
            if slopes is not None:
                # Last: what has slopes has all.
                trial.follow([sample.prompt.index for sample in samples], slopes)
            if fault:
                trial.unfollowed(fault)
                faults += [fault] * len(samples)
            trial.spend(**spent)
            observer.judged(fresh, made=True)
            if yardstick and trial.fault:
                raise TrialError(trial.fault)
    if not trial.scores:
        raise SkippedError("all its images were skipped")
    for name in sorted(rivals.lost):
        observer.noted(
            f"{trial.name} could not be compared with {name} everywhere, whose pictures are gone"
        )
    for mark, n_marked in marked.items():
        what = mark.removeprefix(JUNK)
        observer.noted(f"{n_marked} of {len(todo)} images of {trial.name} are junk: {what}")
    if faults:
        what = f"{trial.name} was judged without its gradient"
        if any(piece.by for piece in trial.result().slopes):
            what = f"{len(faults)} of {len(todo)} images of {trial.name} told no gradient"
        observer.noted(f"{what}: {faults[-1]}")


class _Scored(NamedTuple):
    """A piece, the scores of its images, None for those that were skipped, and the seconds it took."""

    piece: _Piece
    scores: Sequence[Mapping[str, float] | None]
    spent: Mapping[str, float]


def _scored(
    setup: Setup, pieces: Generator[_Piece, None, None], rivals: Rivals
) -> Generator[_Scored, None, None]:
    """The pieces with their scores; while one is scored the next is made, if that is done elsewhere."""
    made = _timed(pieces)
    if not getattr(setup.backend, "is_remote", False):
        with closing(pieces):
            yield from (_score_of(setup, rivals, *one) for one in made)
        return
    # A person who is still asked would hold up the end.
    with closing(pieces), ThreadPoolExecutor(1) as scoring, _withdrawing(setup):
        waiting: Future[_Scored] | None = None
        while True:
            try:
                one = next(made, None)
            except KeyboardInterrupt:
                raise
            except BaseException:
                # The fault is of the next; this one is not lost, or has a fault that counts less.
                with suppress(TrialError):
                    done = waiting.result() if waiting else None
                    if done:
                        yield done
                raise
            following = scoring.submit(_score_of, setup, rivals, *one) if one else None
            if waiting:
                yield waiting.result()
            if following is None:
                return
            waiting = following


@contextmanager
def _withdrawing(setup: Setup) -> Iterator[None]:
    """What a person is asked is withdrawn afterwards, if nobody waits for it any more."""
    try:
        yield
    finally:
        for judge_of in setup.scorers.values():
            if isinstance(judge_of, Attended):
                judge_of.withdraw()


def _timed(pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, float]]:
    """Each piece with the seconds that it took."""
    start = time.monotonic()
    for piece in pieces:
        yield piece, time.monotonic() - start
        start = time.monotonic()


def _score_of(setup: Setup, rivals: Rivals, piece: _Piece, made_s: float) -> _Scored:
    start = time.monotonic()
    marked = [_fined(setup, sample, junk.marks(sample.image)) for sample in piece.samples]
    found: Sequence[dict[str, float] | None]
    if setup.comparer:
        with _no_value("the choice", passing=(RunError,)):
            found = compared(setup.comparer, piece.samples, marked, rivals.of)
    else:
        rows = score(setup.scorers, piece.samples, setup.only)
        for row in rows:
            setup.measure.require(row)
        # A person may have skipped it.
        found = [row if setup.measure.weights.keys() & row.keys() else None for row in rows]
    for scores, marks in zip(found, marked, strict=True):
        if scores is not None:
            scores.update(dict.fromkeys(marks, 1.0))
    return _Scored(piece, found, {"generate": made_s, "score": time.monotonic() - start})


def _fined(setup: Setup, sample: Sample, marks: Sequence[str]) -> list[str]:
    """The marks of an image that cost a penalty, as they stand among its scores.

    TrialError for one that fails the trial.
    """
    found = []
    for mark in marks:
        cost = setup.config.guards.of(mark)
        if cost == "fail":
            prompt = sample.prompt
            raise TrialError(
                f"the image of payload {prompt.payload} and seed {prompt.seed} is junk: {mark}; with a "
                f"number for guards.{mark} it would only cost that"
            )
        if cost != "off":
            found.append(f"{JUNK}{mark}")
    return found


def _is_double(
    sample: Sample, digest: str, result: Result, others: Sequence[Result], setup: Setup
) -> bool:
    """Whether a merge of clearly other weights has made the very same image."""
    return setup.config.guards.duplicate != "off" and any(
        other.images.get(sample.prompt.index) == digest and _distance(result, other, setup) > _NEAR
        for other in others
        if other.state != "failed"
    )


def _judge_and_follow(
    trial: Trial,
    panel: Sequence[Prompt],
    setup: Setup,
    observer: Observer,
    folder: Path | None,
    yardstick: Yardstick,
    others: Sequence[Result] = (),
) -> None:
    """`judge` with slopes, or without them where they cannot be had."""
    try:
        judge(trial, panel, setup, observer, folder, yardstick, others)
        return
    except TrialError as error:
        reason = str(error)
    # Outside the clause, whose error holds on to the memory of the graph.
    judge(trial, panel, setup, observer, folder, others=others)
    trial.unfollowed(reason)
    observer.noted(f"{trial.name} was judged without its gradient: {reason}")


def _plain(setup: Setup, panel: Sequence[Prompt], done: Set[int]) -> Generator[_Piece, None, None]:
    """Images in batches, without those batches that are done.

    The panel is cut at the same places whatever is missing, so that each image repeats exactly. One that
    is made elsewhere does so by itself.
    """
    if getattr(setup.backend, "is_remote", False):
        yield from _one_by_one(setup, [prompt for prompt in panel if prompt.index not in done])
        return
    for batch in list(_batches(panel, setup.backend.batch)):
        if any(prompt.index not in done for prompt in batch):
            yield _Piece(_generate(setup, batch), None)


def _one_by_one(setup: Setup, prompts: Sequence[Prompt]) -> Generator[_Piece, None, None]:
    """Images as they come; TrialError if any is not to be had."""
    waiting = {prompt.index for prompt in prompts}
    with _ended(setup.backend.generate(prompts)) as samples:
        while waiting:
            with _no_value("the back end", passing=_NOT_OF_ONE_TRIAL):
                sample = next(samples, None)
            if sample is None or sample.prompt.index not in waiting:
                n_made = len(prompts) - len(waiting)
                raise TrialError(
                    f"the back end made {n_made} images for {len(prompts)} prompts, or others"
                )
            waiting.remove(sample.prompt.index)
            yield _Piece([sample], None)


@contextmanager
def _ended(samples: Iterator[_T]) -> Iterator[Iterator[_T]]:
    """An iterator that makes nothing more afterwards, if it is a generator."""
    try:
        yield samples
    finally:
        if isinstance(samples, Generator):
            samples.close()


def _followed(
    setup: Setup, prompts: Sequence[Prompt], yardstick: Yardstick
) -> Generator[_Piece, None, None]:
    """Images in pieces, with the derivative of their mean value by each parameter."""
    engine, scorers = setup.backend, setup.scorers
    assert isinstance(engine, Differentiable)

    def value(pixels: Tensor, some: Sequence[Prompt]) -> Tensor:
        total = pixels.new_zeros(len(some))
        factors = [yardstick.factors(setup.judges(prompt)) for prompt in some]
        for name, judge_of in scorers.items():
            rows = [i for i, own in enumerate(factors) if name in own]
            if not rows:
                continue
            # Of memory that is too small the back end hears itself, as it may do with less.
            with _no_value(f"scorer {name}", passing=(torch.OutOfMemoryError,)):
                scores = _differentiable(judge_of, pixels[rows], [some[i] for i in rows])
            shares = total.new_tensor([factors[i][name] for i in rows])
            total = total.index_add(
                0, torch.tensor(rows, device=total.device), shares * scores.to(total)
            )
        return total

    with _ended(engine.follow(prompts, value, setup.space.searched, setup.plan.last)) as pieces:
        while True:
            with _no_value("the gradient", passing=_NOT_OF_ONE_TRIAL):
                piece = next(pieces, None)
            if piece is None:
                return
            slopes, fault = setup.space.slopes(piece.slopes), piece.fault
            for name, slope in slopes.items():
                if not abs(slope) < MOST_SCORE:
                    fault = f"the slope by {name} is {slope}"
            # Of a score that does not depend on the merge there is nothing to follow.
            known = slopes if any(slopes.values()) and not fault else {}
            yield _Piece(piece.samples, known, fault)


def _differentiable(judge_of: Scorer, pixels: Tensor, some: Sequence[Prompt]) -> Tensor:
    """Scores [N] of pixels [N, 3, height, width]; TrialError if no gradient can be taken of them."""
    assert isinstance(judge_of, DifferentiableScorer)
    scores = judge_of.differentiable(pixels, [prompt.prompt for prompt in some])
    if scores.shape != (len(some),):
        raise TrialError(
            f"differentiable gave the shape {tuple(scores.shape)}, not ({len(some)},)"
        )
    if not bool(torch.isfinite(scores).all()):
        raise TrialError(f"differentiable gave {scores.tolist()}")
    if pixels.requires_grad and not scores.requires_grad:
        raise TrialError("what differentiable gave does not depend on the pixels")
    return scores


def run(setup: Setup, folder: Path, observer: Observer, more: int | None = None) -> Outcome:
    """The whole run in `folder`, from wherever an earlier start of it ended.

    `more` images are spent beyond those of a finished search; 0 takes back what was to be spent so.

    RunError if it cannot go on, ConfigError if the folder belongs to another configuration.
    """
    with locked(folder), storage_errors(), ExitStack() as stack:
        remove_parts(folder)
        check_folder(setup, folder)
        _take(setup.backend)
        for name, judge_of in setup.scorers.items():
            if isinstance(judge_of, Attended):
                if not isinstance(observer, Host):
                    raise ConfigError(f"scorer {name} asks a person, and here nobody can answer")
                stack.callback(judge_of.leave)
                observer.asked(judge_of.attend(folder, setup.n_questions()))
        study = open_study(folder, setup.config.search.storage, create=True)
        setup = _as_begun(setup, study)
        study.require_same(setup.identity)
        study.require_whole()
        is_finished = bool(study.about) and read_outcome(folder, study).finished
        if note := _extend(study, more, is_finished):
            observer.noted(note)
        setup = replace(setup, plan=_extended(setup.plan, study.target))
        study.begin(setup.identity, setup.about())
        observer.planned(setup.n_images())
        for note in setup.notes:
            observer.noted(note)

        yardstick = baselines(study, setup, folder, observer)
        _observe_brought(study, setup, yardstick)
        _search(study, setup, yardstick, folder, observer)
        if not read_outcome(folder, study).finished:
            _confirm(study, setup, yardstick, folder, observer)
        elif more is None:
            observer.noted("the run was finished; --more N extends it by N images")

        outcome = read_outcome(folder, study)
        assert outcome.best is not None
        write_outcome(outcome, folder, setup.merger.references())
        if setup.config.output.save_best:
            try:
                # On the CPU, as `bayesian-merger merge` does it, so that both write the same bytes.
                merged = Merger(setup.merger.models).merge(outcome.best.recipe)
                merged.save(folder / "best.safetensors")
            except CheckpointError as error:
                raise RunError(
                    f"{error}; the report and best.toml are written, and the same command tries again"
                ) from error
        return outcome


def _take(engine: Backend) -> None:
    """Have the back end before anything is begun; RunError if it is not to be had."""
    try:
        if isinstance(engine, Exclusive):
            engine.take()
    except TrialError as error:
        raise RunError(f"the back end: {error}; the same command tries it again") from error


def _extend(study: Study, more: int | None, is_finished: bool) -> str:
    """Let the search spend `more` images or take them back; what there is to say of it."""
    if more == 0:
        left = max(0, study.target - study.n_judged)
        study.extend(0)
        return f"{left} images are taken back" if left else "there was nothing to take back"
    if more and is_finished:
        study.extend(more)
        return f"{more} images beyond the {study.n_judged} of the finished run"
    if more and not study.target:
        return "the run is not finished; --more extends it when it is"
    return ""


def _as_begun(setup: Setup, study: Study) -> Setup:
    """With the optimiser that `auto` chose when the run began, if it can still be had."""
    begun = study.identity.get("search", {}).get("optimiser")
    is_free = setup.config.search.optimiser == "auto"
    if is_free and (begun == "bayes" or (begun == "gradient" and not setup.rigid)):
        return replace(setup, plan=replace(setup.plan, optimiser=begun))
    return setup


def _extended(plan: Plan, target: int) -> Plan:
    """The plan of a run that was extended to `target` images; what had ended it ends it no more."""
    if not target:
        return plan
    ended_early = plan.stop is not None or plan.n_iters is not None
    images = target if ended_early else max(target, plan.images or 0)
    return replace(plan, images=images, n_iters=None, stop=None)


def baselines(study: Study, setup: Setup, folder: Path, observer: Observer) -> Yardstick:
    """Judge A, the even merge and B; they set the scale of the values and anchor the search."""
    trials = _judged_baselines("baseline", study, setup, setup.panel, folder, observer)
    results = [trial.result() for trial in trials]
    yardstick = _yardstick(setup, results)
    values = _values(setup, yardstick, results, setup.panel)
    for trial in trials:
        if not trial.is_complete:
            trial.complete(values[trial.name])
        if params := setup.params(trial.recipe):
            study.observe(trial.result(), params, setup.plan)
        observer.finished(trial.result(), None)
    return yardstick


def _yardstick(setup: Setup, baselines: Sequence[Result]) -> Yardstick:
    """What turns scores into values; of choices there are none."""
    if setup.comparer:
        return Yardstick(setup.measure)
    return Yardstick.from_baselines(setup.measure, baselines, setup.panel)


def _values(
    setup: Setup, yardstick: Yardstick, results: Sequence[Result], panel: Sequence[Prompt]
) -> dict[str, Estimate]:
    """The values of results on a panel; with pairs, their leads over the even merge or their mean."""
    if setup.comparer:
        return pairs.leads(results)
    return {result.name: yardstick.estimate(result, panel) for result in results}


def _judged_baselines(
    stage: Stage,
    study: Study,
    setup: Setup,
    panel: Sequence[Prompt],
    folder: Path,
    observer: Observer,
) -> list[Trial]:
    """A, the even merge and B, judged in a stage and not yet completed; RunError if one cannot be."""
    trials = [study.book(stage, name, setup.baseline(name)) for name in BASELINES]
    keep = _place(setup, folder, is_compared=True)
    for number, trial in enumerate(trials, start=1):
        observer.started(stage, trial.name, len(panel))
        try:
            follows = stage == "baseline" and trial.name == "even" and setup.follows_even
            # One that is complete without its slopes had none to be had.
            if follows and not trial.is_complete:
                measure = Yardstick(setup.measure)
                _judge_and_follow(trial, panel, setup, observer, keep, measure)
            else:
                before = [t.result() for t in trials[: number - 1]]
                judge(trial, panel, setup, observer, keep, others=before)
            _require_change([t.result() for t in trials[:number]], setup)
            _require_pictures(trial.result())
        except TrialError as error:
            # What a back end made that fails here is not to be trusted, hence all or none.
            for doubtful in trials:
                if not doubtful.is_complete:
                    doubtful.fail(str(error))
            what = "baseline" if stage == "baseline" else "held-out"
            raise RunError(
                f"{what} {trial.name} cannot be judged: {error}; the same command tries it again"
            ) from error
    return trials


def _observe_brought(study: Study, setup: Setup, yardstick: Yardstick) -> None:
    """Hand what an earlier run has judged to the optimiser, as far as it can be compared."""
    counted = {prompt.index for prompt in setup.panel if prompt.weight > 0}
    for result in study.judged("brought"):
        params = setup.params(result.recipe)
        if params is None or not result.scores or setup.comparer:
            continue
        if counted & result.scores.keys():
            value = yardstick.trial(result, setup.panel)
        elif setup.plan.optimiser in ("bayes", "gradient"):
            # Of other images: these learn how easy they are, other optimisers would not.
            values = [yardstick.value(scores) for scores in result.scores.values()]
            value = weighted_mean(values, [1.0] * len(values))
        else:
            continue
        study.observe(result.but(value=value), params, setup.plan)


def _search(
    study: Study, setup: Setup, yardstick: Yardstick, folder: Path, observer: Observer
) -> None:
    """Ask, judge, tell, until the trials are spent; a failed trial only has no value."""
    failures = 0
    is_told = False
    reported = -math.inf
    # What an earlier, shorter run of this folder has confirmed is not replaced by a mere leader.
    is_confirmed = any(r.name not in BASELINES for r in study.judged("heldout"))
    models = () if is_confirmed else setup.merger.references()
    proposer = searching(study, setup, yardstick)
    before = [r for r in study.searched() if r.state != "running"]
    n_before = sum(len(result.scores) for result in before)
    observer.judged(n_before, made=False)
    if not proposer.is_over():
        study.compromise()  # that of a shorter run holds no more
        study.slice({})
        if before:
            told = f"{n_before} images of {len(before)} trials are judged already"
            observer.noted(f"the search goes on: {told}")

    while not proposer.is_over():
        error = attempt(study, proposer, setup, yardstick, folder, observer)
        if not isinstance(error, SkippedError):
            failures = failures + 1 if error else 0
        if isinstance(error, NothingChangedError):
            raise RunError(
                f"{error}. What was judged before may be false too: begin anew in another --run-dir"
            ) from error
        if failures >= _FAILURES_IN_A_ROW:
            raise RunError(f"{failures} trials in a row failed, the last with: {error}") from error
        is_time = study.n_finished % _TELL_EVERY == 0 and study.n_finished >= proposer.plan.n_first
        if is_time and (best := proposer.best()):
            study.expect(setup.recipe(best[0]), best[1])
            if models:
                write_recipe(setup.recipe(best[0]), folder, models)
        observer.finished(study.searched()[-1], study.leader)
        if study.given_up and not is_told:
            is_told = True
            observer.noted(f"{study.given_up}, so the search goes on by the scores alone")
        if time.monotonic() - reported > _REPORT_EVERY_S:
            reported = time.monotonic()
            try:
                write_outcome(read_outcome(folder, study), folder, models, figures=False)
            except PermissionError as error:  # on Windows, a program that has the page open
                observer.noted(f"the report could not be renewed ({error})")
    if proposer.has_stopped:
        observer.noted(f"the search ends after {study.n_judged} images, as search.stop says")
    front = proposer.front(_MOST_COMPROMISES) if setup.plan.objectives else []
    study.compromise(
        [Compromise(setup.recipe(params), values) for params, values in front],
        {
            baseline.name: {
                one.name: _at(one, baseline, setup, yardstick) for one in setup.plan.objectives
            }
            for baseline in study.judged("baseline")
            if baseline.state == "complete"
        },
    )
    if len(study.candidates) < setup.config.heldout.candidates:
        wanted = setup.config.heldout.candidates
        # Parameters that the chosen method lacks make no other merge.
        few: dict[str, Result] = {}
        found = proposer.few(2 * wanted)
        if found:
            study.slice(proposer.slices(found[0][1]))
        for name, params, value in found:
            recipe = setup.recipe(params)
            # Choices know merges by their names, and a longer search recommends another.
            is_taken = name == RECOMMENDED or name in BASELINES
            own = f" {recipe.digest()[:6]}" if setup.comparer and is_taken else ""
            few.setdefault(recipe.digest(), Result.recommended(f"{name}{own}", recipe, value))
        recommended = list(few.values())[:wanted]
        study.choose(recommended)
        if recommended and (expected := recommended[0].value):
            study.expect(recommended[0].recipe, expected)


def searching(study: Study, setup: Setup, yardstick: Yardstick) -> Proposer:
    """What proposes the trials; by the gradient it begins beside a parent that beats the even merge.

    That is, if it does so beyond doubt on the images of the baselines.
    """
    origin = None
    if setup.plan.optimiser == "gradient":
        judged = {r.name: r for r in study.judged("baseline") if r.state == "complete"}
        leads = {
            name: yardstick.difference(judged[name], judged["even"], setup.panel)
            for name in ("a", "b")
        }
        best = max(leads, key=lambda name: leads[name].mean)
        origin = setup.beside(best) if leads[best].low > 0 else None
    value = None if setup.comparer else yardstick.value
    return study.searching(replace(setup.plan, origin=origin), value)


def attempt(
    study: Study,
    proposer: Proposer,
    setup: Setup,
    yardstick: Yardstick,
    folder: Path,
    observer: Observer,
) -> TrialError | None:
    """Ask, judge, tell: one trial of the search. The error of a failed one, which only has no value."""
    start = time.monotonic()
    trial = study.ask(proposer, setup.recipe)
    trial.spend(ask=time.monotonic() - start)
    panel = [setup.prompt(i) for i in trial.items or ()]
    observer.started(trial.stage, trial.name, len(panel))
    keep = _place(setup, folder, is_compared=False)
    others = [*study.judged("baseline"), *study.searched()]
    try:
        if trial.follows:
            _judge_and_follow(trial, panel, setup, observer, keep, yardstick, others)
        else:
            judge(trial, panel, setup, observer, keep, others=others)
        _require_change([*study.judged("baseline"), *study.searched()], setup)
    except TrialError as error:
        trial.fail(str(error))
        return error
    if setup.comparer:
        known = [*study.judged("baseline"), *study.searched()]
        trial.complete(pairs.leads([r for r in known if r.state != "failed"])[trial.name])
        return None
    further = [prompt for prompt in panel if prompt.index >= FRESH]
    trial.complete(yardstick.trial(trial.result(), setup.panel, further))
    return None


def _place(setup: Setup, folder: Path, *, is_compared: bool) -> Path | None:
    """The folder, if pictures are kept: those of the comparison of A, B, even and best, or others."""
    wanted = setup.config.output.save_images
    # A picture may be compared with any that was made before.
    is_kept = wanted == "all" or setup.comparer or (wanted == "best" and is_compared)
    return folder if is_kept else None


def _at(objective: Objective, baseline: Result, setup: Setup, yardstick: Yardstick) -> Estimate:
    """What a baseline has of one of several objectives."""
    if objective.kind == "scorer":
        name = objective.name
        own = [p for p in setup.panel if name in baseline.scores.get(p.index, {})]
        return Yardstick(Measure({name: 1.0})).estimate(baseline, own)
    return yardstick.estimate(baseline, [p for p in setup.panel if p.payload == objective.name])


def _confirm(
    study: Study, setup: Setup, yardstick: Yardstick, folder: Path, observer: Observer
) -> None:
    """Choose the best of the few best on fresh seeds, then measure it against the baselines on others.

    The luckiest trial wins a search, so its own score flatters it; seeds that no choice was made on
    do not.
    """
    few = study.candidates[: setup.config.heldout.candidates]
    if not few:
        raise RunError("no trial was completed, so there is no merge to confirm")

    def attempt(stage: Stage, one: Result, panel: Sequence[Prompt]) -> Trial | None:
        # With pairs even a parent is compared with itself, to be compared with the others.
        trial = study.book(stage, one.name, one.recipe, BASELINES if setup.comparer else ())
        keep = _place(setup, folder, is_compared=stage == "heldout")
        observer.started(stage, one.name, len(panel))
        try:
            others = [other for other in study.judged(stage) if other.name != one.name]
            judge(trial, panel, setup, observer, keep, others=others)
            _require_change([*others, trial.result()], setup)
        except TrialError as error:
            trial.fail(str(error))
            observer.finished(trial.result(), None)
            return None
        return trial

    def complete(trials: Sequence[Trial], panel: Sequence[Prompt]) -> None:
        values = _values(setup, yardstick, [trial.result() for trial in trials], panel)
        for trial in trials:
            if not trial.is_complete:
                trial.complete(values[trial.name])
            observer.finished(trial.result(), None)

    # Choices tell of one what they tell of all, hence last.
    panel = setup.select_panel
    several = few if len(few) > 1 else []
    complete([t for one in several if (t := attempt("select", one, panel))], panel)
    panel = setup.heldout_panel
    waiting = _judged_baselines("heldout", study, setup, panel, folder, observer)
    if not setup.comparer:
        complete(waiting, panel)
        waiting = []
    for one in ranking(study, few) or []:
        if best := attempt("heldout", one, panel):
            complete([*waiting, best], panel)
            return
    raise RunError(f"none of the {len(few)} best merges can be judged on fresh seeds")


def _require_pictures(result: Result) -> None:
    """TrialError if all images are junk."""
    marks = [[key for key in scores if key.startswith(JUNK)] for scores in result.scores.values()]
    if marks and all(marks):
        kinds = dict.fromkeys(key.removeprefix(JUNK) for keys in marks for key in keys)
        raise TrialError(f"all its {len(marks)} images are junk: {', '.join(kinds)}")


def _require_change(results: Sequence[Result], setup: Setup) -> None:
    """NothingChangedError if merges of clearly other weights have made the very same images.

    Each image is compared with the one before it of the same prompt and seed. One or two may well be
    alike, so it takes the last three, and all of a merge that was judged on more. What is marked as
    blank tells nothing.
    """
    latest: dict[int, Result] = {}
    alike: list[tuple[Result, Result]] = []
    for now in results:
        if now.state == "failed":
            continue
        told = [i for i in now.images if _BLANK not in now.scores.get(i, {})]
        before = {
            item: latest[item]
            for item in told
            if item in latest and _distance(now, latest[item], setup) > _NEAR
        }
        same = [one for item, one in before.items() if one.images[item] == now.images[item]]
        alike = [*alike, *((one, now) for one in same)] if len(same) == len(before) else []
        latest.update(dict.fromkeys(now.images, now))
    if len(alike) >= min(_TELLING, len(setup.panel)):
        one, now = alike[-1]
        raise NothingChangedError(
            f"{one.name} and {now.name} have different weights, but all their images are the "
            f"same: A and B are alike in what is searched, or the back end does not load the merge"
        )


def _distance(one: Result, other: Result, setup: Setup) -> float:
    """Mean difference of the searched weights; A and B are apart by 1.

    Weights of different methods cannot be compared, and count as equal.
    """
    if one.recipe.method != other.recipe.method:
        return 0.0
    space, weights = setup.space, one.recipe.weights
    names = {space.names[member] for p in space.parameters for member in p.members}
    searched = {(w, b) for w, b in names if b in weights.get(w, {})}
    if not searched:
        return float(one.recipe.digest() != other.recipe.digest())
    apart = [abs(one.recipe.weights[w][b] - other.recipe.weights[w][b]) for w, b in searched]
    return sum(apart) / len(apart)


def check_folder(setup: Setup, folder: Path) -> None:
    """ConfigError or CheckpointError if `setup` cannot run in `folder`: another run's, or no space."""
    storage = setup.config.search.storage
    if has_study(folder, storage):
        study = open_study(folder, storage)
        study.require_same(_as_begun(setup, study).identity)
    best = folder / "best.safetensors"
    if setup.config.output.save_best:
        if any(model.path.resolve() == best.resolve() for model in setup.merger.models):
            raise ConfigError(f"{best} is one of the models, and would be overwritten; move it")
        setup.merger.merge(setup.baseline("a")).require_space(best)


@dataclass(frozen=True)
class TryOut:
    """What one merge and one image took, in seconds, with the first image's scores.

    `images` and `merges` are those of the whole run, `run_s` its estimated time. Of the images so many
    are `followed`, with their slopes, each of which took `followed_s`. `notes` say what is wrong with
    the gradient.
    """

    merge_s: float
    image_s: float
    followed_s: float
    scores: Mapping[str, float]
    images: int
    followed: int
    merges: int
    notes: Sequence[str] = ()

    @property
    def run_s(self) -> float:
        n_plain = self.images - self.followed
        of_images = n_plain * self.image_s + self.followed * self.followed_s
        return of_images + self.merges * self.merge_s


def try_out(setup: Setup) -> TryOut:
    """One merge, one batch of images, their scores; TrialError if any is not to be had."""
    recipe = setup.baseline("even")
    # The first merge also builds the live model, so it is not the one that is timed, and another, as
    # what is loaded already would take no time.
    _load(setup, setup.baseline("a"))
    start = time.monotonic()
    _load(setup, recipe)
    merge_s = time.monotonic() - start
    batch = next(_batches(setup.panel, setup.backend.batch))
    # The first image warms up; of another seed, as servers know what they have made.
    _generate(setup, [replace(batch[0], seed=batch[0].seed ^ 1)])
    warm = time.monotonic()
    samples = _generate(setup, batch)
    # Nobody is asked for a try.
    judges_of = {n: one for n, one in setup.scorers.items() if not isinstance(one, Attended)}
    scores = score(judges_of, samples, setup.only)
    per_image = (time.monotonic() - warm) / len(batch)
    per_followed, n_followed, notes = 0.0, 0, []
    if setup.plan.optimiser == "gradient":
        one = Yardstick(setup.measure)
        try:
            notes = _disagreements(setup.scorers, samples, scores)
            list(_followed(setup, batch[:1], one))  # the same here
            start = time.monotonic()
            faults = [piece.fault for piece in _followed(setup, batch, one) if piece.fault]
            per_followed = (time.monotonic() - start) / len(batch)
            if faults:
                notes.append(f"not every image of {len(batch)} told its gradient: {faults[0]}")
            n_followed = setup.plan.n_images + len(setup.panel) * setup.follows_even
        except TrialError as error:
            notes.append(f"a run would go on by the scores alone, without the gradient: {error}")
    merges = setup.plan.n_trials + 2 * len(BASELINES) + 1 + setup.config.heldout.candidates
    return TryOut(
        merge_s, per_image, per_followed, scores[0], setup.n_images(), n_followed, merges, notes
    )


def _disagreements(
    scorers: Mapping[str, Scorer], samples: Sequence[Sample], scores: Sequence[Mapping[str, float]]
) -> list[str]:
    """Which scorers' gradient is that of another score than they give, in words."""
    images = [np.array(sample.image.convert("RGB")) for sample in samples]
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) / 255
    notes = []
    for name, judge_of in scorers.items():
        with _no_value(f"scorer {name}"), torch.no_grad():
            found = _differentiable(
                judge_of, pixels, [sample.prompt for sample in samples]
            ).tolist()
        own = [row[name] for row in scores]
        worst = max(range(len(own)), key=lambda i: abs(found[i] - own[i]))
        if abs(found[worst] - own[worst]) > _ALIKE * max(map(abs, own)):
            notes.append(
                f"scorer {name} gives an image {own[worst]:.4g}, but its differentiable "
                f"{found[worst]:.4g}, so the search would follow another score"
            )
    return notes


def _load(setup: Setup, recipe: Recipe) -> None:
    """Merge, and put the merge into the back end; TrialError if that fails."""
    with _no_value("the merge", passing=_NOT_OF_ONE_TRIAL):
        setup.backend.load(recipe, setup.merger.merge(recipe))


def _generate(setup: Setup, batch: Sequence[Prompt]) -> list[Sample]:
    """One image for each prompt, in order; TrialError if any is not to be had."""
    with _no_value("the back end", passing=_NOT_OF_ONE_TRIAL):
        samples = list(setup.backend.generate(batch))
    made = [sample.prompt.index for sample in samples]
    if made != [prompt.index for prompt in batch]:
        raise TrialError(
            f"the back end made {len(made)} images for {len(batch)} prompts, or others"
        )
    return samples


@contextmanager
def _no_value(part: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever goes wrong is a TrialError that names `part`, but for errors of the kinds `passing`."""
    try:
        yield
    except passing:
        raise
    except TrialError as error:
        raise TrialError(f"{part}: {error}") from error
    except Exception as error:
        raise TrialError(f"{part}: {type(error).__name__}: {first_line(error)}") from error


def score(
    scorers: Mapping[str, Scorer],
    samples: Sequence[Sample],
    only: Mapping[str, frozenset[str]] | None = None,
) -> list[dict[str, float]]:
    """The scores of each sample, by those that judge its payload.

    TrialError for a scorer that returns anything but finite numbers.
    """
    table: list[dict[str, float]] = [{} for _ in samples]
    judged = [judges(scorers, only or {}, sample.prompt) for sample in samples]
    for name, judge_of in scorers.items():
        rows = [i for i, names in enumerate(judged) if name in names]
        some = [samples[i] for i in rows]
        with _no_value(f"scorer {name}", passing=(RunError,)):
            found = judge_of(some) if some else []
            scores = [None if score is None else float(score) for score in found]
        if len(scores) != len(some):
            raise TrialError(f"scorer {name} gave {len(scores)} scores for {len(some)} images")
        for row, score in zip((table[i] for i in rows), scores, strict=True):
            if score is None:
                continue
            if not abs(score) < MOST_SCORE:
                raise TrialError(f"scorer {name} gave {score}")
            row[name] = score
    return table


def _batches(panel: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """The panel in batches of prompts with equal settings."""
    alike: dict[object, list[Prompt]] = {}
    for prompt in panel:
        alike.setdefault(prompt.settings, []).append(prompt)
    for prompts in alike.values():
        for start in range(0, len(prompts), size):
            yield prompts[start : start + size]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the run folder; ConfigError if one is in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made a run folder ({error.strerror})") from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder}: another process is running here; wait for it or stop it"
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()
