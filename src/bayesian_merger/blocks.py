"""Which tensor belongs to which block: one table per architecture.

A block is what merge-block-weighted, supermerger and sd-webui-bayesian-merger give one weight; their
names and their order are kept. A part is a piece of a block (the time embedding, the second text
encoder, the VAE) that follows the block's weight unless it is given one of its own. docs/blocks.md
has the tables in words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from bayesian_merger.errors import CheckpointError

Component = Literal["unet", "te", "vae", "other"]

UNET = "model.diffusion_model."


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs; `block` is empty for tensors that are never merged.

    "unet" is whatever removes the noise, a transformer too. A tensor of a `part` takes the part's
    weight where there is one, and the block's where there is none.
    """

    component: Component
    block: str
    part: str = ""


class Rule(NamedTuple):
    """A pattern at the start of a tensor's name, and where such tensors belong.

    For the U-Net the pattern is of the name without "model.diffusion_model."; `{}` in `block` takes
    the pattern's number.
    """

    pattern: str
    component: Component
    block: str
    part: str = ""


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family of checkpoints with one naming scheme.

    `blocks` are in the order in which the field writes them, those of the text encoders first.
    `levels` are the first blocks of eight groups of neighbours. `first_layer` is the tensor, without
    "model.diffusion_model.", whose axis 1 is the input's channels; `variants` says what a number of
    them means.
    """

    name: str
    title: str
    blocks: tuple[str, ...]
    rules: tuple[Rule, ...]
    levels: tuple[str, ...]
    first_layer: str
    variants: Mapping[int, str]

    @property
    def parts(self) -> dict[str, str]:
        """Part -> the block whose weight it follows unless it has one of its own."""
        return {rule.part: rule.block for rule in self.rules if rule.part}

    @property
    def encoders(self) -> tuple[str, ...]:
        """The blocks of the text encoders, which a file may lack."""
        filled = {rule.block for rule in self.rules if rule.component == "te"}
        return tuple(block for block in self.blocks if block in filled)

    @property
    def network(self) -> tuple[str, ...]:
        """The blocks of what removes the noise, in the order of its depth."""
        return tuple(block for block in self.blocks if block not in self.encoders)

    @property
    def groups8(self) -> tuple[tuple[str, ...], ...]:
        """The blocks in eight groups of neighbours, which are about equally deep in the network."""
        starts = [self.blocks.index(block) for block in self.levels]
        return tuple(self.blocks[i:j] for i, j in pairwise([*starts, len(self.blocks)]))

    def place(self, tensor: str) -> Place:
        """Where `tensor` belongs; "other" for a name outside the U-Net, the encoders and the VAE.

        CheckpointError for a tensor of the U-Net that fits no block.
        """
        own = tensor.removeprefix(UNET)
        for rule in self.rules:
            if found := re.match(rule.pattern, own if rule.component == "unet" else tensor):
                block = rule.block.format(*(int(number) for number in found.groups()))
                if block not in self.blocks:
                    raise self._misfit(tensor)
                return Place(rule.component, block, rule.part)
        if own != tensor:
            raise self._misfit(tensor)
        return Place("other", "")

    def places(self, tensors: Iterable[str]) -> dict[str, Place]:
        """The place of every tensor.

        CheckpointError if a block of the U-Net is left without any tensor; text encoders and the
        VAE may be missing.
        """
        places = {tensor: self.place(tensor) for tensor in tensors}
        full = {place.block for place in places.values() if place.component == "unet"}
        needed = [block for block in self.blocks if block not in self.encoders]
        empty = [block for block in needed if block not in full]
        if empty:
            raise CheckpointError(
                f"this is {self.title}, but {len(empty)} of its {len(self.blocks)} blocks are "
                f"without tensors (first: {empty[0]}); is the file complete?"
            )
        return places

    def blocks_in(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """The blocks that `tensors` fill: all but those of absent text encoders.

        CheckpointError as in `places`.
        """
        places = self.places(tensors).values()
        full = {place.block for place in places if place.component in ("unet", "te")}
        return tuple(block for block in self.blocks if block in full)

    def variant(self, channels: int) -> str:
        """What a model of this many input channels is, in words: "an inpainting model (9 ...)"."""
        return f"{self.variants.get(channels, 'an unknown variant')} ({channels} input channels)"

    def _misfit(self, tensor: str) -> CheckpointError:
        return CheckpointError(
            f"this is {self.title}, but tensor {tensor!r} fits none of its blocks; "
            f"is it another architecture?"
        )


_VAE = r"(?:first_stage_model|vae)\."
_UNET_RULES = (
    Rule(r"time_embed\.", "unet", "IN00", "TIME"),
    Rule(r"input_blocks\.(\d{1,3})\.", "unet", "IN{:02}"),
    Rule(r"middle_block\.", "unet", "M00"),
    Rule(r"output_blocks\.(\d{1,3})\.", "unet", "OUT{:02}"),
)
# The labels are the size conditions and the second encoder's summary (SDXL) or an image (SD2 unCLIP).
_LABEL_RULE = Rule(r"label_emb\.", "unet", "IN00", "LABEL")


def _unet_blocks(levels: int) -> tuple[str, ...]:
    """The blocks of a U-Net with so many resolutions: three down and three up in each."""
    return (
        "base",
        *(f"IN{i:02}" for i in range(3 * levels)),
        "M00",
        *(f"OUT{i:02}" for i in range(3 * levels)),
    )


SD1 = Architecture(
    name="sd1",
    title="SD1.5",
    blocks=_unet_blocks(4),
    rules=(
        Rule(r"cond_stage_model\.", "te", "base"),
        *_UNET_RULES,
        Rule(r"out\.", "unet", "OUT11", "FINAL"),
        Rule(_VAE, "vae", "base", "VAE"),
    ),
    levels=("base", "IN00", "IN04", "IN07", "IN10", "OUT03", "OUT06", "OUT09"),
    first_layer="input_blocks.0.0.weight",
    variants={4: "a plain model", 8: "a pix2pix model", 9: "an inpainting model"},
)

SD2 = Architecture(
    name="sd2",
    title="SD2",
    blocks=SD1.blocks,
    rules=(*SD1.rules, _LABEL_RULE),
    levels=SD1.levels,
    first_layer=SD1.first_layer,
    variants={**SD1.variants, 5: "a depth model", 7: "an upscaler"},
)

SDXL = Architecture(
    name="sdxl",
    title="SDXL",
    blocks=_unet_blocks(3),
    rules=(
        Rule(r"conditioner\.embedders\.0\.", "te", "base"),
        Rule(r"conditioner\.embedders\.1\.", "te", "base", "TE2"),
        *_UNET_RULES,
        _LABEL_RULE,
        Rule(r"out\.", "unet", "OUT08", "FINAL"),
        Rule(_VAE, "vae", "base", "VAE"),
    ),
    levels=("base", "IN00", "IN04", "IN07", "M00", "OUT00", "OUT03", "OUT06"),
    first_layer=SD1.first_layer,
    variants=SD1.variants,
)


def _sd3(name: str, title: str, n_blocks: int, levels: tuple[str, ...]) -> Architecture:
    return Architecture(
        name=name,
        title=title,
        blocks=("base", "IN", *(f"J{i:02}" for i in range(n_blocks)), "OUT"),
        rules=(
            Rule(r"text_encoders\.clip_l\.", "te", "base"),
            Rule(r"text_encoders\.clip_g\.", "te", "base", "TE2"),
            Rule(r"text_encoders\.t5xxl\.", "te", "base", "T5"),
            Rule(r"(?:x|context)_embedder\.|pos_embed$", "unet", "IN"),
            Rule(r"t_embedder\.", "unet", "IN", "TIME"),
            Rule(r"y_embedder\.", "unet", "IN", "LABEL"),
            Rule(r"joint_blocks\.(\d{1,3})\.", "unet", "J{:02}"),
            Rule(r"final_layer\.", "unet", "OUT"),
            Rule(_VAE, "vae", "base", "VAE"),
        ),
        levels=levels,
        first_layer="x_embedder.proj.weight",
        variants={16: "a plain model"},
    )


SD3 = _sd3("sd3", "SD3", 24, ("base", "IN", "J04", "J08", "J12", "J15", "J18", "J21"))
SD3_LARGE = _sd3(
    "sd3-large", "SD3.5 large", 38, ("base", "IN", "J06", "J12", "J18", "J23", "J28", "J33")
)

FLUX = Architecture(
    name="flux",
    title="Flux",
    blocks=(
        "CLIP",
        "T5",
        "IN",
        *(f"D{i:02}" for i in range(19)),
        *(f"S{i:02}" for i in range(38)),
        "OUT",
    ),
    rules=(
        Rule(r"text_encoders\.clip_l\.", "te", "CLIP"),
        Rule(r"text_encoders\.t5xxl\.", "te", "T5"),
        Rule(r"(?:img|txt)_in\.", "unet", "IN"),
        Rule(r"(?:time|guidance)_in\.", "unet", "IN", "TIME"),
        Rule(r"vector_in\.", "unet", "IN", "LABEL"),
        Rule(r"double_blocks\.(\d{1,3})\.", "unet", "D{:02}"),
        Rule(r"single_blocks\.(\d{1,3})\.", "unet", "S{:02}"),
        Rule(r"final_layer\.", "unet", "OUT"),
        Rule(_VAE, "vae", "CLIP", "VAE"),
    ),
    levels=("CLIP", "IN", "D06", "D13", "S00", "S10", "S19", "S29"),
    first_layer="img_in.weight",
    # An image is read in patches of 2 x 2, so 16 latent channels are 64 here.
    variants={64: "a plain model", 128: "a Canny or Depth model", 384: "a Fill model"},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    a.name: a for a in (SD1, SD2, SDXL, SD3, SD3_LARGE, FLUX)
}

_ONLY = f"only {', '.join(a.title for a in ARCHITECTURES.values())} can be merged"
_NO_UNET = "without a U-Net or transformer; a model must hold one, so name a whole checkpoint"

# The first pattern found decides: what cannot be merged often holds the names of what can. The
# patterns are of names without "model.diffusion_model.".
_SIGNS: tuple[tuple[str, Architecture | str], ...] = (
    (
        r"\.(?:absmax|quant_map|scale_weight|weight_scale|comfy_quant)$|\.bitsandbytes__"
        r"|^scaled_fp8$|^token_embd\.|^blk\.\d",
        "a quantised model, whose numbers cannot be merged; use the fp16, bf16 or fp32 file",
    ),
    (
        r"^(?:lora|lycoris)_|\.lora_(?:up|down|mid|A|B)\.|\.lora\.(?:up|down)\.|\.hada_w|\.lokr_w",
        "a LoRA; it can be model B or C, but model A must be a checkpoint",
    ),
    (
        r"^(?:controlnet_\w+|control_model|zero_convs|input_hint_block|pos_embed_input)\.",
        "a ControlNet; it works beside any merge of its base model, so merge without it",
    ),
    (
        # Only the refiner has four transformer layers here.
        r"^conditioner\.embedders\.0\.model\.|^input_blocks\.4\.1\.transformer_blocks\.3\.",
        "the SDXL refiner, a network of another shape; merge base models and refine their images",
    ),
    (r"^double_layers\.", f"AuraFlow; {_ONLY}"),
    (r"^t_block\.", f"PixArt; {_ONLY}"),
    (r"^mlp_t5\.", f"HunyuanDiT; {_ONLY}"),
    (r"^txt_in\.individual_token_refiner\.", f"HunyuanVideo; {_ONLY}"),
    (r"^head\.modulation$", f"Wan; {_ONLY}"),
    (r"^cap_embedder\.", f"Lumina or Z-Image; {_ONLY}"),
    (r"^txt_norm\.", f"Qwen-Image; {_ONLY}"),
    (r"^distilled_guidance_layer\.", f"Chroma; {_ONLY}"),
    (r"^double_stream_modulation_img\.", f"Flux.2; {_ONLY}"),
    (
        r"^(?:unet\.|transformer\.)?(?:down_blocks|up_blocks|(?:single_)?transformer_blocks)\.",
        "a model in the names of diffusers; convert it to a single checkpoint first",
    ),
    (r"^joint_blocks\.24\.", SD3_LARGE),
    (r"^joint_blocks\.", SD3),
    (r"^double_blocks\.", FLUX),
    (r"^cond_stage_model\.model\.", SD2),
    (r"^conditioner\.embedders\.|^label_emb\.", SDXL),
    (r"^input_blocks\.", SD1),
    (
        r"^(?:first_stage_model\.|vae\.)?(?:encoder|decoder)\.(?:down|up)(?:_blocks)?\.",
        f"a VAE {_NO_UNET}",
    ),
    (
        r"\b(?:text_model\.encoder\.layers|transformer\.resblocks|encoder\.block)\.",
        f"a text encoder {_NO_UNET}",
    ),
)


def detect(tensors: Iterable[str]) -> Architecture:
    """The architecture that the tensors' names show; CheckpointError if it cannot be merged.

    Names alone do not tell the U-Net of SD2 from that of SD1.5: without its text encoder it is
    taken for the latter, which has the same blocks.
    """
    names = [tensor.removeprefix(UNET) for tensor in tensors]
    lines = "\n".join(names)
    for pattern, found in _SIGNS:
        if re.search(pattern, lines, re.MULTILINE):
            if isinstance(found, Architecture):
                return found
            raise CheckpointError(f"this is {found}")
    first = f" (first tensor: {names[0]!r})" if names else " (it holds no tensors)"
    raise CheckpointError(f"this is not a Stable Diffusion checkpoint{first}")


def prefix_of(tensors: Iterable[str]) -> str:
    """What the U-Net's names begin with: "model.diffusion_model." or, in bare files, nothing."""
    return UNET if any(tensor.startswith(UNET) for tensor in tensors) else ""


def short_names(weight: str, architecture: Architecture) -> dict[str, str]:
    """Accepted name -> block or part for one weight of a method: "IN00_alpha", "block_0_alpha".

    Numbers count the blocks after the text encoders', as older tools do.
    """
    names = {f"{block}_{weight}": block for block in (*architecture.blocks, *architecture.parts)}
    numbered = architecture.blocks[len(architecture.encoders) :]
    names.update({f"block_{i}_{weight}": block for i, block in enumerate(numbered)})
    return names
