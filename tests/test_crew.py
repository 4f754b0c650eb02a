"""Runs whose images are judged by workers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from outcomes import a_recipe
from test_cli import Command
from test_cli import command as command
from test_run import Silent, start
from test_run import folder as folder

import bayesian_merger
from bayesian_merger import config as configuration
from bayesian_merger import crew, judging, run, setup, worker
from bayesian_merger.backends import diffusers
from bayesian_merger.cli.working import hiring
from bayesian_merger.data import Outcome
from bayesian_merger.errors import ConfigError, RunError, TakenError, TrialError
from bayesian_merger.outcome import open_study
from bayesian_merger.study import seats
from bayesian_merger.study.board import Task
from bayesian_merger.study.storage import storage_errors


class Threads:
    """Workers that are threads of this process, each with a setup of its own."""

    def __init__(self, folder: Path, overrides: tuple[str, ...], n: int) -> None:
        self.n = n
        self.names = [f"w{number}" for number in range(n)]
        self._over = threading.Event()
        self._threads = []
        for number in range(n):
            config = configuration.load(folder / "config.toml", overrides)
            ready = setup.prepare(config, folder, "toy")
            thread = threading.Thread(
                target=self._work, args=(ready, folder / "run", f"w{number}"), daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _work(self, ready: setup.Setup, run_dir: Path, name: str) -> None:
        worker.work(ready, run_dir, name, self._over.is_set)

    def lost(self) -> Mapping[str, str]:
        return {}

    def leave(self) -> None:
        self._over.set()

    def close(self) -> None:
        self.leave()
        for thread in self._threads:
            thread.join(30)


def start_with(
    folder: Path, *overrides: str, n: int = 2, hire: Callable[[], Any] | None = None
) -> Outcome:
    config = configuration.load(folder / "config.toml", overrides)
    ready = setup.prepare(config, folder, "toy")
    hire = hire or (lambda: Threads(folder, overrides, n))
    return run.run(ready, folder / "run", Silent(), hire=hire, report=False)


def tasks(folder: Path) -> list[Task]:
    study = open_study(folder / "run")
    try:
        return list(study.board().all())
    finally:
        study.close()


def test_run_with_workers_has_all_images_and_each_score_once(folder: Path) -> None:
    outcome = start_with(folder)
    assert outcome.finished
    alone = start(folder, into="alone")
    # The same design, panels and counts; only the proposals know of other results.
    assert outcome.images == alone.images
    for one, other in zip(outcome.results, alone.results, strict=True):
        assert (one.name, one.stage, one.scores.keys()) == (
            other.name,
            other.stage,
            other.scores.keys(),
        )
        if one.stage != "exploit":
            assert one.scores == other.scores
            assert one.images == other.images
    judged = Counter((task.of, index) for task in tasks(folder) for index in task.scores)
    assert set(judged.values()) == {1}
    assert len(judged) == outcome.images
    assert {task.worker for task in tasks(folder)} == {"w0", "w1"}


def test_images_of_one_merge_are_spread_over_the_workers(folder: Path) -> None:
    start_with(folder, n=3)
    baseline = [task for task in tasks(folder) if task.stage == "baseline" and task.name == "a"]
    assert sorted(i for task in baseline for i in task.items or ()) == list(range(6))
    assert [len(task.items or ()) for task in baseline] == [2, 2, 2]


def test_optimiser_that_hears_of_means_proposes_as_without_workers(folder: Path) -> None:
    outcome = start_with(folder, "search.optimiser=tpe", n=3)
    alone = start(folder, "search.optimiser=tpe", into="alone")
    assert [r.recipe.weights for r in outcome.results] == [r.recipe.weights for r in alone.results]
    assert [r.value for r in outcome.results] == [r.value for r in alone.results]


def test_failed_trials_have_their_reason_and_no_value(folder: Path) -> None:
    # One worker, and a design that does not depend on who is first.
    only = ("search.init_points=8", "search.n_iters=0")
    outcome = start_with(folder, "backend.fault=weak", *only, n=1)
    failed = [r for r in outcome.results if r.state == "failed"]
    assert failed
    assert all("out of memory" in r.reason and r.value is None for r in failed)
    assert outcome.finished


def test_search_by_the_gradient_has_its_slopes_from_the_workers(folder: Path) -> None:
    overrides = ("backend.name=painter", "scorers={nearness={}}", "search.optimiser=gradient")
    outcome = start_with(folder, *overrides, "search.images=40", "search.n_iters=4", n=2)
    assert outcome.finished
    followed = [r for r in outcome.results if r.stage != "baseline"]
    assert all(r.slopes for r in followed)
    assert {i for r in followed for s in r.slopes for i in s.items} == {
        i for r in followed for i in r.scores
    }


class Late:
    """Workers that come when another has taken the first task, and is never heard of again."""

    n = 2
    names = ("w0", "w1")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads: Threads | None = None
        self.stolen: Task | None = None

    def lost(self) -> Mapping[str, str]:
        if not self._threads:
            self.stolen = open_study(self._folder / "run").board().take("asleep")
            self._threads = Threads(self._folder, (), 2)
        return {}

    def leave(self) -> None: ...

    def close(self) -> None:
        if self._threads:
            self._threads.close()


def test_what_a_silent_worker_had_is_judged_by_another_and_counts_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "PATIENCE_S", 1.5)
    monkeypatch.setattr(seats, "BEAT_S", 0.1)
    late = Late(folder)
    outcome = start_with(folder, hire=lambda: late)
    assert outcome.finished
    assert outcome.images == 10 * 6 + 2 * 4 + 4 * 8
    stolen = late.stolen
    assert stolen
    again = [task for task in tasks(folder) if task.of == stolen.of]
    assert [task.ended for task in again if task.worker == "asleep"] == ["no sign of life for 2 s"]
    # It wakes up, and what it had is its own no more.
    with pytest.raises(TakenError), storage_errors():
        stolen.record(0, {"likeness": 1.0}, "digest")
    with pytest.raises(TakenError), storage_errors():
        stolen.done()
    judged = Counter((task.of, index) for task in tasks(folder) for index in task.scores)
    assert set(judged.values()) == {1}


class Doomed:
    """A worker that is lost as soon as it has a task, and replaced by one like it."""

    n = 1
    names = ("w0",)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n_lost = 0

    def lost(self) -> Mapping[str, str]:
        name = f"w{self._n_lost}"
        with contextlib.closing(open_study(self._folder / "run")) as study:
            if study.board().take(name) is None:
                return {}
        self._n_lost += 1
        return {name: "the driver went away"}

    def leave(self) -> None: ...

    def close(self) -> None: ...


def test_trial_on_which_every_worker_is_lost_is_at_fault_itself(folder: Path) -> None:
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    (folder / "run").mkdir()
    with contextlib.closing(open_study(folder / "run", create=True)) as study:
        trial = study.book("baseline", "a", ready.baseline("a"))
        hired = crew.Crew(study.board(), lambda: Doomed(folder), Silent(), crew.Alone())
        with pytest.raises(TrialError, match="3 workers were lost on it: the driver went away"):
            hired.judge(trial, ready.panel)


def test_what_ends_a_run_ends_it_with_workers_too_and_fails_no_trial(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "images").write_text("no folder, so no picture can be kept")
    with pytest.raises(RunError, match=r"a worker has stopped: .*images"):
        start_with(folder, n=1, hire=lambda: Leaving(folder, (), 1))
    study = open_study(folder / "run")
    assert {result.state for result in study.judged("baseline")} == {"running"}
    study.close()
    (folder / "run" / "images").unlink()
    assert start_with(folder).finished


class Leaving(Threads):
    """Workers that end as processes do, by an error that only their log tells."""

    def _work(self, ready: setup.Setup, run_dir: Path, name: str) -> None:
        with contextlib.suppress(OSError):
            super()._work(ready, run_dir, name)


def test_run_that_was_killed_goes_on_with_what_its_workers_had_found(folder: Path) -> None:
    class Killed(Silent):
        n_judged = 0

        def judged(self, images: int, made: bool) -> None:
            self.n_judged += images
            if self.n_judged > 30:
                raise KeyboardInterrupt

    config = configuration.load(folder / "config.toml", ())
    ready = setup.prepare(config, folder, "toy")
    with pytest.raises(KeyboardInterrupt):
        run.run(ready, folder / "run", Killed(), hire=lambda: Threads(folder, (), 2), report=False)
    outcome = start_with(folder)
    assert outcome.finished
    assert outcome.images == 10 * 6 + 2 * 4 + 4 * 8
    alone = start(folder, into="alone")
    for one, other in zip(outcome.results, alone.results, strict=True):
        if one.stage != "exploit":
            assert one.scores == other.scores


def test_task_is_taken_by_one_of_many(folder: Path) -> None:
    (folder / "run").mkdir()
    study = open_study(folder / "run", create=True)
    trial = study.book("baseline", "a", a_recipe())
    board = study.board()
    numbers = [board.post(trial, [i]) for i in range(20)]
    taken: list[str] = []

    def take_all(name: str) -> None:
        own = open_study(folder / "run").board()
        while task := own.take(name):
            taken.append(task.key)
            task.done()

    threads = [threading.Thread(target=take_all, args=(f"w{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == len(numbers)


def test_task_that_is_withdrawn_while_it_is_taken_is_passed_over(folder: Path) -> None:
    (folder / "run").mkdir()
    study = open_study(folder / "run", create=True)
    board = study.board()
    trials = [study.book("baseline", name, a_recipe()) for name in ("a", "b")]
    first, second = (board.post(trial, [0]) for trial in trials)
    turn = board.turn

    def withdrawn(number: int, state: TrialState) -> bool:
        is_own = turn(number, state)
        if state == TrialState.RUNNING:
            for _, task in board.some([first]):
                task.withdraw("the run was begun anew")
        return is_own

    board.turn = withdrawn  # type: ignore[method-assign]
    task = board.take("w0")
    assert task
    assert task.number == second


def test_score_that_is_recorded_while_a_task_is_withdrawn_is_kept(folder: Path) -> None:
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    (folder / "run").mkdir()
    with contextlib.closing(open_study(folder / "run", create=True)) as study:
        trial = study.book("baseline", "a", ready.baseline("a"))
        board = study.board()
        board.post(trial, [0, 1])
        task = board.take("w0")
        assert task
        of = board.of

        def late(key: str) -> Iterator[Task]:
            for found in of(key):
                if not found.is_over:
                    task.record(0, {"likeness": 1.0}, "digest")
                yield found

        board.of = late  # type: ignore[method-assign]
        hired = crew.Crew(board, lambda: Doomed(folder), Silent(), crew.Alone())
        hired.offer(trial, ready.panel[:2])
        assert trial.scores.keys() == {0}
        assert [found.items for found in of(trial.key)] == [[0, 1], [1]]


@pytest.mark.parametrize("is_done", [True, False])
def test_what_a_worker_says_of_its_task_stands_whoever_takes_it_away(
    folder: Path, is_done: bool
) -> None:
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    (folder / "run").mkdir()
    with contextlib.closing(open_study(folder / "run", create=True)) as study:
        trial = study.book("baseline", "a", ready.baseline("a"))
        board, said = study.board(), Silent()
        hired = crew.Crew(board, lambda: Doomed(folder), said, crew.Alone())
        hired.offer(trial, ready.panel[:1])
        task = board.take("w9")
        assert task
        turn = board.turn

        def late(number: int, state: TrialState) -> bool:
            board.turn = turn  # type: ignore[method-assign]
            task.note(["it was slow"])
            if is_done:
                task.record(0, {"likeness": 1.0}, "digest")
                task.done()
            else:
                task.fail("NaN in the merge")
            return turn(number, state)

        board.turn = late  # type: ignore[method-assign]
        (_, found), *_ = board.some([task.number])
        assert not found.withdraw("no sign of life")
        hired.tend()
        assert hired.is_ready(trial)
        assert said.lines == ["it was slow"]
        if is_done:
            hired.conclude(trial)
        else:
            with pytest.raises(TrialError, match="NaN in the merge"):
                hired.conclude(trial)


def test_what_workers_warn_of_is_told_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judging.judge

    def warning(*args: Any, **more: Any) -> None:
        logging.getLogger(diffusers.__name__).warning("out of GPU memory with %d images", 4)
        judge(*args, **more)

    monkeypatch.setattr(worker, "judge", warning)
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    (folder / "run").mkdir()
    with contextlib.closing(open_study(folder / "run", create=True)) as study:
        study.begin(ready.identity, ready.about())
        said = Silent()
        hired = crew.Crew(study.board(), lambda: Threads(folder, (), 1), said, crew.Alone())
        with contextlib.closing(hired):
            for name in ("a", "b"):
                hired.judge(study.book("baseline", name, ready.baseline(name)), ready.panel[:1])
    assert said.lines == ["out of GPU memory with 4 images"]


def test_what_stops_a_worker_of_another_machine_stops_no_run(folder: Path) -> None:
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    (folder / "run").mkdir()
    with contextlib.closing(open_study(folder / "run", create=True)) as study:
        trial, board, said = (
            study.book("baseline", "a", ready.baseline("a")),
            study.board(),
            Silent(),
        )
        hired = crew.Crew(board, lambda: Doomed(folder), said, crew.Alone())
        hired.offer(trial, ready.panel[:1])
        task = board.take("elsewhere")
        assert task
        task.stop_run("No space left on device")
        hired.tend()
        assert not hired.is_ready(trial)
        assert (
            said.lines[0]
            == "worker elsewhere of another machine has stopped: No space left on device"
        )
        task = board.take("w0")
        assert task
        task.stop_run("No space left on device")
        with pytest.raises(RunError, match="a worker has stopped: No space left"):
            hired.tend()


def test_workers_of_another_configuration_are_refused(folder: Path) -> None:
    start(folder)
    config = configuration.load(folder / "config.toml", ["panel.batch_size=4"])
    other = setup.prepare(config, folder, "toy")
    with pytest.raises(ConfigError, match="belongs to another configuration"):
        worker.work(other, folder / "run", "w0", lambda: False)


def run_of(
    folder: Path, *more: object, n: int = 2, is_deaf: bool = False
) -> subprocess.Popen[bytes]:
    """A run in a process of its own, with `n` workers in theirs."""
    source = Path(bayesian_merger.__file__).parents[1]
    command = [sys.executable, "-m", "bayesian_merger", "run", "config.toml", "--run-dir", "run"]
    return subprocess.Popen(
        [*command, "--workers", str(n), *map(str, more)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # As a shell starts what it leaves in the background.
        preexec_fn=_deaf if is_deaf else None,
    )


def _deaf() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def lives(number: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The process numbers of the workers of a run."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in children]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_worker_is_replaced_and_nothing_is_lost(folder: Path) -> None:
    process = run_of(folder, "--set", "backend.delay_s=0.05")
    killed = 0
    while process.poll() is None and killed < 2:
        held = [task for task in running(folder) if task.scores]
        children = workers_of(process)
        if held and children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[-1], signal.SIGKILL)
                killed += 1
            time.sleep(2)
        time.sleep(0.05)
    out = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, out
    assert "has ended and is replaced: exit code -9" in out
    found = json.loads((folder / "run" / "result.json").read_text())
    assert found["finished"]
    assert found["images"] == 10 * 6 + 2 * 4 + 4 * 8
    judged = Counter((task.of, index) for task in tasks(folder) for index in task.scores)
    assert set(judged.values()) == {1}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_half_of_the_workers_killed_again_and_again_lose_and_double_nothing(folder: Path) -> None:
    more = ["backend.delay_s=0.3", "search.n_iters=60"]
    process = run_of(folder, *(part for one in more for part in ("--set", one)), n=8)
    chance = random.Random(0)
    n_killed = 0
    while n_killed < 40:
        while process.poll() is None and (
            len(running(folder)) < 4 or len(workers_of(process)) < 8
        ):
            time.sleep(0.2)
        assert process.poll() is None, process.communicate()[0].decode()
        for number in chance.sample(workers_of(process), 4):
            os.kill(number, signal.SIGKILL)
            n_killed += 1
        time.sleep(chance.uniform(2, 6))
    out = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, out
    found = json.loads((folder / "run" / "result.json").read_text())
    assert found["finished"]
    judged = Counter((task.of, index) for task in tasks(folder) for index in task.scores)
    assert set(judged.values()) == {1}
    assert len(judged) == found["images"]
    with contextlib.closing(open_study(folder / "run")) as study:
        for stage in ("baseline", "select", "heldout"):
            assert {result.state for result in study.judged(stage)} == {"complete"}
        assert {result.state for result in study.searched()} == {"complete"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_run_that_is_told_to_end_does_so_in_ten_seconds(folder: Path) -> None:
    process = run_of(folder, "--set", "backend.delay_s=60")
    while not running(folder):
        assert process.poll() is None
        time.sleep(0.1)
    children = workers_of(process)
    begun = time.monotonic()
    process.terminate()
    out = process.communicate(timeout=60)[0].decode()
    assert time.monotonic() - begun < 10
    assert process.returncode == 130, out
    assert not any(map(lives, children))
    assert "Traceback" not in out


def running(folder: Path) -> list[Task]:
    if not (folder / "run" / "study.db").is_file():
        return []
    return [task for task in tasks(folder) if task.worker and not task.is_over]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_leave_when_the_run_is_killed(folder: Path) -> None:
    process = run_of(folder, "--set", "backend.delay_s=0.2", is_deaf=True)
    while not running(folder):
        assert process.poll() is None
        time.sleep(0.1)
    children = workers_of(process)
    assert len(children) == 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while any(map(lives, children)):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (("--workers", "2", "--set", "scorers={manual={}}"), "asks a person, who is one"),
        (("--workers", "0"), "0 is not in the range"),
    ],
)
def test_workers_that_cannot_be_are_told(
    folder: Path, command: Command, fault: tuple[str, ...], said: str
) -> None:
    code, _, err = command("run", folder / "config.toml", *fault)
    assert code == 2
    assert said in " ".join(err.split())


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_workers_on_one_named_gpu_are_refused(folder: Path, device: str) -> None:
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    told = {"name": "stripes", "device": device}
    engine = type(ready.config.backend).model_validate(told)
    ready = replace(ready, config=ready.config.model_copy(update={"backend": engine}))
    path, run_dir = folder / "config.toml", folder / "run"
    with pytest.raises(ConfigError, match=f"2 workers: .* = '{device}' is one GPU, .* leave"):
        hiring(2, path, [], ready, run_dir)
    assert hiring(None, path, [], ready, run_dir) is None


def test_time_since_workers_were_told_to_leave_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "LEAVE_S", 1.0)
    deaf = [sys.executable, "-c", "import time; time.sleep(60)"]
    pool = crew.Pool(deaf, b"", [{}, {}], tmp_path)
    pool.leave()
    time.sleep(1.0)  # as a report is written
    begun = time.monotonic()
    pool.close()
    assert time.monotonic() - begun < 0.9
