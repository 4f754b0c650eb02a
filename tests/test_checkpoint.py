from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesian_merger.checkpoint import DTYPES, Checkpoint, Layout, write
from bayesian_merger.errors import CheckpointError

ODD_NAMES = ("a b", "quo'te\"s", "back\\slash", "new\nline", "", "ünï😀", "\x00\x1f\x7f", "a/../b")
fuzzed = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # one file, written anew
)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.strip(), "the error says nothing"
    assert "\n" not in text, text
    return text


def refused(path: Path, saying: str = ".") -> None:
    """`path` is refused with an error of one line that names the file."""
    with pytest.raises(CheckpointError, match=saying) as caught:
        Checkpoint(path)
    assert path.name in one_line(caught.value)


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, Layout]:
    return {name: Layout(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    write(path, layout_of(tensors), lambda name: [tensors[name]], metadata)


def same_bits(one: Tensor, other: Tensor) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def assorted() -> dict[str, Tensor]:
    """Tensors of all types and of odd shapes, with NaN, infinities and signed zeros."""
    chance = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, dtype in DTYPES.items():
        numbers = torch.randint(
            0, 255, (3, 5, dtype.itemsize), dtype=torch.uint8, generator=chance
        )
        tensors[f"{name}.bits"] = (
            numbers.view(dtype)[..., 0] if dtype != torch.bool else (numbers[..., 0] > 127)
        )
        tensors[f"{name}.scalar"] = torch.ones((), dtype=dtype)
        tensors[f"{name}.empty"] = torch.zeros((2, 0, 3), dtype=dtype)
        tensors[f"{name}.odd"] = torch.ones(3, dtype=dtype)
    tensors["special"] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45])
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    tensors["a slice"] = torch.arange(10)[2:8:2]
    return tensors


