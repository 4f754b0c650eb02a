"""A recipe and models -> tensors, one at a time; owns device, precision and missing tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayesian_merger import methods
from bayesian_merger.blocks import ARCHITECTURES, Architecture, Place, detect
from bayesian_merger.checkpoint import PRECISIONS, Checkpoint, Layout, require_space, write
from bayesian_merger.data import Model, Recipe
from bayesian_merger.errors import CheckpointError, ConfigError, TrialError

_NAMES = "ABC"
_CPU = torch.device("cpu")
_LEVEL = ".text_model."


class Merger:
    """Models that fit together, open to be merged again and again.

    `models` are A, B and, for methods of three, C. A's tensors decide the result's: a tensor that
    another model lacks stays A's, one that only another model has is left out.
    """

    def __init__(self, models: Sequence[Checkpoint], device: torch.device = _CPU) -> None:
        """CheckpointError if the models are of different architectures or shapes, or share no block."""
        self.models = tuple(models)
        self.device = device
        found: list[Architecture] = []
        for letter, model in zip(_NAMES, self.models, strict=False):
            try:
                architecture = detect(model.layout)
                architecture.places(model.layout)
            except CheckpointError as error:
                raise CheckpointError(f"model {letter}, {model.name}: {error}") from None
            if found and architecture is not found[0]:
                raise CheckpointError(
                    f"model {letter}, {model.name}, is {architecture.title}, but model A, "
                    f"{self.models[0].name}, is {found[0].title}; only models of one architecture merge"
                )
            found.append(architecture)
        self.architecture = found[0]
        self.places: Mapping[str, Place] = self.architecture.places(self.models[0].layout)
        # Each model under A's names of its tensors.
        self.aligned = tuple(_Aligned(model, self.models[0].layout) for model in self.models)
        self.notes: list[str] = []
        for letter, other in zip(_NAMES[1:], self.aligned[1:], strict=False):
            _require_same_shapes(self.models[0], other, letter)
            self._require_blocks(other, letter)

    def _require_blocks(self, other: _Aligned, letter: str) -> None:
        """CheckpointError if A and `other` share no tensor of some block."""
        a = self.models[0]
        searched = {n: p.block for n, p in self.places.items() if p.component in ("unet", "te")}
        shared = {
            block
            for name, block in searched.items()
            if name in other.layout
            and a.layout[name].dtype.is_floating_point
            and other.layout[name].dtype.is_floating_point
        }
        empty = [block for block in self.architecture.blocks if block not in shared]
        if empty:
            raise CheckpointError(
                f"model {letter}, {other.name}: shares no tensor of block {empty[0]} with model A; "
                f"its names or types differ, so save both by the same tool"
            )
        missing = [name for name in searched if name not in other.layout]
        if missing:
            self.notes.append(
                f"model {letter}, {other.name}, lacks {len(missing)} of A's tensors, which stay A's "
                f"(first: {missing[0]})"
            )

    @property
    def has_vae_of_b(self) -> bool:
        """Whether B holds every tensor of A's VAE."""
        vae = [name for name, place in self.places.items() if place.component == "vae"]
        return all(name in self.aligned[1].layout for name in vae)

    def references(self) -> tuple[Model, ...]:
        """The models as a recipe names them; reads each file once for its SHA-256."""
        return tuple(Model(m.name, m.sha256, m.path.resolve()) for m in self.models)

    def merge(self, recipe: Recipe) -> Merged:
        """The merge that `recipe` describes; each tensor is computed when it is read."""
        method = methods.method.get(recipe.method)
        if methods.n_models(method) > len(self.models):
            raise ConfigError(
                f"{recipe.method} merges {methods.n_models(method)} models, "
                f"but {len(self.models)} are given"
            )
        return Merged(self, method, recipe)


