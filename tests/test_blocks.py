from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import bayesian_merger
from bayesian_merger.blocks import SD1, UNET, Place, detect, short_names
from bayesian_merger.errors import CheckpointError

CONFIGS = Path(bayesian_merger.__file__).parent / "backends" / "configs" / "sd1"
IN = UNET + "input_blocks."
OUT = UNET + "output_blocks."


def block_of(own: str) -> str:
    """The block of a tensor by the structure of diffusers' U-Net, which knows no block numbers.

    Each of its four levels has two residual layers on the way down and three on the way up, and
    all but the last level end with a change of resolution.
    """
    if own.startswith(("conv_in.", "time_embedding.")):
        return "IN00"
    if own.startswith(("conv_norm_out.", "conv_out.")):
        return "OUT11"
    if own.startswith("mid_block."):
        return "M00"
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.", own)
    assert found, own
    way, level, kind, layer = found[1], int(found[2]), found[3], int(found[4])
    if way == "down":
        return f"IN{3 * level + (3 if kind == 'downsamplers' else layer + 1):02}"
    return f"OUT{3 * level + (2 if kind == 'upsamplers' else layer):02}"


def original(own: str) -> str:
    """The checkpoint's name for a tensor of diffusers' U-Net."""
    name = own
    for pattern, new in (
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
    ):
        name = re.sub(pattern, new, name)
    number = int(block_of(own)[-2:])
    up = 1 if number == 2 else 2
    name = re.sub(r"^down_blocks\.\d\.resnets\.\d\.", f"input_blocks.{number}.0.", name)
    name = re.sub(r"^down_blocks\.\d\.attentions\.\d\.", f"input_blocks.{number}.1.", name)
    name = re.sub(r"^down_blocks\.\d\.downsamplers\.0\.conv", f"input_blocks.{number}.0.op", name)
    name = re.sub(r"^up_blocks\.\d\.resnets\.\d\.", f"output_blocks.{number}.0.", name)
    name = re.sub(r"^up_blocks\.\d\.attentions\.\d\.", f"output_blocks.{number}.1.", name)
    name = re.sub(r"^up_blocks\.\d\.upsamplers\.0\.", f"output_blocks.{number}.{up}.", name)
    if "resnets" in own:
        for mine, theirs in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("time_emb_proj", "emb_layers.1"),
            ("conv_shortcut", "skip_connection"),
        ):
            name = name.replace(f".{mine}.", f".{theirs}.")
    return UNET + name


