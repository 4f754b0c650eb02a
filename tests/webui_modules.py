"""What the extension (scripts/webui_extension.py) needs of a webui's own modules, and no more."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).parents[1] / "scripts" / "webui_extension.py"
Loaded = Callable[[str, Mapping[str, Tensor]], None]
_UNET, _TEXT = "model.diffusion_model.", "cond_stage_model."


WEBUI, OLD, FORGE, REFORGE, CLASSIC, NEXT = KINDS = (
    *("webui 1.10.1", "webui 1.7.0", "Forge", "reForge", "Forge Classic", "SD.Next"),
)


class Live:
    """A webui's model: the tensors that it makes images of, by the names that it has for them."""

    def __init__(self, info: Any, kind: str) -> None:
        tensors = {name: x.clone() for name, x in load_file(info.filename).items()}
        self.sd_checkpoint_info = info
        if kind in (WEBUI, OLD):
            self.sd_model_checkpoint = info.filename
            inner = "cond_stage_model.wrapped."
            self.tensors = {n.replace("cond_stage_model.", inner): x for n, x in tensors.items()}
            return
        self.filename = info.filename
        self.tensors = tensors
        unet = {n.removeprefix(_UNET): x for n, x in tensors.items() if n.startswith(_UNET)}
        text = {n.replace(_TEXT, "clip_l."): x for n, x in tensors.items() if n.startswith(_TEXT)}
        self.forge_objects = SimpleNamespace(
            unet=SimpleNamespace(model=SimpleNamespace(diffusion_model=Part(unet))),
            clip=SimpleNamespace(cond_stage_model=Part(text)),
        )

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


class Part:
    """A part of Forge's model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.tensors


class Checkpoint:
    """The webui's record of a file."""

    def __init__(self, known: ModuleType, filename: str) -> None:
        self._known = known
        self.filename = filename
        self.name = self.title = Path(filename).name
        self.name_for_extra = self.model_name = self.short_title = Path(filename).stem
        self.ids = [self.title, self.name_for_extra]

    def __repr__(self) -> str:
        return self.filename

    def register(self) -> None:
        self._known.checkpoints_list[self.title] = self
        for alias in self.ids:
            self._known.checkpoint_aliases[alias] = self

    def calculate_shorthash(self) -> str:
        raise AssertionError("a merge has no hash")


def webui(
    home: Path, loaded: Loaded, *, auth: str | None = None, kind: str = WEBUI
) -> tuple[ModuleType, Any]:
    """The extension in a webui that tells of what it loads, and the webui's record of models.

    Like the real ones it takes a file that it has for loaded, if it is not told to load it anew.
    """
    known = ModuleType("modules.sd_models")
    options: dict[str, Any] = {}
    data: Any = SimpleNamespace(model=None, started=[], get_sd_model=lambda: data.model)
    if kind == OLD:
        data.loaded_sd_models = []

    def load(info: Any, is_forced: bool) -> None:
        models = [data.model, *getattr(data, "loaded_sd_models", ())]
        names = [
            getattr(owner, name, None)
            for model in models
            for owner, name in (
                (model, "filename"),
                (model, "sd_model_checkpoint"),
                (getattr(model, "sd_checkpoint_info", None), "filename"),
            )
        ]
        if is_forced or info.filename not in names:
            data.model = Live(info, kind)
            if kind == OLD:
                data.loaded_sd_models.append(data.model)
            loaded(info.name_for_extra, data.model.tensors)

    def reload(model: Any = None, info: Any = None, forced_reload: bool = False) -> None:
        load(info, forced_reload and kind != CLASSIC)

    def reload_old(model: Any = None, info: Any = None) -> None:
        load(info, False)

    def reload_forge() -> None:
        if data.forge_hash != str(data.forge_loading_parameters):
            load(data.forge_loading_parameters["checkpoint_info"], True)
            data.forge_hash = str(data.forge_loading_parameters)

    def chosen() -> None:
        info = known.checkpoint_aliases[options["sd_model_checkpoint"]]
        data.forge_loading_parameters = {"checkpoint_info": info}

    known.__dict__.update(
        checkpoints_list={},
        checkpoint_aliases={},
        model_data=data,
        CheckpointInfo=lambda filename: Checkpoint(known, filename),
        reload_model_weights=reload_old if kind == OLD else reload,
    )
    if kind == FORGE:
        del known.__dict__["reload_model_weights"]  # as Forge Neo has none
        data.forge_hash = ""
        known.__dict__["forge_model_reload"] = reload_forge
    if kind == REFORGE:
        known.__dict__["complete_model_teardown"] = lambda model: None
    if kind == NEXT:
        del known.__dict__["checkpoint_aliases"]
    processing = ModuleType("modules.processing")
    for kind in ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"):
        cached = {"cached_c": [1, 1], "cached_uc": [1, 1], "cached_hr_c": [1, 1]}
        setattr(processing, kind, type(kind, (), cached))
    flags = SimpleNamespace(api=True, api_auth=auth, port=7860)
    parts: dict[str, dict[str, Any]] = {
        "call_queue": {"queue_lock": threading.Lock()},
        "paths": {"data_path": str(home)},
        "script_callbacks": {"on_app_started": data.started.append},
        "shared": {"cmd_opts": flags, "opts": SimpleNamespace(data=options)},
    }
    stand_ins = {"modules.sd_models": known, "modules.processing": processing}
    for name, entries in parts.items():
        stand_ins[f"modules.{name}"] = ModuleType(f"modules.{name}")
        stand_ins[f"modules.{name}"].__dict__.update(entries)
    package = ModuleType("modules")
    for name, module in stand_ins.items():
        setattr(package, name.partition(".")[2], module)
    forge = ModuleType("modules_forge")
    forge.__dict__["main_entry"] = SimpleNamespace(refresh_model_loading_parameters=chosen)
    stand_ins["modules_forge"] = forge
    with pytest.MonkeyPatch.context() as patch:
        for name, module in {"modules": package, **stand_ins}.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("webui_extension", SCRIPT)
        assert spec
        assert spec.loader
        extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
    home.mkdir(exist_ok=True)
    extension.HOMES = (home, home)  # type: ignore[attr-defined]
    return extension, data
