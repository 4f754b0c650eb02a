"""Where the pictures of a run lie, and what their files are called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from PIL.Image import Image
from PIL.Image import open as open_image

from bayesian_merger import infotext
from bayesian_merger.checkpoint import whole_file
from bayesian_merger.data import Result, Sample
from bayesian_merger.pictures import pillow_errors

_LONGEST = 60  # letters of a payload, and twice as many bytes
_MOST_BYTES = 200  # of a name; disks take 255, of which some are for a part of a file


def folder_of(run: Path, stage: str, name: str) -> Path:
    """Where the pictures of one judged recipe are kept; trials are sorted by their names.

    It is below the run's folder whatever the names, as a study that others share may hold any.
    """
    padded = re.sub(r"\d+", lambda number: number[0].zfill(4), name)
    return run / "images" / _plain(stage) / _plain(padded)


def _plain(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)


def find(folder: Path, index: int) -> Path | None:
    """The picture of an image in a folder of `folder_of`, or None."""
    return next((path for path in folder.glob(f"{index:03}*.png") if _index(path) == index), None)


def saved(folder: Path) -> dict[int, Path]:
    """The pictures in such a folder by their images."""
    found = {path: _index(path) for path in folder.glob("*.png")}
    ordered = sorted(found.items(), key=lambda item: (item[1] or 0, item[0]))
    return {index: path for path, index in ordered if index is not None}


def _index(path: Path) -> int | None:
    number = path.stem.partition("-")[0]
    return int(number) if number.isdecimal() else None


def read(run: Path, result: Result, index: int) -> Image | None:
    """The picture of an image that was kept, if it is still what it was."""
    path = find(folder_of(run, result.stage, result.name), index)
    if path is None:
        return None
    try:
        with pillow_errors(), open_image(path, formats=["PNG"]) as file:
            image = file.convert("RGB")
    except OSError:
        return None
    return image if digest_of(image) == result.images[index] else None


def file_name(index: int, payload: str, scores: Mapping[str, float]) -> str:
    """What the picture of an image is called."""
    payload = re.sub(r"[^\w.+-]+", "_", payload)[:_LONGEST]
    payload = _cut(payload, 2 * _LONGEST).strip(".")
    told = [f"{index:03}", *([payload] if payload else [])]
    told += [f"{score:.3f}" if abs(score) < 1e6 else f"{score:.3g}" for score in scores.values()]
    return f"{_cut('-'.join(told), _MOST_BYTES)}.png"


def _cut(name: str, n_bytes: int) -> str:
    return name.encode()[:n_bytes].decode("utf-8", "ignore")


def save(sample: Sample, folder: Path, scores: Mapping[str, float], recipe: str = "") -> Path:
    """Write an image as a PNG that tells its prompt and the digest of its `recipe`, as webuis do it.

    Its name tells the image, the payload and the scores.
    """
    prompt = sample.prompt
    path = folder / file_name(prompt.index, prompt.payload, scores)
    before = find(folder, prompt.index)
    with whole_file(path) as file:
        file.write(infotext.png(sample, recipe))
    if before and before != path:  # a server made another image the first time
        before.unlink(missing_ok=True)
    return path


def digest_of(image: Image) -> str:
    """Sixteen hexadecimal digits of the pixels, as they are read back from a file."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:16]
