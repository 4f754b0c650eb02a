"""A recipe and models -> tensors; owns device, precision and missing tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bayesian_merger import metadata, methods
from bayesian_merger.backends import Merge
from bayesian_merger.blocks import ARCHITECTURES, Architecture, Place, detect, prefix_of
from bayesian_merger.checkpoint import PRECISIONS, Checkpoint, Layout, require_space, write
from bayesian_merger.data import Model, Recipe
from bayesian_merger.errors import (
    CheckpointError,
    ConfigError,
    GradientError,
    MergerError,
    TrialError,
    first_line,
)
from bayesian_merger.folders import Folder
from bayesian_merger.kernels import Sum, combine, stays_finite
from bayesian_merger.lora import Lora, is_lora

_CPU = torch.device("cpu")
_LEVEL = ".text_model."
# Values of a tensor merged at once where the method allows it; no more than one of `kernels`' pieces.
_PIECE = 1 << 22


Source: TypeAlias = Checkpoint | Folder
"""A model's file or folder."""


def open_model(path: Path) -> Source:
    """The checkpoint at `path`, a file or a folder of diffusers; CheckpointError if it is neither."""
    return Folder(path) if path.is_dir() else Checkpoint(path)


class Merger:
    """Models that fit together, open to be merged again and again.

    `models` are A, B, C and so on, as many as the method takes. A's tensors decide the result's: a
    tensor that another model lacks stays A's, one that only another model has is left out. A LoRA
    stands for model A with the LoRA applied in full. `blocks` and `parts` are those in which the
    models can be merged at all.
    """

    def __init__(self, models: Sequence[Source], device: torch.device = _CPU) -> None:
        """CheckpointError if the models are of different architectures or shapes, or share no block."""
        _require_letters(len(models))
        self.models = tuple(models)
        self.device = device
        first = self.models[0]
        self.architecture = _detected(first, "A")
        self.places: Mapping[str, Place] = {
            name: place
            for name, place in self.architecture.places(first.layout).items()
            # The averages of A's training are not those of the merge.
            if not name.startswith("model_ema.")
        }
        self.notes: list[str] = []
        self._mergeable: dict[int, Set[str]] = {}
        self._known_finite: set[tuple[int, str]] = set()
        self._first = _Aligned(first, self.places, device)
        others = zip(ascii_uppercase[1:], self.models[1:], strict=False)
        # Every model under A's names of its tensors.
        self.aligned = (self._first, *(self._fitted(model, letter) for letter, model in others))
        predictions = [(m.name, metadata.prediction(m.layout, m.metadata)) for m in self.models]
        if warning := metadata.disagreement(predictions):
            self.notes.append(warning)
        changed = [self.places[name] for name in self.mergeable(len(self.models))]
        self.blocks = tuple(
            block
            for block in self.architecture.blocks
            if any(p.block == block and p.component != "vae" for p in changed)
        )
        self.parts = tuple(
            part for part in self.architecture.parts if any(p.part == part for p in changed)
        )

    @property
    def has_vae_of_b(self) -> bool:
        """Whether there is a B that holds every tensor of A's VAE."""
        return all(name in other.layout for other in self.aligned[1:2] for name in self._vae)

    @cached_property
    def has_other_vae_in_b(self) -> bool:
        """Whether there is a B that holds every tensor of A's VAE, but not all as they are in A."""
        return self.has_vae_of_b and any(
            not torch.equal(self._first.read(name).float(), other.read(name).float())
            for other in self.aligned[1:2]
            for name in self._vae
        )

    @property
    def _vae(self) -> list[str]:
        return [name for name, place in self.places.items() if place.component == "vae"]

    def require_different(self, *, by_content: bool = True) -> None:
        """ConfigError if two of the models are the same file, by its content or only by its place."""
        if by_content:
            self.references()  # reads all files at once
        seen: dict[str, str] = {}
        for letter, model in zip(ascii_uppercase, self.models, strict=False):
            mark = model.sha256 if by_content else str(model.path.resolve())
            if mark in seen:
                raise ConfigError(
                    f"models {seen[mark]} and {letter} are the same file ({model.name})"
                )
            seen[mark] = letter

    def references(self) -> tuple[Model, ...]:
        """The models as a recipe names them; reads each file once for its SHA-256."""
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda model: model.sha256, self.models)
            return tuple(
                Model(model.name, digest, model.path.resolve())
                for model, digest in zip(self.models, digests, strict=True)
            )

    def merge(self, recipe: Recipe) -> Merged:
        """The merge that `recipe` describes; each tensor is computed when it is read.

        ConfigError if the recipe does not fit these models.
        """
        return Merged(self, recipe)

    def require_unchanged(self) -> None:
        """CheckpointError if a model's file is no longer what was opened."""
        for model in self.models:
            model.require_unchanged()

    def finite(self, number: int, name: str) -> Tensor:
        """A model's tensor as it is; TrialError if it is one of the network with NaN or infinity."""
        tensor = self.aligned[number].read(name)
        is_new = (number, name) not in self._known_finite
        # A schedule may well end in infinity.
        if is_new and tensor.is_floating_point() and self.places[name].component != "other":
            whole = tensor if tensor.element_size() > 1 else tensor.float()
            if not stays_finite(whole, whole.dtype):
                raise TrialError(_says_not_finite(name, number, self.models[number].name))
            self._known_finite.add((number, name))
        return tensor

    def _fitted(self, model: Source, letter: str) -> _Aligned | _Applied:
        """A model other than A under A's names; CheckpointError if it does not fit."""
        if isinstance(model, Checkpoint) and is_lora(model.layout):
            try:
                lora = Lora(model, self._first.layout, self.architecture.name)
            except CheckpointError as error:
                raise CheckpointError(f"model {letter}, {error}") from None
            self.notes += lora.notes
            return _Applied(lora, self._first)
        found = _detected(model, letter)
        if found is not self.architecture:
            raise CheckpointError(
                f"model {letter}, {model.name}, is {found.title}, but model A, "
                f"{self.models[0].name}, is {self.architecture.title}; "
                f"only models of one architecture merge"
            )
        other = _Aligned(model, self.places, self.device)
        self._require_same_shapes(other, letter)
        self._require_blocks(other, letter)
        return other

    def _require_same_shapes(self, other: _Aligned, letter: str) -> None:
        """CheckpointError if shapes differ, but for the first layer's input channels."""
        ours = self._first.layout
        different = [
            n for n in ours if n in other.layout and ours[n].shape != other.layout[n].shape
        ]
        first = prefix_of(self.places) + self.architecture.first_layer
        if first in different and _is_alike_but_for_channels(ours[first], other.layout[first]):
            different.remove(first)
            described = self.architecture.variant(other.layout[first].shape[1])
            own = self.architecture.variant(ours[first].shape[1])
            self.notes.append(
                f"model {letter}, {other.name}, is {described} and model A {own}: the channels that "
                f"both have are merged, and the result is what A is"
            )
        if different:
            name = different[0]
            raise CheckpointError(
                f"model {letter}, {other.name}: {len(different)} tensors have another shape than in "
                f"model A (first: {name!r}, {list(other.layout[name].shape)} against "
                f"{list(ours[name].shape)}); is it another version of the architecture?"
            )

    def _require_blocks(self, other: _Aligned, letter: str) -> None:
        """CheckpointError if A and `other` share nothing of a block that both should have."""
        searched = {n: p for n, p in self.places.items() if p.component in ("unet", "te")}
        missing = [name for name in searched if name not in other.layout]
        shared = {
            searched[name].block for name in searched if _is_floating(name, self._first, other)
        }
        wanted = set(self.architecture.blocks_in(other.checkpoint.layout))
        empty = [
            block
            for block in self.architecture.blocks_in(self.places)
            if block in wanted and block not in shared
        ]
        if empty:
            raise CheckpointError(
                f"model {letter}, {other.name}: shares no tensor of block {empty[0]} with model A; "
                f"its names or types differ, so save both by the same tool"
            )
        if missing:
            self.notes.append(
                f"model {letter}, {other.name}, lacks {len(missing)} of A's tensors, which stay A's "
                f"(first: {missing[0]})"
            )

    def mergeable(self, n_models: int) -> Set[str]:
        """The tensors of numbers that the first `n_models` hold, and that one has other than A."""
        if n_models not in self._mergeable:
            models = self.aligned[:n_models]
            self._mergeable[n_models] = {
                name
                for name, place in self.places.items()
                if place.component != "other"
                and not name.endswith(".position_ids")
                and _is_floating(name, *models)
                and any(name in other.changed for other in models[1:])
            }
        return self._mergeable[n_models]


