"""Checkpoints in and out: lazy reads, streamed atomic writes, metadata. Nothing is unpickled."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pickletools
import re
import reprlib
import secrets
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bayesian_merger.errors import CheckpointError, first_line, one_line

# Names of the types in a safetensors header.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}

_PICKLED = (".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *_PICKLED)
"""By which files of models are known."""
_WAY_OUT = "convert it to .safetensors in an environment you can throw away"

# What a file is that begins so, and what to do.
_BEGINNINGS = {
    b"GGUF": "a GGUF file, whose tensors are quantised; take the model's fp16 or bf16 file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; run 'git lfs pull' beside it",
    b"PK\x03\x04": "a zip archive; if PyTorch wrote it, name it .ckpt, else unpack it",
    b"\x80\x02\x8a\nl\xfc\x9cF": "a file of PyTorch before 1.6, whose tensors cannot be read one by "
    f"one; {_WAY_OUT}",
    b"\x80\x02}q": f"a pickle, which may run code; {_WAY_OUT}",
    b"\x80\x04\x95": f"a pickle, which may run code; {_WAY_OUT}",
    b"\x80\x05\x95": f"a pickle, which may run code; {_WAY_OUT}",
    b"\x1f\x8b\x08": "a gzip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a rar archive; unpack it",
    bytes(16): "a file that begins with zeros, as unfinished downloads do; download it again",
}

# The tools that quantise, by the ends of the names of the tensors that they add.
_QUANTISED = {
    "bitsandbytes": r"\.(absmax|quant_map|SCB|quant_state\.bitsandbytes__\w+)",
    "quanto": r"\.weight\._(data|scale)",
    "Nunchaku (SVDQuant)": r"\.(wscales|wtscale|smooth_factor\w*)",
    "GPTQ or AWQ": r"\.(qweight|qzeros)",
    "scaled fp8": r"(^|\.)scaled_fp8|\.(scale_(weight|input)|(weight|input)_scale|comfy_quant)",
}

# What a pickle of plain tensors and training counters names. PyTorch allows more, some of which
# fill any memory (bytearray).
_PLAIN = re.compile(
    r"collections (OrderedDict|Counter)"
    r"|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch \w+Storage"
)
_WRAPPERS = ("state_dict", "model", "module", "model_ema", "ema")

# A header or a pickle takes up to 70 times its size in memory, so a small file has a small one.
_TABLE_BYTES = 8 << 20
_TABLE_SHARE = 64
_ABANDONED_S = 600  # a writer that lives adds to its file every moment

_short = reprlib.Repr()
_short.maxstring, _short.maxlevel = 160, 2


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

    `layout` maps each tensor's name to its shape and type. A safetensors file is known by its
    content, whatever its suffix; a pickle is read only under a suffix that says it is one.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`; CheckpointError in one line if it is not a file of tensors."""
        self.path = path
        self._sha256 = ""
        self._mark = (0, 0)
        try:
            if not path.is_file():
                kind = "is a folder, not a file" if path.is_dir() else "no such file"
                raise CheckpointError(f"{path}: {kind}")
            with path.open("rb") as file:
                head, self._mark = file.read(64), _mark(os.fstat(file.fileno()))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        size, _ = self._mark
        if _is_safetensors(head, size):
            self._read, self.layout, self.metadata = _open_safetensors(path, size)
        elif path.suffix.lower() in _PICKLED and head.startswith(b"PK"):
            self._read, self.layout, self.metadata = _open_pickled(path, size)
        else:
            raise CheckpointError(f"{path.name}: {_complaint(head, size, path.suffix.lower())}")
        if not self.layout:
            raise CheckpointError(f"{path.name}: the file holds no tensors")
        _require_plain(path, self.layout, size)

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

    def require_unchanged(self) -> None:
        """CheckpointError if the file is no longer what was opened.

        Its tensors are the file itself, mapped, so they change with it; where it is cut off, reading
        them ends the process.
        """
        try:
            now = _mark(self.path.stat())
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: can no longer be read ({error.strerror}); is its disk plugged in?"
            ) from error
        if now != self._mark:
            raise CheckpointError(
                f"{self.path}: the file has changed since it was opened; put back the one that the run "
                f"began with, or begin anew in another --run-dir"
            )

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its name; CheckpointError if the file is no longer what was opened."""
        self.require_unchanged()
        return self._read(name)


def _mark(stat: os.stat_result) -> tuple[int, int]:
    """Size and time of a file, by which it is seen that it was written to."""
    return stat.st_size, stat.st_mtime_ns


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` has a header where safetensors do."""
    n_header = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= n_header <= size - 8


