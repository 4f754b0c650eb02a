"""An HTTP server that is asked again until it answers, and whose answers are not trusted."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from bayesian_merger.errors import ConfigError, RunError, one_line
from bayesian_merger.guard import authorization, is_near

_CONNECT_S, _WRITE_S = 10.0, 120.0
_MOST_BYTES, _MOST_MESSAGE = 512 * 2**20, 64 * 2**20
# How often an answer of 5xx is asked for again, and the first and longest pause between two tries.
_AGAIN = 3
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
# "Too many requests": SD.Next takes 60 images a minute.
_TOO_MANY, _AGAIN_LATER = 429, 9
# What a proxy says of a server that is not there.
_AWAY = (502, 503, 504)
_log = logging.getLogger(__name__)
_UNITS = {"s": 1, "m": 60, "h": 3600}


class Refused(Exception):
    """An answer that is no success: its HTTP status, and what it says in one line."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP {status}: {said}" if said else f"HTTP {status}")
        self.status, self.said = status, said


class Strange(Exception):
    """An answer that is not what such a server gives."""


class Slow(Exception):
    """No whole answer in time; the server may still be at it."""


class _Lost(Exception):
    """No connection, or one that broke."""


class _Deadline:
    """Hangs up a request's connection when its time is over; httpx limits each wait alone.

    `trace` is to be told by httpcore what it does for the request.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._stream: Any = None
        self._timer = threading.Timer(seconds, self._hang_up)
        self._timer.daemon = True

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._stream = info["return_value"]

    def _hang_up(self) -> None:
        if self._stream:
            with suppress(OSError):
                found = self._stream.get_extra_info("socket")
                # Not that of an SSLSocket, which another thread is reading.
                socket.socket.shutdown(found, socket.SHUT_RDWR)

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _seconds(text: str | float, option: str) -> float:
    """A time such as "90s", "10m", "2h" or a number of seconds; ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(text))
    if not found:
        raise ConfigError(f"{option} is {text!r}; write a time as '90s', '10m' or '2h'")
    return float(found[1]) * _UNITS[found[2] or "s"]