class _Aligned:
    """A checkpoint read by the names that model A has for its tensors.

    Old checkpoints, NovelAI's among them, lack the level "text_model" in the text encoder's names;
    files of a U-Net alone may lack the prefix.
    """

    def __init__(
        self, checkpoint: Source, wanted: Mapping[str, Place], device: torch.device
    ) -> None:
        self.checkpoint = checkpoint
        self.name = checkpoint.name
        self._own: dict[str, str] = {}
        ours, theirs = prefix_of(wanted), prefix_of(checkpoint.layout)
        for name, place in wanted.items():
            if place.component == "unet":
                spellings = [theirs + name.removeprefix(ours)]
            else:
                longer = name.replace(".transformer.", f".transformer{_LEVEL}")
                spellings = [name, name.replace(_LEVEL, "."), longer]
            own = next((s for s in spellings if s in checkpoint.layout), None)
            if own is not None:
                self._own[name] = own
        self.layout = {name: checkpoint.layout[own] for name, own in self._own.items()}
        self.changed = self.layout.keys()
        self._device = device
        self._kept: dict[str, Tensor] = {}
        self._keeps = True

    def read(self, name: str) -> Tensor:
        """The tensor, which stays on the device while there is room."""
        if name in self._kept:
            if self._device.type == "cpu":  # where it is the file itself
                self.checkpoint.require_unchanged()
            return self._kept[name]
        tensor = self.checkpoint[self._own[name]].to(self._device)
        if self._keeps and self._has_room():
            self._kept[name] = tensor
        return tensor

    def keep_nothing(self) -> bool:
        """From now on; whether that is anything new."""
        did, self._keeps = self._keeps, False
        self._kept.clear()
        return did

    def _has_room(self) -> bool:
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return 3 * free > total
        # A file's tensors are the file itself, mapped: the system drops what it has no room for.
        # A folder's may be put together from several.
        return isinstance(self.checkpoint, Checkpoint)


