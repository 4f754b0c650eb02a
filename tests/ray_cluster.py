"""A Ray cluster of this machine, for as long as a test needs it; its GPUs are pretended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
from postgres import free_port

RAY = Path(sys.executable).with_name("ray")
# Nothing of a test is anybody's statistics, and it needs no token that lies in a home.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


class Cluster:
    """A head node with two GPUs, and nodes beside it that may be at other addresses."""

    def __init__(self) -> None:
        # Of a short name, as sockets lie in it.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.address = f"127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        options = ("--head", f"--port={port}", "--include-dashboard=false")
        self._nodes: list[subprocess.Popen[str]] = []
        self.join("127.0.0.1", 2, *options, f"--temp-dir={self._folder}")

    def join(self, host: str, n_gpus: int, *options: str) -> subprocess.Popen[str]:
        """A node at an address of this machine's own."""
        options = options or (f"--address={self.address}",)
        node = subprocess.Popen(
            [
                *(str(RAY), "start", "--block", f"--node-ip-address={host}", *options),
                *(f"--num-gpus={n_gpus}", "--num-cpus=2", "--object-store-memory=100000000"),
            ],
            env={**os.environ, **_ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._nodes.append(node)
        assert node.stdout
        said = ""
        while "--block" not in said:  # "This command will now block"
            line = node.stdout.readline()
            said += line
            if not line:
                self.take_away(node)
                raise AssertionError(said)
        return node

    def workers(self) -> list[int]:
        """The process numbers of the workers that judge."""
        found = []
        for node in self._nodes:
            if node.poll() is None:
                for process in psutil.Process(node.pid).children(recursive=True):
                    if process.name().startswith("ray::Worker"):
                        found.append(process.pid)
        return found

    def take_away(self, node: subprocess.Popen[str]) -> None:
        """End a node with all that runs on it, as a power cut does it."""
        with suppress(psutil.NoSuchProcess):  # it has ended already
            whole = psutil.Process(node.pid).children(recursive=True)
            node.kill()
            for process in whole:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(whole)
        node.communicate()
        self._nodes.remove(node)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._nodes[:]):
            self.take_away(node)
        shutil.rmtree(self._folder, ignore_errors=True)
