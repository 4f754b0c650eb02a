"""Who may use a server of ours on this machine: whoever has its token, from this machine's own names."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import TypeVar

from bayesian_merger.errors import ConfigError

HOST = "127.0.0.1"
_Server = TypeVar("_Server")


def listening(server: Callable[[tuple[str, int]], _Server], port: int) -> _Server:
    """The server at a port of this machine alone, 0 for any that is free; ConfigError if it is taken."""
    try:
        return server((HOST, port))
    except OSError as error:
        raise ConfigError(
            f"port {port} of this machine cannot be had ({error.strerror}); name another, or 0 for any"
        ) from error


class Gate:
    """The token of the server at a port of this machine."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._token = secrets.token_urlsafe(24)
        # Cookies are the same for all ports of a machine.
        self._name = f"bayesian-merger-{port}"

    @property
    def url(self) -> str:
        """The address that lets its visitor in."""
        return f"http://{HOST}:{self._port}/?token={self._token}"

    @property
    def cookie(self) -> str:
        """What a visitor keeps, so that the token leaves the address, which others may see."""
        return f"{self._name}={self._token}; HttpOnly; SameSite=Strict; Path=/"

    def refusal(self, host: str, token: str, cookies: str) -> str:
        """Why a request is refused, by its host, the token in its address and its cookies; or ""."""
        if host not in (f"{HOST}:{self._port}", f"localhost:{self._port}"):
            return "unknown host"  # another site whose name leads here
        try:
            kept = SimpleCookie(cookies).get(self._name)
        except CookieError:
            kept = None
        given = token or (kept.value if kept else "")
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            return "open the address that the program has printed, with its token"
        return ""
