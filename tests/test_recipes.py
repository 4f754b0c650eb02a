from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bayesian_merger.blocks import SD1
from bayesian_merger.checkpoint import Checkpoint
from bayesian_merger.data import Model, Recipe
from bayesian_merger.errors import CheckpointError, ConfigError
from bayesian_merger.merge import Merger, even_weights
from bayesian_merger.recipes import open_models, read, to_toml

HALF = even_weights("weighted_sum", SD1.blocks, 0.5)
GOOD = to_toml(
    Recipe("weighted_sum", "sd1", (Model("a.safetensors", "a" * 64), Model("b", "b" * 64)), HALF),
    {},
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
weight = st.floats(allow_nan=False, allow_infinity=False)
ODD_NAMES = [
    "a b.safetensors",
    'quo"te.safetensors',
    "apostrophe's.safetensors",
    "back\\slash.safetensors",
    "ünï 模型 😀.safetensors",
    "# not a comment = [].safetensors",
    "new\nline\ttab.safetensors",
    "delete\x7f.safetensors",
    "three\"\"\"'''.safetensors",
]


def reread(recipe: Recipe, path: Path, paths: Mapping[str, Path | None] | None = None) -> Recipe:
    path.write_text(to_toml(recipe, paths or {}), encoding="utf-8")
    return read(path)


def of_models(*paths: Path, method: str = "weighted_sum") -> Recipe:
    references = Merger([Checkpoint(path) for path in paths]).references()
    return Recipe(method, "sd1", references, even_weights(method, SD1.blocks, 0.3))


# Out and in again


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # one file, written anew
)
@given(
    names=st.tuples(text, text),
    weights=st.lists(weight, min_size=26, max_size=26),
    vae=st.sampled_from(["a", "b", "base"]),
    precision=st.sampled_from(["fp16", "bf16", "fp32"]),
)
def test_recipe_is_read_back_exactly(
    tmp_path: Path, names: tuple[str, str], weights: list[float], vae: str, precision: str
) -> None:
    models = tuple(Model(name, letter * 64) for name, letter in zip(names, "ab", strict=True))
    blocks = dict(zip(SD1.blocks, weights, strict=True))
    recipe = Recipe("weighted_sum", "sd1", models, {"alpha": blocks}, vae, precision)
    back = reread(recipe, tmp_path / "best.toml")
    assert back == recipe
    assert back.digest() == recipe.digest()
    # Equality does not tell 0.0 from -0.0.
    assert repr(back.weights) == repr(recipe.weights)


@pytest.mark.parametrize("value", [0.1 + 0.2, 5e-324, 1.7976931348623157e308, 1e16, 1e-7, -0.0, 1])
def test_weight_is_read_back_to_the_last_bit(tmp_path: Path, value: float) -> None:
    weights = even_weights("weighted_sum", SD1.blocks, value)
    models = (Model("a", "a"), Model("b", "b"))
    back = reread(Recipe("weighted_sum", "sd1", models, weights), tmp_path / "best.toml")
    assert repr(back.weights["alpha"]["IN00"]) == repr(float(value))


@pytest.mark.parametrize("name", ODD_NAMES)
def test_models_may_have_any_name_and_lie_in_any_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.split(".")[0] / name
    models = (Model(name, "a" * 64), Model("b", "b" * 64))
    back = reread(
        Recipe("weighted_sum", "sd1", models, HALF), tmp_path / "best.toml", {"a" * 64: path}
    )
    assert back.models[0].name == name
    assert back.models[0].path == path
    assert back.models[1].path is None


def test_recipe_of_windows_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "best.toml").write_text(GOOD.replace("\n", "\r\n"), encoding="utf-8-sig")
    assert read(tmp_path / "best.toml").weights == HALF


# Recipes that are none


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


