"""Downloads by the real client of the hub and by httpx, from a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bayesian_merger import hub
from bayesian_merger.errors import ConfigError

REVISION = "0123456789abcdef0123456789abcdef01234567"
BODY = b"weights of a head" * 1000


class Server:
    """What the hub answers of one repository, and files beside it; every request is kept."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, list[str]()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, has_body: bool) -> None:
                owner.asked.append(f"{self.command} {self.path}")
                if self.path.startswith("/api/models/tiny/clip"):
                    self.send(json.dumps(owner.listed("/tree/" in self.path)))
                    return
                body = owner.files.get(self.path.rpartition("/")[2])
                if body is None:
                    self.send_error(404)
                    return
                digest = hashlib.sha256(body).hexdigest()
                more = {"X-Repo-Commit": REVISION, "ETag": f'"{digest}"'}
                self.send(body, has_body, {**more, "X-Linked-ETag": f'"{digest}"'})

            def send(
                self, body: str | bytes, has_body: bool = True, more: dict[str, str] | None = None
            ) -> None:
                content = body.encode() if isinstance(body, str) else body
                self.send_response(200)
                for key, value in {"Content-Length": str(len(content)), **(more or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if has_body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def listed(self, is_tree: bool) -> object:
        """The files as the hub's client asks for them since its version 2, and before."""
        if not is_tree:
            siblings = [{"rfilename": name} for name in self.files]
            return {"id": "tiny/clip", "sha": REVISION, "siblings": siblings}
        return [
            {
                "type": "file",
                "path": name,
                "size": len(body),
                "oid": "0" * 40,
                "lfs": {
                    "oid": hashlib.sha256(body).hexdigest(),
                    "size": len(body),
                    "pointerSize": 130,
                },
            }
            for name, body in self.files.items()
        ]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    names = ("config.json", "preprocessor_config.json", "model.safetensors", "tf_model.h5")
    found = Server({**{name: name.encode() * 100 for name in names}, "head.pth": BODY})
    yield found
    found.close()


def fetched(
    server: Server, home: Path, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """A process of its own, as the hub's client reads its settings when it is imported."""
    code = (
        "from bayesian_merger.errors import ConfigError\n"
        "from bayesian_merger.hub import folder\n"
        "try:\n"
        f"    print(folder('tiny/clip@{REVISION}', 'scorers.chad.tower'))\n"
        "except ConfigError as error:\n"
        "    print('error:', error)\n"
    )
    wanted = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "2"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **wanted, "HF_HUB_DISABLE_XET": "1", **more},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_repository_is_downloaded_once_and_then_had_without_the_hub(
    server: Server, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    path = Path(fetched(server, home).stdout.strip())
    assert (path / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert (path / "preprocessor_config.json").is_file()
    assert not (path / "tf_model.h5").exists()
    asked = list(server.asked)
    assert Path(fetched(server, home).stdout.strip()) == path
    assert server.asked == asked


@pytest.mark.skipif(sys.platform == "win32", reason="without symbolic links there is no digest")
def test_damaged_weights_in_the_cache_are_refused(server: Server, tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = Path(fetched(server, home).stdout.strip())
    blob = (path / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert f"error: {blob} is damaged; delete it" in fetched(server, home).stdout


def test_offline_and_missing_is_one_line_that_says_what_to_put_where(
    server: Server, tmp_path: Path
) -> None:
    server.close()
    settings: list[dict[str, str]] = [{}, {"HF_HUB_OFFLINE": "1"}]
    for more in settings:
        start = time.monotonic()
        answer = fetched(server, tmp_path / "home", None, **more)
        assert time.monotonic() - start < 20
        [line] = answer.stdout.splitlines()
        assert answer.stderr == ""
    assert line.startswith("error: tiny/clip is not here, and cannot be downloaded (")
    assert f"https://huggingface.co/tiny/clip/tree/{REVISION} into a folder" in line
    assert line.endswith("name that by scorers.chad.tower")


def test_model_in_the_current_folder_is_not_taken_for_another(
    server: Server, tmp_path: Path
) -> None:
    server.close()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("of another model")
    answer = fetched(server, tmp_path / "home", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert answer.stdout.startswith("error: tiny/clip is not here")


def test_file_is_downloaded_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = hub.File(f"{server.url}/head.pth", hashlib.sha256(BODY).hexdigest())
    path = hub.file(wanted, "scorers.chad.weights")
    assert path.read_bytes() == BODY
    assert path.is_relative_to(tmp_path)
    assert hub.file(wanted, "scorers.chad.weights") == path
    assert server.asked == ["GET /head.pth"]


@pytest.mark.parametrize("name", ["head.pth", "none.pth"])
def test_file_that_is_another_is_not_kept(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fault = "is another file than this program knows" if name == "head.pth" else "404"
    with pytest.raises(ConfigError, match=fault):
        hub.file(hub.File(f"{server.url}/{name}", "0" * 64), "scorers.chad.weights")
    assert not [p for p in (tmp_path / "bayesian-merger").rglob("*") if p.is_file()]
