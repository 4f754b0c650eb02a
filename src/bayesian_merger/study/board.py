"""What workers take: images of a trial to be judged. Each task is a trial of an Optuna study of its own.

Workers record what they judge in their task, and one process takes it from there into the trial itself:
so a score counts once, whoever made it. A task that was taken away from a worker takes no more from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from bayesian_merger.study.proposals import FOLLOWS
from bayesian_merger.study.trial import Trial

_OF, _WORKER, _BEAT, _ENDED = "of", "worker", "beat", "ended"


class Task(Trial):
    """Some images of a trial, to be judged or judged by a worker."""

    def __init__(self, study: optuna.Study, frozen: FrozenTrial) -> None:
        super().__init__(study, frozen)
        attrs = frozen.user_attrs
        # The trial that it is a part of, who judges it, and what that last gave as a sign of life.
        self.of: str = attrs[_OF]
        self.worker: str = attrs.get(_WORKER, "")
        self.sign: int = attrs.get(_BEAT, 0)
        # Why it ended without all of its images, if not for the trial's own fault.
        self.ended: str = attrs.get(_ENDED, "")
        self.is_waiting = frozen.state == TrialState.WAITING
        self.is_over = frozen.state.is_finished()

    def beat(self) -> None:
        """Give a sign of life; UpdateFinishedTrialError if the task was taken away."""
        self.sign += 1
        self._trial.set_user_attr(_BEAT, self.sign)

    def done(self) -> None:
        """Say that all of it is recorded."""
        self._study.tell(self._trial, 0.0)

    def give_back(self, reason: str) -> None:
        """End it for a reason that is not the trial's fault."""
        self._trial.set_user_attr(_ENDED, reason)
        self._study.tell(self._trial, state=TrialState.FAIL)


class Board:
    """The tasks of a run."""

    def __init__(self, storage: BaseStorage, study: optuna.Study) -> None:
        self._storage, self._study = storage, study

    def post(self, trial: Trial, items: Sequence[int], *, follows: bool = False) -> int:
        """Offer images of a trial to whoever takes them; the number of the task."""
        self._study.add_trial(
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
        return int(self._study.get_trials(deepcopy=False)[-1].number)

    def take(self, worker: str) -> Task | None:
        """The first task that waits, from now on this worker's alone; None if there is none."""
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            try:
                is_own = self._storage.set_trial_state_values(
                    frozen._trial_id, state=TrialState.RUNNING
                )
            except UpdateFinishedTrialError:
                is_own = False  # it was taken off the board
            if is_own:
                task = Task(self._study, frozen)
                task._trial.set_user_attr(_WORKER, worker)
                return task
        return None

    def __iter__(self) -> Iterator[Task]:
        """All tasks, as they stand."""
        for frozen in self._study.get_trials(deepcopy=False):
            yield Task(self._study, frozen)

    def withdraw(self, task: Task, reason: str) -> bool:
        """End a task that nobody will end; whether it had not ended by itself."""
        try:
            task.give_back(reason)
        except UpdateFinishedTrialError:
            return False
        return True