class _Applied:
    """Model A with a LoRA applied in full, in float32; tensors without a part in it are A's."""

    def __init__(self, lora: Lora, first: _Aligned) -> None:
        self.name = lora.name
        self._lora, self._first = lora, first
        self.changed = set(lora.tensors)
        self.layout = {
            name: Layout(entry.shape, torch.float32) if name in self.changed else entry
            for name, entry in first.layout.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor; never kept, as in float32 it is twice as large as A's."""
        ours = self._first.read(name)
        if name not in self.changed:
            return ours
        return ours.float() + self._lora.delta(name, ours.device)


class _Way(NamedTuple):
    """How a tensor of the result is made: counted, copied from model number `source`, or merged.

    `of` is all that decides the merged values beside the models.
    """

    kind: Literal["count", "copy", "merge"]
    source: int = 0
    of: tuple[object, ...] = ()


class Merged(Merge):
    """The tensors of one merge by name, in A's order; a tensor is computed each time it is read.

    Tensors that are not finite are refused with a TrialError that names them.
    """

    def __init__(self, merger: Merger, recipe: Recipe) -> None:
        self.recipe = recipe
        self._method = methods.get(recipe.method)
        n_models = n_used(self._method, recipe.method, len(merger.models))
        self._merger = merger
        self._models = merger.aligned[:n_models]
        if recipe.vae != "a" and not merger.has_vae_of_b:
            name = merger.models[1].name if len(merger.models) > 1 else "which there is not"
            raise ConfigError(f"vae is {recipe.vae!r}, but model B, {name}, holds no whole VAE")
        self._dtype = PRECISIONS[recipe.precision]
        self._is_random = methods.is_random(self._method)
        self._is_linear = methods.is_linear(self._method) and not recipe.clip
        self._by_place: dict[Place, dict[str, float]] = {}
        self._factors: dict[Place, tuple[float, ...]] = {}
        self._ways_by_place: dict[Place, _Way] = {}
        self._mergeable = merger.mergeable(n_models)
        # What makes each tensor; equal ways from the same models make equal tensors.
        self._ways = {name: self._way(name) for name in merger.places}

    def __len__(self) -> int:
        return len(self._ways)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ways)

    @cached_property
    def layout(self) -> Mapping[str, Layout]:
        """Shape and type of each tensor."""
        return {name: self._result(name) for name in self._ways}

    def __getitem__(self, name: str) -> Tensor:
        """The merged tensor, on the device of the merge; TrialError if it is not finite."""
        entry = self.layout[name]
        out = torch.empty(entry.shape, dtype=entry.dtype, device=self._merger.device)
        self.write({name: out})
        return out

    def write(self, targets: Mapping[str, Tensor], since: Merge | None = None) -> int:
        """Write tensors into `targets` (by name; of any type and device); how many were written.

        `since` is the merge that `targets` hold: what both make alike is left as it is. TrialError
        if a tensor is not finite; `targets` are then to be written anew.
        """
        before = since._ways if isinstance(since, Merged) and since._merger is self._merger else {}
        todo = [name for name in targets if before.get(name) != self._ways[name]]
        summed: list[str] = []

        def sums() -> Iterator[Sum]:
            for name in todo:
                # The values alone: a live model's parameter may not be written to as such.
                target = targets[name].detach().view(self._shape(name))
                found = self._sum(name, target)
                if found is None:
                    target.copy_(self._made(name))
                else:
                    summed.append(name)
                    yield found

        for place in combine(sums()):
            raise TrialError(self._not_finite(summed[place]))
        return len(todo)

    def spare_memory(self) -> bool:
        """Keep no model's tensors on the device, in this merge and in all others of its merger."""
        models = [model for model in self._merger.aligned if isinstance(model, _Aligned)]
        return any([model.keep_nothing() for model in models])

    def save(self, path: Path, told: Callable[[int], object] = lambda _: None) -> None:
        """Write the merge as a checkpoint with the recipe in its metadata, and check what was written.

        `told` is called with the number of bytes of each piece that is made. CheckpointError if the
        disk is too small or a tensor is not finite; nothing is left then.
        """
        try:
            self.write_file(path, told)
        except TrialError as error:
            raise CheckpointError(f"{path.name} was not written: {error}") from error

    def write_file(self, path: Path, told: Callable[[int], object] = lambda _: None) -> None:
        """`save`, but that a tensor which is not finite is a TrialError."""
        buffers = _Buffers(self._dtype, self._merger.device)

        def pieces(name: str) -> Iterator[Tensor]:
            for piece in self._pieces(name, buffers):
                told(piece.nbytes)
                yield piece

        write(path, self.layout, pieces, self._metadata())
        if Checkpoint(path).layout != self.layout:
            raise CheckpointError(
                f"{path}: the file on the disk is not what was written; save again"
            )

    def require_space(self, path: Path) -> None:
        """CheckpointError if `path` has no room for the merge."""
        require_space(path, self.n_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.n_bytes for entry in self.layout.values())

    def weights(self, name: str) -> Mapping[str, float] | None:
        """The weights that the tensor is merged with; None for one that is not merged."""
        is_merged = self._ways[name].kind == "merge"
        return self._by_place[self._merger.places[name]] if is_merged else None

    def moved_by(self, name: str) -> list[tuple[str, str]]:
        """The weights that the tensor follows, as (weight of the method, block or part)."""
        if self._ways[name].kind != "merge":
            return []
        place = self._merger.places[name]
        given = self.recipe.weights
        return [
            (weight, place.part if place.part in given[weight] else place.block)
            for weight in self._by_place[place]
        ]

    def slopes(self, name: str, gradient: Tensor) -> dict[tuple[str, str], float]:
        """The derivative of a score by each weight that the tensor follows.

        `gradient` is that of the score by the tensor. For a linear method without `clip` the
        derivative is exact; for others it is taken from two merges with the weight apart by 0.002.
        GradientError where it is not finite.
        """
        inputs = [x.to(torch.float32) for x in self._inputs(name)]
        gradient = gradient.reshape(self._shape(name))
        if any(x.shape != gradient.shape for x in inputs):  # other input channels, as in `_made`
            n = min(x.shape[1] for x in inputs)
            inputs, gradient = [x[:, :n] for x in inputs], gradient[:, :n]
        flat = gradient.to(inputs[0].device, torch.float32).reshape(-1)
        found = {}
        for key in self.moved_by(name):
            found[key] = float(flat @ self._tangent(name, key[0], inputs).reshape(-1))
            if not math.isfinite(found[key]):
                raise GradientError(f"the gradient of tensor {name!r} is not finite")
        return found

    def _tangent(self, name: str, weight: str, inputs: Sequence[Tensor]) -> Tensor:
        """The derivative of the merged tensor by one of its weights."""
        weights = self._by_place[self._merger.places[name]]
        step = 1e-6 if self._is_linear else 1e-3
        domain = methods.domains(self._method).get(weight)
        low, high = weights[weight] - step, weights[weight] + step
        if domain:
            low, high = max(low, domain.low), min(high, domain.high)
        ends = [{**weights, weight: value} for value in (high, low)]
        if not self._is_linear:
            tangent = self._computed(name, inputs, ends[0])
            return (tangent - self._computed(name, inputs, ends[1])).div_(high - low)
        above, below = (methods.coefficients(self._method, e, len(inputs)) for e in ends)
        factors = [(one - other) / (high - low) for one, other in zip(above, below, strict=True)]
        tangent = inputs[0] * factors[0]
        for factor, x in zip(factors[1:], inputs[1:], strict=True):
            tangent.add_(x, alpha=factor)
        return tangent

    def described(self, name: str) -> str:
        """How the tensor is made, in words: "alpha 0.5", the method, "A's"."""
        way = self._ways[name]
        if way.kind == "count":
            return "written anew"
        if way.kind == "copy":
            return f"{ascii_uppercase[way.source]}'s"
        weights = self.weights(name) or {}
        return ", ".join(f"{w} {value:g}" for w, value in weights.items()) or self.recipe.method

    def _way(self, name: str) -> _Way:
        if name.endswith(".position_ids") and self._shape(name):
            return _Way("count")
        place = self._merger.places[name]
        if place.component == "vae" and self.recipe.vae == "b" and name in self._models[1].layout:
            return _Way("copy", 1)
        is_wanted = place.component in ("unet", "te") or self._is_vae_merged(place)
        if not (is_wanted and name in self._mergeable):
            return _Way("copy")
        if place not in self._ways_by_place:
            recipe = self.recipe
            weights = self._by_place[place] = _weights_at(place, recipe, self._method)
            extras = (recipe.precision, recipe.clip, recipe.seed if self._is_random else None)
            of = (recipe.method, *weights.values(), *extras)
            self._ways_by_place[place] = _Way("merge", of=of)
        return self._ways_by_place[place]

    def _is_vae_merged(self, place: Place) -> bool:
        own_weight = any(place.part in blocks for blocks in self.recipe.weights.values())
        return place.component == "vae" and (self.recipe.vae == "base" or own_weight)

    def _result(self, name: str) -> Layout:
        way = self._ways[name]
        if way.kind == "copy":
            return self._models[way.source].layout[name]
        return Layout(self._shape(name), torch.int64 if way.kind == "count" else self._dtype)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._models[0].layout[name].shape

    def _metadata(self) -> dict[str, str]:
        """What the merge's file says of itself."""
        recipe = self.recipe
        models = self._merger.models[: len(recipe.models)]
        said = [model.metadata for model in models]
        title = " + ".join(Path(model.name).stem for model in recipe.models)
        return {
            "format": "pt",
            "merge_recipe": json.dumps(recipe.to_dict(), sort_keys=True),
            **(metadata.carried(said, title) if said else {}),
            **metadata.sd_merge(recipe, said, [_legacy_hash(model.path) for model in models]),
        }

    def _inputs(self, name: str) -> list[Tensor]:
        return [model.read(name) for model in self._models]

    def _sum(self, name: str, target: Tensor) -> Sum | None:
        """The merge as a weighted sum straight into `target`, where it is one."""
        if not (self._is_linear and self._ways[name].kind == "merge"):
            return None
        inputs = tuple(self._inputs(name))
        if any(x.shape != target.shape or x.device != target.device for x in inputs):
            return None
        return Sum(self._coefficients(name), inputs, target, self._dtype)

    def _coefficients(self, name: str) -> tuple[float, ...]:
        place = self._merger.places[name]
        if place not in self._factors:
            n_models = len(self._models)
            self._factors[place] = methods.coefficients(
                self._method, self._by_place[place], n_models
            )
        return self._factors[place]

    def _made(self, name: str) -> Tensor:
        """The tensor of the result, in its type; a copied one is the file's own, not to be changed."""
        way, entry = self._ways[name], self.layout[name]
        if way.kind == "count":
            # Averages and half precision corrupt these counters, so they are made anew.
            return torch.arange(entry.shape[-1]).expand(entry.shape)
        if way.kind == "copy":
            return self._merger.finite(way.source, name)
        out = torch.empty(entry.shape, dtype=self._dtype, device=self._merger.device)
        inputs = self._inputs(name)
        if self._is_for_pieces(inputs):
            whole = out.view(-1)
            for first, some in _cut(inputs):
                self._merge_piece(name, some, whole[first : first + len(some[0])])
        elif any(x.shape != entry.shape for x in inputs):
            # Of another number of input channels: the ones that all have are merged, the rest is A's.
            n = min(x.shape[1] for x in inputs)
            out.copy_(inputs[0])
            out[:, :n] = self._applied(name, [x[:, :n] for x in inputs])
        else:
            out.copy_(self._applied(name, inputs))
        return out

    def _pieces(self, name: str, buffers: _Buffers) -> Iterator[Tensor]:
        """The tensor in flat pieces; each stays as it is until the one after the next is made."""
        inputs = self._inputs(name) if self._ways[name].kind == "merge" else []
        if not (inputs and self._is_for_pieces(inputs)):
            yield self._made(name).reshape(-1)
            return
        for _, some in _cut(inputs):
            out = buffers.next(len(some[0]))
            self._merge_piece(name, some, out)
            yield out

    def _is_for_pieces(self, inputs: Sequence[Tensor]) -> bool:
        return methods.is_elementwise(self._method) and len({x.shape for x in inputs}) == 1

    def _merge_piece(self, name: str, inputs: Sequence[Tensor], out: Tensor) -> None:
        if not self._is_linear:
            out.copy_(self._applied(name, inputs))
        elif combine([Sum(self._coefficients(name), tuple(inputs), out)]):
            raise TrialError(self._not_finite(name))

    def _applied(self, name: str, inputs: Sequence[Tensor]) -> Tensor:
        """The method's result on (a piece of) the tensor, finite, in the type of the result."""
        wide = [x.to(torch.float32) for x in inputs]
        # Not every method shows what it was given.
        if not all(stays_finite(x, torch.float32) for x in wide):
            raise TrialError(self._not_finite(name))
        merged = self._computed(name, wide, self._by_place[self._merger.places[name]])
        if not stays_finite(merged, self._dtype):
            raise TrialError(self._not_finite(name))
        return merged.to(self._dtype)

    def _computed(
        self, name: str, inputs: Sequence[Tensor], weights: Mapping[str, float]
    ) -> Tensor:
        """The method's result, clipped if the recipe says so, in the type of the inputs."""
        chance = {"generator": _chance(self.recipe.seed, name)} if self._is_random else {}
        try:
            merged = self._method(*inputs, **weights, **chance)
            if not merged.is_floating_point():
                raise TypeError(f"the result is {merged.dtype}, not floating point numbers")
        except MergerError:
            raise
        except Exception as error:  # a method of the user's may raise anything
            raise TrialError(
                f"{self.recipe.method}, tensor {name!r}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if merged.shape != inputs[0].shape:
            raise TrialError(
                f"{self.recipe.method} made shape {list(merged.shape)} of {list(inputs[0].shape)} "
                f"for tensor {name!r}"
            )
        if self.recipe.clip:
            merged = merged.clamp(torch.minimum(*inputs[:2]), torch.maximum(*inputs[:2]))
        return merged

    def _not_finite(self, name: str) -> str:
        for number, model in enumerate(self._models):
            if not stays_finite(model.read(name).float(), torch.float32):
                return _says_not_finite(name, number, model.name)
        return (
            f"tensor {name!r} is not finite after the merge in {self.recipe.precision}; "
            f"try precision fp32 or weights nearer to [0, 1]"
        )


class _Buffers:
    """Two pieces of memory in turn: one is written to the disk while the other is filled.

    Fresh memory for each tensor would cost more time than the merge.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._pair = [torch.empty(_PIECE, dtype=dtype, device=device) for _ in range(2)]

    def next(self, length: int) -> Tensor:
        """The buffer that was used before the last one, cut to `length`."""
        self._pair.reverse()
        return self._pair[0][:length]


def even_weights(method: str, blocks: Iterable[str], value: float) -> dict[str, dict[str, float]]:
    """Every weight of `method` at `value` in every block."""
    return {
        weight: dict.fromkeys(blocks, float(value))
        for weight in methods.weights(methods.get(method))
    }


def check_recipe(recipe: Recipe) -> None:
    """ConfigError in one line if `recipe` cannot describe a merge of any models."""
    method = methods.get(recipe.method)
    if recipe.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"unknown architecture {recipe.architecture!r} (known: {', '.join(ARCHITECTURES)})"
        )
    if recipe.precision not in PRECISIONS:
        raise ConfigError(
            f"unknown precision {recipe.precision!r} (known: {', '.join(PRECISIONS)})"
        )
    if recipe.vae not in ("a", "b", "base"):
        raise ConfigError(f"unknown vae {recipe.vae!r} (known: a, b, base)")
    if recipe.vae == "b" and any("VAE" in blocks for blocks in recipe.weights.values()):
        raise ConfigError("vae 'b' copies B's VAE, which then has no weight; leave out one")
    n_used(method, recipe.method, len(recipe.models))
    _require_letters(len(recipe.models))
    architecture = ARCHITECTURES[recipe.architecture]
    domains = methods.domains(method)
    for weight, given in recipe.weights.items():
        if weight not in methods.weights(method):
            known = ", ".join(methods.weights(method)) or "none"
            raise ConfigError(f"{recipe.method} has no weight {weight!r} (known: {known})")
        for block, value in given.items():
            if block not in (*architecture.blocks, *architecture.parts):
                raise ConfigError(f"{recipe.architecture} has no block {block!r}")
            if not math.isfinite(value):
                raise ConfigError(f"{weight} of block {block} is {value}; give a finite number")
            domain = domains.get(weight)
            if domain and not domain.low <= value <= domain.high:
                raise ConfigError(
                    f"{weight} of block {block} is {value}, but {recipe.method} takes "
                    f"{domain.low:g} to {domain.high:g}"
                )


def _require_letters(n_models: int) -> None:
    if n_models > len(ascii_uppercase):
        raise ConfigError(
            f"{n_models} models are given; merge at most {len(ascii_uppercase)} at once"
        )


def n_used(method: methods.Method, name: str, n_given: int) -> int:
    """How many of the given models the method merges; ConfigError if they are too few."""
    needed = methods.n_models(method)
    if n_given < needed:
        raise ConfigError(f"{name} merges {needed} models, but {n_given} are given")
    return n_given if methods.takes_more(method) else needed


def _weights_at(place: Place, recipe: Recipe, method: methods.Method) -> dict[str, float]:
    """The weights of a tensor: its part's, or else its block's; ConfigError where there are none."""
    found = {}
    for weight in methods.weights(method):
        blocks = recipe.weights.get(weight, {})
        value = blocks.get(place.part, blocks.get(place.block))
        if value is None:
            raise ConfigError(f"the recipe has no {weight} for block {place.block}")
        found[weight] = value
    return found


def _detected(model: Source, letter: str) -> Architecture:
    try:
        architecture = detect(model.layout)
        architecture.places(model.layout)
    except CheckpointError as error:
        raise CheckpointError(f"model {letter}, {model.name}: {error}") from None
    return architecture


def _is_floating(name: str, *models: _Aligned | _Applied) -> bool:
    return all(name in m.layout and m.layout[name].dtype.is_floating_point for m in models)


def _is_alike_but_for_channels(one: Layout, other: Layout) -> bool:
    same = (one.shape[:1], one.shape[2:]) == (other.shape[:1], other.shape[2:])
    return same and len(one.shape) == len(other.shape) >= 2


def _legacy_hash(path: Path) -> str:
    return metadata.legacy_hash(path) if path.is_file() else ""


def _says_not_finite(name: str, number: int, model: str) -> str:
    letter = ascii_uppercase[number]
    return f"tensor {name!r} of model {letter}, {model}, holds NaN or infinity"


def _cut(tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Where each piece begins, and the piece of every tensor, flat."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for first in range(0, len(flat[0]), _PIECE):
        yield first, [tensor[first : first + _PIECE] for tensor in flat]


def _chance(seed: int, name: str) -> torch.Generator:
    """The chance of one tensor: the same in every merge, so that merges differ by their weights."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