@pytest.fixture(scope="module")
def unet() -> Any:
    """diffusers' U-Net of SD1.5, without memory for its tensors."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = diffusers.UNet2DConditionModel.load_config(CONFIGS / "unet")
        return diffusers.UNet2DConditionModel.from_config(config)


def test_sd1_has_the_26_blocks_of_merge_block_weighted_in_their_order() -> None:
    assert " ".join(SD1.blocks) == (
        "base IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11 M00 "
        "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    )


def test_each_of_the_686_unet_tensors_of_sd15_belongs_to_the_block_of_its_layer(unet: Any) -> None:
    expected = {original(own): Place("unet", block_of(own)) for own in unet.state_dict()}
    assert len(expected) == 686
    assert {name: SD1.place(name) for name in expected} == expected
    assert {place.block for place in expected.values()} == set(SD1.blocks) - {"base"}


def test_the_names_of_that_test_are_those_that_diffusers_reads_from_a_checkpoint(
    unet: Any,
) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = {original(own): own for own in unet.state_dict()}
    read = convert_ldm_unet_checkpoint({name: name for name in names}, dict(unet.config))
    assert read == {own: name for name, own in names.items()}


def test_each_of_the_196_text_encoder_tensors_and_position_ids_belong_to_base() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder")
        encoder = transformers.CLIPTextModel(config)
    names = {f"{toy.TEXT}.{n.removeprefix('text_model.')}" for n in encoder.state_dict()}
    assert len(names) == 196
    assert {SD1.place(n) for n in {*names, toy.POSITION_IDS}} == {Place("te", "base")}


def test_each_of_the_248_vae_tensors_belongs_to_the_vae_which_is_not_searched() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = diffusers.AutoencoderKL.load_config(CONFIGS / "vae")
        vae = diffusers.AutoencoderKL.from_config(config)
    names = [f"first_stage_model.{name}" for name in vae.state_dict()]
    assert len(names) == 248
    assert {SD1.place(name) for name in names} == {Place("vae", "vae")}
    assert "vae" not in SD1.blocks


def test_ema_and_schedule_belong_to_no_block(unet: Any) -> None:
    squashed = [original(n).removeprefix("model.").replace(".", "") for n in unet.state_dict()]
    ema = [f"model_ema.{name}" for name in squashed] + ["model_ema.decay", "model_ema.num_updates"]
    assert len(ema) == 688
    schedule = ["betas", "alphas_cumprod", "log_one_minus_alphas_cumprod", "posterior_variance"]
    assert {SD1.place(name) for name in ema + schedule} == {Place("other", "")}


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        # `.out.` with its dots is the last convolution, `to_out.0` belongs to an attention.
        (UNET + "out.0.weight", "OUT11"),
        (UNET + "out.2.bias", "OUT11"),
        (IN + "1.1.transformer_blocks.0.attn1.to_out.0.weight", "IN01"),
        (UNET + "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias", "M00"),
        (OUT + "3.1.transformer_blocks.0.attn1.to_out.0.weight", "OUT03"),
        (OUT + "4.0.out_layers.3.weight", "OUT04"),
        # The block's number counts, not that of a transformer layer or a layer in the block.
        (IN + "7.1.transformer_blocks.3.ff.net.0.proj.weight", "IN07"),
        (OUT + "5.1.transformer_blocks.9.norm1.weight", "OUT05"),
        (OUT + "8.2.conv.weight", "OUT08"),
        (IN + "11.0.in_layers.0.weight", "IN11"),
        (IN + "10.0.in_layers.0.weight", "IN10"),
        (IN + "1.0.in_layers.0.weight", "IN01"),
        (UNET + "time_embed.0.weight", "IN00"),
        (UNET + "time_embed.2.bias", "IN00"),
        (UNET + "middle_block.2.out_layers.3.weight", "M00"),
    ],
)
def test_block_is_told_by_the_whole_name(tensor: str, block: str) -> None:
    assert SD1.place(tensor) == Place("unet", block)


@pytest.mark.parametrize(
    "tensor",
    [
        IN + "12.0.in_layers.0.weight",
        OUT + "12.0.in_layers.0.weight",
        IN + "120.0.weight",
        IN + "1" * 5000 + ".0.weight",
        IN + "x.0.weight",
        UNET + "label_emb.0.0.weight",
        UNET + "outer.weight",
        UNET + "diffusion.weight",
    ],
)
def test_unet_tensor_that_fits_no_block_is_refused_by_name(tensor: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(repr(tensor))):
        SD1.place(tensor)


def test_names_that_only_resemble_a_component_belong_to_no_block() -> None:
    for name in (f"ema.{IN}1.0.weight", "my_first_stage_model.x", "cond_stage_models.x", "out.2"):
        assert SD1.place(name) == Place("other", "")


@pytest.mark.parametrize("block", SD1.blocks)
def test_file_that_lacks_a_block_is_refused(block: str) -> None:
    names = [n for b, pair in toy.BLOCKS.items() for n in pair if b != block]
    with pytest.raises(CheckpointError, match=rf"no tensor for 1 of 26 .*first: {block}\)"):
        SD1.places(names)


def test_unet_without_its_text_encoder_is_refused_as_no_whole_checkpoint() -> None:
    names = [n for n in toy.toy_tensors(0) if n.startswith(UNET)]
    with pytest.raises(CheckpointError, match=r"first: base\); is the file a whole checkpoint"):
        SD1.places(names)


def test_places_covers_every_tensor_of_a_checkpoint_once() -> None:
    names = list(toy.toy_tensors(0))
    places = SD1.places(names)
    assert list(places) == names
    for block, pair in toy.BLOCKS.items():
        assert {places[name].block for name in pair} == {block}


def test_sd15_is_known_by_its_names() -> None:
    assert detect(toy.toy_tensors(0)) is SD1


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "SDXL"),
        ("conditioner.embedders.1.model.ln_final.weight", "SDXL"),
        ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "SD2"),
        (UNET + "joint_blocks.0.context_block.attn.qkv.weight", "SD3"),
        ("joint_blocks.0.x_block.attn.proj.weight", "SD3"),
        (UNET + "double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("double_blocks.18.img_attn.qkv.weight", "Flux"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "LoRA"),
        ("down_blocks.0.attentions.0.norm.weight", "diffusers"),
    ],
)
@pytest.mark.parametrize("beside", [(), (IN + "0.0.weight",)])
def test_other_architectures_are_refused_by_their_name(
    tensor: str, found: str, beside: tuple[str, ...]
) -> None:
    with pytest.raises(
        CheckpointError, match=rf"this is .*{found}.*only whole checkpoints of SD1"
    ):
        detect([*beside, tensor])


def test_file_of_something_else_is_refused_with_its_first_tensor() -> None:
    with pytest.raises(CheckpointError, match=r"not a Stable Diffusion.*'bert\.embeddings'"):
        detect(["bert.embeddings", "bert.pooler"])
    with pytest.raises(CheckpointError, match="holds no tensors"):
        detect([])


def test_sdxl_unet_alone_fits_no_block_of_sd15() -> None:
    names = [*toy.toy_tensors(0), UNET + "label_emb.0.0.weight"]
    with pytest.raises(CheckpointError, match=r"label_emb.*another architecture"):
        detect(names).places(names)


def test_short_names_are_those_of_the_block_and_of_older_tools() -> None:
    names = short_names("alpha", SD1)
    assert len(names) == 26 + 25
    assert names["base_alpha"] == "base"
    assert names["block_0_alpha"] == names["IN00_alpha"] == "IN00"
    assert names["block_12_alpha"] == names["M00_alpha"] == "M00"
    assert names["block_13_alpha"] == names["OUT00_alpha"] == "OUT00"
    assert names["block_24_alpha"] == names["OUT11_alpha"] == "OUT11"
    assert "block_-1_alpha" not in names
    assert "block_25_alpha" not in names
