from __future__ import annotations

import errno
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bayesian_merger import delivery
from bayesian_merger.errors import ConfigError
from bayesian_merger.guard import JOURNAL
from bayesian_merger.server import Server, Slow


@pytest.mark.parametrize(
    ("begun", "piece"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
        (b"HTTP/1.0 200 OK\r\n\r\n", b"a"),
    ],
)
def test_answer_that_drips_is_waited_for_no_longer_than_said(begun: bytes, piece: bytes) -> None:
    is_over = threading.Event()

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.recv(1000)
            connection.sendall(begun)
            while not is_over.wait(0.1):
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        port = listening.getsockname()[1]
        server = Server(f"http://127.0.0.1:{port}", 1.0, 0, "BAYESIAN_MERGER_AUTH", True)
        start = time.monotonic()
        with pytest.raises(Slow, match="no whole answer in 1 s"):
            server.get("/x")
        assert time.monotonic() - start < 2.5
        is_over.set()
        thread.join()
        server.close()


@pytest.mark.parametrize("url", ["http://x:99999", "http://x:-1", "http://xn--a:80"])
def test_address_that_is_none_is_told_with_its_key(url: str) -> None:
    with pytest.raises(ConfigError, match=r"backend\.url is no address"):
        Server(url, 1.0, 0, "BAYESIAN_MERGER_AUTH", True)


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY"])
@pytest.mark.parametrize(
    "proxy", ["socks5://u:secret@h:1", "foo://u:secret@h", "http://u:h@h:secret"]
)
def test_proxy_that_is_none_is_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    monkeypatch.setenv(name, proxy)
    with pytest.raises(ConfigError, match=r"backend\.url: .*_PROXY") as caught:
        Server("http://example.com:7860", 1.0, 0, "BAYESIAN_MERGER_AUTH", True)
    assert "secret" not in str(caught.value)


def test_certificates_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
    with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
        Server("https://example.com", 1.0, 0, "BAYESIAN_MERGER_AUTH", True)


def test_what_a_server_had_stays_noted_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "user_state_path", lambda *_, **__: tmp_path)
    server = Server("http://127.0.0.1:1", 1.0, 0, "BAYESIAN_MERGER_AUTH", True)
    journal = tmp_path / "servers" / server.key / JOURNAL
    journal.parent.mkdir(parents=True)
    noted = '{"path": "/x", "settings": {"sd_model_checkpoint": "mine"}}'
    journal.write_text(noted)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot be written"):
        delivery.Claim(server, tmp_path / "models").take()
    assert journal.read_text() == noted
    server.close()
