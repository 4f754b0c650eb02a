from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import bayesian_merger
from bayesian_merger.blocks import (
    ARCHITECTURES,
    FLUX,
    SD1,
    SD2,
    SD3,
    SD3_LARGE,
    SDXL,
    UNET,
    Architecture,
    Place,
    detect,
    prefix_of,
    short_names,
)
from bayesian_merger.errors import CheckpointError

CONFIGS = Path(bayesian_merger.__file__).parent / "backends" / "configs" / "sd1"
IN = UNET + "input_blocks."
OUT = UNET + "output_blocks."
DOCS = Path(__file__).parent.parent / "docs" / "blocks.md"

CLIP_L = "transformer.text_model.encoder.layers.0.mlp.fc1.weight"
RESBLOCK = "model.transformer.resblocks.0.mlp.c_fc.weight"
T5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
VAE = "first_stage_model.decoder.up.0.block.0.conv1.weight"
LABEL = UNET + "label_emb.0.0.weight"


def unet_names(n: int) -> list[str]:
    """A tensor of each of a U-Net's `n` blocks down, its middle, and `n` blocks up."""
    return [
        UNET + "time_embed.0.weight",
        IN + "0.0.weight",
        *(f"{IN}{i}.0.in_layers.2.weight" for i in range(1, n)),
        UNET + "middle_block.0.in_layers.2.weight",
        *(f"{OUT}{i}.0.in_layers.2.weight" for i in range(n)),
        UNET + "out.2.weight",
    ]


def sd3_names(n: int) -> list[str]:
    """A tensor of each block of SD3's transformer with `n` blocks, and of its encoders."""
    return [
        *(f"{UNET}{name}_embedder.{layer}.weight" for name, layer in SD3_EMBEDDERS.items()),
        UNET + "pos_embed",
        *(f"{UNET}joint_blocks.{i}.x_block.attn.qkv.weight" for i in range(n)),
        UNET + "final_layer.linear.weight",
        *(f"text_encoders.{clip}.{CLIP_L}" for clip in ("clip_l", "clip_g")),
        T5,
        VAE,
    ]


SD3_EMBEDDERS = {"x": "proj", "t": "mlp.0", "y": "mlp.0", "context": "1"}
# A few tensors of each block and part of each architecture.
NAMES = {
    SD1: [*unet_names(12), f"cond_stage_model.{CLIP_L}", VAE],
    SD2: [*unet_names(12), LABEL, f"cond_stage_model.{RESBLOCK}", VAE],
    SDXL: [
        *unet_names(9),
        LABEL,
        f"conditioner.embedders.0.{CLIP_L}",
        f"conditioner.embedders.1.{RESBLOCK}",
        VAE,
    ],
    SD3: sd3_names(24),
    SD3_LARGE: sd3_names(38),
    FLUX: [
        *(f"{UNET}{name}_in.weight" for name in ("img", "txt")),
        *(f"{UNET}{name}_in.in_layer.weight" for name in ("time", "vector", "guidance")),
        *(f"{UNET}double_blocks.{i}.img_attn.qkv.weight" for i in range(19)),
        *(f"{UNET}single_blocks.{i}.linear1.weight" for i in range(38)),
        UNET + "final_layer.linear.weight",
        f"text_encoders.clip_l.{CLIP_L}",
        T5,
        VAE.replace("first_stage_model", "vae"),
    ],
}
every_architecture = pytest.mark.parametrize("architecture", NAMES, ids=lambda a: a.name)


def unet_only(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(UNET)]


def bare(names: Iterable[str]) -> list[str]:
    """The U-Net's tensors as files of black-forest-labs and stability name them."""
    return [name.removeprefix(UNET) for name in unet_only(names)]


