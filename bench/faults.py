"""Whether runs survive a night: python bench/faults.py [--hours 8] [--every 90] [--workers 2]

Runs of the embedded example, one after another, each by several workers and in a folder of its own.
Every now and then something happens to one: a worker or the whole run is killed, told to end, put to
sleep, or its study is damaged on the disk; where it has ended, the same command is given again. Every
second run is longer, and only its workers suffer, so that its leading process grows old. When a run is
over its study is audited: every image was scored, once, and counts once, and nothing failed. Ends with
what happened how often, and how the memory of the processes grew; more than a twentieth is a fault. The
folders of runs with faults are kept. For Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bayesian_merger import demo
from bayesian_merger.data import Outcome, Result
from bayesian_merger.outcome import open_study, read_outcome
from bayesian_merger.study import Stage

CONFIG = Path(demo.__file__).parent / "config.toml"
LOOK_S = 5.0
# What a process takes at first is no growth, and what it takes in a few minutes more is none yet.
YOUNG_S, OLD_S = 120.0, 600.0
MOST_GROWTH = 0.05
# Of a run whose leading process suffers as well, and of one in which it is left alone.
IMAGES = {False: 240, True: 960}
# SIGTERM is to be heeded within that.
PATIENCE_S = 10.0


class Night:
    """One run at a time, and what happens to it."""

    def __init__(self, folder: Path, workers: int, chance: random.Random) -> None:
        self.folder, self.workers, self.chance = folder, workers, chance
        self.is_calm = False
        self.happened: Counter[str] = Counter()
        self.faults: list[str] = []
        # Of each process the seconds that it has lived, and its MiB then.
        self.memory: dict[tuple[str, int], list[tuple[float, float]]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._begun: dict[int, float] = {}

    def start(self, turn: int) -> None:
        """The run's command, for the first time or once more."""
        images = IMAGES[self.is_calm]
        told = [f"search.seed={turn}", f"search.images={images}", "heldout.images=32"]
        with (self.folder / "said.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "bayesian_merger", "run", str(CONFIG)),
                    *("--run-dir", str(self.folder / "run"), "--workers", str(self.workers)),
                    *(part for one in told for part in ("--set", one)),
                ],
                stdout=log,
                stderr=log,
            )

    @property
    def run(self) -> int:
        """The process that leads."""
        assert self._process
        return self._process.pid

    def ended(self) -> int | None:
        """The exit code of the run, once it has ended."""
        assert self._process
        return self._process.poll()

    def hired(self) -> list[int]:
        """The processes of its workers."""
        with contextlib.suppress(OSError):
            told = Path(f"/proc/{self.run}/task/{self.run}/children").read_text()
            return [int(number) for number in told.split()]
        return []

    def look(self) -> None:
        """Note the memory of each process."""
        kinds = {self.run: "run", **dict.fromkeys(self.hired(), "worker")}
        now = time.monotonic()
        for number, kind in kinds.items():
            with contextlib.suppress(OSError, IndexError):
                told = Path(f"/proc/{number}/status").read_text()
                held = int(told.partition("RssAnon:")[2].split()[0]) / 1024
                age = now - self._begun.setdefault(number, now)
                self.memory.setdefault((kind, number), []).append((age, held))

    def happen(self) -> None:
        """One of the things that happen at night."""
        of_workers = [self.kill_worker, self.kill_worker, self.sleep_worker]
        of_runs = [self.kill_run, self.end_run, self.sleep_all, self.damage]
        chosen = [*of_workers, *([] if self.is_calm else of_runs)]
        what: Callable[[], None] = self.chance.choice(chosen)
        self.happened[what.__name__] += 1
        what()

    def kill_worker(self) -> None:
        if hired := self.hired():
            signalled(self.chance.choice(hired), signal.SIGKILL)

    def sleep_worker(self) -> None:
        if hired := self.hired():
            asleep([self.chance.choice(hired)], self.chance.uniform(5, 80))

    def kill_run(self) -> None:
        signalled(self.run, signal.SIGKILL)
        self._wait()

    def end_run(self) -> None:
        begun = time.monotonic()
        signalled(self.run, signal.SIGTERM)
        code = self._wait()
        if time.monotonic() - begun > PATIENCE_S or code not in (130, 0):
            self.faults.append(f"SIGTERM: code {code} after {time.monotonic() - begun:.0f} s")

    def sleep_all(self) -> None:
        asleep([self.run, *self.hired()], self.chance.uniform(5, 60))

    def damage(self) -> None:
        self.kill_run()
        file = self.folder / "run" / "study.db"
        # Before the first copy a damaged study is the user's to move away.
        if file.with_name("study.db.bak").is_file():
            data = bytearray(file.read_bytes())
            n_bytes = self.chance.choice([1, 512, 4096])
            at = self.chance.randrange(len(data) - n_bytes)
            data[at : at + n_bytes] = self.chance.randbytes(n_bytes)
            file.write_bytes(data)

    def _wait(self) -> int:
        assert self._process
        try:
            return self._process.wait(120)
        except subprocess.TimeoutExpired:
            self.faults.append("the run does not end")
            self._process.kill()
            return self._process.wait()

    def audit(self) -> None:
        """What is wrong with the run that is over is a fault."""
        run_dir = self.folder / "run"
        with contextlib.closing(open_study(run_dir)) as study:
            outcome = read_outcome(run_dir, study)
            stages: tuple[Stage, ...] = ("baseline", "select", "heldout")
            results = [*study.searched(), *(r for s in stages for r in study.judged(s))]
            scored = [(task.of, index) for task in study.board().all() for index in task.scores]
        self.faults += audited(outcome, results, scored, IMAGES[self.is_calm])
        print(f"audited: {outcome.images} images, {len(results)} trials", flush=True)


