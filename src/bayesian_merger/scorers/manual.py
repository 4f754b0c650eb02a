"""The best scorer of all: the user's own eye."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from bayesian_merger.data import Sample
from bayesian_merger.desk import Desk, Question
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.infotext import png
from bayesian_merger.scorers import About, scorer


@scorer
class Manual:
    """Your own marks, from 0 to 10, for pictures as they come: on a web page, or in the terminal.

    Each mark is kept at once, in ratings.jsonl of the run folder. A mark may be undone until `undo_s`
    seconds after the last of the pictures that were made at once. What you skip has no score.
    """

    about = About("0 to 10", "image and prompt", needs="you")

    def __init__(self, undo_s: float = 3.0) -> None:
        if not 0 <= undo_s <= 600:
            raise ConfigError(f"scorers.manual.undo_s is {undo_s}; give seconds from 0 to 600")
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
        if not samples:
            return []
        if self._desk is None:
            raise TrialError("you are asked in a run only; rate the pictures of another by `rate`")
        answers = self._desk.ask([_question(sample) for sample in samples])
        return [None if answer == "skip" else float(answer) for answer in answers]


def _question(sample: Sample) -> Question:
    """A mark for a picture; the same picture of the same prompt is not asked for again."""
    prompt = sample.prompt
    told = f"{prompt.prompt}\n{prompt.negative_prompt}\n{prompt.seed}".encode()
    key = hashlib.sha256(sample.image.tobytes() + told).hexdigest()[:16]
    size = f"{sample.image.width} x {sample.image.height}"
    return Question(
        key,
        (png(sample),),
        prompt.prompt,
        prompt.seed,
        prompt.negative_prompt,
        f"payload {prompt.payload} \N{MIDDLE DOT} {size}",
    )
