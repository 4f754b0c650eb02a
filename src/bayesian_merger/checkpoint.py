"""Checkpoints in and out: lazy reads, streamed atomic writes, metadata. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bayesian_merger.errors import CheckpointError

# Names of the types in a safetensors header.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """Shape and type of one tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class Checkpoint:
    """A checkpoint file open for reading; a tensor is read when it is asked for.

    `layout` maps each tensor's name to its shape and type.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`; CheckpointError in one line if it is not a file of tensors."""
        self.path = path
        self._sha256 = ""
        try:
            if not path.is_file():
                kind = "is a folder, not a file" if path.is_dir() else "no such file"
                raise CheckpointError(f"{path}: {kind}")
            # A file that may not be read is "no such file" to safetensors.
            path.open("rb").close()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if path.suffix.lower() == ".safetensors":
            self._read, self.layout, self.metadata = _open_safetensors(path)
        elif path.suffix.lower() in (".ckpt", ".pt", ".pth"):
            self._read, self.layout, self.metadata = _open_pickled(path)
        else:
            raise CheckpointError(f"{path}: not a .safetensors or .ckpt file")
        if not self.layout:
            raise CheckpointError(f"{path.name}: the file holds no tensors")

    @property
    def name(self) -> str:
        """The file's name, which recipes carry."""
        return self.path.name

    @property
    def sha256(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal digits; read once."""
        if not self._sha256:
            self._sha256 = sha256_of(self.path)
        return self._sha256

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)


def _open_safetensors(
    path: Path,
) -> tuple[Callable[[str], Tensor], dict[str, Layout], dict[str, str]]:
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        layout = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            piece = file.get_slice(name)
            kind = piece.get_dtype()
            if kind not in DTYPES:
                raise CheckpointError(
                    f"{path.name}: tensor {name!r} has type {kind}, which cannot be merged "
                    f"(known: {', '.join(DTYPES)}); is it a quantised checkpoint?"
                )
            layout[name] = Layout(tuple(piece.get_shape()), DTYPES[kind])
        return file.get_tensor, layout, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name}: not a whole safetensors file ({error}); download or save it again"
        ) from error


def _open_pickled(
    path: Path,
) -> tuple[Callable[[str], Tensor], dict[str, Layout], dict[str, str]]:
    way_out = "convert it to .safetensors in an environment you can throw away"
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged file makes torch raise anything
        raise CheckpointError(
            f"{path.name}: refused, it is not a file of plain tensors ({_reason(error)}); {way_out}"
        ) from error
    # A training checkpoint keeps its tensors under "state_dict", beside counters that are not read.
    tensors = data.get("state_dict", data) if isinstance(data, dict) else data
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path.name}: refused, it holds no table of tensors; {way_out}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path.name}: refused, entry {name!r} is {type(tensor).__name__}, not a tensor; "
                f"{way_out}"
            )
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise CheckpointError(
                f"{path.name}: tensor {name!r} has type {kind}, which cannot be merged"
            )
    layout = {n: Layout(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    # A saved parameter asks for gradients, which nothing here needs.
    return lambda name: tensors[name].detach(), layout, {}


def _reason(error: Exception) -> str:
    """What stopped torch, without its advice to load the file unsafely."""
    if found := re.search(r"\bGLOBAL ([\w.]+)", str(error)):
        return f"it holds {found[1]}, and only tensors are read"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "it is damaged, or holds more than tensors" if "weights" in first.lower() else first


def write(
    path: Path,
    layout: Mapping[str, Layout],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file tensor by tensor; it appears whole or not at all.

    `read` is called once for each name of `layout` and must return that shape and type. The same
    arguments give the same bytes. CheckpointError if the disk cannot hold the file.
    """
    # The widest types first keep every tensor aligned, as the format's own library does.
    names = sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        entry = layout[name]
        start, end = end, end + entry.n_bytes
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    require_space(path, 8 + len(head) + end)
    try:
        with whole_file(path) as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                tensor, entry = read(name), layout[name]
                assert tuple(tensor.shape) == entry.shape, name
                assert tensor.dtype == entry.dtype, name
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error


def require_space(path: Path, n_bytes: int) -> None:
    """CheckpointError if the disk of `path` has no room for `n_bytes` or cannot be reached."""
    folder = path.absolute().parent
    try:
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    if free < n_bytes:
        raise CheckpointError(
            f"{path}: needs {_size(n_bytes)}, but only {_size(free)} are free on that disk; "
            f"make room or choose another folder"
        )


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def remove_parts(folder: Path) -> None:
    """Remove what a killed process was writing with `whole_file` in `folder`."""
    for path in [*folder.glob(".*.part"), *(folder / "images").rglob(".*.part")]:
        if re.fullmatch(r"\..+\.\d+\.part", path.name):
            path.unlink()


def _replace(source: Path, target: Path) -> None:
    """Rename, patiently: on Windows a virus scanner may hold a file for a moment."""
    for wait_s in (0.1, 0.5, 2.0):
        try:
            source.replace(target)
        except PermissionError:
            time.sleep(wait_s)
        else:
            return
    source.replace(target)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"
