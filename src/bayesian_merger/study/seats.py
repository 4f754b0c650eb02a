"""Who works on a run: a seat for each process, of which one leads. Each is a trial of an Optuna study.

The one that leads proposes, gathers and tells; the others have workers that judge. A seat is kept by
giving signs of life. One that gave none for a while is taken away, and its process finds that out before
it records anything further.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from bayesian_merger.errors import MergerError
from bayesian_merger.study.storage import storage_errors

BEAT_S = 3.0
"""How often a process gives a sign of life."""
SILENCE_S = 30.0
"""How long it may give none before another takes its place."""
# After so long without a sign of its own a process asks whether it still has its seat.
_SURE_S = 10.0
# What is looked at less often may have given signs that nobody saw.
_LOOK_S = 5.0

_LEADS, _HOST, _PID, _VERSION, _N = "leads", "host", "pid", "version", "workers"
_BEAT, _ENDED, _FATAL, _LED = "beat", "ended", "fatal", "led"


def clock() -> float:
    """Seconds that pass while the machine sleeps too, where the system counts them."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


@contextmanager
def pulse(beat: Callable[[], None]) -> Iterator[None]:
    """Meanwhile call `beat` every few seconds, until it raises an error of ours."""
    over = threading.Event()

    def keep() -> None:
        with suppress(MergerError), storage_errors():
            while not over.wait(BEAT_S):
                beat()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(BEAT_S)  # it may wait for a server


class Watch:
    """Measures how long something has given no sign of life, while it was looked at.

    By this machine's clock alone; what passes between two looks that are far apart counts little: the
    storage may have been away, or this machine asleep.
    """

    def __init__(self) -> None:
        self._sign: object = None
        self._silent = 0.0
        self._last = clock()

    def silence(self, sign: object) -> float:
        """Seconds since another sign than this was seen."""
        now = clock()
        self._silent += min(now - self._last, _LOOK_S)
        self._last = now
        if sign != self._sign:
            self._sign, self._silent = sign, 0.0
        return self._silent


class Seat:
    """The place of a process in a run."""

    def __init__(self, storage: BaseStorage, frozen: FrozenTrial) -> None:
        self._storage, self._id = storage, frozen._trial_id
        attrs = frozen.user_attrs
        self.number = frozen.number
        # Whether it is there to lead, and whether it came to do so.
        self.leads: bool = attrs[_LEADS]
        self.led: bool = attrs.get(_LED, False)
        self.host: str = attrs[_HOST]
        self.pid: int = attrs[_PID]
        self.version: str = attrs[_VERSION]
        # How many workers it has.
        self.n: int = attrs[_N]
        self.sign: int = attrs.get(_BEAT, 0)
        self.is_taken = frozen.state == TrialState.RUNNING
        # Whether the run was over when it left, or why the run cannot go on.
        self.is_done = frozen.state == TrialState.COMPLETE
        self.fatal: str = attrs.get(_FATAL, "")
        self._given = clock()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def beat(self) -> None:
        """Give a sign of life; TakenError if the seat was taken away."""
        self.sign += 1
        with storage_errors():
            self._storage.set_trial_user_attr(self._id, _BEAT, self.sign)
        self._given = clock()

    def require(self) -> None:
        """TakenError if the seat was taken away, RunError if the storage does not tell."""
        if clock() - self._given > _SURE_S:
            self.beat()

    def leave(self, reason: str, *, is_done: bool = False, is_fatal: bool = False) -> None:
        """Give the seat up, or take it away from a process that is silent."""
        state = TrialState.COMPLETE if is_done else TrialState.FAIL
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._id, _FATAL if is_fatal else _ENDED, reason)
            self._storage.set_trial_state_values(self._id, state, [0.0] if is_done else None)


class Seats:
    """All seats of a run."""

    def __init__(self, storage: BaseStorage, study: optuna.Study) -> None:
        self._storage, self._study = storage, study
        self._watches: dict[int, Watch] = {}

    def sit(self, version: str, n_workers: int = 0, *, leads: bool = False) -> Seat:
        """Take a seat for this process; the workers of one that leads are its own."""
        # Tells apart processes that are called alike on machines that are.
        mark = secrets.token_hex(4)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                user_attrs={
                    _LEADS: leads,
                    _HOST: socket.gethostname()[:60],
                    _PID: os.getpid(),
                    _VERSION: version,
                    _N: n_workers,
                    "mark": mark,
                },
            )
        )
        trials = self._study.get_trials(deepcopy=False)
        return Seat(self._storage, next(t for t in trials if t.user_attrs.get("mark") == mark))

    def taken(self) -> list[Seat]:
        """Those of processes that live; a silent one loses its seat."""
        found = []
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            seat = Seat(self._storage, frozen)
            watch = self._watches.setdefault(seat.number, Watch())
            if watch.silence(seat.sign) > SILENCE_S:
                seat.leave(f"no sign of life for {SILENCE_S:.0f} s")
            else:
                found.append(seat)
        return found

    def give_signs(self) -> bool:
        """Whether any process works on the run, after a few seconds if none gives a sign at once."""
        before = {seat.number: seat.sign for seat in self.taken()}
        end = clock() + 2 * BEAT_S
        while before and clock() < end:
            time.sleep(0.2)
            if any(seat.sign != before.get(seat.number) for seat in self.taken()):
                return True
        return False

    def leader(self) -> Seat | None:
        """The one that leads, if any does."""
        return next((seat for seat in self.taken() if seat.leads), None)

    def last(self) -> Seat | None:
        """The one that led last."""
        seats = (Seat(self._storage, t) for t in self._study.get_trials(deepcopy=False))
        return max((s for s in seats if s.led), key=lambda s: s.number, default=None)

    def lead(self, version: str) -> Seat | None:
        """A seat that leads, unless another process has it."""
        if self.leader():
            return None
        own = self.sit(version, leads=True)
        # Of two that look after they sat down, at least one sees the other.
        if any(seat.leads and seat.number != own.number for seat in self.taken()):
            own.leave("another took it at the same time")
            time.sleep(random.uniform(0.1, 1.0))
            return None
        try:
            self._storage.set_trial_user_attr(own._id, _LED, True)
        except UpdateFinishedTrialError:  # it was silent for too long already
            return None
        return own
