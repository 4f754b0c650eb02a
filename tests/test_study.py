from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import psutil
import pytest

from bayesian_merger.blocks import SD1
from bayesian_merger.data import Estimate, Model, Recipe, Result
from bayesian_merger.errors import ConfigError
from bayesian_merger.study import Study, Trial, create
from bayesian_merger.study.proposals import Plan, Proposer
from bayesian_merger.study.storage import is_in, require_local, storage_at, url_of

MODELS = (Model("a.safetensors", "aa"), Model("b.safetensors", "bb"))


def recipe(params: Mapping[str, float]) -> Recipe:
    return Recipe("weighted_sum", "sd1", MODELS, {"alpha": dict(params)})


def even(value: float) -> Recipe:
    return recipe(dict.fromkeys(SD1.blocks, value))


def plan(optimiser: str = "bayes", init_points: int = 2) -> Plan:
    return Plan(
        dict.fromkeys(SD1.blocks, (0.0, 1.0)),
        ["p"] * 4,
        n_iters=20,
        optimiser=optimiser,
        init_points=init_points,
        per_trial=2,
        seed=3,
    )


def searching(study: Study, how: Plan) -> Proposer:
    return study.searching(how, lambda scores: scores["taste"])


def proposals(study: Study, how: Plan, n: int) -> list[Mapping[str, float]]:
    proposer, asked = searching(study, how), []
    for _ in range(n):
        trial = study.ask(proposer, recipe)
        weights = trial.recipe.weights["alpha"]
        asked.append(weights)
        score = -sum((weight - 0.3) ** 2 for weight in weights.values())
        for item in trial.items or ():
            trial.record(item, {"taste": score}, "")
        trial.complete(Estimate(score, 0.1, 2))
    return asked


def ask(path: Path) -> Trial:
    study = Study(path)
    return study.ask(searching(study, plan()), recipe)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


@pytest.mark.parametrize("optimiser", ["bayes", "tpe"])
def test_reopened_study_proposes_what_an_open_one_would_have(
    tmp_path: Path, optimiser: str
) -> None:
    open_all_along = Study(tmp_path / "one.db")
    expected = proposals(open_all_along, plan(optimiser), 6)
    found = [proposals(Study(tmp_path / "two.db"), plan(optimiser), 1)[0] for _ in range(6)]
    assert found == expected


def test_interrupted_trial_comes_back_with_its_scores(path: Path) -> None:
    trial = ask(path)
    trial.record(0, {"taste": 1.5}, "aaaa")
    trial.spend(generate=2.0)
    again = ask(path)
    assert again.recipe == trial.recipe
    assert again.scores == {0: {"taste": 1.5}}
    again.spend(generate=1.0)
    assert again.result().seconds == {"generate": 3.0}


def test_trial_goes_on_whose_process_was_killed_as_it_ended_it(path: Path) -> None:
    trial = ask(path)
    cut = optuna.load_study(storage=url_of(path), study_name="search")
    cut.tell = lambda *_, **__: None  # is not reached any more
    Trial(cut, cut.trials[trial.number]).fail("out of memory")
    Trial(cut, cut.trials[trial.number]).complete(Estimate(1.0, 0.1, 2))
    (result,) = Study(path).searched()
    assert (result.state, result.value, result.reason) == ("running", None, "")
    ask(path).complete(Estimate(2.0, 0.1, 2))
    (result,) = Study(path).searched()
    assert (result.state, result.value, result.reason) == ("complete", Estimate(2.0, 0.1, 2), "")


def test_score_that_stands_is_not_replaced(path: Path) -> None:
    trial = ask(path)
    trial.record(0, {"taste": 1.5}, "aaaa")
    trial.record(0, {"taste": 9.9}, "bbbb")
    (result,) = Study(path).searched()
    assert result.scores == {0: {"taste": 1.5}}
    assert result.images == {0: "aaaa"}


def test_proposal_that_was_cut_off_before_its_recipe_is_asked_for_again(path: Path) -> None:
    study = Study(path)
    proposals(study, plan(), 3)
    cut = optuna.load_study(storage=url_of(path), study_name="search")
    cut.ask(plan().distributions)  # and is killed
    expected = Study(path.with_name("other.db"))
    whole = proposals(expected, plan(), 4)
    assert proposals(Study(path), plan(), 1)[0] == whole[3]
    assert [r.name for r in Study(path).searched()] == ["trial 1", "trial 2", "trial 3", "trial 4"]


def test_exploration_covers_each_axis_evenly_and_favours_its_ends(path: Path) -> None:
    points = proposals(Study(path), plan(init_points=8), 8)
    table = np.array([list(weights.values()) for weights in points])
    shares = np.arcsin(np.sqrt(table)) * 2 / np.pi
    # Each eighth of each axis holds one point of the first eight of a Sobol sequence.
    assert (np.sort(np.floor(shares * 8), axis=0) == np.arange(8)[:, None]).all()


