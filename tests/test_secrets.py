"""Passwords of a run with a webui and a database: nothing that the run leaves or starts tells them."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
import toy_plugin
from webui_fake import A1111, FakeWebUI

USER = "me:hunter2-of-the-webui"
# What must be nowhere, as it is and as HTTP sends it.
SECRETS = (b"hunter2", base64.b64encode(USER.encode()))
# A program finds its modules here, if it looks in the current folder.
STRANGER = "raise SystemExit('a module of the current folder was run')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in (("own", 0.3), ("zero", 0.0), ("one", 1.0)):
        (tmp_path / "models").mkdir(exist_ok=True)
        toy_plugin.write_model(tmp_path / "models" / f"{name}.safetensors", value)
    (tmp_path / "lake.toml").write_text('prompt = "a lake"\nwidth = 64\nheight = 64\n')
    (tmp_path / "here").mkdir()
    for module in ("optuna", "yaml", "bayesian_merger"):
        (tmp_path / "here" / f"{module}.py").write_text(STRANGER)
    return tmp_path


@pytest.fixture
def webui(folder: Path) -> Iterator[FakeWebUI]:
    fake = FakeWebUI(A1111, folder / "models", auth=USER)
    fake.chosen = fake.loaded = "own.safetensors"
    yield fake
    fake.stop()


def write_config(folder: Path, webui: FakeWebUI, storage: str) -> Path:
    config = folder / "config.toml"
    config.write_text(
        f"""
        models = {{ a = "models/zero.safetensors", b = "models/one.safetensors" }}
        search = {{ images = 4, storage = "{storage}" }}
        panel = {{ payloads = ["lake.toml"] }}
        heldout = {{ images = 2, select_images = 2, candidates = 2 }}
        backend = {{ name = "webui", url = "{webui.url}", wait_for_server = "2s" }}
        scorers = {{ exposure = {{}} }}
        output = {{ save_best = true, save_images = "all" }}
        """
    )
    return config


def begin(folder: Path, config: Path) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name("bayesian-merger")
    return subprocess.Popen(
        [program, "run", config, "--run-dir", folder / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder / "here",
        env={**os.environ, "BAYESIAN_MERGER_AUTH": USER},
    )


def started_by(number: int) -> list[int]:
    """The numbers of the processes that a process has started, and those that they have."""
    try:
        told = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, told) for one in (child, *started_by(child))]


def told_of(number: int) -> bytes:
    """What other users see of a process, and what its own user sees of what was added for it."""
    try:
        place = Path(f"/proc/{number}")
        environment = (place / "environ").read_bytes().split(b"\0")
        added = [one for one in environment if not one.startswith(b"BAYESIAN_MERGER_AUTH=")]
        return b"\0".join([(place / "cmdline").read_bytes(), *added])
    except OSError:
        return b""


def require_none(secrets: tuple[bytes, ...], told: bytes, where: object) -> None:
    assert not [secret for secret in secrets if secret in told], where


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not postgres.PG_CTL, reason="PostgreSQL is not installed")
def test_passwords_are_in_no_file_no_line_and_no_process(folder: Path, webui: FakeWebUI) -> None:
    with postgres.Postgres() as server:
        secrets = (*SECRETS, server.password.encode())
        config = write_config(folder, webui, server.url)
        process = begin(folder, config)
        seen: set[bytes] = set()
        while process.poll() is None:
            for number in (process.pid, *started_by(process.pid)):
                told = told_of(number)
                require_none(secrets, told, told)
                seen.add(told.partition(b"\0\0")[0][:2000])
            time.sleep(0.05)
        said = process.communicate()[0]
        assert process.returncode == 0, said.decode()
        require_none(secrets, said, "what it says")
        # The run has had a worker, and the webui's guard.
        assert any(b"\0work\0" in one for one in seen)
        assert any(b"guard.py" in one for one in seen)
        files = [path for path in (folder / "run").rglob("*") if path.is_file()]
        assert {"report.html", "best.toml", "best.safetensors", "result.json", "study.id"} <= {
            path.name for path in files
        }
        assert any(path.parent.name == "workers" for path in files)
        for path in files:
            require_none(secrets, path.read_bytes(), path)
        require_none(secrets, server.dump(), "the database")

        # And where things go wrong.
        webui.stop()
        process = begin(folder, config)
        said = process.communicate()[0]
        assert process.returncode == 2, said.decode()
        assert b"nothing answers" in said
        require_none(secrets, said, "what it says")
