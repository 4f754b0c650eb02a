"""What workers take: images of a trial to be judged. Each task is a trial of an Optuna study of its own.

Workers record what they judge in their task, and one process takes it from there into the trial itself:
so a score counts once, whoever made it. A task that was taken away from a worker takes no more from it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, suppress

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from bayesian_merger.study.proposals import FOLLOWS
from bayesian_merger.study.trial import Trial

_OF, _WORKER, _BEAT, _NOTES = "of", "worker", "beat", "notes"
_ENDED, _FATAL = "ended", "fatal"


class Task(Trial):
    """Some images of a trial, to be judged or judged by a worker."""

    def __init__(self, board: Board, frozen: FrozenTrial) -> None:
        super().__init__(board.study, frozen)
        self._board = board
        attrs = frozen.user_attrs
        # The trial that it is a part of, who judges it, and what that last gave as a sign of life.
        self.of: str = attrs[_OF]
        self.worker: str = attrs.get(_WORKER, "")
        self.sign: int = attrs.get(_BEAT, 0)
        # Why it ended without all of its images, if not for the trial's own fault.
        self.ended: str = attrs.get(_ENDED, "")
        # What a worker met that ends the run as a whole.
        self.fatal: str = attrs.get(_FATAL, "")
        # What the user should know of it.
        self.notes: list[str] = attrs.get(_NOTES, [])
        self.is_waiting = frozen.state == TrialState.WAITING
        self.is_over = frozen.state.is_finished()

    def own(self, worker: str) -> None:
        """Say who judges it."""
        self._trial.set_user_attr(_WORKER, worker)

    def beat(self) -> None:
        """Give a sign of life; UpdateFinishedTrialError if the task was taken away."""
        self.sign += 1
        self._trial.set_user_attr(_BEAT, self.sign)

    def note(self, texts: Sequence[str]) -> None:
        """Store what the user should know of it."""
        if texts:
            self._trial.set_user_attr(_NOTES, list(texts))

    def done(self) -> None:
        """Say that all of it is recorded."""
        self._board.turn(self._trial._trial_id, TrialState.COMPLETE)

    def fail(self, reason: str) -> None:
        """End it, as its trial cannot be judged."""
        self._trial.set_user_attr("reason", reason)
        self._board.turn(self._trial._trial_id, TrialState.FAIL)

    def give_back(self, reason: str) -> None:
        """End it for a reason that is not the trial's fault."""
        self._trial.set_user_attr(_ENDED, reason)
        self._board.turn(self._trial._trial_id, TrialState.FAIL)

    def stop_run(self, reason: str) -> None:
        """End it for a reason for which the run cannot go on."""
        self._trial.set_user_attr(_FATAL, reason)
        self._board.turn(self._trial._trial_id, TrialState.FAIL)

    def withdraw(self, reason: str) -> bool:
        """End it for a worker that will not; whether it had not ended by itself."""
        try:
            self.give_back(reason)
        except UpdateFinishedTrialError:
            return False
        return True


class Board:
    """The tasks of a run.

    Only one of several processes may turn a task, which databases see to; for a file of SQLite, whose
    readers do not wait for each other, `turning` does.
    """

    def __init__(
        self, storage: BaseStorage, study: optuna.Study, turning: AbstractContextManager[object]
    ) -> None:
        self.study = study
        self._storage, self._turning = storage, turning

    def turn(self, number: int, state: TrialState) -> bool:
        """Bring the trial of this number in the storage into a state; whether it was not running yet.

        UpdateFinishedTrialError if it has ended.
        """
        values = [0.0] if state == TrialState.COMPLETE else None
        with self._turning:
            return bool(self._storage.set_trial_state_values(number, state, values))

    def post(self, trial: Trial, items: Sequence[int], *, follows: bool = False) -> int:
        """Offer images of a trial to whoever takes them; the number of the task."""
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                user_attrs={
                    _OF: trial.key,
                    "stage": trial.stage,
                    "name": trial.name,
                    "recipe": trial.recipe.to_dict(),
                    FOLLOWS: follows,
                    "items": list(items),
                },
            )
        )
        return int(self.study.get_trials(deepcopy=False)[-1].number)

    def take(self, worker: str) -> Task | None:
        """The first task that waits, from now on this worker's alone; None if there is none."""
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            with suppress(UpdateFinishedTrialError):  # it was taken off the board
                if self.turn(frozen._trial_id, TrialState.RUNNING):
                    task = Task(self, frozen)
                    task.own(worker)
                    return task
        return None

    def some(self, numbers: Container[int]) -> Iterator[tuple[int, Task]]:
        """The tasks of some numbers, as they stand."""
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.number in numbers:
                yield frozen.number, Task(self, frozen)

    def all(self) -> Iterator[Task]:
        """All tasks, as they stand."""
        for frozen in self.study.get_trials(deepcopy=False):
            yield Task(self, frozen)

    def of(self, key: str) -> Iterator[Task]:
        """The tasks of a trial, as they stand."""
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.user_attrs[_OF] == key:
                yield Task(self, frozen)
