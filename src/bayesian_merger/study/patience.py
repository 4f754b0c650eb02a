"""Waiting for a server that does not answer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import count
from typing import Any, TypeVar, cast

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from bayesian_merger.errors import first_line

PATIENCE_S = 900.0
"""How long a server is waited for that does not answer."""
ASKED = (
    "create_new_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "get_trial",
    "get_trial_id_from_study_id_trial_number",
    "set_trial_state_values",
    "set_trial_user_attr",
    "set_trial_system_attr",
)
"""What Optuna asks every storage in a study's life, each by a method of its own."""
_TELL_S = 3.0
_T = TypeVar("_T")


class Patient(ABC):
    """A storage on a server, which is waited for while it does not answer.

    A call that was cut off is made again, so one that adds may add twice where the server was lost after
    it had heard it. `tell` is told when it is waited for, which it is no more once it `is_over`.
    """

    what = "server"

    def __init_subclass__(cls, *, waits: Sequence[str] = (), **more: Any) -> None:
        """Let the methods `waits` of the storage wait."""
        super().__init_subclass__(**more)
        for name in waits:
            setattr(cls, name, _patient(getattr(cls, name)))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tell: Callable[[str], None] = lambda text: None
        self.is_over: Callable[[], bool] = lambda: False
        self._is_told = False

    def wait_for(self, call: Callable[[], _T]) -> _T:
        """What the call returns, once the server answers it; its error when that takes too long."""
        begun, pause = time.monotonic(), 0.5
        while True:
            try:
                found = call()
            except (StorageInternalError, SQLAlchemyError) as error:
                waited_s = time.monotonic() - begun
                if not self._is_away(error) or self.is_over() or waited_s > PATIENCE_S:
                    raise
                if not self._is_told and waited_s > _TELL_S:
                    self._is_told = True
                    self.tell(
                        f"the study's {self.what} does not answer ({reason(error)}); waiting"
                    )
            else:
                if self._is_told:
                    self._is_told = False
                    self.tell(f"the study's {self.what} answers again")
                return found
            self._let_go()
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    @abstractmethod
    def _is_away(self, error: Exception) -> bool:
        """Whether it is not the call that is wrong, but the server that cannot answer now."""

    def _let_go(self) -> None:  # noqa: B027 - there may be nothing to leave
        """Leave what was cut off, which is not to be gone on with."""


def _patient(method: Callable[..., _T]) -> Callable[..., _T]:
    @wraps(method)
    def call(self: Patient, *args: Any, **options: Any) -> _T:
        attempts = count()

        def attempt() -> _T:
            is_again = next(attempts) > 0
            try:
                return method(self, *args, **options)
            except UpdateFinishedTrialError:
                # The server may have heard the call whose answer was lost.
                is_end = is_again and method.__name__ == "set_trial_state_values"
                if is_end and _has_ended_so(cast(BaseStorage, self), *args, **options):
                    return cast(_T, True)
                raise

        return self.wait_for(attempt)

    return call


def _has_ended_so(
    storage: BaseStorage, trial_id: int, state: TrialState, values: Sequence[float] | None = None
) -> bool:
    """Whether a trial is in the state already that it is to be brought into, with these values."""
    trial = storage.get_trial(trial_id)
    return trial.state == state and (values is None or trial.values == list(values))


def reason(error: Exception) -> str:
    """What a server has said, in a line."""
    cause = error.__cause__ or error
    return first_line(getattr(cause, "orig", None) or cause)
