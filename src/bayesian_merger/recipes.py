"""Recipes as files: best.toml out, and in again to rebuild the merge bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from bayesian_merger import curves, methods, toml
from bayesian_merger.blocks import ARCHITECTURES, Architecture, short_names
from bayesian_merger.data import Model, Recipe, Weights
from bayesian_merger.errors import CheckpointError, ConfigError, one_line
from bayesian_merger.merge import Merger, Source, check_recipe, open_model
from bayesian_merger.registry import nearest
from bayesian_merger.space import PRESETS


def to_toml(recipe: Recipe, paths: Mapping[str, Path | None]) -> str:
    """The recipe as TOML; `paths` (SHA-256 -> path) say where the models lay."""
    lines = [
        f"method = {_quoted(recipe.method)}",
        f"architecture = {_quoted(recipe.architecture)}",
        f"vae = {_quoted(recipe.vae)}",
        f"precision = {_quoted(recipe.precision)}",
        f"clip = {'true' if recipe.clip else 'false'}",
        f"seed = {recipe.seed}",
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


def read(path: Path) -> Recipe:
    """The recipe in a TOML file, or of a merge in its metadata; ConfigError in one line if neither."""
    is_toml = path.suffix.lower() == ".toml"
    text = _text(path) if is_toml else _metadata(path)
    try:
        recipe = Recipe.from_dict(toml.loads(text) if is_toml else json.loads(text))
    except (ValueError, RecursionError) as error:  # of TOML and JSON too
        raise ConfigError(f"{path}: not a recipe ({one_line(error)})") from error
    try:
        check_recipe(recipe)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if is_toml:
        return recipe
    # A merge never says where its models lay; one that does is of a stranger's making.
    return replace(recipe, models=tuple(replace(model, path=None) for model in recipe.models))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a recipe ({one_line(error)})") from error


def _metadata(path: Path) -> str:
    """What a merge says of how it was made; ConfigError if it does not."""
    found = open_model(path).metadata.get("merge_recipe")
    if found is None:
        raise ConfigError(
            f"{path}: one model alone, and no merge of this program (no merge_recipe in its metadata); "
            f"name model B as well"
        )
    return found


def open_models(recipe: Recipe, *folders: Path) -> Merger:
    """The recipe's models, found by name in `folders` or at their path, and known by their content."""
    merger = Merger([_model(model, folders) for model in recipe.models])
    if merger.architecture.name != recipe.architecture:
        raise CheckpointError(
            f"the recipe is for {recipe.architecture}, its models are {merger.architecture.name}"
        )
    return merger


def _model(model: Model, folders: Sequence[Path]) -> Source:
    """The first file of the model's name, or at its path, that has its content."""
    places = [folder / Path(model.name).name for folder in folders]
    if model.path is not None:
        places.append(model.path)
    others = []
    for place in dict.fromkeys(places):
        try:
            if not place.exists():
                continue
        except OSError as error:
            raise CheckpointError(f"model {model.name}: {error.strerror}") from error
        found = open_model(place)
        if found.sha256 == model.sha256:
            return found
        others.append(f"{place} (SHA-256 {found.sha256[:10]})")
    if others:
        raise CheckpointError(
            f"model {model.name}: {', '.join(others)} is not the file of the recipe (SHA-256 "
            f"{model.sha256[:10]}); find that file and name its folder with --models-dir"
        )
    raise CheckpointError(
        f"model {model.name}: not at {' nor at '.join(map(str, places))}; "
        f"put it there or name its folder with --models-dir"
    )