def listed(config: str) -> dict[str, list[str]]:
    """Component -> the names of all tensors of a checkpoint, from a file that sd-mecha ships."""
    found = importlib.util.find_spec("sd_mecha")
    if not found or not found.submodule_search_locations:
        pytest.skip("sd-mecha is not installed")
    folder = Path(found.submodule_search_locations[0], "extensions", "builtin", "model_configs")
    names: dict[str, list[str]] = {}
    for line in (folder / f"{config}.yaml").read_text().splitlines():
        if component := re.fullmatch(r"  (\w+):", line):
            names[component[1]] = []
        elif name := re.match(r"    (\S+): \{", line):
            names[list(names)[-1]].append(name[1])
    return names


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
    expected = {original(own): block_of(own) for own in unet.state_dict()}
    assert len(expected) == 686
    assert {name: SD1.place(name).block for name in expected} == expected
    assert {SD1.place(name).component for name in expected} == {"unet"}
    assert set(expected.values()) == set(SD1.blocks) - {"base"}


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


def test_each_of_the_248_vae_tensors_belongs_to_the_vae_which_may_follow_base() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = diffusers.AutoencoderKL.load_config(CONFIGS / "vae")
        vae = diffusers.AutoencoderKL.from_config(config)
    names = [f"first_stage_model.{name}" for name in vae.state_dict()]
    assert len(names) == 248
    assert {SD1.place(name) for name in names} == {Place("vae", "base", "VAE")}


def test_ema_and_schedule_belong_to_no_block(unet: Any) -> None:
    squashed = [original(n).removeprefix("model.").replace(".", "") for n in unet.state_dict()]
    ema = [f"model_ema.{name}" for name in squashed] + ["model_ema.decay", "model_ema.num_updates"]
    assert len(ema) == 688
    schedule = ["betas", "alphas_cumprod", "log_one_minus_alphas_cumprod", "posterior_variance"]
    assert {SD1.place(name) for name in ema + schedule} == {Place("other", "")}


def test_markers_of_sampling_belong_to_no_block() -> None:
    markers = ["v_pred", "ztsnr", "edm_vpred.sigma_max", "denoiser.sigmas", "edm_mean"]
    assert {SDXL.place(name) for name in markers} == {Place("other", "")}
    assert SD3.place("model.model_sampling.sigmas") == Place("other", "")


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
    place = SD1.place(tensor)
    assert (place.component, place.block) == ("unet", block)


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
        "input_blocks.12.0.in_layers.0.weight",
    ],
)
def test_unet_tensor_that_fits_no_block_is_refused_by_name(tensor: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(repr(tensor))):
        SD1.place(tensor)


def test_names_that_only_resemble_a_component_belong_to_no_block() -> None:
    for name in (f"ema.{IN}1.0.weight", "my_first_stage_model.x", "cond_stage_models.x", "out"):
        assert SD1.place(name) == Place("other", "")


def test_places_covers_every_tensor_of_a_checkpoint_once() -> None:
    names = list(toy.toy_tensors(0))
    places = SD1.places(names)
    assert list(places) == names
    for block, pair in toy.BLOCKS.items():
        assert {places[name].block for name in pair} == {block}


