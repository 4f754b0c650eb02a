"""A server that answers as ComfyUI does, and paints what its nodes merge."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from comfyui_modules import node
from http_fake import FakeServer, frame, head, upgrade
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from toy_plugin import TENSORS, UNET

SAMPLERS = ["euler", "euler_ancestral", "dpmpp_2m"]
SCHEDULERS = ["normal", "karras", "sgm_uniform"]
PARTS = [
    *("time_embed.", "label_emb."),
    *(f"input_blocks.{i}." for i in range(12)),
    *(f"middle_block.{i}." for i in range(3)),
    *(f"output_blocks.{i}." for i in range(12)),
    "out.",
]

KINDS = {
    "CheckpointLoaderSimple": ["MODEL", "CLIP", "VAE"],
    "CLIPTextEncode": ["CONDITIONING"],
    "EmptyLatentImage": ["LATENT"],
    "KSampler": ["LATENT"],
    "VAEDecode": ["IMAGE"],
    "CLIPLoader": ["CLIP"],
    "VAELoader": ["VAE"],
    "PreviewImage": [],
    "SaveImage": [],
    "SaveAnimatedWEBP": [],
    "BayesianMergerLoader": ["MODEL", "CLIP", "VAE"],
    "ModelMergeSD1": ["MODEL"],
    "ModelMergeSDXL": ["MODEL"],
}
"""The nodes that it tells of, and the kinds of their results."""

ENDS = ("PreviewImage", "SaveImage", "SaveAnimatedWEBP", "BayesianMergerLoader")
"""Those that run though nobody takes their results."""

State = Mapping[str, float]
"""A model as the mean of each of its tensors, as far as it has them."""


class NodeFault(Exception):
    """What stops a job."""


class FakeComfyUI(FakeServer):
    """A server on a port of its own, with the checkpoints of a folder.

    `forgets` is a number of further jobs that it loses, as if it had been started anew, `fails` of jobs
    that end with an error, `interrupts` of jobs that somebody interrupts, `hangs` of jobs that
    never end. A job takes `takes_s`; of its end it tells by a websocket if `listeners` is a table,
    unless `is_silent`. `others` are jobs of others at work, `saved` what jobs have left in the user's
    folder, `freed` what it was told to let go of. With a `home` it has our node, whose merges lie
    there and whose receipts `receipts` may change.
    """

    def __init__(self, folder: Path, sub: str = "", home: Path | None = None) -> None:
        self.ours: Any = node(home) if home else None
        self.receipts: Callable[[Any], Any] = lambda receipt: receipt
        self.folder, self.sub = folder, sub
        self.forgets = self.fails = self.interrupts = self.hangs = 0
        self.new_style = self.twins = False
        self.graphs: list[dict[str, Any]] = []
        self.stopped: list[tuple[str, Any]] = []
        self.others: list[str] = []
        self.saved: list[str] = []
        self.freed: list[Any] = []
        self.asked: Counter[str] = Counter()
        self._history: dict[str, Any] = {}
        self._running: list[str] = []
        self._pictures: dict[str, bytes] = {}
        self.takes_s = self.busy_s = 0.0
        self._n_jobs = 0
        # Who listens, by the name that is given, and what the server says beside what it must.
        self.listeners: dict[str, BaseHTTPRequestHandler] | None = None
        self.babble: list[Any] = []
        self.is_silent = False
        self.serve()

    def reply(self, to: BaseHTTPRequestHandler, body: Any) -> None:
        split = urlsplit(to.path)
        self.asked["/history" if split.path.startswith("/history/") else split.path] += 1
        if split.path == "/ws" and self.listeners is not None:
            upgrade(to)
            self.listeners[parse_qs(split.query)["clientId"][0]] = to
            to.rfile.read()  # till it hangs up
            return
        start = time.perf_counter()
        status, found = self.answer(split.path, parse_qs(split.query), body)
        to.wfile.write(head(to, status, b"" if found is None else found))
        self.busy_s += time.perf_counter() - start

    def answer(self, path: str, query: Mapping[str, list[str]], body: Any) -> tuple[int, Any]:
        name, _, rest = path.lstrip("/").partition("/")
        if name == "system_stats":
            return 200, {"system": {"comfyui_version": "0.3.64"}}
        if path == "/bayesian-merger/v1/place" and self.ours:
            status, found = self.ours.place(body["bytes"])
            return status, found
        if name == "object_info":
            if rest not in KINDS:
                return 200, {}
            described = {"input": {"required": self._inputs(rest)}, "output": KINDS[rest]}
            return 200, {rest: {**described, "output_node": rest in ENDS}}
        if name == "prompt":
            return self._begin(body["prompt"], body["client_id"])
        if name == "history":
            wanted = [rest] if rest else list(self._history)[-int(query["max_items"][0]) :]
            return 200, {job: self._history[job] for job in wanted if job in self._history}
        if name == "queue" and body is None:
            running = [[0, job, {}, {}, []] for job in (*self._running, *self.others)]
            return 200, {"queue_running": running, "queue_pending": []}
        if name in ("queue", "interrupt"):
            self.stopped.append((name, body))
            return 200, None
        if name == "free":
            self.freed.append(body)
            return 200, None
        if name == "view":
            return 200, self._pictures[query["filename"][0]]
        return 404, None

    def tidy(self) -> None:
        """Forget all jobs that nobody waits for any more, but the last."""
        self.graphs[:-1] = []
        for job in list(self._history)[:-8]:
            self._history.pop(job)
            self._pictures.pop(f"{job}.png", None)

    def _checkpoints(self) -> dict[str, Path]:
        files = sorted(self.folder.glob("*.safetensors"))
        subs = ("old/", "new/") if self.twins else (self.sub,)
        return {sub + path.name: path for sub in subs for path in files}

    def _inputs(self, node: str) -> dict[str, Any]:
        choices = {
            "KSampler": {"sampler_name": SAMPLERS, "scheduler": SCHEDULERS},
            "CheckpointLoaderSimple": {"ckpt_name": list(self._checkpoints())},
        }
        if node in choices:
            new = self.new_style
            return {
                name: ["COMBO", {"options": known}] if new else [known]
                for name, known in choices[node].items()
            }
        return dict.fromkeys(("model1", "model2", *PARTS))

    def _begin(self, graph: dict[str, Any], client: str) -> tuple[int, Any]:
        samplers = [one["inputs"] for one in graph.values() if one["class_type"] == "KSampler"]
        if not all(sampler["sampler_name"] in SAMPLERS for sampler in samplers):
            kind = "prompt_outputs_failed_validation"
            return 400, {"error": {"type": kind, "message": "Prompt outputs failed validation"}}
        self.graphs.append(graph)
        kinds = [one["class_type"] for one in graph.values()]
        self.saved += [kind for kind in kinds if kind in ENDS and kind.startswith("Save")]
        self._n_jobs += 1
        job = f"job-{self._n_jobs}"
        if self.forgets:
            self.forgets -= 1
        elif self.hangs:
            self.hangs -= 1
            self._running.append(job)
        elif self.fails:
            self.fails -= 1
            self._fail(job, "execution_error", "OutOfMemoryError", "no\nmemory")
        elif self.interrupts:
            self.interrupts -= 1
            self._fail(job, "execution_interrupted", "", "")
        else:
            try:
                outputs = self._outputs(graph, job)
            except NodeFault as fault:
                self._fail(job, "execution_error", "AttributeError", str(fault))
            else:
                status = {"status_str": "success", "completed": True, "messages": []}
                done = {"status": status, "outputs": outputs}
                begun = {"type": "execution_start", "data": {"prompt_id": job}}
                self._tell(client, [begun])
                threading.Timer(self.takes_s, self._end, (job, done, client)).start()
        return 200, {"prompt_id": job, "number": 1, "node_errors": {}}

    def _fail(self, job: str, name: str, kind: str, said: str) -> None:
        told = {"exception_type": kind, "exception_message": said}
        self._history[job] = {"status": {"status_str": "error", "messages": [[name, told]]}}

    def _outputs(self, graph: dict[str, Any], job: str) -> dict[str, Any]:
        """What the nodes tell that are not for others."""
        outputs: dict[str, Any] = {}
        if "merge" in graph:
            loader = self.ours.BayesianMergerLoader()
            told = loader.load(**graph["merge"]["inputs"])["ui"]
            outputs["merge"] = self.receipts(told)
        if "shown" in graph:
            self._pictures[f"{job}.png"] = self._painted(graph)
            images = [{"filename": f"{job}.png", "subfolder": "", "type": "temp"}]
            outputs["shown"] = {"images": images}
        return outputs

    def _end(self, job: str, done: Any, client: str) -> None:
        self._history[job] = done
        last = {"type": "executing", "data": {"node": None, "prompt_id": job}}
        self._tell(client, [*self.babble, last])

    def _tell(self, client: str, messages: list[Any]) -> None:
        if self.listeners and client in self.listeners and not self.is_silent:
            with suppress(OSError, ValueError):  # who has hung up
                for told in messages:
                    self.listeners[client].wfile.write(frame(told))
                self.listeners[client].wfile.flush()

    def _painted(self, graph: dict[str, Any]) -> bytes:
        """The mean of each block's tensor as the grey of a stripe, with noise of the seed."""
        sampler, size = one_of(graph, "KSampler"), one_of(graph, "EmptyLatentImage")
        positive = graph[sampler["positive"][0]]["inputs"]
        unet = self._evaluated(graph, sampler["model"][0])
        text = self._evaluated(graph, positive["clip"][0])
        if "base" not in text:
            raise NodeFault("clip input is invalid: None")
        values = np.array([text["base"], *(unet[block] for block in TENSORS if block != "base")])
        noise = np.random.default_rng(sampler["seed"]).normal(0, 0.05, len(values))
        grey = np.clip((values + noise) * 128 + 64, 0, 255).astype(np.uint8)
        image = Image.fromarray(np.repeat(grey[None, :], 4, 0)).resize(
            (size["width"], size["height"]), Image.Resampling.NEAREST
        )
        data = io.BytesIO()
        image.convert("RGB").save(data, format="PNG")
        return data.getvalue()

    def _evaluated(self, graph: dict[str, Any], name: str) -> State:
        node = graph[name]
        kind, inputs = node["class_type"], node["inputs"]

        def of(key: str) -> State:
            return self._evaluated(graph, inputs[key][0])

        if kind == "CheckpointLoaderSimple":
            return means(load_file(self._checkpoints()[inputs["ckpt_name"]]))
        if kind == "BayesianMergerLoader":
            return means(self.ours.BayesianMergerLoader().load(**inputs)["result"][0].tensors)
        if kind == "CLIPLoader":
            return {"base": 0.5}
        if kind == "CLIPSetLastLayer":
            return of("clip")
        first, second = ("model1", "model2") if kind.startswith("Model") else ("clip1", "clip2")
        a, b = of(first), of(second)
        if first == "clip1" and "base" not in a.keys() & b.keys():
            raise NodeFault("'NoneType' object has no attribute 'clone'")
        if kind.endswith("Add"):
            return {block: a[block] + b[block] for block in a}
        if kind.endswith("Subtract"):
            return {block: a[block] - inputs["multiplier"] * b[block] for block in a}
        found = {}
        for block in a.keys() & b.keys():
            tensor = TENSORS[block]
            inside = tensor.removeprefix(f"{UNET}.")
            share = next((inputs[p] for p in PARTS if p in inputs and inside.startswith(p)), None)
            share = inputs.get("ratio", 1.0) if share is None else share
            found[block] = share * a[block] + (1 - share) * b[block]
        return found


def means(tensors: Mapping[str, Tensor]) -> State:
    return {b: float(tensors[n].float().mean()) for b, n in TENSORS.items() if n in tensors}


def one_of(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    """The inputs of the first node of a class."""
    found: dict[str, Any] = next(n["inputs"] for n in graph.values() if n["class_type"] == kind)
    return found
