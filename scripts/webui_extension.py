"""Takes the merges of bayesian-merger into the memory of stable-diffusion-webui and its forks.

The repository is an extension of these: the webui finds this file in its folder scripts/. Each merge
comes in a file that both processes map, in a folder that is chosen here: no path is taken from a
request. What a request may do is asked of the webui's own users (--api-auth), and of whoever can read
that folder.
"""

from __future__ import annotations

import hashlib
import inspect
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

import safetensors
import torch
from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import call_queue, paths, processing, script_callbacks, sd_models, shared

if hasattr(sd_models, "forge_model_reload"):
    from modules_forge import main_entry

PREFIX = "/bayesian-merger/v1"
# Where a merge may lie: in memory, or else where the system keeps what is read again soon.
HOMES = (Path("/dev/shm"), Path(tempfile.gettempdir()))
_NAME = re.compile(r"bayesian-merger-[0-9a-f]{16}")
_MOST_NAMES, _N_VALUES = 100, 8
# What the extension needs of a webui; SD.Next has some of it, and loads otherwise.
_NEEDED = ("CheckpointInfo", "checkpoint_aliases", "checkpoints_list", "model_data")
_LOADERS = ("forge_model_reload", "reload_model_weights")


def place(body: dict[str, Any] = Body(...)) -> dict[str, Any]:  # noqa: B008
    """A folder with room for `bytes`; who can read the secret in its file "token" may use it."""
    n_bytes = body.get("bytes")
    if not isinstance(n_bytes, int) or n_bytes <= 0:
        raise HTTPException(400, "bytes is no number of bytes")
    for home in HOMES:
        folder = _folder(home)
        if home.is_dir() and _is_made(folder) and _has_room(folder, n_bytes):
            known_by = hashlib.sha256(_token(folder).encode()).hexdigest()
            return {"folder": str(folder), "token_sha256": known_by, "loader": _loader()}
    raise HTTPException(507, f"no room for {n_bytes / 1e9:.1f} GB in {HOMES[0]} or {HOMES[1]}")


def load(body: dict[str, Any] = Body(...)) -> dict[str, Any]:  # noqa: B008
    """Make the merge in `file` the model `name`; the receipt has values of the live tensors `live`.

    And `nonce`, by which it is known to be the answer to this request.
    """
    file, name, live = (body.get(key) for key in ("file", "name", "live"))
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise HTTPException(400, "name is no name of a merge")
    if not (isinstance(file, str) and _NAME.fullmatch(file.removesuffix(".safetensors"))):
        raise HTTPException(400, "file is no file of a merge")
    if not (isinstance(live, list) and len(live) <= _MOST_NAMES):
        raise HTTPException(400, "live is no list of tensors")
    path = _file(f"{file.removesuffix('.safetensors')}.safetensors", str(body.get("token")))
    try:
        # A file that cannot be read would leave the webui without a model.
        with safetensors.safe_open(str(path), "pt") as found:
            found.keys()
    except (OSError, safetensors.SafetensorError) as error:
        raise HTTPException(400, f"{file} cannot be read: {error}") from error
    with call_queue.queue_lock:
        _make_live(_info(path, name))
        model = sd_models.model_data.get_sd_model()
        held = getattr(getattr(model, "sd_checkpoint_info", None), "name_for_extra", None)
        return {
            "loader": _loader(),
            "nonce": str(body.get("nonce"))[:80],
            "name": held,
            "live": live_values(_tensors(model), [str(one) for one in live]),
        }


def _folder(home: Path) -> Path:
    """The folder there for this webui: the same after it was started anew."""
    whose = f"{paths.data_path}|{getattr(shared.cmd_opts, 'port', None)}"
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


def _file(name: str, token: str) -> Path:
    """The file of a merge; who asks must have read the token beside it."""
    for home in HOMES:
        folder = _folder(home)
        path = folder / name
        if path.is_file() and not path.is_symlink() and _is_made(folder):
            if secrets.compare_digest(_token(folder).encode(), token.encode()):
                return path
            raise HTTPException(403, "the token is not that of the folder")
    raise HTTPException(404, f"there is no {name}")


