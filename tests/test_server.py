from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest

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
