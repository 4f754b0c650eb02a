"""A worker: takes images from the board of a run and judges them, until it is told to leave."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bayesian_merger import config
from bayesian_merger.data import Prompt
from bayesian_merger.errors import CheckpointError, RunError, TakenError, TrialError, first_line
from bayesian_merger.gathering import gathering
from bayesian_merger.judging import Silence, judge, judge_and_follow
from bayesian_merger.outcome import open_study, yardstick_of
from bayesian_merger.run import as_begun, place_of, take
from bayesian_merger.setup import Setup, prepare
from bayesian_merger.study import Stage, Study
from bayesian_merger.study.board import Task
from bayesian_merger.study.seats import pulse
from bayesian_merger.study.storage import storage_errors
from bayesian_merger.values import Yardstick

# How often it looks for work, and at least how often where there has been none for a while.
_POLL_S, _IDLE_S = 0.05, 1.0


def work_as_told(told: Mapping[str, Any], name: str, is_over: Callable[[], bool]) -> None:
    """`work` for the run of the configuration that is told, opened anew as that run has opened it."""
    path = Path(told["config"])
    ready = prepare(config.load(path, told["overrides"]), path.parent, told["title"])
    with closing(ready.backend):
        work(ready, Path(told["run_dir"]), name, is_over)


def work(setup: Setup, folder: Path, name: str, is_over: Callable[[], bool]) -> None:
    """Judge what the board of the run in `folder` offers, until it `is_over`, asked after each image.

    ConfigError if the run has another setup, RunError if nothing can be judged or recorded any more.
    """
    with storage_errors():
        study = open_study(folder, setup.config.search.storage)
    with closing(study):
        _work(setup, study, folder, name, is_over)


def _work(
    setup: Setup, study: Study, folder: Path, name: str, is_over: Callable[[], bool]
) -> None:
    with storage_errors():
        study.waits(lambda text: None, is_over)
        while not study.identity:  # the process that leads the run is about to begin it
            if is_over():
                return
            time.sleep(_POLL_S)
        setup = as_begun(setup, study)
        study.require_same(setup.identity)
        board = study.board()
    take(setup.backend)
    pictures = gathering(setup, folder)
    pause = _POLL_S
    while not is_over():
        with storage_errors():
            task = board.take(name)
        if task is None:
            time.sleep(pause)
            pause = min(1.5 * pause, _IDLE_S)
        else:
            pause = _POLL_S
            notes = _Notes(is_over, partial(pictures.send, task) if pictures else None)
            _do(task, setup, study, folder, notes)


def _do(task: Task, setup: Setup, study: Study, folder: Path, notes: _Notes) -> None:
    """Judge one task, or as much of it as there is time for, and record what became of it."""
    try:
        with storage_errors(), pulse(task.beat), _heard(notes.texts):
            try:
                _judge(task, setup, study, folder, notes)
            except TrialError as error:
                task.note(notes.texts)
                task.fail(str(error))
            except (CheckpointError, RunError, OSError) as error:
                task.stop_run(first_line(error))
                raise
            except (_LeaveError, KeyboardInterrupt) as error:
                task.give_back("its worker was told to leave")
                if isinstance(error, KeyboardInterrupt):
                    raise
            else:
                task.note(notes.texts)
                task.done()
    except TakenError:
        pass  # others have it: this process was silent for too long


def _judge(task: Task, setup: Setup, study: Study, folder: Path, notes: _Notes) -> None:
    panels: dict[Stage, Sequence[Prompt]] = {
        "baseline": setup.panel,
        "select": setup.select_panel,
        "heldout": setup.heldout_panel,
    }
    items = task.items or []
    for stage, whole in panels.items():
        if stage == task.stage:
            panel = [prompt for prompt in whole if prompt.index in items]
            others = study.judged(stage)
            break
    else:
        panel = [setup.prompt(i) for i in items]
        others = [*study.judged("baseline"), *study.searched()]
    keep = place_of(setup, folder, is_compared=task.stage in ("baseline", "heldout"))
    others = [other for other in others if other.name != task.name]
    if task.follows:
        measure = yardstick_of(study) or Yardstick(setup.measure)
        judge_and_follow(task, panel, setup, notes, keep, measure, others)
    else:
        judge(task, panel, setup, notes, keep, others=others)


@contextmanager
def _heard(texts: list[str]) -> Iterator[None]:
    """Meanwhile add to the texts what this program warns of: its log is read by nobody."""
    log, handler = logging.getLogger(__name__.partition(".")[0]), _Warnings(texts)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Warnings(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())


class _LeaveError(Exception):
    """The run is over, or has gone."""


class _Notes(Silence):
    """Keeps what the user should know of a task; after an image it may be time to leave.

    Its picture is sent first, where that is wanted.
    """

    def __init__(self, is_over: Callable[[], bool], send: Callable[[], None] | None) -> None:
        self.texts: list[str] = []
        self._is_over, self._send = is_over, send

    def judged(self, images: int, made: bool) -> None:
        try:
            if self._send:
                self._send()
        except OSError as error:
            self.texts.append(f"pictures could not be put to output.artifacts ({error})")
            self._send = None  # until the next task
        if self._is_over():
            raise _LeaveError

    def noted(self, text: str) -> None:
        self.texts.append(text)
