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


class Live:
    """A webui's model: the tensors that it makes images of, wrapped as it wraps them."""

    def __init__(self, info: Any) -> None:
        self.sd_checkpoint_info = info
        self.sd_model_checkpoint = info.filename
        self.tensors = {
            name.replace("cond_stage_model.", "cond_stage_model.wrapped."): x.clone()
            for name, x in load_file(info.filename).items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


class Checkpoint:
    """The webui's record of a file."""

    def __init__(self, known: ModuleType, filename: str) -> None:
        self._known = known
        self.filename = filename
        self.name = self.title = Path(filename).name
        self.name_for_extra = self.model_name = self.short_title = Path(filename).stem
        self.ids = [self.title, self.name_for_extra]

    def register(self) -> None:
        self._known.checkpoints_list[self.title] = self
        for alias in self.ids:
            self._known.checkpoint_aliases[alias] = self

    def calculate_shorthash(self) -> str:
        raise AssertionError("a merge has no hash")


def webui(
    home: Path, loaded: Loaded, *, auth: str | None = None, can_force: bool = True
) -> tuple[ModuleType, Any]:
    """The extension in a webui that tells of what it loads, and the webui's record of models.

    Like the real ones it takes a file that it has for loaded, if it is not told to load it anew; one
    that cannot be told is a version before 1.8.
    """
    known = ModuleType("modules.sd_models")
    data: Any = SimpleNamespace(model=None, started=[], get_sd_model=lambda: data.model)

    def load(model: Any, info: Any, forced_reload: bool = False) -> None:
        has = model is not None and info.filename in (
            model.sd_model_checkpoint,
            model.sd_checkpoint_info.filename,
        )
        if not has or forced_reload:
            data.model = Live(info)
            loaded(info.name_for_extra, data.model.tensors)

    def load_old(model: Any, info: Any) -> None:
        load(model, info)

    known.__dict__.update(
        checkpoints_list={},
        checkpoint_aliases={},
        model_data=data,
        CheckpointInfo=lambda filename: Checkpoint(known, filename),
        reload_model_weights=load if can_force else load_old,
    )
    processing = ModuleType("modules.processing")
    for kind in ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"):
        cached = {"cached_c": [1, 1], "cached_uc": [1, 1], "cached_hr_c": [1, 1]}
        setattr(processing, kind, type(kind, (), cached))
    options = SimpleNamespace(api=True, api_auth=auth, port=7860)
    parts: dict[str, dict[str, Any]] = {
        "call_queue": {"queue_lock": threading.Lock()},
        "paths": {"data_path": str(home)},
        "script_callbacks": {"on_app_started": data.started.append},
        "shared": {"cmd_opts": options, "opts": SimpleNamespace(data={})},
    }
    stand_ins = {"modules.sd_models": known, "modules.processing": processing}
    for name, entries in parts.items():
        stand_ins[f"modules.{name}"] = ModuleType(f"modules.{name}")
        stand_ins[f"modules.{name}"].__dict__.update(entries)
    package = ModuleType("modules")
    for name, module in stand_ins.items():
        setattr(package, name.partition(".")[2], module)
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
