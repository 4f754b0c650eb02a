"""Many workers: what they are offered, what is gathered from them, and what happens when one is lost."""

from __future__ import annotations

import math
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bayesian_merger.data import Prompt
from bayesian_merger.errors import RunError, TrialError
from bayesian_merger.study import Trial
from bayesian_merger.study.board import Board, Task
from bayesian_merger.study.seats import Watch

# How often it is looked whether workers have found something, at most.
_POLL_S = 0.05
# After so long without a sign of life a worker is lost; it gives one every few seconds.
PATIENCE_S = 60.0
# A trial that has lost so many workers to the same images, and none was judged, is at fault itself.
_MOST_LOST = 3
# So many times all workers may end before one has judged an image.
_MOST_VAIN = 3
LEAVE_S = 6.0
"""How long a worker may take to leave when its run is over: who ends a program may wait ten seconds."""


class Listener(Protocol):
    """Is told how the work goes on."""

    def judged(self, images: int, made: bool) -> None: ...

    def noted(self, text: str) -> None: ...


class Hands(Protocol):
    """The workers that a run has started itself."""

    @property
    def n(self) -> int:
        """How many there are."""
        ...

    @property
    def names(self) -> Collection[str]:
        """What those are called that there are now."""
        ...

    def lost(self) -> Mapping[str, str]:
        """Those that have ended since it was asked last, and the last thing that they said."""
        ...

    def leave(self) -> None:
        """Tell them to end, which they do when the image is made that they are at."""
        ...

    def close(self) -> None:
        """Have them gone."""
        ...


class Others(Protocol):
    """The processes that work on the run beside this one."""

    def n_workers(self) -> int:
        """How many workers they have."""
        ...

    def require(self) -> None:
        """TakenError if one of them leads the run."""
        ...


class Alone:
    """No others."""

    def n_workers(self) -> int:
        return 0

    def require(self) -> None: ...


class Team:
    """The workers of this process, by their names, and how many of them have ended in vain."""

    def __init__(self, hands: Hands, noted: Callable[[str], None]) -> None:
        self.hands, self._noted = hands, noted
        self._names: set[str] = set()
        self._n_vain = self._n_found = 0

    def has(self, worker: str) -> bool:
        """Whether it is one of these, or was."""
        return worker in self._names or worker in self.hands.names

    def lost(self) -> Mapping[str, str]:
        """Those that have ended since it was asked last, and the last thing that they said."""
        found = self.hands.lost()
        self._names |= found.keys()
        return found

    def count(self, lost: Mapping[str, str], n_found: int) -> None:
        """Note those that are lost; RunError if they end again and again while no image is found.

        `n_found` is how many images have been found so far.
        """
        if n_found > self._n_found:
            self._n_vain, self._n_found = 0, n_found
        for name, said in lost.items():
            self._n_vain += 1
            self._noted(f"worker {name} has ended and is replaced: {said}")
            if self._n_vain > _MOST_VAIN * self.hands.n:
                raise RunError(f"workers end as soon as they begin, the last with: {said}")


@dataclass
class _Offer:
    """Images of a trial that were offered in a task, and for how long its worker has been silent.

    `n_lost` workers were lost on these very images before, and this one by what `lost_by` says.
    """

    trial: Trial
    items: Sequence[int]
    follows: bool
    n_lost: int
    watch: Watch = field(default_factory=Watch)
    is_waiting: bool = True
    lost_by: str = ""