@every_architecture
def test_file_that_lacks_a_block_of_the_unet_is_refused(architecture: Architecture) -> None:
    names = NAMES[architecture]
    for block in architecture.blocks:
        kept = [name for name in names if architecture.place(name).block != block]
        if block in architecture.encoders:
            assert block not in architecture.blocks_in(kept)
        else:
            with pytest.raises(CheckpointError, match=rf"but 1 of its .*first: {block}\)"):
                architecture.places(kept)


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    [
        (
            "sd1-ldm",
            SD1,
            {
                ("clip_l", "te", ""): 197,
                ("vae", "vae", "VAE"): 248,
                ("diffuser", "unet", ""): 686 - 4 - 4,
                ("diffuser", "unet", "TIME"): 4,
                ("diffuser", "unet", "FINAL"): 4,
                ("ema", "other", ""): 688,
                ("scheduler", "other", ""): 12,
            },
        ),
        (
            "sdxl-sgm",
            SDXL,
            {
                ("clip_l", "te", ""): 197,
                ("clip_g", "te", "TE2"): 390,
                ("vae", "vae", "VAE"): 248,
                ("diffuser", "unet", ""): 1680 - 4 - 4 - 4,
                ("diffuser", "unet", "TIME"): 4,
                ("diffuser", "unet", "LABEL"): 4,
                ("diffuser", "unet", "FINAL"): 4,
                ("diffuser", "other", ""): 4,  # v_pred, ztsnr and two of edm_vpred
                ("scheduler", "other", ""): 12,
            },
        ),
        (
            "sd3-comfyui",
            SD3,
            {
                ("clip_l", "te", ""): 198,
                ("clip_g", "te", "TE2"): 518,
                ("t5xxl", "te", "T5"): 220,
                ("vae", "vae", "VAE"): 244,
                ("diffuser", "unet", ""): 474 + 17 - 4 - 4,
                ("diffuser", "unet", "TIME"): 4,
                ("diffuser", "unet", "LABEL"): 4,
                ("diffuser", "other", ""): 1,  # the sampling's sigmas
            },
        ),
        (
            "flux-flux",
            FLUX,
            {
                ("clip_l", "te", ""): 196,
                ("t5xxl", "te", ""): 219,
                ("vae", "vae", "VAE"): 244,
                ("diffuser", "unet", ""): 780 - 8 - 4,
                ("diffuser", "unet", "TIME"): 8,
                ("diffuser", "unet", "LABEL"): 4,
            },
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Architecture) else "",
)
def test_every_tensor_of_a_real_checkpoint_has_one_place_and_every_weight_a_tensor(
    config: str, architecture: Architecture, expected: dict[tuple[str, str, str], int]
) -> None:
    checkpoint = listed(config)
    names = [name for part in checkpoint.values() for name in part]
    places = architecture.places(names)
    found = Counter(
        (component, places[name].component, places[name].part)
        for component, members in checkpoint.items()
        for name in members
    )
    assert found == expected
    assert detect(names) is architecture
    assert architecture.blocks_in(names) == architecture.blocks
    assert parts_in(architecture, names) == tuple(architecture.parts)
    for name, place in places.items():
        own = name.removeprefix(UNET)
        fitting = [
            rule
            for rule in architecture.rules
            if re.match(rule.pattern, own if rule.component == "unet" else name)
        ]
        assert len(fitting) == (place.component != "other"), name
    # The U-Net of a bare file has the same places.
    alone = bare(names)
    assert detect(alone) is architecture
    assert architecture.blocks_in(alone) == tuple(
        block for block in architecture.blocks if block not in architecture.encoders
    )
    assert all(architecture.place(name) == places[UNET + name] for name in alone)


def test_architectures_have_as_many_weights_as_the_field_gives_them() -> None:
    n_blocks = {name: len(a.blocks) for name, a in ARCHITECTURES.items()}
    assert n_blocks == {
        "sd1": 26,
        "sd2": 26,
        "sdxl": 20,
        "sd3": 27,
        "sd3-large": 41,
        "flux": 61,
    }
    assert " ".join(SDXL.blocks) == (
        "base IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 M00 "
        "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08"
    )
    assert FLUX.blocks[:4] == ("CLIP", "T5", "IN", "D00")
    assert FLUX.blocks[21:23] == ("D18", "S00")
    assert FLUX.blocks[-2:] == ("S37", "OUT")


def parts_in(architecture: Architecture, tensors: Iterable[str]) -> tuple[str, ...]:
    """The parts of which `tensors` hold something."""
    held = {place.part for place in architecture.places(tensors).values()}
    return tuple(part for part in architecture.parts if part in held)


@every_architecture
def test_part_follows_a_block_and_is_none(architecture: Architecture) -> None:
    assert set(architecture.parts.values()) <= set(architecture.blocks)
    assert not set(architecture.parts) & set(architecture.blocks)
    assert parts_in(architecture, NAMES[architecture]) == tuple(architecture.parts)


