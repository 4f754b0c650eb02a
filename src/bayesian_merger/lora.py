"""A LoRA as a model: what it adds to each tensor of the model that it is applied to.

LoRA: Hu et al. 2021, arXiv:2106.09685. LoCon, LoHa and LoKr: Yeh et al. 2023, arXiv:2309.14859, in
the forms that the library LyCORIS writes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesian_merger.checkpoint import Checkpoint, Layout
from bayesian_merger.errors import CheckpointError
from bayesian_merger.names import COMPONENTS, Component, Target

# The end of a tensor's name says which piece of a module it is.
_PIECE = re.compile(
    r"[._]lora_(?P<lora>up|mid|down|B|A)(\.\w+)?\.weight$"
    r"|[._]lora(_linear_layer)?\.(?P<old>up|down)\.weight$"
    r"|\.(?P<other>alpha|diff|diff_b|w_norm|b_norm"
    r"|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2)$"
)
_SYNONYMS = {
    "up": "lora_up",
    "mid": "lora_mid",
    "down": "lora_down",
    "B": "lora_up",
    "A": "lora_down",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
# Kinds that are more than a difference of tensors, or too rare.
_REFUSED = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"), "DoRA"),
    (re.compile(r"\.on_input$"), "IA3"),
    (re.compile(r"\.(oft_blocks|oft_diag|oft_R\b.*)$"), "OFT"),
    (re.compile(r"\.[ab][12m]\.weight$"), "GLoRA"),
    (re.compile(r"\.(lambda_layer|[pq]_layer\.weight)$"), "T-LoRA"),
    (re.compile(r"\bvera_lambda_[bd]\b"), "VeRA"),
    (re.compile(r"_lora[12]\.(up|down)\.weight$"), "a LoRA of x-flux"),
    (re.compile(r"^bundle_emb\."), "a LoRA with embeddings of its own"),
)
# How tools start the names of a part's modules, with "_" for "." as in all names below.
_DENOISER = (
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "unet_",
    "transformer_",
    "diffusion_model_",
    "model_diffusion_model_",
    "",
)
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": _DENOISER,
    "transformer": _DENOISER,
    "text_encoder": ("lora_te_", "lora_te1_", "text_encoder_"),
    # T5, the second encoder of Flux, is the third to tools that also know SD3.
    "text_encoder_2": ("lora_te2_", "lora_te3_", "text_encoder_2_"),
    "text_encoder_3": ("lora_te3_", "text_encoder_3_"),
    "vae": ("lora_vae_", "vae_", "first_stage_model_"),
}
_TITLES = {"sd1": "SD1.5", "sd2": "SD2", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux"}


@dataclass(frozen=True)
class _Module:
    """What one module of the file adds to `target`; `pieces` are the file's names of its tensors."""

    name: str
    target: Target
    pieces: Mapping[str, str]


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA, of any kind."""
    return any(
        _PIECE.search(name) or any(kind.search(name) for kind, _ in _REFUSED) for name in names
    )


class Lora:
    """What a LoRA adds to the tensors of model A.

    `tensors` are the names of those that it changes, in A's order. `notes` says what of it is left
    out, because A has no such part.
    """

    def __init__(self, file: Checkpoint, base: Mapping[str, Layout], architecture: str) -> None:
        """`base` is A's layout; CheckpointError in one line if `file` does not fit it or is broken."""
        self.name = file.name
        self.notes: list[str] = []
        self._file = file
        self._base = base
        self._settings = _peft_settings(file)
        self._changes: dict[str, list[_Module]] = {}
        for module in self._placed(self._modules(), architecture):
            self._changes.setdefault(module.target.tensor, []).append(module)
        self._require_numbers()
        self._require_fit(architecture)
        self.tensors = tuple(name for name in base if name in self._changes)

    def delta(self, name: str, device: torch.device | None = None) -> Tensor:
        """What is added to A's tensor `name` at full strength, float32 and of its shape.

        Computed each time, on `device`. Modules that change the same rows add up; a tensor that none
        changes gets zeros.
        """
        shape = self._base[name].shape
        modules = self._changes.get(name, ())
        # One module for the whole tensor is usual, and needs no second tensor of that size.
        if len(modules) == 1 and modules[0].target.of == 1:
            return self._read(modules[0], device).reshape(shape)
        total = torch.zeros(shape, device=device)
        for module in modules:
            rows = total[module.target.rows(shape[0])]
            rows += self._read(module, device).reshape(rows.shape)
        return total

    def _read(self, module: _Module, device: torch.device | None) -> Tensor:
        files = module.pieces.items()
        pieces = {piece: self._file[own].to(device, torch.float32) for piece, own in files}
        return self._difference(module, pieces)

    def _modules(self) -> dict[str, dict[str, str]]:
        """The pieces of each module, by the file's names."""
        modules: dict[str, dict[str, str]] = {}
        for name in self._file.layout:
            module, piece = self._piece(name)
            pieces = modules.setdefault(module, {})
            # A scale and a bias go with every kind.
            kinds = {p.partition("_")[0] for p in (piece, *pieces) if p not in ("alpha", "diff_b")}
            if piece in pieces or len(kinds) > 1:
                raise CheckpointError(
                    f"{self.name}: tensor {name!r} does not go with the others of its module; is it "
                    f"several LoRAs in one file?"
                )
            pieces[piece] = name
        return modules

    def _piece(self, name: str) -> tuple[str, str]:
        """The module that the file's tensor `name` belongs to, and which piece of it it is."""
        for kind, title in _REFUSED:
            if kind.search(name):
                raise CheckpointError(
                    f"{self.name}: this is {title} (tensor {name!r}), and only LoRA, LoCon, LoHa, LoKr "
                    f"and full differences can be read; merge it into a checkpoint by another tool"
                )
        found = _PIECE.search(name)
        if not found:
            raise CheckpointError(
                f"{self.name}: tensor {name!r} is no piece of a LoRA, LoCon, LoHa or LoKr"
            )
        piece = found["lora"] or found["old"] or found["other"]
        return name[: found.start()], _SYNONYMS.get(piece, piece)

    def _placed(
        self, modules: Mapping[str, dict[str, str]], architecture: str
    ) -> Iterator[_Module]:
        """The modules, each with its place in model A; CheckpointError if some have none."""
        with_axes = [name for name, entry in self._base.items() if entry.shape]
        parts = [_Part(component, with_axes) for component in COMPONENTS[architecture]]
        absent: Counter[str] = Counter()
        strange = []
        for name, pieces in modules.items():
            flat = _flat(name).removeprefix("base_model_model_").replace("_processor_", "_")
            weight = {piece: own for piece, own in pieces.items() if piece != "diff_b"}
            bias = {"diff": pieces["diff_b"]} if "diff_b" in pieces else {}
            for end, some in (("_weight", weight), ("_bias", bias)):
                if not some:
                    continue
                target = next((t for part in parts if (t := part.target(flat + end))), None)
                if target:
                    yield _Module(name, target, some)
                elif part := next((p for p in parts if p.is_absent and p.owns(flat)), None):
                    absent[part.name] += 1
                else:
                    strange.append(name)
        if strange:
            raise CheckpointError(
                f"{self.name}: {len(strange)} of {len(modules)} modules fit no tensor of model A "
                f"(first: {strange[0]!r}){self._hint(architecture)}"
            )
        for component, n_modules in absent.items():
            self.notes.append(
                f"{self.name}: {n_modules} modules are for the {component}, which model A lacks"
            )

    def _require_numbers(self) -> None:
        """CheckpointError if a tensor holds no number, NaN or infinity."""
        for name, entry in self._file.layout.items():
            if 0 in entry.shape:
                raise CheckpointError(f"{self.name}: tensor {name!r} is empty")
            # NaN is both the smallest and the largest of what it is among.
            if not all(math.isfinite(end.item()) for end in self._file[name].float().aminmax()):
                raise CheckpointError(f"{self.name}: tensor {name!r} holds NaN or infinity")

    def _require_fit(self, architecture: str) -> None:
        """CheckpointError if a module is not whole or its difference has another shape than A's."""
        for name, modules in self._changes.items():
            shape = self._base[name].shape
            for module in modules:
                # Tensors on "meta" have shapes but no memory, of which wrong shapes could ask much.
                pieces = {
                    piece: torch.empty(self._file.layout[own].shape, device="meta")
                    for piece, own in module.pieces.items()
                }
                try:
                    found = tuple(self._difference(module, pieces).shape)
                except KeyError as error:
                    raise CheckpointError(
                        f"{self.name}: module {module.name!r} lacks its piece {error.args[0]!r}; "
                        f"download or save it again"
                    ) from error
                except (RuntimeError, IndexError) as error:
                    raise CheckpointError(
                        f"{self.name}: the shapes in module {module.name!r} do not fit each other; "
                        f"download or save it again"
                    ) from error
                rows = module.target.rows(shape[0])
                wanted = (rows.stop - rows.start, *shape[1:])
                # A convolution of 1 x 1 is often trained as a matrix.
                if found[:1] != wanted[:1] or math.prod(found) != math.prod(wanted):
                    raise CheckpointError(
                        f"{self.name}: module {module.name!r} has shape {list(found)}, but model A's "
                        f"{name!r} takes {list(wanted)}{self._hint(architecture)}"
                    )

    def _difference(self, module: _Module, pieces: Mapping[str, Tensor]) -> Tensor:
        """What `pieces` make, arranged as in A; KeyError with the name of a piece that is missing."""
        values, rank = _product(pieces)
        if rank:
            values *= self._scale(module, rank)
        return module.target.arrange(values)

    def _scale(self, module: _Module, rank: int) -> float:
        """The module's alpha over its rank; without alpha in tensors or metadata, 1."""
        if "alpha" in module.pieces:
            return self._file[module.pieces["alpha"]].reshape(()).item() / rank
        part, _, path = module.name.partition(".")
        alpha = self._settings.get(f"{part}.lora_alpha", rank)
        own = self._settings.get(f"{part}.alpha_pattern")
        for name, value in own.items() if isinstance(own, dict) else ():
            if f".{path}".endswith(f".{name}"):
                alpha = value
        if type(alpha) not in (int, float) or not abs(alpha) < 1e6:
            raise CheckpointError(
                f"{self.name}: lora_alpha of {module.name!r} is {alpha!r} in the metadata"
            )
        # Kalajdzievski 2023, arXiv:2312.03732: alpha / sqrt(rank).
        is_rank_stabilized = self._settings.get(f"{part}.use_rslora") is True
        return float(alpha / (math.sqrt(rank) if is_rank_stabilized else rank))

    def _hint(self, architecture: str) -> str:
        """A question that ends an error: whether the LoRA is for another architecture."""
        found = _likely_architecture(self._file.layout)
        if not found or found == architecture.removesuffix("-large"):
            return "; is it for another model?"
        return f"; is it a LoRA for {_TITLES[found]}?"


