"""Runs that several processes join by a storage on a server, a real PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import optuna
import postgres
import pytest
import toy_plugin
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from outcomes import a_recipe
from test_cli import Command
from test_cli import command as command
from test_run import Silent, measured, start
from test_run import folder as folder

from bayesian_merger import __version__, joining, outcome, run, setup
from bayesian_merger import config as configuration
from bayesian_merger.crew import Hands
from bayesian_merger.data import Estimate, Model, Recipe
from bayesian_merger.errors import ConfigError, RunError, TakenError
from bayesian_merger.joining import helps
from bayesian_merger.outcome import open_study
from bayesian_merger.study import Stage, Study, create, seats
from bayesian_merger.study.board import Task
from bayesian_merger.study.patience import Patient
from bayesian_merger.study.seats import Seat, Seats, Watch
from bayesian_merger.study.storage import close, storage_at

pytestmark = pytest.mark.skipif(not postgres.PG_CTL, reason="PostgreSQL is not installed")

T = TypeVar("T")

# A process whose seat is taken away soon, so that a test need not wait for it.
HASTY = """
import sys
from bayesian_merger.study import seats
seats.BEAT_S, seats.SILENCE_S, seats._SURE_S = 0.2, 3.0, 1.0
from bayesian_merger.cli import main
main()
"""


class Server(Protocol):
    """Where several machines have their study."""

    @property
    def url(self) -> str: ...


IMAGES = 10 * 6 + 2 * 4 + 4 * 8


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Postgres]:
    with postgres.Postgres() as one:
        yield one


def join(folder: Path, server: Server, into: str, *more: str) -> subprocess.Popen[str]:
    """A process that works on the run, in a folder of its own, as another machine's would be."""
    run_dir = folder / into / folder.name
    told = ["--run-dir", str(run_dir), "--set", f"search.storage={server.url}", *more]
    return subprocess.Popen(
        [sys.executable, "-c", HASTY, "run", str(folder / "config.toml"), *told],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )


def tasks(folder: Path, server: Server) -> list[Task]:
    study = open_study(folder / "one" / folder.name, server.url)
    try:
        return list(study.board().all())
    finally:
        study.close()


def wait_for(folder: Path, server: Server, *, scores: int = 1, processes: int = 1) -> None:
    """Until so many images were judged, and so many processes work on the run."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(ConfigError):  # it has not begun yet
            study = open_study(folder / "one" / folder.name, server.url)
            try:
                judged = sum(len(task.scores) for task in study.board().all())
                if judged >= scores and len(study.seats().taken()) >= processes:
                    return
            finally:
                study.close()
        time.sleep(0.1)
    raise AssertionError("it does not go on")


def leader_and_helper(
    folder: Path, server: Server
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Two processes that work on a run by now, in the folders "one" and "two"."""
    slow = ("--set", "backend.delay_s=0.1")
    first = join(folder, server, "one", *slow)
    wait_for(folder, server, scores=5)
    second = join(folder, server, "two", *slow)
    wait_for(folder, server, scores=10, processes=2)
    return first, second


def require_whole(folder: Path, server: Server, into: str) -> None:
    """Every image was judged, and counts once."""
    found = json.loads((folder / into / folder.name / "result.json").read_text())
    assert found["finished"]
    assert found["images"] == IMAGES
    study = open_study(folder / into / folder.name, server.url)
    try:
        stages: tuple[Stage, ...] = ("baseline", "select", "heldout")
        results = [*study.searched(), *(r for stage in stages for r in study.judged(stage))]
        assert all(result.state == "complete" for result in results)
        counted = {(r.stage, r.name, index): s for r in results for index, s in r.scores.items()}
        assert len(counted) == IMAGES
        told = [
            ((task.stage, task.name, index), score)
            for task in study.board().all()
            for index, score in task.scores.items()
        ]
        assert counted == dict(told)
        assert len(told) == IMAGES
    finally:
        study.close()