def _info(path: Path, name: str) -> Any:
    """The merge among the webui's checkpoints, under its name; it has no hash, which would take long."""
    for title, known in list(sd_models.checkpoints_list.items()):
        if known.filename == str(path):
            del sd_models.checkpoints_list[title]
    for alias, known in list(sd_models.checkpoint_aliases.items()):
        if known.filename == str(path):
            del sd_models.checkpoint_aliases[alias]
    info = sd_models.CheckpointInfo(str(path))
    info.name = info.name_for_extra = info.model_name = info.title = info.short_title = name
    info.hash = info.sha256 = info.shorthash = None
    info.ids = [name]
    info.calculate_shorthash = lambda: None
    info.register()
    return info


def _loader() -> str:
    if hasattr(sd_models, "forge_model_reload"):
        return "Forge"
    return "reForge" if hasattr(sd_models, "complete_model_teardown") else "webui"


def _hide(info: Any) -> list[tuple[Any, str, Any]]:
    """Have no loaded model be one of the checkpoint's file; what was changed, to be put back.

    Else it is taken for what it has by versions of stable-diffusion-webui before 1.8 and by Forge
    Classic, which cannot be told to load anew.
    """
    data = sd_models.model_data
    changed = []
    for model in (data.get_sd_model(), *getattr(data, "loaded_sd_models", ())):
        of_file = getattr(model, "sd_checkpoint_info", None)
        for owner, name in (
            (model, "filename"),
            (model, "sd_model_checkpoint"),
            (of_file, "filename"),
        ):
            if getattr(owner, name, None) == info.filename and owner is not info:
                changed.append((owner, name, info.filename))
                setattr(owner, name, "")
    return changed


def _make_live(info: Any) -> None:
    """Have the webui load the checkpoint, though it may have one of that file already."""
    if _loader() == "Forge":
        shared.opts.data["sd_model_checkpoint"] = info.title
        main_entry.refresh_model_loading_parameters()
        sd_models.model_data.forge_hash = ""
        sd_models.forge_model_reload()
    else:
        model = sd_models.model_data.get_sd_model()
        has_force = "forced_reload" in inspect.signature(sd_models.reload_model_weights).parameters
        # Forge Classic takes the word and does not heed it.
        is_heeded = has_force and not (_loader() == "webui" and hasattr(model, "filename"))
        hidden = [] if is_heeded else _hide(info)
        try:
            sd_models.reload_model_weights(
                model, info, **({"forced_reload": True} if has_force else {})
            )
        except BaseException:
            for owner, name, value in hidden:
                setattr(owner, name, value)
            raise
        shared.opts.data["sd_model_checkpoint"] = info.title
    # What the text encoder before has made of the prompts.
    for kind in ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"):
        for cache in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
            if hasattr(getattr(processing, kind), cache):
                setattr(getattr(processing, kind), cache, [None, None])


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of the live model by the names that checkpoints have for them."""
    parts = getattr(model, "forge_objects", None)
    if parts is None:
        return {name.replace(".wrapped", ""): x for name, x in model.state_dict().items()}
    unet = parts.unet.model.diffusion_model.state_dict()
    found = {f"model.diffusion_model.{name}": x for name, x in unet.items()}
    for name, x in parts.clip.cond_stage_model.state_dict().items():
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


def _known(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
    """401 for anybody whom the webui's own API does not know."""
    users = [user.strip() for user in shared.cmd_opts.api_auth.split(",")]
    known = f"{given.username}:{given.password}".encode()
    if not any([secrets.compare_digest(known, user.encode()) for user in users]):
        raise HTTPException(401, "wrong user or password", {"WWW-Authenticate": "Basic"})


def _begin(_: object, app: FastAPI) -> None:
    """Add the routes to a webui that has an API; plain functions, so that its event loop goes on."""
    options = shared.cmd_opts
    if not (options.api or getattr(options, "nowebui", False)):
        return
    guards = [Depends(_known)] if options.api_auth else []
    for route in (place, load):
        path = f"{PREFIX}/{route.__name__}"
        app.add_api_route(path, route, methods=["POST"], dependencies=guards)


if all(hasattr(sd_models, name) for name in _NEEDED) and any(
    hasattr(sd_models, name) for name in _LOADERS
):
    script_callbacks.on_app_started(_begin)
