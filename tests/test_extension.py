"""The extension for webuis, by its real routes, in a webui of stand-ins; what it refuses.

And what our node for ComfyUI has of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfyui_modules
import pytest
import torch
import toy_plugin
import webui_modules
from fastapi import FastAPI
from fastapi.testclient import TestClient
from torch import Tensor
from webui_modules import CLASSIC, FORGE, KINDS, NEXT, OLD, REFORGE, WEBUI

NAMES = [f"bayesian-merger-{i:016x}" for i in range(3)]
U_NET = toy_plugin.TENSORS["IN00"]
TEXT = toy_plugin.TENSORS["base"]


class Webui:
    """The extension's routes, and what the webui has loaded, in order."""

    def __init__(self, home: Path, **options: Any) -> None:
        self.loaded: list[str] = []
        self.extension, data = webui_modules.webui(home, self._add, **options)
        app = FastAPI()
        for begin in data.started:
            begin(None, app)
        self.client = TestClient(app)

    def _add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.loaded.append(name)

    def post(self, name: str, body: Any, **options: Any) -> Any:
        return self.client.post(f"/bayesian-merger/v1/{name}", json=body, **options)

    def placed(self) -> dict[str, str]:
        found: dict[str, str] = self.post("place", {"bytes": 1000}).json()
        token = (Path(found["folder"]) / "token").read_text()
        assert found["token_sha256"] == hashlib.sha256(token.encode()).hexdigest()
        assert token not in found.values()
        return {"folder": found["folder"], "token": token}


@pytest.fixture
def one(tmp_path: Path) -> Webui:
    return Webui(tmp_path / "home")


def put(place: Mapping[str, str], value: float, name: str = NAMES[0]) -> str:
    """A merge in the place, and the name of its file."""
    return toy_plugin.write_model(Path(place["folder"]) / f"{name}.safetensors", value).name


def order(place: Mapping[str, str], **changes: Any) -> dict[str, Any]:
    file = f"{NAMES[0]}.safetensors"
    asked = {"token": place["token"], "file": file, "name": NAMES[1], "live": [U_NET, TEXT, "x"]}
    return {**asked, **changes}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != NEXT])
def test_receipt_tells_of_the_model_that_is_live(tmp_path: Path, kind: str) -> None:
    one = Webui(tmp_path / "home", kind=kind)
    place = one.placed()
    for name, value in zip(NAMES, (0.25, 0.5, 0.75), strict=True):
        put(place, value)  # the same file, changed
        receipt = one.post("load", order(place, name=name, nonce=f"of {name}")).json()
        assert receipt["loader"] == (kind if kind in (FORGE, REFORGE) else "webui")
        assert receipt["name"] == name
        assert receipt["nonce"] == f"of {name}"
        expected = {"type": "float32", "values": [value] * 8}
        assert receipt["live"] == {U_NET: expected, TEXT: expected}
    assert one.loaded == NAMES


@pytest.mark.parametrize("kind", [WEBUI, OLD, CLASSIC])
def test_model_whose_loading_fails_is_known_as_what_it_is(tmp_path: Path, kind: str) -> None:
    one = Webui(tmp_path / "home", kind=kind)
    place = one.placed()
    put(place, 0.5)
    one.post("load", order(place))
    known = one.extension.sd_models
    model = known.model_data.model
    before = (vars(model).copy(), model.sd_checkpoint_info.filename)

    def fails(sd_model: Any, info: Any, forced_reload: bool = False) -> None:
        raise RuntimeError("out of memory")

    known.reload_model_weights = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        one.post("load", order(place, name=NAMES[2]))
    assert (vars(model), model.sd_checkpoint_info.filename) == before


def test_webui_that_has_no_such_models_gets_no_routes(tmp_path: Path) -> None:
    _, data = webui_modules.webui(tmp_path / "home", lambda name, tensors: None, kind=NEXT)
    assert data.started == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_values_of_any_type_are_told(one: Webui, dtype: torch.dtype) -> None:
    told = one.extension.live_values({"x": torch.arange(15).reshape(3, 5).to(dtype)}, ["x", "y"])
    assert told == {"x": {"type": str(dtype)[6:], "values": [0, 2, 4, 6, 8, 10, 12, 14]}}


def test_webui_lists_the_merge_once_and_chooses_it(one: Webui) -> None:
    place = one.placed()
    for name in NAMES:
        put(place, 0.5)
        one.post("load", order(place, name=name))
    assert list(one.extension.sd_models.checkpoints_list) == [NAMES[-1]]
    assert list(one.extension.sd_models.checkpoint_aliases) == [NAMES[-1]]
    assert one.extension.shared.opts.data["sd_model_checkpoint"] == NAMES[-1]


