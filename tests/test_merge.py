from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesian_merger import merge
from bayesian_merger.blocks import SD1
from bayesian_merger.checkpoint import PRECISIONS, Checkpoint
from bayesian_merger.data import Model, Recipe, Weights
from bayesian_merger.errors import CheckpointError, ConfigError, TrialError
from bayesian_merger.merge import Merger, check_recipe, even_weights

IN01 = toy.BLOCKS["IN01"][1]
TEXT = toy.BLOCKS["base"][0]
VAE = toy.VAE_NAMES[0]
MERGED = [name for pair in toy.BLOCKS.values() for name in pair]


def alpha(value: float, **blocks: float) -> Weights:
    return {"alpha": {**dict.fromkeys(SD1.blocks, value), **blocks}}


def recipe(
    weights: Weights,
    *,
    method: str = "weighted_sum",
    vae: str = "a",
    precision: str = "fp32",
    models: tuple[Model, ...] = (Model("a", "0"), Model("b", "1"), Model("c", "2")),
) -> Recipe:
    return Recipe(method, "sd1", models, weights, vae, precision)


def merger_of(tmp_path: Path, *models: Mapping[str, Tensor]) -> Merger:
    """The toy models of seeds 0, 1, 2, each with some tensors changed."""
    return Merger(
        [
            Checkpoint(toy.write_toy(tmp_path / f"{letter}.safetensors", seed, changes=changes))
            for seed, (letter, changes) in enumerate(zip("abc", models, strict=False))
        ]
    )


def one_value(tmp_path: Path, *values: float, **options: Any) -> Callable[[float], Tensor]:
    """Weight -> the merged tensor of IN01, where each model holds one of `values`."""
    merger = merger_of(tmp_path, *({IN01: torch.full((4,), value)} for value in values))
    return lambda weight: merger.merge(recipe(alpha(weight), **options))[IN01]


def values(tensor: Tensor) -> set[float]:
    return set(tensor.flatten().tolist())


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# What a merge is made of


def test_weighted_sum_takes_each_block_at_its_own_weight(tmp_path: Path) -> None:
    paths = [toy.write_toy(tmp_path / f"{v}.safetensors", value=float(v)) for v in (0, 8)]
    weights = {block: i / 32 for i, block in enumerate(SD1.blocks)}
    merged = Merger([Checkpoint(p) for p in paths]).merge(recipe({"alpha": weights}))
    for i, block in enumerate(SD1.blocks):
        for name in toy.BLOCKS[block]:
            assert merged[name].flatten().tolist() == [i / 4] * merged[name].numel(), name


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(0.0, 2.0), (0.25, 3.0), (0.5, 4.0), (1.0, 6.0), (1.5, 8.0), (-0.5, 0.0)],
)
def test_weight_moves_on_the_line_from_a_to_b(
    tmp_path: Path, weight: float, expected: float
) -> None:
    assert one_value(tmp_path, 2.0, 6.0)(weight).tolist() == [expected] * 4


def test_add_difference_takes_three_models(tmp_path: Path) -> None:
    merged = one_value(tmp_path, 1.0, 7.0, 3.0, method="add_difference")
    assert merged(0.0).tolist() == [1.0] * 4
    assert merged(0.25).tolist() == [2.0] * 4
    assert merged(1.0).tolist() == [5.0] * 4


def test_method_of_two_models_leaves_the_third_alone(tmp_path: Path) -> None:
    assert one_value(tmp_path, 2.0, 6.0, torch.nan)(0.5).tolist() == [4.0] * 4


