"""One trial: merge, generate, score, image by image; what it has is not made again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from bayesian_merger import album, junk
from bayesian_merger.backends import Differentiable
from bayesian_merger.data import (
    MOST_SCORE,
    Prompt,
    Recipe,
    Result,
    Sample,
)
from bayesian_merger.desk import Desk
from bayesian_merger.errors import (
    MergerError,
    RunError,
    SkippedError,
    TrialError,
    first_line,
)
from bayesian_merger.pairing import Rivals, compared
from bayesian_merger.scorers import Attended, DifferentiableScorer, Scorer
from bayesian_merger.setup import Setup, judges
from bayesian_merger.study import Trial
from bayesian_merger.study.proposals import FRESH
from bayesian_merger.values import JUNK, Yardstick

# Errors of ours say what they mean for the run; a full disk or a lost server stops it.
_NOT_OF_ONE_TRIAL = (MergerError, OSError)
NEAR = 0.1
"""Merges whose weights differ by more on average do not make the same images by chance."""
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


class Silence:
    """An observer that says nothing."""

    def planned(self, images: int) -> None: ...

    def started(self, stage: str, name: str, images: int) -> None: ...

    def judged(self, images: int, made: bool) -> None: ...

    def finished(self, result: Result, leader: Result | None) -> None: ...

    def noted(self, text: str) -> None: ...


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
    done = trial.judged(follows=yardstick is not None)
    # What a person has skipped is missing from a complete one.
    todo = [p for p in panel if p.index not in done] if not trial.is_complete else []
    if yardstick and trial.fault:
        raise TrialError(trial.fault)
    observer.judged(len(panel) - len(todo), made=False)
    if not todo:
        return
    start = time.monotonic()
    load(setup, trial.recipe)
    trial.spend(merge=time.monotonic() - start)
    pieces = followed(setup, todo, yardstick) if yardstick else _plain(setup, panel, done)
    faults: list[str] = []
    marked: Counter[str] = Counter()
    keep = album.folder_of(folder, trial.stage, trial.name) if folder else None
    rivals = Rivals(setup, trial, others, folder)
    # Whatever fails, no image is made any more afterwards: an error keeps what it passes alive.
    with _Beside() as beside, closing(_scored(setup, pieces, rivals, beside)) as scored:
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
                    if not marks and is_double(sample, digest, trial.result(), others, setup):
                        marks = fined(setup, sample, ["duplicate"])
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


class _Beside:
    """Calls done one after the other in a thread, for whose end is waited unless by an interruption."""

    def __init__(self) -> None:
        self._last: Thread | None = None

    def submit(self, call: Callable[[], _T]) -> Future[_T]:
        """What the call will give."""
        found: Future[_T] = Future()

        def work(earlier: Thread | None = self._last) -> None:
            if earlier:
                earlier.join()
            try:
                found.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                found.set_exception(error)

        # A daemon, as Python waits at its end for every other thread.
        self._last = Thread(target=work, daemon=True)
        self._last.start()
        return found

    def __enter__(self) -> _Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A scorer may take minutes.
        if self._last and kind is not KeyboardInterrupt:
            self._last.join()


def _scored(
    setup: Setup, pieces: Generator[_Piece, None, None], rivals: Rivals, beside: _Beside
) -> Generator[_Scored, None, None]:
    """The pieces with their scores; while one is scored the next is made, if that is done elsewhere."""
    made = _timed(pieces)
    if not getattr(setup.backend, "is_remote", False):
        with closing(pieces):
            yield from (_score_of(setup, rivals, *one) for one in made)
        return
    # A person who is still asked would hold up the end.
    with closing(pieces), _withdrawing(setup):
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
            following = beside.submit(partial(_score_of, setup, rivals, *one)) if one else None
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
    marked = [fined(setup, sample, junk.marks(sample.image)) for sample in piece.samples]
    found: Sequence[dict[str, float] | None]
    if setup.comparer:
        with no_value("the choice", passing=(RunError,)):
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


def fined(setup: Setup, sample: Sample, marks: Sequence[str]) -> list[str]:
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


def is_double(
    sample: Sample, digest: str, result: Result, others: Sequence[Result], setup: Setup
) -> bool:
    """Whether a merge of clearly other weights has made the very same image."""
    return setup.config.guards.duplicate != "off" and any(
        other.images.get(sample.prompt.index) == digest and distance(result, other, setup) > NEAR
        for other in others
        if other.state != "failed"
    )


def judge_and_follow(
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
    for batch in list(batches(panel, setup.backend.batch)):
        if any(prompt.index not in done for prompt in batch):
            yield _Piece(generate(setup, batch), None)


def _one_by_one(setup: Setup, prompts: Sequence[Prompt]) -> Generator[_Piece, None, None]:
    """Images as they come; TrialError if any is not to be had."""
    waiting = {prompt.index for prompt in prompts}
    with _ended(setup.backend.generate(prompts)) as samples:
        while waiting:
            with no_value("the back end", passing=_NOT_OF_ONE_TRIAL):
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


def followed(
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
            with no_value(f"scorer {name}", passing=(torch.OutOfMemoryError,)):
                scores = differentiable_scores(judge_of, pixels[rows], [some[i] for i in rows])
            shares = total.new_tensor([factors[i][name] for i in rows])
            total = total.index_add(
                0, torch.tensor(rows, device=total.device), shares * scores.to(total)
            )
        return total

    with _ended(engine.follow(prompts, value, setup.space.searched, setup.plan.last)) as pieces:
        while True:
            with no_value("the gradient", passing=_NOT_OF_ONE_TRIAL):
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


def differentiable_scores(judge_of: Scorer, pixels: Tensor, some: Sequence[Prompt]) -> Tensor:
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


def load(setup: Setup, recipe: Recipe) -> None:
    """Merge, and put the merge into the back end; TrialError if that fails.

    CheckpointError if a model's file was changed by then.
    """
    with no_value("the merge", passing=_NOT_OF_ONE_TRIAL):
        setup.merger.require_unchanged()
        setup.backend.load(recipe, setup.merger.merge(recipe))
        setup.merger.require_unchanged()


def generate(setup: Setup, batch: Sequence[Prompt]) -> list[Sample]:
    """One image for each prompt, in order; TrialError if any is not to be had."""
    with no_value("the back end", passing=_NOT_OF_ONE_TRIAL):
        samples = list(setup.backend.generate(batch))
    made = [sample.prompt.index for sample in samples]
    if made != [prompt.index for prompt in batch]:
        raise TrialError(
            f"the back end made {len(made)} images for {len(batch)} prompts, or others"
        )
    return samples


@contextmanager
def no_value(part: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever goes wrong is a TrialError that names `part`, but for errors of the kinds `passing`."""
    try:
        yield
    except passing:
        raise
    except TrialError as error:
        raise TrialError(f"{part}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise TrialError(
            f"{part}: out of GPU memory; close other programs on the GPU, or let scorers work on the "
            f"CPU (device = 'cpu')"
        ) from error
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
        with no_value(f"scorer {name}", passing=(RunError,)):
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


def batches(panel: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """The panel in batches of prompts with equal settings."""
    alike: dict[object, list[Prompt]] = {}
    for prompt in panel:
        alike.setdefault(prompt.settings, []).append(prompt)
    for prompts in alike.values():
        for start in range(0, len(prompts), size):
            yield prompts[start : start + size]


def distance(one: Result, other: Result, setup: Setup) -> float:
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
