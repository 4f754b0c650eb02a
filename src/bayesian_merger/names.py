"""Names that diffusers and the tools that train LoRAs give to a model's tensors.

A checkpoint of one file has the names of the code that the model was first published with. diffusers
has others, cuts some tensors into several, and turns a few around; what diffusers' own converters
(`diffusers.loaders.single_file_utils`) do decides. Tools that train LoRAs write the one naming or the
other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["same", "transposed", "swapped", "conv"]


@dataclass(frozen=True)
class Target:
    """The part of a checkpoint's tensor that a name of another naming means.

    It is the rows from `first`/`of` to `last`/`of` of `tensor`. Its values lie there as in the other
    naming ("same"), "transposed", with the two halves of the rows "swapped", or as a convolution of
    1 x 1 instead of a matrix ("conv").
    """

    tensor: str
    first: int = 0
    last: int = 1
    of: int = 1
    form: Form = "same"

    def rows(self, n_rows: int) -> slice:
        """The part's rows, of `n_rows` that the whole tensor has."""
        return slice(n_rows * self.first // self.of, n_rows * self.last // self.of)

    def arrange(self, values: Tensor) -> Tensor:
        """`values` of the other naming as they lie in the checkpoint."""
        if self.form == "transposed":
            return values.transpose(0, 1)
        if self.form == "swapped":
            return torch.cat(values.chunk(2)[::-1])
        if self.form == "conv" and values.ndim == 2:
            return values[..., None, None]
        return values


class _Rule(NamedTuple):
    """Names that start with `theirs` in diffusers start with `ours` in a checkpoint and end alike."""

    theirs: str
    ours: str
    first: int = 0
    last: int = 1
    of: int = 1
    form: Form = "same"


class Component:
    """A part of the model that diffusers keeps in a folder of its own, with its names.

    `name` is that folder's. A checkpoint's tensors of this part start with one of `prefixes`; the
    first is the usual one.
    """

    def __init__(self, name: str, prefixes: tuple[str, ...], rules: Iterable[_Rule]) -> None:
        self.name = name
        self._prefixes = prefixes
        self._theirs: dict[str, _Rule] = {}
        self._ours: dict[str, list[_Rule]] = {}
        for rule in rules:
            self._theirs.setdefault(rule.theirs, rule)
            self._ours.setdefault(rule.ours, []).append(rule)

    def target(self, name: str) -> Target | None:
        """What of a checkpoint diffusers' `name` means; None if this part has no such tensor."""
        for start in _starts(name):
            if rule := self._theirs.get(start):
                return Target(self._prefixes[0] + rule.ours + name[len(start) :], *rule[2:])
        return None

    def spellings(self, tensor: str) -> Iterator[tuple[str, Target]]:
        """Each name of a checkpoint's `tensor`, its own without prefix first, and what of it is meant.

        Nothing for a tensor of another part.
        """
        prefix = next((p for p in self._prefixes if tensor.startswith(p)), None)
        if prefix is None:
            return
        own = tensor.removeprefix(prefix)
        start = next((start for start in _starts(own) if start in self._ours), None)
        if start is None:
            return
        yield own, Target(tensor)
        for rule in self._ours[start]:
            yield rule.theirs + own[len(start) :], Target(tensor, *rule[2:])


def _starts(name: str) -> Iterator[str]:
    """The beginnings of `name` that end where one of its words ends, longest first."""
    yield name
    for end in range(len(name) - 1, 0, -1):
        if name[end - 1] in "._":
            yield name[:end]
    yield ""


def _unet(n_levels: int, first_up_has_attention: bool) -> Iterator[_Rule]:
    """The U-Net of SD1, SD2 and SDXL, which has two residual layers on each level of the way down.

    In a checkpoint every layer of a level is a block of its own, and so is the step to the next level.
    """
    for theirs, ours in (
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("add_embedding.linear_1.", "label_emb.0.0."),
        ("add_embedding.linear_2.", "label_emb.0.2."),
        ("conv_in.", "input_blocks.0.0."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
        ("mid_block.attentions.0.", "middle_block.1."),
    ):
        yield _Rule(theirs, ours)
    yield from _residual("mid_block.resnets.0.", "middle_block.0.")
    yield from _residual("mid_block.resnets.1.", "middle_block.2.")
    for level in range(n_levels):
        down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
        for layer in range(2):
            block = f"input_blocks.{3 * level + layer + 1}."
            yield from _residual(f"{down}resnets.{layer}.", f"{block}0.")
            yield _Rule(f"{down}attentions.{layer}.", f"{block}1.")
        yield _Rule(f"{down}downsamplers.0.conv.", f"input_blocks.{3 * level + 3}.0.op.")
        for layer in range(3):
            block = f"output_blocks.{3 * level + layer}."
            yield from _residual(f"{up}resnets.{layer}.", f"{block}0.")
            yield _Rule(f"{up}attentions.{layer}.", f"{block}1.")
        place = 2 if level or first_up_has_attention else 1
        yield _Rule(f"{up}upsamplers.0.conv.", f"output_blocks.{3 * level + 2}.{place}.conv.")


def _residual(theirs: str, ours: str) -> Iterator[_Rule]:
    yield _Rule(f"{theirs}norm1.", f"{ours}in_layers.0.")
    yield _Rule(f"{theirs}conv1.", f"{ours}in_layers.2.")
    yield _Rule(f"{theirs}time_emb_proj.", f"{ours}emb_layers.1.")
    yield _Rule(f"{theirs}norm2.", f"{ours}out_layers.0.")
    yield _Rule(f"{theirs}conv2.", f"{ours}out_layers.3.")
    yield _Rule(f"{theirs}conv_shortcut.", f"{ours}skip_connection.")


def _vae() -> Iterator[_Rule]:
    """The VAE with its four levels, which a checkpoint's decoder counts from the other end."""
    yield _Rule("quant_conv.", "quant_conv.")
    yield _Rule("post_quant_conv.", "post_quant_conv.")
    for half in ("encoder.", "decoder."):
        yield _Rule(f"{half}conv_in.", f"{half}conv_in.")
        yield _Rule(f"{half}conv_out.", f"{half}conv_out.")
        yield _Rule(f"{half}conv_norm_out.", f"{half}norm_out.")
        attention, ours = f"{half}mid_block.attentions.0.", f"{half}mid.attn_1."
        yield _Rule(f"{attention}group_norm.", f"{ours}norm.")
        # The second spellings are those of old versions of diffusers, which folders still have.
        for first, second, own in (
            ("to_q.", "query.", "q."),
            ("to_k.", "key.", "k."),
            ("to_v.", "value.", "v."),
            ("to_out.0.", "proj_attn.", "proj_out."),
        ):
            yield _Rule(attention + first, ours + own, form="conv")
            yield _Rule(attention + second, ours + own, form="conv")
        layers = [(f"mid_block.resnets.{i}.", f"mid.block_{i + 1}.") for i in range(2)]
        for level in range(4):
            down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
            yield _Rule(
                f"{half}{down}downsamplers.0.conv.", f"{half}down.{level}.downsample.conv."
            )
            yield _Rule(f"{half}{up}upsamplers.0.conv.", f"{half}up.{3 - level}.upsample.conv.")
            for i in range(3):
                layers.append((f"{down}resnets.{i}.", f"down.{level}.block.{i}."))
                layers.append((f"{up}resnets.{i}.", f"up.{3 - level}.block.{i}."))
        for theirs, ours in layers:
            yield _Rule(half + theirs, half + ours)
            yield _Rule(f"{half}{theirs}conv_shortcut.", f"{half}{ours}nin_shortcut.")


def _clip() -> Iterator[_Rule]:
    """A text encoder that a checkpoint names as transformers does.

    transformers 5.6 dropped the level "text_model", and some old checkpoints lack it too.
    """
    for part in ("embeddings.", "encoder.", "final_layer_norm."):
        yield _Rule(f"text_model.{part}", f"text_model.{part}")
        yield _Rule(part, f"text_model.{part}")
        yield _Rule(f"text_model.{part}", part)
    yield _Rule("text_projection.", "text_projection.")


def _open_clip() -> Iterator[_Rule]:
    """A text encoder that a checkpoint names as OpenCLIP does: SD2's and the second of SDXL."""
    yield _Rule("text_projection.weight", "text_projection", form="transposed")
    # As a script of diffusers' writes it.
    yield _Rule("text_projection.weight", "text_projection.weight")
    for top in ("text_model.", ""):
        yield _Rule(f"{top}embeddings.token_embedding.", "token_embedding.")
        yield _Rule(f"{top}embeddings.position_embedding.weight", "positional_embedding")
        yield _Rule(f"{top}final_layer_norm.", "ln_final.")
        for layer in range(32):
            theirs, ours = f"{top}encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            yield _Rule(f"{theirs}layer_norm1.", f"{ours}ln_1.")
            yield _Rule(f"{theirs}layer_norm2.", f"{ours}ln_2.")
            yield _Rule(f"{theirs}mlp.fc1.", f"{ours}mlp.c_fc.")
            yield _Rule(f"{theirs}mlp.fc2.", f"{ours}mlp.c_proj.")
            for i, projection in enumerate(("q_proj.", "k_proj.", "v_proj.")):
                fused = f"{ours}attn.in_proj_"
                yield _Rule(f"{theirs}self_attn.{projection}", fused, i, i + 1, 3)
            yield _Rule(f"{theirs}self_attn.out_proj.", f"{ours}attn.out_proj.")


class _Stream(NamedTuple):
    """diffusers' names for the image's or the text's half of a block that attends to both."""

    suffix: str
    qkv: tuple[str, str, str]
    out: str
    norms: tuple[str, str]


_IMAGE = _Stream("", ("to_q.", "to_k.", "to_v."), "to_out.0.", ("norm_q.", "norm_k."))
_TEXT = _Stream(
    "_context",
    ("add_q_proj.", "add_k_proj.", "add_v_proj."),
    "to_add_out.",
    ("norm_added_q.", "norm_added_k."),
)


def _flux() -> Iterator[_Rule]:
    """The transformer of Flux, whose MLP is four times as wide as its attention."""
    for theirs, ours in (
        ("time_text_embed.timestep_embedder.", "time_in."),
        ("time_text_embed.text_embedder.", "vector_in."),
        ("time_text_embed.guidance_embedder.", "guidance_in."),
    ):
        yield _Rule(f"{theirs}linear_1.", f"{ours}in_layer.")
        yield _Rule(f"{theirs}linear_2.", f"{ours}out_layer.")
    yield _Rule("x_embedder.", "img_in.")
    yield _Rule("context_embedder.", "txt_in.")
    yield from _final_layer()
    for i in range(19):
        theirs = f"transformer_blocks.{i}."
        for stream, ours in (
            (_IMAGE, f"double_blocks.{i}.img_"),
            (_TEXT, f"double_blocks.{i}.txt_"),
        ):
            yield _Rule(f"{theirs}norm1{stream.suffix}.linear.", f"{ours}mod.lin.")
            yield from _attention(f"{theirs}attn.", stream, f"{ours}attn.")
            yield from _flux_norms(f"{theirs}attn.", stream, f"{ours}attn.norm.")
            yield _Rule(f"{theirs}ff{stream.suffix}.net.0.proj.", f"{ours}mlp.0.")
            yield _Rule(f"{theirs}ff{stream.suffix}.net.2.", f"{ours}mlp.2.")
    for i in range(38):
        theirs, ours = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        yield _Rule(f"{theirs}norm.linear.", f"{ours}modulation.lin.")
        for part, name in enumerate(_IMAGE.qkv):
            yield _Rule(f"{theirs}attn.{name}", f"{ours}linear1.", part, part + 1, 7)
        yield _Rule(f"{theirs}proj_mlp.", f"{ours}linear1.", 3, 7, 7)
        yield from _flux_norms(f"{theirs}attn.", _IMAGE, f"{ours}norm.")
        yield _Rule(f"{theirs}proj_out.", f"{ours}linear2.")


def _sd3(n_blocks: int) -> Iterator[_Rule]:
    """The transformer of SD3 and SD3.5, of which some blocks attend to the image twice."""
    for theirs, ours in (("timestep", "t"), ("text", "y")):
        embedder = f"time_text_embed.{theirs}_embedder."
        yield _Rule(f"{embedder}linear_1.", f"{ours}_embedder.mlp.0.")
        yield _Rule(f"{embedder}linear_2.", f"{ours}_embedder.mlp.2.")
    yield _Rule("pos_embed.pos_embed", "pos_embed")
    yield _Rule("pos_embed.proj.", "x_embedder.proj.")
    yield _Rule("context_embedder.", "context_embedder.")
    yield from _final_layer()
    for i in range(n_blocks):
        theirs = f"transformer_blocks.{i}."
        for stream, ours in (
            (_IMAGE, f"joint_blocks.{i}.x_block."),
            (_TEXT, f"joint_blocks.{i}.context_block."),
        ):
            # The text leaves the last block, whose norm is therefore one of a final layer.
            is_final = stream is _TEXT and i == n_blocks - 1
            yield _Rule(
                f"{theirs}norm1{stream.suffix}.linear.",
                f"{ours}adaLN_modulation.1.",
                form="swapped" if is_final else "same",
            )
            yield from _attention(f"{theirs}attn.", stream, f"{ours}attn.")
            yield from _sd3_norms(f"{theirs}attn.", stream, f"{ours}attn.")
            yield _Rule(f"{theirs}ff{stream.suffix}.net.0.proj.", f"{ours}mlp.fc1.")
            yield _Rule(f"{theirs}ff{stream.suffix}.net.2.", f"{ours}mlp.fc2.")
        second = f"joint_blocks.{i}.x_block.attn2."
        yield from _attention(f"{theirs}attn2.", _IMAGE, second)
        yield from _sd3_norms(f"{theirs}attn2.", _IMAGE, second)


def _attention(theirs: str, stream: _Stream, ours: str) -> Iterator[_Rule]:
    for i, name in enumerate(stream.qkv):
        yield _Rule(theirs + name, f"{ours}qkv.", i, i + 1, 3)
    yield _Rule(theirs + stream.out, f"{ours}proj.")


def _flux_norms(theirs: str, stream: _Stream, ours: str) -> Iterator[_Rule]:
    for name, own in zip(stream.norms, ("query_norm.", "key_norm."), strict=True):
        yield _Rule(f"{theirs}{name}weight", f"{ours}{own}scale")


def _sd3_norms(theirs: str, stream: _Stream, ours: str) -> Iterator[_Rule]:
    for name, own in zip(stream.norms, ("ln_q.", "ln_k."), strict=True):
        yield _Rule(theirs + name, ours + own)


def _final_layer() -> Iterator[_Rule]:
    yield _Rule("proj_out.", "final_layer.linear.")
    # Shift and scale in a checkpoint, scale and shift in diffusers.
    yield _Rule("norm_out.linear.", "final_layer.adaLN_modulation.1.", form="swapped")


# Files with the transformer alone often lack the prefix.
_DENOISER = ("model.diffusion_model.", "")
_FIRST_STAGE = ("first_stage_model.", "vae.")
_T5 = (_Rule("", ""),)


def _text_encoder_of_three(name: str, own: str, rules: Iterable[_Rule]) -> Component:
    return Component(name, (f"text_encoders.{own}.transformer.",), rules)


def _sd3_components(n_blocks: int) -> tuple[Component, ...]:
    return (
        Component("transformer", _DENOISER, _sd3(n_blocks)),
        _text_encoder_of_three("text_encoder", "clip_l", _clip()),
        _text_encoder_of_three("text_encoder_2", "clip_g", _clip()),
        _text_encoder_of_three("text_encoder_3", "t5xxl", _T5),
        Component("vae", _FIRST_STAGE, _vae()),
    )


# The parts of each architecture.
COMPONENTS: Mapping[str, tuple[Component, ...]] = {
    "sd1": (
        Component("unet", _DENOISER, _unet(4, first_up_has_attention=False)),
        Component("text_encoder", ("cond_stage_model.transformer.",), _clip()),
        Component("vae", _FIRST_STAGE, _vae()),
    ),
    "sd2": (
        Component("unet", _DENOISER, _unet(4, first_up_has_attention=False)),
        Component("text_encoder", ("cond_stage_model.model.",), _open_clip()),
        Component("vae", _FIRST_STAGE, _vae()),
    ),
    "sdxl": (
        Component("unet", _DENOISER, _unet(3, first_up_has_attention=True)),
        Component("text_encoder", ("conditioner.embedders.0.transformer.",), _clip()),
        Component("text_encoder_2", ("conditioner.embedders.1.model.",), _open_clip()),
        Component("vae", _FIRST_STAGE, _vae()),
    ),
    "sd3": _sd3_components(24),
    "sd3-large": _sd3_components(38),
    "flux": (
        Component("transformer", _DENOISER, _flux()),
        _text_encoder_of_three("text_encoder", "clip_l", _clip()),
        _text_encoder_of_three("text_encoder_2", "t5xxl", _T5),
        Component("vae", _FIRST_STAGE[::-1], _vae()),
    ),
}
