from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoint import fuzzed, one_line
from test_names import Shapes, known_layout
from torch import Tensor

from bayesian_merger.checkpoint import Checkpoint, Layout
from bayesian_merger.errors import CheckpointError
from bayesian_merger.lora import Lora, is_lora

UNET = "model.diffusion_model."
QUERY = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV = f"{UNET}input_blocks.1.0.in_layers.2.weight"
NORM = f"{UNET}input_blocks.1.1.norm.weight"
BASE: Shapes = {
    CONV: (6, 4, 3, 3),
    f"{UNET}input_blocks.1.0.in_layers.2.bias": (6,),
    NORM: (4,),
    f"{UNET}input_blocks.1.1.proj_in.weight": (6, 4, 1, 1),
    QUERY: (6, 4),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (6, 768),
}
# What kohya's scripts call the modules of QUERY and CONV.
LINEAR_MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV_MODULE = "lora_unet_down_blocks_0_resnets_0_conv1"


def lora(
    folder: Path,
    tensors: Mapping[str, Tensor],
    base: Shapes | None = None,
    architecture: str = "sd1",
    metadata: Mapping[str, str] | None = None,
) -> Lora:
    path = folder / "lora.safetensors"
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, dict(metadata or {}))
    layout = {n: Layout(s, torch.float16) for n, s in (BASE if base is None else base).items()}
    return Lora(Checkpoint(path), layout, architecture)


def refused(folder: Path, tensors: Mapping[str, Tensor], saying: str) -> None:
    with pytest.raises(CheckpointError, match=saying) as caught:
        lora(folder, tensors)
    assert "lora.safetensors" in one_line(caught.value)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def factors(module: str, n_out: int = 6, n_in: int = 4, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{module}.lora_up.weight": random(n_out, rank),
        f"{module}.lora_down.weight": random(rank, n_in),
    }


# Formulas


def test_lora_adds_up_times_down_times_alpha_over_rank(tmp_path: Path) -> None:
    found = lora(
        tmp_path,
        {
            f"{LINEAR_MODULE}.lora_up.weight": torch.tensor([[1.0, 0], [0, 2], *[[0, 0]] * 4]),
            f"{LINEAR_MODULE}.lora_down.weight": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
            f"{LINEAR_MODULE}.alpha": torch.tensor(1.0),
        },
    )
    assert found.tensors == (QUERY,)
    half = [[0.5, 1, 1.5, 2], [5, 6, 7, 8], *[[0, 0, 0, 0]] * 4]
    assert found.delta(QUERY).tolist() == half
    assert found.delta(QUERY).dtype == torch.float32
    assert found.notes == []


def test_without_alpha_the_product_is_not_scaled(tmp_path: Path) -> None:
    tensors = factors(LINEAR_MODULE)
    up, down = tensors.values()
    assert torch.equal(lora(tmp_path, tensors).delta(QUERY), up @ down)


def test_tensor_that_no_module_changes_gets_zeros(tmp_path: Path) -> None:
    found = lora(tmp_path, factors(LINEAR_MODULE))
    assert torch.equal(found.delta(CONV), torch.zeros(6, 4, 3, 3))


def test_half_precision_is_multiplied_in_float32(tmp_path: Path) -> None:
    tensors = {n: t.to(torch.float16) for n, t in factors(LINEAR_MODULE).items()}
    up, down = (tensor.float() for tensor in tensors.values())
    assert torch.equal(lora(tmp_path, tensors).delta(QUERY), up @ down)


def test_convolution_is_one_of_its_kernel_and_one_of_1_x_1(tmp_path: Path) -> None:
    down, up = random(2, 4, 3, 3), random(6, 2, 1, 1)
    found = lora(
        tmp_path,
        {f"{CONV_MODULE}.lora_down.weight": down, f"{CONV_MODULE}.lora_up.weight": up},
    )
    image = random(1, 4, 5, 5)
    convolved = torch.conv2d(torch.conv2d(image, down), up)
    torch.testing.assert_close(torch.conv2d(image, found.delta(CONV)), convolved)


