"""The command `rate`, as somebody answers its page."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from test_cli import Command
from test_cli import command as command
from test_run import folder as folder
from test_run import start

from bayesian_merger import run
from bayesian_merger.cli import asking
from bayesian_merger.desk import Desk
from bayesian_merger.page import Page

Habit = Callable[[Any, list[bytes]], object]


class Visitor:
    """Answers every page that is opened, as `habit` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, habit: Habit, most: int = 1000) -> None:
        self.seen: list[Any] = []
        self._habit, self._most = habit, most
        visitor = self

        class Watched(Page):
            def __init__(self, desk: Desk, port: int = 0) -> None:
                super().__init__(desk, port)
                threading.Thread(target=visitor.visit, args=(self.url,), daemon=True).start()

        monkeypatch.setattr(asking, "Page", Watched)

    def visit(self, url: str) -> None:
        base = f"http://{urlsplit(url).netloc}"
        options: Any = {"trust_env": False, "follow_redirects": True, "timeout": 60}
        with httpx.Client(base_url=base, **options) as client:
            client.get(url)
            version = -1
            try:
                while len(self.seen) < self._most:
                    state = client.get("/state", params={"known": version}).json()
                    version, asked = state["version"], state["question"]
                    if state["over"]:
                        return
                    if asked:
                        self.answer(client, asked)
            except (httpx.HTTPError, ValueError):
                return  # the page is gone

    def answer(self, client: httpx.Client, asked: Any) -> None:
        pictures = [
            client.get("/picture", params={"key": asked["key"], "number": n}).content
            for n in range(asked["pictures"])
        ]
        told = {"key": asked["key"], "answer": self._habit(asked, pictures)}
        answer = client.post("/answer", json=told)
        if answer.status_code == 200:
            self.seen.append((asked, pictures))


def prefers(wanted: set[bytes]) -> Habit:
    return lambda asked, pictures: "left" if pictures[0] in wanted else "right"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run is kept for all tests, once it was made."""
    return tmp_path_factory.mktemp("rate") / "run"


@pytest.fixture
def finished(folder: Path, once: Path) -> Path:
    if not once.exists():
        start(folder)
        shutil.copytree(folder / "run", once)
        return folder / "run"
    shutil.copytree(once, folder / "run")
    return folder / "run"


def of(run_dir: Path, name: str) -> set[bytes]:
    return {path.read_bytes() for path in (run_dir / "images" / "heldout" / name).glob("*.png")}


def best_of(run_dir: Path) -> set[bytes]:
    [best] = {p.name for p in (run_dir / "images" / "heldout").iterdir()} - {"a", "b", "even"}
    return of(run_dir, best)


def test_preferences_are_counted_by_rival(
    finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = Visitor(monkeypatch, prefers(best_of(finished)))
    code, told, _ = command("rate", str(finished), "--no-browser")
    assert code == 0
    assert (
        "best over A: preferred in 8 of 8 pairs (100%, 95 % interval 68% to 100%; 0 alike)" in told
    )
    assert "best over B: preferred in 8 of 8 pairs" in told
    assert "best over the even merge: preferred in 8 of 8 pairs" in told
    assert len(visitor.seen) == 24
    # Sides are shuffled, nothing tells which is which, and pairs are of one prompt and seed.
    sides = [pictures[0] in best_of(finished) for _, pictures in visitor.seen]
    assert 4 <= sum(sides) <= 20
    assert not any("best" in json.dumps(asked) for asked, _ in visitor.seen)


def test_rating_goes_on_where_it_was_left(
    finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Visitor(monkeypatch, prefers(best_of(finished)), most=7)
    stopped = threading.Event()
    monkeypatch.setattr(Desk, "ask", _stopping(Desk.ask, first, stopped))
    code, told, _ = command("rate", str(finished), "--no-browser")
    assert code == 130
    assert "7 of 24 are answered; the same command goes on" in told
    assert "best over" in told
    monkeypatch.undo()
    second = Visitor(monkeypatch, prefers(of(finished, "even")))
    code, told, _ = command("rate", str(finished), "--no-browser")
    assert code == 0
    assert len(second.seen) == 24 - 7
    assert {a["key"] for a, _ in first.seen}.isdisjoint(a["key"] for a, _ in second.seen)
    assert "in 24 of" not in told


def _stopping(ask: Any, visitor: Visitor, stopped: threading.Event) -> Any:
    """`Desk.ask` that is stopped by Ctrl-C after the visitor has gone."""

    def asking_until(desk: Desk, questions: Any) -> Any:
        def stop() -> None:
            while desk.n_answered < 7:
                time.sleep(0.02)
            desk.withdraw()

        threading.Thread(target=stop, daemon=True).start()
        try:
            return ask(desk, questions)
        except Exception as error:
            raise KeyboardInterrupt from error

    return asking_until


def test_no_more_is_asked_than_somebody_wants(
    finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = Visitor(monkeypatch, prefers(best_of(finished)))
    code, told, _ = command("rate", str(finished), "--no-browser", "--most", "5")
    assert code == 0
    assert len(visitor.seen) == 5
    assert "are answered" not in told


def test_run_in_progress_is_not_rated(finished: Path, command: Command) -> None:
    with run.locked(finished):
        code, _, said = command("rate", str(finished), "--no-browser")
    assert code == 2
    assert "another process is running here" in said


def test_pictures_are_marked_one_by_one(
    finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = best_of(finished)
    Visitor(monkeypatch, lambda asked, pictures: 9 if pictures[0] in best else 4)
    code, told, _ = command("rate", str(finished), "--no-browser", "--marks")
    assert code == 0
    assert "best   9.00 of 10, mean of 8 marks" in told
    assert "even   4.00 of 10, mean of 8 marks" in told


def test_folder_without_pictures_is_told(tmp_path: Path, command: Command) -> None:
    code, _, said = command("rate", str(tmp_path))
    assert code == 2
    assert "not a run folder" in said
