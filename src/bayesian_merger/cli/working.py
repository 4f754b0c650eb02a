"""The workers of a run: how many, where, and `work`, which is one of them."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from bayesian_merger import cluster
from bayesian_merger.cli.screen import err
from bayesian_merger.crew import LEAVE_S, Hands, Pool, places
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import Attended
from bayesian_merger.setup import Setup
from bayesian_merger.study.storage import is_shared
from bayesian_merger.worker import work_as_told

# By "-m" modules would be looked for in the current folder first, which may be a stranger's.
_WORK = """
import sys
sys.path = [place for place in sys.path if place]
from bayesian_merger.cli import main
main()
"""


def hiring(
    wanted: int | None, path: Path, overrides: Sequence[str], setup: Setup, run_dir: Path
) -> Callable[[], Hands] | None:
    """What starts the workers of a run of the configuration at `path`; None if this process judges.

    None `wanted` is one for each GPU that is to be seen, or that a cluster has. A run whose storage is
    on a server has at least one, as other machines may lead it. ConfigError if there cannot be so many.
    """
    told = {
        "config": str(path.absolute()),
        "overrides": list(overrides),
        "title": setup.title,
        "run_dir": str(run_dir.absolute()),
    }
    if setup.config.workers.launch == "ray":
        return _hiring_on_ray(wanted, told, setup)
    device = setup.config.backend.options.get("device", "auto")
    gpus = _gpus() if device in ("auto", "cuda") else []
    is_one = device not in ("auto", "cuda") and not str(device).startswith("cpu")
    fault = _fault(setup)
    n = wanted or (1 if fault else max(1, len(gpus)))
    if n == 1 and (not is_shared(setup.config.search.storage) or _attended(setup)):
        return None
    if n > 1 and fault:
        raise ConfigError(f"{n} workers: {fault}; leave --workers out")
    if n > 1 and is_one:
        raise ConfigError(
            f"{n} workers: backend.device = {device!r} is one GPU, and a worker needs one for itself; "
            f"leave backend.device out, or --workers"
        )
    if gpus and n > len(gpus):
        raise ConfigError(
            f"{n} workers: there are {len(gpus)} GPUs to be seen, and a worker needs one for itself"
        )
    command = [sys.executable, "-c", _WORK, "work"]
    where = places(n, gpus, os.cpu_count() or 1)
    return lambda: Pool(command, json.dumps(told).encode(), where, run_dir / "workers")


def _hiring_on_ray(
    wanted: int | None, told: dict[str, Any], setup: Setup
) -> Callable[[], cluster.Actors]:
    """`hiring` of workers on a Ray cluster, which this process joins."""
    if fault := _fault(setup):
        raise ConfigError(f"workers.launch = 'ray': {fault}; leave that out")
    shared = is_shared(setup.config.search.storage)
    on_cpu = setup.config.backend.options.get("device") == "cpu"
    found = cluster.places(wanted, on_cpu=on_cpu, is_shared=shared)
    if found.n_free < found.n:
        err.print(
            f"note: the Ray cluster has {found.n_free} free {found.kind}s for {found.n} workers; the "
            f"others begin when it has more",
            soft_wrap=True,
        )
    return lambda: cluster.Actors(told, found, is_shared=shared)


def _fault(setup: Setup) -> str:
    """Why a run cannot have several workers, or nothing."""
    if name := _attended(setup):
        return f"scorer {name} asks a person, who is one"
    if getattr(setup.backend, "is_remote", False):
        return "the images are made by a server; name several servers in backend.url"
    return ""


def _attended(setup: Setup) -> str:
    """The scorer that asks a person, if there is one."""
    return next((name for name, one in setup.scorers.items() if isinstance(one, Attended)), "")


def _gpus() -> list[str]:
    """Those that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return named.split(",")[:n] if named else [str(i) for i in range(n)]


@click.command(hidden=True)
@click.argument("name")
def work_command(name: str) -> None:
    """Judge what the run offers that has started this worker, and leave when it ends."""
    told = json.loads(sys.stdin.readline())
    is_over = threading.Event()
    threading.Thread(target=_listen, args=(is_over,), daemon=True).start()
    work_as_told(told, name, is_over.is_set)


def _listen(is_over: threading.Event) -> None:
    """Set the event when nobody is there any more who could tell this process anything.

    By no signal: one that was started in the background may not hear any. If it does not leave then, it
    hangs, and holds a GPU for nobody.
    """
    while sys.stdin.readline():
        pass
    is_over.set()
    time.sleep(LEAVE_S)
    os._exit(1)
