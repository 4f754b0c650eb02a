"""Where studies are kept: an SQLite file, or a server that many machines reach."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import optuna
import psutil
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study._frozen import FrozenStudy
from sqlalchemy import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from bayesian_merger.errors import ConfigError, RunError, TakenError, first_line

SEARCH = "search"
PATIENCE_S = 900.0
"""How long a server is waited for that does not answer."""
_TELL_S = 3.0
_NO_URL = (
    "is no URL of an SQL database; write it as sqlite:///FILE or "
    "postgresql+psycopg://USER@HOST/DATABASE"
)
_CONNECT_S = 10
# By driver. A server of MySQL may ask for any file of this machine, if that is not refused.
_CONNECTED: Mapping[str, Mapping[str, Any]] = {
    "psycopg": {"connect_timeout": _CONNECT_S},
    "psycopg2": {"connect_timeout": _CONNECT_S},
    "pymysql": {"connect_timeout": _CONNECT_S, "local_infile": False},
    "mysqldb": {"connect_timeout": _CONNECT_S, "local_infile": 0},
    "mysqlconnector": {"allow_local_infile": False},
    "mariadbconnector": {"local_infile": False},
}
_CLUSTERS = {"afs", "beegfs", "ceph", "gpfs", "lustre", "fuse.glusterfs", "fuse.juicefs"}
_SHARES = {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afpfs", "fuse.sshfs"}
_CLOUDS = {"webdav", "davfs", "fuse.davfs2", "fuse.gcsfuse", "fuse.rclone", "fuse.s3fs"}
_T = TypeVar("_T")


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn errors of the storage (full disk, damaged file, lost server) into a RunError."""
    try:
        yield
    except UpdateFinishedTrialError as error:
        raise TakenError(
            "another process works on this study; stop it, and the same command goes on"
        ) from error
    except (StorageInternalError, SQLAlchemyError) as error:
        raise RunError(
            f"the study cannot be read or written ({_reason(error)}); what it holds is kept, "
            f"and the same command goes on from there"
        ) from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return first_line(getattr(cause, "orig", None) or cause)


class OneSearch(RDBStorage):  # type: ignore[misc]  # Optuna imports it lazily
    """A storage that shows of all its studies the search of one run alone."""

    run = ""

    @property
    def number(self) -> int:
        """That of the search in the storage."""
        (own,) = self.get_all_studies()
        return int(own._study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        """That of the run of this name, or of the only one there is."""
        wanted = f"{self.run}/{SEARCH}" if self.run else SEARCH
        return [one for one in super().get_all_studies() if one.study_name == wanted]


def search_alone(file: Path, storage: str | None, run: str) -> OneSearch:
    """The search of a run to look at, in an SQLite file, or by its name in the storage of that URL."""
    found = storage_at(storage or url_of(file), OneSearch)
    assert isinstance(found, OneSearch)
    found.run = run if storage else ""
    return found


class PatientStorage(RDBStorage):  # type: ignore[misc]
    """A storage on a server, which is waited for while it does not answer.

    A call that was cut off is made again, so one that adds may add twice where the server was lost after
    it had heard it. `tell` is told when it is waited for, which it is no more once it `is_over`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tell: Callable[[str], None] = lambda text: None
        self.is_over: Callable[[], bool] = lambda: False
        self._is_told = False

    def wait_for(self, call: Callable[[], _T]) -> _T:
        """What the call returns, once the server answers it; its error when that takes too long."""
        begun, pause = time.monotonic(), 0.5
        while True:
            try:
                found = call()
            except (StorageInternalError, SQLAlchemyError) as error:
                if not _is_away(error) or self.is_over() or time.monotonic() - begun > PATIENCE_S:
                    raise
                if not self._is_told and time.monotonic() - begun > _TELL_S:
                    self._is_told = True
                    self.tell(f"the study's database does not answer ({_reason(error)}); waiting")
            else:
                if self._is_told:
                    self._is_told = False
                    self.tell("the study's database answers again")
                return found
            with suppress(SQLAlchemyError):  # what was cut off is not to be gone on with
                self.remove_session()
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def _patient(method: Callable[..., _T]) -> Callable[..., _T]:
    @wraps(method)
    def call(self: PatientStorage, *args: Any, **options: Any) -> _T:
        return self.wait_for(lambda: method(self, *args, **options))

    return call


# All of which Optuna asks a database in a study's life.
for _name in (
    "create_new_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "get_trial",
    "get_trial_id_from_study_id_trial_number",
    "set_trial_state_values",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "_create_new_trial",
    "_get_trials",
    "_set_trial_param",
):
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))


def _is_away(error: Exception) -> bool:
    """Whether it is not the call that is wrong, but the server that cannot answer now."""
    cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
    return isinstance(cause, (OperationalError, InterfaceError, PendingRollbackError))


def is_shared(url: str | None) -> bool:
    """Whether an URL names a server, which several machines may ask."""
    try:
        return url is not None and make_url(url).get_backend_name() != "sqlite"
    except (ArgumentError, ValueError):
        return False  # which is told when it is opened


def storage_at(url: str, kind: type[RDBStorage] = RDBStorage) -> RDBStorage:
    """The storage at an URL that a user gave; ConfigError if it is none or does not answer."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    address = _address(url)
    # Without the query, which may hold a password as well.
    shown = address.set(query={}).render_as_string(hide_password=True)
    options: dict[str, Any] = {}
    try:
        if address.get_backend_name() != "sqlite":
            # A server may drop a connection at night.
            options["pool_pre_ping"] = True
            kind = PatientStorage if kind is RDBStorage else kind
        if arguments := _CONNECTED.get(address.get_driver_name()):
            options["connect_args"] = dict(arguments)
        return _opened(_filled_in(url), options, kind)
    except ArgumentError as error:
        raise ConfigError(f"storage {shown} {_NO_URL}") from error
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigError(
            f"storage {shown}: {_reason(error)}; install what the URL names, for "
            f"postgresql+psycopg:// with pip install 'psycopg[binary]'"
        ) from error
    # No port, no answer, no permission, tables of another version.
    except (SQLAlchemyError, RuntimeError, StorageInternalError, ValueError, TypeError) as error:
        raise ConfigError(f"storage {shown} cannot be opened: {_reason(error)}") from error


def _address(url: str) -> URL:
    """The parts of an URL; ConfigError for one that has none, which may hold a password anywhere."""
    scheme, colon, _ = url.partition("://")
    shown = f"{scheme}{colon}..." if colon and scheme.isascii() and " " not in scheme else "URL"
    address: URL | None = None
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"storage {shown} {_NO_URL}") from error
    except ValueError:  # of a port that is no number
        pass
    # What an unwritten @ or / of a password leaves elsewhere would be shown.
    is_torn = address is None or "@" in f"{address.username}{address.host}{address.database}"
    if address is None or (is_torn and address.get_backend_name() != "sqlite"):
        raise ConfigError(
            f"storage {shown} cannot be opened: it has no host, or no number as its port; write signs "
            f"of a user or a password otherwise: @ as %40, / as %2F, : as %3A"
        )
    return address


