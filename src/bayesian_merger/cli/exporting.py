"""`export`: a run as tables."""

from __future__ import annotations

from pathlib import Path

import click

from bayesian_merger.cli.screen import out
from bayesian_merger.errors import ConfigError
from bayesian_merger.results import Results


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False))
@click.option("--storage", metavar="URL", help="The search.storage of the run, if it had one.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["csv", "parquet"]),
    default="csv",
    show_default=True,
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="The folder for trials.csv and images.csv (default: here).",
)
@click.option("--overwrite", is_flag=True, help="Replace them if they exist.")
def export_command(
    run_dir: Path, storage: str | None, kind: str, output: Path, overwrite: bool
) -> None:
    """Write all that RUN_DIR has judged as two tables: its trials with their weights, its images."""
    for path in (output / f"{name}.{kind}" for name in ("trials", "images")):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; choose another folder or give --overwrite")
    found = Results.load(run_dir, storage)
    for path, rows in zip(found.write(output, kind), (found.trials, found.images), strict=True):
        out.print(f"wrote {path} ({len(rows)} rows)", soft_wrap=True)
