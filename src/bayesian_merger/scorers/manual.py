"""The best scorer of all: the user's own eye."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from bayesian_merger.data import Sample
from bayesian_merger.desk import SHARES, Answer, Desk, Question
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.infotext import png
from bayesian_merger.scorers import About, scorer


@scorer
class Manual:
    """Your own eye, on a web page or in the terminal: it asks for "marks" or for choices in "pairs".

    A mark from 0 to 10 for each picture as it comes, or which of two is better: it or the best so far
    of its prompt and seed. Each answer is kept at once, in ratings.jsonl of the run folder, and may be
    undone until `undo_s` seconds after the last of the pictures that were made at once. What you skip
    has no score.
    """

    about = About("0 to 10, or pairs", "image and prompt", needs="you")

    def __init__(self, ask: Literal["marks", "pairs"] = "marks", undo_s: float = 3.0) -> None:
        if not 0 <= undo_s <= 600:
            raise ConfigError(f"scorers.manual.undo_s is {undo_s}; give seconds from 0 to 600")
        self.compares = ask == "pairs"
        self._undo_s = undo_s
        self._desk: Desk | None = None

    def attend(self, folder: Path, images: int) -> Desk:
        """Begin to ask, at this desk."""
        self._desk = Desk(folder, self._undo_s, images)
        return self._desk

    def withdraw(self) -> None:
        """Have what is asked now fail."""
        if self._desk:
            self._desk.withdraw()

    def leave(self) -> None:
        """Ask nothing more."""
        if self._desk:
            self._desk.close()
        self._desk = None

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        answers = self._asked([_question(sample) for sample in samples])
        return [None if answer == "skip" else float(answer) for answer in answers]

    def compare(self, samples: Sequence[Sample], others: Sequence[Sample]) -> list[float | None]:
        questions, on_left = [], []
        for sample, other in zip(samples, others, strict=True):
            # What is shown, and on which side, depends on the pictures alone: who asks for the same two
            # again, perhaps the other way about, is given the same answer.
            pair = sorted((sample, other), key=lambda one: one.image.tobytes())
            question = _question(*pair)
            if int(question.key, 16) % 2:
                pair = pair[::-1]
                question = replace(question, pictures=question.pictures[::-1])
            questions.append(question)
            on_left.append(pair[0] is sample)
        shares = [SHARES.get(str(answer)) for answer in self._asked(questions)]
        return [
            share if share is None or is_left else 1.0 - share
            for share, is_left in zip(shares, on_left, strict=True)
        ]

    def _asked(self, questions: Sequence[Question]) -> list[Answer]:
        if not questions:
            return []
        if self._desk is None:
            raise TrialError("you are asked in a run only; rate the pictures of another by `rate`")
        return self._desk.ask(questions)


def _question(*samples: Sample) -> Question:
    """A mark for a picture, or a choice of two; what was answered is not asked again."""
    prompt = samples[0].prompt
    told = f"{prompt.prompt}\n{prompt.negative_prompt}\n{prompt.seed}"
    pixels = [hashlib.sha256(sample.image.tobytes()).hexdigest() for sample in samples]
    key = hashlib.sha256("\n".join([*pixels, told]).encode()).hexdigest()[:16]
    size = f"{samples[0].image.width} x {samples[0].image.height}"
    return Question(
        key,
        tuple(png(sample) for sample in samples),
        prompt.prompt,
        prompt.seed,
        prompt.negative_prompt,
        f"payload {prompt.payload} \N{MIDDLE DOT} {size}",
    )
