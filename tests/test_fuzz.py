"""Readers against files made to harm: a readable checkpoint or an error of one line, nothing else."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bayesian_merger.checkpoint import DTYPES, Checkpoint
from bayesian_merger.errors import CheckpointError


def fuzzed(n_examples: int) -> settings:
    return settings(
        max_examples=n_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def few_and_many(n_examples: int) -> pytest.MarkDecorator:
    many = pytest.param(30 * n_examples, marks=pytest.mark.slow)
    return pytest.mark.parametrize("n_examples", [n_examples, many])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def refusal(path: Path) -> str:
    """Why `path` is refused; empty if it opens, and then every tensor of it has been read."""
    try:
        found = Checkpoint(path)
    except CheckpointError as error:
        return str(error)
    size = path.stat().st_size
    for name, expected in found.layout.items():
        assert expected.n_bytes <= size
        tensor = found[name]
        assert tuple(tensor.shape) == expected.shape
        assert tensor.dtype == expected.dtype
        assert tensor.contiguous().view(-1).view(torch.uint8).numel() == expected.n_bytes
    assert all(isinstance(text, str) for text in found.metadata.values())
    return ""


def opens(path: Path) -> bool:
    """Whether `path` opens; if not, the reason is one short line that names the file."""
    reason = refusal(path)
    assert not reason or path.name in reason
    assert reason.isprintable()
    assert len(reason) < 600
    return not reason


# Good files with some bytes changed

TENSORS = {
    "one": torch.arange(6.0).reshape(2, 3),
    "two": torch.ones(4, 2).half().T,
    "three": torch.arange(3),
    "four": torch.ones((), dtype=torch.bfloat16),
    "five": torch.zeros(0, 3),
    "six": torch.arange(5, dtype=torch.uint8)[1:],
}


def good_safetensors() -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    tensors["fp8"] = torch.ones(3).to(torch.float8_e4m3fn)
    return safetensors.torch.save(tensors, {"modelspec.architecture": "x", "note": "ok"})


def good_ckpt(*, as_zip: bool = True) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x"
        torch.save(
            {"state_dict": TENSORS, "epoch": 3}, path, _use_new_zipfile_serialization=as_zip
        )
        return path.read_bytes()


GOOD = {
    ".safetensors": good_safetensors(),
    ".ckpt": good_ckpt(),
    ".pt": good_ckpt(as_zip=False),
}
# Bytes that mean something in a header, a pickle or an archive.
TELLING = (
    b"\0",
    b"\xff" * 4,
    b"\xff" * 8,
    b"-",
    b"9" * 20,
    b"[",
    b"}",
    b'"',
    b"e9",
    b"PK\x05\x06",
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with some bytes changed, left out, repeated or put in, at the beginning more often."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = int(len(changed) * chance.random() ** chance.choice((1, 1, 4)))
        kind = chance.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1 and changed[at : at + 1]:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del changed[at : at + chance.randint(1, 64)]
        elif kind == 3:
            changed[at:at] = changed[at : at + chance.randint(1, 64)]
        elif kind == 4:
            text = chance.choice(TELLING)
            changed[at : at + len(text)] = text
        else:
            changed[at:at] = chance.choice(TELLING)
    return bytes(changed)


@few_and_many(600)
def test_mutated_file_opens_or_is_refused(folder: Path, n_examples: int) -> None:
    n_open = 0

    @fuzzed(n_examples)
    @given(
        suffix=st.sampled_from([".safetensors", ".ckpt"]),
        content=st.sampled_from(list(GOOD)),
        seed=st.integers(0, 2**32),
    )
    def check(suffix: str, content: str, seed: int) -> None:
        nonlocal n_open
        path = folder / f"fuzzed{suffix}"
        path.write_bytes(mutated(GOOD[content], random.Random(seed)))
        n_open += opens(path)

    check()
    assert n_examples / 50 < n_open < n_examples / 2


def test_unchanged_files_open_or_are_too_old(folder: Path) -> None:
    for suffix, data in GOOD.items():
        path = folder / f"good{suffix}"
        path.write_bytes(data)
        assert opens(path) == (suffix != ".pt")


# Headers of safetensors that no library would write

BIG = (2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
names = st.text(max_size=6) | st.sampled_from(["t", "__metadata__", "a\nb", "x.absmax", "\x7f"])
lengths = st.integers(-2, 9) | st.sampled_from(BIG)
anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | lengths | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
shapes = st.lists(lengths, max_size=5) | st.lists(st.integers(0, 4), max_size=3)
kinds = st.sampled_from([*DTYPES, *DTYPES, "F4", "F6_E2M3", "F8_E8M0", "C64", "F31", ""])


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    entry = {
        "dtype": draw(kinds),
        "shape": draw(shapes),
        "data_offsets": draw(st.lists(lengths, min_size=2, max_size=2)),
    }
    if draw(st.integers(0, 9)) == 0:
        entry[draw(st.sampled_from(list(entry)))] = draw(anything)
    return entry


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """A header, often with true offsets, and the bytes that belong to it."""
    table = draw(st.lists(st.tuples(names, entries()), max_size=4))
    end = 0
    if draw(st.booleans()):
        for _, entry in table:
            dtype = DTYPES.get(str(entry["dtype"]), torch.uint8)
            size = dtype.itemsize
            for length in entry["shape"] if isinstance(entry["shape"], list) else ():
                size *= length if isinstance(length, int) else 1
            if 0 <= size < 4096:
                entry["data_offsets"] = [end, end + size]
                end += size
    pairs = [f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in table]
    if draw(st.integers(0, 4)) == 0:
        metadata = draw(st.dictionaries(names, names, max_size=3) | anything)
        pairs.append(f'"__metadata__":{json.dumps(metadata)}')
    return "{" + ",".join(pairs) + "}", end


rarely = st.sampled_from([0] * 9 + [1, 3, 8])


@few_and_many(400)
def test_adversarial_header_opens_or_is_refused(folder: Path, n_examples: int) -> None:
    n_open = 0

    @fuzzed(n_examples)
    @given(header=headers(), extra=rarely, off_by=rarely)
    def check(header: tuple[str, int], extra: int, off_by: int) -> None:
        nonlocal n_open
        text = header[0].encode()
        path = folder / "header.safetensors"
        path.write_bytes(
            (len(text) + off_by).to_bytes(8, "little") + text + bytes(header[1] + extra)
        )
        n_open += opens(path)

    check()
    assert n_examples / 50 < n_open < n_examples / 2


# Pickles that no library would write


class Storage:
    """Pickles as a reference to the archive's entry `key`."""

    def __init__(self, kind: str, key: str, n: int) -> None:
        self.reference = ("storage", getattr(torch, kind), key, "cpu", n)