def test_locon_with_middle_is_three_convolutions(tmp_path: Path) -> None:
    down, mid, up = random(2, 4, 1, 1), random(2, 2, 3, 3), random(6, 2, 1, 1)
    found = lora(
        tmp_path,
        {
            f"{CONV_MODULE}.lora_down.weight": down,
            f"{CONV_MODULE}.lora_mid.weight": mid,
            f"{CONV_MODULE}.lora_up.weight": up,
        },
    )
    image = random(1, 4, 5, 5)
    convolved = torch.conv2d(torch.conv2d(torch.conv2d(image, down), mid), up)
    torch.testing.assert_close(torch.conv2d(image, found.delta(CONV)), convolved)


def test_convolution_of_1_x_1_may_be_trained_as_a_matrix(tmp_path: Path) -> None:
    tensors = factors("lora_unet_down_blocks_0_attentions_0_proj_in")
    up, down = tensors.values()
    found = lora(tmp_path, tensors)
    name = f"{UNET}input_blocks.1.1.proj_in.weight"
    assert torch.equal(found.delta(name), (up @ down)[..., None, None])


def test_loha_multiplies_two_products(tmp_path: Path) -> None:
    a, b, c, d = random(6, 2), random(2, 4), random(6, 2, seed=1), random(2, 4, seed=1)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{LINEAR_MODULE}.{n}": t for n, t in zip(names, (a, b, c, d), strict=True)}
    found = lora(tmp_path, {**tensors, f"{LINEAR_MODULE}.alpha": torch.tensor(4.0)})
    torch.testing.assert_close(found.delta(QUERY), 2 * (a @ b) * (c @ d))


def test_loha_of_a_convolution_with_cores(tmp_path: Path) -> None:
    pieces = {
        "hada_t1": random(2, 2, 3, 3),
        "hada_w1_a": random(2, 6),
        "hada_w1_b": random(2, 4),
        "hada_t2": random(2, 2, 3, 3, seed=1),
        "hada_w2_a": random(2, 6, seed=1),
        "hada_w2_b": random(2, 4, seed=1),
    }
    found = lora(tmp_path, {f"{CONV_MODULE}.{n}": t for n, t in pieces.items()})
    delta = found.delta(CONV)
    for place in ((0, 0, 0, 0), (5, 3, 2, 1), (2, 1, 0, 2)):
        out, inner, row, column = place
        one, two = (
            pieces[f"hada_w{i}_a"][:, out]
            @ pieces[f"hada_t{i}"][:, :, row, column]
            @ pieces[f"hada_w{i}_b"][:, inner]
            for i in (1, 2)
        )
        assert float(delta[place]) == pytest.approx(float(one * two), rel=1e-5)


def test_lokr_is_the_kronecker_product(tmp_path: Path) -> None:
    a, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 10], [100, 0], [0, 5]])
    found = lora(
        tmp_path,
        {
            f"{LINEAR_MODULE}.lokr_w1": a,
            f"{LINEAR_MODULE}.lokr_w2": b,
            # Whole factors are not scaled, whatever alpha says.
            f"{LINEAR_MODULE}.alpha": torch.tensor(7.0),
        },
    )
    assert found.delta(QUERY).tolist() == [
        [1, 10, 2, 20],
        [100, 0, 200, 0],
        [0, 5, 0, 10],
        [3, 30, 4, 40],
        [300, 0, 400, 0],
        [0, 15, 0, 20],
    ]


def test_lokr_with_factored_halves_is_scaled_by_their_rank(tmp_path: Path) -> None:
    pieces = {
        "lokr_w1_a": random(2, 3),
        "lokr_w1_b": random(3, 2),
        "lokr_w2_a": random(3, 3),
        "lokr_w2_b": random(3, 2, seed=1),
        "alpha": torch.tensor(6.0),
    }
    found = lora(tmp_path, {f"{LINEAR_MODULE}.{n}": t for n, t in pieces.items()})
    one = pieces["lokr_w1_a"] @ pieces["lokr_w1_b"]
    two = pieces["lokr_w2_a"] @ pieces["lokr_w2_b"]
    torch.testing.assert_close(found.delta(QUERY), 2 * torch.kron(one, two))


