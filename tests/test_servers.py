"""A study on a server: a MariaDB, a PostgreSQL, or Optuna's proxy before one of them or a file."""

from __future__ import annotations

import contextlib
import http.server
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mariadb
import optuna
import optuna_proxy
import postgres
import pytest
from optuna.distributions import FloatDistribution
from sqlalchemy import text
from test_cli import Command
from test_cli import command as command
from test_joining import Server, join, leader_and_helper, require_whole, tasks, wait_for
from test_run import Silent, measured, start
from test_run import folder as folder
from test_study import even

from bayesian_merger import config as configuration
from bayesian_merger import run, setup
from bayesian_merger.dashboard import Dashboard
from bayesian_merger.data import Prompt
from bayesian_merger.errors import ConfigError, RunError, TakenError
from bayesian_merger.study import Study, create
from bayesian_merger.study.seats import Seats
from bayesian_merger.study.storage import is_in, search_alone, storage_at, storage_errors, url_of

needs_mariadb = pytest.mark.skipif(not mariadb.MARIADBD, reason="MariaDB is not installed")
needs_postgres = pytest.mark.skipif(not postgres.PG_CTL, reason="PostgreSQL is not installed")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[optuna_proxy.Proxy]:
    """One before a file."""
    with optuna_proxy.Proxy(url_of(tmp_path_factory.mktemp("proxy") / "all.db")) as one:
        yield one


@pytest.fixture(scope="module")
def database() -> Iterator[mariadb.MariaDB]:
    with mariadb.MariaDB() as one:
        yield one


