"""The command line: arguments, progress, exit codes; the only module that prints.

Exit codes: 0 done, 1 the run could not go on, 2 bad input and nothing started, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

# A thread that waits for its turn by spinning starves the others on a busy machine: without this,
# two programs on two cores were seen to take a hundred times as long. Read once, when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bayesian_merger import __version__, methods, recipes, run
from bayesian_merger import config as configuration
from bayesian_merger import outcome as outcomes
from bayesian_merger.backends import backend
from bayesian_merger.blocks import ARCHITECTURES
from bayesian_merger.checkpoint import PRECISIONS
from bayesian_merger.curves import CURVES
from bayesian_merger.data import RIVALS, Model, Outcome, Recipe, Result
from bayesian_merger.errors import CheckpointError, ConfigError, MergerError
from bayesian_merger.merge import Merged, Merger, check_recipe, n_used, open_model
from bayesian_merger.methods import mecha
from bayesian_merger.registry import import_file
from bayesian_merger.report import duration
from bayesian_merger.scorers import scorer
from bayesian_merger.setup import Setup, prepare
from bayesian_merger.space import PRESETS

_PACKAGE = Path(__file__).parent
# What is printed holds names and reasons from files, which are not markup.
_out = Console(highlight=False, markup=False, emoji=False)
_err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def main() -> NoReturn:
    """Run the command line; every error the user can act on is one line and an exit code."""
    # Cut pipes and old consoles cannot show every character; a "?" is better than a stack trace.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    stopped: list[int] = []

    def stop(number: int, _: object) -> NoReturn:
        stopped.append(number)
        raise KeyboardInterrupt

    # A closed terminal or a shutdown stops the program as Ctrl-C does, which cleans up.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        _commands.main(standalone_mode=False)
        sys.exit(0)
    except click.exceptions.Abort:
        _interrupted()
    except KeyboardInterrupt:
        _interrupted()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (ConfigError, CheckpointError) as error:
        _complain(error, 2)
    except MergerError as error:
        _complain(error, 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}; the same command goes on from here", 1)
    except Exception:
        # Compiled code may turn an interruption into an error of its own.
        if stopped:
            _interrupted()
        raise


def _complain(error: object, code: int) -> NoReturn:
    for line in str(error).splitlines():
        _err.print(Text.assemble(("error: ", "bold red"), _plain(line)), soft_wrap=True)
    sys.exit(code)


def _plain(text: str) -> str:
    """`text` without what a terminal would obey: names from files are anybody's."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _interrupted() -> NoReturn:
    resumes = sys.argv[1:2] in (["run"], ["demo"])
    _err.print("stopped; the same command goes on from here" if resumes else "stopped")
    sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="bayesian-merger")
def _commands() -> None:
    """Find the merge of Stable Diffusion checkpoints that makes the best images."""


def _run_options(command: Any) -> Any:
    options = [
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


def _load(
    path: Path,
    overrides: Sequence[str],
    init_points: int | None,
    n_iters: int | None,
    batch_size: int | None,
) -> configuration.Config:
    named = {
        "search.init_points": init_points,
        "search.n_iters": n_iters,
        "panel.batch_size": batch_size,
    }
    given = [f"{key}={value}" for key, value in named.items() if value is not None]
    return configuration.load(path, [*overrides, *given])


@_commands.command()
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-run"),
    show_default=True,
    help="Folder of the run; the same folder goes on with it.",
)
@_run_options
def demo(run_dir: Path, overrides: Sequence[str], **counts: int | None) -> None:
    """Run the embedded example: two small checkpoints, a scorer, a better merge, a report."""
    path = _PACKAGE / "demo" / "config.toml"
    config = _load(path, overrides, **counts)
    _run(config, path.parent, "demo", run_dir)


@_commands.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path())
def init(folder: Path) -> None:
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
        _out.print(f"wrote {target}", soft_wrap=True)
    config = folder / "config.toml"
    _out.print(f"next: edit it, then bayesian-merger check {config}", soft_wrap=True)