def test_lokr_of_a_convolution(tmp_path: Path) -> None:
    one, core, a, b = random(2, 2), random(2, 2, 3, 3), random(2, 3), random(2, 2, seed=1)
    whole = torch.einsum("ijhw,io,jn->onhw", core, a, b).contiguous()
    expected = torch.kron(one[..., None, None], whole)
    cored = {"lokr_w1": one, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    # LyCORIS flattens the kernel into the second factor where there is no core.
    flat = {"lokr_w1": one, "lokr_w2_a": torch.eye(3), "lokr_w2_b": whole.flatten(1)}
    for pieces in (cored, flat, {"lokr_w1": one, "lokr_w2": whole}):
        found = lora(tmp_path, {f"{CONV_MODULE}.{n}": t for n, t in pieces.items()})
        torch.testing.assert_close(found.delta(CONV), expected)


@pytest.mark.parametrize("piece", ["diff", "w_norm"])
def test_full_difference_is_taken_as_it_is(tmp_path: Path, piece: str) -> None:
    change = random(4)
    found = lora(tmp_path, {f"lora_unet_down_blocks_0_attentions_0_norm.{piece}": change})
    assert torch.equal(found.delta(NORM), change)


def test_bias_may_come_beside_any_kind(tmp_path: Path) -> None:
    bias = random(6)
    down, up = random(2, 4, 3, 3), random(6, 2, 1, 1)
    found = lora(
        tmp_path,
        {
            f"{CONV_MODULE}.lora_down.weight": down,
            f"{CONV_MODULE}.lora_up.weight": up,
            f"{CONV_MODULE}.diff_b": bias,
        },
    )
    assert found.tensors == (CONV, CONV.replace("weight", "bias"))
    assert torch.equal(found.delta(found.tensors[1]), bias)


# PEFT's alpha


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 8}, 4.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / math.sqrt(2)),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_q": 1, "q": 1}}, 4.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_alpha_of_peft_is_read_from_the_metadata(
    tmp_path: Path, settings: dict[str, object], scale: float
) -> None:
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = random(6, 2), random(2, 4)
    found = lora(
        tmp_path,
        {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up},
        metadata={"lora_adapter_metadata": json.dumps(settings)},
    )
    torch.testing.assert_close(found.delta(QUERY), up @ down * scale)


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, '{"unet.lora_alpha": "8"}', '{"unet.lora_alpha": 1e999}']
)
def test_metadata_that_says_no_alpha_is_refused(tmp_path: Path, text: str) -> None:
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(CheckpointError, match="metadata") as caught:
        lora(tmp_path, factors(module), metadata={"lora_adapter_metadata": text})
    assert "lora.safetensors" in one_line(caught.value)


# Names


@pytest.mark.parametrize(
    "module",
    [
        LINEAR_MODULE,
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "base_model.model.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ],
)
@pytest.mark.parametrize(
    ("up", "down"),
    [
        ("lora_up.weight", "lora_down.weight"),
        ("lora_B.weight", "lora_A.weight"),
        ("lora_B.default.weight", "lora_A.default.weight"),
        ("lora.up.weight", "lora.down.weight"),
    ],
)
def test_tools_name_one_module_in_many_ways(
    tmp_path: Path, module: str, up: str, down: str
) -> None:
    tensors = {f"{module}.{up}": random(6, 2), f"{module}.{down}": random(2, 4)}
    assert is_lora(tensors)
    assert torch.equal(lora(tmp_path, tensors).delta(QUERY), random(6, 2) @ random(2, 4))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
            f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora",
            "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.out_proj.weight",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer",
            "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.q_proj.weight",
        ),
        (
            "text_encoder.encoder.layers.3.self_attn.q_proj.lora",
            "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.q_proj.weight",
        ),
    ],
)
def test_names_of_old_and_new_versions_of_diffusers(
    tmp_path: Path, name: str, tensor: str
) -> None:
    tensors = {f"{name}.up.weight": random(6, 2), f"{name}.down.weight": random(2, 4)}
    assert lora(tmp_path, tensors, {tensor: (6, 4)}).tensors == (tensor,)