def _complaint(head: bytes, size: int, suffix: str) -> str:
    """What is wrong with a file that begins with `head` and is no checkpoint."""
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning):
            return f"refused, it is {what}"
    # The last character may be cut.
    text = head.decode("utf-8", "replace").rstrip("\ufffd").lstrip("\ufeff")
    if text and "\ufffd" not in text and all(c.isprintable() or c.isspace() for c in text):
        return (
            f"refused, it is a text that begins {text[:24]!r}, such as a server sends in place of "
            f"a file; download it again"
        )
    if suffix == ".safetensors":
        return (
            f"not a whole safetensors file (no header in its {size} bytes where the first 8 say); "
            f"download or save it again"
        )
    if suffix in _PICKLED:
        return (
            f"refused, its {size} bytes are no archive as PyTorch writes them; download it again"
        )
    return "not a .safetensors or .ckpt file"


def _require_plain(path: Path, layout: Mapping[str, Layout], size: int) -> None:
    """CheckpointError if tensors are quantised, or larger than their file of `size` bytes."""
    for tool, pattern in _QUANTISED.items():
        ending = re.compile(f"({pattern})$")
        if found := next((name for name in layout if ending.search(name)), None):
            raise CheckpointError(
                f"{path.name}: tensor {_short.repr(found)} says that the file is quantised by {tool}, "
                f"which cannot be merged; take the model's fp16 or bf16 file"
            )
    for name, entry in layout.items():
        # One number may stand for many (a stride of 0), and an empty tensor have any other length.
        if len(entry.shape) > 64 or max(entry.n_bytes, *entry.shape, 0) > size:
            raise CheckpointError(
                f"{path.name}: tensor {_short.repr(name)} has the shape "
                f"{_short.repr(list(entry.shape))}, which no file of {size} bytes can hold; "
                f"it is damaged or made to do harm"
            )


