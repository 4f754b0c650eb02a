from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesian_merger.checkpoint import Checkpoint
from bayesian_merger.data import Model, Recipe
from bayesian_merger.metadata import (
    Prediction,
    carried,
    disagreement,
    legacy_hash,
    prediction,
    sd_merge,
)

# As sgm and kohya's scripts write them.
FULL = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.title": "The Model of A",
    "modelspec.description": "Trained on A",
    "modelspec.author": "A",
    "modelspec.date": "2023-07-20",
    "modelspec.hash_sha256": "0xd7a9105a",
    "modelspec.implementation_version": "sd-scripts/1f2a",
    "modelspec.license": "CreativeML Open RAIL++-M",
    "modelspec.usage_hint": "say a",
    "modelspec.trigger_phrase": "a person",
    "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4QAYRXhpZgAA",
    "modelspec.merged_from": "X, Y",
    "modelspec.tags": "a, b",
    "modelspec.resolution": "1024x1024",
    "modelspec.prediction_type": "epsilon",
    "modelspec.encoder_layer": "2",
    "modelspec.unet_dtype": "bf16",
    "ss_tag_frequency": "{}",
    "prompt": "{}",
    "workflow": "{}",
    "format": "pt",
    "license": "mine",
    "architecture": "mine",
}
TRUE_OF_A_MERGE = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.resolution": "1024x1024",
    "modelspec.prediction_type": "epsilon",
    "modelspec.encoder_layer": "2",
}


def test_fields_that_stay_true_are_carried_over_and_the_title_is_new() -> None:
    expected = TRUE_OF_A_MERGE | {"modelspec.title": "mix"}
    assert carried([FULL, {}], "mix") == expected


def test_licence_is_carried_over_only_if_every_model_has_it() -> None:
    same = {"modelspec.license": FULL["modelspec.license"]}
    assert "modelspec.license" in carried([FULL, same, same], "mix")
    assert "modelspec.license" not in carried([FULL, same, {}], "mix")
    assert "modelspec.license" not in carried([FULL, {"modelspec.license": "MIT"}], "mix")


@pytest.mark.parametrize("field", ["architecture", "resolution", "prediction_type"])
def test_field_that_a_model_contradicts_is_left_out(field: str) -> None:
    key = f"modelspec.{field}"
    assert carried([FULL, {}, {key: "other"}], "mix").keys() == (
        TRUE_OF_A_MERGE.keys() - {key} | {"modelspec.title"}
    )


def test_models_without_fields_give_none() -> None:
    assert carried([{}, FULL], "mix") == {}
    assert carried([{"format": "pt"}], "mix") == {}
    assert carried([{"modelspec.title": "A", "modelspec.author": "A"}], "mix") == {}


def test_huge_field_is_left_out() -> None:
    huge = {"modelspec.architecture": "a" * 100_000, "modelspec.resolution": "512x512"}
    assert carried([huge], "mix") == {
        "modelspec.resolution": "512x512",
        "modelspec.title": "mix",
    }


# The recipe as webuis show it

A, B, C = (Model(f"{letter}.safetensors", letter * 64) for letter in "abc")


def recipe(*models: Model, **weights: float) -> Recipe:
    """A recipe over two blocks; `alpha_1` is alpha of the second, which is else that of the first."""
    second = weights.pop("alpha_1", None)
    blocks = {name: {"base": value, "IN00": value} for name, value in weights.items()}
    if second is not None:
        blocks["alpha"]["IN00"] = second
    return Recipe("weighted_sum", "sd1", models, blocks, precision="bf16")


def test_recipe_has_the_fields_of_the_webui_and_our_weights() -> None:
    written = sd_merge(recipe(A, B, alpha=0.25), [{}, {}], ["aaaa1111", "bbbb2222"])
    assert written.keys() == {"sd_merge_recipe", "sd_merge_models"}
    assert json.loads(written["sd_merge_recipe"]) == {
        "type": "bayesian-merger",
        "primary_model_hash": A.sha256,
        "secondary_model_hash": B.sha256,
        "tertiary_model_hash": None,
        "interp_method": "weighted_sum",
        "multiplier": 0.25,
        "weights": {"alpha": {"base": 0.25, "IN00": 0.25}},
        "save_as_half": False,
        "precision": "bf16",
        "vae": "a",
    }
    assert json.loads(written["sd_merge_models"]) == {
        A.sha256: {"name": A.name, "legacy_hash": "aaaa1111", "sd_merge_recipe": None},
        B.sha256: {"name": B.name, "legacy_hash": "bbbb2222", "sd_merge_recipe": None},
    }


def test_weights_that_differ_by_block_have_no_multiplier() -> None:
    written = sd_merge(recipe(A, B, C, alpha=0.25, alpha_1=0.5), [{}] * 3, ["", "", ""])
    found = json.loads(written["sd_merge_recipe"])
    assert found["multiplier"] is None
    assert found["tertiary_model_hash"] == C.sha256
    assert found["weights"] == {"alpha": {"base": 0.25, "IN00": 0.5}}


