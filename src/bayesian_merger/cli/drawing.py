"""`draw`: the network coloured by any weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import click

from bayesian_merger import plots, recipes
from bayesian_merger.blocks import ARCHITECTURES, Architecture
from bayesian_merger.cli.screen import out
from bayesian_merger.errors import ConfigError

_SUFFIXES = (".png", ".svg")


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--weights", help="A preset (GRAD_V), or one number for each block: 0.1,0.2,...")
@click.option("--base", type=float, help="The weight of base, if not among the others.")
@click.option("--beta", help="The same for a second weight of each block.")
@click.option("--beta-base", type=float, help="Its base.")
@click.option(
    "--arch",
    "name",
    type=click.Choice(list(ARCHITECTURES)),
    default="sd1",
    show_default=True,
    help="Of which network.",
)
@click.option("--names", metavar="A,B", help="The models at the ends of the colours.")
@click.option("--title", default="", help="Above it.")
@click.option("--dark", is_flag=True, help="On dark paper.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("unet.png"),
    show_default=True,
    help="A .png or .svg file.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
def draw_command(
    recipe: Path | None,
    weights: str | None,
    base: float | None,
    beta: str | None,
    beta_base: float | None,
    name: str,
    names: str | None,
    title: str,
    dark: bool,
    output: Path,
    overwrite: bool,
) -> None:
    """Draw the network with each block in the colour of its weight: of RECIPE, or of --weights.

    RECIPE is a best.toml, its run folder, a best.log or a merge of this program.
    """
    if output.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{output}: name the output {' or '.join(_SUFFIXES)}")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; choose another name or give --overwrite")
    if recipe is None and weights is None:
        raise ConfigError("name a recipe to draw, or the weights with --weights")
    if recipe is not None and recipe.suffix.lower() == ".log" and weights is None:
        weights = _read(recipe)
        recipe = None
    if recipe is not None:
        given = {
            "--weights": weights,
            "--base": base,
            "--beta": beta,
            "--beta-base": beta_base,
            "--arch": None if name == "sd1" else name,
        }
        others = [option for option, value in given.items() if value is not None]
        if others:
            raise ConfigError(
                f"{recipe} has weights of its own; leave {', '.join(others)} or it out"
            )
        if (recipe / "best.toml").is_file():
            recipe = recipe / "best.toml"
    elif beta is None and beta_base is not None:
        raise ConfigError("--beta-base: there is no --beta that it could be the base of")
    ends = ("A", "B")
    if recipe is not None:
        told = recipes.read(recipe)
        architecture, drawn = ARCHITECTURES[told.architecture], told.weights
        if not drawn:
            raise ConfigError(f"{recipe}: {told.method} has no weights to draw")
        if told.method == "weighted_sum":
            ends = (told.models[0].name, told.models[1].name)
    else:
        architecture = ARCHITECTURES[name]
        texts = {"alpha": (weights, base), "beta": (beta, beta_base)}
        drawn = {
            weight: _parsed(weight, text, its_base, architecture)
            for weight, (text, its_base) in texts.items()
            if text is not None
        }
    if names is not None:
        first, comma, second = names.partition(",")
        if not comma or "," in second:
            raise ConfigError(f"--names {names}: write it as A,B")
        ends = (first.strip(), second.strip())
    shown = dict(list(drawn.items())[:2])
    one, *other = shown.values()
    figure = plots.unet(
        one,
        blocks=[block for block in architecture.blocks if block in one],
        second=other[0] if other else None,
        title=title or (" | ".join(shown) if other else ""),
        names=ends,
        dark=dark,
    )
    plots.save(figure, output)
    out.print(f"wrote {output}", soft_wrap=True)


def _read(log: Path) -> str:
    """The weights in a best.log: a base, an empty line, the other blocks'."""
    try:
        text = log.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{log}: cannot be read as a best.log ({error})") from error
    return ",".join(text.split())


def _parsed(
    weight: str, text: str, base: float | None, architecture: Architecture
) -> Mapping[str, float]:
    """Block -> weight, of those for which there is one; ConfigError if a text says something else."""
    option = {"alpha": "--weights", "beta": "--beta"}[weight]
    # Of a list the first block's may be missing, as extensions write it.
    found = dict(
        recipes.spread(option, text, architecture, len(architecture.blocks) - ("," in text))
    )
    if base is not None and architecture.blocks[0] in found and "," in text:
        raise ConfigError(f"{option}: the first of its numbers is that of the base already")
    if base is not None:
        found[architecture.blocks[0]] = base
    for block, number in found.items():
        if not math.isfinite(number):
            raise ConfigError(f"{option}: the weight of {block} is {number}")
    return found
