"""The commands of a search: demo, init, check, run, fork, import, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from bayesian_merger import adopt, run, tryout, warm
from bayesian_merger import config as configuration
from bayesian_merger import outcome as outcomes
from bayesian_merger.backends import Backend
from bayesian_merger.cli.asking import Asking, asking_options
from bayesian_merger.cli.progress import Manner, observer, summary, told_at_the_end
from bayesian_merger.cli.screen import err, out, plain
from bayesian_merger.cli.working import hiring
from bayesian_merger.crew import Hands
from bayesian_merger.data import Outcome
from bayesian_merger.errors import ConfigError
from bayesian_merger.report import duration
from bayesian_merger.scorers import Attended
from bayesian_merger.setup import METHOD, Setup, prepare
from bayesian_merger.study.proposals import MOST_IMAGES
from bayesian_merger.study.storage import storage_errors

_PACKAGE = Path(__file__).parents[1]
_USUAL_ASKING = Asking()
# What a person takes for an answer, about.
_ANSWER_S = 5


_run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run (default: runs/CONFIG_FILE's name, beside it); the same folder goes on.",
)


def _run_options(command: Any) -> Any:
    options = [
        click.option("--images", type=int, help="Images that the search may spend."),
        click.option("--init-points", "--init_points", type=int, help="Exploring trials."),
        click.option("--n-iters", "--n_iters", type=int, help="Trials after the exploration."),
        click.option(
            "--batch-size", "--batch_size", type=int, help="Images per payload and trial."
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Any key of the configuration; may be repeated.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _manner_options(command: Any) -> Any:
    command = click.option(
        "-q", "--quiet", "manner", flag_value="quiet", help="Say the verdict alone."
    )(command)
    return click.option(
        "--json", "manner", flag_value="json", help="A line of JSON for each event."
    )(command)


def _load(path: Path, overrides: Sequence[str], **counts: int | None) -> configuration.Config:
    return configuration.load(path, _all_overrides(overrides, **counts))


def _all_overrides(
    overrides: Sequence[str],
    images: int | None,
    init_points: int | None,
    n_iters: int | None,
    batch_size: int | None,
) -> list[str]:
    """The overrides, and those for which there are options."""
    named = {
        "search.images": images,
        "search.init_points": init_points,
        "search.n_iters": n_iters,
        "panel.batch_size": batch_size,
    }
    given = [f"{key}={value}" for key, value in named.items() if value is not None]
    return [*overrides, *given]


@click.command()
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-run"),
    show_default=True,
    help="Folder of the run; the same folder goes on with it.",
)
@_manner_options
@_run_options
def demo_command(
    run_dir: Path, manner: Manner | None, overrides: Sequence[str], **counts: int | None
) -> None:
    """Run the embedded example: two small checkpoints, a scorer, a better merge, a report."""
    torch.set_num_threads(1)  # so small a model is slower on several
    path = _PACKAGE / "demo" / "config.toml"
    _run(_prepared(_load(path, overrides, **counts), path, "demo"), run_dir, manner or "lines")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path())
def init_command(folder: Path) -> None:
    """Write a commented configuration and example payloads into FOLDER (default: here)."""
    source = _PACKAGE / "templates" / "init"
    files = sorted(path for path in source.rglob("*") if path.is_file())
    taken = [
        folder / p.relative_to(source) for p in files if (folder / p.relative_to(source)).exists()
    ]
    if taken:
        raise ConfigError(f"{taken[0]} exists already and is left as it is; choose another folder")
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        out.print(f"wrote {target}", soft_wrap=True)
    config = folder / "config.toml"
    out.print(f"next: edit it, then bayesian-merger check {config}", soft_wrap=True)


@click.command()
@click.argument("config_file", type=click.Path(path_type=Path))
@_run_dir_option
@_run_options
def check_command(
    config_file: Path, run_dir: Path | None, overrides: Sequence[str], **counts: int | None
) -> None:
    """Check all that CONFIG_FILE names, make a merge and a few images, say how long a run takes."""
    setup = _prepared(_load(config_file, overrides, **counts), config_file)
    folder = run_dir or _default_run_dir(config_file)
    run.check_folder(setup, folder)
    for note in setup.notes:
        out.print(f"note: {plain(note)}", soft_wrap=True)
    out.print("every file is in order; making a merge and a batch of images ...", soft_wrap=True)
    with _using(setup.backend):
        tried = tryout.try_out(setup)
    scores = (f"{name} {score:.3f}" for name, score in tried.scores.items())
    shown = ", ".join(scores) or "you are asked for it in the run"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for model, letter in zip(setup.merger.models, "ABC", strict=False):
        table.add_row(f"model {letter}", f"{model.name} ({setup.merger.architecture.title})")
    plan = setup.plan
    methods = " or ".join(plan.choices.get(METHOD, (setup.config.merge.method,)))
    table.add_row("search", f"{len(plan.bounds)} weights, {methods}, {plan.optimiser}")
    table.add_row("panel", f"{len(setup.panel)} images from {len(_payloads(setup))} payloads")
    table.add_row("trials", f"{plan.n_trials}, {plan.n_images} images")
    table.add_row("one merge", f"{tried.merge_s:.2f} s")
    table.add_row("one image", f"{tried.image_s:.2f} s (score: {shown})")
    if tried.followed:
        price = tried.followed_s / tried.image_s
        told = f"{tried.followed_s:.2f} s, {price:.1f} times that of one without"
        table.add_row("with gradient", told)
    table.add_row("whole run", f"{tried.images} images, about {duration(tried.run_s)}")
    if any(isinstance(one, Attended) for one in setup.scorers.values()):
        what = "pairs to choose from" if setup.comparer else "pictures to mark"
        n_asked = setup.n_questions()
        pace = f"{duration(n_asked * _ANSWER_S)} at {_ANSWER_S} s each"
        table.add_row("for you", f"about {n_asked} {what}, {pace}")
    table.add_row("run folder", str(folder))
    out.print(table)
    for note in tried.notes:
        out.print(f"note: {plain(note)}", soft_wrap=True)


@click.command()
@click.argument("config_file", type=click.Path(path_type=Path))
@_run_dir_option
@click.option(
    "--more",
    type=click.IntRange(0, MOST_IMAGES),
    help="Images to spend beyond those of a finished run; said again, it goes on with them. With 0 "
    "no more than the configuration says.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Processes that make images side by side (default: one for each GPU).",
)
@_manner_options
@asking_options
@_run_options
def run_command(
    config_file: Path,
    run_dir: Path | None,
    manner: Manner | None,
    more: int | None,
    workers: int | None,
    port: int,
    no_browser: bool,
    terminal: bool,
    overrides: Sequence[str],
    **counts: int | None,
) -> None:
    """Search the best merge as CONFIG_FILE says; the same command resumes a stopped run."""
    config = _load(config_file, overrides, **counts)
    folder = run_dir or _default_run_dir(config_file)
    if more is not None and not outcomes.has_study(folder, config.search.storage):
        raise ConfigError(f"{folder}: there is no run to extend")
    how = Asking(port, not no_browser, terminal)
    setup = _prepared(config, config_file)
    hire = hiring(workers, config_file, _all_overrides(overrides, **counts), setup, folder)
    _run(setup, folder, manner or "lines", more, how, hire)


def _run(
    setup: Setup,
    run_dir: Path,
    manner: Manner,
    more: int | None = None,
    how: Asking = _USUAL_ASKING,
    hire: Callable[[], Hands] | None = None,
) -> None:
    page = run_dir / "report.html"
    with _using(setup.backend), observer(manner, how, run_dir) as watching:
        try:
            outcome = run.run(setup, run_dir, watching, more, hire)
        except KeyboardInterrupt:
            if page.is_file():
                err.print(f"report so far: {page.absolute()}", soft_wrap=True)
            raise
    told_at_the_end(manner, outcome, run_dir)
    _draw(outcome, run_dir)


def _draw(outcome: Outcome, run_dir: Path) -> None:
    """Write the figures; what cannot be written takes nothing from the outcome."""
    try:
        outcomes.write_figures(outcome, run_dir)
    except OSError as error:  # on Windows, a program that has one open
        err.print(f"note: a figure could not be written ({plain(str(error))})", soft_wrap=True)


@contextmanager
def _using(engine: Backend) -> Iterator[None]:
    """Close the back end afterwards, and say so where that has to wait for a server."""
    with closing(engine):
        try:
            yield
        except KeyboardInterrupt:
            if getattr(engine, "is_remote", False):
                err.print("stopping, when the server has ended what it is at ...")
            raise


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False))
@click.option("--storage", metavar="URL", help="The search.storage of the run, if it had one.")
def report_command(run_dir: Path, storage: str | None) -> None:
    """Write the report and the figures of RUN_DIR again, from its study alone."""
    with storage_errors():
        found = outcomes.read_outcome(run_dir, outcomes.open_study(run_dir, storage))
        is_alive = run.is_alive(run_dir, storage)
    outcomes.write_outcome(found, run_dir)
    outcomes.write_page(found, run_dir, is_alive=is_alive)
    summary(found, run_dir)
    _draw(found, run_dir)


@click.command()
@click.argument("old_run", type=click.Path(path_type=Path, file_okay=False))
@click.argument("config_file", type=click.Path(path_type=Path))
@_run_dir_option
@click.option("--storage", metavar="URL", help="The search.storage of OLD_RUN, if it had one.")
@_run_options
def fork_command(
    old_run: Path,
    config_file: Path,
    run_dir: Path | None,
    storage: str | None,
    overrides: Sequence[str],
    **counts: int | None,
) -> None:
    """Begin the run of CONFIG_FILE with what OLD_RUN has judged, by another panel or other scorers."""
    folder = run_dir or _default_run_dir(config_file)
    setup = _prepared(_load(config_file, overrides, **counts), config_file)
    with closing(setup.backend):
        brought = warm.fork(old_run, setup, folder, storage)
    if brought.merges:
        rescored = f", {brought.rescored} of them judged anew" if brought.rescored else ""
        out.print(
            f"{brought.merges} merges with {brought.scores} scores, {brought.of_panel} of images of "
            f"the new panel{rescored}"
        )
    _say_begun(brought, config_file, run_dir, bool(overrides or any(counts.values())))


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("config_file", type=click.Path(path_type=Path))
@_run_dir_option
@_run_options
def import_command(
    file: Path,
    config_file: Path,
    run_dir: Path | None,
    overrides: Sequence[str],
    **counts: int | None,
) -> None:
    """Bring the settings, or the log, of sd-webui-bayesian-merger.

    From its conf/config.yaml or config.ini, or the folder with it, CONFIG_FILE is written. With a log,
    the .json of its bayes, the run of CONFIG_FILE begins with the best merges in it.
    """
    if file.is_dir():
        file = adopt.settings(file)
    if file.suffix.lower() in adopt.SUFFIXES:
        if run_dir or overrides or any(count is not None for count in counts.values()):
            raise ConfigError(f"{file}: settings take no options; change {config_file} afterwards")
        _adopt(file, config_file)
        return
    if file.suffix.lower() != ".json":
        told = "neither settings (.yaml, .yml, .ini) nor a log (.json) of sd-webui-bayesian-merger"
        raise ConfigError(f"{file}: {told if file.exists() else 'no such file'}")
    folder = run_dir or _default_run_dir(config_file)
    setup = _prepared(_load(config_file, overrides, **counts), config_file)
    with closing(setup.backend):
        brought = warm.import_log(file, setup, folder)
    _say_begun(brought, config_file, run_dir, bool(overrides or any(counts.values())))


def _adopt(settings: Path, config_file: Path) -> None:
    if config_file.exists():
        raise ConfigError(f"{config_file} exists already and is left as it is; name another")
    text, notes = adopt.adopted(settings)
    try:
        config_file.parent.mkdir(parents=True, exist_ok=True)
        with config_file.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{config_file}: cannot be written ({error.strerror})") from error
    for note in notes:
        out.print(f"note: {plain(note)}", soft_wrap=True)
    out.print(f"wrote {config_file}", soft_wrap=True)
    out.print(f"next: look it over, then bayesian-merger check {config_file}", soft_wrap=True)


def _prepared(config: configuration.Config, path: Path, title: str = "") -> Setup:
    with out.status("opening models, scorers and the back end"):
        return prepare(config, path.absolute().parent, title or path.stem)


def _say_begun(
    brought: warm.Brought, config_file: Path, run_dir: Path | None, has_more: bool
) -> None:
    if brought.starts:
        out.print(f"merges that are tried first: {brought.starts}")
    for reason, n in brought.left_out.items():
        out.print(f"note: left out as {plain(reason)}: {n}", soft_wrap=True)
    where = f" --run-dir {run_dir}" if run_dir else ""
    more = ", and the same further options" if has_more else ""
    out.print(f"next: bayesian-merger run {config_file}{where}{more}", soft_wrap=True)


def _payloads(setup: Setup) -> set[str]:
    return {prompt.payload for prompt in setup.panel}


def _default_run_dir(config_file: Path) -> Path:
    return config_file.absolute().parent / "runs" / config_file.stem
