"""Derivatives of a score by the weights of a merge, from its gradient by the merged tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import save_file
from torch import Tensor

from bayesian_merger import methods, space
from bayesian_merger.blocks import SD1, SDXL
from bayesian_merger.checkpoint import Checkpoint
from bayesian_merger.data import Recipe, Weights
from bayesian_merger.errors import TrialError
from bayesian_merger.merge import Merged, Merger

STEP = 1e-2
UNET, _ = toy.BLOCKS["IN04"]
LINEAR = [name for name in methods.method.names() if methods.is_linear(methods.get(name))]


@pytest.fixture(scope="module")
def merger(tmp_path_factory: pytest.TempPathFactory) -> Merger:
    folder = tmp_path_factory.mktemp("models")
    return Merger(
        [Checkpoint(toy.write_toy(folder / f"{i}.safetensors", seed=i)) for i in range(3)]
    )


def merged(merger: Merger, method: str, weights: Mapping[str, float], **options: object) -> Merged:
    spread: Weights = {w: dict.fromkeys(merger.blocks, value) for w, value in weights.items()}
    architecture = merger.architecture.name
    models = merger.references()
    recipe = Recipe(method, architecture, models, spread, precision="fp32", **options)  # type: ignore[arg-type]
    return merger.merge(recipe)


def at(values: Mapping[str, float], weight: str, step: float) -> dict[str, float]:
    return {**values, weight: values[weight] + step}


def middle(method: str) -> dict[str, float]:
    """Weights inside their domains, each another."""
    names = methods.weights(methods.get(method))
    return {name: 0.35 + 0.1 * i for i, name in enumerate(names)}


@pytest.mark.parametrize("name", LINEAR)
def test_slopes_of_a_linear_method_are_exact(merger: Merger, name: str) -> None:
    weights = middle(name)
    gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(9))
    found = merged(merger, name, weights).slopes(UNET, gradient)
    assert found.keys() == {(weight, "IN04") for weight in weights}
    models = [Checkpoint(m.path)[UNET].double() for m in merger.models][
        : methods.n_models(methods.get(name))
    ]
    for weight in weights:
        ends = [
            methods.get(name)(*(m.clone() for m in models), **at(weights, weight, step))
            for step in (STEP, -STEP, STEP / 2, -STEP / 2)
        ]
        # Richardson: no error of the third order.
        wide, narrow = (ends[0] - ends[1]) / (2 * STEP), (ends[2] - ends[3]) / STEP
        expected = float(((4 * narrow - wide) / 3 * gradient).sum())
        assert found[weight, "IN04"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["slerp", "train_difference", "similarity_add_difference"])
def test_slopes_of_a_smooth_method_are_those_of_its_merges(merger: Merger, name: str) -> None:
    weights = middle(name)
    gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(9))
    found = merged(merger, name, weights).slopes(UNET, gradient)
    for weight in weights:
        high, low = (merged(merger, name, at(weights, weight, s))[UNET] for s in (STEP, -STEP))
        expected = float(((high - low) / (2 * STEP) * gradient).sum())
        assert found[weight, "IN04"] == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_slope_at_the_end_of_a_domain_is_taken_from_inside(merger: Merger) -> None:
    gradient = torch.ones(2, 3)
    end = merged(merger, "weighted_subtraction", {"alpha": 0.0, "beta": 0.5})
    near = merged(merger, "weighted_subtraction", {"alpha": 1e-4, "beta": 0.5})
    key = ("alpha", "IN04")
    assert end.slopes(UNET, gradient)[key] == pytest.approx(
        near.slopes(UNET, gradient)[key], rel=1e-3
    )


def test_clipped_values_do_not_follow_the_weight(merger: Merger) -> None:
    gradient = torch.ones(2, 3)
    clipped = merged(merger, "weighted_sum", {"alpha": 1.5}, clip=True)
    assert clipped.slopes(UNET, gradient) == {("alpha", "IN04"): 0.0}
    inside = merged(merger, "weighted_sum", {"alpha": 0.5}, clip=True)
    free = merged(merger, "weighted_sum", {"alpha": 0.5})
    assert inside.slopes(UNET, gradient) == pytest.approx(free.slopes(UNET, gradient), rel=1e-3)


def test_tensors_that_are_not_merged_follow_nothing(merger: Merger) -> None:
    found = merged(merger, "weighted_sum", {"alpha": 0.5})
    assert found.moved_by(toy.POSITION_IDS) == []
    assert found.moved_by(toy.VAE_NAMES[0]) == []
    assert found.moved_by(UNET) == [("alpha", "IN04")]


def test_live_tensor_of_another_shape_has_the_same_slope(merger: Merger) -> None:
    found, gradient = merged(merger, "weighted_sum", {"alpha": 0.5}), torch.arange(6.0)
    assert found.slopes(UNET, gradient) == found.slopes(UNET, gradient.view(2, 3))


def test_gradient_that_is_not_finite_names_its_tensor(merger: Merger) -> None:
    found = merged(merger, "weighted_sum", {"alpha": 0.5})
    with pytest.raises(TrialError, match=f"the gradient of tensor '{UNET}' is not finite"):
        found.slopes(UNET, torch.full((2, 3), float("inf")))


def test_only_the_common_channels_of_an_inpainting_model_are_followed(tmp_path: Path) -> None:
    first = toy.BLOCKS["IN00"][0]
    changes = [{first: torch.full((2, 9, 3, 3), 8.0)}, {first: torch.zeros(2, 4, 3, 3)}]
    paths = [
        toy.write_toy(tmp_path / f"{i}.safetensors", seed=i, changes=change)
        for i, change in enumerate(changes)
    ]
    found = merged(Merger([Checkpoint(path) for path in paths]), "weighted_sum", {"alpha": 0.5})
    slopes = found.slopes(first, torch.ones(2, 9, 3, 3))
    assert slopes["alpha", "IN00"] == pytest.approx(-8.0 * 2 * 4 * 9)


def sdxl(path: Path, seed: int) -> Path:
    """A tensor or two of each text encoder and one of each block."""
    chance = torch.Generator().manual_seed(seed)
    names = {
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (4,),
        "conditioner.embedders.1.model.ln_final.weight": (4,),
        "conditioner.embedders.1.model.text_projection": (4, 4),
        **{
            f"model.diffusion_model.{side}_blocks.{i}.0.in_layers.2.weight": (4, 4)
            for side in ("input", "output")
            for i in range(9)
        },
        "model.diffusion_model.middle_block.0.in_layers.2.weight": (4, 4),
        "model.diffusion_model.label_emb.0.0.weight": (4, 4),
    }
    tensors: dict[str, Tensor] = {
        name: torch.randn(*shape, generator=chance) for name, shape in names.items()
    }
    save_file(tensors, path)
    return path


def test_each_text_encoder_of_sdxl_follows_its_own_weight(tmp_path: Path) -> None:
    models = [Checkpoint(sdxl(tmp_path / f"{i}.safetensors", i)) for i in range(2)]
    merger = Merger(models)
    assert merger.architecture is SDXL
    weights = {"alpha": {**dict.fromkeys(SDXL.blocks, 0.5), "TE2": 0.25}}
    recipe = Recipe("weighted_sum", "sdxl", merger.references(), weights, precision="fp32")
    found = merger.merge(recipe)
    one = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
    two = "conditioner.embedders.1.model.ln_final.weight"
    for name, block in ((one, "base"), (two, "TE2")):
        gradient = torch.randn(4, generator=torch.Generator().manual_seed(1))
        expected = float(((models[1][name] - models[0][name]) * gradient).sum())
        slopes = found.slopes(name, gradient)
        assert slopes == {("alpha", block): pytest.approx(expected, rel=1e-5)}


def test_slope_of_a_loras_strength_is_the_product_with_what_it_adds(tmp_path: Path) -> None:
    name = f"{toy.UNET}.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    text = f"{toy.TEXT}.encoder.layers.11.self_attn.out_proj.weight"
    base = toy.write_toy(tmp_path / "a.safetensors", changes={name: torch.zeros(4, 4)})
    chance = torch.Generator().manual_seed(1)
    pieces = {}
    for module, n_out, n_in in (
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 4, 4),
        ("lora_te_text_model_encoder_layers_11_self_attn_out_proj", 2, 3),
    ):
        pieces[f"{module}.lora_up.weight"] = torch.randn(n_out, 2, generator=chance)
        pieces[f"{module}.lora_down.weight"] = torch.randn(2, n_in, generator=chance)
    save_file(pieces, tmp_path / "lora.safetensors")
    merger = Merger([Checkpoint(base), Checkpoint(tmp_path / "lora.safetensors")])
    found = merged(merger, "weighted_sum", {"alpha": 0.6})
    for tensor, block, start in ((name, "M00", "lora_unet"), (text, "base", "lora_te")):
        up, down = (
            next(t for n, t in pieces.items() if n.startswith(start) and way in n)
            for way in ("up", "down")
        )
        gradient = torch.randn(up.shape[0], down.shape[1], generator=chance)
        expected = float((up @ down * gradient).sum())
        slopes = found.slopes(tensor, gradient)
        assert slopes == {("alpha", block): pytest.approx(expected, rel=1e-4)}
    # Of a tensor that the LoRA leaves as it is, nothing.
    assert found.slopes(UNET, torch.ones(2, 3)) == {}


def test_slope_of_a_group_is_the_sum_of_its_members(merger: Merger) -> None:
    found = space.build(
        ["alpha"], SD1, freeze={"base": 0.1}, ranges={}, groups=[["IN00", "IN01"], ["OUT1*"]]
    )
    slopes = {("alpha", block): float(i) for i, block in enumerate(SD1.blocks)}
    by = found.slopes(slopes)
    assert by["IN00_alpha-IN01_alpha"] == 1 + 2
    assert by["OUT10_alpha-OUT11_alpha"] == 24 + 25
    assert by["M00_alpha"] == 13
    assert "base_alpha" not in by
    assert ("alpha", "base") not in found.searched


def test_slope_of_a_knot_is_shared_by_what_lies_between(merger: Merger) -> None:
    found = space.build(["alpha"], SD1, freeze={}, ranges={}, groups=[], smooth=3)
    slopes = dict.fromkeys((("alpha", block) for block in SD1.network), 1.0)
    by = found.slopes(slopes)
    assert sum(by.values()) == pytest.approx(len(SD1.network))
    values = {p.name: 0.5 for p in found.parameters}
    for name, slope in by.items():
        high, low = (found.weights({**values, name: 0.5 + s})["alpha"] for s in (0.1, -0.1))
        risen = sum(high[block] - low[block] for block in SD1.network)
        assert risen / 0.2 == pytest.approx(slope)
