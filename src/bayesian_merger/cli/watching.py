"""`dashboard`: a run's study in optuna-dashboard."""

from __future__ import annotations

from pathlib import Path

import click

from bayesian_merger import outcome as outcomes
from bayesian_merger.cli.asking import open_browser
from bayesian_merger.cli.screen import err, out
from bayesian_merger.dashboard import Dashboard
from bayesian_merger.errors import ConfigError


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False))
@click.option("--storage", metavar="URL", help="The search.storage of the run, if it had one.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of the page.")
@click.option("--no-browser", is_flag=True, help="Only print the address of the page.")
def dashboard_command(run_dir: Path, storage: str | None, port: int, no_browser: bool) -> None:
    """Show the study of RUN_DIR in optuna-dashboard, running or finished; it changes nothing."""
    if not outcomes.has_study(run_dir, storage):
        raise ConfigError(f"{run_dir}: not a run folder (it has no study.db)")
    shown = Dashboard(run_dir, storage, port)
    out.print(f"the dashboard is at {shown.url}", soft_wrap=True)
    err.print("Ctrl-C ends it")
    if not no_browser:
        open_browser(shown.url)
    shown.serve()