@every_architecture
def test_block_of_a_number_holds_the_tensors_of_that_number(architecture: Architecture) -> None:
    # SD.Next's lists are off by one: there every block takes the weight of the one before.
    for name in NAMES[architecture]:
        if found := re.search(r"_blocks\.(\d+)\.", name):
            assert architecture.place(name).block.lstrip("INOUTJDS") == f"{int(found[1]):02}"


@pytest.mark.parametrize("architecture", [SD1, SD2, SDXL], ids=lambda a: a.name)
def test_time_and_label_go_with_the_first_block_and_the_end_with_the_last(
    architecture: Architecture,
) -> None:
    # sd-mecha puts the first two in base, SD.Next and model-mixer in the last block.
    last = architecture.blocks[-1]
    assert architecture.place(UNET + "time_embed.2.bias") == Place("unet", "IN00", "TIME")
    assert architecture.place(UNET + "out.0.weight") == Place("unet", last, "FINAL")
    if architecture is not SD1:
        assert architecture.place(LABEL) == Place("unet", "IN00", "LABEL")


def test_both_encoders_of_sdxl_are_base_with_all_their_tensors() -> None:
    # supermerger never merges those of the second that are not called weight or bias.
    second = "conditioner.embedders.1.model."
    for name in ("text_projection", "positional_embedding", "logit_scale", "ln_final.bias"):
        assert SDXL.place(second + name) == Place("te", "base", "TE2")
    assert SDXL.place(f"conditioner.embedders.0.{CLIP_L}") == Place("te", "base")


def test_openclip_of_sd2_is_base() -> None:
    resblock = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    names = [
        *("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"),
        *("ln_final.weight", "ln_final.bias"),
        *(
            f"transformer.resblocks.{i}.{layer}"
            for i in range(24)
            for layer in (
                "attn.in_proj_weight",
                "attn.in_proj_bias",
                *(f"{name}.{kind}" for name in resblock for kind in ("weight", "bias")),
            )
        ),
    ]
    assert {SD2.place(f"cond_stage_model.model.{name}") for name in names} == {Place("te", "base")}


@every_architecture
def test_architecture_is_known_by_its_names(architecture: Architecture) -> None:
    names = NAMES[architecture]
    assert detect(names) is architecture
    assert detect(reversed(names)) is architecture
    assert detect(["model_ema.decay", "betas", *names]) is architecture


@every_architecture
def test_unet_alone_is_enough_with_its_prefix_and_without(architecture: Architecture) -> None:
    names = NAMES[architecture]
    alone = unet_only(names)
    assert prefix_of(names) == prefix_of(alone) == UNET
    assert prefix_of(bare(names)) == ""
    if architecture is not SD2:  # whose U-Net has the names of SD1.5's
        assert detect(alone) is detect(bare(names)) is architecture
    blocks = architecture.blocks_in(alone)
    assert blocks == tuple(b for b in architecture.blocks if b not in architecture.encoders)
    assert architecture.blocks_in(bare(names)) == blocks
    assert set(parts_in(architecture, alone)) <= {"TIME", "LABEL", "FINAL"}
    # Nothing of a bare file is left out of the merge, though no name holds "model".
    assert {p.component for p in architecture.places(bare(names)).values()} == {"unet"}


def test_unet_of_sd2_without_its_encoder_is_taken_for_that_of_sd15() -> None:
    assert detect(name for name in unet_only(NAMES[SD2]) if name != LABEL) is SD1


def test_vae_beside_a_unet_brings_no_block_of_a_text_encoder() -> None:
    names = [*unet_only(NAMES[SD1]), VAE]
    assert "base" not in SD1.blocks_in(names)
    assert "VAE" in parts_in(SD1, names)


def test_one_encoder_of_flux_may_be_missing() -> None:
    assert FLUX.blocks_in([*bare(NAMES[FLUX]), T5])[:2] == ("T5", "IN")