class _Aligned:
    """A checkpoint read by the names that model A has for its tensors.

    Old checkpoints, NovelAI's among them, lack the level "text_model" in the text encoder's names.
    """

    def __init__(self, checkpoint: Checkpoint, wanted: Iterable[str]) -> None:
        self._checkpoint = checkpoint
        self.name = checkpoint.name
        self._own = {}
        for name in wanted:
            longer = name.replace(".transformer.", f".transformer{_LEVEL}")
            spellings = (name, name.replace(_LEVEL, "."), longer)
            own = next((s for s in spellings if s in checkpoint.layout), None)
            if own is not None:
                self._own[name] = own
        self.layout = {name: checkpoint.layout[own] for name, own in self._own.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint[self._own[name]]


class Merged(Mapping[str, Tensor]):
    """The tensors of one merge by name, in A's order; a tensor is computed each time it is read."""

    def __init__(self, merger: Merger, method: methods.Method, recipe: Recipe) -> None:
        self.recipe = recipe
        self.places = merger.places
        self._method = method
        self._models = merger.aligned[: methods.n_models(method)]
        self._device = merger.device
        self._dtype = PRECISIONS[recipe.precision]
        self.layout: Mapping[str, Layout] = {
            name: self._result_layout(name) for name in self._models[0].layout
        }

    def __len__(self) -> int:
        return len(self.layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __getitem__(self, name: str) -> Tensor:
        """The merged tensor; TrialError if it is not finite."""
        if _is_position_ids(name):
            # Averages and half precision corrupt these counters, so they are made anew.
            entry = self.layout[name]
            return torch.arange(entry.shape[-1]).expand(entry.shape).clone()
        if not self._is_merged(name):
            source = self._models[1] if self._copies_from_b(name) else self._models[0]
            return source[name]
        block = self.places[name].block
        if block == "vae":
            block = "base"
        weights = {weight: values[block] for weight, values in self.recipe.weights.items()}
        inputs = [m[name].to(self._device, torch.float32) for m in self._models]
        merged = self._method(*inputs, **weights).to(self._dtype)
        if merged.shape != inputs[0].shape:
            raise TrialError(
                f"{self.recipe.method} made shape {list(merged.shape)} of {list(inputs[0].shape)} "
                f"for tensor {name!r}"
            )
        if not bool(torch.isfinite(merged).all()):
            raise TrialError(self._not_finite(name, inputs))
        return merged

    def save(self, path: Path) -> None:
        """Write the merge as a checkpoint with the recipe in its metadata, and check what was written.

        CheckpointError if the disk is too small or a tensor is not finite; nothing is left then.
        """
        recipe = json.dumps(self.recipe.to_dict(), sort_keys=True)
        try:
            write(path, self.layout, self.__getitem__, {"format": "pt", "merge_recipe": recipe})
        except TrialError as error:
            raise CheckpointError(f"{path.name} was not written: {error}") from error
        if Checkpoint(path).layout != self.layout:
            raise CheckpointError(
                f"{path}: the file on the disk is not what was written; save again"
            )

    def require_space(self, path: Path) -> None:
        """CheckpointError if `path` has no room for the merge."""
        require_space(path, sum(entry.n_bytes for entry in self.layout.values()))

    def _is_merged(self, name: str) -> bool:
        component = self.places[name].component
        wanted = component in ("unet", "te") or (component == "vae" and self.recipe.vae == "base")
        floating = all(
            name in m.layout and m.layout[name].dtype.is_floating_point for m in self._models
        )
        return wanted and floating

    def _copies_from_b(self, name: str) -> bool:
        is_vae = self.places[name].component == "vae"
        return is_vae and self.recipe.vae == "b" and name in self._models[1].layout

    def _result_layout(self, name: str) -> Layout:
        if _is_position_ids(name):
            return Layout(self._models[0].layout[name].shape, torch.int64)
        if self._is_merged(name):
            return Layout(self._models[0].layout[name].shape, self._dtype)
        source = self._models[1] if self._copies_from_b(name) else self._models[0]
        return source.layout[name]

    def _not_finite(self, name: str, inputs: Sequence[Tensor]) -> str:
        for letter, model, tensor in zip(_NAMES, self._models, inputs, strict=False):
            if not bool(torch.isfinite(tensor).all()):
                return f"tensor {name!r} of model {letter}, {model.name}, holds NaN or infinity"
        return (
            f"tensor {name!r} is not finite after the merge in {self.recipe.precision}; "
            f"try precision fp32 or weights nearer to [0, 1]"
        )


def even_weights(
    method: str, architecture: Architecture, value: float
) -> dict[str, dict[str, float]]:
    """Every weight of `method` at `value` in every block."""
    return {
        weight: dict.fromkeys(architecture.blocks, value)
        for weight in methods.weights(methods.method.get(method))
    }


def check_recipe(recipe: Recipe) -> None:
    """ConfigError in one line if `recipe` cannot describe a merge."""
    method = methods.method.get(recipe.method)
    if recipe.architecture not in ARCHITECTURES:
        raise ConfigError(f"recipe: unknown architecture {recipe.architecture!r}")
    if recipe.precision not in PRECISIONS:
        raise ConfigError(
            f"recipe: unknown precision {recipe.precision!r} (known: {', '.join(PRECISIONS)})"
        )
    if recipe.vae not in ("a", "b", "base"):
        raise ConfigError(f"recipe: unknown vae {recipe.vae!r} (known: a, b, base)")
    if len(recipe.models) < methods.n_models(method):
        raise ConfigError(
            f"recipe: {recipe.method} merges {methods.n_models(method)} models, "
            f"but {len(recipe.models)} are named"
        )
    blocks = ARCHITECTURES[recipe.architecture].blocks
    for weight in methods.weights(method):
        given = recipe.weights.get(weight, {})
        missing = [block for block in blocks if block not in given]
        if missing:
            raise ConfigError(f"recipe: no {weight} for block {missing[0]}")
    for weight, given in recipe.weights.items():
        if weight not in methods.weights(method):
            raise ConfigError(f"recipe: {recipe.method} has no weight {weight!r}")
        for block, value in given.items():
            if block not in blocks:
                raise ConfigError(f"recipe: {recipe.architecture} has no block {block!r}")
            if not math.isfinite(value):
                raise ConfigError(f"recipe: {weight} of block {block} is {value}")


def _is_position_ids(name: str) -> bool:
    return name.endswith(".position_ids")


def _require_same_shapes(a: Checkpoint, other: _Aligned, letter: str) -> None:
    different = [
        n for n in a.layout if n in other.layout and a.layout[n].shape != other.layout[n].shape
    ]
    if different:
        name = different[0]
        raise CheckpointError(
            f"model {letter}, {other.name}: {len(different)} tensors have another shape than in model A "
            f"(first: {name!r}, {list(other.layout[name].shape)} against {list(a.layout[name].shape)}); "
            f"is one of them an inpainting model?"
        )