class _Part:
    """The tensors of model A that are of one component, by the names that tools give them."""

    def __init__(self, component: Component, base: Iterable[str]) -> None:
        self.name = component.name
        self._prefixes = _PREFIXES[component.name]
        self._targets: dict[str, Target] = {}
        for tensor in base:
            for name, target in component.spellings(tensor):
                flat = _flat(name)
                self._targets.setdefault(flat, target)
                self._targets.setdefault(_old_flat(flat), target)

    @property
    def is_absent(self) -> bool:
        """Whether A has no tensor of this part."""
        return not self._targets

    def owns(self, flat: str) -> bool:
        """Whether the name of a module says that it is of this part."""
        return any(prefix and flat.startswith(prefix) for prefix in self._prefixes)

    def target(self, flat: str) -> Target | None:
        """What of A's tensors a name means; None for nothing."""
        for prefix in self._prefixes:
            if flat.startswith(prefix) and (found := self._targets.get(flat[len(prefix) :])):
                return found
        return None


def _flat(name: str) -> str:
    # Some tools write "_" for ".", which cannot be undone without knowing the names.
    return name.replace(".", "_")


def _old_flat(flat: str) -> str:
    """The name of a module as the attention processors of old versions of diffusers call it."""
    flat = flat.replace("_to_out_0_", "_to_out_")
    return re.sub(r"_self_attn_(q|k|v|out)_proj_", r"_self_attn_to_\1_", flat)


