"""Where studies are kept: an SQLite file, or a server that many machines reach."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from sqlalchemy import URL, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from bayesian_merger.errors import ConfigError, RunError, TakenError
from bayesian_merger.errors import shown as value_shown
from bayesian_merger.study.patience import ASKED, Patient, reason

SEARCH = "search"
_NO_URL = (
    "is no URL of an SQL database or a proxy that is known here; write it as sqlite:///FILE, "
    "postgresql+psycopg://USER@HOST/DATABASE, mysql+pymysql://USER@HOST/DATABASE or grpc://HOST:PORT"
)
_PROXY = "grpc"
_CONNECT_S = 10
# What an address may say after its "?". Drivers have options that name libraries to load and files to
# hand over, and the address may be a stranger's; these harm nobody.
_LIBPQ = {
    *("user", "password", "host", "hostaddr", "port", "options", "application_name"),
    *("sslmode", "sslrootcert", "sslcrl", "sslsni", "channel_binding", "gssencmode"),
    *("connect_timeout", "target_session_attrs", "load_balance_hosts", "tcp_user_timeout"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
}
_PYMYSQL = {
    *("charset", "unix_socket", "connect_timeout", "read_timeout", "write_timeout"),
    *("ssl_ca", "ssl_cert", "ssl_key", "ssl_check_hostname"),
}
_QUERIES: Mapping[str, set[str]] = {
    "sqlite": set(),
    "postgresql": _LIBPQ,
    "postgresql+psycopg": _LIBPQ,
    "postgresql+psycopg2": _LIBPQ,
    "mysql+pymysql": _PYMYSQL,
    "mariadb+pymysql": _PYMYSQL,
}
_ATTRIBUTES = {
    f"{of}_{whose}_attributes" for of in ("study", "trial") for whose in ("user", "system")
}
_CLUSTERS = {"afs", "beegfs", "ceph", "gpfs", "lustre", "fuse.glusterfs", "fuse.juicefs"}
_SHARES = {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afpfs", "fuse.sshfs"}
_CLOUDS = {"webdav", "davfs", "fuse.davfs2", "fuse.gcsfuse", "fuse.rclone", "fuse.s3fs"}


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn errors of the storage (full disk, damaged file, lost server) into a RunError."""
    try:
        yield
    except UpdateFinishedTrialError as error:
        raise TakenError(
            "another process works on this study; stop it, and the same command goes on"
        ) from error
    except (StorageInternalError, SQLAlchemyError, JSONDecodeError) as error:
        if _is_damaged(error):
            raise RunError(
                f"the study is damaged ({reason(error)[:200]}); `bayesian-merger run` goes on from its "
                f"last good copy, where there is one"
            ) from error
        raise RunError(
            f"the study cannot be read or written ({reason(error)}); what it holds is kept, "
            f"and the same command goes on from there"
        ) from error


def _is_damaged(error: Exception) -> bool:
    """Whether a file of SQLite is no whole database, or holds a text that cannot be read."""
    if isinstance(error, JSONDecodeError):
        return True
    said = getattr(_cause(error), "orig", None)
    # Other errors of SQLite are of narrower kinds.
    return type(said) is sqlite3.DatabaseError or "Could not decode" in str(said)


def _cause(error: Exception) -> BaseException | None:
    """What the database has said, which Optuna passes on as an error of its own."""
    return error if isinstance(error, SQLAlchemyError) else error.__cause__


def search_alone(file: Path, storage: str | None, run: str) -> BaseStorage:
    """The search of a run to look at, in an SQLite file, or by its name in the storage of that URL.

    Of all studies in the storage it shows that alone.
    """
    opened = storage_at(storage or url_of(file), is_patient=False)
    wanted = f"{run}/{SEARCH}" if storage else SEARCH
    every = opened.get_all_studies
    opened.get_all_studies = lambda: [one for one in every() if one.study_name == wanted]
    return opened


class PatientStorage(
    Patient,
    RDBStorage,  # type: ignore[misc]  # Optuna imports it lazily
    waits=(*ASKED, "_create_new_trial", "_get_trials", "_set_trial_param"),
):
    """A storage in a database on a server."""

    what = "database"

    def _is_away(self, error: Exception) -> bool:
        return isinstance(_cause(error), (OperationalError, InterfaceError, PendingRollbackError))

    def _let_go(self) -> None:
        with suppress(SQLAlchemyError):
            self.remove_session()


def is_shared(url: str | None) -> bool:
    """Whether an URL names a server, which several machines may ask."""
    try:
        return url is not None and make_url(url).get_backend_name() != "sqlite"
    except (ArgumentError, ValueError):
        return False  # which is told when it is opened