@_commands.command()
@click.argument("config_file", type=click.Path(path_type=Path))
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False))
@_run_options
def check(
    config_file: Path, run_dir: Path | None, overrides: Sequence[str], **counts: int | None
) -> None:
    """Check all that CONFIG_FILE names, make a merge and a few images, say how long a run takes."""
    config = _load(config_file, overrides, **counts)
    setup = prepare(config, config_file.absolute().parent, config_file.stem)
    folder = run_dir or _default_run_dir(config_file)
    run.check_folder(setup, folder)
    for warning in setup.warnings:
        _out.print(f"note: {warning}", soft_wrap=True)
    _out.print("every file is in order; making a merge and a batch of images ...", soft_wrap=True)
    try:
        tried = run.try_out(setup)
    finally:
        setup.backend.close()
    shown = ", ".join(f"{name} {score:.3f}" for name, score in tried.scores.items())
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for model, letter in zip(setup.merger.models, "ABC", strict=False):
        table.add_row(f"model {letter}", f"{model.name} ({setup.merger.architecture.title})")
    table.add_row("search", f"{len(setup.plan.space.parameters)} weights, {config.merge.method}")
    table.add_row(
        "panel", f"{len(setup.panel)} images a trial from {len(_payloads(setup))} payloads"
    )
    table.add_row("one merge", f"{tried.merge_s:.2f} s")
    table.add_row("one image", f"{tried.image_s:.2f} s (score: {shown})")
    table.add_row("whole run", f"{tried.images} images, about {duration(tried.run_s)}")
    table.add_row("run folder", str(folder))
    _out.print(table)


@_commands.command(name="run")
@click.argument("config_file", type=click.Path(path_type=Path))
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run (default: runs/CONFIG_FILE's name, beside it); the same folder goes on.",
)
@_run_options
def run_command(
    config_file: Path, run_dir: Path | None, overrides: Sequence[str], **counts: int | None
) -> None:
    """Search the best merge as CONFIG_FILE says; the same command resumes a stopped run."""
    config = _load(config_file, overrides, **counts)
    folder = run_dir or _default_run_dir(config_file)
    _run(config, config_file.absolute().parent, config_file.stem, folder)


def _run(config: configuration.Config, base: Path, title: str, run_dir: Path) -> None:
    with _out.status("opening models, scorers and the back end"):
        setup = prepare(config, base, title)
    observer = _Progress(_out)
    try:
        with observer:
            outcome = run.run(setup, run_dir, observer)
    finally:
        setup.backend.close()
    _summary(outcome, run_dir)


