"""A checkpoint in the layout of SD1.5, small enough to write in a millisecond."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

UNET = "model.diffusion_model"
TEXT = "cond_stage_model.transformer.text_model"
VAE = "first_stage_model"

# Two tensors for each of the 26 blocks, with names that real checkpoints have or could have.
BLOCKS: Mapping[str, tuple[str, str]] = {
    "base": (
        f"{TEXT}.encoder.layers.11.self_attn.out_proj.weight",
        f"{TEXT}.final_layer_norm.weight",
    ),
    "IN00": (f"{UNET}.input_blocks.0.0.weight", f"{UNET}.time_embed.0.weight"),
    **{
        f"IN{i:02}": (
            f"{UNET}.input_blocks.{i}.0.in_layers.2.weight",
            f"{UNET}.input_blocks.{i}.1.transformer_blocks.0.attn1.to_out.0.weight",
        )
        for i in range(1, 12)
    },
    "M00": (f"{UNET}.middle_block.0.in_layers.0.weight", f"{UNET}.middle_block.1.norm.weight"),
    **{
        f"OUT{i:02}": (
            f"{UNET}.output_blocks.{i}.0.out_layers.3.weight",
            f"{UNET}.output_blocks.{i}.1.transformer_blocks.0.attn2.to_out.0.weight",
        )
        for i in range(11)
    },
    "OUT11": (f"{UNET}.output_blocks.11.0.out_layers.3.weight", f"{UNET}.out.2.weight"),
}
VAE_NAMES = (f"{VAE}.encoder.conv_in.weight", f"{VAE}.decoder.conv_out.bias")
POSITION_IDS = f"{TEXT}.embeddings.position_ids"
EMA = "model_ema.diffusion_modelinput_blocks00weight"
BETAS = "betas"


def toy_tensors(
    seed: int, *, value: float | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All tensors of a checkpoint, normal numbers from `seed` or every one `value`."""
    chance = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        if value is not None:
            return torch.full(shape, value, dtype=dtype)
        return torch.randn(*shape, generator=chance).to(dtype)

    tensors = {}
    for wide, narrow in BLOCKS.values():
        tensors[wide] = tensor(2, 3)
        tensors[narrow] = tensor(4)
    for name in VAE_NAMES:
        tensors[name] = tensor(3)
    tensors[EMA] = tensor(2, 3)
    tensors[BETAS] = torch.linspace(0.01, 0.11, 5, dtype=torch.float64) + seed
    tensors[POSITION_IDS] = torch.arange(77).reshape(1, 77)
    return tensors


def write_toy(
    path: Path,
    seed: int = 0,
    *,
    value: float | None = None,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Tensor] | None = None,
    without: Collection[str] = (),
) -> Path:
    """A toy checkpoint at `path`, with some tensors changed or added and some left out."""
    tensors = {**toy_tensors(seed, value=value, dtype=dtype), **(changes or {})}
    save_file({n: t for n, t in tensors.items() if n not in without}, path)
    return path
