from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from bayesian_merger.names import COMPONENTS, Component, Target

Shapes = dict[str, tuple[int, ...]]


def known_layout(name: str) -> Shapes:
    """Name -> shape of every tensor of a kind of file, as sd-mecha lists them in its package."""
    package = find_spec("sd_mecha")
    if package is None or package.origin is None:
        pytest.skip("sd-mecha is not installed")
    folder = Path(package.origin).parent / "extensions" / "builtin" / "model_configs"
    listed = yaml.load((folder / f"{name}.yaml").read_text(), yaml.CSafeLoader)
    tensors = {k: v for part in listed["components"].values() for k, v in part.items()}
    return {tensor: tuple(entry["shape"]) for tensor, entry in tensors.items()}


def component(architecture: str, name: str) -> Component:
    return next(c for c in COMPONENTS[architecture] if c.name == name)


def small(shapes: Shapes, prefix: str) -> dict[str, Tensor]:
    """Random tensors for the names with `prefix`, of as many axes as there but with few values."""
    chance = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        # The numbers that diffusers' converters count on: three parts, or Flux's width.
        wide = 12 if "qkv" in name or "in_proj" in name else 21504 if "linear1" in name else 4
        axes = (4, 4) if name.endswith("text_projection") else (wide, 2, 1, 1)[: len(shape)]
        if name.startswith(prefix):
            tensors[name] = torch.randn(axes, generator=chance)
    return tensors


def rebuilt(part: Component, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors of a part from diffusers'."""
    pieces: dict[str, list[tuple[Target, Tensor]]] = defaultdict(list)
    for name, values in theirs.items():
        target = part.target(name)
        assert target, name
        pieces[target.tensor].append((target, target.arrange(values)))
    tensors = {}
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece[0].first)
        tensors[name] = torch.cat([values for _, values in found])
        for target, values in found:
            assert torch.equal(tensors[name][target.rows(len(tensors[name]))], values)
    return tensors


def returns_the_same(
    part: Component, ours: dict[str, Tensor], convert: Callable[[dict[str, Tensor]], Any]
) -> None:
    """diffusers' conversion of `ours` and ours of that make `ours` again, with each name known."""
    theirs = dict(convert(dict(ours)))
    back = rebuilt(part, theirs)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name
    spelled = {name: t for tensor in ours for name, t in part.spellings(tensor)}
    assert {name: part.target(name) for name in theirs} == {name: spelled[name] for name in theirs}


def converter(name: str) -> Callable[..., Any]:
    found = pytest.importorskip("diffusers.loaders.single_file_utils")
    return getattr(found, name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl"])
def test_unet_comes_back_from_diffusers(architecture: str) -> None:
    layout = known_layout("sdxl-sgm" if architecture == "sdxl" else "sd1-ldm")
    config = {
        "layers_per_block": 2,
        "addition_embed_type": "text_time" if architecture == "sdxl" else None,
    }
    returns_the_same(
        component(architecture, "unet"),
        small(layout, "model.diffusion_model."),
        lambda ours: converter("convert_ldm_unet_checkpoint")(ours, config),
    )


@pytest.mark.parametrize(
    ("architecture", "file", "prefix"),
    [
        ("sd1", "sd1-ldm", "first_stage_model."),
        ("sd2", "sd1-ldm", "first_stage_model."),
        ("sdxl", "sdxl-sgm", "first_stage_model."),
        ("sd3", "sd3-comfyui", "first_stage_model."),
        ("flux", "flux-flux", "vae."),
    ],
)
def test_vae_comes_back_from_diffusers(architecture: str, file: str, prefix: str) -> None:
    levels = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    returns_the_same(
        component(architecture, "vae"),
        small(known_layout(file), prefix),
        lambda ours: converter("convert_ldm_vae_checkpoint")(ours, levels),
    )


def test_vae_attention_of_old_folders_is_known() -> None:
    part = component("sd1", "vae")
    for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    ):
        for end in ("weight", "bias"):
            place = "decoder.mid_block.attentions.0"
            assert part.target(f"{place}.{old}.{end}") == part.target(f"{place}.{new}.{end}")


def test_open_clip_comes_back_from_diffusers() -> None:
    prefix = "conditioner.embedders.1.model."
    ours = small(known_layout("sdxl-sgm"), prefix)
    del ours[f"{prefix}logit_scale"]  # diffusers has none
    returns_the_same(
        component("sdxl", "text_encoder_2"),
        ours,
        lambda ours: converter("convert_open_clip_checkpoint")(None, ours, prefix),
    )


def test_open_clip_of_sd2_comes_back_from_diffusers() -> None:
    sdxl, prefix = "conditioner.embedders.1.model.", "cond_stage_model.model."
    own = small(known_layout("sdxl-sgm"), sdxl)
    ours = {
        name.replace(sdxl, prefix): tensor
        for name, tensor in own.items()
        if not name.endswith(("logit_scale", "text_projection"))
        # diffusers leaves out the last of 24 layers, whose result SD2 does not use.
        and not any(f"resblocks.{layer}." in name for layer in range(23, 32))
    }
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=4))
    returns_the_same(
        component("sd2", "text_encoder"),
        ours,
        lambda ours: converter("convert_open_clip_checkpoint")(model, ours, prefix),
    )


