from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from test_cli import Command
from test_cli import command as command
from test_run import folder as folder
from test_run import start

import bayesian_merger
from bayesian_merger import results
from bayesian_merger.album import digest_of
from bayesian_merger.errors import ConfigError
from bayesian_merger.outcome import open_study, read_outcome
from bayesian_merger.results import Results


def test_tables_hold_what_the_run_has_judged(folder: Path) -> None:
    outcome = start(folder)
    found = bayesian_merger.Results.load(folder / "run")
    assert found.outcome == read_outcome(folder / "run", open_study(folder / "run"))
    assert len(found.images) == outcome.images
    assert {row["stage"] for row in found.trials} >= {"baseline", "explore", "exploit", "heldout"}
    for trial in found.trials:
        own = [
            row
            for row in found.images
            if (row["stage"], row["name"]) == (trial["stage"], trial["name"])
        ]
        assert len(own) == trial["images"]
        assert trial["state"] == "complete"
        assert 0 <= trial["alpha.IN00"] <= 1
    best = next(r for r in found.trials if r["stage"] == "heldout" and r["name"] not in "a even b")
    assert best["value"] == pytest.approx(outcome.heldout["best"].mean)
    one = [r["value"] for r in found.images if r["stage"] == "heldout" and r["name"] == "even"]
    assert sum(one) / len(one) == pytest.approx(outcome.heldout["even"].mean)


def test_pictures_are_found_by_their_row(folder: Path) -> None:
    from PIL import Image

    start(folder)
    kept = [row for row in Results.load(str(folder / "run")).images if row["file"]]
    assert {row["stage"] for row in kept} == {"baseline", "heldout"}
    for row in kept[:3]:
        with Image.open(folder / "run" / row["file"]) as image:
            assert digest_of(image.convert("RGB")) == row["digest"]


def test_run_that_goes_on_has_tables_too(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(folder, "backend.fault=stop", "backend.at=40")
    found = Results.load(folder / "run")
    assert len(found.images) > 0
    assert found.trials[-1]["value"] is None


def test_images_that_no_panel_has_tell_their_prompt(folder: Path) -> None:
    start(folder, "backend.name=painter", "scorers={ nearness = {} }")
    found = Results.load(folder / "run")
    fresh = [row for row in found.images if row["image"] >= 1 << 20]
    assert fresh
    assert all(row["prompt"] and row["seed"] for row in fresh)


def test_export_writes_both_tables(folder: Path, command: Command) -> None:
    start(folder)
    code, told, _ = command("export", folder / "run", "-o", folder / "tables")
    assert code == 0
    found = Results.load(folder / "run")
    assert f"images.csv ({len(found.images)} rows)" in told
    with (folder / "tables" / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.images)
    assert float(rows[-1]["score.likeness"]) == found.images[-1]["score.likeness"]
    code, _, told = command("export", folder / "run", "-o", folder / "tables")
    assert code == 2
    assert "trials.csv exists; choose another folder or give --overwrite" in told


def test_parquet_reads_back(folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    start(folder)
    found = Results.load(folder / "run")
    paths = found.write(folder, "parquet")
    assert parquet.read_table(paths[0]).to_pylist() == [dict(row) for row in found.trials]


def test_tables_are_written_to_a_folder_given_as_text(folder: Path, tmp_path: Path) -> None:
    start(folder)
    results = Results.load(str(folder / "run"))
    assert [path.name for path in results.write(str(tmp_path / "t"))] == [
        "trials.csv",
        "images.csv",
    ]
    with pytest.raises(ConfigError, match="'json' is no kind of table"):
        results.write(str(tmp_path), "json")


def test_parquet_without_its_package_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="parquet needs the package pyarrow"):
        Results.load(folder / "run").write(folder, "parquet")


def test_text_that_looks_like_a_formula_is_none_in_a_spreadsheet() -> None:
    told = results._csv([{"prompt": "=HYPERLINK(1)", "value": -2.5}]).decode()
    assert told == "prompt,value\r\n'=HYPERLINK(1),-2.5\r\n"


def test_folder_that_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        Results.load(tmp_path)
