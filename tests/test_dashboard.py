"""The command `dashboard`, as a browser uses it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from test_cli import Command
from test_cli import command as command
from test_run import folder as folder
from test_run import start

from bayesian_merger.dashboard import Dashboard
from bayesian_merger.outcome import open_study

pytest.importorskip("optuna_dashboard")


@pytest.fixture
def dashboard(folder: Path) -> Iterator[Dashboard]:
    start(folder)
    found = Dashboard(folder / "run")
    thread = threading.Thread(target=found.serve, daemon=True)
    thread.start()
    with closing(found):
        yield found
    thread.join(10)


def client(dashboard: Dashboard) -> httpx.Client:
    base = f"http://{urlsplit(dashboard.url).netloc}"
    return httpx.Client(base_url=base, trust_env=False, follow_redirects=True, timeout=60)


def test_dashboard_shows_the_study_of_the_run(dashboard: Dashboard, folder: Path) -> None:
    with client(dashboard) as visitor:
        page = visitor.get(dashboard.url)
        assert page.status_code == 200
        assert "token" not in str(page.url)
        assert "<html" in page.text
        studies = {
            s["study_name"]: s for s in visitor.get("/api/studies").json()["study_summaries"]
        }
        assert set(studies) == {"search"}
        number = studies["search"]["study_id"]
        trials = visitor.get(f"/api/studies/{number}").json()["trials"]
    with closing(open_study(folder / "run")) as study:
        values = [result.value for result in study.searched()]
    told = [one["values"][0] for one in trials if one["state"] == "Complete"]
    own = [value.mean for value in values if value]
    # The baselines stand among the trials of the optimiser too.
    assert len(own) == 7
    assert set(own) <= set(told)


def test_dashboard_answers_nobody_without_its_token(dashboard: Dashboard) -> None:
    with client(dashboard) as visitor:
        for path in ("/", "/dashboard", "/api/studies", "/?token=wrong"):
            assert visitor.get(path).status_code == 403
        strange = visitor.get(dashboard.url, headers={"host": "evil.example"})
        assert strange.status_code == 403


@pytest.mark.parametrize(
    ("verb", "path"), [("DELETE", "/api/studies/1"), ("POST", "/api/studies")]
)
def test_dashboard_changes_nothing(dashboard: Dashboard, verb: str, path: str) -> None:
    with client(dashboard) as visitor:
        visitor.get(dashboard.url)
        assert visitor.request(verb, path, json={}).status_code == 403
        assert len(visitor.get("/api/studies").json()["study_summaries"]) == 1


def test_dashboard_shows_no_other_study_by_its_number(dashboard: Dashboard, folder: Path) -> None:
    with client(dashboard) as visitor:
        visitor.get(dashboard.url)
        summaries = visitor.get("/api/studies").json()["study_summaries"]
        own = summaries[0]["study_id"]
        for number in {1, 2, 3} - {own}:
            for path in (f"/csv/{number}", f"/api/studies/{number}"):
                assert visitor.get(path).status_code == 403
        assert visitor.get(f"/csv/{own}").status_code == 200


def test_command_prints_the_address(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder)
    monkeypatch.setattr(Dashboard, "serve", lambda self: self._server.server_close())
    code, out, _ = command("dashboard", folder / "run", "--no-browser")
    assert code == 0
    assert "http://127.0.0.1:" in out


def test_folder_that_is_no_run_and_a_taken_port_are_told(
    dashboard: Dashboard, folder: Path, command: Command
) -> None:
    code, _, err = command("dashboard", folder, "--no-browser")
    assert code == 2
    assert "not a run folder" in err
    port = urlsplit(dashboard.url).port
    code, _, err = command("dashboard", folder / "run", "--no-browser", "--port", port)
    assert code == 2
    assert f"port {port} of this machine cannot be had" in err


def test_missing_package_is_told(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder)
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    code, _, err = command("dashboard", folder / "run", "--no-browser")
    assert code == 2
    assert "pip install 'bayesian-merger[dashboard]'" in err
