"""A run as tables, for those who have their own tools."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bayesian_merger import album
from bayesian_merger.checkpoint import whole_file
from bayesian_merger.data import Outcome, Prompt, Result
from bayesian_merger.errors import ConfigError
from bayesian_merger.outcome import open_study, read_outcome, yardstick_of
from bayesian_merger.study import Stage, Study
from bayesian_merger.study.storage import storage_errors

Row = Mapping[str, Any]

_STAGES: tuple[Stage, ...] = ("baseline", "select", "heldout")
# Spreadsheets take what begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Results:
    """All that a run has judged, as its study has it: `outcome`, and two tables as lists of rows.

    A row of `trials` is a merge judged in a stage ("baseline", "explore", "exploit", "select",
    "heldout"), with its value, standard error, images, seconds and weights ("alpha.IN00"). A row of
    `images` is one image of it: payload, prompt, seed and settings, its scores ("score.pickscore"), its
    value, the digest of its pixels, and the file below the run folder where it was kept. What is not
    known is None.

        results = Results.load("runs/my")
        pandas.DataFrame(results.images).groupby(["stage", "name"])["value"].mean()
    """

    def __init__(self, folder: Path, study: Study) -> None:
        """ConfigError if the run has not begun."""
        self.outcome: Outcome = read_outcome(folder, study)
        self._folder = folder
        searched = study.searched()
        judged = {stage: study.judged(stage) for stage in _STAGES}
        self._results: list[Result] = [
            *judged["baseline"],
            *searched,
            *judged["select"],
            *judged["heldout"],
        ]
        panels = {
            stage: {p.index: p for p in map(Prompt.from_dict, study.about[name])}
            for stage, name in (
                ("search", "panel"),
                ("select", "select_panel"),
                ("heldout", "heldout_panel"),
            )
        }
        self._panels: dict[str, dict[int, Prompt]] = panels
        self._yardstick = yardstick_of(study)

    @classmethod
    def load(cls, run_dir: Path | str, storage: str | None = None) -> Results:
        """The results of a run folder; ConfigError if it is none.

        `storage` is the search.storage of the run, if it had one.
        """
        folder = Path(run_dir)
        with storage_errors():
            study = open_study(folder, storage)
            try:
                return cls(folder, study)
            finally:
                study.close()

    @cached_property
    def trials(self) -> list[Row]:
        """A row for each merge that was judged, in order."""
        rows = []
        for result in self._results:
            weights = {
                f"{weight}.{block}": value
                for weight, blocks in result.recipe.weights.items()
                for block, value in blocks.items()
            }
            rows.append(
                {
                    "stage": result.stage,
                    "name": result.name,
                    "state": result.state,
                    "reason": result.reason or None,
                    "value": result.value.mean if result.value else None,
                    "se": result.value.se if result.value else None,
                    "images": len(result.scores),
                    **{f"seconds.{phase}": spent for phase, spent in result.seconds.items()},
                    "recipe": result.recipe.digest(),
                    "method": result.recipe.method,
                    **weights,
                }
            )
        return _filled(rows)

    @cached_property
    def images(self) -> list[Row]:
        """A row for each image that was judged, in order."""
        rows = []
        for result in self._results:
            panel = self._panels.get(result.stage, self._panels["search"])
            for index, scores in result.scores.items():
                prompt = result.prompts.get(index, panel.get(index))
                folder = album.folder_of(self._folder, result.stage, result.name)
                file = album.find(folder, index)
                rows.append(
                    {
                        "stage": result.stage,
                        "name": result.name,
                        "image": index,
                        **_told(prompt),
                        **{f"score.{name}": score for name, score in scores.items()},
                        "value": self._yardstick.value(scores) if self._yardstick else None,
                        "digest": result.images.get(index),
                        "file": file and file.relative_to(self._folder).as_posix(),
                    }
                )
        return _filled(rows)

    def write(self, folder: Path | str, kind: str = "csv") -> list[Path]:
        """Write trials and images as tables of a kind, "csv" or "parquet"; the files' paths.

        ConfigError for another kind, or if parquet is asked for without the package that writes it.
        """
        if kind not in ("csv", "parquet"):
            raise ConfigError(f"{kind!r} is no kind of table; csv and parquet are")
        found = []
        for name, rows in (("trials", self.trials), ("images", self.images)):
            path = Path(folder) / f"{name}.{kind}"
            data = _parquet(rows) if kind == "parquet" else _csv(rows)
            with whole_file(path) as file:
                file.write(data)
            found.append(path)
        return found


def _told(prompt: Prompt | None) -> dict[str, Any]:
    """What is known of an image's prompt."""
    names = (
        *("payload", "prompt", "negative_prompt", "seed", "width", "height", "steps"),
        *("cfg_scale", "sampler_name", "scheduler", "weight"),
    )
    return {name: getattr(prompt, name) if prompt else None for name in names}


def _filled(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows with the same keys in the same order, None where one has no such thing."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def _csv(rows: Sequence[Row]) -> bytes:
    """A table with a heading; a text that a spreadsheet would take for a formula begins with a "'"."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(rows[0] if rows else ())
    for row in rows:
        cells = row.values()
        writer.writerow(
            [f"'{x}" if isinstance(x, str) and x.startswith(_FORMULA) else x for x in cells]
        )
    return text.getvalue().encode()


def _parquet(rows: Sequence[Row]) -> bytes:
    try:
        arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ModuleNotFoundError as error:
        raise ConfigError(
            "parquet needs the package pyarrow, which is not installed; pip install pyarrow"
        ) from error
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist([dict(row) for row in rows]), buffer)
    return buffer.getvalue()