def _product(pieces: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The difference that a module's pieces make, not yet scaled, and its rank.

    Rank 0 stands for a difference that is never scaled. KeyError with the name of a piece that is
    missing, RuntimeError or IndexError for shapes that do not fit each other.
    """
    if "diff" in pieces:
        return pieces["diff"], 0
    if any(piece.startswith("hada_") for piece in pieces):
        one, two = _factors(pieces, "hada_w1", "hada_t1"), _factors(pieces, "hada_w2", "hada_t2")
        if one.shape != two.shape:
            raise RuntimeError("one factor would be repeated")
        return one * two, len(pieces["hada_w1_b"])
    if any(piece.startswith("lokr_") for piece in pieces):
        one = pieces["lokr_w1"] if "lokr_w1" in pieces else _factors(pieces, "lokr_w1", "")
        two = pieces["lokr_w2"] if "lokr_w2" in pieces else _factors(pieces, "lokr_w2", "lokr_t2")
        factored = [name for name in ("lokr_w1", "lokr_w2") if name not in pieces]
        # Two whole factors have no rank, whatever alpha the file says.
        rank = len(pieces[f"{factored[0]}_b"]) if factored else 0
        return torch.kron(one, two.flatten(1)), rank
    up, down = pieces["lora_up"].flatten(1), pieces["lora_down"].flatten(1)
    if "lora_mid" in pieces:
        return _tucker(pieces["lora_mid"], up.mT, down), len(down)
    return up @ down, len(down)


def _factors(pieces: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    a, b = pieces[f"{name}_a"], pieces[f"{name}_b"]
    return _tucker(pieces[core], a, b) if core in pieces else a @ b.flatten(1)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A convolution from its core, of ranks x kernel, and its factors, ranks x out and ranks x in."""
    return torch.einsum("ij...,io,jn->on...", core, a, b)


def _peft_settings(file: Checkpoint) -> dict[str, Any]:
    """How PEFT trained each part, which diffusers writes into the metadata and not into tensors."""
    try:
        found = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.name}: lora_adapter_metadata in its metadata is not JSON; save it again"
        ) from error
    return found if isinstance(found, dict) else {}


def _likely_architecture(layout: Mapping[str, Layout]) -> str:
    """The architecture that a LoRA's names and shapes speak for; empty if they do not say."""
    names = " ".join(layout)
    for sign, architecture in (
        (r"double_blocks|single_transformer_blocks", "flux"),
        (r"joint_blocks|add_q_proj", "sd3"),
        (r"lora_te2_|text_encoder_2|label_emb|add_embedding", "sdxl"),
    ):
        if re.search(sign, names):
            return architecture
    # The width of the text that the image attends to.
    text = re.compile(r"attn2.+to_k.+(lora_down|lora_A|lora\.down|hada_w1_b)")
    shapes = [entry.shape for name, entry in layout.items() if text.search(name)]
    known: dict[tuple[int, ...], str] = {(768,): "sd1", (1024,): "sd2", (2048,): "sdxl"}
    return known.get(shapes[0][1:], "") if shapes else ""