@pytest.mark.parametrize(
    ("file", "kohya", "architecture"),
    [
        ("sd1-ldm", "sd1-kohya", "sd1"),
        ("sdxl-sgm", "sdxl-kohya", "sdxl"),
        ("sdxl-sgm", "sdxl-kohya_but_diffusers", "sdxl"),
    ],
)
def test_every_module_of_kohya_is_a_part_of_a_tensor(
    tmp_path: Path, file: str, kohya: str, architecture: str
) -> None:
    base = known_layout(file)
    tensors = {}
    for name, shape in known_layout(kohya).items():
        part, _, rest = name.replace("first_stage_model", "vae").partition(".")
        module, _, end = f"lora_{part}_{rest}".rpartition(".")
        flat = module.replace(".", "_")
        if end == "weight" and len(shape) > 1:
            tensors[f"{flat}.lora_up.weight"] = torch.zeros(shape[0], 1)
            tensors[f"{flat}.lora_down.weight"] = torch.zeros(1, *shape[1:])
        elif end != "position_ids":
            tensors[f"{flat}.{'diff' if end == 'weight' else 'diff_b'}"] = torch.zeros(shape)
    found = lora(tmp_path, tensors, base, architecture)
    model = ("model.diffusion", "cond_stage", "conditioner.", "first_stage")
    left = {name for name in base if name.startswith(model)} - set(found.tensors)
    assert all(name.endswith(("position_ids", "logit_scale")) for name in left)
    assert found.notes == []


def test_fused_layer_of_open_clip_takes_three_modules(tmp_path: Path) -> None:
    name = "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_weight"
    module = "lora_te2_text_model_encoder_layers_7_self_attn_"
    tensors = {**factors(f"{module}q_proj", 4), **factors(f"{module}v_proj", 4, rank=1)}
    found = lora(tmp_path, tensors, {name: (12, 4)}, "sdxl").delta(name)
    q, v = (random(4, rank) @ random(rank, 4) for rank in (2, 1))
    assert torch.equal(found, torch.cat((q, torch.zeros(4, 4), v)))


def test_module_of_a_part_leaves_the_other_rows(tmp_path: Path) -> None:
    name = "joint_blocks.0.x_block.attn.qkv.bias"
    change = {"transformer.transformer_blocks.0.attn.to_v.diff_b": torch.ones(2)}
    found = lora(tmp_path, change, {name: (6,)}, "sd3")
    assert found.delta(name).tolist() == [0, 0, 0, 0, 1, 1]


def test_projection_of_open_clip_is_transposed(tmp_path: Path) -> None:
    name = "conditioner.embedders.1.model.text_projection"
    found = lora(tmp_path, factors("lora_te2_text_projection", 4), {name: (4, 4)}, "sdxl")
    assert torch.equal(found.delta(name), (random(4, 2) @ random(2, 4)).T)


def test_flux_by_kohya_and_by_diffusers_is_the_same(tmp_path: Path) -> None:
    name = f"{UNET}single_blocks.3.linear1.weight"
    whole = factors("lora_unet_single_blocks_3_linear1", 28)
    up, down = whole.values()
    block = "transformer.single_transformer_blocks.3."
    parts = {}
    for module, rows in (("attn.to_k", slice(4, 8)), ("proj_mlp", slice(12, 28))):
        parts[f"{block}{module}.lora_B.weight"] = up[rows]
        parts[f"{block}{module}.lora_A.weight"] = down
    kohya = lora(tmp_path, whole, {name: (28, 4)}, "flux").delta(name)
    diffusers = lora(tmp_path, parts, {name: (28, 4)}, "flux").delta(name)
    assert torch.equal(kohya, up @ down)
    assert torch.equal(diffusers[4:8], kohya[4:8])
    assert torch.equal(diffusers[12:], kohya[12:])
    assert not diffusers[:4].any()
    assert not diffusers[8:12].any()


def test_final_layer_of_flux_has_scale_and_shift_in_the_other_order(tmp_path: Path) -> None:
    name = "final_layer.adaLN_modulation.1.weight"  # of a file with the transformer alone
    tensors = factors("transformer.norm_out.linear")
    up, down = tensors.values()
    found = lora(tmp_path, tensors, {name: (6, 4)}, "flux")
    assert torch.equal(found.delta(name), (up @ down).roll(3, 0))


def test_second_encoder_of_flux_is_the_third_to_kohya(tmp_path: Path) -> None:
    name = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    for prefix in ("lora_te2", "lora_te3"):
        tensors = factors(f"{prefix}_encoder_block_0_layer_0_SelfAttention_q")
        assert lora(tmp_path, tensors, {name: (6, 4)}, "flux").tensors == (name,)


