"""`merge`: one merge by options or by a recipe, without any search."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import click
from click.core import ParameterSource
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from bayesian_merger import methods, recipes
from bayesian_merger.checkpoint import PRECISIONS
from bayesian_merger.cli.options import plugin_option
from bayesian_merger.cli.screen import out, plain
from bayesian_merger.data import Model, Recipe
from bayesian_merger.errors import ConfigError
from bayesian_merger.merge import Merged, Merger, check_recipe, n_used, open_model
from bayesian_merger.registry import import_file

# Weights between these are in use; one beyond them is worth a note.
_LEAST, _MOST = -1.0, 2.0


@click.command()
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
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of methods with chance."
)
@click.option("--dry-run", is_flag=True, help="Say what would happen to which block, and stop.")
@click.option(
    "--models-dir",
    "models_dirs",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where a recipe's models lie, if neither beside it nor where it says; may be repeated.",
)
@plugin_option
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
def merge_command(
    files: Sequence[Path],
    output: Path | None,
    plugins: Sequence[Path],
    models_dirs: Sequence[Path],
    dry_run: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Merge models A B [C ...], or rebuild the merge of a recipe (best.toml), bit for bit.

    Models are checkpoints (.safetensors, .ckpt), diffusers folders or, from B on, LoRAs. A merge that
    this program made is a recipe as well: it says of itself what it was made of.
    """
    start = time.monotonic()
    for plugin in plugins:
        import_file(plugin)
    if output is None and not dry_run:
        raise ConfigError("name the merge's file with -o, or see what it would be with --dry-run")
    named = [path for path in files if path.suffix.lower() == ".toml"]
    if len(files) == 1 or named:
        (file,) = files[:1] if len(files) == 1 else named[:1]
        context = click.get_current_context()
        given = [
            parameter.opts[0]
            for parameter in context.command.params
            if parameter.name in options
            and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        ]
        beside = [*given, *(path for path in files if path is not file)]
        if beside:
            raise ConfigError(f"{file} is a recipe, which says all; leave out {beside[0]}")
        recipe = recipes.read(file)
        with out.status("reading the models"):
            merger = recipes.open_models(recipe, *models_dirs, file.absolute().parent)
    else:
        merger = Merger([open_model(path) for path in files])
        merger.require_different(by_content=False)
        unread = tuple(Model(model.name, "") for model in merger.models)
        recipe = _recipe_of(merger, unread, **options)
    if output is not None:
        _require_free(output, overwrite, merger)
    merged = merger.merge(recipe)
    for note in [*merger.notes, *_far(recipe)]:
        out.print(f"note: {plain(note)}", soft_wrap=True)
    if dry_run:
        out.print(plain(_plan(recipe)), soft_wrap=True)
        out.print(_plan_table(merger, merged))
        return
    assert output is not None
    merged.require_space(output)
    if not all(model.sha256 for model in recipe.models):
        # To know a file by its SHA-256 it must be read whole, so every mistake is told before.
        with out.status("reading the models"):
            merger.require_different()
            merged = merger.merge(replace(recipe, models=merger.references()))
    with Progress(
        TextColumn("merging"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=out,
        disable=not out.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("merging", total=merged.n_bytes)
        merged.save(output, lambda n_bytes: bar.advance(task, n_bytes))
    size, spent = output.stat().st_size / 1e6, time.monotonic() - start
    out.print(f"wrote {output} ({size:.1f} MB in {spent:.1f} s)", soft_wrap=True)


def _far(recipe: Recipe) -> Iterator[str]:
    """A note for each weight that looks like a slip of the keyboard."""
    for name in ("alpha", "beta"):
        given = recipe.weights.get(name, {})
        far = [f"{value:g} ({b})" for b, value in given.items() if not _LEAST <= value <= _MOST]
        if far:
            yield (
                f"{len(far)} of {len(given)} weights {name} are below {_LEAST:g} or above {_MOST:g}, "
                f"the first {far[0]}"
            )


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
    if output.is_dir():
        raise ConfigError(f"{output} is a folder; choose another name")
    if exists and not overwrite:
        raise ConfigError(f"{output} exists; choose another name or give --overwrite")
    for model in merger.models:
        # A model may be a folder, whose files are the model as well.
        if place.is_relative_to(model.path.resolve()) or (exists and output.samefile(model.path)):
            raise ConfigError(f"{output} is one of the models or in it; choose another name")


def _plan(recipe: Recipe) -> str:
    """What would be made, in a line."""
    models = [f"{x} {m.name}" for x, m in zip(ascii_uppercase, recipe.models, strict=False)]
    vae = {"a": "A's VAE", "b": "B's VAE", "base": "the VAE merged as base"}[recipe.vae]
    clipped = ", clipped" if recipe.clip else ""
    return f"{recipe.method} of {', '.join(models)}; {recipe.precision}{clipped}, {vae}"


def _plan_table(merger: Merger, merged: Merged) -> Table:
    """What happens to each block."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("block", "tensors", "MB", "made with"):
        table.add_column(heading, justify="right" if heading in ("tensors", "MB") else "left")
    rows: dict[tuple[str, str], list[int]] = {}
    for name, entry in merged.layout.items():
        place = merger.places[name]
        row = (place.part or place.block or "other", merged.described(name))
        rows.setdefault(row, []).append(entry.n_bytes)
    architecture = merger.architecture
    order = [*architecture.blocks, *architecture.parts, "other"]
    for (block, how), sizes in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        table.add_row(block, str(len(sizes)), f"{sum(sizes) / 1e6:.1f}", how)
    return table
