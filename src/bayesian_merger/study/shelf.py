"""Where the machines of a run put their pictures for each other: one of Optuna's artifact stores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from bayesian_merger.errors import ConfigError, first_line

_S3 = "s3://"
_MOST_BYTES = 1 << 28  # what is larger is no picture


class Shelf:
    """The pictures of one run, at `place`: a folder, or "s3://BUCKET/PREFIX".

    For S3, and what speaks its language, boto3 reads its own settings (AWS_ENDPOINT_URL,
    AWS_ACCESS_KEY_ID and so on).
    """

    def __init__(self, place: str, run: str) -> None:
        """ConfigError if the place cannot be had."""
        if place.startswith(_S3):
            bucket, _, prefix = place.removeprefix(_S3).partition("/")
            self._start = f"{prefix.strip('/')}/{run}" if prefix.strip("/") else run
            self._store: Any = _bucket(bucket)
        else:
            self._start = run
            self._store = _folder(Path(place))

    def put(self, name: str, file: Path) -> None:
        """Store a file under a name; OSError if that cannot be done."""
        with _os_errors(), file.open("rb") as opened:
            self._store.write(f"{self._start}-{name}", opened)

    def has(self, name: str) -> bool:
        """Whether anything is stored under a name; OSError if that is not known."""
        with _os_errors():
            try:
                self._store.open_reader(f"{self._start}-{name}").close()
            except ArtifactNotFound:
                return False
        return True

    def get(self, name: str) -> bytes | None:
        """What is stored under a name, if anything is; OSError if it cannot be read."""
        with _os_errors():
            try:
                with closing(self._store.open_reader(f"{self._start}-{name}")) as opened:
                    data: bytes = opened.read(_MOST_BYTES)
            except ArtifactNotFound:
                return None
        return data


def _bucket(name: str) -> Boto3ArtifactStore:
    where = f"output.artifacts: {_S3}{name}"
    try:
        store = Boto3ArtifactStore(name)
        store.client.head_bucket(Bucket=name)
    except ImportError as error:
        raise ConfigError(f"{where} needs the package boto3; pip install boto3") from error
    except Exception as error:  # boto3 has errors of many kinds
        raise ConfigError(f"{where} cannot be had ({first_line(error)})") from error
    return store


def _folder(path: Path) -> FileSystemArtifactStore:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.artifacts: {path} cannot be made ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"output.artifacts: the folder {path} cannot be written")
    return FileSystemArtifactStore(path)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turn whatever a store raises into an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(first_line(error)) from error
