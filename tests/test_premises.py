"""Run folders of strangers, in which links lead to files of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from bayesian_merger import run
from bayesian_merger.errors import ConfigError
from bayesian_merger.outcome import open_study
from bayesian_merger.premises import require_plain


@pytest.mark.parametrize(
    "name",
    [
        *(".lock", "study.db", "study.db.bak", "study.db-wal", "study.id", "ratings.jsonl"),
        *("best.toml", "best.safetensors", "report.html", "result.json", ".x.12.part"),
        *("images", "images/trial", "images/trial/0001", "rated", "figures", "front", "workers"),
        *("workers/1.log", "Ratings.jsonl"),
    ],
)
def test_link_in_a_run_folder_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine\n")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(mine)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(ConfigError, match=rf"{link.name} is a link"),
        run.locked(tmp_path / "run"),
    ):
        pass
    with pytest.raises(ConfigError, match=rf"{link.name} is a link"):
        open_study(tmp_path / "run")
    assert mine.read_text() == "mine\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_run_folder_may_be_a_link_and_hold_links_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "disk" / "images" / "trial").mkdir(parents=True)
    (tmp_path / "run").symlink_to("disk")
    (tmp_path / "run" / "models").symlink_to("../elsewhere")
    require_plain(tmp_path / "run")
    with run.locked(tmp_path / "run"):
        pass
    require_plain(tmp_path / "none")