def test_modules_that_hit_the_same_tensor_add_up(tmp_path: Path) -> None:
    tensors = {
        **factors(LINEAR_MODULE),
        **factors("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
    }
    found = lora(tmp_path, tensors)
    assert torch.equal(found.delta(QUERY), 2 * (random(6, 2) @ random(2, 4)))


def test_modules_of_a_part_that_a_lacks_are_left_out_with_a_note(tmp_path: Path) -> None:
    tensors = {
        **factors("lora_unet_double_blocks_0_img_mlp_0"),
        **factors("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    }
    name = "double_blocks.0.img_mlp.0.weight"
    found = lora(tmp_path, tensors, {name: (6, 4)}, "flux")
    assert found.tensors == (name,)
    assert found.notes == [
        "lora.safetensors: 1 modules are for the text_encoder, which model A lacks"
    ]


def test_tensors_are_in_the_order_of_model_a(tmp_path: Path) -> None:
    tensors = {
        **factors(LINEAR_MODULE),
        f"{CONV_MODULE}.diff": torch.zeros(6, 4, 3, 3),
    }
    base = {QUERY: (6, 4), CONV: (6, 4, 3, 3)}
    assert lora(tmp_path, tensors, base).tensors == (QUERY, CONV)
    assert lora(tmp_path, tensors, dict(reversed(base.items()))).tensors == (CONV, QUERY)


# What is a LoRA


@pytest.mark.parametrize(
    "name",
    [
        f"{LINEAR_MODULE}.lora_up.weight",
        "unet.x.to_q.lora_A.weight",
        "unet.x.processor.to_q_lora.down.weight",
        f"{LINEAR_MODULE}.hada_w1_a",
        f"{LINEAR_MODULE}.lokr_w1",
        f"{LINEAR_MODULE}.oft_blocks",
    ],
)
def test_lora_is_known_by_its_names(name: str) -> None:
    assert is_lora(["something", name])


@pytest.mark.parametrize("file", ["sd1-ldm", "sdxl-sgm", "sd3-comfyui", "flux-flux"])
def test_checkpoint_is_no_lora(file: str) -> None:
    assert not is_lora(known_layout(file))


def test_toy_checkpoint_is_no_lora() -> None:
    assert not is_lora(toy.toy_tensors(0))


# What is refused


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("on_input", "IA3"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
        ("lambda_layer", "T-LoRA"),
    ],
)
def test_kind_that_cannot_be_read_is_named(tmp_path: Path, piece: str, kind: str) -> None:
    tensors = {**factors(LINEAR_MODULE), f"{LINEAR_MODULE}.{piece}": torch.ones(6, 1)}
    refused(tmp_path, tensors, f"this is {kind}")


@pytest.mark.parametrize("piece", ["lora_A.second.weight", "diff", "lokr_w1", "hada_w1_a"])
def test_two_loras_in_one_file_are_refused(tmp_path: Path, piece: str) -> None:
    tensors = {**factors(LINEAR_MODULE), f"{LINEAR_MODULE}.{piece}": torch.ones(2, 4)}
    refused(tmp_path, tensors, "is it several LoRAs in one file")


def test_foreign_tensor_is_named(tmp_path: Path) -> None:
    tensors = {**factors(LINEAR_MODULE), "stranger": torch.ones(1)}
    refused(tmp_path, tensors, "'stranger' is no piece")


@pytest.mark.parametrize(
    ("module", "n_in", "title"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 4, "SDXL"),
        ("lora_unet_down_blocks_5_attentions_0_transformer_blocks_0_attn2_to_k", 2048, "SDXL"),
        ("lora_unet_down_blocks_5_attentions_0_transformer_blocks_0_attn2_to_k", 1024, "SD2"),
        ("transformer.single_transformer_blocks.0.attn.to_k", 4, "Flux"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", 4, "SD3"),
    ],
)
def test_module_that_fits_nothing_hints_at_the_architecture(
    tmp_path: Path, module: str, n_in: int, title: str
) -> None:
    tensors = {**factors(LINEAR_MODULE), **factors(module, n_in=n_in)}
    saying = rf"1 of 2 modules fit no tensor of model A \(first: '{module}'\); .* for {title}\?"
    refused(tmp_path, tensors, saying)


def test_lora_of_another_width_hints_at_the_architecture(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    saying = r"shape \[6, 1024\].* takes \[6, 768\]; is it a LoRA for SD2\?"
    refused(tmp_path, factors(module, n_in=1024), saying)


@pytest.mark.parametrize(("n_out", "n_in"), [(5, 4), (6, 5), (4, 6)])
def test_lora_of_another_model_of_the_architecture_is_refused(
    tmp_path: Path, n_out: int, n_in: int
) -> None:
    tensors = factors(LINEAR_MODULE, n_out, n_in)
    refused(tmp_path, tensors, rf"has shape \[{n_out}, {n_in}\].*; is it for another model\?")


@pytest.mark.parametrize(
    "piece", ["lora_up.weight", "lora_down.weight", "hada_w2_b", "lokr_w1", "lokr_w2_b"]
)
def test_module_that_lacks_a_piece_is_named(tmp_path: Path, piece: str) -> None:
    kinds: tuple[dict[str, Tensor], ...] = (
        {"lora_up.weight": random(6, 2), "lora_down.weight": random(2, 4)},
        {
            f"hada_w{i}_{s}": random(*((6, 2) if s == "a" else (2, 4)))
            for i in (1, 2)
            for s in "ab"
        },
        {"lokr_w1": random(2, 2), "lokr_w2_a": random(3, 1), "lokr_w2_b": random(1, 2)},
    )
    pieces = next(kind for kind in kinds if piece in kind)
    tensors = {f"{LINEAR_MODULE}.{n}": t for n, t in pieces.items() if n != piece}
    refused(tmp_path, tensors, f"module '{LINEAR_MODULE}' lacks its piece '{piece.split('.')[0]}")


@pytest.mark.parametrize(
    "pieces",
    [
        {"lora_up.weight": random(6, 2), "lora_down.weight": random(3, 4)},
        {"lora_up.weight": random(6), "lora_down.weight": random(4)},
        {"lora_up.weight": torch.ones(()), "lora_down.weight": random(3, 4)},
        {"lora_up.weight": random(6, 2), "lora_down.weight": random(2, 4), "alpha": random(2)},
        {
            "hada_w1_a": random(1, 2),
            "hada_w1_b": random(2, 4),
            "hada_w2_a": random(6, 2),
            "hada_w2_b": random(2, 4),
        },
        {"lokr_w1": random(2), "lokr_w2": random(3)},
    ],
)
def test_pieces_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, pieces: dict[str, Tensor]
) -> None:
    tensors = {f"{LINEAR_MODULE}.{n}": t for n, t in pieces.items()}
    refused(tmp_path, tensors, "do not fit each other; download")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    tensors = factors(LINEAR_MODULE)
    tensors[f"{LINEAR_MODULE}.lora_up.weight"][3, 1] = value
    refused(tmp_path, tensors, "lora_up.weight' holds NaN or infinity")


def test_empty_tensor_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, factors(LINEAR_MODULE, rank=0), "is empty")


def test_product_larger_than_its_target_is_refused_before_it_is_made(tmp_path: Path) -> None:
    wide = 300_000  # squared, 360 GB
    tensors = {
        f"{LINEAR_MODULE}.lora_up.weight": torch.ones(wide, 1),
        f"{LINEAR_MODULE}.lora_down.weight": torch.ones(1, wide),
    }
    refused(tmp_path, tensors, r"has shape \[300000, 300000\]")


PIECES = st.sampled_from(
    [
        ["lora_up.weight", "lora_down.weight", "alpha"],
        ["lora_up.weight", "lora_down.weight", "lora_mid.weight"],
        ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
        ["lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha"],
        ["lokr_w1_a", "lokr_w1_b", "lokr_w2", "alpha"],
        ["diff", "diff_b"],
    ]
)
SHAPES = st.lists(st.integers(0, 3), max_size=4)


@fuzzed
@given(st.data())
def test_any_shapes_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    base = {CONV: tuple(data.draw(SHAPES)), CONV.replace("weight", "bias"): (2,)}
    tensors = {
        f"{CONV_MODULE}.{piece}": torch.ones(data.draw(SHAPES)) for piece in data.draw(PIECES)
    }
    try:
        found = lora(tmp_path, tensors, base)
    except CheckpointError as error:
        one_line(error)
    else:
        for name in found.tensors:
            assert found.delta(name).shape == base[name]
