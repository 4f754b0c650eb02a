"""The last good copy of a study's file, which is there should the file be damaged."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Set
from contextlib import closing
from itertools import count
from pathlib import Path

from bayesian_merger.checkpoint import whole_file
from bayesian_merger.errors import ConfigError, RunError, first_line

_WAIT_S = 60.0
# What SQLite may leave beside a file, and would take for a part of another of its name.
_BESIDE = ("-journal", "-wal", "-shm")
# Where Optuna's tables hold JSON, which SQLite takes for any text.
_JSON = {
    "study_user_attributes": "value_json",
    "study_system_attributes": "value_json",
    "trial_user_attributes": "value_json",
    "trial_system_attributes": "value_json",
    "trial_params": "distribution_json",
}
_WORDS = {
    ("trials", "state"): {"RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING"},
    ("trial_values", "value_type"): {"FINITE", "INF_POS", "INF_NEG"},
    ("study_directions", "direction"): {"NOT_SET", "MINIMIZE", "MAXIMIZE"},
}


def keep(file: Path) -> None:
    """Copy a study as it stands, in place of the copy before.

    RunError if the study is damaged, whose last copy is kept; OSError if there is no room.
    """
    copy, end = _copy_of(file), time.monotonic() + _WAIT_S

    def hurries(*_: int) -> None:
        """Asked between tries, of which there is no end by itself while the study is locked."""
        if time.monotonic() > end:
            raise sqlite3.OperationalError("database is locked")

    new = file.with_name(f".{copy.name}.{os.getpid()}.part")
    try:
        new.unlink(missing_ok=True)
        with closing(_opened(file)) as study, closing(_opened(new)) as database:
            # A copy that is not whole is thrown away.
            database.execute("pragma journal_mode = off")
            study.backup(database, progress=hurries)
        if fault := _fault(new):
            raise sqlite3.DatabaseError(fault)
        new.replace(copy)
    except sqlite3.OperationalError as error:
        raise OSError(first_line(error)) from error
    except sqlite3.DatabaseError as error:
        raise RunError(
            f"{file} is damaged ({first_line(error)}); the same command goes on from the last good copy"
        ) from error
    finally:
        new.unlink(missing_ok=True)


def mend(file: Path) -> str:
    """Put the last good copy in the place of a study that is damaged or gone, and say so; else nothing.

    A damaged file stays beside it. ConfigError if there is no copy.
    """
    copy, is_gone = _copy_of(file), not file.is_file()
    try:
        has_copy = copy.is_file() and not _fault(copy, of_empty="it is empty")
        # As a loss of power may leave a file; without a copy it is a new study, as one that is gone.
        of_empty = "it is empty" if has_copy else ""
        fault = of_empty if is_gone else _fault(file, of_empty)
    except sqlite3.OperationalError:
        return ""  # it is locked, or the disk is full, which is told when it is opened
    if not fault:
        return ""
    if not has_copy:
        raise ConfigError(
            f"{file} is damaged ({fault}), and there is no good copy of it; move it away to begin anew, "
            f"or choose another --run-dir"
        )
    then = time.strftime("%Y-%m-%d %H:%M", time.localtime(copy.stat().st_mtime))
    goes_on = f"the run goes on from the copy of {then}, and makes again what came later"
    damaged = next(
        path
        for number in count(1)
        if not (path := file.with_name(f"{file.stem}.damaged-{number}{file.suffix}")).exists()
    )
    # The file itself stays until the copy takes its place: killed in between, the next start mends it.
    for suffix in ("", *_BESIDE):
        part = file.with_name(file.name + suffix)
        if part.is_file():
            shutil.copy2(part, damaged.with_name(damaged.name + suffix))
            if suffix:
                part.unlink()
    with whole_file(file) as target, copy.open("rb") as source:
        shutil.copyfileobj(source, target)
    if is_gone:
        return f"{file.name} was missing beside {copy.name}; {goes_on}"
    return f"{file.name} was damaged ({fault}); {goes_on}; the damaged file is {damaged.name}"


def _copy_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.bak")


def _opened(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(file, timeout=_WAIT_S)


def _fault(file: Path, of_empty: str = "") -> str:
    """What is wrong with a database, or nothing; `of_empty` of one without tables.

    sqlite3.OperationalError if it cannot be looked at.
    """
    try:
        with closing(_opened(file)) as database:
            # The index of a table knows its names and numbers as well, so what differs is seen.
            [said] = database.execute("pragma integrity_check(1)").fetchone()
            if said != "ok":
                return str(said).splitlines()[-1]
            tables = {name for (name,) in database.execute("select name from sqlite_master")}
            return _fault_of_texts(database, tables) if tables else of_empty
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return first_line(error)


def _fault_of_texts(database: sqlite3.Connection, tables: Set[str]) -> str:
    """The first text that cannot be read, or nothing."""
    if lacking := sorted({*_JSON, *(table for table, _ in _WORDS)} - tables):
        return f"it has no table {lacking[0]}"
    database.text_factory = bytes
    for (table, column), known in _WORDS.items():
        found = {word for (word,) in database.execute(f"select distinct {column} from {table}")}
        if found - {word.encode() for word in known}:
            return f"a {column} in {table} is none"
    for table, column in _JSON.items():
        for (text,) in set(database.execute(f"select {column} from {table}")):
            try:
                json.loads(str(text, "utf-8"))
            except (ValueError, TypeError):
                return f"a text in {table} cannot be read"
    return ""
