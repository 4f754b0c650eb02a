"""Workers on a Ray cluster: Ray decides where they are, and tells which have ended."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bayesian_merger import __version__
from bayesian_merger.crew import LEAVE_S
from bayesian_merger.errors import CheckpointError, ConfigError, first_line, one_line
from bayesian_merger.worker import work_as_told

# A cluster that answers at all does so within this.
_ANSWER_S = 5.0
# A worker that has begun hears within this that it is to leave.
_HEAR_S = 3.0
_QUIET = {
    # It prints what becomes of actors among our lines, also where nothing of them is to be logged.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    # It tries for a quarter of an hour where something else listens than a cluster.
    "RAY_NUM_REDIS_GET_RETRIES": "2",
}
_NEEDED = "pip install 'bayesian-merger[ray]'"
_BEGIN = "start one by `ray start --head`, or name its head node by RAY_ADDRESS=HOST:PORT"


@dataclass(frozen=True)
class Places:
    """What a cluster has for a run: a "GPU" or a "CPU" for each of `n` workers; so many are free now."""

    n: int
    kind: str
    n_free: int


def places(wanted: int | None, *, on_cpu: bool, is_shared: bool) -> Places:
    """Join the cluster, and find the places that it has for `wanted` workers, or one for each GPU.

    ConfigError if it cannot be joined or has not so many, or if a study that is not `is_shared` would be
    asked for from other machines.
    """
    ray = _joined()
    kind = "CPU" if on_cpu else "GPU"
    n_there = int(ray.cluster_resources().get(kind, 0))
    if not on_cpu and not n_there:
        raise ConfigError(
            "the Ray cluster has no GPU; with backend.device = 'cpu' as many of its CPUs work as "
            "--workers says"
        )
    if on_cpu and not wanted:
        raise ConfigError(
            f"workers.launch: on CPUs say by --workers how many there are to be; each takes one of the "
            f"{n_there} CPUs of the Ray cluster"
        )
    n = wanted or n_there
    if n > n_there:
        raise ConfigError(
            f"{n} workers: the Ray cluster has {n_there} {kind}s, and a worker needs one for itself"
        )
    elsewhere = sorted(
        {
            str(node["NodeManagerAddress"])
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get(kind)
        }
        - {_machine()}
    )
    if elsewhere and not is_shared:
        raise ConfigError(_of_one_machine(", ".join(elsewhere)))
    return Places(n, kind, int(ray.available_resources().get(kind, 0)))


class Actors:
    """Workers on the cluster that this process has joined: an actor each, which ends when this does."""

    def __init__(self, told: Mapping[str, Any], where: Places, *, is_shared: bool) -> None:
        """For what `work_as_told` is told; one for which Ray has no place yet begins when it has."""
        self._told = {**told, "version": __version__, "home": "" if is_shared else _machine()}
        self._where = where
        self._at: dict[Any, tuple[int, str, Any]] = {}
        self._told_to_leave: dict[Any, Any] = {}
        self._number = 0
        for _ in range(where.n):
            self._start()

    @property
    def n(self) -> int:
        """How many there are."""
        return self._where.n

    @property
    def names(self) -> Collection[str]:
        """What they are called."""
        return {name for _, name, _ in self._at.values()}

    def lost(self) -> Mapping[str, str]:
        """Those that have ended, which are replaced, and the last thing that they or Ray said.

        ConfigError or CheckpointError if one cannot begin where it is, unless it replaces another: a
        database that is away just now, or a node that came later, is no reason to end the run.
        """
        import ray

        found = {}
        for ended in self._ended(list(self._at), 0.0):
            number, name, actor = self._at.pop(ended)
            try:
                found[name] = _last_words(ended)
            except (ConfigError, CheckpointError) as error:
                if number <= self.n:
                    raise
                found[name] = first_line(error)
            ray.kill(actor)  # it may live on where Ray cannot reach it just now, or idly
            self._start()
        return found

    def leave(self) -> None:
        """Tell them to end, which they do when the image is made that they are at."""
        import ray

        if ray.is_initialized() and not self._told_to_leave:
            self._told_to_leave = {
                actor.leave.remote(): ended for ended, (*_, actor) in self._at.items()
            }

    def close(self) -> None:
        """Have them gone."""
        import ray

        if ray.is_initialized():
            self.leave()
            # Those that have not begun hear nothing, and have nothing to end.
            heard = self._ended(list(self._told_to_leave), _HEAR_S)
            self._ended([self._told_to_leave[one] for one in heard], LEAVE_S)
            ray.shutdown()  # with which Ray ends what is left
        self._at.clear()

    def _start(self) -> None:
        import ray

        # Restarted by Ray it would keep its name, by which the task of the dead one seems to be at work.
        self._number += 1
        name = f"ray-{self._number}-{secrets.token_hex(3)}"
        shown = f"bayesian-merger {self._told['run_dir']} {name}"
        needs = {"num_gpus": 1, "num_cpus": 0} if self._where.kind == "GPU" else {"num_cpus": 1}
        # Two calls at once, of which one tells it to leave.
        actor = ray.remote(Worker).options(name=shown, max_concurrency=2, **needs).remote()
        self._at[actor.work.remote(self._told, name)] = (self._number, name, actor)

    def _ended(self, calls: list[Any], timeout_s: float) -> list[Any]:
        """The calls that have ended by then."""
        import ray

        if not calls:
            return []
        ended, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        return list(ended)


class Worker:
    """One worker, wherever Ray has put it."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def work(self, told: Mapping[str, Any], name: str) -> None:
        """Judge what the run offers, until this is told to leave.

        ConfigError or CheckpointError, which say where, if it cannot begin.
        """
        try:
            if told["version"] != __version__:
                raise ConfigError(
                    f"version {__version__} of this program, and {told['version']} leads the run; "
                    f"install that one"
                )
            # A node may have come later.
            if told["home"] and told["home"] != _machine():
                raise ConfigError(_of_one_machine(_machine()))
            if not Path(told["run_dir"]).is_dir():
                raise ConfigError(
                    f"{told['run_dir']} is not there; configuration, models and run folder must lie at "
                    f"the same paths on all nodes"
                )
            work_as_told(told, name, self._is_over.is_set)
        except (ConfigError, CheckpointError) as error:
            lines = str(error).splitlines()
            where = f"worker on {socket.gethostname()}"
            raise type(error)("\n".join(f"{where}: {line}" for line in lines)) from error

    def leave(self) -> None:
        """Have it end, when the image is made that it is at."""
        self._is_over.set()