def _opened(url: str, options: Mapping[str, Any], kind: type[RDBStorage]) -> RDBStorage:
    for wait in (0.2, 0.5, 1.0):
        try:
            return kind(url, engine_kwargs=dict(options))
        except SQLAlchemyError as error:
            # Another process makes the same tables just now.
            if not re.search("already exists|unique|duplicate", _reason(error), re.IGNORECASE):
                raise
            time.sleep(wait)
    return kind(url, engine_kwargs=dict(options))


def file_of(url: str) -> Path | None:
    """The SQLite file that an URL names; None if it names anything else."""
    file = url.removeprefix("sqlite:///")
    return Path(file) if file != url else None


def is_in(url: str, name: str) -> bool:
    """Whether the storage at `url` holds the run of that name; none is made."""
    file = file_of(url)
    if file and not file.is_file():
        folder = file.absolute().parent
        if not os.access(folder, os.W_OK):
            reason = "cannot be written" if folder.is_dir() else "does not exist"
            raise ConfigError(f"search.storage: the folder {folder} {reason}")
        return False
    storage = storage_at(url)
    try:
        with storage_errors():
            return f"{name}/{SEARCH}" in optuna.get_all_study_names(storage)
    finally:
        close(storage)


def close(storage: BaseStorage) -> None:
    """Let go of a storage's file or connections."""
    storage.remove_session()
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def require_local(path: Path) -> None:
    """ConfigError if an SQLite file would lie in a folder of another machine, which loses data."""
    folder = path.absolute().parent.resolve()
    parts = psutil.disk_partitions(all=True)
    own = [part for part in parts if folder.is_relative_to(part.mountpoint)]
    # Of several mounted on each other the last is to be seen.
    mount = max(reversed(own), key=lambda part: len(part.mountpoint), default=None)
    is_remote = folder.anchor.startswith("\\\\") or (
        mount
        and (
            mount.fstype.lower() in _CLUSTERS | _SHARES | _CLOUDS
            or "remote" in mount.opts.split(",")
        )
    )
    if is_remote:
        kind = f"{mount.fstype} at {mount.mountpoint}" if mount else folder.anchor
        raise ConfigError(
            f"{path} would lie on another machine's disk ({kind}), where SQLite loses data; choose a "
            f"--run-dir on this machine's, or name a database by search.storage"
        )


def url_of(path: Path) -> str:
    """The storage URL of the SQLite file at `path`, whatever characters its folders hold."""
    url = URL.create("sqlite", database=str(path.absolute())).render_as_string()
    return _filled_in(url)


def _filled_in(url: str) -> str:
    """The URL, braces and all, when Optuna has filled in what it takes for a template."""
    return url.replace("{", "{{").replace("}", "}}")