MALFORMED = {
    "nothing": "",
    "no TOML": "method = ",
    "text of two lines": "this is\nno recipe\n",
    "a configuration": '[models]\na = "a.safetensors"\nb = "b.safetensors"\n',
    "binary": "\0\1\2",
    "no method": changed('method = "weighted_sum"\n', ""),
    "no models": GOOD[: GOOD.index("[[models]]")] + GOOD[GOOD.index("[weights") :],
    "models are text": GOOD[: GOOD.index("[[models]]")].replace("\n\n", '\nmodels = "ab"\n')
    + GOOD[GOOD.index("[weights") :],
    "no sha256": changed("sha256", "sha"),
    "path is a number": changed('name = "b"', 'name = "b"\npath = 3'),
    "no weights": GOOD[: GOOD.index("[weights")],
    "weights are a number": GOOD[: GOOD.index("[[models]]")]
    + "weights = 3\n"
    + GOOD[GOOD.index("[[models]]") : GOOD.index("[weights")],
    "weights of no block": changed("[weights.alpha]", "[weights]\nalpha = 0.5\n[blocks]"),
    "weight is text": changed("IN04 = 0.5", 'IN04 = "half"'),
    "weight is a list": changed("IN04 = 0.5", "IN04 = [0.5]"),
    "weight is too large": changed("IN04 = 0.5", "IN04 = 1" + 400 * "0"),
    "weight is far too large": changed("IN04 = 0.5", "IN04 = 1" + 5000 * "0"),
    "weight is NaN": changed("IN04 = 0.5", "IN04 = nan"),
    "block twice": changed("IN04 = 0.5", "IN03 = 0.5"),
    "block unknown": changed("IN04 = 0.5", "IN04 = 0.5\nIN40 = 0.5"),
    "weight unknown": GOOD + "[weights.beta]\nIN00 = 1.0\n",
    "method unknown": changed("weighted_sum", "weighted_some"),
    "method is no text": changed('"weighted_sum"', "[1]"),
    "architecture unknown": changed('"sd1"', '"sd9"'),
    "vae unknown": changed('vae = "a"', 'vae = "z"'),
    "precision unknown": changed('"fp16"', '"fp4"'),
    "too few models": changed('weighted_sum"', 'add_difference"'),
    "too many models": GOOD + 30 * '[[models]]\nname = "c"\nsha256 = "3"\n',
    "name is too long": changed('name = "b"', f'name = "{5000 * "b"}"'),
    "seed is half": changed('vae = "a"', 'vae = "a"\nseed = 1.5'),
    "seed is negative": changed('vae = "a"', 'vae = "a"\nseed = -5'),
    "seed is too large": changed('vae = "a"', 'vae = "a"\nseed = 0x' + 5000 * "f"),
    "weight is true": changed("IN04 = 0.5", "IN04 = true"),
    "key unknown": changed('precision = "fp16"', 'precison = "fp32"'),
    "key of a model unknown": changed('name = "b"', 'name = "b"\nfolder = "c"'),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_recipe_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "best.toml"
    path.write_text(MALFORMED[what], encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).strip()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "Error" not in str(caught.value)  # no name of an exception


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a configuration", "the recipe has no 'method'"),
        ("no sha256", "model 1 has no 'sha256'"),
        ("models are text", "models is no list"),
        ("weights are a number", "weights is 3, not a table"),
        ("weight is text", "weights.alpha: IN04 is 'half', not a number"),
        ("key unknown", "the recipe has an unknown key 'precison'"),
        ("key of a model unknown", "model 2 has an unknown key 'folder'"),
    ],
)
def test_malformed_recipe_says_what_is_wrong(tmp_path: Path, what: str, said: str) -> None:
    (tmp_path / "best.toml").write_text(MALFORMED[what], encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "best.toml")
    assert said in str(caught.value)


GOOD_DATA = Recipe(
    "weighted_sum", "sd1", (Model("a.safetensors", "a" * 64), Model("b", "b" * 64)), HALF
).to_dict()


@pytest.mark.parametrize(
    "told",
    [
        "",
        "no JSON",
        "[]",
        "null",
        "3",
        "[" * 100_000,
        json.dumps(GOOD_DATA | {"models": None}),
        json.dumps(GOOD_DATA | {"models": 100 * GOOD_DATA["models"]}),
        json.dumps(GOOD_DATA | {"weights": {"alpha": {"IN00": math.nan}}}),
        json.dumps(GOOD_DATA | {"weights": {"alpha": 100_000 * "x"}}),
        json.dumps(GOOD_DATA | {"clip": 100_000 * "x"}),
        json.dumps(GOOD_DATA | {"method": 100_000 * "x"}),
        json.dumps(GOOD_DATA)[:-1] + ', "seed": ' + 5000 * "9" + "}",
        json.dumps(GOOD_DATA)[:-1] + ', "seed": 1e400}',
    ],
)
def test_malformed_metadata_is_refused_in_one_line(tmp_path: Path, told: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"merge_recipe": told})
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_metadata_of_a_stranger_names_no_place_of_this_machine(tmp_path: Path) -> None:
    models = [model | {"path": "/etc/passwd"} for model in GOOD_DATA["models"]]
    path = tmp_path / "m.safetensors"
    told = json.dumps(GOOD_DATA | {"models": models})
    save_file({"x": torch.zeros(1)}, path, {"merge_recipe": told})
    with pytest.raises(CheckpointError, match="not at") as caught:
        open_models(read(path), tmp_path)
    assert "passwd" not in str(caught.value)


