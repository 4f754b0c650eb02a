"""The benchmark of a night: what bench/faults.py takes for a fault."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_run import folder as folder
from test_run import start

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from faults import audited, grown, main


def test_audit_finds_what_a_run_has_lost_or_doubled(folder: Path) -> None:
    outcome = start(folder)
    results = [r for r in outcome.results if r.stage != "baseline"]
    spent = sum(len(result.scores) for result in results)
    scored = [("a", index) for index in range(outcome.images)]
    assert audited(outcome, results, scored, spent) == []
    assert audited(outcome, results, [*scored, ("a", 0)], spent) == [
        "images scored twice: {('a', 0): 2}"
    ]
    assert audited(outcome, results, scored[1:], spent) == [
        f"{outcome.images - 1} scored, but {outcome.images} count"
    ]
    (what,) = audited(outcome, [replace(results[0], state="failed"), *results[1:]], scored, spent)
    assert what.startswith("trials without a value")
    assert audited(outcome, results, scored, spent + 1) == [
        f"the search has spent {spent} images of {spent + 1}"
    ]
    assert audited(replace(outcome, finished=False), results, scored, spent) == [
        "the run is not finished"
    ]


def test_growth_of_a_process_that_lives_long_is_a_fault(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flat = [(60.0 * minute, 50.0 if minute < 2 else 100.0) for minute in range(60)]
    growing = [(age, held + age / 100) for age, held in flat]
    assert grown({("run", 1): flat, ("worker", 2): flat}) == []
    (what,) = grown({("run", 1): flat, ("worker", 2): growing, ("worker", 3): growing[:8]})
    assert what.startswith("memory grows: worker: ")
    # Of none, or of one that was young, nothing is known.
    assert grown({("worker", 3): growing[:2]}) == []
    assert "run: none lived for more than 120 s" in capsys.readouterr().out


def test_single_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["faults.py", "--workers", "1"])
    with pytest.raises(SystemExit, match="2"):
        main()