def test_written_tensors_are_read_back_bit_for_bit_by_us_and_by_safetensors(
    tmp_path: Path,
) -> None:
    tensors = assorted()
    write_tensors(tmp_path / "x.safetensors", tensors)
    ours = Checkpoint(tmp_path / "x.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(ours.layout) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(ours[name], tensor), name
        assert same_bits(theirs[name], tensor), name
        assert ours.layout[name] == Layout(tuple(tensor.shape), tensor.dtype)


def test_same_arguments_give_the_same_bytes_in_whatever_order(tmp_path: Path) -> None:
    tensors = assorted()
    mixed = list(tensors.items())
    random.Random(1).shuffle(mixed)
    write_tensors(tmp_path / "1.safetensors", tensors, one="1", two="2")
    write_tensors(tmp_path / "2.safetensors", dict(mixed), two="2", one="1")
    first, second = Checkpoint(tmp_path / "1.safetensors"), Checkpoint(tmp_path / "2.safetensors")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == second.sha256


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    path = toy.write_toy(tmp_path / "x.safetensors")
    assert Checkpoint(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_numbers_are_aligned_in_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", assorted())
    data = (tmp_path / "x.safetensors").read_bytes()
    n_head = int.from_bytes(data[:8], "little")
    assert n_head % 8 == 0
    for entry in json.loads(data[8 : 8 + n_head]).values():
        size = DTYPES[entry["dtype"]].itemsize
        assert entry["data_offsets"][0] % size == 0


def test_metadata_comes_back(tmp_path: Path) -> None:
    metadata = {"format": "pt", "ünï": 'quo"te\\ \n\x7f😀', "": ""}
    write(tmp_path / "x.safetensors", {"t": Layout((1,), torch.int8)}, zeros, metadata)
    assert Checkpoint(tmp_path / "x.safetensors").metadata == metadata


@pytest.mark.parametrize("name", ODD_NAMES)
def test_tensor_may_have_any_name(tmp_path: Path, name: str) -> None:
    tensors = {name: torch.arange(3.0), "other": torch.zeros(2)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert same_bits(Checkpoint(tmp_path / "x.safetensors")[name], tensors[name])
    assert set(safetensors.torch.load_file(tmp_path / "x.safetensors")) == set(tensors)


@pytest.mark.parametrize("stem", ["a b", "quo'te\"s", "ünï😀", "a.b", "-x", "x" * 200])
def test_file_may_have_any_name(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.safetensors"
    write_tensors(path, {"t": torch.ones(2)})
    assert Checkpoint(path).name == path.name
    assert list(tmp_path.iterdir()) == [path]


def test_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    assert Checkpoint(toy.write_toy(tmp_path / "X.SafeTensors")).layout


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a" / "b" / "x.safetensors", {"t": torch.ones(2)})
    assert Checkpoint(tmp_path / "a" / "b" / "x.safetensors").layout


# A write that fails


def zeros(name: str) -> list[Tensor]:
    return [torch.zeros(1, dtype=torch.int8)]


def read_that_fails(error: Exception) -> Callable[[str], list[Tensor]]:
    def read(name: str) -> list[Tensor]:
        if name == "z":
            raise error
        return [torch.ones(4)]

    return read


LAYOUT = {name: Layout((4,), torch.float32) for name in ("a", "z")}


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ValueError("no tensor"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
    ],
)
def test_failed_write_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, error: Exception, seen: type[BaseException]
) -> None:
    with pytest.raises(seen):
        write(tmp_path / "new.safetensors", LAYOUT, read_that_fails(error), {})
    assert list(tmp_path.iterdir()) == []
    old = toy.write_toy(tmp_path / "old.safetensors")
    before = old.read_bytes()
    with pytest.raises(seen):
        write(old, LAYOUT, read_that_fails(error), {})
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == before


def test_part_of_a_killed_process_goes_when_the_file_is_written_again(tmp_path: Path) -> None:
    old, young, other = (
        tmp_path / f".{n}.part" for n in ("x.safetensors.1", "x.safetensors.2", "y")
    )
    for part in (old, young, other):
        part.write_bytes(b"half")
    for part in (old, other):
        os.utime(part, (0, 0))
    write_tensors(tmp_path / "x.safetensors", {"t": torch.ones(2)})
    assert sorted(tmp_path.iterdir()) == sorted([young, other, tmp_path / "x.safetensors"])


def test_full_disk_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
    layout = {"t": Layout((50_000_000,), torch.float32)}
    with pytest.raises(
        CheckpointError, match=r"needs 0\.20 GB, but only 20\.00 MB are free"
    ) as no:
        write(tmp_path / "a" / "x.safetensors", layout, read_that_fails(AssertionError()), {})
    assert "x.safetensors" in one_line(no.value)
    assert list(tmp_path.iterdir()) == []


def test_file_where_a_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        write_tensors(tmp_path / "file" / "x.safetensors", {"t": torch.ones(2)})
    one_line(caught.value)


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, who may write everywhere."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o555, 0o000])
@pytest.mark.parametrize("below", ["x.safetensors", "a/b/x.safetensors"])
def test_folder_without_permission_is_told(mode: int, below: str) -> None:
    # Not in tmp_path, whose parents only its owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder) / "locked"
        locked.mkdir()
        Path(folder).chmod(0o755)
        locked.chmod(mode)
        try:
            with nobody(), pytest.raises(CheckpointError, match=r"(?i)permission denied") as no:
                write_tensors(locked / below, {"t": torch.ones(2)})
        finally:
            locked.chmod(0o755)
        assert "x.safetensors" in one_line(no.value)
        assert list(locked.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("locked", ["file", "folder"])
def test_file_that_may_not_be_read_is_told(suffix: str, locked: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = toy.write_toy(Path(folder) / f"x{suffix}")
        Path(folder).chmod(0o755 if locked == "file" else 0o000)
        path.chmod(0o000)
        try:
            with nobody():
                refused(path, r"(?i)permission denied")
        finally:
            Path(folder).chmod(0o755)


# Files that are not checkpoints


def test_missing_file_folder_and_strange_suffix_are_told_apart(tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", "no such file")
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors", "is a folder")
    (tmp_path / "x.zip").write_bytes(b"")
    refused(tmp_path / "x.zip", r"not a \.safetensors or \.ckpt")
    refused(tmp_path / "no" / "such" / "folder.ckpt", "no such file")


def good_bytes() -> bytes:
    tensors = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.arange(4, dtype=torch.int64)}
    return safetensors.torch.save(tensors, {"note": "ok"})


def with_header(header: object, data: bytes = b"\0" * 24) -> bytes:
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def entry(shape: object, offsets: object, dtype: str = "F32") -> dict[str, object]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


BROKEN: dict[str, bytes] = {
    "zero bytes": b"",
    "seven bytes": b"\0" * 7,
    "only a length": (8).to_bytes(8, "little"),
    "truncated header": good_bytes()[:50],
    "truncated data": good_bytes()[:-1],
    "one byte too many": good_bytes() + b"\0",
    "random": random.Random(0).randbytes(1000),
    "a web page": b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n",
    "a pointer of git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n",
    "huge header length": (2**63).to_bytes(8, "little") + b"{}" * 100,
    "header length of all ones": b"\xff" * 8 + b"{}" * 100,
    "long header length": (90_000_000).to_bytes(8, "little") + b"{}" * 100,
    "header is no JSON": with_header({})[:8] + b"no",
    "header is a list": with_header([]),
    "header is not UTF-8": (4).to_bytes(8, "little") + b'{"\xff"',
    "offsets past the end": with_header(entry([6], [0, 240])),
    "offsets backwards": with_header(entry([6], [24, 0])),
    "offsets negative": with_header(entry([6], [-24, 0])),
    "offsets with a hole": with_header(entry([5], [4, 24])),
    "offsets overlap": with_header(
        {**entry([6], [0, 24]), "u": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
    ),
    "shape larger than its bytes": with_header(entry([7], [0, 24])),
    "shape smaller than its bytes": with_header(entry([5], [0, 24])),
    "shape overflows": with_header(entry([2**32, 2**32, 6], [0, 24])),
    "shape negative": with_header(entry([-6], [0, 24])),
    "shape is text": with_header(entry("6", [0, 24])),
    "unknown type": with_header(entry([6], [0, 24], "F31")),
    "type lies about the size": with_header(entry([6], [0, 24], "F16")),
    "metadata is not text": with_header({"__metadata__": {"a": 1}, **entry([6], [0, 24])}),
    "nothing in it": with_header({}, b""),
    "only metadata": with_header({"__metadata__": {"a": "b"}}, b""),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_safetensors_file_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[what])
    refused(path)


@pytest.mark.parametrize(
    ("kind", "length"),
    [("F4", 48), ("F6_E2M3", 32), ("F8_E8M0", 24), ("F8_E4M3FNUZ", 24), ("C64", 3)],
)
def test_type_that_cannot_be_merged_is_refused_by_name(
    tmp_path: Path, kind: str, length: int
) -> None:
    path = tmp_path / "quantised.safetensors"
    path.write_bytes(with_header(entry([length], [0, 24], kind)))
    refused(path, rf"'t' has type {kind}.*quantised")


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with a few bytes changed, left out or added."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed))
        kind = chance.randrange(4)
        if kind == 0:
            changed[at] = chance.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del changed[at : at + chance.randint(1, 16)]
        else:
            changed[at:at] = chance.randbytes(chance.randint(1, 4))
        if not changed:
            break
    return bytes(changed)


def opens_or_is_refused(path: Path) -> None:
    try:
        found = Checkpoint(path)
    except CheckpointError as error:
        one_line(error)
    else:
        for name, expected in found.layout.items():
            assert tuple(found[name].shape) == expected.shape
            assert found[name].dtype == expected.dtype


@fuzzed
@given(chance=st.randoms(use_true_random=False))
def test_mutated_safetensors_file_opens_or_is_refused(
    tmp_path: Path, chance: random.Random
) -> None:
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(mutated(good_bytes(), chance))
    opens_or_is_refused(path)


@fuzzed
@given(data=st.binary(max_size=64), suffix=st.sampled_from([".safetensors", ".ckpt", ".pt"]))
def test_any_bytes_open_or_are_refused(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"bytes{suffix}"
    path.write_bytes(data)
    opens_or_is_refused(path)


# .ckpt


def good_ckpt(path: Path) -> bytes:
    torch.save({"state_dict": {"one": torch.arange(6.0), "two": torch.ones(2, 2).half()}}, path)
    return path.read_bytes()


@fuzzed
@given(chance=st.randoms(use_true_random=False))
def test_mutated_ckpt_file_opens_or_is_refused(tmp_path: Path, chance: random.Random) -> None:
    path = tmp_path / "fuzzed.ckpt"
    path.write_bytes(mutated(good_ckpt(path), chance))
    opens_or_is_refused(path)


@fuzzed
@given(chance=st.randoms(use_true_random=False))
def test_ckpt_file_with_a_mutated_pickle_opens_or_is_refused(
    tmp_path: Path, chance: random.Random
) -> None:
    path = tmp_path / "fuzzed.ckpt"
    good_ckpt(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            is_pickle = name.endswith("data.pkl")
            archive.writestr(name, mutated(data, chance) if is_pickle else data)
    opens_or_is_refused(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".CKPT"])
def test_ckpt_of_plain_tensors_is_read(tmp_path: Path, suffix: str) -> None:
    tensors = {"one": torch.randn(2, 3), "two": torch.arange(4), "three": torch.tensor(1.5).half()}
    torch.save(tensors, tmp_path / f"x{suffix}")
    found = Checkpoint(tmp_path / f"x{suffix}")
    assert found.layout == layout_of(tensors)
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_ckpt_of_a_training_keeps_its_tensors_under_state_dict(tmp_path: Path) -> None:
    state = {"one": torch.randn(2, 3)}
    torch.save(
        {"state_dict": state, "epoch": 7, "global_step": 840_000, "lr": [0.1]}, tmp_path / "x.ckpt"
    )
    found = Checkpoint(tmp_path / "x.ckpt")
    assert list(found.layout) == ["one"]
    assert same_bits(found["one"], state["one"])


def test_tensors_of_a_ckpt_carry_no_gradient(tmp_path: Path) -> None:
    torch.save({"one": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.ckpt")
    assert not Checkpoint(tmp_path / "x.ckpt")["one"].requires_grad


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["alone", "value", "state_dict", "beside state_dict", "key"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_ckpt_is_refused_and_not_run(tmp_path: Path, place: str, as_zip: bool) -> None:
    bomb, tensor = Bomb(tmp_path / "marker"), torch.ones(2)
    content = {
        "alone": bomb,
        "value": {"one": tensor, "two": bomb},
        "state_dict": {"state_dict": {"one": bomb}},
        "beside state_dict": {"state_dict": {"one": tensor}, "callbacks": bomb},
        "key": {bomb: tensor},
    }[place]
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=as_zip)
    what = r"holds (posix|nt)\.mkdir" if as_zip else "PyTorch before 1.6"
    refused(tmp_path / "x.ckpt", rf"refused.*{what}.*convert it to \.safetensors")
    assert not (tmp_path / "marker").exists()


def test_refusal_of_code_does_not_repeat_the_advice_to_load_it_unsafely(tmp_path: Path) -> None:
    for content in (Bomb(tmp_path / "marker"), {"callbacks": object}):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError) as refusal:
            Checkpoint(tmp_path / "x.ckpt")
        assert "weights_only" not in str(refusal.value)
        assert "\x1b" not in str(refusal.value)


def test_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    refused(tmp_path / "x.ckpt", "refused")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "saying"),
    [
        ({"one": torch.ones(2), "epoch": 3}, "'epoch' is int, not a tensor"),
        ({"one": {"two": torch.ones(2)}}, "'one' is dict, not a tensor"),
        ({1: torch.ones(2)}, "refused, entry 1"),
        ([torch.ones(2)], "no table of tensors"),
        (torch.ones(2), "no table of tensors"),
        ({"state_dict": [torch.ones(2)]}, "no table of tensors"),
        ({"one": torch.ones(2, dtype=torch.complex64)}, r"'one' has type torch\.complex64"),
        ({"one": torch.ones(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"one": torch.ones(2, device="meta")}, "_rebuild_meta_tensor"),
        ({}, "no tensors"),
        ({"state_dict": {}}, "no tensors"),
    ],
)
def test_ckpt_of_other_things_is_refused(tmp_path: Path, content: object, saying: str) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", saying)


# What a file really is


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".gguf", ".bin", ""])
@pytest.mark.parametrize(
    ("content", "saying"),
    [
        (b"GGUF\x03\0\0\0" + bytes(100), "GGUF.*quantised.*fp16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "a text that begins '<!DOCTYPE html>"),
        ("\ufeff<html>Größe".encode(), "a text that begins '<html>Größe'"),
        (b'{"error":"Entry not found"}', "a text that begins"),
        (b"Invalid username or password.", "a text that begins 'Invalid username"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        (bytes(4096), "zeros.*download it again"),
        (pickle.dumps({"one": 1}), "a pickle, which may run code"),
        (pickle.dumps({"one": 1}, protocol=2), "a pickle, which may run code"),
    ],
)
def test_file_that_is_something_else_is_told_by_its_content(
    tmp_path: Path, suffix: str, content: bytes, saying: str
) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    refused(tmp_path / f"x{suffix}", saying)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".sft", ".bin", ""])
def test_safetensors_file_is_read_under_any_suffix(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(good_bytes())
    found = Checkpoint(tmp_path / f"x{suffix}")
    assert found.metadata == {"note": "ok"}
    assert found["one"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickle_is_not_read_under_the_suffix_of_safetensors(tmp_path: Path, as_zip: bool) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"one": torch.ones(2)}, path, _use_new_zipfile_serialization=as_zip)
    refused(path, r"zip archive.*name it \.ckpt" if as_zip else "PyTorch before 1.6")


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_linked_file_is_read(tmp_path: Path) -> None:
    # As the cache of Hugging Face keeps them: the name is the link's, the content has no suffix.
    (tmp_path / "blob").write_bytes(good_bytes())
    for suffix in (".safetensors", ".ckpt"):
        (tmp_path / f"x{suffix}").symlink_to(tmp_path / "blob")
        assert Checkpoint(tmp_path / f"x{suffix}").name == f"x{suffix}"
    (tmp_path / "loop.ckpt").symlink_to(tmp_path / "loop.ckpt")
    refused(tmp_path / "loop.ckpt", "no such file")


# Quantised files


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("double_blocks.0.img_attn.proj.weight.absmax", "bitsandbytes"),
        ("double_blocks.0.img_attn.proj.weight.quant_map", "bitsandbytes"),
        ("x.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("x.weight.quant_state.bitsandbytes__fp4", "bitsandbytes"),
        ("encoder.block.0.layer.0.SelfAttention.q.SCB", "bitsandbytes"),
        ("scaled_fp8", "scaled fp8"),
        ("model.diffusion_model.scaled_fp8", "scaled fp8"),
        ("x.scale_weight", "scaled fp8"),
        ("x.scale_input", "scaled fp8"),
        ("x.weight_scale", "scaled fp8"),
        ("x.comfy_quant", "scaled fp8"),
        ("x.to_q.qweight", "GPTQ or AWQ"),
        ("x.to_q.qzeros", "GPTQ or AWQ"),
        ("transformer_blocks.0.qkv_proj.wscales", "Nunchaku"),
        ("transformer_blocks.0.qkv_proj.smooth_factor", "Nunchaku"),
        ("x.weight._data", "quanto"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_quantised_file_is_refused_with_the_tool_and_the_way_out(
    tmp_path: Path, name: str, tool: str, suffix: str
) -> None:
    tensors = {"x.weight": torch.ones(4, dtype=torch.uint8), name: torch.ones(1)}
    path = tmp_path / f"x{suffix}"
    if suffix == ".ckpt":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    refused(path, rf"'{re.escape(name)}'.*quantised by {re.escape(tool)}.*fp16 or bf16")


def test_names_of_whole_models_are_not_taken_for_quantised_ones(tmp_path: Path) -> None:
    names = ("conditioner.embedders.1.model.logit_scale", "x.norm.scale", "x.scale_shift_table")
    write_tensors(tmp_path / "x.safetensors", {name: torch.ones(1) for name in names})
    assert set(Checkpoint(tmp_path / "x.safetensors").layout) == set(names)


def test_plain_fp8_is_read_beside_other_types(tmp_path: Path) -> None:
    tensors = {
        "one": torch.tensor([1.0, -448.0, 0.25]).to(torch.float8_e4m3fn),
        "two": torch.tensor([1.0, 57344.0]).to(torch.float8_e5m2),
        "three": torch.ones(3).half(),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    found = Checkpoint(tmp_path / "x.safetensors")
    assert found.layout == layout_of(tensors)
    assert found["one"].float().tolist() == [1.0, -448.0, 0.25]
    assert found["two"].float().tolist() == [1.0, 57344.0]


# Headers that lie


def with_raw_header(header: str, data: bytes = b"\0" * 24) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


T = '"t":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}'
LIES: dict[str, tuple[bytes, str]] = {
    "a name twice": (with_raw_header(f"{{{T},{T}}}"), "holds 't' twice"),
    "a name of the metadata twice": (
        with_raw_header(f'{{"__metadata__":{{"a":"1","a":"2"}},{T}}}'),
        "holds 'a' twice",
    ),
    "metadata twice": (
        with_raw_header(f'{{"__metadata__":{{}},"__metadata__":{{}},{T}}}'),
        "__metadata__",
    ),
    "an empty tensor with a dimension of 2^63": (
        with_header({**entry([0, 2**63], [0, 0]), "u": entry([6], [0, 24])["t"]}),
        "no file of [0-9]+ bytes can hold",
    ),
    "an empty tensor with a dimension of 2^62": (
        with_header({**entry([0, 2**62], [0, 0]), "u": entry([6], [0, 24])["t"]}),
        "no file of [0-9]+ bytes can hold",
    ),
    "a thousand dimensions": (
        with_header(entry([6] + [1] * 1000, [0, 24])),
        "no file of [0-9]+ bytes can hold",
    ),
    "a line break in a name": (
        with_header({"new\nline\x1b[2J": entry([6], [4, 28])["t"]}),
        "invalid offset",
    ),
    "a name that is no string": (with_raw_header(f"{{{T},1:2}}"), "not a whole safetensors"),
    "nested lists": (with_raw_header(f'{{{T},"u":{"[" * 9999}'), "recursion limit"),
    "nested metadata": (
        with_raw_header(f'{{"__metadata__":{{"a":{{"b":"c"}}}},{T}}}'),
        "expected a string",
    ),
    "trailing bytes in the header": (with_raw_header(f"{{{T}}}\0\0"), "trailing characters"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_refused(tmp_path: Path, lie: str, suffix: str) -> None:
    content, saying = LIES[lie]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    refused(path, saying)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_header_larger_than_a_small_file_needs_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_raw_header(f"{{{T}}}" + " " * (9 << 20)))
    refused(path, r"9\.44 MB of its 9\.44 MB are no tensors")


# .ckpt files as users have them, and as nobody should


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"model": t, "optimizer": {"lr": 0.1}},
        lambda t: {"state_dict": {"state_dict": t}},
        lambda t: {"model": {"state_dict": t}, "step": 3},
        lambda t: {"ema": t},
        lambda t: {"module": t, "global_step": 3},
        lambda t: {"state_dict": t, "model": "sd15", "ema": {"one": torch.zeros(1)}},
    ],
)
def test_tensors_are_found_in_the_wrappers_of_trainings(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]
) -> None:
    torch.save(wrap({"one": torch.arange(6.0)}), tmp_path / "x.ckpt")
    found = Checkpoint(tmp_path / "x.ckpt")
    assert found["one"].tolist() == [0, 1, 2, 3, 4, 5]


def test_table_that_holds_itself_is_refused(tmp_path: Path) -> None:
    table: dict[str, object] = {}
    table["state_dict"] = table
    torch.save(table, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "'state_dict' is dict, not a tensor")


def test_views_of_one_storage_are_read_as_themselves(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": whole,
        "again": whole,
        "transposed": whole.T,
        "column": whole[:, 2],
        "part": whole[1:3, ::2],
        "expanded": torch.ones(2, 1).expand(2, 3),
        "negative": torch._neg_view(torch.ones(3)),
    }
    torch.save(tensors, tmp_path / "x.ckpt")
    found = Checkpoint(tmp_path / "x.ckpt")
    assert found.layout == layout_of(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    write(tmp_path / "x.safetensors", found.layout, lambda name: [found[name]], {})
    again = Checkpoint(tmp_path / "x.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_one_number_that_stands_for_a_terabyte_is_refused(tmp_path: Path) -> None:
    torch.save({"one": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", r"'one' has the shape \[1000000, 1000000\]")


def repacked(path: Path, change: Callable[[bytes], bytes], packed: bool = False) -> None:
    """Write the archive at `path` anew with another pickle, or compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"one": torch.zeros(1_000_000)}, path)
    repacked(path, lambda data: data, packed=True)
    refused(path, r"x/data\.pkl is compressed")


@pytest.mark.parametrize("n_left", [5, 100, 700, -1, -30])
def test_archive_that_was_cut_off_is_refused(tmp_path: Path, n_left: int) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(good_ckpt(path)[:n_left])
    refused(path, "(cut off or damaged|no archive).*download it again")


@pytest.mark.parametrize(
    ("pickled", "saying"),
    [
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\x40\0\x85R.", "holds builtins.bytearray"),
        (b"\x80\x02ctorch\nFloatTensor\nJ\0\0\0\x40\x85R.", "holds torch.FloatTensor"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "no tensors"),
        (b"\x80\x02ctorch\nNoStorage\n.", "damaged, or holds more than tensors"),
        (b"\x80\x02", "pickle exhausted"),
    ],
)
def test_pickle_that_asks_for_memory_is_refused(
    tmp_path: Path, pickled: bytes, saying: str
) -> None:
    good_ckpt(tmp_path / "x.ckpt")
    repacked(tmp_path / "x.ckpt", lambda _: pickled)
    refused(tmp_path / "x.ckpt", saying)


def test_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"one": torch.arange(6.0)}, path)
    repacked(path, lambda data: data.replace(b"K\x06\x85", b"J\xff\xff\xff\x7f\x85"))
    refused(path, "not resizable")


def test_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    torch.save({"lone \ud800": torch.ones(2)}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", r"'lone \\ud800' is no Unicode")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory map of Linux")
def test_opening_a_ckpt_reads_only_its_table(tmp_path: Path) -> None:
    torch.save({"one": torch.ones(20_000_000), "two": torch.ones(2)}, tmp_path / "x.ckpt")
    found = Checkpoint(tmp_path / "x.ckpt")

    def resident() -> int:
        line = Path("/proc/self/smaps_rollup").read_text().split("Rss:")[1]
        return int(line.split()[0]) * 1024

    before = resident()
    again = Checkpoint(tmp_path / "x.ckpt")
    assert resident() - before < 20e6
    assert float(again["one"].sum()) == 20_000_000
    assert resident() - before > 40e6
    assert found.layout == again.layout
