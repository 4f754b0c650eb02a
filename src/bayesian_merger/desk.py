"""Questions to a person about pictures, and the answers, each on the disk before the next is asked."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeGuard

from bayesian_merger.checkpoint import whole_file
from bayesian_merger.errors import ConfigError, RunError, TrialError

Choice = Literal["left", "right", "alike", "skip"]
MOST_MARK = 10
CHOICES: tuple[Choice, ...] = ("left", "right", "alike", "skip")
SHARES: Mapping[str, float] = {"left": 1.0, "right": 0.0, "alike": 0.5}
"""The share of the left picture in a choice."""
Answer = int | Choice
"""A mark from 0 to 10, which of two is better, or no answer ("skip")."""

JOURNAL = "ratings.jsonl"
_AWAY_S = 10.0
_PAUSE_S = 0.25


def is_mark(answer: object) -> TypeGuard[int]:
    """Whether it is a whole number from 0 to 10."""
    return isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer <= MOST_MARK


@dataclass(frozen=True)
class Question:
    """One picture to be marked, or two for one prompt and seed of which one is better.

    `key` tells it from others, and is the same whenever it is asked. `pictures` are PNG files.
    """

    key: str
    pictures: tuple[bytes, ...]
    prompt: str
    seed: int
    negative_prompt: str = ""
    about: str = ""

    def takes(self, answer: object) -> bool:
        """Whether this may be the answer."""
        if answer == "skip":
            return True
        return is_mark(answer) if len(self.pictures) == 1 else answer in CHOICES


@dataclass
class _Round:
    """What is asked at once: its questions, their answers so far, and when the last was given."""

    questions: Sequence[Question] = ()
    answers: dict[str, Answer] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    ended_at: float = 0.0
    is_withdrawn: bool = False

    @property
    def open(self) -> Question | None:
        """The first question without an answer."""
        return next((q for q in self.questions if q.key not in self.answers), None)


class Desk:
    """Asks one person, by whatever shows `state` and calls `answer` and `undo`.

    Answers are appended to "ratings.jsonl" in `folder`, with the pictures that they are about in
    "rated" there, and what has an answer is not asked again. The last one of a round may be undone for
    `undo_s` seconds, the others as long. About `total` answers are wanted in all; those to questions of
    the `keys` are counted, or to any.
    """

    def __init__(
        self,
        folder: Path,
        undo_s: float = 3.0,
        total: int = 0,
        keys: Collection[str] | None = None,
    ) -> None:
        """ConfigError if the journal cannot be read or written."""
        self._pictures, self._undo_s, self.total = folder / "rated", undo_s, total
        self._keys = keys
        journal = folder / JOURNAL
        self._changed = threading.Condition()
        self._version = 0
        self._round = _Round()
        self._is_over = False
        self._seen_at = time.monotonic()
        self.away: Callable[[], None] = lambda: None
        """Is called when something is asked and nobody has looked for some seconds."""
        try:
            self._known: dict[str, Answer] = {k: a["answer"] for k, a in answers(journal).items()}
            journal.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = journal.open("a", encoding="utf-8")
            if journal.stat().st_size and not journal.read_bytes().endswith(b"\n"):
                self._file.write("\n")  # a killed process has left half a line
        except OSError as error:
            raise ConfigError(f"{journal}: cannot be written ({error.strerror})") from error

    @property
    def n_answered(self) -> int:
        """Questions that have an answer, of those that are counted."""
        return len(self._known if self._keys is None else self._known.keys() & set(self._keys))

    def given(self, question: Question) -> Answer | None:
        """The answer to a question, if there is one."""
        return self._known.get(question.key)

    @property
    def is_looked_at(self) -> bool:
        """Whether a page has asked for the state lately."""
        return time.monotonic() - self._seen_at < _AWAY_S

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each; waits as long as that takes.

        TrialError if it is withdrawn meanwhile, RunError when nobody is asked any more.
        """
        with self._changed:
            known = {q.key: self._known[q.key] for q in questions if q.key in self._known}
            now = self._round = _Round(questions, known)
            self._tell()
            was_away = False
            while now.open or (now.given and time.monotonic() < now.ended_at + self._undo_s):
                is_away = now.open is not None and not self.is_looked_at
                if is_away and not was_away:
                    self.away()
                was_away = is_away
                if now.is_withdrawn or self._is_over:
                    self._round = _Round()
                    self._tell()
                    if self._is_over:
                        raise RunError(
                            "nobody answers any more; what was answered is kept, and the same command "
                            "goes on"
                        )
                    raise TrialError("the question was withdrawn")
                # In short steps, as a signal is heard between them only.
                self._changed.wait(_PAUSE_S)
            self._round = _Round()
            self._tell()
            return [now.answers[q.key] for q in questions]

    def answer(self, key: str, answer: object) -> bool:
        """Take an answer to the question that is asked; False for any other, or for no answer."""
        with self._changed:
            asked = self._round.open
            if asked is None or asked.key != key or not asked.takes(answer):
                return False
            found: Answer = answer  # type: ignore[assignment]
            self._note(
                {
                    "key": key,
                    "answer": found,
                    "pictures": [self._kept(picture) for picture in asked.pictures],
                    "prompt": asked.prompt,
                    "seed": asked.seed,
                }
            )
            self._known[key] = self._round.answers[key] = found
            self._round.given.append(key)
            self._round.ended_at = time.monotonic()
            self._tell()
            return True

    def undo(self) -> bool:
        """Take the last answer back; False if there is none that can be."""
        with self._changed:
            if not self._round.given:
                return False
            key = self._round.given.pop()
            self._note({"key": key, "undone": True})
            del self._known[key], self._round.answers[key]
            self._tell()
            return True

    def state(self, known: int = -1, timeout_s: float = 0.0) -> Mapping[str, Any]:
        """What there is to see, when it is not of the version `known` any more."""
        end = time.monotonic() + timeout_s
        with self._changed:
            while self._version == known and (left := end - time.monotonic()) > 0:
                self._seen_at = time.monotonic()
                self._changed.wait(min(left, 1.0))
            self._seen_at = time.monotonic()
            asked = self._round.open
            shown = None
            if asked:
                shown = {
                    "key": asked.key,
                    "pictures": len(asked.pictures),
                    "prompt": asked.prompt,
                    "negative_prompt": asked.negative_prompt,
                    "seed": asked.seed,
                    "about": asked.about,
                }
            return {
                "version": self._version,
                "question": shown,
                "answered": self.n_answered,
                "total": self.total,
                "undo": bool(self._round.given),
                "over": self._is_over,
            }

    def picture(self, key: str, number: int) -> bytes | None:
        """A picture of the questions that are asked."""
        with self._changed:
            for question in self._round.questions:
                if question.key == key and 0 <= number < len(question.pictures):
                    return question.pictures[number]
        return None

    def withdraw(self) -> None:
        """Have what is asked now fail."""
        with self._changed:
            self._round.is_withdrawn = True
            self._changed.notify_all()

    def close(self) -> None:
        """Ask nobody any more."""
        with self._changed:
            self._is_over = True
            self._tell()
            self._file.close()

    def _kept(self, picture: bytes) -> str:
        """The name of the picture's file, which is there afterwards."""
        path = self._pictures / f"{hashlib.sha256(picture).hexdigest()[:16]}.png"
        if not path.exists():
            with whole_file(path) as file:
                file.write(picture)
        return path.name

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _note(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({**line, "time": round(time.time(), 1)}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def answers(journal: Path) -> dict[str, Mapping[str, Any]]:
    """The lines of a journal that stand, by the key of their question; nothing where there is none.

    What was undone does not stand, nor does a line that a killed process has not finished. OSError.
    """
    found: dict[str, Mapping[str, Any]] = {}
    if not journal.exists():
        return found
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            told = json.loads(line)
            key, answer = str(told["key"]), told.get("answer")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        if told.get("undone"):
            found.pop(key, None)
        elif answer in CHOICES or is_mark(answer):
            found[key] = told
    return found