def test_failed_trial_is_not_told_as_a_number(path: Path) -> None:
    ask(path).fail("the server went away")
    (result,) = Study(path).searched()
    assert (result.state, result.value, result.reason) == ("failed", None, "the server went away")
    stored = optuna.load_study(storage=url_of(path), study_name="search").trials
    assert [t.state.name for t in stored] == ["FAIL"]
    assert stored[0].values is None


def test_baseline_is_observed_once_with_its_scores(path: Path) -> None:
    study = Study(path)
    trial = study.book("baseline", "even", even(0.5))
    trial.record(2, {"taste": 7.0}, "aaaa")
    trial.complete(Estimate(7.0, 0.1, 1))
    params = dict.fromkeys(SD1.blocks, 0.5)
    study.observe(trial.result(), params, plan())
    study.observe(trial.result(), params, plan())
    (stored,) = optuna.load_study(storage=url_of(path), study_name="search").trials
    assert (stored.values, stored.params) == ([7.0], params)
    assert searching(study, plan()).few(1)[0][2].mean == pytest.approx(7.0)
    assert (study.n_finished, study.n_judged) == (0, 0)


def test_recommendation_is_kept_with_what_was_expected(path: Path) -> None:
    study = Study(path)
    assert (study.leader, study.expected) == (None, {})
    study.expect(even(0.1), Estimate(1.0, 0.5, 0))
    proposals(study, plan(), 3)
    study.expect(even(0.2), Estimate(2.0, 0.25, 6))
    again = Study(path)
    assert again.leader is not None
    assert (again.leader.recipe, again.leader.value) == (even(0.2), Estimate(2.0, 0.25, 6))
    assert again.expected == {0: Estimate(1.0, 0.5, 0), 3: Estimate(2.0, 0.25, 6)}


def test_candidates_stand_until_there_are_more_trials(path: Path) -> None:
    study = Study(path)
    proposals(study, plan(), 3)
    assert study.candidates == []
    wanted = Result(
        "exploit", "runner-up 1", -1, "complete", even(0.2), {}, value=Estimate(2.0, 0.25, 6)
    )
    study.choose([wanted])
    assert Study(path).candidates == [wanted]
    proposals(study, plan(), 1)
    assert study.candidates == []


def test_booked_recipe_is_found_again_unless_it_failed(path: Path) -> None:
    first = Study(path).book("select", "trial 4", even(0.2))
    first.record(0, {"taste": 2.0}, "aaaa")
    assert Study(path).book("select", "trial 4", even(0.2)).scores == {0: {"taste": 2.0}}
    assert Study(path).book("heldout", "trial 4", even(0.2)).scores == {}
    Study(path).book("select", "trial 4", even(0.2)).fail("NaN images")
    assert Study(path).book("select", "trial 4", even(0.2)).scores == {}


def test_study_of_another_run_is_refused_with_what_differs(path: Path) -> None:
    study = Study(path)
    study.begin({"search": {"seed": 0}, "models": {"a": "aa"}}, {})
    with pytest.raises(ConfigError, match=r"search\.seed was 0, is 1"):
        Study(path).begin({"search": {"seed": 1}, "models": {"a": "aa"}}, {})


def test_runs_share_a_storage_by_their_names(path: Path) -> None:
    storage = storage_at(f"sqlite:///{path}")
    one, other = (Study(storage, name) for name in ("one", "other"))
    one.begin({"seed": 1}, {})
    proposals(one, plan(), 2)
    assert (len(one.searched()), len(other.searched())) == (2, 0)
    again = Study(storage_at(f"sqlite:///{path}"), "one")
    assert again.searched() == one.searched()
    with pytest.raises(
        ConfigError, match="the study 'one' belongs to another configuration: seed"
    ):
        again.begin({"seed": 2}, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nonsense", "is no URL of an SQL database or a proxy that is known here; write it as"),
        ("redis://me:secret@host", "is no URL of an SQL database"),
        ("postgresql://me:secret@host:port/x", "cannot be opened"),
        ("sqlite:////no/such/{folder}/x.db", "unable to open database file"),
        ("oracle://me:sec/ret@host/x?password=secret", "is no URL of an SQL database"),
        ("sqlite:////no/such/folder/x.db", "unable to open database file"),
        ("oracle://me:secret@host/x", "is no URL of an SQL database"),
        ("postgresql+nope://me:secret@127.0.0.1:1/x", "nope"),
        ("postgresql+psycopg://me/x?sec=ret@127.0.0.1", "may not say after the ?"),
        ("mysql+pymysql://me:secret@127.0.0.1:1/x?ssl_ca=/no/such.pem", "No such file"),
        ("mysql+pymysql://me:secret@127.0.0.1:1/x?charset=nope", "cannot be opened"),
        ("postgresql+psycopg://me:p@sec@127.0.0.1:1/x", "@ as %40"),
        ("postgresql+psycopg://me/sec@127.0.0.1:1/x", "/ as %2F"),
        ("postgresql+psycopg://me:sec", "no number as its port"),
        ("postgresql+psycopg:/me:sec@host/x", "is no URL of an SQL database"),
        ("me:sec@host", "is no URL of an SQL database"),
    ],
)
def test_storage_that_does_not_answer_is_told_in_one_line_without_its_password(
    given: str, said: str
) -> None:
    with pytest.raises(ConfigError) as told:
        storage_at(given)
    assert said in str(told.value)
    assert "\n" not in str(told.value)
    assert "sec" not in str(told.value)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        # libpq loads the library ./evil.so to look for the key in it.
        ("postgresql+psycopg://me@127.0.0.1:1/x?sslcert=a.pem&sslkey=./evil.so:k", "sslcert"),
        ("postgresql://me@127.0.0.1:1/x?sslmode=require&sslkey=./evil.so:k", "sslkey"),
        ("postgresql+psycopg2://me@127.0.0.1:1/x?service=mine", "service"),
        ("postgresql+psycopg://me@127.0.0.1:1/x?plugin=mine", "plugin"),
        ("mysql+pymysql://me@127.0.0.1:1/x?read_default_file=/etc/my.cnf", "read_default_file"),
        ("mysql+pymysql://me@127.0.0.1:1/x?local_infile=1", "local_infile"),
        ("sqlite:///x.db?uri=true", "uri"),
    ],
)
def test_address_of_a_storage_says_nothing_that_its_driver_would_load(
    given: str, refused: str
) -> None:
    with pytest.raises(ConfigError, match=rf"may not say '{refused}' after the \?; known are"):
        storage_at(given)