@_commands.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The merge: a .safetensors file."
)
@click.option("--method", "method_name", default="weighted_sum", show_default=True)
@click.option(
    "--alpha", help="A number, a preset (GRAD_V), or one number for each block: 0.1,0.2,..."
)
@click.option("--beta", help="The same for methods that have it.")
@click.option("--alpha-blocks", help="Numbers for the blocks; without base, that keeps --alpha.")
@click.option("--beta-blocks", help="The same for beta.")
@click.option(
    "-w",
    "--weight",
    "weights",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any weight: density=0.3, IN00_alpha=0.7, TE2_alpha=0; may be repeated.",
)
@click.option(
    "--vae",
    type=click.Choice(["a", "b", "base"]),
    default="a",
    show_default=True,
    help="Whose VAE; base merges it with the weight of base.",
)
@click.option(
    "--precision", type=click.Choice(list(PRECISIONS)), default="fp16", show_default=True
)
@click.option("--clip", is_flag=True, help="Keep each value between A's and B's.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of methods with chance.")
@click.option("--dry-run", is_flag=True, help="Say what would happen to which block, and stop.")
@click.option(
    "--models-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where a recipe's models lie, if not where it says (default: the recipe's folder).",
)
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Python file with a method of your own; it is run.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
def merge(
    files: Sequence[Path],
    output: Path | None,
    plugins: Sequence[Path],
    models_dir: Path | None,
    dry_run: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Merge models A B [C ...], or rebuild the merge of a recipe (best.toml), bit for bit.

    Models are checkpoints (.safetensors, .ckpt), diffusers folders or, from B on, LoRAs.
    """
    start = time.monotonic()
    for plugin in plugins:
        import_file(plugin)
    if output is None and not dry_run:
        raise ConfigError("name the merge's file with -o, or see what it would be with --dry-run")
    if files[0].suffix.lower() == ".toml":
        context = click.get_current_context()
        given = [
            parameter.opts[0]
            for parameter in context.command.params
            if parameter.name in options
            and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        ]
        if given or len(files) > 1:
            raise ConfigError(
                f"{files[0]} is a recipe, which says all; leave out {(given or files[1:])[0]}"
            )
        recipe = recipes.read_toml(files[0])
        merger = recipes.open_models(recipe, models_dir or files[0].absolute().parent)
    else:
        merger = Merger([open_model(path) for path in files])
        merger.require_different(by_content=not dry_run)
        # To know a file by its SHA-256 it must be read whole, which only takes time here.
        unread = tuple(Model(model.name, "") for model in merger.models)
        recipe = _recipe_of(merger, unread if dry_run else merger.references(), **options)
    if output is not None:
        _require_free(output, overwrite, merger)
    merged = merger.merge(recipe)
    for note in merger.notes:
        _out.print(f"note: {_plain(note)}", soft_wrap=True)
    if dry_run:
        _out.print(_plan_table(merger, merged))
        return
    assert output is not None
    merged.save(output)
    size, spent = output.stat().st_size / 1e6, duration(time.monotonic() - start)
    _out.print(f"wrote {output} ({size:.1f} MB in {spent})", soft_wrap=True)


def _recipe_of(
    merger: Merger,
    models: tuple[Model, ...],
    method_name: str,
    weights: Sequence[str],
    **options: Any,
) -> Recipe:
    """The recipe that the options of `merge` describe; ConfigError if they describe none."""
    given = [(key, options[key]) for key in ("alpha", "beta") if options[key] is not None]
    blocks = {key: options[f"{key}_blocks"] for key in ("alpha", "beta")}
    given += [(f"{key}_blocks", text) for key, text in blocks.items() if text is not None]
    for text in weights:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--weight {text}: write it as NAME=VALUE")
        given.append((name.strip(), value.strip()))
    if n_used(methods.get(method_name), method_name, len(merger.models)) < len(merger.models):
        raise ConfigError(
            f"{method_name} merges {methods.n_models(methods.get(method_name))} models, "
            f"but {len(merger.models)} are given"
        )
    recipe = Recipe(
        method=method_name,
        architecture=merger.architecture.name,
        models=models,
        weights=recipes.parse_weights(merger, method_name, given),
        vae=options["vae"],
        precision=options["precision"],
        clip=options["clip"],
        seed=options["seed"],
    )
    check_recipe(recipe)
    return recipe


def _require_free(output: Path, overwrite: bool, merger: Merger) -> None:
    """ConfigError unless the merge may be written to `output`."""
    if output.suffix.lower() != ".safetensors":
        raise ConfigError(f"{output}: name the output .safetensors")
    try:
        exists, place = output.exists(), output.resolve()
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror})") from error
    if output.is_dir() or (exists and not overwrite):
        raise ConfigError(f"{output} exists; choose another name or give --overwrite")
    for model in merger.models:
        # A model may be a folder, whose files are the model as well.
        if place.is_relative_to(model.path.resolve()) or (exists and output.samefile(model.path)):
            raise ConfigError(f"{output} is one of the models or in it; choose another name")


def _plan_table(merger: Merger, merged: Merged) -> Table:
    """What happens to each block."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("block", "tensors", "MB", "merged with"):
        table.add_column(heading, justify="right" if heading in ("tensors", "MB") else "left")
    rows: dict[tuple[str, str], list[int]] = {}
    for name, entry in merged.layout.items():
        place, weights = merger.places[name], merged.weights(name)
        shown = ", ".join(f"{k} {v:g}" for k, v in (weights or {}).items())
        how = (shown or merged.recipe.method) if weights is not None else "copied"
        rows.setdefault((place.part or place.block or "other", how), []).append(entry.n_bytes)
    architecture = merger.architecture
    order = [*architecture.blocks, *architecture.parts, "other"]
    for (block, how), sizes in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        table.add_row(block, str(len(sizes)), f"{sum(sizes) / 1e6:.1f}", how)
    return table


@_commands.command()
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False))
def report(run_dir: Path) -> None:
    """Write the report and the figures of RUN_DIR again, from its study alone."""
    found = outcomes.read_outcome(run_dir, outcomes.open_study(run_dir))
    outcomes.write_outcome(found, run_dir)
    _summary(found, run_dir)


