"""Scorers: samples -> one float each, higher is better.

A scorer is a class with the `scorer` decorator. Its constructor's parameters are its options in
the configuration; learnt parts and heavy libraries are loaded there, never at import.
One that can be differentiated has `differentiable` as well, and a search may follow its gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from bayesian_merger.data import Sample
from bayesian_merger.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from bayesian_merger.desk import Desk


Precision = Literal["fp32", "fp16", "bf16"]
"""In which numbers a network computes; fp16 and bf16 take half the memory."""

_RESTRICTING = ("AGPL", "-NC", "Noncommercial", "OpenRAIL")


@dataclass(frozen=True)
class About:
    """What a list of scorers tells of one, as its attribute `about`.

    `range` is that of its scores in words, `sees` what it judges by, `licence` that of its weights, and
    `needs` what must be installed or is downloaded.
    """

    range: str
    sees: Literal["image", "image and prompt"] = "image"
    licence: str = ""
    needs: str = ""

    @property
    def restricts(self) -> bool:
        """Whether the licence forbids some uses, as of what is sold."""
        return any(mark in self.licence for mark in _RESTRICTING)


class Scorer(Protocol):
    """What the loop needs of a scorer."""

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        """One finite score for each sample, higher is better, or None for a sample that it leaves out.

        TrialError if it cannot tell.
        """
        ...


@runtime_checkable
class DifferentiableScorer(Scorer, Protocol):
    """A scorer whose scores have gradients to the pixels."""

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """One score each for `pixels` (N, 3, height, width) in [0, 1], the same as of the images.

        The pixels may be on another device than the scorer.
        """
        ...


@runtime_checkable
class Attended(Scorer, Protocol):
    """A scorer that asks a person, in a run only."""

    def attend(self, folder: Path, images: int) -> Desk:
        """Begin to ask, at this desk; answers lie in `folder`, and about so many `images` will come."""
        ...

    def withdraw(self) -> None:
        """Have what is asked now fail: nobody waits for it any more."""
        ...

    def leave(self) -> None:
        """Ask nothing more."""
        ...


@runtime_checkable
class Comparing(Scorer, Protocol):
    """A scorer that can choose between two pictures, and does so in place of scores if it `compares`."""

    compares: bool

    def compare(
        self, samples: Sequence[Sample], others: Sequence[Sample]
    ) -> Sequence[float | None]:
        """The share of each sample in the choice between it and the other of its prompt and seed.

        1 if it is better, 0 if the other is, 0.5 if they are alike, None for no choice.
        """
        ...


scorer: Registry[Callable[..., Scorer]] = Registry(
    "scorer", "bayesian_merger.scorers", ("scorer", "weight", "payloads")
)


# Emphasis as webuis write it, (word:1.2) and [word], and commands: <lora:name:1>, BREAK, AND.
_COMMANDS = re.compile(r"<[a-z]+:[^<>]*>|\b(?:BREAK|AND)\b")
_SHARES = re.compile(r":\s*[\d.]+\s*(?=[)\]])")
_BRACKETS = re.compile(r"(?<!\\)[()\[\]]|\\(?=[()\[\]])")


def plain_words(prompt: str) -> str:
    """A prompt without the marks of webuis, which are not in the captions that models learnt from."""
    text = _BRACKETS.sub("", _SHARES.sub("", _COMMANDS.sub(" ", prompt)))
    return re.sub(r"\s*,(?:\s*,)+", ",", re.sub(r"\s+", " ", text)).strip(" ,")