@pytest.mark.parametrize("given", ["mysql://u@h/x", "mssql+pyodbc://u@h/x", "sqlite+evil:///x"])
def test_storage_of_a_driver_that_is_not_known_is_not_opened(given: str) -> None:
    with pytest.raises(
        ConfigError, match="is no URL of an SQL database or a proxy that is known here"
    ):
        storage_at(given)


def test_server_of_mysql_cannot_ask_for_a_file() -> None:
    pytest.importorskip("pymysql")
    asked: list[bytes] = []

    def serve(one: socket.socket) -> None:
        connection, _ = one.accept()
        with connection:
            # A greeting of protocol 10: version, thread, and capabilities that offer local files.
            body = b"\x0a8.0\0" + bytes(4) + b"x" * 8 + b"\0\xff\xf7\x21\x02\0\xff\x80\x15"
            body += bytes(10) + b"x" * 12 + b"\0mysql_native_password\0"
            connection.sendall(len(body).to_bytes(3, "little") + b"\0" + body)
            asked.append(connection.recv(8))

    with socket.create_server(("127.0.0.1", 0)) as one:
        thread = threading.Thread(target=serve, args=(one,))
        thread.start()
        port = one.getsockname()[1]
        with pytest.raises(ConfigError):
            storage_at(f"mysql+pymysql://me:x@127.0.0.1:{port}/x")
        thread.join()
    assert not int.from_bytes(asked[0][4:8], "little") & 1 << 7  # CLIENT_LOCAL_FILES


def test_storage_in_a_folder_that_is_not_there_is_told_before_anything_is_made() -> None:
    with pytest.raises(ConfigError, match="the folder /no/such does not exist"):
        is_in("sqlite:////no/such/x.db", "mine")


def test_storage_that_several_processes_make_at_once_is_one(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    code = (
        "from bayesian_merger.study import Study; from bayesian_merger.study.storage import storage_at;"
        f"Study(storage_at({url!r}), sys.argv[1])"
    )
    names = ["one", "two"]
    started = [subprocess.Popen([sys.executable, "-c", f"import sys; {code}", n]) for n in names]
    assert [process.wait(120) for process in started] == [0] * len(names)
    assert all(is_in(url, name) for name in names)


def test_half_made_study_of_a_killed_process_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".new-study-x").mkdir()
    (tmp_path / ".new-study-x" / "study.db").touch()
    create(tmp_path / "study.db")
    assert [p.name for p in tmp_path.iterdir()] == ["study.db"]


def test_file_that_is_no_study_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(ConfigError, match=r"study\.db is no study; move it away") as caught:
        Study(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "options", "is_refused"),
    [
        ("ext4", "rw", False),
        ("NTFS", "rw,fixed", False),
        ("9p", "rw", False),  # drives of Windows under WSL
        ("nfs4", "rw", True),
        ("cifs", "rw", True),
        ("fuse.sshfs", "rw", True),
        ("NTFS", "rw,remote", True),
    ],
)
def test_file_of_another_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, is_refused: bool
) -> None:
    disks = [
        SimpleNamespace(mountpoint=str(place), fstype=fstype, opts=opts)
        for place, fstype, opts in (
            (tmp_path.anchor, "nfs", "rw"),
            (tmp_path / "mount", "ext4", "rw"),  # hidden by what is mounted over it
            (tmp_path / "mount", kind, options),
            (tmp_path / "mount2", "nfs", "rw"),
        )
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: disks)
    file = tmp_path / "mount" / "a" / "study.db"
    if is_refused:
        with pytest.raises(ConfigError, match=rf"study\.db would lie .* \({kind} at .*mount\)"):
            require_local(file)
    else:
        require_local(file)
