"""Back ends: what turns a merge and prompts into images.

A back end is a class with the `backend` decorator. Its constructor's parameters are its options in
the configuration (what follows a `*` is for tests); heavy libraries are imported there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from bayesian_merger.checkpoint import Layout
from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.registry import Registry

Judge = Callable[[Tensor, Sequence[Prompt]], Tensor]
"""Pixels (N, 3, height, width) in [0, 1] and N prompts -> N scores, with gradients to the pixels."""

Key = tuple[str, str]
"""A weight of the method ("alpha") and the block, or part of one, that has it ("IN00")."""


class Followed(NamedTuple):
    """Images, and the derivative of their mean score by each weight; `fault` is why there is none."""

    samples: Sequence[Sample]
    slopes: Mapping[Key, float]
    fault: str = ""


class Merge(Mapping[str, Tensor]):
    """A merge as a back end gets it: tensors by name, each computed when it is read."""

    @property
    @abstractmethod
    def layout(self) -> Mapping[str, Layout]:
        """Shape and type of each tensor."""

    @abstractmethod
    def moved_by(self, name: str) -> Sequence[Key]:
        """The weights that a tensor follows."""

    @abstractmethod
    def slopes(self, name: str, gradient: Tensor) -> Mapping[Key, float]:
        """The derivative of a score by each of them, from its gradient by the tensor."""

    @abstractmethod
    def write_file(self, path: Path) -> None:
        """Write the merge as a checkpoint, which appears whole.

        CheckpointError if the disk cannot hold it, TrialError if a tensor is not finite.
        """

    def write(self, targets: Mapping[str, Tensor], since: Merge | None = None) -> int:
        """Write tensors into `targets` (by name; of any type and device); how many were written.

        `since` is the merge that `targets` hold: what both make alike may be left as it is. After
        an error `targets` are to be written anew.
        """
        for name, target in targets.items():
            target.copy_(self[name].reshape(target.shape))
        return len(targets)

    def spare_memory(self) -> bool:
        """Keep nothing on the device from now on that can be read again; False if nothing was kept."""
        return False


class Backend(Protocol):
    """What the loop needs of a back end.

    One whose images are made elsewhere may have `is_remote = True`: its images are scored while it makes
    the next.
    """

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
        """One sample for each prompt. TrialError if an image cannot be made.

        In order, or if it is remote, as they come.
        """
        ...

    def close(self) -> None:
        """Give back memory and connections."""
        ...


@runtime_checkable
class Particular(Protocol):
    """A back end that cannot load every merge."""

    def require(self, recipe: Recipe, merged: Merge) -> None:
        """ConfigError for a merge that it cannot load; asked before the run."""
        ...


@runtime_checkable
class Exclusive(Protocol):
    """A back end that one run has at a time."""

    def take(self) -> None:
        """Have it, till it is closed; ConfigError if another run has it. Asked before all else."""
        ...


@runtime_checkable
class Patient(Protocol):
    """A back end that waits for a server which is away."""

    def give_up(self) -> None:
        """From now on, wait no more; may be called by another thread than the one that waits."""
        ...


@runtime_checkable
class Differentiable(Protocol):
    """A back end whose images can have a graph behind them, back to the weights of the merge."""

    def follow(
        self, prompts: Sequence[Prompt], judge: Judge, wanted: Set[Key], last: int | None
    ) -> Iterator[Followed]:
        """The images that `generate` makes, in pieces, each with the slopes of its mean score.

        Slopes are by the weights `wanted`, through the `last` calls of the denoising network, None
        for all; what is before these counts as given. TrialError where no image's slopes can be had.
        """
        ...


backend: Registry[Callable[..., Backend]] = Registry("back end", "bayesian_merger.backends")