class Crew:
    """Has trials judged by the workers at a board."""

    def __init__(
        self, board: Board, hire: Callable[[], Hands], listener: Listener, others: Others
    ) -> None:
        """The workers are hired when there is something to do, beside those of the `others`."""
        self._board, self._hire, self._listener, self._others = board, hire, listener, others
        self._team: Team | None = None
        self._offers: dict[int, _Offer] = {}
        self._known: set[str] = set()
        self._faults: dict[str, str] = {}
        self._noted: set[str] = set()
        self._n_found = 0
        self._took_s = 0.0

    def leave(self) -> None:
        """Tell the workers to end."""
        if self._team:
            self._team.hands.leave()

    def close(self) -> None:
        """Have the workers gone."""
        if self._team:
            self._team.hands.close()

    def wants(self) -> bool:
        """Whether a worker may find nothing to do."""
        n_waiting = sum(offer.is_waiting for offer in self._offers.values())
        # The more workers, the more of them end at once.
        return n_waiting < max(1, len(self._offers) // 8)

    def offer(self, trial: Trial, panel: Sequence[Prompt], *, follows: bool = False) -> None:
        """Offer what of the panel a trial lacks, once; what an earlier start has found is taken over."""
        if trial.key in self._known or trial.is_complete:
            return
        self._known.add(trial.key)
        for task in self._board.of(trial.key):
            # Whoever has it took it from a process that led before, and finds that it is gone.
            task.withdraw("the run was begun anew")
        for task in self._board.of(trial.key):  # looked at when nothing can be added any more
            trial.gather(task)
        done = trial.judged(follows=follows)
        items = [prompt.index for prompt in panel if prompt.index not in done]
        self._listener.judged(len(panel) - len(items), made=False)
        if items and not self._team:
            self._team = Team(self._hire(), self._listener.noted)
        n_workers = (self._team.hands.n if self._team else 0) + self._others.n_workers()
        size = max(1, -(-len(items) // max(1, n_workers)))
        for some in (items[i : i + size] for i in range(0, len(items), size)):
            self._post(trial, some, follows)

    def is_ready(self, trial: Trial) -> bool:
        """Whether nothing that was offered of a trial is still to be judged."""
        return all(offer.trial is not trial for offer in self._offers.values())

    def conclude(self, trial: Trial) -> None:
        """TrialError if a trial that is ready could not be judged."""
        if reason := self._faults.get(trial.key):
            raise TrialError(reason)

    def judge(self, trial: Trial, panel: Sequence[Prompt], *, follows: bool = False) -> None:
        """Have a trial judged on the panel; TrialError if it could not be."""
        self.offer(trial, panel, follows=follows)
        while not self.is_ready(trial):
            self.tend()
            self.rest()
        self.conclude(trial)

    def tend(self) -> None:
        """Gather what the workers have found, and offer again what those have had that are lost.

        RunError if one of its own has met what ends a run, or if they end before they judge anything;
        TakenError if another process leads the run by now.
        """
        start = time.monotonic()
        self._others.require()
        lost = self._team.lost() if self._team else {}
        for number, task in list(self._board.some(self._offers)):
            offer = self._offers[number]
            fresh = offer.trial.gather(task)
            if fresh:
                self._n_found += len(fresh)
                self._listener.judged(len(fresh), made=True)
            offer.is_waiting = task.is_waiting
            silent_s = offer.watch.silence((task.is_waiting, task.sign))
            if task.is_over:
                self._end(number, task)
            elif task.worker in lost:
                self._take_away(offer, task, lost[task.worker])
            elif silent_s > PATIENCE_S and not task.is_waiting:
                self._take_away(offer, task, f"no sign of life for {PATIENCE_S:.0f} s")
        if self._team:
            self._team.count(lost, self._n_found)
        self._took_s = time.monotonic() - start

    def rest(self) -> None:
        """Wait before workers are tended again: a storage that is slow is not asked all the time."""
        time.sleep(max(_POLL_S, self._took_s))

    def _post(self, trial: Trial, items: Sequence[int], follows: bool, n_lost: int = 0) -> None:
        self._others.require()
        number = self._board.post(trial, items, follows=follows)
        self._offers[number] = _Offer(trial, items, follows, n_lost)

    def _take_away(self, offer: _Offer, task: Task, reason: str) -> None:
        """End a task whose worker is lost; what that has recorded until now is seen at the next look."""
        if task.withdraw(reason):
            offer.lost_by = reason

    def _end(self, number: int, task: Task) -> None:
        """What follows from a task that is over."""
        if task.fatal:
            if self._team is None or self._team.has(task.worker):
                raise RunError(f"a worker has stopped: {task.fatal}")
            self._listener.noted(
                f"worker {task.worker} of another machine has stopped: {task.fatal}"
            )
        offer = self._offers.pop(number)
        result = task.result()
        offer.trial.spend(**result.seconds)
        for text in task.notes:
            if text not in self._noted:  # every worker may say it
                self._noted.add(text)
                self._listener.noted(text)
        # Who took it away may have been too late, whatever is stored of that.
        if result.reason:
            self._faults.setdefault(offer.trial.key, result.reason)
        elif result.state == "failed":
            self._again(offer)

    def _again(self, offer: _Offer) -> None:
        """Offer what is left of a task that was not done, unless it loses one worker after another."""
        done = offer.trial.judged(follows=offer.follows)
        left = [item for item in offer.items if item not in done]
        n_lost = (offer.n_lost if left == list(offer.items) else 0) + bool(offer.lost_by)
        if left and n_lost >= _MOST_LOST:
            said = f"{n_lost} workers were lost on it: {offer.lost_by}"
            self._faults.setdefault(offer.trial.key, said)
        elif left:
            self._post(offer.trial, left, offer.follows, n_lost)


class Pool:
    """Workers of this machine: a process each, which ends when this one does."""

    def __init__(
        self, command: Sequence[str], told: bytes, places: Sequence[Mapping[str, str]], logs: Path
    ) -> None:
        """Of `command`, which is `told` what to do at its standard input and then waits for its end.

        A worker for each of `places`, which are added to its environment; what they say goes to `logs`.
        """
        self._command, self._told, self._places, self._logs = list(command), told, places, logs
        logs.mkdir(parents=True, exist_ok=True)
        self._at: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        self._number = 0
        self._leave_by = math.inf
        try:
            for place in range(len(places)):
                self._start(place)
        except BaseException:
            self.close()
            raise

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self._places)

    @property
    def names(self) -> Collection[str]:
        """What they are called."""
        return {name for name, _ in self._at.values()}

    def lost(self) -> Mapping[str, str]:
        """Those that have ended, which are replaced, and the last thing that they said."""
        found = {}
        for place, (name, process) in list(self._at.items()):
            if process.poll() is not None:
                found[name] = self._last_words(name) or f"exit code {process.returncode}"
                self._start(place)
        return found

    def leave(self) -> None:
        """Tell them to end, which they do when the image is made that they are at."""
        # What is done before they are waited for is taken from their time.
        self._leave_by = min(self._leave_by, time.monotonic() + LEAVE_S)
        for _, process in self._at.values():
            if process.stdin:
                with suppress(OSError):
                    process.stdin.close()

    def close(self) -> None:
        """Have them gone."""
        self.leave()
        for _, process in self._at.values():
            try:
                process.wait(max(0.1, self._leave_by - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, place: int) -> None:
        self._number += 1
        # Machines of containers may be called alike, and so may their processes.
        name = f"{socket.gethostname()[:40]}-{os.getpid()}-{self._number}-{secrets.token_hex(2)}"
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*self._command, name],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._places[place]},
                # A Ctrl-C is for this process, which lets them go.
                start_new_session=sys.platform != "win32",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._at[place] = (name, process)
        assert process.stdin
        with suppress(OSError):  # it has ended already, which is seen soon
            process.stdin.write(self._told + b"\n")
            process.stdin.flush()

    def _last_words(self, name: str) -> str:
        with suppress(OSError):
            lines = (self._logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
            return lines[-1][:300] if lines else ""
        return ""


def places(n: int, devices: Collection[str], n_cores: int) -> list[dict[str, str]]:
    """What each of `n` workers has of this machine: a GPU for itself, or its share of the cores."""
    if devices:
        return [{"CUDA_VISIBLE_DEVICES": device} for device in list(devices)[:n]]
    return [{"OMP_NUM_THREADS": str(max(1, n_cores // n))} for _ in range(n)]
