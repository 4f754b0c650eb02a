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


class Merge(Mapping[str, Tensor]):
    """A merge as a back end gets it: tensors by name, each computed when it is read."""

    def write(self, targets: Mapping[str, Tensor], since: Merge | None = None) -> int:
        """Write tensors into `targets` (by name; of any type and device); how many were written.

        `since` is the merge that `targets` hold: what both make alike may be left as it is. After
        an error `targets` are to be written anew.
        """
        for name, target in targets.items():
            target.copy_(self[name].reshape(target.shape))
        return len(targets)


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

    def load(self, recipe: Recipe, merged: Merge) -> None:
        """Make `merged` the live model and prove that it is; TrialError if it is not."""
        ...

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        """One sample for each prompt, in order. TrialError if an image cannot be made."""
        ...

    def close(self) -> None:
        """Give back memory and connections."""
        ...


backend: Registry[Callable[..., Backend]] = Registry("back end", "bayesian_merger.backends")