def test_prompts_are_read_anew_by_the_merge_s_text_encoder(one: Webui) -> None:
    place = one.placed()
    put(place, 0.5)
    one.post("load", order(place))
    kinds = one.extension.processing
    assert kinds.StableDiffusionProcessing.cached_c == [None, None]
    assert kinds.StableDiffusionProcessing.cached_uc == [None, None]
    assert kinds.StableDiffusionProcessingTxt2Img.cached_hr_c == [None, None]


def test_merge_waits_for_the_image_that_is_made(one: Webui) -> None:
    place = one.placed()
    put(place, 0.5)
    lock = one.extension.call_queue.queue_lock
    with lock:
        asking = threading.Thread(target=one.post, args=("load", order(place)))
        asking.start()
        asking.join(0.3)
        assert one.loaded == []
        # Other requests are answered meanwhile.
        assert one.post("place", {"bytes": 1000}).status_code == 200
    asking.join()
    assert one.loaded == [NAMES[1]]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"token": "0" * 32}, 403),
        ({"token": None}, 403),
        ({"file": "../own.safetensors"}, 400),
        ({"file": "/etc/passwd"}, 400),
        ({"file": f"x/{NAMES[0]}.safetensors"}, 400),
        ({"file": 3}, 400),
        ({"file": f"{NAMES[2]}.safetensors"}, 404),
        ({"name": "own"}, 400),
        ({"name": None}, 400),
        ({"live": "everything"}, 400),
        ({"live": ["x"] * 101}, 400),
    ],
)
def test_order_that_is_none_is_refused(one: Webui, changes: dict[str, Any], status: int) -> None:
    place = one.placed()
    put(place, 0.5)
    toy_plugin.write_model(Path(place["folder"]).parent / "own.safetensors", 0.5)
    assert one.post("load", order(place, **changes)).status_code == status
    assert one.loaded == []


def test_file_that_is_none_leaves_the_webui_its_model(one: Webui) -> None:
    place = one.placed()
    file = Path(place["folder"]) / f"{NAMES[0]}.safetensors"
    file.write_bytes(b"\x80\x04\x95 a pickle")
    answer = one.post("load", order(place))
    assert answer.status_code == 400
    assert "cannot be read" in answer.json()["detail"]
    assert one.loaded == []


@pytest.mark.skipif(os.name == "nt", reason="links and owners are of Unix")
def test_folder_or_file_that_others_have_made_is_not_used(one: Webui, tmp_path: Path) -> None:
    place = one.placed()
    folder = Path(place["folder"])
    assert folder.stat().st_mode & 0o777 == 0o700
    target = toy_plugin.write_model(tmp_path / "other.safetensors", 0.5)
    (folder / f"{NAMES[0]}.safetensors").symlink_to(target)
    assert one.post("load", order(place)).status_code == 404
    folder.chmod(0o770)
    assert one.post("place", {"bytes": 1000}).status_code == 507
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert one.post("place", {"bytes": 1000}).status_code == 507


@pytest.mark.parametrize(("n_bytes", "status"), [(10**18, 507), (0, 400), ("many", 400)])
def test_place_without_room_is_none(one: Webui, n_bytes: object, status: int) -> None:
    assert one.post("place", {"bytes": n_bytes}).status_code == status


def test_only_users_of_the_webui_are_answered(tmp_path: Path) -> None:
    one = Webui(tmp_path / "home", auth="ann:secret, bob:hidden")
    for auth, status in {
        None: 401,
        ("ann", "hidden"): 401,
        ("ann", "secret"): 200,
        ("bob", "hidden"): 200,
    }.items():
        assert one.post("place", {"bytes": 1000}, auth=auth).status_code == status
    assert one.post("load", {}).status_code == 401


def test_webui_without_its_api_gets_no_routes(tmp_path: Path) -> None:
    extension, data = webui_modules.webui(tmp_path / "home", lambda name, tensors: None)
    extension.shared.cmd_opts.api = False
    app = FastAPI()
    data.started[0](None, app)
    assert TestClient(app).post("/bayesian-merger/v1/place").status_code == 404


@pytest.mark.parametrize("name", ["_is_made", "_has_room", "_token", "live_values"])
def test_node_of_comfyui_has_the_same_functions(one: Webui, tmp_path: Path, name: str) -> None:
    node = comfyui_modules.node(tmp_path / "nodes")
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (one.extension, node))
    assert ours == theirs


class Request:
    """What the node's route gets, as aiohttp has it."""

    def __init__(self, text: str) -> None:
        self.text = text

    async def json(self) -> Any:
        return json.loads(self.text)


@pytest.mark.parametrize(
    ("text", "status"), [('{"bytes": 1000}', 200), ("[1000]", 400), ("1000 bytes", 400)]
)
def test_node_of_comfyui_has_a_route_for_its_place(tmp_path: Path, text: str, status: int) -> None:
    node = comfyui_modules.node(tmp_path / "nodes")
    answer = asyncio.run(node.routes["/bayesian-merger/v1/place"](Request(text)))
    assert answer[0] == status
    assert ("folder" in answer[1]) == (status == 200)
