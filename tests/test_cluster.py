"""Runs whose workers are on a Ray cluster, a real one whose GPUs are pretended."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import postgres
import psutil
import pytest
import ray_cluster
from test_cli import Command
from test_cli import command as command
from test_crew import lives, tasks
from test_run import Silent
from test_run import folder as folder

from bayesian_merger import __version__, cluster, run, setup
from bayesian_merger import config as configuration
from bayesian_merger.cli.working import hiring
from bayesian_merger.errors import CheckpointError, ConfigError
from bayesian_merger.outcome import open_study
from bayesian_merger.study.board import Task

needs_ray = pytest.mark.skipif(
    sys.platform != "linux" or not ray_cluster.RAY.is_file(), reason="Ray is not installed"
)
IMAGES = 10 * 6 + 2 * 4 + 4 * 8
ON_RAY = ("--set", "workers.launch=ray")


@pytest.fixture(scope="module")
def ray() -> Iterator[ray_cluster.Cluster]:
    with ray_cluster.Cluster() as one:
        yield one


@pytest.fixture
def own_ray() -> Iterator[ray_cluster.Cluster]:
    with ray_cluster.Cluster() as one:
        yield one


def begin(folder: Path, ray: ray_cluster.Cluster, *more: str) -> subprocess.Popen[str]:
    """A run on the cluster, in a process of its own and a session as a terminal's."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "bayesian_merger", "run", str(folder / "config.toml")),
            *("--run-dir", str(folder / "run"), *ON_RAY, *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "RAY_ADDRESS": ray.address, "RAY_AUTH_MODE": "disabled"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        text=True,
    )


def wait_for(process: subprocess.Popen[str], folder: Path, *, scores: int) -> None:
    """Until the workers of a run have judged so many images."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        has_begun = (folder / "run" / "study.db").is_file()
        if has_begun and sum(len(task.scores) for task in tasks(folder)) >= scores:
            return
        time.sleep(0.2)
    process.kill()
    raise AssertionError(process.communicate()[0])


def require_whole(folder: Path, found: list[Task]) -> None:
    """Every image was judged, and counts once."""
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["finished"]
    assert result["images"] == IMAGES
    judged = Counter((task.of, index) for task in found for index in task.scores)
    assert set(judged.values()) == {1}
    assert len(judged) == IMAGES


def require_gone(workers: list[int]) -> None:
    """Soon there are no such processes."""
    end = time.monotonic() + 30
    while any(map(lives, workers)):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process may join a cluster, and leaves it: Ray ends it a minute after one has gone."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield
    importlib.import_module("ray").shutdown()


class Looking(Silent):
    """Has seen what Ray calls the workers."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: set[str] = set()

    def judged(self, images: int, made: bool) -> None:
        self.actors |= set(importlib.import_module("ray").util.list_named_actors())


@needs_ray
def test_run_has_a_worker_for_each_gpu_of_the_cluster_and_no_more(
    folder: Path,
    ray: ray_cluster.Cluster,
    driver: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.address)
    heard = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match="each takes one of the 2 CPUs"):
        cluster.places(None, on_cpu=True, is_shared=False)
    assert signal.getsignal(signal.SIGTERM) == heard
    assert cluster.places(2, on_cpu=True, is_shared=False) == cluster.Places(2, "CPU", 2)
    # Other optimisers take longer to propose.
    told = ("workers.launch=ray", "search.optimiser=random")
    config = configuration.load(folder / "config.toml", told)
    ready = setup.prepare(config, folder, "toy")
    with pytest.raises(ConfigError, match="3 workers: the Ray cluster has 2 GPUs, and a"):
        hiring(3, folder / "config.toml", told, ready, folder / "run")
    hire = hiring(None, folder / "config.toml", told, ready, folder / "run")
    looking = Looking()
    run.run(ready, folder / "run", looking, hire=hire, report=False)
    require_whole(folder, tasks(folder))
    names = {task.worker for task in tasks(folder)}
    assert {name.rpartition("-")[0] for name in names} == {"ray-1", "ray-2"}
    assert looking.actors == {f"bayesian-merger {folder / 'run'} {name}" for name in names}
    require_gone(ray.workers())
    # Ray has much to say.
    assert capfd.readouterr() == ("", "")