def test_models_trained_from_sdxl_are_sdxl_with_their_markers() -> None:
    assert detect([*NAMES[SDXL], "v_pred", "ztsnr"]) is SDXL
    assert detect([*NAMES[SDXL], "edm_vpred.sigma_max", "denoiser.sigmas"]) is SDXL


REFUSED = {
    "conditioner.embedders.0.model.ln_final.weight": "SDXL refiner.*merge base models",
    IN + "4.1.transformer_blocks.3.norm1.weight": "SDXL refiner",
    "input_blocks.4.1.transformer_blocks.3.norm1.weight": "SDXL refiner",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "LoRA.*model B or C",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "LoRA",
    "lycoris_blocks_0.lokr_w1": "LoRA",
    "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": "LoRA",
    "transformer.single_transformer_blocks.0.attn.to_q.lora.up.weight": "LoRA",
    "down_blocks.0.attentions.0.norm.weight": "names of diffusers.*convert",
    "single_transformer_blocks.0.attn.to_q.weight": "names of diffusers",
    UNET + "double_blocks.0.img_mlp.0.weight.absmax": "quantised.*fp16",
    UNET + "double_blocks.0.img_mlp.0.weight.quant_map": "quantised",
    "double_blocks.0.img_mlp.0.weight.quant_state.bitsandbytes__nf4": "quantised",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.scale_weight": (
        "quantised"
    ),
    UNET + "scaled_fp8": "quantised",
    "blk.0.attn_q.weight": "quantised",
    "controlnet_blocks.0.weight": "ControlNet.*merge without",
    "controlnet_x_embedder.weight": "ControlNet",
    "pos_embed_input.proj.weight": "ControlNet",
    "control_model.input_hint_block.0.weight": "ControlNet",
    UNET + "double_layers.0.attn.w1q.weight": "AuraFlow; only SD1.5, .* Flux can be merged",
    "t_block.1.weight": "PixArt",
    "mlp_t5.0.weight": "HunyuanDiT",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo",
    "head.modulation": "Wan",
    "cap_embedder.1.weight": "Lumina",
    "txt_norm.weight": "Qwen",
    UNET + "distilled_guidance_layer.norms.0.scale": "Chroma",
    "double_stream_modulation_img.lin.weight": "Flux.2",
}


@pytest.mark.parametrize("tensor", REFUSED)
def test_what_cannot_be_merged_is_refused_with_the_way_out(tensor: str) -> None:
    for beside in ([], *NAMES.values()):
        with pytest.raises(CheckpointError, match=f"^this is .*{REFUSED[tensor]}") as caught:
            detect([*beside, tensor])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tensor", [VAE, VAE.removeprefix("first_stage_model."), "decoder.up_blocks.0.conv.weight"]
)
def test_vae_alone_is_refused(tensor: str) -> None:
    with pytest.raises(CheckpointError, match=r"this is a VAE without .*name a whole checkpoint"):
        detect([tensor])


@pytest.mark.parametrize(
    "tensor",
    [
        CLIP_L,
        "text_model.encoder.layers.0.mlp.fc1.weight",
        f"text_encoders.clip_l.{CLIP_L}",
        RESBLOCK,
        T5,
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    ],
)
def test_text_encoder_alone_is_refused(tensor: str) -> None:
    with pytest.raises(CheckpointError, match=r"this is a text encoder without .*name a whole"):
        detect([tensor])


def test_file_of_something_else_is_refused_with_its_first_tensor() -> None:
    with pytest.raises(CheckpointError, match=r"not a Stable Diffusion.*'bert\.embeddings'"):
        detect(["bert.embeddings", "bert.pooler"])
    with pytest.raises(CheckpointError, match="holds no tensors"):
        detect([])


def test_tensor_that_another_architecture_adds_is_refused() -> None:
    names = [*NAMES[SD1], "conditioner.embedders.1.model.ln_final.weight"]
    with pytest.raises(CheckpointError, match=r"this is SDXL, but .*input_blocks\.9.*another"):
        detect(names).places(names)
    deeper = [*NAMES[SD3_LARGE], UNET + "joint_blocks.38.x_block.attn.qkv.weight"]
    with pytest.raises(CheckpointError, match=r"this is SD3\.5 large, but .*joint_blocks\.38"):
        detect(deeper).places(deeper)


