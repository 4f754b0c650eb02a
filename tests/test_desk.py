from __future__ import annotations

import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from bayesian_merger.desk import Answer, Desk, Question
from bayesian_merger.errors import ConfigError, RunError, TrialError
from bayesian_merger.page import Page


def png(grey: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), grey).save(file, format="PNG")
    return file.getvalue()


def marks(*keys: str) -> list[Question]:
    return [Question(key, (png(),), f"prompt of {key}", seed=i) for i, key in enumerate(keys)]


def pair(key: str) -> Question:
    return Question(key, (png(1), png(2)), "a cat", seed=1)


class Asking:
    """A desk that asks in a thread of its own, and what came of it."""

    def __init__(self, desk: Desk, questions: list[Question]) -> None:
        self.answers: list[Answer] = []
        self.fault: Exception | None = None
        self._thread = threading.Thread(target=self._ask, args=(desk, questions))
        self._thread.start()
        if questions:
            wait(lambda: desk.state()["question"] is not None or not self._thread.is_alive())

    def _ask(self, desk: Desk, questions: list[Question]) -> None:
        try:
            self.answers = desk.ask(questions)
        except (RunError, TrialError) as error:
            self.fault = error

    def end(self) -> list[Answer]:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.answers


def wait(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    assert is_so()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path, undo_s=0.0, total=20)
    yield found
    found.close()


def test_questions_are_asked_in_order_and_answers_come_back(desk: Desk) -> None:
    asking = Asking(desk, marks("a", "b"))
    assert desk.state()["question"]["key"] == "a"
    assert desk.answer("a", 7)
    assert desk.state()["question"]["key"] == "b"
    assert desk.answer("b", "skip")
    assert asking.end() == [7, "skip"]
    assert desk.state()["question"] is None


@pytest.mark.parametrize("answer", [11, -1, True, "left", "7", None, 7.5, [7]])
def test_what_is_no_mark_is_not_taken(desk: Desk, answer: object) -> None:
    asking = Asking(desk, marks("a"))
    assert not desk.answer("a", answer)
    assert not desk.answer("b", 7)
    assert desk.answer("a", 10)
    assert asking.end() == [10]


@pytest.mark.parametrize("answer", ["left", "right", "alike", "skip"])
def test_of_two_pictures_one_is_chosen(desk: Desk, answer: str) -> None:
    asking = Asking(desk, [pair("a")])
    assert not desk.answer("a", 7)
    assert desk.answer("a", answer)
    assert asking.end() == [answer]


def test_answers_are_on_the_disk_at_once_and_not_asked_again(tmp_path: Path) -> None:
    journal = tmp_path / "ratings.jsonl"
    first = Desk(tmp_path, undo_s=0.0)
    asking = Asking(first, marks("a", "b", "c"))
    first.answer("a", 3)
    first.answer("b", 4)
    assert [json.loads(line)["answer"] for line in journal.read_text().splitlines()] == [3, 4]
    # As if the process were killed in the middle of a line, and begun anew.
    with journal.open("a") as file:
        file.write('{"key": "c", "ans')
    second = Desk(tmp_path, undo_s=0.0)
    assert second.n_answered == 2
    again = Asking(second, marks("a", "b", "c"))
    assert second.state()["question"]["key"] == "c"
    second.answer("c", 5)
    assert again.end() == [3, 4, 5]
    third = Desk(tmp_path)
    assert third.ask(marks("c", "a")) == [5, 3]
    for one in (first, second, third):
        one.close()
    asking.end()


def test_answers_can_be_undone_one_after_the_other(tmp_path: Path) -> None:
    desk = Desk(tmp_path, undo_s=60.0)
    asking = Asking(desk, marks("a", "b"))
    desk.answer("a", 1)
    desk.answer("b", 2)
    assert desk.undo()
    assert desk.undo()
    assert not desk.undo()
    assert desk.state()["question"]["key"] == "a"
    desk.answer("a", 8)
    desk.answer("b", 9)
    assert desk.state()["undo"]
    desk._undo_s = 0.0
    assert asking.end() == [8, 9]
    desk.close()
    again = Desk(tmp_path)
    assert again.ask(marks("a", "b")) == [8, 9]
    again.close()


def test_question_may_be_withdrawn_and_others_asked(desk: Desk) -> None:
    asking = Asking(desk, marks("a", "b"))
    desk.answer("a", 1)
    desk.withdraw()
    asking.end()
    assert "withdrawn" in str(asking.fault)
    again = Asking(desk, marks("a", "b"))
    desk.answer("b", 2)
    assert again.end() == [1, 2]


def test_desk_that_is_closed_ends_the_run(desk: Desk) -> None:
    asking = Asking(desk, marks("a"))
    desk.close()
    asking.end()
    assert isinstance(asking.fault, RunError)
    assert "the same command goes on" in str(asking.fault)


def test_only_answers_to_what_is_asked_for_are_counted(tmp_path: Path) -> None:
    first = Desk(tmp_path, undo_s=0.0)
    asking = Asking(first, marks("a", "b"))
    first.answer("a", 3)
    first.answer("b", 4)
    asking.end()
    first.close()
    second = Desk(tmp_path, total=2, keys=["b", "c"])
    assert second.state()["answered"] == 1
    second.close()