@pytest.fixture(
    params=[
        "proxy",
        pytest.param("database", marks=[needs_mariadb, pytest.mark.slow]),
        pytest.param("both", marks=[needs_mariadb, pytest.mark.slow]),
    ]
)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind; both: a proxy before a database."""
    if request.param == "both":
        with optuna_proxy.ProxyProcess(request.getfixturevalue("database").url) as one:
            yield one
    else:
        yield request.getfixturevalue(request.param)


@contextlib.contextmanager
def study_of(server: Server, name: str) -> Iterator[Study]:
    study = Study(storage_at(server.url), name)
    try:
        yield study
    finally:
        study.close()


def test_task_on_a_server_is_taken_by_one_of_many(server: Server) -> None:
    with study_of(server, "taken") as study:
        trial = study.book("baseline", "a", even(0.5))
        board = study.board()
        numbers = [board.post(trial, [i]) for i in range(12)]
        taken: list[int] = []

        def take_all(name: str) -> None:
            with study_of(server, "taken") as own:
                while task := own.board().take(name):
                    taken.append(task.number)

        threads = [threading.Thread(target=take_all, args=(f"w{k}",)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == numbers
        workers = {task.worker for _, task in board.some(numbers)}
        assert workers <= {f"w{k}" for k in range(8)}


def test_task_that_was_withdrawn_takes_nothing_more_on_a_server(server: Server) -> None:
    with study_of(server, "withdrawn") as study, study_of(server, "withdrawn") as other:
        board = study.board()
        number = board.post(study.book("baseline", "a", even(0.5)), [0, 1])
        task = other.board().take("w0")
        assert task
        task.record(0, {"taste": 1.0}, "one")
        (own,) = (found for _, found in board.some([number]))
        assert own.worker == "w0"
        assert own.scores == {0: {"taste": 1.0}}  # what others write is seen
        assert own.withdraw("it was silent")
        late: tuple[Callable[[], None], ...] = (
            lambda: task.record(1, {"taste": 2.0}, "two"),
            task.beat,
            task.done,
            lambda: task.note(["late"]),
        )
        for call in late:
            with pytest.raises(TakenError), storage_errors():
                call()
        assert not task.withdraw("twice")
        (own,) = (found for _, found in board.some([number]))
        assert (own.scores, own.ended, own.notes) == ({0: {"taste": 1.0}}, "it was silent", [])


def test_of_many_that_want_to_lead_on_a_server_one_does(server: Server) -> None:
    leading: list[int] = []

    def want(number: int) -> None:
        with study_of(server, "led") as own:
            seats: Seats = own.seats()
            while not leading:
                if seats.lead("1"):
                    leading.append(number)

    threads = [threading.Thread(target=want, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with study_of(server, "led") as study:
        assert len([seat for seat in study.seats().taken() if seat.leads]) == len(leading) == 1


def test_long_texts_are_kept_whole_on_a_server(server: Server) -> None:
    panel = ["ü" * 20_000] * 50  # 6 MB as JSON
    with study_of(server, "long") as study:
        study.begin({"seed": 1}, {"panel": panel})
        trial = study.book("baseline", "a", even(0.5))
        trial.record(0, {"taste": 1.0}, "one", Prompt(0, "p", panel[0], 1).to_dict())
        assert study.about == {"panel": panel}
    with study_of(server, "long") as again:
        again.begin({"seed": 1}, {"panel": panel[:1]})  # in place of one that is there
        assert again.about == {"panel": panel[:1]}
        (judged,) = again.judged("baseline")
        assert judged.prompts[0].prompt == panel[0]


@pytest.mark.slow
def test_run_on_a_server_is_as_in_a_folder(folder: Path, server: Server, command: Command) -> None:
    name = f"run-{type(server).__name__}-{server.url.partition(':')[0][:5]}"
    overrides = (f"search.storage={server.url}", "backend.fault=stop", "backend.at=19")
    with pytest.raises(KeyboardInterrupt):
        start(folder, *overrides, into=name)
    ready = setup.prepare(configuration.load(folder / "config.toml", overrides), folder, "toy")
    ready.backend._at = -1  # type: ignore[attr-defined]
    found = run.run(ready, folder / name, Silent(), report=False)
    assert measured(found) == measured(start(folder, into="alone"))
    storage = ("--storage", server.url)
    assert command("report", folder / name, *storage)[0] == 0
    code, _, err = command("export", folder / name, *storage, "-o", folder / "tables")
    assert code == 0, err
    assert (folder / "tables" / "trials.csv").read_text().count("exploit") >= 3
    (shown,) = search_alone(folder / "study.db", server.url, name).get_all_studies()
    assert shown.study_name == f"{name}/search"
    with contextlib.closing(Dashboard(folder / name, server.url)) as dashboard:
        threading.Thread(target=dashboard.serve, daemon=True).start()
        assert dashboard.url.startswith("http://127.0.0.1")


def away(server: optuna_proxy.Proxy | mariadb.MariaDB, what: str) -> None:
    with study_of(server, "away") as study:
        said: list[str] = []
        study.waits(said.append)
        study.begin({"seed": 1}, {"told": "before"})
        server.stop()
        back = threading.Timer(4.5, server.start)
        back.start()
        study.begin({"seed": 1}, {"told": "after"})
        back.join()
        assert study.about == {"told": "after"}
        assert [f"{what} does not answer" in said[0], f"{what} answers again" in said[1]] == [
            True
        ] * 2
        assert len(said) == 2
        server.stop()
        study.hurries()
        begun = time.monotonic()
        with pytest.raises(RunError, match="cannot be read or written"), storage_errors():
            study.begin({"seed": 1}, {"told": "never"})
        assert time.monotonic() - begun < 5


def test_proxy_that_is_away_is_waited_for(tmp_path: Path) -> None:
    with optuna_proxy.Proxy(url_of(tmp_path / "all.db")) as own:
        away(own, "proxy")


@pytest.mark.slow
@needs_mariadb
def test_mariadb_that_is_away_is_waited_for() -> None:
    with mariadb.MariaDB() as own:
        away(own, "database")


@pytest.mark.slow
@needs_mariadb
def test_database_that_is_away_behind_a_proxy_is_waited_for() -> None:
    with (
        mariadb.MariaDB() as own,
        optuna_proxy.ProxyProcess(own.url) as proxy,
        study_of(proxy, "away") as study,
    ):
        said: list[str] = []
        study.waits(said.append)
        own.stop()
        back = threading.Timer(8, own.start)
        back.start()
        study.begin({"seed": 1}, {"told": "after"})
        back.join()
        assert study.about == {"told": "after"}
        assert "its database does not answer" in said[0]
        assert len(said) == 2


def test_proxy_that_was_begun_anew_takes_parameters_of_a_trial_before(tmp_path: Path) -> None:
    with optuna_proxy.Proxy(url_of(tmp_path / "all.db")) as own:
        storage = storage_at(own.url)
        study = optuna.create_study(storage=storage)
        trial = study.ask()
        own.stop()
        own.start()
        assert trial._suggest("x", FloatDistribution(0, 1)) == study.trials[0].params["x"]


@pytest.mark.slow
@needs_mariadb
def test_same_command_elsewhere_joins_the_run_on_a_server(folder: Path, server: Server) -> None:
    more = ("--set", "backend.delay_s=0.05")
    processes = [join(folder, server, into, *more) for into in ("one", "two")]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("this one helps" in one for one in said) == 1, said
    for into in ("one", "two"):
        require_whole(folder, server, into)


@pytest.mark.slow
@needs_postgres
def test_run_goes_on_when_its_proxy_and_the_database_behind_it_were_away(folder: Path) -> None:
    with postgres.Postgres() as own, optuna_proxy.ProxyProcess(own.url) as proxy:
        first, second = leader_and_helper(folder, proxy)
        servers: tuple[optuna_proxy.Proxy | postgres.Postgres, ...] = (proxy, own)
        for server in servers:
            server.stop()
            time.sleep(6)
            server.start()
            before = sum(len(task.scores) for task in tasks(folder, proxy))
            wait_for(folder, proxy, scores=before + 8)
        first.kill()
        said = first.communicate()[0] + second.communicate(timeout=240)[0]
        assert second.returncode == 0, said
        assert "the study's proxy does not answer (failed to connect" in said
        assert "the study's proxy does not answer (its database does not answer" in said
        require_whole(folder, proxy, "two")


def test_what_is_no_proxy_is_told_in_one_line() -> None:
    page = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    port = postgres.free_port()
    try:
        for url, said in (
            (f"grpc://127.0.0.1:{port}", "Connection refused"),
            (f"grpc://127.0.0.1:{page.server_port}", "cannot be opened"),
            ("grpc://me:sec@127.0.0.1:1", "it knows no users"),
            ("grpc://127.0.0.1:1/merges", "grpc://HOST:PORT alone"),
            ("grpc://", "grpc://HOST:PORT alone"),
        ):
            with pytest.raises(ConfigError) as told:
                storage_at(url)
            assert said in str(told.value)
            assert "\n" not in str(told.value)
            assert "sec" not in str(told.value).replace("second", "")
    finally:
        page.shutdown()
        page.server_close()


def test_proxy_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "bayesian_merger.study.proxy")
    with pytest.raises(ConfigError, match=r"pip install 'bayesian-merger\[grpc\]'"):
        storage_at("grpc://127.0.0.1:1")


@needs_mariadb
def test_tables_of_mariadb_that_optuna_made_are_made_longer(database: mariadb.MariaDB) -> None:
    database.run("CREATE DATABASE plain; GRANT ALL ON plain.* TO merger@'127.0.0.1'")
    url = database.url.replace("/merges", "/plain")
    optuna.create_study(storage=url, study_name="mine")
    study = Study(storage_at(url), "run")
    study.begin({}, {"panel": "x" * 70_000})
    assert len(study.about["panel"]) == 70_000
    study.close()


def stamp(url: str, version: str) -> None:
    with optuna.storages.RDBStorage(url).engine.begin() as connection:
        connection.execute(text(f"UPDATE alembic_version SET version_num = '{version}'"))


@pytest.mark.parametrize(
    ("version", "said"),
    [("v2.6.0.a", "optuna storage upgrade --storage URL"), ("v9.0.0.a", "update this program")],
)
def test_storage_of_another_version_of_optuna_says_what_to_do(
    folder: Path, command: Command, version: str, said: str
) -> None:
    url = url_of(folder / "all.db")
    storage_at(url)
    stamp(url, version)
    code, _, err = command("run", folder / "config.toml", f"--set=search.storage={url}")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert said in err
    create(folder / "study.db")
    stamp(url_of(folder / "study.db"), version)
    with pytest.raises(ConfigError, match=said):
        Study(folder / "study.db")


@pytest.mark.slow
@needs_postgres
def test_postgresql_of_another_version_of_optuna_says_what_to_do() -> None:
    with postgres.Postgres() as own:
        storage_at(own.url)
        own.run("UPDATE alembic_version SET version_num = 'v9.0.0.a'")
        with pytest.raises(ConfigError, match="a newer Optuna") as told:
            is_in(own.url, "run")
        assert own.password not in str(told.value)
