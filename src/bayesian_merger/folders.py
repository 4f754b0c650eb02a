"""Folders in the layout of diffusers, read as if they were checkpoints of one file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesian_merger.checkpoint import Checkpoint, Layout, sha256_of
from bayesian_merger.errors import CheckpointError, shown
from bayesian_merger.names import COMPONENTS, Component, Target

_SHARD = re.compile(r"[\w.-]+-\d{5}-of-\d{5}\.safetensors")
_INDEX = re.compile(r"[\w.-]+\.safetensors\.index(\.[\w-]+)?\.json")
_PLAIN = re.compile(r"(diffusion_pytorch_)?model\.safetensors(\.index\.json)?")
_MAX_JSON_BYTES = 1 << 24
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


@dataclass(frozen=True)
class _Piece:
    """A tensor of the folder, and what of a checkpoint it is."""

    file: Checkpoint
    name: str
    target: Target

    def read(self) -> Tensor:
        return self.target.arrange(self.file[self.name])

    @property
    def layout(self) -> Layout:
        """Shape and type in the checkpoint."""
        entry = self.file.layout[self.name]
        empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        return Layout(tuple(self.target.arrange(empty).shape), entry.dtype)


class Folder:
    """A diffusers folder open for reading, with the names and shapes of a checkpoint of one file.

    It has the attributes of `Checkpoint`. Parts that the folder lacks are not in `layout`. `metadata`
    is what its scheduler says of the model, in the words of the modelspec standard.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`; CheckpointError in one line if it is not the folder of a model we know."""
        self.path = path
        self._sha256 = ""
        self._files: dict[str, Checkpoint] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        model = str(_json(path / "model_index.json").get("_class_name"))
        for name in ("unet", "transformer"):
            if (path / name).is_dir():
                denoiser = self._open(name)
                break
        else:
            raise CheckpointError(f"{path}: has neither a unet nor a transformer; is it whole?")
        architecture = _architecture({n: e for file in denoiser for n, e in file.layout.items()})
        if not architecture:
            raise CheckpointError(
                f"{path}: {shown(model)} is not SD1.5, SD2, SDXL, SD3 or Flux, whose folders can be read"
            )
        for part in COMPONENTS[architecture]:
            if part.name == name:
                self._add(part, denoiser, model)
            elif (path / part.name).is_dir():
                self._add(part, self._open(part.name), model)
        self.layout = {tensor: self._joined(tensor) for tensor in self._pieces}
        self.metadata = _metadata(path)

    @property
    def name(self) -> str:
        """The folder's name, which recipes carry."""
        return self.path.absolute().name

    @property
    def sha256(self) -> str:
        """SHA-256 of the names and SHA-256 of all files of weights, in hexadecimal digits."""
        if not self._sha256:
            lines = [f"{sha256_of(file.path)}  {name}\n" for name, file in self._files.items()]
            self._sha256 = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
        return self._sha256

    def require_unchanged(self) -> None:
        """CheckpointError if a file of weights is no longer what was opened."""
        for file in self._files.values():
            file.require_unchanged()

    def __getitem__(self, name: str) -> Tensor:
        pieces = [piece.read() for piece in self._pieces[name]]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _open(self, part: str) -> Sequence[Checkpoint]:
        """The files of weights of one part."""
        try:
            files = _weights(self.path / part)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}/{part}: {error}") from None
        self._files |= {f"{part}/{file.name}": file for file in files}
        return files

    def _add(self, part: Component, files: Sequence[Checkpoint], model: str) -> None:
        strange = []
        for file in files:
            for name in file.layout:
                target = part.target(name)
                if target:
                    self._pieces.setdefault(target.tensor, []).append(_Piece(file, name, target))
                # Counters that old versions of transformers saved.
                elif not name.endswith(".position_ids"):
                    strange.append(name)
        if strange:
            raise CheckpointError(
                f"{self.name}/{part.name}: {len(strange)} tensors have no place in a checkpoint "
                f"(first: {strange[0]!r}); is this {shown(model)} of another architecture, or quantised?"
            )

    def _joined(self, tensor: str) -> Layout:
        """Shape and type of a whole tensor, whose pieces are put into their order."""
        pieces = self._pieces[tensor]
        pieces.sort(key=lambda piece: piece.target.first)
        where = f"{self.name}: tensor {pieces[0].name!r}"
        ends = [0, *(piece.target.last for piece in pieces)]
        if [*(piece.target.first for piece in pieces), pieces[0].target.of] != ends:
            raise CheckpointError(
                f"{where} is there twice or lacks its neighbours, which make {tensor!r} of a "
                f"checkpoint together; download or save the folder again"
            )
        try:
            layouts = [piece.layout for piece in pieces]
        except (IndexError, RuntimeError) as error:
            raise CheckpointError(f"{where} has too few axes; save the folder again") from error
        if len(pieces) == 1:
            return layouts[0]
        n_rows = sum(layout.shape[0] for layout in layouts if layout.shape)
        for piece, layout in zip(pieces, layouts, strict=True):
            rows = piece.target.rows(n_rows)
            shape = (rows.stop - rows.start, *layouts[0].shape[1:])
            if layout != Layout(shape, layouts[0].dtype):
                raise CheckpointError(
                    f"{where} differs in shape or type from its neighbours, which make {tensor!r} of "
                    f"a checkpoint together; save the folder again in one type"
                )
        return Layout((n_rows, *layouts[0].shape[1:]), layouts[0].dtype)


def _weights(folder: Path) -> Sequence[Checkpoint]:
    """The files that hold the weights of one part: one, or those that an index lists."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})") from error
    sets = [
        n
        for n in names
        if (n.endswith(".safetensors") and not _SHARD.fullmatch(n)) or _INDEX.fullmatch(n)
    ]
    # Beside the plain files there may be some in half precision, as "model.fp16.safetensors".
    chosen = [name for name in sets if _PLAIN.fullmatch(name)] or sets
    if len(chosen) > 1:
        raise CheckpointError(f"there are {' and '.join(map(repr, chosen))}; keep one of them")
    if not chosen:
        if any(name.endswith((".bin", ".msgpack")) for name in names):
            raise CheckpointError(
                "there are no .safetensors files, and a .bin file can run code when it is read; save "
                "it by diffusers with safe_serialization=True in an environment you can throw away"
            )
        raise CheckpointError("there are no .safetensors files; is the download whole?")
    if chosen[0].endswith(".json"):
        return _shards(folder / chosen[0])
    return [Checkpoint(folder / chosen[0])]


def _shards(index: Path) -> Sequence[Checkpoint]:
    """The files that `index` lists; CheckpointError unless each holds just what the index says."""
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index.name}: lists no tensors; download it again")
    for file in listed.values():
        # The index comes from elsewhere, and must not lead out of its folder.
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise CheckpointError(f"{index.name}: {shown(file)} is no name of a part of a model")
    files = [Checkpoint(index.parent / name) for name in sorted(set(listed.values()))]
    found = [(name, file.name) for file in files for name in file.layout]
    if different := sorted(set(found) ^ set(listed.items())):
        raise CheckpointError(
            f"{index.name}: it and its files do not hold the same tensors (first: "
            f"{different[0][0]!r}); download the folder again"
        )
    return files


def _architecture(layout: Mapping[str, Layout]) -> str:
    """The architecture of a unet or transformer with these tensors; empty for none that we know."""
    blocks = {
        int(found[1]) for n in layout if (found := re.match(r"transformer_blocks\.(\d{1,4})\.", n))
    }
    if any(name.startswith("single_transformer_blocks.") for name in layout):
        return "flux"
    if "pos_embed.pos_embed" in layout:
        return {24: "sd3", 38: "sd3-large"}.get(len(blocks), "")
    if "add_embedding.linear_1.weight" in layout:
        return "sdxl"
    # SD2 has matrices where SD1 has convolutions of 1 x 1.
    entry = layout.get("mid_block.attentions.0.proj_in.weight")
    return {4: "sd1", 2: "sd2"}.get(len(entry.shape), "") if entry else ""


def _metadata(path: Path) -> dict[str, str]:
    scheduler = path / "scheduler" / "scheduler_config.json"
    said = str(_json(scheduler).get("prediction_type")) if scheduler.exists() else ""
    return {"modelspec.prediction_type": _PREDICTIONS[said]} if said in _PREDICTIONS else {}


def _json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; CheckpointError if it is none, or too large to be one of diffusers'."""
    where = f"{path.parent.name}/{path.name}"
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{where}: larger than any of diffusers' JSON files")
        found = json.loads(text)
    except OSError as error:
        raise CheckpointError(
            f"{where}: cannot be read ({error.strerror}); is this a folder of diffusers?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON; download or save the folder again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: not a table; download or save the folder again")
    return found