def audited(
    outcome: Outcome, results: Sequence[Result], scored: Sequence[tuple[str, int]], images: int
) -> list[str]:
    """What is wrong with a run whose search had so many `images`, by what its workers `scored`.

    Every image is to be scored, once, and to count once.
    """
    times = Counter(scored)
    twice = {key: n for key, n in times.items() if n > 1}
    lacking = [
        f"{r.stage} {r.name}: {r.state} {r.reason}" for r in results if r.state != "complete"
    ]
    spent = sum(len(r.scores) for r in results if r.stage in ("explore", "exploit"))
    found = (
        (not outcome.finished, "the run is not finished"),
        (twice, f"images scored twice: {twice}"),
        (lacking, f"trials without a value: {lacking}"),
        (len(times) != outcome.images, f"{len(times)} scored, but {outcome.images} count"),
        (spent != images, f"the search has spent {spent} images of {images}"),
    )
    return [what for is_wrong, what in found if is_wrong]


def signalled(number: int, what: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, what)


def asleep(numbers: list[int], seconds: float) -> None:
    """Let processes sleep for so long."""
    for number in numbers:
        signalled(number, signal.SIGSTOP)
    time.sleep(seconds)
    for number in numbers:
        signalled(number, signal.SIGCONT)


def grown(memory: Mapping[tuple[str, int], Sequence[tuple[float, float]]]) -> list[str]:
    """The processes that hold more when they are old than when they were young; prints the oldest."""
    faults = []
    for kind in ("run", "worker"):
        lives = [
            [one for one in told if one[0] > YOUNG_S]
            for (of, _), told in memory.items()
            if of == kind
        ]
        oldest = ""
        for told in sorted(filter(None, lives), key=lambda told: told[-1][0]):
            few = -(-len(told) // 5)
            first = statistics.median(held for _, held in told[:few])
            last = statistics.median(held for _, held in told[-few:])
            oldest = (
                f"{kind}: {first:.0f} MiB after {told[0][0] / 60:.0f} min, {last:.0f} MiB after "
                f"{told[-1][0] / 60:.0f} min ({last / first - 1:+.1%})"
            )
            if told[-1][0] > OLD_S and last > (1 + MOST_GROWTH) * first:
                faults.append(f"memory grows: {oldest}")
        print(oldest or f"{kind}: none lived for more than {YOUNG_S:.0f} s")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument(
        "--every", type=float, default=90.0, help="seconds between faults, on average"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.workers < 2:
        parser.error("--workers must be 2 or more: one works in the leading process")
    chance = random.Random(options.seed)
    end = time.monotonic() + 3600 * options.hours
    n_runs, n_starts = 0, 0
    faults: list[str] = []
    place = Path(tempfile.mkdtemp(prefix="bayesian-merger-faults-"))
    night = Night(place, options.workers, chance)
    while time.monotonic() < end:
        night.folder = place / str(n_runs)
        night.folder.mkdir()
        night.is_calm = n_runs % 2 == 1
        n_starts += through(night, n_runs, options.every)
        print(*night.faults, sep="\n", end="\n" if night.faults else "", flush=True)
        if night.faults:
            faults += [f"run {n_runs}: {fault} ({night.folder})" for fault in night.faults]
        else:
            shutil.rmtree(night.folder)
        night.faults.clear()
        n_runs += 1
    told = ", ".join(f"{name} {n}" for name, n in sorted(night.happened.items()))
    print(f"{n_runs} runs, {n_starts} starts; {told}")
    faults += grown(night.memory)
    print(f"{len(faults)} faults", *faults, sep="\n")
    with contextlib.suppress(OSError):  # there are folders of runs with faults
        place.rmdir()
    sys.exit(bool(faults))


def through(night: Night, turn: int, every_s: float) -> int:
    """Bring a run to its end, or to a fault, and audit it; how often it was started."""
    n_starts = 0
    code: int | None = None
    while code != 0 and not night.faults:
        night.start(turn)
        n_starts += 1
        due = time.monotonic() + night.chance.expovariate(1 / every_s)
        while (code := night.ended()) is None:
            night.look()
            if time.monotonic() > due:
                night.happen()
                due = time.monotonic() + night.chance.expovariate(1 / every_s)
            time.sleep(LOOK_S)
        if code not in (0, 130, -signal.SIGKILL):
            said = (night.folder / "said.log").read_text(errors="replace")
            night.faults.append(f"exit code {code}: {[*said.splitlines(), ''][-1]}")
    if not night.faults:
        night.audit()
    return n_starts


if __name__ == "__main__":
    main()
