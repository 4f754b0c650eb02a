"""Gives a webui its checkpoint back when the process that took it is no more, however it ended.

A process of its own, which waits until its standard input ends. Each line there is an order that takes
the place of the one before: JSON of requests to make and files to remove then, or null for nothing.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_TIMEOUT_S, _PAUSE_S = 600.0, 2.0
# Python complains of processes that are forgotten while they run.
_left: list[subprocess.Popen[str]] = []


class Guard:
    """What is to be done at the server at `url` when this process ends.

    The environment variable `auth_env` and `verify` are those of `Server`.
    """

    def __init__(self, url: str, auth_env: str, verify: bool, wait_s: float) -> None:
        self._about = {"url": url, "auth_env": auth_env, "verify": verify, "wait_s": wait_s}
        # Ctrl-C in the terminal is for the process that is guarded.
        apart: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            **apart,
        )

    def order(self, requests: Sequence[tuple[str, Any]], files: Sequence[Path]) -> None:
        """From now on these are to be posted (path and body), then the files removed."""
        paths = [str(path.absolute()) for path in files]
        self._send({**self._about, "requests": requests, "files": paths})

    def dismiss(self) -> None:
        """Nothing is left to be done."""
        self._send(None)
        self.leave()
        self._process.wait()
        _left.remove(self._process)

    def leave(self) -> None:
        """Have it do what is ordered, or nothing, without waiting for it."""
        _left.append(self._process)
        if self._process.stdin:
            self._process.stdin.close()
            self._process.stdin = None

    def _send(self, order: Mapping[str, Any] | None) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it was killed too, and what it is for is done by the next run


def watch(orders: IO[str], sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait for the end of the orders, and do the last of them."""
    order = None
    for line in orders:
        order = json.loads(line)
    if not order:
        return
    end = time.monotonic() + order["wait_s"]
    for path, body in order["requests"]:
        while not _posted(order, path, body) and time.monotonic() < end:
            sleep(_PAUSE_S)
    for file in order["files"]:
        with suppress(OSError):
            Path(file).unlink(missing_ok=True)


def _posted(order: Mapping[str, Any], path: str, body: Any) -> bool:
    """Whether the server has answered."""
    secret = os.environ.get(order["auth_env"], "")
    if secret and not secret.startswith("Bearer "):
        secret = f"Basic {base64.b64encode(secret.encode()).decode()}"
    headers = {"Content-Type": "application/json", **({"Authorization": secret} if secret else {})}
    request = urllib.request.Request(order["url"] + path, json.dumps(body).encode(), headers)
    context = None if order["verify"] else ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context) as answer:
            answer.read()
    except urllib.error.HTTPError:
        return True  # it is there, and does not want to
    except OSError:
        return False
    return True


if __name__ == "__main__":
    watch(sys.stdin)