def test_same_command_elsewhere_joins_the_run(folder: Path, server: postgres.Postgres) -> None:
    more = ("--set", "backend.delay_s=0.05", "--set", "output.artifacts=shelf")
    processes = [join(folder, server, into, *more) for into in ("one", "two")]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("this one helps" in one for one in said) == 1, said
    for into in ("one", "two"):
        require_whole(folder, server, into)
        assert (folder / into / folder.name / "report.html").is_file()
    judged = Counter((t.of, i) for t in tasks(folder, server) for i in t.scores)
    assert set(judged.values()) == {1}
    # A, B and the even merge on the panel, and with the best on the held-out one.
    one, two = (set((folder / into).rglob("images/**/*.png")) for into in ("one", "two"))
    assert len(one) == 3 * 6 + 4 * 8
    assert {path.name for path in one} == {path.name for path in two}
    # Both had a share in it.
    assert len({task.worker for task in tasks(folder, server) if task.scores}) == 2


def test_leader_that_is_killed_is_replaced_by_another(
    folder: Path, server: postgres.Postgres
) -> None:
    first, second = leader_and_helper(folder, server)
    assert run.is_alive(folder / "two" / folder.name, server.url)
    first.kill()
    first.communicate()
    out = second.communicate(timeout=240)[0]
    assert second.returncode == 0, out
    assert "this one helps" in out
    require_whole(folder, server, "two")
    assert not run.is_alive(folder / "two" / folder.name, server.url)