@_commands.command(name="list")
@click.argument(
    "kind", type=click.Choice(["methods", "architectures", "presets", "scorers", "backends"])
)
def list_command(kind: str) -> None:
    """List what can be named in a configuration or on the command line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if kind == "architectures":
        for architecture in ARCHITECTURES.values():
            blocks = f"{len(architecture.blocks)} blocks: {' '.join(architecture.blocks)}"
            table.add_row(architecture.name, f"{architecture.title}, {blocks}")
    elif kind == "presets":
        for name, preset in PRESETS.items():
            table.add_row(name, "search.presets", preset.about)
        for name, curve in CURVES.items():
            table.add_row(name, "merge --alpha", curve.about)
        table.caption = (
            "--alpha NAME gives text encoders 0, but for ALL_B; -w base=0.5 sets theirs"
        )
    else:
        registry: Any = {"methods": methods.method, "scorers": scorer, "backends": backend}[kind]
        names = registry.names()
        if kind == "methods" and find_spec("sd_mecha"):
            names += mecha.names()
        for name in names:
            plugin = methods.get(name) if kind == "methods" else registry.get(name)
            told = (plugin.__doc__ or "").strip().partition("\n")[0]
            needs = f" ({_needs(plugin)})" if kind == "methods" else ""
            _out.print(f"{name}{needs}\n  {told}", soft_wrap=True)
        return
    _out.print(table)


def _needs(plugin: methods.Method) -> str:
    """How many models a method takes, and its weights with their defaults."""
    more = " or more" if methods.takes_more(plugin) else ""
    weights = [f"{name} {value:.3g}" for name, value in methods.weights(plugin).items()]
    return "; ".join([f"{methods.n_models(plugin)}{more} models", *weights])


class _Progress:
    """The run's progress in the terminal: a live line where there is one, plain lines in a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("images"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("baselines", total=None, speed="")
        self._begun = time.monotonic()
        self._made = 0
        self._n_images = 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def planned(self, images: int, trials: int) -> None:
        self._bar.update(self._task, total=images)
        self._console.print(f"{trials} trials, {images} images in all")

    def started(self, stage: str, name: str, images: int) -> None:
        self._n_images = images
        self._bar.update(self._task, description=f"{_STAGES[stage]} {name}")

    def judged(self, images: int, made: bool) -> None:
        if made:
            self._made += images
            speed = self._made / max(1e-9, time.monotonic() - self._begun)
            self._bar.update(self._task, advance=images, speed=f"{speed:.1f}/s")
        else:
            # Not work of this process, so it must not count for the time left.
            total = self._bar.tasks[0].total
            if images and total is not None:
                self._bar.update(self._task, total=total - images)

    def finished(self, result: Result, leader: Result | None) -> None:
        line = f"{_STAGES[result.stage]:<10} {result.name:<10} "
        if result.value is None:
            line += f"failed: {result.reason}"
        else:
            line += f"{result.value.mean:8.3f} ± {result.value.se:.3f}"
        if leader is not None and leader.value is not None:
            new = " (new)" if leader.number == result.number else ""
            line += f"   best so far {leader.value.mean:.3f}, {leader.name}{new}"
        self._console.print(line, soft_wrap=True)

    def noted(self, text: str) -> None:
        self._console.print(f"note: {text}", soft_wrap=True)


_STAGES = {
    "baseline": "baseline",
    "explore": "explore",
    "exploit": "exploit",
    "select": "choose",
    "heldout": "held-out",
}


def _summary(outcome: Outcome, run_dir: Path) -> None:
    _out.print()
    _out.print(outcome.verdict(), style="bold", soft_wrap=True)
    for key, gain in outcome.gain.items():
        interval = f"95 % interval {gain.low:+.3f} to {gain.high:+.3f}"
        _out.print(f"  over {RIVALS[key]:<15} {gain.mean:+.3f}  ({interval})")
    _out.print(f"{outcome.images} images in {duration(sum(outcome.seconds.values()))}")
    _out.print(f"report: {(run_dir / 'report.html').absolute()}", soft_wrap=True)
    if outcome.best is not None:
        _out.print(f"recipe: {(run_dir / 'best.toml').absolute()}", soft_wrap=True)


def _payloads(setup: Setup) -> set[str]:
    return {prompt.payload for prompt in setup.panel}


def _default_run_dir(config_file: Path) -> Path:
    return config_file.absolute().parent / "runs" / config_file.stem
