"""A node for ComfyUI that loads the merges of bayesian-merger, of any method, from memory.

Link or copy this folder into ComfyUI's custom_nodes. Each merge comes in a file that both processes
map, in a folder that is chosen here: no path is taken from a request. Some functions are those of
scripts/webui_extension.py, as each of the two is installed without the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import safetensors
import torch
from aiohttp import web
from comfy.cli_args import args
from server import PromptServer

# Where a merge may lie: in memory, or else where the system keeps what is read again soon.
HOMES = (Path("/dev/shm"), Path(tempfile.gettempdir()))
_NAME = re.compile(r"bayesian-merger-[0-9a-f]{16}")
_N_VALUES = 8


def place(n_bytes: object) -> tuple[int, dict[str, Any]]:
    """A folder with room for so many bytes; who can read its file "token" knows whose it is."""
    if not isinstance(n_bytes, int) or n_bytes <= 0:
        return 400, {"detail": "bytes is no number of bytes"}
    for home in HOMES:
        folder = _folder(home)
        if home.is_dir() and _is_made(folder) and _has_room(folder, n_bytes):
            known_by = hashlib.sha256(_token(folder).encode()).hexdigest()
            return 200, {"folder": str(folder), "token_sha256": known_by, "loader": "ComfyUI"}
    return 507, {"detail": f"no room for {n_bytes / 1e9:.1f} GB in {HOMES[0]} or {HOMES[1]}"}


def _folder(home: Path) -> Path:
    """The folder there for this ComfyUI: the same after it was started anew."""
    whose = f"{folder_paths.base_path}|{args.port}"
    return home / f"bayesian-merger-{hashlib.sha256(whose.encode()).hexdigest()[:8]}"


def _is_made(folder: Path) -> bool:
    """Whether the folder is there now and is nobody else's to read or write."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        return False
    return os.name == "nt" or (found.st_uid == os.getuid() and not found.st_mode & 0o077)


def _has_room(folder: Path, n_bytes: int) -> bool:
    held = 0
    for file in folder.glob("*"):
        with suppress(OSError):  # another run has removed it
            held += file.stat().st_size
    return shutil.disk_usage(folder).free + held > 1.05 * n_bytes


def _token(folder: Path) -> str:
    """What is in the folder's file "token", which appears whole."""
    file = folder / "token"
    if not file.is_file():
        part = folder / f"token.{secrets.token_hex(4)}"
        part.write_text(secrets.token_hex(16), encoding="ascii")
        part.replace(file)
    return file.read_text(encoding="ascii")


def _file(name: str) -> Path:
    """The file of a merge; ValueError if there is none."""
    if not _NAME.fullmatch(name):
        raise ValueError("file is no file of a merge")
    for home in HOMES:
        path = _folder(home) / f"{name}.safetensors"
        if path.is_file() and not path.is_symlink() and _is_made(path.parent):
            return path
    raise ValueError(f"there is no merge {name}")


class BayesianMergerLoader:
    """Loads the merge in `file`; `name` is the merge's, so that another one is not taken from a cache.

    `live` is a JSON list of tensors, of whose values in the model the node's own output tells.
    """

    CATEGORY = "loaders"
    FUNCTION = "load"
    OUTPUT_NODE = True
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        texts = dict.fromkeys(("file", "name", "live"), ("STRING", {"default": ""}))
        return {"required": texts}

    def load(self, file: str, name: str, live: str) -> dict[str, Any]:
        """Model, CLIP and VAE of the merge, with the receipt."""
        with safetensors.safe_open(str(_file(file)), "pt") as found:
            # The file is changed in place for the next merge.
            tensors = {key: found.get_tensor(key).clone() for key in found.keys()}  # noqa: SIM118
        embeddings = folder_paths.get_folder_paths("embeddings")
        loaded = comfy.sd.load_state_dict_guess_config(tensors, embedding_directory=embeddings)
        if loaded is None:
            raise ValueError(f"ComfyUI does not know what kind of model {name} is")
        model, clip, vae = loaded[:3]
        values = live_values(_tensors(model, clip), [str(one) for one in json.loads(live)])
        receipt = {"loader": "ComfyUI", "name": name, "live": values}
        return {"ui": {"bayesian_merger": [json.dumps(receipt)]}, "result": (model, clip, vae)}


def _tensors(model: Any, clip: Any) -> dict[str, torch.Tensor]:
    """The tensors of the live model by the names that checkpoints have for them.

    A merge of the U-Net only has no text encoder.
    """
    unet = model.model.diffusion_model.state_dict()
    found = {f"model.diffusion_model.{name}": x for name, x in unet.items()}
    text = clip.cond_stage_model.state_dict() if clip is not None else {}
    for name, x in text.items():
        which, _, rest = name.partition(".")
        if which == "clip_l":
            found[f"cond_stage_model.{rest}"] = found[f"conditioner.embedders.0.{rest}"] = x
        elif which == "clip_g":
            rest = rest.replace("text_model.encoder.layers", "resblocks")
            rest = rest.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
            found[f"conditioner.embedders.1.model.{rest}"] = x
    return found


def live_values(tensors: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, Any]:
    """Some values of each tensor that is there: the first, the last, and between them."""
    found = {}
    for name in names:
        if name in tensors and tensors[name].numel():
            flat = tensors[name].detach().reshape(-1)
            at = [i * (len(flat) - 1) // (_N_VALUES - 1) for i in range(_N_VALUES)]
            # One by one, as tensors of eight bits cannot be indexed otherwise.
            values = [flat[i].float().item() for i in at]
            found[name] = {"type": str(flat.dtype).removeprefix("torch."), "values": values}
    return found


@PromptServer.instance.routes.post("/bayesian-merger/v1/place")
async def _place(request: web.Request) -> web.Response:
    try:
        body = await request.json()
    except ValueError:
        body = None
    status, answer = place(body.get("bytes") if isinstance(body, dict) else None)
    return web.json_response(answer, status=status)


NODE_CLASS_MAPPINGS = {"BayesianMergerLoader": BayesianMergerLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"BayesianMergerLoader": "Merge by bayesian-merger"}