def _last_words(ended: Any) -> str:
    """What a call says that has ended; ConfigError or CheckpointError if no other will do better."""
    import ray

    try:
        ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (ConfigError, CheckpointError)):
            raise error.cause from error
        return first_line(error.cause)
    except ray.exceptions.ActorDiedError as error:
        said = str(error).strip().splitlines()
        if error.actor_init_failed:  # it does not come as far as ours
            raise ConfigError(
                f"a worker cannot begin on its node ({said[-1].strip()}); bayesian-merger {__version__} "
                f"must be installed where `ray start` is called"
            ) from error
        # Ray's own words, without its advice on memory.
        return next(line for line in reversed(said) if line[:1].strip()).partition(". ")[0]
    except ray.exceptions.ActorUnavailableError:
        return "Ray cannot reach it"
    except ray.exceptions.RayError as error:
        return first_line(error)
    return "it has ended by itself"


def _joined() -> Any:
    """Ray, when this process is one of a cluster's drivers; ConfigError if it cannot be."""
    named = os.environ.get("RAY_ADDRESS", "")
    if "://" in named:
        raise ConfigError(
            f"RAY_ADDRESS={named}: this does not go by Ray's client; run it on a node of the cluster, "
            f"with RAY_ADDRESS=HOST:PORT of its head node"
        )
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)  # read when Ray is imported
    try:
        import ray
        from ray._private import services
    except ImportError as error:
        raise ConfigError(
            f"workers.launch: Ray is not installed ({one_line(error)}); {_NEEDED}"
        ) from error
    if ray.is_initialized():
        return ray
    handler = signal.getsignal(signal.SIGTERM)
    try:
        # As ray.init finds it, which waits a quarter of an hour for a cluster that has gone.
        address = services.canonicalize_bootstrap_address("auto")
        if address is None:
            raise ConnectionError("RAY_ADDRESS=local names none")
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        _refuse(error, named)
    finally:
        # It takes this signal for itself, and ends without cleaning up.
        with suppress(ValueError):  # in another thread than the main one, where it does not
            signal.signal(signal.SIGTERM, handler)
    return ray


def _refuse(error: Exception, named: str) -> NoReturn:
    place = f"at RAY_ADDRESS={named}" if named else "on this machine"
    raise ConfigError(f"no Ray cluster {place} ({one_line(error)[:300]}); {_BEGIN}") from error


def _machine() -> str:
    """The address by which the cluster knows this machine."""
    import ray

    return str(ray.util.get_node_ip_address())


def _of_one_machine(elsewhere: str) -> str:
    return (
        f"search.storage: the study is a file of one machine, and the Ray cluster has workers on others "
        f"({elsewhere}); name a database on a server, as docs/workers.md says"
    )
