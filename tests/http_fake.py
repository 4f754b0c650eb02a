"""A server on this machine that answers as a subclass says."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer:
    """It begins to answer at `serve`, at `url`; after `stop` it drops what is asked."""

    def serve(self, port: int = 0) -> None:
        fake = self
        self.is_stopped = False

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body at once, which small packets would wait for each other

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._reply(None)

            def do_POST(self) -> None:
                size = int(self.headers.get("content-length", 0))
                self._reply(json.loads(self.rfile.read(size) or b"null"))

            def _reply(self, body: Any) -> None:
                if fake.is_stopped:
                    self.close_connection = True
                else:
                    fake.reply(self, body)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                pass  # who asks may hang up

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self.is_stopped = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reply(self, to: BaseHTTPRequestHandler, body: Any) -> None:
        """Answer a request; its body is None for a GET."""
        raise NotImplementedError


def head(to: BaseHTTPRequestHandler, status: int, found: Any) -> bytes:
    """Write the head of an answer of JSON, or of bytes as they are; what is to follow."""
    is_text = isinstance(found, bytes)
    data = found if is_text else json.dumps(found).encode()
    to.send_response(status)
    to.send_header("content-type", "text/html" if is_text else "application/json")
    to.send_header("content-length", str(len(data)))
    to.end_headers()
    return data


def upgrade(to: BaseHTTPRequestHandler) -> None:
    """Agree to a websocket (RFC 6455, section 4.2)."""
    key = to.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
    to.send_response(101)
    for name, value in {
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-accept": accept,
    }.items():
        to.send_header(name, value)
    to.end_headers()
    to.wfile.flush()


def frame(told: Any) -> bytes:
    """A message of a websocket's server, of JSON or of bytes as they are (section 5.2)."""
    is_text = not isinstance(told, bytes)
    data = json.dumps(told).encode() if is_text else told
    assert len(data) < 126
    return bytes([0x81 if is_text else 0x82, len(data)]) + data
