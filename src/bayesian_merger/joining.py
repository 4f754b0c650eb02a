"""A run that several processes work on, on one machine or many: one leads, the others help it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from bayesian_merger import __version__
from bayesian_merger.crew import Hands, Team
from bayesian_merger.errors import ConfigError, MergerError, RunError
from bayesian_merger.study import Study
from bayesian_merger.study.seats import Seat, Seats, pulse
from bayesian_merger.study.storage import storage_errors

_LOOK_S = 1.0
# The others are counted anew so often.
_COUNT_S = 5.0


class Leading:
    """The others, as the process sees them that leads; it asks whether it still does."""

    def __init__(self, seats: Seats, seat: Seat) -> None:
        self._seats, self._seat = seats, seat
        self._n, self._counted = 0, -_COUNT_S

    def n_workers(self) -> int:
        """How many workers the others have."""
        if time.monotonic() - self._counted > _COUNT_S:
            self._n = sum(seat.n for seat in self._seats.taken() if not seat.leads)
            self._counted = time.monotonic()
        return self._n

    def require(self) -> None:
        """TakenError if another process leads the run by now."""
        self._seat.require()
        self.n_workers()  # looked at now and then, so that the silent ones are known


def leads(seats: Seats) -> Seat | None:
    """The seat of this process if it leads the run from now on, as no other does."""
    return seats.lead(__version__)


def helps(
    study: Study,
    seats: Seats,
    hire: Callable[[], Hands] | None,
    noted: Callable[[str], None],
    require_same: Callable[[], None],
) -> Seat | None:
    """Have workers judge for the process that leads, until none does: the one that did so last.

    ConfigError if they cannot, or by `require_same` if the run is another; RunError if it cannot go on,
    or they cannot on this machine.
    """
    leader = seats.leader()
    if leader is None:
        return seats.last()
    if leader.version != __version__:
        raise ConfigError(
            f"the run is led by version {leader.version} of this program ({leader}), and this is "
            f"{__version__}; install that one"
        )
    if hire is None:
        raise ConfigError(
            f"another {leader} works on this run, which is for one process alone: wait for it or stop it"
        )
    while not study.identity:  # it is about to begin
        if not seats.leader():
            return seats.last()
        time.sleep(_LOOK_S)
    require_same()
    noted(f"the run is led by {leader}; this one helps, and takes over when that is lost")
    hands, board = hire(), study.board()
    team = Team(hands, noted)
    seat = seats.sit(__version__, hands.n)
    try:
        with pulse(seat.beat):
            while now := seats.leader():
                if now.number != leader.number:
                    leader = now
                    noted(f"the run is led by {leader} now")
                if lost := team.lost():
                    own = [task for task in board.all() if team.has(task.worker)]
                    if fatal := next((task.fatal for task in own if task.fatal), ""):
                        raise RunError(f"a worker has stopped: {fatal}")
                    team.count(lost, sum(len(task.scores) for task in own))
                time.sleep(_LOOK_S)
        last = seats.last()
    except BaseException:
        study.hurries()
        raise
    finally:
        with suppress(MergerError), storage_errors():
            seat.leave("it helps no more")
    if last and last.fatal:
        raise RunError(f"{last}, which led the run, has stopped: {last.fatal}")
    return last
