"""Servers that answer as the webuis do, bad habits included; they paint what their checkpoint holds."""

from __future__ import annotations

import base64
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import webui_modules
from fastapi import HTTPException
from http_fake import FakeServer, head
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from toy_plugin import TENSORS

A1111, OLD, FORGE, NEXT = "webui 1.10.1", "webui 1.8.0", "Forge", "SD.Next"
KINDS = (A1111, OLD, FORGE, NEXT)
_SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "UniPC")
_OLD_SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "UniPC")
_DEFAULTS = {"sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1, "sd_unet": "Automatic"}
_SCHEDULERS = ("Automatic", "Karras", "Exponential", "SGM Uniform")
_FIELDS = (
    *(
        "prompt",
        "negative_prompt",
        "seed",
        "width",
        "height",
        "steps",
        "cfg_scale",
        "sampler_name",
    ),
    *("scheduler", "batch_size", "n_iter", "save_images", "send_images", "styles", "enable_hr"),
    *("hr_upscaler", "hr_scale", "hr_sampler_name", "hr_scheduler", "refiner_checkpoint"),
    *("override_settings", "alwayson_scripts", "script_name", "tiling"),
)

Answer = tuple[int, Any]


class FakeWebUI(FakeServer):
    """A server on a port of its own, with the checkpoints of a folder.

    `twist` may change any answer before it is sent: it gets the path, the body and the answer. `cut`
    and `slow` are numbers of further images whose answer breaks off or comes drop by drop, `broken` of
    requests whose answer breaks off, `errors` of such that fail with 500, `others` of images after
    which somebody else's job begins. `asked` counts the requests by path. With a `home` it has our
    extension, whose merges lie there.
    """

    def __init__(
        self, kind: str, folder: Path, auth: str = "", port: int = 0, home: Path | None = None
    ) -> None:
        self.kind, self.folder, self.auth = kind, folder, auth
        self.cut = self.slow = self.errors = self.broken = 0
        self.asked: Counter[str] = Counter()
        self.bodies: list[Mapping[str, Any]] = []
        self.twist: Callable[[str, Any, Answer], Answer] = lambda path, body, answer: answer
        self._files: dict[str, Path] = {}
        self.busy_s = 0.0
        self.others = 0
        self.salt = ""
        self._refresh()
        self.chosen = self.loaded = next(iter(self._files))
        # The merge that the extension has made the model, by its name.
        self.live: dict[str, Mapping[str, Tensor]] = {}
        inside = {OLD: webui_modules.OLD, FORGE: webui_modules.FORGE}.get(
            kind, webui_modules.WEBUI
        )
        self.extension = (
            webui_modules.webui(home, self._made_live, kind=inside)[0] if home else None
        )
        self.interrupted = False
        # Settings that its file has, and those that each image was made with.
        self.settings: dict[str, Any] = {}
        self.made_with: list[Mapping[str, Any]] = []
        self.loras: list[str] = ["detail"]
        self.changed: dict[str, Any] = {"samples_format": "jpg"}
        self.serve(port)

    def reply(self, to: BaseHTTPRequestHandler, body: Any) -> None:
        start = time.perf_counter()
        path = to.path.partition("?")[0]
        status, found = self.answer(path, body, to.headers.get("authorization", ""))
        is_image = path.endswith("txt2img")
        data = head(to, status, found)
        if self.broken or (is_image and self.cut):
            if self.broken:
                self.broken -= 1
            else:
                self.cut -= 1
            to.wfile.write(data[: len(data) // 2])
            to.close_connection = True
        elif is_image and self.slow:
            self.slow -= 1
            for i in range(0, len(data), len(data) // 50):
                to.wfile.write(data[i : i + len(data) // 50])
                to.wfile.flush()
                time.sleep(0.1)
        else:
            to.wfile.write(data)
        self.busy_s += time.perf_counter() - start

    def answer(self, path: str, body: Any, auth: str) -> Answer:
        self.asked[path] += 1
        name = path.removeprefix("/sdapi/v1/")
        if self.auth and auth != f"Basic {base64.b64encode(self.auth.encode()).decode()}":
            return 401, {"detail": "Not authenticated"}
        if self.errors:
            self.errors -= 1
            return 500, {"error": "OutOfMemoryError", "errors": "CUDA out of memory"}
        handlers: dict[str, Callable[[Any], Answer]] = {
            "options": self._options,
            "samplers": self._samplers,
            "schedulers": self._schedulers,
            "sd-models": self._models,
            "upscalers": lambda _: (200, [{"name": "None"}, {"name": "R-ESRGAN 4x+"}]),
            "latent-upscale-modes": lambda _: (200, [{"name": "Latent"}]),
            "prompt-styles": lambda _: (200, [{"name": "moody"}]),
            "loras": lambda _: (200, [{"name": one, "alias": one} for one in self.loras]),
            "refresh-loras": self._refreshed,
            "sd-vae": lambda _: (200, [{"model_name": "bright.vae.pt"}]),
            "refresh-vae": self._refreshed,
            "scripts": lambda _: (200, {"txt2img": ["controlnet"], "img2img": []}),
            "refresh-checkpoints": self._refreshed,
            "txt2img": self._image,
            "progress": self._progress,
            "version": lambda _: self._of_next({"app": "sd.next", "commit": "058a7f0"}),
            "checkpoint": lambda _: self._of_next({"title": self._title(self.chosen)}),
            "/openapi.json": self._described,
        }
        known = handlers.get(name)
        if self.extension and name.startswith("/bayesian-merger/v1/"):
            found = self._extended(name.rpartition("/")[2], body)
        else:
            found = known(body) if known else (404, {"detail": "Not Found"})
        return self.twist(path, body, found)

    def _of_next(self, told: Any) -> Answer:
        return (200, told) if self.kind == NEXT else (404, {"detail": "Not Found"})

    def _extended(self, name: str, body: Any) -> Answer:
        try:
            return 200, getattr(self.extension, name)(body)
        except HTTPException as error:
            return error.status_code, {"detail": error.detail}

    def _made_live(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.live = {name: {n.replace(".wrapped", ""): x for n, x in tensors.items()}}
        self.chosen = self.loaded = name

    def _refreshed(self, _: Any) -> Answer:
        self._refresh()
        return 200, None

    def _refresh(self) -> None:
        self._files = {path.name: path for path in sorted(self.folder.rglob("*.safetensors"))}

    def _progress(self, _: Any) -> Answer:
        job = f"2026{len(self.bodies):010}"
        if self.others:
            self.others -= 1
            return 200, {"state": {"interrupted": False, "job_timestamp": "another"}}
        return 200, {"state": {"interrupted": self.interrupted, "job_timestamp": job}}

    def _options(self, body: Any) -> Answer:
        if body is None:
            own = {"forge_preset": "sd"} if self.kind == FORGE else {}
            if self.kind == NEXT:  # which tells of what was ever changed
                return 200, dict(self.changed)
            return 200, {
                "sd_model_checkpoint": self._title(self.chosen),
                **_DEFAULTS,
                **self.settings,
                **own,
            }
        self.settings |= {name: value for name, value in body.items() if name in _DEFAULTS}
        if (title := body.get("sd_model_checkpoint")) is not None:
            name = next((n for n in self._files if self._title(n) == title or n == title), None)
            if name is None:
                if self.kind == NEXT:
                    return 200, {"updated": []}
                return 500, {"error": "RuntimeError", "errors": f"model {title!r} not found"}
            self.chosen = name
            self.changed["sd_model_checkpoint"] = self._title(name)
            if self.kind != FORGE:  # which loads with the next image
                self.loaded = name
        return 200, None

    def _samplers(self, _: Any) -> Answer:
        names = _OLD_SAMPLERS if self.kind == OLD else _SAMPLERS
        own = {"DPM++ 2M": {"scheduler": "karras"}}
        aliases = {"Euler": ["k_euler"]}
        return 200, [
            {"name": n, "aliases": aliases.get(n, []), "options": own.get(n, {})} for n in names
        ]

    def _schedulers(self, _: Any) -> Answer:
        if self.kind == OLD:
            return 404, {"detail": "Not Found"}
        if self.kind == NEXT:
            return 500, {"error": "AttributeError", "errors": "no schedulers"}
        return 200, [{"name": n.casefold().replace(" ", "_"), "label": n} for n in _SCHEDULERS]

    def _models(self, _: Any) -> Answer:
        return 200, [
            {"title": self._title(n), "model_name": path.stem, "filename": str(path)}
            for n, path in self._files.items()
        ]

    def _described(self, _: Any) -> Answer:
        if self.kind == NEXT:
            return 404, {"detail": "Not Found"}
        reference = {"$ref": "#/components/schemas/Txt2Img"}
        content = {"application/json": {"schema": reference}}
        return 200, {
            "paths": {"/sdapi/v1/txt2img": {"post": {"requestBody": {"content": content}}}},
            "components": {"schemas": {"Txt2Img": {"properties": self._known_fields()}}},
        }

    def _known_fields(self) -> dict[str, None]:
        own = ("hr_cfg", "hr_additional_modules") if self.kind == FORGE else ()
        known = (*_FIELDS, *own)
        return {name: None for name in known if (self.kind, name) != (OLD, "scheduler")}

    def _image(self, body: Any) -> Answer:
        self.bodies.append(body)
        self.loaded = self.chosen
        overridden = body.get("override_settings") or {}
        if self.kind != NEXT and not overridden.keys() <= _DEFAULTS.keys():
            return 500, {"error": "KeyError", "errors": "no such setting"}
        # What its file lacks is not put back.
        before = {name: x for name, x in self.settings.items() if name in overridden}
        self.settings |= overridden
        self.made_with.append({**_DEFAULTS, **self.settings})
        self.settings |= before
        sampler, scheduler = body["sampler_name"], body.get("scheduler", "Automatic")
        if self.kind != OLD and sampler.endswith(" Karras"):
            sampler, scheduler = sampler.removesuffix(" Karras"), "Karras"
        known = [one["name"] for one in self._samplers(None)[1]]
        if sampler not in known:
            if self.kind == NEXT:
                return 404, {"detail": "Sampler not found"}
            if self.kind == OLD:
                return 400, {"detail": "Sampler not found"}
            sampler, scheduler = "DPM++ 2M", "Karras"
        if (sampler, scheduler) == ("DPM++ 2M", "Karras"):
            scheduler = "Automatic"
        width, height = (body[side] // 8 * 8 for side in ("width", "height"))
        state = self.live.get(self.loaded) or load_file(self._files[self.loaded])
        stem = self.loaded.removesuffix(".safetensors")
        schedule = f", Schedule type: {scheduler}" if self.kind in (A1111, FORGE) else ""
        text = (
            f"{body['prompt']}\nSteps: {body['steps']}, Sampler: {sampler}{schedule}, CFG scale: "
            f"{body['cfg_scale']}, Seed: {body['seed']}, Size: {width}x{height}, Model: {stem}"
        )
        info = {
            "seed": body["seed"],
            "all_seeds": [body["seed"]],
            "width": width,
            "height": height,
            "sampler_name": sampler,
            "cfg_scale": body["cfg_scale"],
            "steps": body["steps"],
            "infotexts": [text],
            "job_timestamp": f"2026{len(self.bodies):010}",
            "index_of_first_image": int(bool(body.get("save_images"))),
        }
        if self.kind != NEXT:
            info["sd_model_name"] = stem
        images = [self._painted(state, body, (width, height))]
        if body.get("save_images"):
            images.insert(0, "no picture")  # the grid
        if body.get("send_images") is False:
            images = []
        return 200, {"images": images, "parameters": body, "info": json.dumps(info)}

    def _painted(self, state: Mapping[str, Tensor], body: Any, size: tuple[int, int]) -> str:
        """The mean of each block's tensor as the grey of a stripe, with noise of the seed."""
        values = np.array([float(state[name].float().mean()) for name in TENSORS.values()])
        noise = np.random.default_rng(body["seed"]).normal(0, 0.05, len(values))
        grey = np.clip((values + noise) * 128 + 64, 0, 255).astype(np.uint8)
        image = Image.fromarray(np.repeat(grey[None, :], 4, 0)).resize(
            size, Image.Resampling.NEAREST
        )
        data = io.BytesIO()
        image.convert("RGB").save(data, format="PNG")
        return base64.b64encode(data.getvalue()).decode()

    def _title(self, name: str) -> str:
        if name in self.live:
            return name
        return f"{name} [{abs(hash(name + self.salt)) % 10**10:010}]"