def test_merge_of_merges_keeps_the_recipes_of_its_models() -> None:
    first = sd_merge(recipe(A, B, alpha=0.25), [{}, {}], ["a", "b"])
    mixed = Model("mixed.safetensors", "d" * 64)
    second = sd_merge(recipe(mixed, B, alpha=0.5), [first, {}], ["d", "b"])
    models = json.loads(second["sd_merge_models"])
    assert models[mixed.sha256]["sd_merge_recipe"] == json.loads(first["sd_merge_recipe"])
    assert models.keys() == {mixed.sha256, A.sha256, B.sha256}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[1, 2]",
        '"text"',
        "null",
        '{"a": NaN}',
        '{"a": 1' + "0" * 5000 + "}",
        '{"a":' * 100_000,
        '{"a":' * 900 + "1" + "}" * 900,
        '{"a":"' + "b" * 2_000_000 + '"}',
    ],
)
def test_recipe_of_a_model_that_is_no_recipe_is_left_out(text: str) -> None:
    parent = {"sd_merge_recipe": text, "sd_merge_models": text}
    written = sd_merge(recipe(A, B, alpha=0.5), [parent, {}], ["a", "b"])
    models = json.loads(written["sd_merge_models"])
    assert models.keys() >= {A.sha256, B.sha256}
    assert len(written["sd_merge_models"]) < 20_000


def test_history_of_a_model_cannot_replace_what_is_known_of_the_others() -> None:
    lie = {"sd_merge_models": json.dumps({B.sha256: {"name": "other"}, "x": "no entry"})}
    written = sd_merge(recipe(A, B, alpha=0.5), [lie, {}], ["a", "b"])
    models = json.loads(written["sd_merge_models"])
    assert models[B.sha256]["name"] == B.name
    assert "x" not in models


def test_legacy_hash_is_of_64_kilobytes_after_the_first_megabyte(tmp_path: Path) -> None:
    data = bytes(i % 251 for i in range(1_200_000))
    (tmp_path / "x").write_bytes(data)
    digest = hashlib.sha256(data[1_048_576 : 1_048_576 + 65_536]).hexdigest()
    assert legacy_hash(tmp_path / "x") == digest[:8]
    (tmp_path / "small").write_bytes(b"small")
    assert legacy_hash(tmp_path / "small") == "e3b0c442"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    metadata=st.dictionaries(
        st.sampled_from([*FULL, "sd_merge_recipe", "sd_merge_models", "modelspec.predict_key"]),
        st.text(max_size=30) | st.sampled_from(["{}", "[]", '{"a": {}}', "v", "{" * 99]),
    )
)
def test_no_metadata_can_stop_a_merge(metadata: dict[str, str]) -> None:
    kept = carried([metadata, FULL], "mix") | sd_merge(
        recipe(A, B, alpha=0.5), [metadata, metadata], ["a", "b"]
    )
    assert all(isinstance(text, str) for text in kept.values())
    assert isinstance(json.loads(kept["sd_merge_models"]), dict)
    assert prediction(["x"], metadata) in ("epsilon", "v", "unknown")


def test_metadata_survives_the_file(tmp_path: Path) -> None:
    metadata = carried([FULL], "mix") | sd_merge(recipe(A, B, alpha=0.5), [FULL, {}], ["", ""])
    safetensors.torch.save_file({"t": torch.ones(1)}, tmp_path / "x.safetensors", metadata)
    assert Checkpoint(tmp_path / "x.safetensors").metadata == metadata


# What a model predicts

SDXL = ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",)
SD2 = ("cond_stage_model.model.ln_final.weight", "model.diffusion_model.out.2.weight")


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        (tuple(toy.toy_tensors(0)), {}, "epsilon"),
        (SDXL, {}, "epsilon"),
        ((*SDXL, "v_pred"), {}, "v"),
        ((*SDXL, "v_pred", "ztsnr"), {}, "v"),
        ((*SDXL, "ztsnr"), {}, "v"),
        ((*SDXL, "edm_vpred.sigma_max", "edm_vpred.sigma_min"), {}, "v"),
        ((*SDXL, "edm_mean", "edm_std"), {}, "unknown"),
        ((*SDXL, "v_pred"), {"modelspec.prediction_type": "epsilon"}, "v"),
        (SDXL, {"modelspec.prediction_type": "v"}, "v"),
        (SDXL, {"modelspec.prediction_type": " V_prediction\n"}, "v"),
        (SDXL, {"modelspec.predict_key": "v"}, "v"),
        (SDXL, {"modelspec.prediction_type": "strange"}, "epsilon"),
        (SD2, {}, "unknown"),
        (SD2, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        (SD2, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        (("double_blocks.0.img_attn.proj.weight",), {}, "unknown"),
        ((), {}, "unknown"),
    ],
)
def test_prediction_is_told_by_markers_then_metadata_then_architecture(
    names: tuple[str, ...], metadata: dict[str, str], expected: Prediction
) -> None:
    assert prediction(names, metadata) == expected


def test_models_that_predict_different_things_are_both_named() -> None:
    warning = disagreement([("a.ckpt", "unknown"), ("b.ckpt", "epsilon"), ("c.ckpt", "v")])
    assert "c.ckpt predicts v, but b.ckpt says nothing of it" in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    "kinds", [(), ("v",), ("v", "v"), ("epsilon", "unknown"), ("unknown", "v", "unknown")]
)
def test_models_that_may_agree_give_no_warning(kinds: tuple[Prediction, ...]) -> None:
    assert disagreement([(f"{n}.ckpt", kind) for n, kind in enumerate(kinds)]) == ""
