"""A proxy before a server, which breaks off, delays and falsifies what it passes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
from http_fake import FakeServer, head

Fault = Callable[[int, Any], tuple[int, Any]]
"""Number of the request to this path, and the server's answer -> status and answer."""


class CutOff(Exception):
    """The connection breaks in the middle of the answer."""


class Proxy(FakeServer):
    """Passes on to `server`; `faults` has, by a part of a path, what becomes of an answer.

    `met` counts the faults that were made.
    """

    def __init__(self, server: str, **faults: Fault) -> None:
        self.faults = faults
        self.asked: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self._client = httpx.Client(base_url=server, timeout=600, trust_env=False)
        self.serve()

    def reply(self, to: BaseHTTPRequestHandler, body: Any) -> None:
        sent = None if to.command == "GET" else body or {}
        answer = self._client.request(to.command, to.path, json=sent)
        parts = to.path.partition("?")[0].replace("-", "_").split("/")
        name = next((part for part in parts if part in self.faults), parts[-1])
        self.asked[name] += 1
        try:
            found = answer.json() if answer.content else None
        except ValueError:
            found = answer.content
        status, told = answer.status_code, found
        try:
            if name in self.faults:
                status, told = self.faults[name](self.asked[name], found)
        except CutOff:
            data = head(to, status, found)
            to.wfile.write(data[: len(data) // 2])
            to.close_connection = True
            self.met[name] += 1
            return
        self.met[name] += (status, told) != (answer.status_code, found)
        to.wfile.write(head(to, status, told))

    def stop(self) -> None:
        super().stop()
        self._client.close()


def cuts(every: int) -> Fault:
    """Breaks off each so-manieth answer, and says of the one before it that nobody is there."""

    def fault(number: int, answer: Any) -> tuple[int, Any]:
        if number % every == 0:
            raise CutOff
        return (502, b"<html>bad gateway") if number % every == every - 1 else (200, answer)

    return fault


def changes(by_number: Mapping[int, Mapping[str, Any]]) -> Fault:
    """Changes entries of some answers; `info` is what is to be changed of what an image tells."""

    def fault(number: int, answer: Any) -> tuple[int, Any]:
        changed = dict(by_number.get(number, {}))
        if "info" in changed:
            changed["info"] = json.dumps({**json.loads(answer["info"]), **changed["info"]})
        return 200, {**answer, **changed} if changed else answer

    return fault
