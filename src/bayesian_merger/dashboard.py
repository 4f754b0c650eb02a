"""optuna-dashboard on a run's study, to look at: nothing can be changed by it."""

from __future__ import annotations

import importlib
import re
import socketserver
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from bayesian_merger.errors import ConfigError
from bayesian_merger.gate import Gate, listening
from bayesian_merger.premises import require_plain
from bayesian_merger.study.storage import search_alone

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Dashboard:
    """Serves the search of a run at `url`, until it is closed. The port 0 is any that is free."""

    def __init__(self, folder: Path, storage: str | None = None, port: int = 0) -> None:
        """Of the run in a folder, or whose study lies in the storage of that URL.

        ConfigError if optuna-dashboard is not installed, or the storage or the port is not to be had.
        """
        try:
            pages = importlib.import_module("optuna_dashboard")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "the dashboard needs the package optuna-dashboard, which is not installed; "
                "pip install 'bayesian-merger[dashboard]'"
            ) from error
        require_plain(folder)
        opened = search_alone(folder / "study.db", storage, folder.absolute().name)
        (only,) = opened.get_all_studies()
        self._server = listening(lambda place: _Server(place, _Quiet), port)
        self._gate = Gate(self._server.server_port)
        self._pages: Application = pages.wsgi(opened)
        self._own = str(only._study_id)
        self._server.set_app(self._answer)
        self.url = self._gate.url

    def serve(self) -> None:
        """Answer until the process is interrupted."""
        self._server.serve_forever(0.2)

    def close(self) -> None:
        """Answer no more; only after `serve` has ended, or from another thread."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, asked: dict[str, Any], begin: Callable[..., Any]) -> Iterable[bytes]:
        def plain(status: str, text: str, *more: tuple[str, str]) -> list[bytes]:
            begin(status, [("content-type", "text/plain; charset=utf-8"), *more])
            return [text.encode()]

        token = parse_qs(asked.get("QUERY_STRING", "")).get("token", [""])[0]
        host, cookies = asked.get("HTTP_HOST", ""), asked.get("HTTP_COOKIE", "")
        if reason := self._gate.refusal(host, token, cookies):
            return plain("403 Forbidden", reason)
        if token:
            return plain("303 See Other", "", ("location", "/"), ("set-cookie", self._gate.cookie))
        if asked["REQUEST_METHOD"] not in ("GET", "HEAD"):
            # It could rename or delete the run.
            return plain("403 Forbidden", "this dashboard only shows the study")
        wanted = re.match(r"/(?:api/studies|csv)/(\d+)", asked.get("PATH_INFO", ""))
        if wanted and wanted[1] != self._own:
            # It knows those that it does not list, of other runs in a storage that they share.
            return plain("403 Forbidden", "this dashboard shows one study")
        return self._pages(asked, begin)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing: only the command line prints."""
