"""The rating page as a person uses it, in a real browser."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image

from bayesian_merger.desk import JOURNAL, Answer, Desk, Question
from bayesian_merger.errors import RunError
from bayesian_merger.page import Page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
# Set it to a folder to look at what the page looks like.
SHOTS = os.environ.get("SCREENSHOTS")
EVIL = (
    '<img src=x onerror="document.title=\'evil\'"> a <b>cat</b> & "dog" <script>alert(1)</script>'
)


def png(seed: int, size: tuple[int, int] = (256, 320)) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, format="PNG")
    return file.getvalue()


def pairs(n: int) -> list[Question]:
    return [
        Question(
            f"pair {i}",
            (png(2 * i), png(2 * i + 1)),
            f"{EVIL} {i}",
            seed=i,
            negative_prompt="blurry",
        )
        for i in range(n)
    ]


class Asking:
    """What a run does: it asks, and waits."""

    def __init__(self, folder: Path, questions: list[Question], port: int = 0) -> None:
        self.desk = Desk(folder, undo_s=0.0, total=len(questions))
        self.page = Page(self.desk, port)
        self.answers: list[Answer] = []
        self._thread = threading.Thread(target=self._ask, args=(questions,), daemon=True)
        self._thread.start()

    def _ask(self, questions: list[Question]) -> None:
        with suppress(RunError):  # that nobody is asked any more
            self.answers = self.desk.ask(questions)

    def end(self) -> list[Answer]:
        self._thread.join(20)
        self.stop()
        return self.answers

    def stop(self) -> None:
        self.desk.close()
        self.page.close()


@pytest.fixture
def browser(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Browser]:
    found = Browser(tmp_path / "profile", *getattr(request, "param", (1200, 800)))
    yield found
    found.close()


def asked(browser: Browser, number: int) -> None:
    """Wait until this pair is shown, with its pictures."""
    browser.until(f"document.getElementById('prompt').textContent.endsWith(' {number}')")
    browser.until(
        "[...document.images].filter(i => i.src).every(i => i.complete && i.naturalWidth)"
    )


def shot(browser: Browser, name: str) -> None:
    if SHOTS:
        browser.shot(Path(SHOTS) / f"{name}.png")


KEYS = {"ArrowLeft": "left", "ArrowRight": "right", "ArrowDown": "alike", "s": "skip"}


def test_twenty_pairs_are_rated_by_keyboard_and_nothing_is_lost(
    tmp_path: Path, browser: Browser
) -> None:
    wanted = [list(KEYS)[i % 4 if i % 5 else 0] for i in range(20)]
    first = Asking(tmp_path, pairs(20))
    browser.goto(first.page.url)
    assert "token" not in browser.run("location.href")
    for i in range(5):
        asked(browser, i)
        browser.key(wanted[i])
    asked(browser, 5)
    shot(browser, "pair")
    # Undone, twice, and answered otherwise and as before.
    browser.key("u")
    asked(browser, 4)
    browser.key("u")
    asked(browser, 3)
    for i in (3, 4):
        browser.key(wanted[i])
        asked(browser, i + 1)
    # The page is closed and opened again.
    browser.goto("about:blank")
    browser.goto(first.page.url)
    asked(browser, 5)
    browser.key(wanted[5])
    asked(browser, 6)
    # The program is killed, and begun anew.
    port = int(first.page.url.split(":")[2].split("/")[0])
    first.stop()
    browser.until(
        "!document.getElementById('lost').hidden || document.body.textContent.includes('Done')"
    )
    second = Asking(tmp_path, pairs(20), port)
    browser.goto(second.page.url)
    for i in range(6, 20):
        asked(browser, i)
        browser.key(wanted[i])
    assert second.end() == [KEYS[key] for key in wanted]
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines() if line]
    assert sum("undone" in line for line in lines) == 2


def test_prompts_with_html_in_them_stay_text(tmp_path: Path, browser: Browser) -> None:
    asking = Asking(tmp_path, pairs(1))
    browser.goto(asking.page.url)
    asked(browser, 0)
    assert browser.run("document.getElementById('prompt').textContent") == f"{EVIL} 0"
    assert browser.run("document.title") == "Rate the pictures"
    assert browser.run("document.querySelectorAll('#prompt *').length") == 0
    asking.stop()


def test_picture_is_clicked_or_touched(tmp_path: Path, browser: Browser) -> None:
    asking = Asking(tmp_path, pairs(2))
    browser.goto(asking.page.url)
    asked(browser, 0)
    browser.run("document.querySelectorAll('figure')[1].click()")
    asked(browser, 1)
    browser.run("document.querySelectorAll('figure')[0].click()")
    assert asking.end() == ["right", "left"]


def test_marks_are_typed_ten_too(tmp_path: Path, browser: Browser) -> None:
    questions = [Question(f"mark {i}", (png(i),), f"a cat {i}", seed=i) for i in range(5)]
    asking = Asking(tmp_path, questions)
    browser.goto(asking.page.url)
    for i, keys in enumerate(["7", "10", "0", "1", "s"]):
        asked(browser, i)
        if i == 1:
            shot(browser, "mark")
        for key in keys:
            browser.key(key)
    assert asking.end() == [7, 10, 0, 1, "skip"]


def test_one_that_waits_for_its_nought_marks_no_other_picture(
    tmp_path: Path, browser: Browser
) -> None:
    questions = [Question(f"mark {i}", (png(i),), f"a cat {i}", seed=i) for i in range(3)]
    asking = Asking(tmp_path, questions)
    browser.goto(asking.page.url)
    asked(browser, 0)
    browser.key("1")
    browser.key("s")
    asked(browser, 1)
    time.sleep(1)
    assert asking.desk.state()["question"]["key"] == "mark 1"
    browser.key("1")
    browser.key("5")
    asked(browser, 2)
    browser.key("3")
    assert asking.end() == ["skip", 5, 3]


@pytest.mark.parametrize("browser", [(390, 844)], indirect=True)
def test_page_fits_a_phone(tmp_path: Path, browser: Browser) -> None:
    asking = Asking(tmp_path, pairs(1))
    browser.goto(asking.page.url)
    asked(browser, 0)
    shot(browser, "phone")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("document.documentElement.scrollHeight") <= 844
    heights = browser.run("[...document.images].map(i => i.getBoundingClientRect().height)")
    assert all(height > 150 for height in heights)
    asking.stop()


@pytest.mark.parametrize("browser", [(390, 844)], indirect=True)
def test_arrows_point_to_pictures_that_stand_one_above_the_other(
    tmp_path: Path, browser: Browser
) -> None:
    run = Asking(tmp_path, pairs(3))
    browser.goto(run.page.url)
    for number, key in enumerate(("ArrowUp", "ArrowDown", "=")):
        asked(browser, number)
        browser.key(key)
    assert run.end() == ["left", "right", "alike"]


def test_answer_that_cannot_be_stored_is_told_and_asked_again(
    tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Asking(tmp_path, pairs(1))
    browser.goto(run.page.url)
    asked(browser, 0)
    assert browser.run("document.getElementById('asks').textContent") == "Which is better?"
    with monkeypatch.context() as full:

        def no_space(*_: object) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(os, "fsync", no_space)
        browser.key("ArrowLeft")
        told = "document.getElementById('full').textContent"
        said = browser.until(f"!document.getElementById('full').hidden && {told}")
        assert said == "Nothing was taken: it cannot be stored (No space left on device)."
    asked(browser, 0)
    browser.key("ArrowRight")
    assert run.end() == ["right"]