def parse_weights(merger: Merger, method: str, given: Sequence[tuple[str, str]]) -> Weights:
    """The weights that pairs of name and text ask for, later ones on top of earlier ones.

    A name is a weight of the method ("alpha"), a block's or part's ("IN00_alpha", or "IN00" for the
    first weight), or a pattern for those of blocks ("OUT*", "OUT*_beta"). The text is a number or, for
    all blocks, the name of a curve or as many numbers as there are blocks, with commas between.
    "alpha_blocks" is the same for all but the first block (base), which it leaves as it is unless it
    has a number for it. ConfigError for all else.
    """
    architecture = merger.architecture
    defaults = methods.weights(methods.get(method))
    weights = {
        w: dict.fromkeys(architecture.blocks, float(value)) for w, value in defaults.items()
    }
    places = {
        alias: (weight, block)
        for weight in weights
        for alias, block in short_names(weight, architecture).items()
    }
    places |= {f"{p}_{w}": (w, p) for w in weights for p in merger.parts}
    if weights:
        first = next(iter(weights))
        places |= {block: (first, block) for block in (*architecture.blocks, *merger.parts)}
    of_blocks = [name for name, (_, block) in places.items() if block in architecture.blocks]
    for name, text in given:
        weight = name.removesuffix("_blocks")
        if weight in weights:
            n_least = len(architecture.blocks) - (weight != name)
            weights[weight] |= spread(name, text, architecture, n_least)
            continue
        hits = [name] if name in places else [n for n in of_blocks if fnmatchcase(n, name)]
        if not hits:
            raise ConfigError(f"{name}: {_why_unknown(name, merger, method, (*weights, *places))}")
        for hit in hits:
            weight, block = places[hit]
            weights[weight][block] = _number(name, text)
    return weights


def _why_unknown(name: str, merger: Merger, method: str, known: Sequence[str]) -> str:
    weights = methods.weights(methods.get(method))
    if not weights:
        return f"{method} has no weights"
    own = merger.architecture
    block = next((name.removesuffix(f"_{w}") for w in weights if name.endswith(f"_{w}")), name)
    elsewhere = {b for a in ARCHITECTURES.values() for b in (*a.blocks, *a.parts)}
    if block in elsewhere and block not in (*own.blocks, *merger.parts):
        return f"these {own.title} models have no {block} to merge"
    hint = nearest(name, known)
    return (
        f"{method} has no such weight{hint} (known: {', '.join(weights)}, one block's IN00_alpha)"
    )


def spread(name: str, text: str, architecture: Architecture, n_least: int) -> Mapping[str, float]:
    """The weight of each block, or of the last `n_least`, that one text for all of them gives."""
    blocks = architecture.blocks
    if "," not in text:
        try:
            return dict.fromkeys(blocks[-n_least:], float(text))
        except ValueError:
            if re.search(r"\d[\s;]+[\d.-]", text):
                raise ConfigError(f"{name}: write the numbers with commas between") from None
            if text in PRESETS:
                raise ConfigError(
                    f"{name}: {text} is a preset of searches (search.presets in a configuration), "
                    f"not of weights; give a number, or see `bayesian-merger list presets`"
                ) from None
            found = curves.weights(text, architecture)
            return {block: found[block] for block in blocks[-n_least:]}
    if re.fullmatch(r"\s*-?\d,\d+\s*", text):
        raise ConfigError(f"{name}: {text} is two numbers; did you mean {text.replace(',', '.')}?")
    numbers = [_number(name, part) for part in text.split(",")]
    if len(numbers) not in (len(blocks), n_least):
        first, second, last = blocks[0], blocks[1], blocks[-1]
        wanted = (
            f"{len(blocks)} ({first}, {second} ... {last}); without {first} they go to "
            f"--alpha-blocks, beside --alpha for {first}"
            if n_least == len(blocks)
            else f"{n_least} ({second} ... {last}), or {len(blocks)} with {first}"
        )
        raise ConfigError(
            f"{name}: {len(numbers)} numbers, but {architecture.title} takes {wanted}"
        )
    return dict(zip(blocks[-len(numbers) :], numbers, strict=True))


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: {text.strip()!r} is not a number") from None


def _quoted(text: str) -> str:
    # JSON's strings are TOML's, but for the control character DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