def _require_small(path: Path, n_bytes: int, size: int) -> None:
    """CheckpointError if a table of `n_bytes` is too much for a file of `size` bytes."""
    if n_bytes > max(_TABLE_BYTES, size // _TABLE_SHARE):
        raise CheckpointError(
            f"{path.name}: {_size(n_bytes)} of its {_size(size)} are no tensors but their table, "
            f"more than a checkpoint needs; it is damaged or made to do harm"
        )


def _open_safetensors(
    path: Path, size: int
) -> tuple[Callable[[str], Tensor], dict[str, Layout], dict[str, str]]:
    try:
        with path.open("rb") as opened:
            n_header = int.from_bytes(opened.read(8), "little")
            _require_small(path, n_header, size)
            file: Any = safe_open(path, framework="pt", device="cpu")
            # Of two entries with one name safetensors keeps the last, and other readers the first.
            json.loads(opened.read(n_header), object_pairs_hook=_without_duplicates)
        layout = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            piece = file.get_slice(name)
            kind = piece.get_dtype()
            if kind not in DTYPES:
                raise CheckpointError(
                    f"{path.name}: tensor {_short.repr(name)} has type {kind}, which cannot be merged "
                    f"(known: {', '.join(DTYPES)}); is it a quantised checkpoint?"
                )
            layout[name] = Layout(tuple(piece.get_shape()), DTYPES[kind])
        return file.get_tensor, layout, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name}: not a whole safetensors file ({_line(error)}); download or save it again"
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a table; ValueError if two have one name."""
    table = dict(pairs)
    if len(table) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header holds {_short.repr(twice)} twice")
    return table


def _open_pickled(
    path: Path, size: int
) -> tuple[Callable[[str], Tensor], dict[str, Layout], dict[str, str]]:
    try:
        _require_plain_pickle(path, size)
        data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path.name}: refused, it is cut off or damaged ({_line(error)}); download it again"
        ) from error
    except Exception as error:  # a damaged file makes torch raise anything
        raise CheckpointError(
            f"{path.name}: refused, it is not a file of plain tensors ({_reason(error)}); {_WAY_OUT}"
        ) from error
    tensors = _unwrapped(data)
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path.name}: refused, it holds no table of tensors; {_WAY_OUT}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path.name}: refused, entry {_short.repr(name)} is {type(tensor).__name__}, not a "
                f"tensor; {_WAY_OUT}"
            )
        if name.encode(errors="ignore").decode() != name:
            raise CheckpointError(
                f"{path.name}: refused, the name {_short.repr(name)} is no Unicode; {_WAY_OUT}"
            )
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"{path.name}: tensor {_short.repr(name)} has type {tensor.dtype}, "
                f"which cannot be merged"
            )
    layout = {n: Layout(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    # A saved parameter asks for gradients, which nothing here needs; a negative view has no bytes.
    return lambda name: tensors[name].detach().resolve_neg(), layout, {}


def _require_plain_pickle(path: Path, size: int) -> None:
    """ValueError if the archive asks for more than tensors, or for more memory than it has bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            # Mapped into memory, a compressed tensor would be read as if its bytes were numbers.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                raise ValueError(f"its entry {entry.filename} is compressed, as PyTorch's are not")
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it holds {len(pickles)} pickles, not one")
        _require_small(path, pickles[0].file_size, size)
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name == "GLOBAL" and not _PLAIN.fullmatch(str(argument)):
                what = str(argument).replace(" ", ".")
                raise ValueError(f"it holds {what}, and only plain tensors are read")


def _unwrapped(data: Any) -> Any:
    """The table of tensors in a training checkpoint, which keeps it beside counters, not read here."""
    # A pickle may hold itself, so there is an end to this.
    for _ in range(3):
        names = [name for name in _WRAPPERS if isinstance(data, dict) and name in data]
        if not names or isinstance(data[names[0]], Tensor):
            break
        data = data[names[0]]
    return data


def _reason(error: Exception) -> str:
    """What stopped torch, without its advice to load the file unsafely."""
    first = first_line(error)
    advice = "weights" in first.lower()
    return "it is damaged, or holds more than tensors" if advice else _printable(first)


def _line(error: Exception) -> str:
    """A message of another library, which may quote the file, in one line."""
    return _printable(one_line(error))


def _printable(text: str) -> str:
    """The beginning of `text`, without what a terminal would obey."""
    return "".join(c for c in text if c.isprintable())[:200]


def write(
    path: Path,
    layout: Mapping[str, Layout],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file piece by piece; it appears whole or not at all.

    `pieces` is called once for each name of `layout` and gives the tensor's values in order, in its
    type. A piece is written while the next one is made, so it must stay as it is for so long. The
    same arguments give the same bytes. CheckpointError if the disk cannot hold the file.
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
    try:
        _remove_abandoned(path)
        require_space(path, 8 + len(head) + end)
        with whole_file(path) as file, ThreadPoolExecutor(1) as disk:
            written = disk.submit(file.write, len(head).to_bytes(8, "little") + head)
            for name in names:
                n_left = layout[name].n_bytes
                for piece in pieces(name):
                    assert piece.dtype == layout[name].dtype, name
                    data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                    n_left -= data.nbytes
                    written.result()
                    written = disk.submit(file.write, data.data)
                assert n_left == 0, name
            written.result()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes had written of `path`: parts that nobody has added to for long."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if time.time() - part.stat().st_mtime > _ABANDONED_S:
            part.unlink()


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
    # Processes of containers that share a folder may have one number.
    mark = f"{os.getpid()}{secrets.randbelow(10**6):06}"
    beside = path.with_name(f".{path.name}.{mark}.part")
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