def test_file_that_cannot_be_read_as_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes('method = "é"'.encode("latin-1"))
    for path, saying in (
        (tmp_path / "no.toml", "no such file"),
        (tmp_path / "folder.toml", "not a recipe"),
        (tmp_path / "latin.toml", "not a recipe"),
        (toy.write_toy(tmp_path / "a.safetensors"), "no merge_recipe in its metadata"),
    ):
        with pytest.raises(ConfigError, match=saying) as caught:
            read(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


# Models of a recipe


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Three toy checkpoints in a folder."""
    (tmp_path / "models").mkdir()
    return [
        toy.write_toy(tmp_path / "models" / f"{letter}.safetensors", seed)
        for seed, letter in enumerate("abc")
    ]


@pytest.mark.parametrize(("method", "n"), [("weighted_sum", 2), ("add_difference", 3)])
def test_recipe_rebuilds_the_merge_byte_for_byte(
    tmp_path: Path, models: list[Path], method: str, n: int
) -> None:
    recipe = of_models(*models[:n], method=method)
    Merger([Checkpoint(m) for m in models[:n]]).merge(recipe).save(tmp_path / "1.safetensors")
    paths = {model.sha256: model.path for model in recipe.models}
    back = reread(recipe, tmp_path / "best.toml", paths)
    open_models(back, tmp_path).merge(back).save(tmp_path / "2.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_models_that_moved_are_found_by_name_in_the_folder(
    tmp_path: Path, models: list[Path]
) -> None:
    recipe = of_models(*models[:2])
    (tmp_path / "elsewhere").mkdir()
    moved = [Path(shutil.move(m, tmp_path / "elsewhere" / m.name)) for m in models[:2]]
    assert [m.path for m in open_models(recipe, tmp_path / "elsewhere").models] == moved


def test_model_is_searched_below_no_other_folder_than_the_one_given(
    tmp_path: Path, models: list[Path]
) -> None:
    recipe = of_models(*models[:2])
    tricky = Recipe(
        recipe.method,
        recipe.architecture,
        (Model("../../models/a.safetensors", recipe.models[0].sha256), recipe.models[1]),
        recipe.weights,
    )
    with pytest.raises(CheckpointError, match="not at"):
        open_models(tricky, tmp_path / "models" / "x" / "y")


def test_missing_model_is_named_with_the_places_that_were_looked_at(
    tmp_path: Path, models: list[Path]
) -> None:
    recipe = of_models(*models[:2])
    models[1].unlink()
    with pytest.raises(CheckpointError) as caught:
        open_models(recipe, tmp_path / "other")
    message = str(caught.value)
    assert "model b.safetensors" in message
    assert str(models[1]) in message
    assert str(tmp_path / "other" / "b.safetensors") in message
    assert "--models-dir" in message
    assert "\n" not in message


def test_file_with_the_name_but_not_the_content_is_refused(
    tmp_path: Path, models: list[Path]
) -> None:
    recipe = of_models(*models[:2])
    expected = recipe.models[1].sha256
    shutil.copy(models[2], models[1])
    found = Checkpoint(models[1]).sha256
    with pytest.raises(CheckpointError) as caught:
        open_models(recipe, tmp_path)
    message = str(caught.value)
    assert str(models[1]) in message
    assert expected[:10] in message
    assert found[:10] in message


def test_one_changed_byte_is_another_model(tmp_path: Path, models: list[Path]) -> None:
    recipe = of_models(*models[:2])
    data = bytearray(models[0].read_bytes())
    data[-1] ^= 1
    models[0].write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"model a\.safetensors: .*a\.safetensors .* is not the file"
    ):
        open_models(recipe, tmp_path)


def test_same_file_may_be_two_models(tmp_path: Path, models: list[Path]) -> None:
    recipe = of_models(models[0], models[0])
    merged = open_models(recipe, tmp_path).merge(recipe)
    name = toy.BLOCKS["M00"][0]
    assert merged[name].tolist() == Checkpoint(models[0])[name].half().tolist()


def test_digest_tells_recipes_apart_but_not_their_folders() -> None:
    def recipe(alpha: float = 0.5, vae: str = "a", path: Path | None = None) -> Recipe:
        models = (Model("a", "a" * 64, path), Model("b", "b" * 64))
        return Recipe(
            "weighted_sum", "sd1", models, even_weights("weighted_sum", SD1.blocks, alpha), vae
        )

    assert recipe().digest() == recipe(path=Path("/somewhere")).digest()
    others = (recipe(), recipe(alpha=0.5 + 2**-52), recipe(vae="base"))
    assert len({other.digest() for other in others}) == 3
