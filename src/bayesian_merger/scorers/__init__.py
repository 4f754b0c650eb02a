"""Scorers: samples -> one float each, higher is better.

A scorer is a class with the `scorer` decorator. Its constructor's parameters are its options in
the configuration; learnt parts and heavy libraries are loaded there, never at import.
A scorer that can be differentiated also has `differentiable(pixels, prompts)`: pixels of shape
(N, 3, height, width) in [0, 1] and N prompts -> tensor of N scores with gradients to the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from bayesian_merger.data import Sample
from bayesian_merger.registry import Registry


class Scorer(Protocol):
    """What the loop needs of a scorer."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One finite score for each sample, higher is better. TrialError if it cannot tell."""
        ...


scorer: Registry[Callable[..., Scorer]] = Registry("scorer", "bayesian_merger.scorers")
