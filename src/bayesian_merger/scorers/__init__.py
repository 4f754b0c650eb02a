"""Scorers: samples -> one float each, higher is better.

A scorer is a class with the `scorer` decorator. Its constructor's parameters are its options in
the configuration; learnt parts and heavy libraries are loaded there, never at import.
One that can be differentiated has `differentiable` as well, and a search may follow its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from bayesian_merger.data import Sample
from bayesian_merger.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


class Scorer(Protocol):
    """What the loop needs of a scorer."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One finite score for each sample, higher is better. TrialError if it cannot tell."""
        ...


@runtime_checkable
class DifferentiableScorer(Scorer, Protocol):
    """A scorer whose scores have gradients to the pixels."""

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """One score each for `pixels` (N, 3, height, width) in [0, 1], the same as of the images.

        The pixels may be on another device than the scorer.
        """
        ...


scorer: Registry[Callable[..., Scorer]] = Registry("scorer", "bayesian_merger.scorers")
