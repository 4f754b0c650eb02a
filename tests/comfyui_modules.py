"""What our node (comfyui_nodes) needs of ComfyUI's own modules, and no more."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

NODE = Path(__file__).parents[1] / "comfyui_nodes" / "__init__.py"
_UNET, _TEXT = "model.diffusion_model.", "cond_stage_model."


class Part:
    """A part of a model, by the names that ComfyUI has for its tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.diffusion_model = self

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.tensors


def loaded(tensors: Mapping[str, Tensor], embedding_directory: object) -> tuple[Any, Any, str]:
    """The parts of a model, as comfy.sd makes them."""
    unet = {n.removeprefix(_UNET): x for n, x in tensors.items() if n.startswith(_UNET)}
    text = {
        f"clip_l.{n.removeprefix(_TEXT)}": x for n, x in tensors.items() if n.startswith(_TEXT)
    }
    model = SimpleNamespace(model=Part(unet), tensors=tensors)
    return model, SimpleNamespace(cond_stage_model=Part(text)) if text else None, "a VAE"


def node(home: Path) -> Any:
    """Our node's module in a ComfyUI whose merges lie in `home`; `routes` has what it answers by."""
    routes: dict[str, Callable[..., Any]] = {}

    def post(path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return lambda handler: routes.setdefault(path, handler)

    parts: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.sd": {"load_state_dict_guess_config": loaded},
        "comfy.cli_args": {"args": SimpleNamespace(port=8188)},
        "folder_paths": {"base_path": str(home), "get_folder_paths": lambda kind: [kind]},
        "aiohttp": {
            "web": SimpleNamespace(
                Request=None,
                Response=None,
                json_response=lambda answer, status: (status, answer),
            )
        },
        "server": {
            "PromptServer": SimpleNamespace(
                instance=SimpleNamespace(routes=SimpleNamespace(post=post))
            )
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, entries in parts.items():
            module = ModuleType(name)
            module.__dict__.update(entries)
            patch.setitem(sys.modules, name, module)
        comfy: Any = sys.modules["comfy"]
        comfy.sd = sys.modules["comfy.sd"]
        spec = importlib.util.spec_from_file_location("comfyui_nodes", NODE)
        assert spec
        assert spec.loader
        found: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    home.mkdir(exist_ok=True)
    found.HOMES = (home, home)
    found.routes = routes
    return found
