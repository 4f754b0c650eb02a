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

    def check(
        self,
        prompts: Sequence[Prompt],
        architecture: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[str]:
        """Warnings about the run; ConfigError for what this back end cannot make or load.

        `shapes` are those of the merges' tensors by name. Costs no time on the device.
        """
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
