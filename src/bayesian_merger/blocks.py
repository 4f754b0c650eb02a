"""Which tensor belongs to which block: one table per architecture.

The 26 blocks of SD1.5 are those of merge-block-weighted and of sd-webui-bayesian-merger: `base`
(the text encoder), IN00..IN11, M00, OUT00..OUT11; the time embedding goes with IN00 and the final
norm and convolution with OUT11. The VAE and everything else are not searched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from bayesian_merger.errors import CheckpointError

Component = Literal["unet", "te", "vae", "other"]

UNET = "model.diffusion_model."


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs; `block` is empty for tensors that are never merged."""

    component: Component
    block: str


@dataclass(frozen=True)
class Architecture:
    """A family of checkpoints with one naming scheme.

    `blocks` are in the order in which the field writes them, base first. A rule is a pattern at the
    start of a tensor's name, its component, and its block, where `{}` takes the pattern's number.
    """

    name: str
    title: str
    blocks: tuple[str, ...]
    rules: tuple[tuple[str, Component, str], ...]

    def place(self, tensor: str) -> Place:
        """Where `tensor` belongs; "other" for a name outside the network, the encoder and the VAE.

        CheckpointError for a tensor of the U-Net that fits no block.
        """
        for pattern, component, block in self.rules:
            if found := re.match(pattern, tensor):
                name = block.format(*(int(number) for number in found.groups()))
                if component == "vae" or name in self.blocks:
                    return Place(component, name)
        if tensor.startswith(UNET):
            raise CheckpointError(
                f"tensor {tensor!r} fits no {self.title} block; is it another architecture?"
            )
        return Place("other", "")

    def places(self, tensors: Iterable[str]) -> dict[str, Place]:
        """The place of every tensor; CheckpointError if a block is left without any tensor."""
        places = {tensor: self.place(tensor) for tensor in tensors}
        empty = set(self.blocks) - {place.block for place in places.values()}
        if empty:
            first = next(block for block in self.blocks if block in empty)
            raise CheckpointError(
                f"no tensor for {len(empty)} of {len(self.blocks)} {self.title} blocks "
                f"(first: {first}); is the file a whole checkpoint?"
            )
        return places


SD1 = Architecture(
    name="sd1",
    title="SD1.5",
    blocks=(
        "base",
        *(f"IN{i:02}" for i in range(12)),
        "M00",
        *(f"OUT{i:02}" for i in range(12)),
    ),
    rules=(
        (r"model\.diffusion_model\.time_embed\.", "unet", "IN00"),
        (r"model\.diffusion_model\.input_blocks\.(\d{1,3})\.", "unet", "IN{:02}"),
        (r"model\.diffusion_model\.middle_block\.", "unet", "M00"),
        (r"model\.diffusion_model\.output_blocks\.(\d{1,3})\.", "unet", "OUT{:02}"),
        (r"model\.diffusion_model\.out\.", "unet", "OUT11"),
        (r"cond_stage_model\.", "te", "base"),
        (r"first_stage_model\.", "vae", "vae"),
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {SD1.name: SD1}

# The first prefix that any tensor has decides; only names in ARCHITECTURES can be merged.
_SIGNS = (
    ("conditioner.embedders.", "SDXL"),
    ("cond_stage_model.model.", "SD2"),
    ("model.diffusion_model.joint_blocks.", "SD3"),
    ("joint_blocks.", "SD3"),
    ("model.diffusion_model.double_blocks.", "Flux"),
    ("double_blocks.", "Flux"),
    ("lora_unet_", "a LoRA"),
    ("lora_te_", "a LoRA"),
    ("down_blocks.", "a U-Net in diffusers naming"),
    ("model.diffusion_model.input_blocks.", "sd1"),
)


def detect(tensors: Iterable[str]) -> Architecture:
    """The architecture that the tensors' names show; CheckpointError if it cannot be merged."""
    names = list(tensors)
    for prefix, found in _SIGNS:
        if any(name.startswith(prefix) for name in names):
            if found in ARCHITECTURES:
                return ARCHITECTURES[found]
            raise CheckpointError(
                f"this is {found}; only whole checkpoints of "
                f"{', '.join(a.title for a in ARCHITECTURES.values())} can be merged"
            )
    first = f" (first tensor: {names[0]!r})" if names else " (it holds no tensors)"
    raise CheckpointError(f"this is not a Stable Diffusion checkpoint{first}")


def short_names(weight: str, architecture: Architecture) -> dict[str, str]:
    """Accepted name -> block for one weight of a method: "IN00_alpha" and "block_0_alpha"."""
    names: dict[str, str] = {}
    for number, block in enumerate(architecture.blocks, start=-1):
        names[f"{block}_{weight}"] = block
        if number >= 0:
            names[f"block_{number}_{weight}"] = block
    return names