class Events:
    """What a server tells by a websocket, as it happens."""

    def __init__(self, opening: AbstractContextManager[ClientConnection]) -> None:
        self._stack = ExitStack()
        self._connection = self._stack.enter_context(opening)
        self.is_open = True

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message that is a table of JSON; None if there is none in time, or none any more."""
        end = time.monotonic() + timeout_s
        while self.is_open and (left := end - time.monotonic()) > 0:
            try:
                message = self._connection.recv(left)
                found = json.loads(message) if isinstance(message, str) else None
            except TimeoutError:
                return None
            except (ValueError, RecursionError):
                continue
            except (WebSocketException, OSError):
                self.close()
                return None
            if isinstance(found, dict):
                return found
        return None

    def close(self) -> None:
        """Hang up."""
        self.is_open = False
        self._stack.close()


def is_here(host: str) -> bool:
    """Whether an address is of this machine, however it is written."""
    if host in ("localhost", "0.0.0.0", "::"):
        return True
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        # Nobody but this machine can have its own addresses.
        with suppress(OSError), socket.socket(family, kind, protocol) as one:
            one.bind((address[0], 0, *address[2:]))
            return True
    return False


def key_of(url: str) -> str:
    """Eight hexadecimal digits by which servers are told apart, however their address is written."""
    found = urlsplit(url.strip().rstrip("/"))
    port = found.port or {"https": 443}.get(found.scheme, 80)
    host = found.hostname or ""
    place = f"{'localhost' if is_here(host) else host}:{port}{found.path}"
    return hashlib.sha256(place.encode()).hexdigest()[:8]


class Server:
    """JSON in, JSON out, by the options that back ends have for it.

    A connection that is lost, or a proxy's word that the server is (502 to 504), is tried again for
    `wait_for_server` ("10m", or a number of seconds), another answer of 5xx three times, "too many
    requests" (429) for two minutes, another of 4xx never. Nor is one that takes longer than `timeout_s`,
    which the server may still be at. `n_lost` counts the losses. The environment variable `auth_env`
    may hold "user:password" or "Bearer TOKEN". `key` tells servers apart, however their address is
    written.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        wait_for_server: str | float,
        auth_env: str,
        verify: bool,
    ) -> None:
        """ConfigError for options that cannot be, and for an address with a password in it."""
        import httpx

        self._lib = httpx
        if not 1.0 <= timeout_s < math.inf:
            raise ConfigError(f"backend.timeout_s is {timeout_s}; give a second at least")
        if not re.fullmatch(r"BAYESIAN_MERGER_\w+", auth_env):
            # A stranger's configuration could have it sent to a server of the stranger's.
            raise ConfigError(
                f"backend.auth_env is {auth_env!r}, but what is in it is sent to the server; name a "
                f"variable that begins with BAYESIAN_MERGER_"
            )
        if "@" in url:
            raise ConfigError(
                f"backend.url holds a password, which the run folder would keep; put it as "
                f"user:password into the environment variable {auth_env}"
            )
        try:
            address = httpx.URL(url.strip().rstrip("/"))
            self.key, host = key_of(str(address)), address.host
        except (httpx.InvalidURL, ValueError) as error:
            # Without it, as a password may be in its place for the port.
            raise ConfigError(
                "backend.url is no address, or has no number from 1 to 65535 as its port; write it as "
                "http://127.0.0.1:7860"
            ) from error
        if address.query or address.fragment:
            raise ConfigError(
                "backend.url goes on after a ? or #, which the run folder would keep; leave that out, "
                f"and put a token as 'Bearer TOKEN' into the environment variable {auth_env}"
            )
        if address.scheme not in ("http", "https") or not host:
            raise ConfigError(
                f"backend.url: {url!r} is no address; write it as http://127.0.0.1:7860"
            )
        secret = os.environ.get(auth_env, "").strip()
        if secret and ":" not in secret and not secret.startswith("Bearer "):
            raise ConfigError(
                f"the environment variable {auth_env} holds neither user:password nor Bearer TOKEN"
            )
        header = authorization(secret)
        if not all(value.isascii() and value.isprintable() for value in header.values()):
            raise ConfigError(
                f"the environment variable {auth_env} holds no token that can be sent"
            )
        self.url, self.auth_env, self.verify = str(address), auth_env, verify
        self.n_lost = 0
        self._header = header
        self._has_given_up = threading.Event()
        self.wait_s = _seconds(wait_for_server, "backend.wait_for_server")
        self._timeout_s = timeout_s
        try:
            self._client = httpx.Client(
                base_url=address,
                verify=verify,
                headers=header,
                timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S, write=_WRITE_S),
                trust_env=not is_near(host),
                # A connection is of one request, as its deadline hangs up.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            # Without what is said, which may hold the proxy's password.
            raise ConfigError(
                f"backend.url: {host} would be asked by the proxy that HTTP_PROXY, HTTPS_PROXY or "
                f"ALL_PROXY names, which is no address of HTTP, or is of SOCKS (pip install "
                f"'httpx[socks]'); mend it, or add {host} to NO_PROXY"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"backend.url: the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read "
                f"({error.strerror})"
            ) from error

    def get(self, path: str) -> Any:
        """What is at `path`; Refused, Strange, Slow or RunError."""
        return self._call("GET", path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """The answer to `body`; Refused, Strange, Slow, or RunError if it does not come back."""
        return self._call("POST", path, body if body is not None else {})

    def fetch(self, path: str) -> bytes:
        """The bytes at `path`, whatever they are."""
        found: bytes = self._call("GET", path, None, raw=True)
        return found

    def try_post(self, path: str, body: Any) -> None:
        """`post` of what is not needed: a server that is away is not waited for."""
        with suppress(_Lost, Slow):
            self._once("POST", path, body)

    def look(self, path: str, body: Any = None) -> Any:
        """`get`, or `post` of a body, where a server should be: ConfigError if none is, at once."""
        try:
            return self._once("GET" if body is None else "POST", path, body)
        except (_Lost, Slow) as error:
            raise ConfigError(f"backend.url: nothing answers at {self.url} ({error})") from error

    def look_for(self, path: str) -> Any:
        """What only some servers have: None without it."""
        try:
            return self.look(path)
        except (Refused, Strange):
            return None

    def listen(self, path: str) -> Events | None:
        """What it tells by the websocket at `path`; None where it has none that can be had."""
        scheme, _, rest = self.url.partition("://")
        context = None
        if scheme == "https":
            context = ssl.create_default_context()
            if not self.verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            return Events(
                connect(
                    f"{'wss' if context else 'ws'}://{rest.rstrip('/')}{path}",
                    ssl=context,
                    additional_headers=self._header,
                    proxy=None if is_near(self._client.base_url.host) else True,
                    open_timeout=_CONNECT_S,
                    close_timeout=1.0,
                    max_size=_MOST_MESSAGE,
                    # A listener that is slow to read would hold up the server.
                    max_queue=None,
                    ping_interval=None,
                )
            )
        except (WebSocketException, OSError, ImportError) as error:  # ImportError for SOCKS
            _log.info("%s has no websocket: %s", self.url, one_line(error))
            return None

    def wait(self, seconds: float) -> None:
        """A pause, which ends when this is given up."""
        self._has_given_up.wait(seconds)

    @property
    def is_given_up(self) -> bool:
        """Whether it is waited for no more."""
        return self._has_given_up.is_set()

    def denied(self, error: Refused) -> ConfigError | None:
        """What to do if the server asks who we are."""
        if error.status not in (401, 403):
            return None
        return ConfigError(
            f"backend.url: {self.url} asks for a user and a password; put user:password into the "
            f"environment variable {self.auth_env}"
        )

    def give_up(self) -> None:
        """From now on, wait no more for a server that is away; may be called by another thread."""
        self._has_given_up.set()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, method: str, path: str, body: Any, raw: bool = False) -> Any:
        pause, refusals, lost_at = _PAUSE_S, 0, None
        while True:
            try:
                found = self._once(method, path, body, raw)
                if lost_at is not None and self.wait_s:
                    _log.warning("%s is back", self.url)
                return found
            except _Lost as error:
                if lost_at is None:
                    lost_at = time.monotonic()
                    self.n_lost += 1
                    if self.wait_s:
                        text = "%s is away (%s); it is waited for, up to %.0f s"
                        _log.warning(text, self.url, error, self.wait_s)
                waited = time.monotonic() - lost_at
                if waited + pause > self.wait_s or self._has_given_up.is_set():
                    raise RunError(
                        f"the server at {self.url} has gone away ({error}); start it, and give the same "
                        f"command again"
                    ) from error
            except Refused as error:
                refusals += 1
                if error.status == _TOO_MANY and refusals < _AGAIN_LATER:
                    pause = _LONGEST_PAUSE_S
                elif error.status < 500 or refusals >= _AGAIN:
                    raise
            self._has_given_up.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _once(self, method: str, path: str, body: Any, raw: bool = False) -> Any:
        content = bytearray()
        late = Slow(f"{path}: no whole answer in {self._timeout_s:g} s")
        with _Deadline(self._timeout_s) as deadline:
            try:
                told = {"trace": deadline.trace}
                with self._client.stream(method, path, json=body, extensions=told) as answer:
                    for piece in answer.iter_bytes():
                        content += piece
                        if len(content) > _MOST_BYTES:
                            raise Strange(
                                f"{path}: an answer of more than {_MOST_BYTES >> 20} MiB"
                            )
            except self._lib.ReadTimeout as error:
                raise late from error
            except self._lib.HTTPError as error:
                if deadline.is_over:
                    raise late from error
                raise _Lost(f"{path}: {one_line(error)}") from error
            if deadline.is_over:  # an answer without a length looks whole
                raise late
        if answer.status_code in _AWAY:
            raise _Lost(f"{path}: HTTP {answer.status_code}")
        if not answer.is_success:
            raise Refused(answer.status_code, _complaint(bytes(content)))
        if raw:
            return bytes(content)
        if not content:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            kind = answer.headers.get("content-type", "something").partition(";")[0]
            raise Strange(f"{path}: the answer is {kind[:60]}, not JSON") from None


def _complaint(content: bytes) -> str:
    """What an error's answer says, in a line."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return "" if "<" in text[:20] else " ".join(text.split())[:300]
    if isinstance(told, dict):
        texts = [told[key] for key in ("errors", "message", "detail", "error") if told.get(key)]
        return " ".join(str(texts[0]).split())[:300] if texts else ""
    return " ".join(str(told).split())[:300]