@needs_ray
@pytest.mark.slow
def test_killed_worker_on_the_cluster_is_replaced_and_nothing_is_lost(
    folder: Path, ray: ray_cluster.Cluster
) -> None:
    process = begin(folder, ray, "--set", "backend.delay_s=0.2")
    for scores in (3, 20):
        wait_for(process, folder, scores=scores)
        psutil.Process(ray.workers()[0]).kill()
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    assert out.count("has ended and is replaced: ") == 2
    assert "its worker process has died" in out
    require_whole(folder, tasks(folder))


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_leave_the_cluster_when_the_run_ends_early(
    folder: Path, ray: ray_cluster.Cluster, number: signal.Signals
) -> None:
    process = begin(folder, ray, "--set", "backend.delay_s=0.2")
    wait_for(process, folder, scores=5)
    workers = ray.workers()
    assert len(workers) == 2
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == (-number if number == signal.SIGKILL else 130), out
    assert "Traceback" not in out
    require_gone(workers)
    process = begin(folder, ray, "--set", "backend.delay_s=0.2", "--workers", "1")
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    require_whole(folder, tasks(folder))


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not postgres.PG_CTL, reason="PostgreSQL is not installed")
def test_run_goes_on_when_a_node_is_taken_away(
    folder: Path,
    own_ray: ray_cluster.Cluster,
    driver: None,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At another address, as another machine's is.
    node = own_ray.join("127.0.0.2", 1)
    monkeypatch.setenv("RAY_ADDRESS", own_ray.address)
    code, _, err = command("run", folder / "config.toml", *ON_RAY)
    assert code == 2
    assert "the Ray cluster has workers on others (127.0.0.2); name a database" in err
    with postgres.Postgres() as server:

        def found() -> list[Task]:
            study = open_study(folder / "run", server.url)
            try:
                return list(study.board().all())
            finally:
                study.close()

        storage = ("--set", f"search.storage={server.url}")
        process = begin(folder, own_ray, "--set", "backend.delay_s=0.3", *storage)
        end = time.monotonic() + 120
        while len(own_ray.workers()) < 3 or sum(len(task.scores) for task in found()) < 10:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.5)
        own_ray.take_away(node)
        out = process.communicate(timeout=240)[0]
        assert process.returncode == 0, out
        assert out.count("has ended and is replaced: ") == 1
        require_whole(folder, found())
        assert len({task.worker for task in found() if task.scores}) == 3


def test_missing_cluster_and_missing_ray_are_told(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(address: str) -> str:
        monkeypatch.setenv("RAY_ADDRESS", address)
        code, _, err = command("run", folder / "config.toml", *ON_RAY)
        assert code == 2
        assert len(err.splitlines()) == 1
        return err

    if ray_cluster.RAY.is_file():
        for address in ("127.0.0.1:9", "local", "here"):
            assert f"no Ray cluster at RAY_ADDRESS={address} (" in told(address)
            assert "start one by `ray start --head`" in told(address)
    assert "does not go by Ray's client" in told("ray://127.0.0.1:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'bayesian-merger[ray]'" in told("")
    assert not (folder / "runs").exists()


def test_scorer_that_asks_a_person_is_not_for_a_cluster(folder: Path, command: Command) -> None:
    code, _, err = command("run", folder / "config.toml", *ON_RAY, "--set", "scorers={manual={}}")
    assert code == 2
    assert "workers.launch = 'ray': scorer manual asks a person, who is one" in err


def test_worker_says_what_its_machine_lacks(folder: Path) -> None:
    config = configuration.load(folder / "config.toml")
    told = {
        "config": str(folder / "config.toml"),
        "overrides": [],
        "title": "toy",
        "run_dir": str(folder / "run"),
        "version": __version__,
        "home": "",
    }
    with pytest.raises(ConfigError, match=r"^worker on .*run is not there; configuration, models"):
        cluster.Worker().work(told, "w")
    (folder / "run").mkdir()
    with pytest.raises(ConfigError, match=r"^worker on .*: version .* and 0\.0\.9 leads the run"):
        cluster.Worker().work({**told, "version": "0.0.9"}, "w")
    config.models.b.unlink()
    with pytest.raises((ConfigError, CheckpointError), match=r"^worker on .*one\.safetensors"):
        cluster.Worker().work(told, "w")


def test_where_a_run_is_worked_on_is_no_part_of_it(folder: Path) -> None:
    setups = [
        setup.prepare(configuration.load(folder / "config.toml", told), folder, "toy")
        for told in ((), ("workers.launch=ray",))
    ]
    assert setups[0].identity == setups[1].identity
    assert setups[0].about() == setups[1].about()