def test_flux_comes_back_from_diffusers() -> None:
    ours = small(known_layout("flux-flux"), "model.diffusion_model.")
    returns_the_same(
        component("flux", "transformer"),
        ours,
        converter("convert_flux_transformer_checkpoint_to_diffusers"),
    )


def test_sd3_comes_back_from_diffusers() -> None:
    ours = small(known_layout("sd3-comfyui"), "model.diffusion_model.")
    returns_the_same(
        component("sd3", "transformer"),
        ours,
        converter("convert_sd3_transformer_checkpoint_to_diffusers"),
    )


@pytest.mark.parametrize(("architecture", "n_blocks"), [("sd3", 24), ("sd3-large", 38)])
def test_sd35_comes_back_from_diffusers(architecture: str, n_blocks: int) -> None:
    listed = known_layout("sd3-comfyui")
    layout = {n: s for n, s in listed.items() if "joint_blocks" not in n}
    prefix = "model.diffusion_model.joint_blocks."
    for i in range(n_blocks):
        # Block 23 of the listed model is the last one, which is smaller.
        model = f"{prefix}{23 if i == n_blocks - 1 else 0}."
        block = {n.removeprefix(model): s for n, s in listed.items() if n.startswith(model)}
        second = {
            n.replace("attn.", "attn2."): s for n, s in block.items() if "x_block.attn." in n
        }
        block |= second if i < 13 else {}
        for name in [n for n in block if n.endswith(".qkv.weight")]:
            block |= {name.replace("qkv", norm): (64,) for norm in ("ln_q", "ln_k")}
        layout |= {f"{prefix}{i}.{name}": shape for name, shape in block.items()}
    returns_the_same(
        component(architecture, "transformer"),
        small(layout, "model.diffusion_model."),
        converter("convert_sd3_transformer_checkpoint_to_diffusers"),
    )


@pytest.mark.parametrize("architecture", COMPONENTS)
def test_clip_is_known_with_and_without_the_level_text_model(architecture: str) -> None:
    part = component(architecture, "text_encoder")
    name = "encoder.layers.3.mlp.fc1.bias"
    short, long = part.target(name), part.target(f"text_model.{name}")
    assert short
    assert short == long


def test_old_checkpoint_without_the_level_text_model_is_known() -> None:
    name = "cond_stage_model.transformer.encoder.layers.3.mlp.fc1.bias"
    spelled = dict(component("sd1", "text_encoder").spellings(name))
    assert spelled["text_model.encoder.layers.3.mlp.fc1.bias"] == Target(name)


def test_transformer_without_prefix_is_known() -> None:
    part = component("flux", "transformer")
    spelled = dict(part.spellings("single_blocks.3.linear1.weight"))
    theirs = "single_transformer_blocks.3.proj_mlp.weight"
    assert spelled[theirs] == Target("single_blocks.3.linear1.weight", 3, 7, 7)


@pytest.mark.parametrize(
    ("architecture", "file"),
    [("sd1", "sd1-ldm"), ("sdxl", "sdxl-sgm"), ("sd3", "sd3-comfyui"), ("flux", "flux-flux")],
)
def test_every_tensor_of_a_part_has_names_of_its_own(architecture: str, file: str) -> None:
    parts = COMPONENTS[architecture]
    outside = []
    for name in known_layout(file):
        found = [part.name for part in parts if list(part.spellings(name))]
        assert len(found) <= 1, name
        if not found:
            outside.append(name)
    inside: tuple[str, ...] = ("model.diffusion_model.", "first_stage_model.", "vae.")
    inside += ("text_encoders.", "cond_stage_model.", "conditioner.")
    assert {n for n in outside if n.startswith(inside)} == {
        n for n in outside if n.endswith("logit_scale")
    }


@pytest.mark.parametrize("architecture", COMPONENTS)
def test_unknown_name_is_no_tensor(architecture: str) -> None:
    denoiser = COMPONENTS[architecture][0]
    for name in ("", "conv_in", "down_blocks.9.resnets.0.conv1.weight", "controlnet.weight"):
        assert denoiser.target(name) is None
        assert not list(denoiser.spellings(name))


def test_refiner_of_sdxl_is_not_taken_for_sdxl() -> None:
    unet = component("sdxl", "unet")
    assert unet.target("down_blocks.3.resnets.0.conv1.weight") is None


def test_arrange_puts_values_where_the_checkpoint_has_them() -> None:
    values = torch.arange(8.0).reshape(4, 2)
    assert Target("t").arrange(values) is values
    assert Target("t", form="transposed").arrange(values).tolist() == values.T.tolist()
    swapped = [[4, 5], [6, 7], [0, 1], [2, 3]]
    assert Target("t", form="swapped").arrange(values).tolist() == swapped
    assert Target("t", form="conv").arrange(values).shape == (4, 2, 1, 1)
    assert Target("t", form="conv").arrange(values[:, 0]).shape == (4,)


def test_rows_of_flux_divide_the_fused_layer() -> None:
    part = component("flux", "transformer")
    rows = []
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        target = part.target(f"single_transformer_blocks.0.{name}.weight")
        assert target
        rows.append(target.rows(21504))
    assert rows == [
        slice(0, 3072),
        slice(3072, 6144),
        slice(6144, 9216),
        slice(9216, 21504),
    ]