@pytest.mark.slow
def test_leader_that_was_asleep_finds_another_and_helps(
    folder: Path, server: postgres.Postgres
) -> None:
    first, second = leader_and_helper(folder, server)
    first.send_signal(signal.SIGSTOP)
    time.sleep(6)
    first.send_signal(signal.SIGCONT)
    said = [process.communicate(timeout=240)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert "another process has taken over" in said[0]
    for into in ("one", "two"):
        require_whole(folder, server, into)


def test_database_that_is_away_is_waited_for(tmp_path: Path) -> None:
    with postgres.Postgres() as own:
        study = Study(storage_at(own.url), "run")
        said: list[str] = []
        study.waits(said.append)
        study.begin({"search": {"seed": 1}}, {"told": "before"})
        own.stop()
        back = threading.Timer(4.5, own.start)
        back.start()
        study.begin({"search": {"seed": 1}}, {"told": "after"})
        back.join()
        assert study.about == {"told": "after"}
        assert ["does not answer" in said[0], "answers again" in said[1]] == [True, True]
        study.close()


@pytest.mark.slow
def test_run_goes_on_when_its_database_was_away(folder: Path) -> None:
    with postgres.Postgres() as own:
        processes = leader_and_helper(folder, own)
        own.stop()
        time.sleep(8)
        own.start()
        said = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        assert "the study's database does not answer" in "".join(said)
        assert "the study's database answers again" in "".join(said)
        for into in ("one", "two"):
            require_whole(folder, own, into)


@pytest.mark.slow
def test_process_may_be_stopped_while_the_database_is_away(folder: Path) -> None:
    with postgres.Postgres() as own:
        process = join(folder, own, "one", "--set", "backend.delay_s=0.1")
        wait_for(folder, own, scores=5)
        own.stop()
        time.sleep(5)
        process.terminate()  # an interruption is not heard where the tests ignore it
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130, said
        assert "Traceback" not in said
        own.start()
        again = join(folder, own, "one", "--set", "backend.delay_s=0.1")
        said = again.communicate(timeout=120)[0]
        assert again.returncode == 0, said
        require_whole(folder, own, "one")


def test_process_with_another_setup_is_turned_away(
    folder: Path, server: postgres.Postgres, command: Command
) -> None:
    storage = f"--set=search.storage={server.url}"
    start(folder, storage.removeprefix("--set="), into=f"one/{folder.name}")
    toy_plugin.write_model(folder / "other.safetensors", 0.9)
    for change, differs in (
        ("search.seed=7", "search.seed was 0, is 7"),
        ("heldout.images=9", "heldout_panel was 8, is 1"),
        ('models.b="other.safetensors"', "models.b"),
        ("scorers={ nearness = {} }", "scorers"),
    ):
        run_dir = folder / "two" / folder.name
        code, _, err = command(
            "run", folder / "config.toml", "--run-dir", run_dir, storage, "--set", change
        )
        assert code == 2
        assert differs in err
        assert "belongs to another configuration" in err
        assert server.password not in err


def test_process_that_cannot_help_is_turned_away(own_study: Study, own_seats: Seats) -> None:
    leader = own_seats.sit("0.0.9", leads=True)
    with pytest.raises(ConfigError, match=r"led by version 0\.0\.9"):
        helps(own_study, own_seats, None, print, agreed)
    leader.leave("")
    own_seats.sit(__version__, leads=True)
    with pytest.raises(ConfigError, match="for one process alone"):
        helps(own_study, own_seats, None, print, agreed)


def test_process_that_came_at_once_with_another_setup_hires_nobody(
    own_study: Study, own_seats: Seats
) -> None:
    def require_same() -> None:
        own_study.require_same({"search": {"seed": 2}})

    require_same()  # as nothing has begun
    own_seats.sit(__version__, leads=True)
    begins = threading.Timer(0.3, own_study.begin, ({"search": {"seed": 1}}, {}))
    begins.start()
    with pytest.raises(ConfigError, match=r"search\.seed was 1, is 2"):
        helps(own_study, own_seats, unhired, print, require_same)
    begins.join()


def test_what_ended_the_leader_ends_who_helps(own_study: Study, own_seats: Seats) -> None:
    class Idle:
        n = 1
        names = ()

        def lost(self) -> Mapping[str, str]:
            leader.leave("three trials failed", is_fatal=True)
            return {}

        def leave(self) -> None: ...

        def close(self) -> None: ...

    own_study.begin({"search": {}}, {})
    found = own_seats.lead(__version__)
    assert found
    leader = found
    with pytest.raises(RunError, match="has stopped: three trials failed"):
        helps(own_study, own_seats, Idle, print, agreed)
    assert not own_seats.taken()


class Dying:
    """Two workers of which one dies at each look, once it has judged an image or could not keep one."""

    n = 2

    def __init__(self, study: Study, leader: Seat, n_looks: int, fatal: str = "") -> None:
        self.names: list[str] = []
        self._study, self._leader, self._left, self._fatal = study, leader, n_looks, fatal
        self._trial = study.book("baseline", "a", a_recipe())

    def lost(self) -> Mapping[str, str]:
        self._left -= 1
        if not self._left:
            self._leader.leave("over", is_done=True)
        board = self._study.board()
        board.post(self._trial, [0])
        task = board.take(f"w{self._left}")
        assert task
        if self._fatal:
            task.stop_run(self._fatal)
        else:
            task.record(0, {"likeness": 1.0}, "digest")
        return {f"w{self._left}": "exit code -9"}

    def leave(self) -> None: ...

    def close(self) -> None: ...


def test_workers_that_end_once_they_have_judged_are_replaced_for_ever(
    own_study: Study, own_seats: Seats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_LOOK_S", 0.0)
    own_study.begin({"search": {}}, {})
    leader = own_seats.lead(__version__)
    assert leader
    dying = Dying(own_study, leader, 10)
    last = helps(own_study, own_seats, lambda: dying, lambda text: None, agreed)
    assert last
    assert last.is_done


def test_machine_whose_disk_is_full_leaves_and_the_run_goes_on(
    own_study: Study, own_seats: Seats
) -> None:
    own_study.begin({"search": {}}, {})
    leader = own_seats.lead(__version__)
    assert leader
    dying = Dying(own_study, leader, 9, "No space left on device")
    with pytest.raises(RunError, match="a worker has stopped: No space left on device"):
        helps(own_study, own_seats, lambda: dying, print, agreed)
    (left,) = own_seats.taken()
    assert left.number == leader.number


def test_wrong_password_and_a_database_to_read_only_are_told(
    folder: Path, command: Command
) -> None:
    with postgres.Postgres() as own:
        wrong = own.url.replace(own.password, "wr0ng")
        code, _, err = command("run", folder / "config.toml", f"--set=search.storage={wrong}")
        assert code == 2
        assert "password authentication failed" in err
        assert "wr0ng" not in err
        own.run("ALTER DATABASE postgres SET default_transaction_read_only = on")
        code, _, err = command("run", folder / "config.toml", f"--set=search.storage={own.url}")
        assert code == 2
        assert "read-only transaction" in err
        assert own.password not in err
        assert len(err.strip().splitlines()) == 1


@pytest.fixture
def own_study(tmp_path: Path) -> Iterator[Study]:
    create(tmp_path / "study.db")
    study = Study(tmp_path / "study.db")
    yield study
    study.close()


@pytest.fixture
def own_seats(own_study: Study) -> Seats:
    return own_study.seats()


def agreed() -> None:
    """The run is the same."""


def unhired() -> Hands:
    raise AssertionError("workers were hired")


def test_machines_that_join_at_once_have_one_study(
    tmp_path: Path, server: postgres.Postgres
) -> None:
    folders = [tmp_path / str(n) / "at once" for n in range(8)]
    for one in folders:
        one.mkdir(parents=True)
    studies = [open_study(one, server.url, create=True) for one in folders]
    together = threading.Barrier(len(folders))
    refused: list[Exception] = []

    def come(own: Path, study: Study) -> None:
        together.wait()
        try:
            outcome.join(study, own)
        except ConfigError as error:
            refused.append(error)

    threads = [
        threading.Thread(target=come, args=one) for one in zip(folders, studies, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not refused
    assert len({outcome.mark_of(one) for one in folders}) == 1
    for study in studies:
        study.close()


@pytest.mark.slow
def test_extension_is_spent_once_by_all_that_were_told_to_extend(
    folder: Path, server: postgres.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = (f"search.storage={server.url}", "search.n_iters=4")
    ready = setup.prepare(configuration.load(folder / "config.toml", told), folder, "toy")

    def begin(into: str, more: int | None) -> int:
        run_dir = folder / into / "extended"
        return run.run(ready, run_dir, Silent(), more, report=False).images

    n_before = begin("one", None)

    def lead_later(own: Seats) -> Seat | None:
        monkeypatch.undo()
        assert begin("one", 10) >= n_before + 10
        return own.lead(__version__)

    monkeypatch.setattr(run, "leads", lead_later)
    n_after = begin("two", 10)
    assert n_after == begin("one", None)


def test_leader_that_has_lost_its_seat_stores_nothing_of_a_trial(
    own_study: Study, own_seats: Seats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats, "_SURE_S", -1.0)  # it asks each time
    seat = own_seats.lead("1")
    assert seat
    models = (Model("a", "0"), Model("b", "1"))
    recipe = Recipe("weighted_sum", "sd1", models, {"alpha": {"base": 0.5}})
    with own_study.fenced(seat.require):
        trial = own_study.book("baseline", "even", recipe)
    trial.record(0, {"likeness": 1.0}, "0")
    seat.leave("no sign of life")
    acts: tuple[Callable[[], None], ...] = (
        lambda: trial.record(1, {"likeness": 1.0}, "1"),
        lambda: trial.follow([0], {}),
        lambda: trial.unfollowed("out of memory"),
        lambda: trial.spend(merge=1.0),
        lambda: trial.complete(Estimate(1.0, 0.0, 1)),
        lambda: trial.fail("of no use"),
    )
    for act in acts:
        with pytest.raises(TakenError):
            act()
    (left,) = own_study.judged("baseline")
    assert (left.state, set(left.scores)) == ("running", {0})


def test_end_whose_answer_was_lost_is_an_end() -> None:
    storage = Forgetful()
    study = optuna.create_study(storage=storage)
    for state, values in ((TrialState.COMPLETE, [1.0]), (TrialState.FAIL, None)):
        trial = study.ask()
        storage.is_lost = True
        assert storage.set_trial_state_values(trial._trial_id, state, values)
        assert storage.get_trial(trial._trial_id).state == state
    # What another has ended otherwise is no end of this one's.
    trial = study.ask()
    study.tell(trial, 2.0)
    storage.is_away = True
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])


class Forgetful(
    Patient,
    InMemoryStorage,  # type: ignore[misc]  # Optuna imports it lazily
    waits=("set_trial_state_values",),
):
    """A server that does what it is told and goes away before it says so, or before it hears it."""

    is_lost = is_away = False

    def wait_for(self, call: Callable[[], T]) -> T:
        def attempt() -> T:
            if self.is_away:
                self.is_away = False
                raise StorageInternalError("it is away")
            found = call()
            if self.is_lost:
                self.is_lost = False
                raise StorageInternalError("the connection is lost")
            return found

        return super().wait_for(attempt)

    def _is_away(self, error: Exception) -> bool:
        return True


def test_of_many_that_want_to_lead_one_does(server: postgres.Postgres) -> None:
    storage = storage_at(server.url)
    study = optuna.create_study(storage=storage)
    leading: list[int] = []

    def want(number: int) -> None:
        mine = storage_at(server.url)
        own = Seats(mine, optuna.load_study(study_name=study.study_name, storage=mine))
        while not leading:
            if own.lead("1"):
                leading.append(number)
        mine.engine.dispose()

    threads = [threading.Thread(target=want, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = Seats(storage, study)
    (found,) = (seat for seat in every.taken() if seat.leads)
    assert len(leading) == 1
    # One may have sat down later and left, as it saw this one.
    every.sit("1", leads=True).leave("another took it at the same time")
    last = every.last()
    assert last
    assert last.number == found.number
    close(storage)


def test_silent_process_loses_its_seat_and_records_nothing_more(
    own_seats: Seats, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(seats, "clock", lambda: now[0])
    seat = own_seats.lead("1")
    assert seat
    for _ in range(20):  # it gives signs
        now[0] += 4
        seat.beat()
        assert own_seats.leader()
    for _ in range(7):
        now[0] += 4
        assert own_seats.leader()
    now[0] += 4
    assert own_seats.leader() is None
    with pytest.raises(TakenError):
        seat.require()
    other = own_seats.lead("1")
    assert other
    last = own_seats.last()
    assert last
    assert last.number == other.number


def test_time_in_which_nobody_looked_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(seats, "clock", lambda: now[0])
    watch = Watch()
    watch.silence(1)
    now[0] += 3600  # this machine was asleep
    assert watch.silence(1) <= 5
    now[0] += 2
    assert watch.silence(1) <= 7
    assert watch.silence(2) == 0


def test_password_may_be_where_postgresql_looks_for_it(
    folder: Path, server: postgres.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", server.password)
    url = server.url.replace(f":{server.password}", "")
    assert start(folder, f"search.storage={url}", "search.n_iters=0").finished


def test_run_that_was_stopped_goes_on_by_the_server(
    folder: Path, server: postgres.Postgres
) -> None:
    plain = start(folder, into="alone")
    overrides = (f"search.storage={server.url}", "backend.fault=stop", "backend.at=19")
    run_dir = folder / "one" / folder.name
    with pytest.raises(KeyboardInterrupt):
        start(folder, *overrides, into=f"one/{folder.name}")
    ready = setup.prepare(configuration.load(folder / "config.toml", overrides), folder, "toy")
    ready.backend._at = -1  # type: ignore[attr-defined]
    # The seat was given up, so nobody waits until it is silent.
    begun = time.monotonic()
    resumed = run.run(ready, run_dir, Silent(), report=False)
    assert time.monotonic() - begun < seats.SILENCE_S
    assert measured(resumed) == measured(plain)
    assert resumed.images == IMAGES