def test_sd3_of_another_depth_is_refused() -> None:
    names = sd3_names(30)
    with pytest.raises(CheckpointError, match=r"8 of its 41 blocks .*first: J30\)"):
        detect(names).places(names)


@every_architecture
def test_first_layer_is_of_the_first_block_and_reads_the_input(architecture: Architecture) -> None:
    assert UNET + architecture.first_layer in NAMES[architecture]
    first = architecture.blocks[len(architecture.encoders)]
    assert architecture.place(architecture.first_layer) == Place("unet", first)


@pytest.mark.parametrize(
    ("architecture", "channels", "words"),
    [
        (SD1, 4, "a plain model (4 input channels)"),
        (SD1, 9, "an inpainting model (9 input channels)"),
        (SDXL, 8, "a pix2pix model (8 input channels)"),
        (SD2, 5, "a depth model (5 input channels)"),
        (SD3, 16, "a plain model (16 input channels)"),
        (FLUX, 384, "a Fill model (384 input channels)"),
        (FLUX, 128, "a Canny or Depth model (128 input channels)"),
        (SD1, 5, "an unknown variant (5 input channels)"),
    ],
)
def test_number_of_input_channels_tells_the_variant(
    architecture: Architecture, channels: int, words: str
) -> None:
    assert architecture.variant(channels) == words


@every_architecture
def test_eight_groups_hold_every_block_once_in_order(architecture: Architecture) -> None:
    groups = architecture.groups8
    assert len(groups) == 8
    assert tuple(block for group in groups for block in group) == architecture.blocks
    assert groups[0] == architecture.encoders


def test_eight_groups_of_sdxl_are_its_levels() -> None:
    assert [f"{group[0]}-{group[-1]}" for group in SDXL.groups8] == [
        "base-base",
        "IN00-IN03",
        "IN04-IN06",
        "IN07-IN08",
        "M00-M00",
        "OUT00-OUT02",
        "OUT03-OUT05",
        "OUT06-OUT08",
    ]


def test_short_names_are_those_of_the_block_and_of_older_tools() -> None:
    names = short_names("alpha", SD1)
    assert len(names) == 26 + 25 + len(SD1.parts)
    assert names["base_alpha"] == "base"
    assert names["TIME_alpha"] == "TIME"
    assert names["block_0_alpha"] == names["IN00_alpha"] == "IN00"
    assert names["block_12_alpha"] == names["M00_alpha"] == "M00"
    assert names["block_13_alpha"] == names["OUT00_alpha"] == "OUT00"
    assert names["block_24_alpha"] == names["OUT11_alpha"] == "OUT11"
    assert "block_-1_alpha" not in names
    assert "block_25_alpha" not in names


@pytest.mark.parametrize(
    ("architecture", "number", "block"),
    [(SDXL, 9, "M00"), (SDXL, 18, "OUT08"), (SD3, 1, "J00"), (FLUX, 0, "IN"), (FLUX, 58, "OUT")],
)
def test_numbers_count_the_blocks_after_the_text_encoders(
    architecture: Architecture, number: int, block: str
) -> None:
    names = short_names("beta", architecture)
    assert names[f"block_{number}_beta"] == block
    last = len(architecture.blocks) - len(architecture.encoders)
    assert f"block_{last}_beta" not in names


@every_architecture
def test_docs_name_the_blocks_and_parts(architecture: Architecture) -> None:
    title = f"## {architecture.title}"
    _, found, rest = DOCS.read_text(encoding="utf-8").partition(f"\n{title}\n")
    assert found, title
    section = rest.partition("\n## ")[0]
    for name in (*architecture.blocks, *architecture.parts):
        family = re.sub(r"\d+$", "", name)
        assert re.search(rf"`{family}(\d+)?`", section), name
