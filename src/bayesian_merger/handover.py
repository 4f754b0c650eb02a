"""Hands merges to another process of this machine, in a file that both map.

The file is written once and then changed in place, so that a merge costs no more than in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bayesian_merger.checkpoint import DTYPES, Layout
from bayesian_merger.errors import TrialError

N_VALUES = 8
"""How many values of a tensor a receipt has: the first, the last, and between them."""

_PARTS = {
    "U-Net": ("model.diffusion_model.",),
    "text encoder": ("cond_stage_model.", "conditioner."),
}

# Types that a server may keep a model in, and the share of a value by which its rounding may differ.
_LIVE = {
    "float32": (torch.float32, 0.0),
    "float16": (torch.float16, 0.0),
    "bfloat16": (torch.bfloat16, 0.0),
    "float8_e4m3fn": (torch.float8_e4m3fn, 1 / 8),
    "float8_e5m2": (torch.float8_e5m2, 1 / 4),
}


class Handed(Protocol):
    """What is asked of a merge here; `backends.Merge` says what its methods do."""

    @property
    def layout(self) -> Mapping[str, Layout]: ...
    def moved_by(self, name: str) -> Sequence[tuple[str, str]]: ...
    def write_file(self, path: Path) -> None: ...
    def write(self, targets: Mapping[str, Tensor], since: Any = None) -> int: ...


class Handover:
    """A safetensors file with room for a merge, which holds the last that was put into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Tensor] = {}
        self._layout: Mapping[str, Layout] = {}
        self._held: Handed | None = None

    def put(self, merged: Handed) -> None:
        """Have the file hold the merge; only what differs from the merge before is written.

        TrialError if a tensor is not finite, CheckpointError if there is no room.
        """
        if self._layout != merged.layout or not self.path.is_file():
            self.close()
            merged.write_file(self.path)  # its metadata are those of the first merge
            self._tensors, self._layout = _mapped(self.path), merged.layout
        else:
            before, self._held = self._held, None
            merged.write(self._tensors, before)
        self._held = merged

    def probes(self) -> list[str]:
        """Names of tensors that tell whether a model is this merge: one for each of its weights."""
        assert self._held is not None
        found: dict[tuple[str, str], str] = {}
        for name, tensor in self._tensors.items():
            # Others may be kept in another type, and the second text encoder's attention is cut up.
            is_sure = tensor.ndim > 1 and ".attn" not in name
            for key in self._held.moved_by(name) if tensor.numel() else ():
                if key not in found or (is_sure and ".mlp." not in found[key]):
                    found[key] = name
        return list(dict.fromkeys(found.values()))

    def confirm(self, live: object, asked: Sequence[str]) -> None:
        """Compare what a server says of its live tensors with the merge; TrialError if it is another.

        `live` holds name -> {"type": "float16", "values": [...]} for what was asked, as far as the
        server's model has such tensors; of each part that the merge moves one at least.
        """
        told = live if isinstance(live, dict) else {}
        known = {name: told[name] for name in asked if isinstance(told.get(name), dict)}
        for name, entry in known.items():
            if not self._is_alike(name, entry):
                raise TrialError(f"the server's model is not the merge: tensor {name!r} differs")
        for part, starts in _PARTS.items():
            names = [name for name in asked if name.startswith(starts)]
            if names and not known.keys() & set(names):
                raise TrialError(
                    f"the server does not tell of its model's {part} ({names[0]!r}), so it may not be "
                    f"the merge's"
                )

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._tensors, self._layout, self._held = {}, {}, None

    def _is_alike(self, name: str, entry: Mapping[str, Any]) -> bool:
        known, values = _LIVE.get(str(entry.get("type"))), entry.get("values")
        if known is None or not isinstance(values, list) or len(values) != N_VALUES:
            return False
        flat = self._tensors[name].reshape(-1)
        at = [i * (len(flat) - 1) // (N_VALUES - 1) for i in range(N_VALUES)]
        dtype, share = known
        try:
            found = torch.tensor(values, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            return False
        return torch.allclose(found, flat[at].to(dtype).double(), rtol=share, atol=0.0)


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that this program has written, as the file itself."""
    with path.open("rb") as file:
        n_head = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_head))
    whole = torch.from_numpy(np.memmap(path, np.uint8, "r+"))
    data = whole[8 + n_head :]
    header.pop("__metadata__", None)
    return {
        name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
    }
