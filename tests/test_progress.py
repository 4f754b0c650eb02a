"""What is told of a run while it goes on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from outcomes import a_result, baselines
from rich.console import Console

from bayesian_merger.cli.asking import Asking
from bayesian_merger.cli.progress import Lines
from bayesian_merger.data import Result


def lines_on(file: io.StringIO, tmp_path: Path, *, is_terminal: bool) -> Lines:
    console = Console(file=file, force_terminal=is_terminal, width=120, color_system=None)
    return Lines(console, Asking(), tmp_path)


def shown(lines: Lines) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    with console.capture() as told:
        console.print(lines.live())
    return told.get()


def a_leader(value: float) -> Result:
    return a_result("recommended", value=value)


def test_live_lines_tell_trial_images_best_baselines_and_the_last_event(tmp_path: Path) -> None:
    lines = lines_on(io.StringIO(), tmp_path, is_terminal=True)
    lines.planned(40)
    for baseline in baselines():
        lines.finished(baseline, None)
    lines.started("explore", "trial 3", 2)
    lines.judged(10, made=True)
    lines.finished(a_result("trial 3", "explore", 7.5), a_leader(8.06))
    told = shown(lines).splitlines()
    assert "explore trial 3" in told[0]
    assert "10/40 images" in told[0]
    assert "/s" in told[0]
    assert told[1] == (
        "best 8.060 ± 0.200 · even 7.910 ± 0.200 · A 7.310 ± 0.200 · B 7.180 ± 0.200"
    )
    assert told[2].startswith("last: explore trial 3 7.500 ± 0.200")
    lines.finished(a_result("trial 4", reason="out of memory"), a_leader(8.06))
    assert "last: exploit trial 4 failed: out of memory" in shown(lines)
    lines.noted("the search goes on")
    assert "last: the search goes on" in shown(lines)


def test_slow_images_have_a_time_left_and_seconds_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("rich.progress.monotonic", lambda: now[0], raising=False)
    lines = lines_on(io.StringIO(), tmp_path, is_terminal=True)
    lines._bar.get_time = lambda: now[0]
    lines.planned(100)
    lines.started("explore", "trial 1", 1)
    for _ in range(5):
        now[0] += 60.0
        lines.judged(1, made=True)
    told = shown(lines).splitlines()[0]
    assert "60.0 s each" in told
    assert "left --:--" not in told
    assert "left 1:3" in told  # 95 images of a minute


def test_long_event_does_not_take_a_second_line(tmp_path: Path) -> None:
    lines = lines_on(io.StringIO(), tmp_path, is_terminal=True)
    lines.noted("a reason that is told at length " * 20)
    assert len(shown(lines).splitlines()) == 2


@pytest.mark.parametrize("is_terminal", [True, False])
def test_only_a_terminal_has_live_lines(tmp_path: Path, is_terminal: bool) -> None:
    file = io.StringIO()
    with lines_on(file, tmp_path, is_terminal=is_terminal) as lines:
        lines.finished(baselines()[0], None)
    assert ("\x1b[" in file.getvalue()) is is_terminal
    assert "baseline   a               7.310 ± 0.200" in file.getvalue()
