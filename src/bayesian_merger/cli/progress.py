"""What is told of a run while it goes on: a live line, plain lines, lines of JSON, or nothing."""

from __future__ import annotations

import json
import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from bayesian_merger import pairs
from bayesian_merger.cli.asking import Asking, Shown
from bayesian_merger.cli.screen import err, out, plain
from bayesian_merger.data import RIVALS, Estimate, Outcome, Result
from bayesian_merger.desk import Desk
from bayesian_merger.judging import Silence
from bayesian_merger.report import duration, result_json

Manner = Literal["lines", "quiet", "json"]


class Lines:
    """The run's progress in the terminal: live lines where there is one, plain lines in a log.

    The live ones tell what is judged now, how fast and how long still; the best so far beside the
    baselines; the last thing that happened.
    """

    def __init__(self, console: Console, how: Asking, run_dir: Path) -> None:
        self._console, self._how, self._run_dir = console, how, run_dir
        self._shown: list[Shown] = []
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("images"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            # Some make an image a minute.
            speed_estimate_period=3600.0,
        )
        self._task = self._bar.add_task("baselines", total=None, speed="")
        # What is known of "best", "even", "a" and "b", and the last event.
        self._known: dict[str, Estimate] = {}
        self._last = ""
        self._live: Live | None = None
        if console.is_terminal and not how.in_terminal:
            self._live = Live(
                get_renderable=self.live, console=console, transient=True, refresh_per_second=4
            )
        self._begun = time.monotonic()
        self._made = 0
        self._leader: Result | None = None

    def __enter__(self) -> Lines:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        for shown in self._shown:
            shown.close()

    def live(self) -> Group:
        """What is shown now, where there is a terminal."""
        told = [
            f"{_SHORT[name]} {one.mean:.3f} ± {one.se:.3f}"
            for name in _SHORT
            if (one := self._known.get(name))
        ]
        lines = (" · ".join(told), f"last: {self._last}" if self._last else "")
        return Group(
            self._bar,
            *(Text(plain(s), overflow="ellipsis", no_wrap=True, style="dim") for s in lines if s),
        )

    def asked(self, desk: Desk) -> None:
        self._shown.append(Shown(desk, self._how, self._console, self._run_dir))

    def planned(self, images: int) -> None:
        self._bar.update(self._task, total=images)
        self._console.print(f"about {images} images in all")

    def started(self, stage: str, name: str, images: int) -> None:
        self._bar.update(self._task, description=f"{_STAGES[stage]} {name}")

    def judged(self, images: int, made: bool) -> None:
        if made:
            self._made += images
            speed = self._made / max(1e-9, time.monotonic() - self._begun)
            told = f"{speed:.1f}/s" if speed >= 0.95 else f"{1 / speed:.1f} s each"
            self._bar.update(self._task, advance=images, speed=told)
        else:
            # Not work of this process, so it must not count for the time left.
            total = self._bar.tasks[0].total
            if images and total is not None:
                self._bar.update(self._task, total=total - images)

    def finished(self, result: Result, leader: Result | None) -> None:
        self._last = f"{_STAGES[result.stage]} {result.name} " + (
            f"{result.value.mean:.3f} ± {result.value.se:.3f} of {len(result.scores)} images"
            if result.value
            else f"failed: {result.reason}"
        )
        if result.stage == "baseline" and result.value:
            self._known[result.name] = result.value
        line = f"{_STAGES[result.stage]:<10} {result.name:<12} "
        if result.value is None:
            line += f"failed: {result.reason}"
        elif result.stage not in ("explore", "exploit"):
            line += f"{result.value.mean:8.3f} ± {result.value.se:.3f}"
        elif leader is not None and leader.value is not None and leader != self._leader:
            # One trial of few images tells little; what all of them tell is worth a line.
            self._leader = leader
            value = f"{leader.value.mean:.3f} ± {leader.value.se:.3f}"
            self._known["best"] = leader.value
            line = f"after {result.name}: {value} is expected of the merge recommended so far"
        else:
            return
        self._console.print(plain(line), soft_wrap=True)

    def noted(self, text: str) -> None:
        self._last = text
        self._console.print(f"note: {plain(text)}", soft_wrap=True)


_SHORT = {"best": "best", "even": "even", "a": "A", "b": "B"}
_STAGES = {
    "baseline": "baseline",
    "explore": "explore",
    "exploit": "exploit",
    "select": "choose",
    "heldout": "held-out",
}


def summary(outcome: Outcome, run_dir: Path) -> None:
    """Print what a finished run has found."""
    out.print()
    out.print(outcome.verdict(), style="bold", soft_wrap=True)
    for key, gain in outcome.gain.items():
        if outcome.by_pairs:
            told = pairs.sentence(outcome.preferences[key])
            out.print(f"  over {RIVALS[key]:<15} {told}", soft_wrap=True)
            continue
        interval = "error unknown"  # of a single image
        if math.isfinite(gain.low):
            interval = f"95 % interval {gain.low:+.3f} to {gain.high:+.3f}"
        out.print(f"  over {RIVALS[key]:<15} {gain.mean:+.3f}  ({interval})")
    out.print(f"{outcome.images} images in {duration(sum(outcome.seconds.values()))}")
    out.print(f"report: {(run_dir / 'report.html').absolute()}", soft_wrap=True)
    if outcome.best is not None:
        out.print(f"recipe: {(run_dir / 'best.toml').absolute()}", soft_wrap=True)


class Quiet(Silence):
    """Says nothing of a run but what it asks of a person."""

    def __init__(self, how: Asking, run_dir: Path) -> None:
        self._how, self._run_dir = how, run_dir
        self._shown: list[Shown] = []

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        for shown in self._shown:
            shown.close()

    def asked(self, desk: Desk) -> None:
        # Beside what a program may read.
        self._shown.append(Shown(desk, self._how, err, self._run_dir))


class Events(Quiet):
    """Tells of a run by a line of JSON for each event."""

    def planned(self, images: int) -> None:
        _tell("planned", images=images)

    def started(self, stage: str, name: str, images: int) -> None:
        _tell("started", stage=stage, name=name, images=images)

    def judged(self, images: int, made: bool) -> None:
        _tell("judged", images=images, made=made)

    def finished(self, result: Result, leader: Result | None) -> None:
        _tell(
            "finished",
            stage=result.stage,
            name=result.name,
            state=result.state,
            value=result.value and vars(result.value),
            reason=result.reason or None,
            expected=leader and leader.value and vars(leader.value),
        )

    def noted(self, text: str) -> None:
        _tell("noted", text=text)


def observer(manner: Manner, how: Asking, run_dir: Path) -> Lines | Quiet:
    """What tells of a run in a manner."""
    if manner == "json":
        return Events(how, run_dir)
    return Quiet(how, run_dir) if manner == "quiet" else Lines(out, how, run_dir)


def told_at_the_end(manner: Manner, outcome: Outcome, run_dir: Path) -> None:
    """Print the outcome in a manner; the quiet one has the verdict alone."""
    if manner == "json":
        _tell("done", **result_json(outcome), report=str((run_dir / "report.html").absolute()))
    elif manner == "quiet":
        out.print(outcome.verdict(), soft_wrap=True)
    else:
        summary(outcome, run_dir)


def _tell(event: str, **more: Any) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    out.print(json.dumps({"time": now, "event": event, **more}), soft_wrap=True)
    out.file.flush()
