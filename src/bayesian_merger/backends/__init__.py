"""Back ends: what turns a merge and prompts into images.

A back end is a class with the `backend` decorator. Its constructor's parameters are its options in
the configuration (what follows a `*` is for tests); heavy libraries are imported there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.registry import Registry


class Backend(Protocol):
    """What the loop needs of a back end."""

    batch: int
    """Images made at once; a panel is always cut at the same places, so that it repeats exactly."""

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        """Warnings about `prompts`; ConfigError for what this back end cannot make."""
        ...

    def load(self, recipe: Recipe, merged: Mapping[str, Tensor]) -> None:
        """Make `merged` the live model and prove that it is; TrialError if it is not."""
        ...

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        """One sample for each prompt, in order. TrialError if an image cannot be made."""
        ...

    def close(self) -> None:
        """Give back memory and connections."""
        ...


backend: Registry[Callable[..., Backend]] = Registry("back end", "bayesian_merger.backends")
