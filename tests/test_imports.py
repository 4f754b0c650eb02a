"""Imports point one way: STYLE.md and DESIGN.md as a test."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import bayesian_merger
from bayesian_merger.cli import COMMANDS, commands

PACKAGE = Path(bayesian_merger.__file__).parent
PLUGINS = ("methods", "backends", "scorers")
LAYERS = (
    ("data", "errors", "choices", "guard", "toml", "demo"),
    (
        "checkpoint",
        "devices",
        "gate",
        "gp",
        "infotext",
        "junk",
        "kernels",
        "metadata",
        "names",
        "pictures",
        "premises",
        "registry",
        "server",
        "workflow",
        "yml",
    ),
    ("album", "desk", "handover", "hub", "pairs", "slopes", "stock", "towers"),
    ("delivery", "page"),
    ("bayes", "blocks", "folders", "lora", "plots", *PLUGINS),
    (
        "adopt",
        "config",
        "curves",
        "guide",
        "space",
        "study",
        "merge",
        "recipes",
        "prompts",
        "report",
        "spread",
        "taste",
        "values",
    ),
    ("setup",),
    ("outcome",),
    ("crew", "dashboard", "gathering", "pairing", "results"),
    ("joining", "judging"),
    ("run", "tryout"),
    ("worker",),
    ("cluster", "warm"),
    ("cli",),
    ("__main__",),
)
# The steps of the path: these may import each other, but not in a circle.
MIDDLE = 5
# Each large dependency has one home.
HOMES = {
    "optuna": {"study"},
    "psutil": {"study"},
    "sqlalchemy": {"study"},
    "matplotlib": {"plots"},
    "pydantic": {"config", "guide", "registry", "prompts"},
    "yaml": {"yml"},
    "jinja2": {"report"},
    "safetensors": {"checkpoint", "scorers"},
    "filelock": {"delivery", "run", "study"},
    "platformdirs": {"delivery", "hub"},
    "click": {"cli"},
    "rich": {"cli"},
    "diffusers": {"backends"},
    "httpx": {"hub", "server"},
    "websockets": {"server"},
    "transformers": {"backends", "scorers", "towers"},
    "huggingface_hub": {"hub"},
    "tqdm": {"hub"},
    "sd_mecha": {"methods"},
    "llvmlite": {"kernels"},
    "imscore": set(),  # by its name, in scorers/extras
    "pyiqa": {"scorers"},
    "optuna_dashboard": set(),  # by its name, in dashboard
    "cmaes": set(),  # Optuna imports it
    "ray": {"cluster"},
}


def modules() -> dict[str, Path]:
    """Module's name without the package ("backends.diffusers") -> file; the package itself is ""."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()
every_module = pytest.mark.parametrize("module", MODULES)


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, *, at_import: bool = False) -> Iterator[str]:
    """What `module` imports, anywhere in it or only when it is imported itself."""
    found = tree(module)
    inside = {
        node
        for function in ast.walk(found)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(found):
        if at_import and node in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by dots"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.removeprefix("bayesian_merger.") in MODULES
                yield whole if is_module else str(node.module)


def ours(module: str) -> set[str]:
    """Those of our modules that `module` imports."""
    names = {name for name in imports(module) if name.split(".")[0] == "bayesian_merger"}
    return {name.removeprefix("bayesian_merger").removeprefix(".") for name in names}


def top(module: str) -> str:
    return module.split(".")[0]


def layer(module: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if top(module) in names]
    assert found, (
        f"{module} has no layer yet: say in LAYERS of {Path(__file__).name} where it lies"
    )
    return found[0]


@every_module
def test_module_imports_only_from_lower_layers(module: str) -> None:
    if not module:
        assert ours(module) == {"results", "study.search"}  # when they are asked for
        return
    for other in ours(module):
        if not other:  # __version__
            assert module in ("cli", "cluster", "joining")
        elif top(other) == top(module):
            assert top(module) in (*PLUGINS, "cli", "study")
        elif layer(module) == layer(other) == MIDDLE:
            pass
        else:
            assert layer(other) < layer(module), f"{module} imports {other}"


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: ours(module) - {"", module} for module in MODULES}
    assert tuple(graphlib.TopologicalSorter(graph).static_order())


@every_module
def test_plugin_knows_neither_the_config_nor_the_study_nor_another_plugin(module: str) -> None:
    if top(module) not in PLUGINS:
        return
    allowed = {"data", "errors", "registry", "checkpoint", "devices", "names", "toml", top(module)}
    allowed |= (
        {"methods.mecha"} if module == "methods" else set()
    )  # which get() asks, by the prefix
    if top(module) == "backends":
        allowed |= {"delivery", "guard", "handover", "pictures"}
        allowed |= {"server", "stock", "workflow"}
    elif top(module) == "scorers":
        allowed = (allowed - {"names", "toml"}) | {"desk", "hub", "infotext", "towers"}
    else:
        allowed -= {"checkpoint", "names", "toml"}
    assert ours(module) <= allowed


@every_module
def test_large_dependency_has_one_home(module: str) -> None:
    for name in imports(module):
        homes = HOMES.get(top(name))
        assert homes is None or top(module) in homes, f"{module} imports {name}"


@every_module
def test_only_the_command_line_prints(module: str) -> None:
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    printed = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert top(module) == "cli" or not printed


@every_module
def test_listing_plugins_imports_no_heavy_library(module: str) -> None:
    if top(module) in PLUGINS:
        heavy = {"diffusers", "transformers", "httpx", "open_clip", "onnxruntime", "sd_mecha"}
        assert not heavy & {top(name) for name in imports(module, at_import=True)}


def test_help_and_merges_wait_for_no_search() -> None:
    for module, heavy in (
        ("cli", {"torch", "optuna", "pydantic", "matplotlib"}),
        ("cli.merging", {"optuna", "matplotlib", "scipy", "diffusers", "transformers", "jinja2"}),
    ):
        script = f"import sys, bayesian_merger.{module}; print(*sys.modules)"
        told = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert not heavy & set(told.stdout.split())


def test_every_command_is_where_the_help_says() -> None:
    context = click.Context(commands)
    for name, (_, told) in COMMANDS.items():
        command = commands.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(limit=1000) == told


def test_layers_name_no_module_that_is_gone() -> None:
    assert {name for names in LAYERS for name in names} == {top(m) for m in MODULES if m}
