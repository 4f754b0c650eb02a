"""A proxy of Optuna's, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from postgres import free_port

from bayesian_merger.study.serving import listening

PAGE = Path(__file__).parent.parent / "docs" / "workers.md"


def script(url: str, port: int) -> str:
    """That of the page, for another database and port."""
    (shown,) = re.findall(r"    # proxy\.py\n((?:    .*\n)+)", PAGE.read_text())
    return re.sub(r"serve\(.*\)", f"serve({url!r}, port={port})", textwrap.dedent(shown))


class Proxy:
    """One in this process that asks the database at an URL for others."""

    def __init__(self, database: str) -> None:
        self._database, self.port = database, free_port()
        self._running = contextlib.ExitStack()
        self.start()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._running.enter_context(listening(self._database, "127.0.0.1", self.port))

    def stop(self) -> None:
        self._running.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class ProxyProcess(Proxy):
    """One in a process of its own, as docs/workers.md starts it."""

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", script(self._database, self.port)], stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                assert self._process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)

    def stop(self) -> None:
        """As a power cut does it."""
        self._process.kill()
        self._process.wait()