class Rebuilt:
    """Pickles as a call of what PyTorch makes tensors with."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


def archive_of(path: Path, content: object, entries: Mapping[str, bytes]) -> None:
    """An archive as PyTorch writes it, with `content` as its pickle."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            return thing.reference if isinstance(thing, Storage) else None

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("archive/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(content)
        archive.writestr("archive/version", "3\n")
        for name, data in entries.items():
            archive.writestr(f"archive/data/{name}", data)


counts = st.integers(-2, 9) | st.sampled_from(BIG)
storages = st.builds(
    Storage,
    st.sampled_from(["FloatStorage", "HalfStorage", "LongStorage", "ByteStorage", "QInt8Storage"]),
    st.sampled_from(["0", "1", "2", "../0"]),
    counts,
)
rebuilt = st.builds(
    Rebuilt,
    storages | anything,
    counts,
    st.lists(counts, max_size=3).map(tuple),
    st.lists(counts, max_size=3).map(tuple),
    st.booleans(),
    st.just({}) | anything,
)
tables = st.dictionaries(names, rebuilt | anything, max_size=3)


@few_and_many(400)
def test_adversarial_pickle_opens_or_is_refused(folder: Path, n_examples: int) -> None:
    @fuzzed(n_examples)
    @given(content=tables | tables.map(lambda table: {"state_dict": table}) | anything)
    def check(content: object) -> None:
        path = folder / "pickled.ckpt"
        archive_of(path, content, {"0": bytes(24), "1": b""})
        opens(path)

    check()


def test_archive_of_the_tests_is_one_that_opens(folder: Path) -> None:
    path = folder / "mine.ckpt"
    tensor = Rebuilt(Storage("FloatStorage", "0", 6), 1, (2, 2), (1, 2), False, {})
    archive_of(path, {"state_dict": {"one": tensor}}, {"0": torch.arange(6.0).numpy().tobytes()})
    assert Checkpoint(path)["one"].tolist() == [[1, 3], [2, 4]]


# Files that ask for memory

OPEN_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from bayesian_merger.checkpoint import Checkpoint
from bayesian_merger.errors import CheckpointError

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in sys.argv[2:]:
    try:
        found = Checkpoint(Path(name))
        print("opened", *(found[name].numel() for name in found.layout))
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory map of Linux")
def test_no_file_takes_much_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    asked = 1 << 32

    def safetensors_file(name: str, header: str, n: int = 24) -> None:
        text = header.encode()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(n))

    tensor = '"t":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}'
    wide = f'"u":{{"dtype":"F32","shape":[{"1," * 500_000}0],"data_offsets":[0,0]}}'
    safetensors_file("1.safetensors", f"{{{tensor},{wide}}}")
    safetensors_file("2.safetensors", f'{{{tensor},"u":{"[" * 2_000_000}}}')
    safetensors_file("3.safetensors", f"{{{tensor},{wide},{wide}}}")
    huge = f'{{"t":{{"dtype":"F32","shape":[{asked}],"data_offsets":[0,{4 * asked}]}}}}'
    safetensors_file("4.safetensors", huge)
    (tmp_path / "5.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{" * 1000)

    def ckpt_file(name: str, *arguments: object) -> None:
        archive_of(tmp_path / name, {"one": Rebuilt(*arguments, False, {})}, {"0": bytes(24)})

    storage = Storage("FloatStorage", "0", 6)
    ckpt_file("6.ckpt", storage, 0, (asked,), (1,))
    ckpt_file("7.ckpt", storage, 0, (asked,), (0,))
    ckpt_file("8.ckpt", Storage("FloatStorage", "0", asked), 0, (asked,), (1,))
    with zipfile.ZipFile(tmp_path / "9.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(400 << 20), compresslevel=1)
        archive.writestr("x/version", "3\n")
    call = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R."
    with zipfile.ZipFile(tmp_path / "10.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", call)
        archive.writestr("x/version", "3\n")
    with zipfile.ZipFile(tmp_path / "11.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"]" * 2_000_000 + b".")
        archive.writestr("x/version", "3\n")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 11
    done = subprocess.run(
        [sys.executable, "-c", OPEN_IN_LITTLE_MEMORY, str(300 << 20), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    for file, line in zip(files, lines, strict=True):
        assert line.startswith(file.name), line
        assert "memory" not in line.lower(), line
        assert "allocate" not in line, line
