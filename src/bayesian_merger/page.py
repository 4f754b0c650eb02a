"""A web page on this machine that shows what a desk asks; whoever lacks its token gets nothing."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from bayesian_merger.desk import Desk
from bayesian_merger.gate import Gate, listening

_FILE = Path(__file__).parent / "templates" / "rate.html"
_MOST_BODY = 10_000
_POLL_S = 20.0
_log = logging.getLogger(__name__)


class Page:
    """The page of a desk at `url`, from now until it is closed. The port 0 is any that is free."""

    def __init__(self, desk: Desk, port: int = 0) -> None:
        """ConfigError if the port is taken."""
        self._server = listening(lambda place: _Server(place, _Handler), port)
        self._server.desk, self._server.gate = desk, Gate(self._server.server_port)
        self.url = self._server.gate.url
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """Knows what its requests are about."""

    daemon_threads = True
    block_on_close = False
    desk: Desk
    gate: Gate

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a page that goes away; of anything else the log is told."""
        is_away = isinstance(sys.exc_info()[1], ConnectionError | TimeoutError)
        _log.log(logging.DEBUG if is_away else logging.WARNING, "a request failed", exc_info=True)


def _number(text: str) -> int:
    """A number of at most nine digits, or -1."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 60
    server_version, sys_version = "bayesian-merger", ""

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        asked = parse_qs(split.query)
        if not self._is_allowed(asked.get("token", [""])[0]):
            return
        if split.path == "/":
            self._show(asked)
        elif split.path == "/state":
            known = asked.get("known", ["-1"])[0]
            found = self.server.desk.state(_number(known), _POLL_S)
            self._answer(200, json.dumps(found).encode(), "application/json")
        elif split.path == "/picture":
            number = asked.get("number", [""])[0]
            key = asked.get("key", [""])[0]
            picture = self.server.desk.picture(key, _number(number))
            if picture is None:
                self._answer(404, b"no such picture")
            else:
                self._answer(200, picture, "image/png")
        else:
            self._answer(404, b"nothing here")

    def do_POST(self) -> None:
        if not self._is_allowed(""):
            return
        host = self.headers.get("host")
        if self.headers.get("origin", f"http://{host}") != f"http://{host}":
            self._answer(403, b"another page")
            return
        # A form of another site cannot send this type without being asked for leave.
        if self.headers.get("content-type", "").partition(";")[0] != "application/json":
            self._answer(415, b"JSON only")
            return
        try:
            size = int(self.headers.get("content-length", ""))
            told = json.loads(self.rfile.read(size)) if 0 <= size <= _MOST_BODY else None
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            self._answer(400, b"no table of JSON")
        elif self.path == "/answer":
            key, answer = str(told.get("key")), told.get("answer")
            self._do(lambda: self.server.desk.answer(key, answer), "not asked, or no answer to it")
        elif self.path == "/undo":
            self._do(self.server.desk.undo, "there is nothing to undo")
        else:
            self._answer(404, b"nothing here")

    def _do(self, step: Callable[[], bool], fault: str) -> None:
        """Answer 200, or 409 with the fault if it was not taken, or 507 if the disk is full."""
        try:
            self._answer(*((200, b"") if step() else (409, fault.encode())))
        except OSError as error:
            self._answer(507, f"it cannot be stored ({error.strerror})".encode())

    def _is_allowed(self, token: str) -> bool:
        """Whether the token is there, in the address or a cookie; else it is answered so."""
        host, cookies = (self.headers.get(name, "") for name in ("host", "cookie"))
        if reason := self.server.gate.refusal(host, token, cookies):
            self._answer(403, reason.encode())
        return not reason

    def _show(self, asked: dict[str, list[str]]) -> None:
        """The page; with the token in its address it becomes a cookie first, as addresses are seen."""
        if "token" in asked:
            self.send_response(303)
            self.send_header("location", "/")
            self.send_header("set-cookie", self.server.gate.cookie)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        nonce = secrets.token_urlsafe(16)
        page = _FILE.read_text(encoding="utf-8").replace("{{ nonce }}", nonce)
        own = f"'nonce-{nonce}'"
        policy = (
            f"default-src 'none'; img-src 'self'; connect-src 'self'; script-src {own}; "
            f"style-src {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._answer(200, page.encode(), "text/html; charset=utf-8", policy)

    def _answer(
        self,
        status: int,
        body: bytes,
        kind: str = "text/plain; charset=utf-8",
        policy: str = "default-src 'none'",
    ) -> None:
        try:
            self._send(status, body, kind, policy)
        except OSError:  # the page is closed
            self.close_connection = True

    def _send(self, status: int, body: bytes, kind: str, policy: str) -> None:
        self.send_response(status)
        for name, value in {
            "content-type": kind,
            "content-length": str(len(body)),
            "cache-control": "no-store",
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: only the command line prints."""
