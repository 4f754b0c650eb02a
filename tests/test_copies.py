"""What becomes of a study whose file is damaged."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from bayesian_merger.errors import ConfigError, RunError
from bayesian_merger.study import Study, copies
from bayesian_merger.study.storage import storage_errors


def told(file: Path) -> object:
    with closing(Study(file)) as study:
        return study.about


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A study that was copied, and then told something more."""
    file = tmp_path / "study.db"
    with closing(Study(file)) as study:
        study.begin({}, {"told": "early" * 2000})
        study.keep_copy()
        study.begin({}, {"told": "late"})
    return file


def overwrite(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8192:28192] = b"nonsense" * 2500
    file.write_bytes(data)


def replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    """A damage to a text, of which SQLite knows nothing."""

    def damage(file: Path) -> None:
        data = file.read_bytes()
        assert old in data
        file.write_bytes(data.replace(old, new))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (overwrite, "(Page"),
        (replaced(b'"told": "l', b'"told": "\xff'), "(a text in study_user_attributes"),
        (replaced(b'{"told"', b'{"told\0'), "(a text in study_user_attributes"),
        (replaced(b"MAXIMIZE", b"MAXIMIZ\xff"), "(a direction in study_directions is none)"),
        (replaced(b"trial_params", b"trial_parans"), "(it has no table trial_params)"),
        (lambda file: file.write_text("<html>"), "(file is not a database)"),
        (lambda file: file.write_bytes(b""), "(it is empty)"),
        (lambda file: file.write_bytes(file.read_bytes()[:50_000]), "(database disk image"),
    ],
)
def test_copy_takes_the_place_of_a_damaged_study(
    file: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(file)
    damaged = file.read_bytes()
    journal = file.with_name("study.db-journal")
    journal.write_bytes(b"of the damaged one")
    note = copies.mend(file)
    assert f"study.db was damaged {said}" in note
    assert len(note.splitlines()) == 1
    assert told(file) == {"told": "early" * 2000}
    assert file.with_name("study.damaged-1.db").read_bytes() == damaged
    assert not journal.exists()
    assert copies.mend(file) == ""
    # A second time it is no other.
    overwrite(file)
    assert "study.damaged-2.db" in copies.mend(file)


def test_copy_takes_the_place_of_a_study_that_is_gone(file: Path) -> None:
    file.unlink()
    note = copies.mend(file)
    assert note.startswith(
        "study.db was missing beside study.db.bak; the run goes on from the copy"
    )
    assert told(file) == {"told": "early" * 2000}
    assert sorted(path.name for path in file.parent.iterdir()) == ["study.db", "study.db.bak"]


@pytest.mark.parametrize(
    "damage",
    [overwrite, replaced(b'"told"', b'"told\xff'), replaced(b'{"told', b"{\0told")],
)
def test_damage_that_a_reader_meets_is_told_with_who_mends_it(
    file: Path, damage: Callable[[Path], None]
) -> None:
    damage(file)
    with (
        pytest.raises(RunError, match=r"the study is damaged .*bayesian-merger run") as said,
        storage_errors(),
    ):
        told(file)
    assert len(str(said.value).splitlines()) == 1


def test_study_that_is_whole_or_new_stays_as_it_is(file: Path) -> None:
    assert copies.mend(file) == ""
    assert told(file) == {"told": "late"}
    assert copies.mend(file.with_name("none.db")) == ""
    file.with_name("new.db").touch()
    assert copies.mend(file.with_name("new.db")) == ""


def test_damaged_study_without_a_good_copy_is_told(file: Path) -> None:
    overwrite(file)
    overwrite(file.with_name("study.db.bak"))
    with pytest.raises(
        ConfigError, match=r"study\.db is damaged \(.*there is no good copy"
    ) as said:
        copies.mend(file)
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize("damage", [overwrite, replaced(b'"told"', b'"told\xff')])
def test_copy_of_a_study_that_is_damaged_is_not_kept(
    file: Path, damage: Callable[[Path], None]
) -> None:
    copy = file.with_name("study.db.bak")
    before = copy.read_bytes()
    damage(file)
    with pytest.raises(RunError, match="the same command goes on from the last good copy"):
        copies.keep(file)
    assert copy.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir()) == ["study.db", "study.db.bak"]


def test_study_that_cannot_be_looked_at_is_left_as_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    monkeypatch.setattr(copies, "_WAIT_S", 0.1)
    with closing(sqlite3.connect(file)) as other:
        other.execute("begin exclusive")
        assert copies.mend(file) == ""
        with pytest.raises(OSError, match="database is locked"):
            copies.keep(file)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before


def test_mending_that_was_cut_off_is_done_by_the_next_start(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overwrite(file)

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", killed)
        with pytest.raises(KeyboardInterrupt):
            copies.mend(file)
    assert "was damaged" in copies.mend(file)
    assert told(file) == {"told": "early" * 2000}
