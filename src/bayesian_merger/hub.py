"""Learnt parts that are not ours: a file or a repository, at a pinned revision -> its place on the disk.

What is here already is taken as it is; anything else is downloaded once, checked and kept. Repositories
are those of the Hugging Face hub, and lie in its own cache; single files lie in this program's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import platformdirs

from bayesian_merger.checkpoint import sha256_of, whole_file
from bayesian_merger.errors import ConfigError, first_line

if TYPE_CHECKING:
    import httpx

CLIP_L14 = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
CLIP_B32 = "openai/clip-vit-base-patch32@3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
SIGLIP_SO400M = "google/siglip-so400m-patch14-384@9fdffc58afc957d1a03a25b10dba0329ab15c2a3"
PICKSCORE = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"

_TIMEOUT_S = 30.0
_REVISION = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# What is looked for first and second.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class File:
    """One file of the internet, by its content, and its name here if that is not its own."""

    address: str
    sha256: str
    called: str = ""

    @property
    def name(self) -> str:
        return self.called or unquote(self.address.rpartition("/")[2])


def require(**given: Path | None) -> None:
    """ConfigError for each path that an option names and that is not there."""
    lost = [
        f"{option}: {path}: no such file or folder"
        for option, path in given.items()
        if path and not path.exists()
    ]
    if lost:
        raise ConfigError("\n".join(lost))


def each(*wanted: Callable[[], Path]) -> list[Path]:
    """Where all that is wanted is; a ConfigError with all that cannot be had."""
    found: list[Path] = []
    mistakes: list[str] = []
    for one in wanted:
        try:
            found.append(one())
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return found


def file(wanted: File, option: str) -> Path:
    """Where the file is; it is downloaded if it is not here.

    ConfigError if it cannot be had, which says where to put it, or that `option` may name it.
    """
    import httpx

    path = platformdirs.user_cache_path("bayesian-merger") / "scorers" / wanted.name
    if path.is_file():
        if (found := sha256_of(path)) != wanted.sha256:
            raise ConfigError(
                f"{path}: SHA-256 {found[:12]}..., not {wanted.sha256[:12]}..., so it is damaged or "
                f"another file; delete it, and it is downloaded again"
            )
        return path
    try:
        with httpx.stream(
            "GET", wanted.address, follow_redirects=True, timeout=_TIMEOUT_S
        ) as answer:
            answer.raise_for_status()
            _save(answer, wanted, path)
    except (httpx.HTTPError, OSError) as error:
        raise ConfigError(
            f"{wanted.name} is not here, and cannot be downloaded from {wanted.address} "
            f"({first_line(error)}); put it at {path}, or name it by {option}"
        ) from error
    return path


def _save(answer: httpx.Response, wanted: File, path: Path) -> None:
    from tqdm.auto import tqdm

    digest = hashlib.sha256()
    size = int(answer.headers.get("content-length", 0)) or None
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(path) as target,
        tqdm(desc=wanted.name, total=size, unit="B", unit_scale=True, leave=False) as bar,
    ):
        for piece in answer.iter_bytes():
            digest.update(piece)
            target.write(piece)
            bar.update(len(piece))
        if digest.hexdigest() != wanted.sha256:
            raise ConfigError(
                f"{wanted.address} is another file than this program knows (SHA-256 "
                f"{digest.hexdigest()[:12]}..., not {wanted.sha256[:12]}...)"
            )


def folder(repository: str, option: str) -> Path:
    """Where the model "owner/name@revision" of the hub is; it is downloaded if it is not here.

    ConfigError if it cannot be had, or if no revision is named, as a repository may change.
    """
    name, _, revision = repository.partition("@")
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f"{repository!r} is no repository; write it as 'owner/name@revision'")
    if not _REVISION.fullmatch(revision):
        raise ConfigError(
            f"{repository!r} names no revision, and a repository may change; write it as "
            f"'{name}@' with the 40 digits of a commit, as its page lists them: "
            f"https://huggingface.co/{name}/commits/main"
        )
    return _snapshot(name, revision, option)


def _snapshot(name: str, revision: str, option: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetched(weights: str, *, here: bool = False) -> Path:
        patterns = ["*.json", "*.txt", "*.model", weights]
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, local_files_only=here
            )
        )

    path: Path | None = None
    # What is here needs no answer of the hub; what is wrong with it is told by the next try.
    with suppress(Exception):
        path = fetched(_WEIGHTS[0], here=True)
    if path is None or not _is_whole(path):
        try:
            _look_for_hub()
            path = fetched(_WEIGHTS[0])
            if not any(path.glob(_WEIGHTS[0])):
                path = fetched(_WEIGHTS[1])
        except Exception as error:  # of which the client has others in each of its versions
            raise ConfigError(_away(name, revision, option, first_line(error))) from error
    if not _is_whole(path):
        raise ConfigError(_away(name, revision, option, "it lacks config.json or weights"))
    for weights in _WEIGHTS:
        for one in path.glob(weights):
            _require_undamaged(one)
    return path


def _look_for_hub() -> None:
    """httpx.HTTPError if the hub does not answer, which takes its client half a minute to say."""
    import httpx
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        httpx.head(constants.ENDPOINT, timeout=_TIMEOUT_S, follow_redirects=True)


def _is_whole(path: Path) -> bool:
    has_weights = any(True for weights in _WEIGHTS for _ in path.glob(weights))
    return has_weights and (path / "config.json").is_file()


def _away(name: str, revision: str, option: str, reason: str) -> str:
    return (
        f"{name} is not here, and cannot be downloaded ({reason}); download config.json, "
        f"preprocessor_config.json, the tokenizer's files (tokenizer.json, or vocab.json and "
        f"merges.txt, or spiece.model) and model.safetensors of "
        f"https://huggingface.co/{name}/tree/{revision} into a folder, and name that by {option}"
    )


def _require_undamaged(path: Path) -> None:
    """ConfigError if a file of the cache is not what its name says: the SHA-256 of the content.

    Without symbolic links, as on Windows, the cache does not tell.
    """
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256_of(blob) != blob.name:
        raise ConfigError(f"{blob} is damaged; delete it, and it is downloaded again")
