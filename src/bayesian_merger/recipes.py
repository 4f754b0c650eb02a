"""Recipes as files: best.toml out, and in again to rebuild the merge bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bayesian_merger import toml
from bayesian_merger.checkpoint import Checkpoint
from bayesian_merger.data import Recipe
from bayesian_merger.errors import CheckpointError, ConfigError
from bayesian_merger.merge import Merger, check_recipe


def to_toml(recipe: Recipe, paths: Mapping[str, Path | None]) -> str:
    """The recipe as TOML; `paths` (SHA-256 -> path) say where the models lay."""
    lines = [
        f"method = {_quoted(recipe.method)}",
        f"architecture = {_quoted(recipe.architecture)}",
        f"vae = {_quoted(recipe.vae)}",
        f"precision = {_quoted(recipe.precision)}",
    ]
    for model in recipe.models:
        lines += [
            "",
            "[[models]]",
            f"name = {_quoted(model.name)}",
            f"sha256 = {_quoted(model.sha256)}",
        ]
        if path := paths.get(model.sha256):
            lines.append(f"path = {_quoted(path.as_posix())}")
    for name, blocks in recipe.weights.items():
        lines += ["", f"[weights.{name}]"]
        # repr of a float reads back as the same float.
        lines += [f"{block} = {float(weight)!r}" for block, weight in blocks.items()]
    return "\n".join(lines) + "\n"


def read_toml(path: Path) -> Recipe:
    """The recipe in a TOML file; ConfigError in one line if it is not one."""
    try:
        recipe = Recipe.from_dict(toml.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a recipe ({' '.join(str(error).split())})") from error
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a recipe ({type(error).__name__}: {error}); expected method, architecture, "
            f"[[models]] with name and sha256, and [weights.alpha]"
        ) from error
    check_recipe(recipe)
    return recipe


def open_models(recipe: Recipe, folder: Path) -> Merger:
    """The recipe's models, found at their path or by name in `folder`, and known by their content."""
    checkpoints = []
    for model in recipe.models:
        places = [p for p in (model.path, folder / Path(model.name).name) if p is not None]
        found = next((p for p in places if p.is_file()), None)
        if found is None:
            raise CheckpointError(
                f"model {model.name}: not at {' nor at '.join(str(p) for p in places)}; "
                f"put it there or name its folder with --models-dir"
            )
        checkpoint = Checkpoint(found)
        if checkpoint.sha256 != model.sha256:
            raise CheckpointError(
                f"{found}: not the file of the recipe (SHA-256 {checkpoint.sha256[:10]}, "
                f"recipe {model.sha256[:10]}); find the original file"
            )
        checkpoints.append(checkpoint)
    merger = Merger(checkpoints)
    if merger.architecture.name != recipe.architecture:
        raise CheckpointError(
            f"the recipe is for {recipe.architecture}, its models are {merger.architecture.name}"
        )
    return merger


def _quoted(text: str) -> str:
    # JSON's strings are TOML's, but for the control character DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
