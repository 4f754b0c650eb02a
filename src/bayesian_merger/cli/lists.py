"""`list`: what can be named in a configuration or on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from bayesian_merger import methods
from bayesian_merger.backends import backend
from bayesian_merger.blocks import ARCHITECTURES
from bayesian_merger.cli.options import plugin_option
from bayesian_merger.cli.screen import out
from bayesian_merger.curves import CURVES
from bayesian_merger.methods import mecha
from bayesian_merger.registry import import_file
from bayesian_merger.scorers import About, scorer
from bayesian_merger.space import PRESETS


@click.command()
@click.argument(
    "kind", type=click.Choice(["methods", "architectures", "presets", "scorers", "backends"])
)
@plugin_option
def list_command(kind: str, plugins: Sequence[Path]) -> None:
    """List what can be named in a configuration or on the command line."""
    for plugin in plugins:
        import_file(plugin)
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
            listed = methods.get(name) if kind == "methods" else registry.get(name)
            told = (listed.__doc__ or "").strip().partition("\n")[0]
            more = {"methods": _needs, "scorers": _about}.get(kind, lambda _: "")(listed)
            options = registry.options(name) if kind == "scorers" else ""
            lines = [
                f"{name}{f' ({more})' if more else ''}",
                told,
                options and f"options: {options}",
            ]
            out.print("\n  ".join(filter(None, lines)), soft_wrap=True)
        return
    out.print(table)


def _about(plugin: Any) -> str:
    """A scorer's range, what it sees, its licence and what it needs, as far as it tells."""
    about = getattr(plugin, "about", None)
    if not isinstance(about, About):
        return ""
    licence = f"licence {about.licence}" if about.licence else ""
    needs = f"needs {about.needs}" if about.needs else ""
    return "; ".join(filter(None, (about.range, f"sees {about.sees}", licence, needs)))


def _needs(plugin: methods.Method) -> str:
    """How many models a method takes, and its weights with their defaults."""
    more = " or more" if methods.takes_more(plugin) else ""
    weights = [f"{name} {value:.3g}" for name, value in methods.weights(plugin).items()]
    return "; ".join([f"{methods.n_models(plugin)}{more} models", *weights])