def test_method_of_three_models_needs_three(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add_difference merges 3 models, but 2 are given"):
        one_value(tmp_path, 1.0, 2.0, method="add_difference")(0.5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_weight_0_is_a_and_1_is_b_bit_for_bit(
    tmp_path: Path, weight: float, precision: str
) -> None:
    dtype = PRECISIONS[precision]
    paths = [toy.write_toy(tmp_path / f"{seed}.safetensors", seed, dtype=dtype) for seed in (0, 1)]
    models = [Checkpoint(path) for path in paths]
    merged = Merger(models).merge(recipe(alpha(weight), precision=precision, vae="base"))
    for name in [*MERGED, *toy.VAE_NAMES]:
        assert bits(merged[name]) == bits(models[int(weight)][name]), name


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # files, written anew
)
@given(values=st.lists(st.floats(-60000, 60000, width=32), min_size=4, max_size=4))
def test_result_is_the_nearest_number_of_the_precision(
    tmp_path: Path, values: list[float]
) -> None:
    changes = {IN01: torch.tensor(values)}
    merger = merger_of(tmp_path, changes, changes)
    exact = np.array(values, np.float32)
    for precision in ("fp32", "fp16", "bf16"):
        merged = merger.merge(recipe(alpha(0.3), precision=precision))[IN01]
        assert merged.dtype == PRECISIONS[precision]
        if precision == "bf16":
            # bf16 is the upper half of the bits of fp32.
            low = (exact.view(np.uint32) & 0xFFFF0000).view(np.float32)
            high = (exact.view(np.uint32) + 0x10000 & 0xFFFF0000).view(np.float32)
            nearest = np.where(np.abs(low - exact) <= np.abs(high - exact), low, high)
            assert (np.abs(merged.float().numpy() - exact) == np.abs(nearest - exact)).all()
        else:
            expected = exact.astype(np.float16 if precision == "fp16" else np.float32)
            assert (merged.numpy() == expected).all()


@pytest.mark.parametrize(
    ("precision", "value", "expected"),
    [
        ("fp16", 1 + 2**-11, 1.0),  # half way: to the even neighbour
        ("fp16", 1 + 3 * 2**-11, 1 + 2**-9),
        ("fp16", 1 + 2**-11 + 2**-20, 1 + 2**-10),
        ("bf16", 1 + 2**-8, 1.0),
        ("bf16", 1 + 3 * 2**-8, 1 + 2**-6),
        ("bf16", 1 + 2**-8 + 2**-20, 1 + 2**-7),
        ("fp32", 1 + 2**-23, 1 + 2**-23),
        ("fp16", 2.0**-24, 2.0**-24),  # the smallest number
        ("bf16", 1e38, 9.96927e37),
    ],
)
def test_ties_are_rounded_to_even(
    tmp_path: Path, precision: str, value: float, expected: float
) -> None:
    merged = one_value(tmp_path, 0.0, value, precision=precision)(1.0)
    assert merged.float()[0].item() == torch.tensor(expected).to(merged.dtype).float().item()


def test_models_of_different_types_are_merged_in_float32(tmp_path: Path) -> None:
    a = {IN01: torch.full((4,), 1.0, dtype=torch.float16)}
    b = {IN01: torch.full((4,), 1 + 2**-7, dtype=torch.bfloat16)}
    c = {IN01: torch.full((4,), 1.0, dtype=torch.float64)}
    merger = merger_of(tmp_path, a, b, c)
    # In half precision the sum would be rounded to 1.
    assert merger.merge(recipe(alpha(2**-5)))[IN01].tolist() == [1 + 2**-12] * 4
    added = merger.merge(recipe(alpha(2**-5), method="add_difference"))
    assert added[IN01].tolist() == [1 + 2**-12] * 4
    half = merger.merge(recipe(alpha(2**-5), precision="fp16"))
    assert half[IN01].dtype == half.layout[IN01].dtype == torch.float16


# What is not merged


@pytest.mark.parametrize(
    "corrupt",
    [
        torch.linspace(0.3, 75.9, 77).reshape(1, 77).half(),
        torch.full((1, 77), torch.nan),
        torch.zeros(1, 77, dtype=torch.int64),
    ],
)
def test_position_ids_are_made_anew(tmp_path: Path, corrupt: Tensor) -> None:
    merged = merger_of(tmp_path, {toy.POSITION_IDS: corrupt}, {}).merge(recipe(alpha(0.5)))
    assert merged[toy.POSITION_IDS].dtype == torch.int64
    assert merged[toy.POSITION_IDS].tolist() == [list(range(77))]
    told: list[int] = []
    merged.save(tmp_path / "m.safetensors", told.append)
    assert sum(told) == merged.n_bytes
    saved = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert saved[toy.POSITION_IDS].tolist() == [list(range(77))]


def test_schedule_stays_a_s_and_averages_of_its_training_are_left_out(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {})
    for vae in ("a", "b", "base"):
        merged = merger.merge(recipe(alpha(1.0), precision="fp16", vae=vae))
        assert bits(merged[toy.BETAS]) == bits(merger.models[0][toy.BETAS])
        assert merged.layout[toy.BETAS] == merger.models[0].layout[toy.BETAS]
        assert toy.EMA not in merged


def test_vae_is_a_s_or_b_s_byte_for_byte_or_merged_with_the_base_weight(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {VAE: torch.ones(3, dtype=torch.bfloat16)})
    a, b = merger.models
    weights = alpha(0.5, base=0.25)
    for name in toy.VAE_NAMES:
        kept = merger.merge(recipe(weights, precision="fp16", vae="a"))
        assert bits(kept[name]) == bits(a[name])
        other = merger.merge(recipe(weights, precision="fp16", vae="b"))
        assert bits(other[name]) == bits(b[name])
        assert other.layout[name] == b.layout[name]
        mixed = merger.merge(recipe(weights, precision="fp16", vae="base"))
        expected = torch.lerp(a[name], b[name].float(), 0.25).half()
        assert bits(mixed[name]) == bits(expected)


def test_nan_in_a_vae_that_is_copied_is_no_matter_of_the_merge(tmp_path: Path) -> None:
    merged = merger_of(tmp_path, {}, {VAE: torch.full((3,), torch.nan)}).merge(recipe(alpha(0.5)))
    assert bool(torch.isfinite(merged[VAE]).all())


def test_tensor_that_b_lacks_stays_a_s_and_one_that_only_b_has_is_left_out(tmp_path: Path) -> None:
    extra = "cond_stage_model.logit_scale"
    a = Checkpoint(toy.write_toy(tmp_path / "a.safetensors", 0, dtype=torch.float32))
    b = Checkpoint(
        toy.write_toy(
            tmp_path / "b.safetensors",
            1,
            changes={extra: torch.ones(1)},
            without={IN01, VAE, toy.POSITION_IDS, toy.EMA},
        )
    )
    merged = Merger([a, b]).merge(recipe(alpha(1.0), precision="fp16"))
    assert set(merged) == set(a.layout) - {toy.EMA}
    for name in (IN01, VAE):
        assert bits(merged[name]) == bits(a[name])
    for vae in ("b", "base"):
        with pytest.raises(
            ConfigError, match=f"vae is '{vae}', but model B, b.safetensors, holds no whole VAE"
        ):
            Merger([a, b]).merge(recipe(alpha(1.0), vae=vae))
    for vae in ("a", "b", "base"):
        other = Merger([b, a]).merge(recipe(alpha(1.0), precision="fp16", vae=vae))
        assert set(other) == set(b.layout)


def test_integers_within_the_network_stay_a_s(tmp_path: Path) -> None:
    count = "model.diffusion_model.input_blocks.1.0.steps"
    integers, floats = {count: torch.arange(4)}, {count: torch.ones(4)}
    for a, b in (
        (integers, {count: torch.zeros(4).long()}),
        (integers, floats),
        (floats, integers),
    ):
        merger = merger_of(tmp_path, a, b)
        merged = merger.merge(recipe(alpha(0.5), precision="fp16"))
        assert bits(merged[count]) == bits(a[count])


def test_merge_does_not_change_its_models(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {}, {})
    before = [{n: bits(m[n]) for n in m.layout} for m in merger.models]
    for method in ("weighted_sum", "add_difference"):
        merged = merger.merge(recipe(alpha(0.7), method=method))
        assert all(bits(merged[name]) == bits(merged[name]) for name in merged)
    assert [{n: bits(m[n]) for n in m.layout} for m in merger.models] == before


def test_layout_tells_each_tensor_before_it_is_made(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {VAE: torch.ones(3).half()}, {})
    for vae in ("a", "b", "base"):
        for precision in PRECISIONS:
            merged = merger.merge(recipe(alpha(0.5), vae=vae, precision=precision))
            assert len(merged) == len(merged.layout)
            for name, tensor in merged.items():
                assert merged.layout[name].shape == tuple(tensor.shape), name
                assert merged.layout[name].dtype == tensor.dtype, name


# Merges that fail


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("letter", ["A", "B", "C"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_not_finite_input_fails_the_trial_by_model_and_tensor(
    tmp_path: Path, number: float, letter: str, weight: float
) -> None:
    bad = torch.ones(2, 3)
    bad[1, 2] = number
    merger = merger_of(tmp_path, *({TEXT: bad} if x == letter else {} for x in "ABC"))
    merged = merger.merge(recipe(alpha(weight), method="add_difference"))
    with pytest.raises(TrialError) as caught:
        merged[TEXT]
    assert repr(TEXT) in str(caught.value)
    assert f"model {letter}, {letter.lower()}.safetensors" in str(caught.value)
    assert bool(torch.isfinite(merged[IN01]).all())


def test_overflow_of_fp16_fails_the_trial_and_names_the_way_out(tmp_path: Path) -> None:
    too_much = one_value(tmp_path, 60000.0, 70000.0, precision="fp16")
    assert too_much(0.0).tolist() == [60000.0] * 4
    with pytest.raises(
        TrialError, match=r"not finite after the merge in fp16; try precision fp32"
    ):
        too_much(1.0)
    assert one_value(tmp_path, 60000.0, 70000.0, precision="fp32")(1.0)[0] == 70000
    assert bool(one_value(tmp_path, 60000.0, 70000.0, precision="bf16")(1.0).isfinite().all())


def test_other_shapes_are_refused_by_model_and_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        merger_of(tmp_path, {}, {IN01: torch.ones(5)})
    message = str(caught.value)
    assert "model B, b.safetensors: 1 tensors have another shape" in message
    assert f"{IN01!r}, [5] against [4]" in message
    assert "\n" not in message
    with pytest.raises(CheckpointError, match=r"model C, c\.safetensors: 2 tensors"):
        merger_of(tmp_path, {}, {}, {IN01: torch.ones(5), VAE: torch.ones(1)})


def test_other_architecture_is_refused_by_model(tmp_path: Path) -> None:
    sdxl = {"conditioner.embedders.1.model.ln_final.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"^model B, b\.safetensors: this is SDXL"):
        merger_of(tmp_path, {}, sdxl)
    with pytest.raises(CheckpointError, match=r"^model A, a\.safetensors: this is SDXL"):
        merger_of(tmp_path, sdxl, {})


def test_model_without_a_block_is_refused_by_model(tmp_path: Path) -> None:
    a = Checkpoint(toy.write_toy(tmp_path / "a.safetensors"))
    b = Checkpoint(toy.write_toy(tmp_path / "b.safetensors", without=toy.BLOCKS["M00"]))
    for models in ([a, b], [b, a]):
        with pytest.raises(CheckpointError, match=r"model [AB], b\.safetensors: .*first: M00"):
            Merger(models)


# Saving


def test_saved_merge_has_a_s_tensors_and_is_what_was_merged(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {"cond_stage_model.extra": torch.ones(1)})
    merged = merger.merge(recipe(alpha(0.4), precision="fp16"))
    merged.save(tmp_path / "m.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert set(saved) == set(merger.models[0].layout) - {toy.EMA}
    assert all(bits(saved[name]) == bits(merged[name]) for name in saved)


def test_saved_merge_carries_its_recipe(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {})
    wanted = recipe(alpha(0.1 + 0.2), models=merger.references(), precision="bf16")
    merger.merge(wanted).save(tmp_path / "m.safetensors")
    metadata = Checkpoint(tmp_path / "m.safetensors").metadata
    assert metadata["format"] == "pt"
    assert Recipe.from_dict(json.loads(metadata["merge_recipe"])) == wanted
    assert str(tmp_path) not in metadata["merge_recipe"]


def test_merge_is_saved_to_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        merger = merger_of(tmp_path, {}, {}, {})
        merged = merger.merge(recipe(alpha(0.3), method="add_difference", precision="fp16"))
        merged.save(tmp_path / name)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_merge_can_be_merged_again(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {})
    merger.merge(recipe(alpha(0.5), precision="fp16")).save(tmp_path / "m.safetensors")
    again = Merger([Checkpoint(tmp_path / "m.safetensors"), merger.models[1]])
    assert set(again.merge(recipe(alpha(0.5)))) == set(merger.models[0].layout) - {toy.EMA}


def test_merge_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    merged = merger_of(tmp_path, {}, {IN01: torch.full((4,), torch.nan)}).merge(recipe(alpha(0.5)))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"m\.safetensors was not written: .*model B"):
        merged.save(tmp_path / "m.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_space_is_asked_for_before_a_merge_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = merger_of(tmp_path, {}, {}).merge(recipe(alpha(0.5)))
    needed = sum(t.numel() * t.element_size() for t in merged.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    merged.require_space(tmp_path / "m.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(CheckpointError, match="free on that disk"):
        merged.require_space(tmp_path / "m.safetensors")


def test_references_know_models_by_name_content_and_place(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {})
    assert merger.references() == tuple(Model(m.name, m.sha256) for m in merger.models)
    assert [m.path for m in merger.references()] == [m.path.resolve() for m in merger.models]


# Recipes


def test_even_weights_cover_every_weight_of_the_method_in_every_block() -> None:
    assert even_weights("weighted_sum", SD1.blocks, 0.5) == alpha(0.5)


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"method": "wieghted_sum"}, "did you mean 'weighted_sum'"),
        ({"architecture": "sd9"}, r"unknown architecture 'sd9' \(known: sd1, "),
        ({"precision": "fp8"}, r"unknown precision 'fp8' \(known: fp32, fp16, bf16, "),
        ({"vae": "c"}, "unknown vae 'c'"),
        ({"models": (Model("a", "0"),)}, "merges 2 models, but 1 are given"),
        ({"weights": {**alpha(0.5), "beta": {}}}, "weighted_sum has no weight 'beta'"),
        ({"weights": alpha(0.5, IN12=0.5)}, "no block 'IN12'"),
        ({"weights": alpha(0.5, IN03=torch.nan)}, "IN03.*nan"),
        ({"weights": alpha(0.5, IN03=torch.inf)}, "IN03.*inf"),
    ],
)
def test_recipe_that_describes_no_merge_is_refused(
    changes: Mapping[str, object], saying: str
) -> None:
    good = recipe(alpha(0.5))
    check_recipe(good)
    with pytest.raises(ConfigError, match=saying) as caught:
        check_recipe(replace(good, **changes))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_recipe_without_a_weight_for_a_block_of_the_models_is_refused(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {})
    for weights, block in (
        ({}, "base"),
        ({"alpha": dict.fromkeys(SD1.blocks[:-1], 0.5)}, "OUT11"),
    ):
        with pytest.raises(ConfigError, match=f"no alpha for block {block}"):
            merger.merge(recipe(weights))


# Parts, variants, LoRAs


def test_part_takes_its_own_weight_and_else_its_block_s(tmp_path: Path) -> None:
    paths = [toy.write_toy(tmp_path / f"{v}.safetensors", value=float(v)) for v in (0, 8)]
    merger = Merger([Checkpoint(p) for p in paths])
    time_embed, last = toy.BLOCKS["IN00"][1], toy.BLOCKS["OUT11"][1]
    assert {"TIME", "FINAL", "VAE"} == set(merger.parts)
    follows = merger.merge(recipe(alpha(0.5)))
    own = merger.merge(recipe(alpha(0.5, TIME=0.25)))
    assert values(follows[time_embed]) == {4.0}
    assert values(own[time_embed]) == {2.0}
    assert values(own[toy.BLOCKS["IN00"][0]]) == {4.0}
    assert values(own[last]) == {4.0}


def test_vae_with_a_weight_of_its_own_is_merged(tmp_path: Path) -> None:
    paths = [toy.write_toy(tmp_path / f"{v}.safetensors", value=float(v)) for v in (0, 8)]
    merger = Merger([Checkpoint(p) for p in paths])
    assert merger.merge(recipe(alpha(0.5)))[VAE].tolist() == [0.0] * 3
    assert merger.merge(recipe(alpha(0.5, VAE=0.75)))[VAE].tolist() == [6.0] * 3


def test_unet_alone_needs_no_weight_for_a_text_encoder(tmp_path: Path) -> None:
    rest = {toy.POSITION_IDS, *toy.BLOCKS["base"], *toy.VAE_NAMES}
    paths = [
        toy.write_toy(tmp_path / f"{v}.safetensors", value=float(v), without=rest) for v in (0, 8)
    ]
    merger = Merger([Checkpoint(p) for p in paths])
    assert merger.blocks == SD1.blocks[1:]
    merged = merger.merge(recipe({"alpha": dict.fromkeys(merger.blocks, 0.5)}))
    assert values(merged[IN01]) == {4.0}
    with pytest.raises(ConfigError, match="no alpha for block OUT11"):
        merger.merge(recipe({"alpha": dict.fromkeys(merger.blocks[:-1], 0.5)}))


def test_bare_names_of_a_unet_are_those_of_a_whole_checkpoint(tmp_path: Path) -> None:
    whole = Checkpoint(toy.write_toy(tmp_path / "whole.safetensors", value=8.0))
    bare = {
        name.removeprefix(f"{toy.UNET}."): torch.zeros(entry.shape)
        for name, entry in whole.layout.items()
        if name.startswith(toy.UNET)
    }
    safetensors.torch.save_file(bare, tmp_path / "bare.safetensors")
    alone = Checkpoint(tmp_path / "bare.safetensors")
    into_whole = Merger([whole, alone])
    assert values(into_whole.merge(recipe(alpha(0.25)))[IN01]) == {6.0}
    assert any("lacks" in note for note in into_whole.notes)
    into_bare = Merger([alone, whole]).merge(recipe(alpha(0.25)))
    assert set(into_bare) == set(bare)
    assert values(into_bare[IN01.removeprefix(f"{toy.UNET}.")]) == {2.0}


def test_models_of_other_input_channels_are_merged_where_both_have_them(tmp_path: Path) -> None:
    first = toy.BLOCKS["IN00"][0]
    plain, inpainting = torch.zeros(2, 4, 3, 3), torch.full((2, 9, 3, 3), 8.0)
    a = toy.write_toy(tmp_path / "inpainting.safetensors", changes={first: inpainting})
    b = toy.write_toy(tmp_path / "plain.safetensors", changes={first: plain})
    merger = Merger([Checkpoint(a), Checkpoint(b)])
    merged = merger.merge(recipe(alpha(0.25)))[first]
    assert merged.shape == inpainting.shape
    assert values(merged[:, :4]) == {6.0}
    assert values(merged[:, 4:]) == {8.0}
    assert "9 input channels" in merger.notes[0]
    other_way = Merger([Checkpoint(b), Checkpoint(a)]).merge(recipe(alpha(0.25)))
    assert other_way[first].shape == plain.shape
    assert values(other_way[first]) == {2.0}
    other_way.save(tmp_path / "m.safetensors")


def test_lora_stands_for_model_a_with_the_lora_in_full(tmp_path: Path) -> None:
    changed = f"{toy.UNET}.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    extra = {changed: torch.full((4, 4), 0.5)}
    a = Checkpoint(toy.write_toy(tmp_path / "a.safetensors", changes=extra))
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    pieces = {
        f"{module}.lora_up.weight": torch.full((4, 2), 2.0),
        f"{module}.lora_down.weight": torch.full((2, 4), 1.0),
        f"{module}.alpha": torch.tensor(1.0),
    }
    safetensors.torch.save_file(pieces, tmp_path / "lora.safetensors")
    merger = Merger([a, Checkpoint(tmp_path / "lora.safetensors")])
    assert merger.blocks == ("M00",)
    merged = merger.merge(recipe({"alpha": {"M00": 0.25}}))
    # 0.25 times up @ down times alpha / rank.
    assert values(merged[changed]) == {0.5 + 0.25 * 4.0 * 0.5}
    untouched = [name for name in merged if name != changed]
    assert all(bits(merged[name]) == bits(a[name]) for name in untouched)


def test_models_that_predict_different_things_are_noted(tmp_path: Path) -> None:
    marker = {"v_pred": torch.empty(0)}
    b = toy.write_toy(tmp_path / "v.safetensors", 1, changes=marker)
    a = toy.write_toy(tmp_path / "a.safetensors", 0)
    merger = Merger([Checkpoint(a), Checkpoint(b)])
    assert any("predicts v" in note for note in merger.notes)
    kept = Merger([Checkpoint(b), Checkpoint(a)]).merge(recipe(alpha(0.5)))
    assert kept["v_pred"].shape == (0,)


# Options


def test_clip_keeps_each_value_between_a_s_and_b_s(tmp_path: Path) -> None:
    merged = one_value(tmp_path, 2.0, 6.0)
    assert merged(1.5).tolist() == [8.0] * 4
    clipped = replace(recipe(alpha(1.5)), clip=True)
    merger = merger_of(
        tmp_path, {IN01: torch.full((4,), 2.0)}, {IN01: torch.tensor([6.0, 2.0, -1.0, 3.0])}
    )
    assert merger.merge(clipped)[IN01].tolist() == [6.0, 2.0, -1.0, 3.0]


def test_chance_is_that_of_the_seed_and_the_tensor_alone(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {}, {})
    weights = {**alpha(1.0), "density": dict.fromkeys(SD1.blocks, 0.5)}
    wanted = recipe(weights, method="dare_add_difference")
    once, again = merger.merge(wanted), merger.merge(wanted)
    assert all(bits(once[name]) == bits(again[name]) for name in once)
    other = merger.merge(replace(wanted, seed=1))
    assert any(bits(once[name]) != bits(other[name]) for name in MERGED)


@pytest.mark.parametrize("precision", ["fp8_e4m3fn", "fp8_e5m2"])
def test_eight_bits_are_written_on_request(tmp_path: Path, precision: str) -> None:
    merger = merger_of(tmp_path, {}, {})
    merged = merger.merge(recipe(alpha(0.5), precision=precision))
    merged.save(tmp_path / "m.safetensors")
    saved, exact = Checkpoint(tmp_path / "m.safetensors"), merger.merge(recipe(alpha(0.5)))
    for name in MERGED:
        assert saved[name].dtype == PRECISIONS[precision]
        assert torch.equal(saved[name].float(), exact[name].to(PRECISIONS[precision]).float())


def test_weight_outside_the_method_s_domain_is_refused() -> None:
    weights = {**alpha(1.0), "density": {**dict.fromkeys(SD1.blocks, 0.5), "IN03": 1.25}}
    with pytest.raises(ConfigError, match=r"density of block IN03 is 1\.25, but .* takes 0 to 1"):
        check_recipe(recipe(weights, method="dare_add_difference"))


# The repeated merge


@pytest.mark.parametrize("method", ["weighted_sum", "slerp"])
def test_only_what_changed_since_is_written(tmp_path: Path, method: str) -> None:
    merger = merger_of(tmp_path, {}, {})
    first = merger.merge(recipe(alpha(0.5), method=method))
    live = {name: torch.full(entry.shape, torch.nan) for name, entry in first.layout.items()}
    assert first.write(live) == len(live)
    second = merger.merge(recipe(alpha(0.5, M00=0.75), method=method))
    live[IN01].fill_(-7.0)
    assert second.write(live, since=first) == len(toy.BLOCKS["M00"])
    assert values(live[IN01]) == {-7.0}  # not touched
    for name in toy.BLOCKS["M00"]:
        assert torch.equal(live[name], second[name])
    assert second.write(live, since=second) == 0
    assert merger.merge(recipe(alpha(0.5), method=method, vae="b")).write(live, since=first) == 2


def test_merge_of_other_models_is_written_whole(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = (
        merger_of(tmp_path, {}, {}),
        merger_of(tmp_path / "other", {}, {IN01: torch.ones(4)}),
    )
    first, second = (merger.merge(recipe(alpha(0.5))) for merger in (one, other))
    live = {name: torch.empty(entry.shape) for name, entry in first.layout.items()}
    assert second.write(live, since=first) == len(live)


def test_live_tensors_of_another_type_and_shape_hold_the_merge_in_its_precision(
    tmp_path: Path,
) -> None:
    merged = merger_of(tmp_path, {}, {}).merge(recipe(alpha(0.3), precision="fp16"))
    name = toy.BLOCKS["IN01"][0]
    live = {name: torch.empty(2, 3, 1, 1)}
    merged.write(live)
    assert torch.equal(live[name].reshape(2, 3), merged[name].float())


def test_elementwise_methods_are_merged_in_pieces_to_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger = merger_of(tmp_path, {}, {}, {})
    wanted = recipe({**alpha(0.3), "beta": alpha(0.6)["alpha"]}, method="multiply_difference")
    whole = dict(merger.merge(wanted))
    monkeypatch.setattr(merge, "_PIECE", 5)
    pieces = merger.merge(wanted)
    pieces.save(tmp_path / "m.safetensors")
    saved = Checkpoint(tmp_path / "m.safetensors")
    assert all(bits(pieces[n]) == bits(whole[n]) == bits(saved[n]) for n in whole)


def test_copied_tensor_with_nan_is_refused_as_a_merged_one_is(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {VAE: torch.full((3,), torch.nan)}, {})
    with pytest.raises(TrialError, match=r"model A, a\.safetensors, holds NaN"):
        merger.merge(recipe(alpha(0.5)))[VAE]
    # A schedule without signal at its end holds infinity, and is no part of the network.
    endless = {toy.BETAS: torch.tensor([0.5, 1, 2, 3, torch.inf], dtype=torch.float64)}
    kept = merger_of(tmp_path, endless, {}).merge(recipe(alpha(0.5)))
    assert kept[toy.BETAS].tolist() == [0.5, 1, 2, 3, torch.inf]


def test_input_with_nan_is_refused_where_the_method_would_hide_it(tmp_path: Path) -> None:
    merger = merger_of(tmp_path, {}, {IN01: torch.tensor([1.0, torch.nan, 1.0, 1.0])})
    weights = {**alpha(0.25), "beta": dict.fromkeys(SD1.blocks, 0.0)}
    with pytest.raises(TrialError, match=r"model B, b\.safetensors, holds NaN"):
        merger.merge(recipe(weights, method="tensor_sum"))[IN01]


def test_live_parameters_may_be_written_to(tmp_path: Path) -> None:
    merged = merger_of(tmp_path, {}, {}).merge(recipe(alpha(0.5), precision="fp16"))
    for kind in (torch.float16, torch.float32):
        live = {n: torch.nn.Parameter(torch.zeros(4, dtype=kind)) for n in (IN01,)}
        merged.write(live)
        assert torch.equal(live[IN01].detach().float(), merged[IN01].float())