def test_journal_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Desk(tmp_path / "file")


# The page


@pytest.fixture
def page(desk: Desk) -> Iterator[Page]:
    found = Page(desk)
    yield found
    found.close()


@contextmanager
def visitor(page: Page) -> Iterator[httpx.Client]:
    """Somebody who has opened the address, with the token."""
    base = f"http://{urlsplit(page.url).netloc}"
    with httpx.Client(base_url=base, follow_redirects=True, trust_env=False) as found:
        assert found.get(page.url).status_code == 200
        yield found


def test_page_asks_and_takes_answers(desk: Desk, page: Page) -> None:
    asking = Asking(desk, [pair("a & b")])
    with visitor(page) as client:
        state = client.get("/state").json()
        assert (state["question"]["key"], state["total"]) == ("a & b", 20)
        picture = client.get("/picture", params={"key": "a & b", "number": 1})
        assert (picture.content, picture.headers["content-type"]) == (png(2), "image/png")
        assert client.get("/picture", params={"key": "a & b", "number": 2}).status_code == 404
        assert client.get("/picture", params={"key": "c", "number": "x"}).status_code == 404
        assert client.post("/answer", json={"key": "b", "answer": "left"}).status_code == 409
        assert client.post("/answer", json={"key": "a & b", "answer": "left"}).status_code == 200
        assert client.post("/undo", json={}).status_code in (200, 409)
    desk.withdraw()
    asking.end()


def test_state_is_waited_for(desk: Desk, page: Page) -> None:
    with visitor(page) as client:
        version = client.get("/state").json()["version"]
        asking: list[Asking] = []
        threading.Timer(0.3, lambda: asking.append(Asking(desk, marks("a")))).start()
        start = time.monotonic()
        assert client.get("/state", params={"known": version}).json()["question"]["key"] == "a"
        assert 0.2 < time.monotonic() - start < 5
        assert desk.is_looked_at
    desk.answer("a", 1)
    wait(lambda: bool(asking))
    asking[0].end()


@pytest.mark.parametrize("path", ["/", "/state", "/picture?key=a&number=0", "/?token=wrong"])
def test_who_lacks_the_token_gets_nothing(desk: Desk, page: Page, path: str) -> None:
    asking = Asking(desk, marks("a"))
    split = urlsplit(page.url)
    answer = httpx.get(f"http://{split.netloc}{path}", trust_env=False)
    assert answer.status_code == 403
    assert b"prompt of a" not in answer.content
    for post in ("/answer", "/undo"):
        told = {"key": "a", "answer": 3}
        address = f"http://{split.netloc}{post}"
        assert httpx.post(address, json=told, trust_env=False).status_code == 403
    assert desk.answer("a", 5)
    assert asking.end() == [5]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"host": "evil.example"}, 403), ({"host": "127.0.0.1"}, 403), ({}, 303)],
)
def test_other_sites_whose_name_leads_here_get_nothing(
    page: Page, headers: dict[str, str], status: int
) -> None:
    split = urlsplit(page.url)
    connection = http.client.HTTPConnection(split.netloc)
    connection.request("GET", f"/?{split.query}", headers=headers)
    with connection.getresponse() as answer:
        assert answer.status == status
    connection.close()


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"key": "a", "answer": 3}', "text/plain", 415),
        (b'{"key": "a", "answer": 3}', "application/x-www-form-urlencoded", 415),
        (b"[1]", "application/json", 400),
        (b"{", "application/json", 400),
        (b"x" * 20_000, "application/json", 400),
    ],
)
def test_what_is_no_answer_is_refused(page: Page, body: bytes, kind: str, status: int) -> None:
    with visitor(page) as client:
        answer = client.post("/answer", content=body, headers={"content-type": kind})
        assert answer.status_code == status


def test_other_pages_of_this_machine_answer_nothing(desk: Desk, page: Page) -> None:
    asking = Asking(desk, marks("a"))
    base = f"http://{urlsplit(page.url).netloc}"
    with visitor(page) as client:
        for origin, status in (("http://127.0.0.1:1", 403), ("null", 403), (base, 200)):
            told = {"key": "a", "answer": 3}
            answer = client.post("/answer", json=told, headers={"origin": origin})
            assert answer.status_code == status
    assert asking.end() == [3]


def test_page_may_load_and_send_nothing_elsewhere(page: Page) -> None:
    with visitor(page) as client:
        answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in answer.text.replace("httpOnly", "")
    assert "token" not in answer.text


def test_port_that_is_taken_is_told(desk: Desk, page: Page) -> None:
    with pytest.raises(ConfigError, match=r"port \d+ of this machine cannot be had"):
        Page(desk, urlsplit(page.url).port or 0)


def test_cookie_is_for_this_page_only(page: Page) -> None:
    answer = httpx.get(page.url, trust_env=False)
    assert answer.status_code == 303
    cookie: Any = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert str(urlsplit(page.url).port) in cookie
