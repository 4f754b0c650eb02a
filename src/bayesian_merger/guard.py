"""Gives a webui its checkpoint back when the process that took it is no more, however it ended.

A process of its own, of the standard library alone, which waits until its standard input ends. Each
line there is an order that takes the place of the one before: JSON, or null for nothing to be done.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import queue
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

JOURNAL = "server.json"
"""What the server had before, and which run has it, in the server's folder of ours."""

STEM = "bayesian-merger-"
_OURS = re.compile(rf"\.?{STEM}[0-9a-f]{{16}}\.safetensors(\.\d+\.part)?")
_OUR_TITLE = re.compile(rf"{STEM}[0-9a-f]{{16}}(?![\w-])")
_HASH = re.compile(r" \[[0-9a-f]{8,64}\]$")
_TIMEOUT_S, _PAUSE_S = 600.0, 2.0
# What an answer that is cut off, or none at all, may raise.
_FAULTS = (OSError, ValueError, RecursionError, http.client.HTTPException)
# Python complains of processes that are forgotten while they run.
_left: list[subprocess.Popen[str]] = []


class Former(NamedTuple):
    """What a server had before a run, and where it is posted to.

    Of `settings`, its checkpoint, it must say itself that it has them again; `options` are posted too.
    """

    path: str = ""
    settings: Mapping[str, str] = {}
    options: Mapping[str, Any] = {}


class Guard:
    """Gives the server what it had when this process ends, and removes the merges in `folder`.

    Unless the journal in `home` has another `token` by then: another run has begun. `auth_env` and
    `verify` are those of `Server`; a server that is away is tried for `wait_s`.
    """

    def __init__(
        self,
        url: str,
        former: Former,
        folder: Path,
        home: Path,
        token: str,
        auth_env: str,
        verify: bool,
        wait_s: float,
    ) -> None:
        _left[:] = [process for process in _left if process.poll() is None]
        order = {
            "parent": os.getpid(),
            "url": url,
            "path": former.path,
            "settings": dict(former.settings),
            "options": dict(former.options),
            "folder": str(folder.absolute()),
            "home": str(home.absolute()),
            "token": token,
            "auth_env": auth_env,
            "verify": verify,
            "wait_s": wait_s,
        }
        # Neither Ctrl-C in the terminal nor the end of its window is for this one.
        apart: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
            apart = {"creationflags": flags}
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            **apart,
        )
        _left.append(self._process)
        self._send(order)

    def dismiss(self) -> None:
        """Nothing is left to be done."""
        self._send(None)
        self.leave()
        self._process.wait()
        _left.remove(self._process)

    def leave(self) -> None:
        """Have it do what is ordered, without waiting for it."""
        if self._process.stdin:
            with suppress(OSError):  # what it did not hear before it was killed
                self._process.stdin.close()
            self._process.stdin = None

    def _send(self, order: Mapping[str, Any] | None) -> None:
        assert self._process.stdin
        with suppress(OSError):  # it was killed too, and what it is for is done by the next run
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()


def authorization(secret: str) -> dict[str, str]:
    """The header for "user:password" or "Bearer TOKEN"; none for nothing."""
    secret = secret.strip()
    if not secret:
        return {}
    if not secret.startswith("Bearer "):
        secret = f"Basic {base64.b64encode(secret.encode()).decode()}"
    return {"Authorization": secret}


def is_near(host: str) -> bool:
    """Whether an address is this machine's or of a private network, to which no proxy leads."""
    if host == "localhost" or host.endswith(".local"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_private
    except ValueError:
        return False


def spellings(settings: Mapping[str, str]) -> list[dict[str, str]]:
    """Settings to try: "name.safetensors [hash]", whose hash may be another by now, and the name."""
    return [dict(settings), {key: _name(value) for key, value in settings.items()}]


def is_given(now: object, settings: Mapping[str, str]) -> bool:
    """Whether a server's settings are these, whatever the hash."""
    return isinstance(now, dict) and all(
        _name(str(now.get(key))) == _name(value) for key, value in settings.items()
    )


def is_ours(title: str) -> bool:
    """Whether a server's name of a checkpoint, or its path, is that of a merge of ours."""
    return bool(_OUR_TITLE.match(re.split(r"[/\\]", title)[-1]))


def _name(title: str) -> str:
    return _HASH.sub("", title)


def sweep(folder: Path, keep: Path | None = None) -> None:
    """Remove our merges from the folder, as far as the system lets, but for one.

    On Windows a file that the server has open stays, until the next time.
    """
    if folder.is_dir():
        for file in list(folder.iterdir()):
            if _OURS.fullmatch(file.name) and file != keep:
                with suppress(OSError):
                    file.unlink()


def clear(folder: Path, home: Path) -> None:
    """Remove our merges, their folder if nothing else is in it, and the journal."""
    sweep(folder)
    with suppress(OSError):
        folder.rmdir()
    with suppress(OSError):
        (home / JOURNAL).unlink(missing_ok=True)


def journal_of(home: Path) -> Mapping[str, Any]:
    """What the journal says; nothing if there is none that can be read."""
    try:
        found = json.loads((home / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def watch(orders: IO[str]) -> None:
    """Wait for the end of the orders, or of the process that gives them, and do the last of them."""
    order = _last(orders)
    if order is None:
        return
    folder, home = Path(order["folder"]), Path(order["home"])
    end = time.monotonic() + order["wait_s"]

    def is_latest() -> bool:
        return bool(journal_of(home).get("token") == order["token"])

    while is_latest():
        if _has_given_back(order):
            if is_latest():
                clear(folder, home)
            return
        if time.monotonic() > end:
            sweep(folder)  # the rest is for the next run to do
            return
        time.sleep(_PAUSE_S)


def _last(orders: IO[str]) -> Any:
    """The last order; None once nothing is to be done.

    A child that the process has forked holds its pipe open, though it gives no orders.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in orders:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    order = None
    while True:
        try:
            line = lines.get(timeout=_PAUSE_S)
        except queue.Empty:
            # On Windows nothing is forked, and a process keeps its parent's number.
            if sys.platform != "win32" and order and os.getppid() != order["parent"]:
                return order
            continue
        if line is None:
            return order
        order = json.loads(line)
        if order is None:
            return None


def _has_given_back(order: Mapping[str, Any]) -> bool:
    """Whether the server has the settings, as it says itself."""
    settings = order["settings"]
    with suppress(*_FAULTS):
        if order["options"]:
            _asked(order, order["options"])
    if not settings:
        return True
    for wanted in spellings(settings):
        try:
            _asked(order, wanted)
            if is_given(_asked(order, None), settings):
                return True
        except _FAULTS:
            pass
    return False


def _asked(order: Mapping[str, Any], body: Any) -> Any:
    """The server's answer; one of the faults for anything but a success."""
    headers = {"Content-Type": "application/json"}
    headers |= authorization(os.environ.get(order["auth_env"], ""))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(order["url"] + order["path"], data, headers)
    context = None if order["verify"] else ssl._create_unverified_context()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.HTTPSHandler(context=context),
        _NoRedirects(),
    ]
    if is_near(request.host.rpartition(":")[0] or request.host):
        handlers.append(urllib.request.ProxyHandler({}))
    with urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT_S) as answer:
        return json.loads(answer.read() or b"null")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The password is for one server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


if __name__ == "__main__":
    watch(sys.stdin)