def storage_at(url: str, *, is_patient: bool = True) -> BaseStorage:
    """The storage at an URL that a user gave; ConfigError if it is none or does not answer.

    From then on it is waited for if it is on a server, unless that is not to be.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    address = _address(url)
    # Without the query, which may hold a password as well.
    shown = address.set(query={}).render_as_string(hide_password=True)
    if address.get_backend_name() == _PROXY:
        return _behind_proxy(address, shown, is_patient)
    _require_harmless(address, shown)
    options: dict[str, Any] = {}
    kind = RDBStorage
    try:
        if address.get_backend_name() != "sqlite":
            # A server may drop a connection at night.
            options["pool_pre_ping"] = True
            kind = PatientStorage if is_patient else kind
            if "connect_timeout" not in address.query:
                options["connect_args"] = {"connect_timeout": _CONNECT_S}
        return _opened(_filled_in(url), options, kind)
    except ArgumentError as error:
        raise ConfigError(f"storage {shown} {_NO_URL}") from error
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigError(
            f"storage {shown}: {reason(error)}; install what the URL names, for postgresql+psycopg:// "
            f"with pip install 'psycopg[binary]', for mysql+pymysql:// with pip install 'pymysql[rsa]'"
        ) from error
    # No port, no answer, no permission; pymysql raises AttributeError for a charset that is none.
    except (
        *(SQLAlchemyError, RuntimeError, StorageInternalError),
        *(ValueError, TypeError, OSError, AttributeError),
    ) as error:
        raise ConfigError(f"storage {shown} cannot be opened: {reason(error)}") from error


def _require_harmless(address: URL, shown: str) -> None:
    """ConfigError for a database that is not known, or for what its driver should not be told."""
    known = _QUERIES.get(address.drivername)
    if known is None:
        raise ConfigError(f"storage {shown} {_NO_URL}")
    for key in address.query:
        if key not in known:
            # Where an @ comes so late, it may be a piece of a password.
            told = "" if "@" in str(address.query) else f" {value_shown(key)}"
            raise ConfigError(
                f"storage {shown}: its address may not say{told} after the ?; known are "
                f"{', '.join(sorted(known)) or 'none'}"
            )


def _behind_proxy(address: URL, shown: str, is_patient: bool) -> BaseStorage:
    if not address.host or address.username or address.database or address.query:
        raise ConfigError(
            f"storage {_PROXY}://...: a proxy of Optuna's is named by grpc://HOST:PORT alone; it "
            f"knows no users and no databases"
        )
    try:
        # Here, as few have it installed.
        from bayesian_merger.study.proxy import PORT, ProxyStorage
    except (ImportError, RuntimeError) as error:  # none, or one that is too old
        raise ConfigError(
            f"storage {shown} needs the packages grpcio and protobuf ({reason(error)}); pip install "
            f"'bayesian-merger[grpc]'"
        ) from error
    host = f"[{address.host}]" if ":" in address.host else address.host
    try:
        found = ProxyStorage(host, address.port or PORT)
    except StorageInternalError as error:
        raise ConfigError(f"storage {shown} cannot be opened: {reason(error)}") from error
    if not is_patient:
        found.is_over = lambda: True
    return found


def at_file(path: Path) -> RDBStorage:
    """The storage in an SQLite file; ConfigError if it is that of another version."""
    return _opened(url_of(path), {}, RDBStorage)


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
    for wait in (0.2, 0.5, 1.0, None):
        try:
            found = kind(url, engine_kwargs=dict(options), skip_compatibility_check=True)
            break
        except SQLAlchemyError as error:
            # Another process makes the same tables just now.
            is_made = re.search("already exists|unique|duplicate", reason(error), re.IGNORECASE)
            if not is_made or wait is None:
                raise
            time.sleep(wait)
    require_version(found)
    if found.engine.dialect.name in ("mysql", "mariadb"):
        _lengthen(found)
    return found


def require_version(storage: RDBStorage) -> None:
    """ConfigError if the tables of a database are those of another version of Optuna."""
    version = storage.get_current_version()
    if version == storage.get_head_version():
        return
    shown = storage.engine.url.set(query={}).render_as_string(hide_password=True)
    is_older = version in storage.get_all_versions()
    close(storage)
    if is_older:
        raise ConfigError(
            f"storage {shown} has the tables of an older Optuna ({version}); keep a copy, let nothing "
            f"work on it, and bring them up to date: optuna storage upgrade --storage URL"
        )
    raise ConfigError(
        f"storage {shown} has the tables of a newer Optuna ({version}) than is installed here "
        f"({optuna.__version__}); update this program, or name another storage"
    )


def _lengthen(storage: RDBStorage) -> None:
    """Make room in a MySQL for texts longer than 64 KiB, which is all that Optuna's tables have there.

    A panel of many prompts is longer.
    """
    kinds = text(
        "SELECT table_name FROM information_schema.columns WHERE table_schema = DATABASE() "
        "AND column_name = 'value_json' AND data_type = 'text'"
    )
    with storage.engine.begin() as connection:
        short = {name for (name,) in connection.execute(kinds)}
        for table in sorted(short & _ATTRIBUTES):
            connection.execute(text(f"ALTER TABLE {table} MODIFY value_json LONGTEXT"))


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
    elif isinstance(storage, GrpcStorageProxy):
        storage.close()


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
