"""Images by a running ComfyUI, which merges its checkpoints with its own nodes: nothing is installed.

Its nodes ModelMergeSD1, ModelMergeSDXL and CLIPMergeSimple take the share of the first model, which is
1 - alpha. What these cannot merge is merged here, and loaded by a node of ours where ComfyUI has it.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from bayesian_merger.backends import Key, Merge, backend
from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.delivery import Claim, Offer, offered, renewed
from bayesian_merger.errors import ConfigError, RunError, TrialError
from bayesian_merger.guard import STEM
from bayesian_merger.handover import Handover
from bayesian_merger.pictures import decoded
from bayesian_merger.registry import nearest
from bayesian_merger.server import Events, Refused, Server, Slow, Strange
from bayesian_merger.workflow import PARTS, SHOWN, Graph, Link, NodeClass, Workflow


class _InterruptedError(TrialError):
    """Somebody has interrupted a job of ours."""


class _Model(NamedTuple):
    """Nodes that make a model, and the results of these that are its parts."""

    nodes: Graph
    model: Link
    clip: Link
    vae: Link


# The samplers and schedulers of stable-diffusion-webui by ComfyUI's names.
_SAMPLERS = {
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DDIM": "ddim",
    "UniPC": "uni_pc",
    "LCM": "lcm",
}
_SCHEDULERS = {
    "Automatic": "normal",
    "Karras": "karras",
    "Exponential": "exponential",
    "SGM Uniform": "sgm_uniform",
    "Simple": "simple",
    "DDIM": "ddim_uniform",
    "Beta": "beta",
}
_OURS = "BayesianMergerLoader"
_NODES = {"sd1": "ModelMergeSD1", "sdxl": "ModelMergeSDXL"}
_METHODS = ("weighted_sum", "add_difference")
_UNET = "model.diffusion_model."
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
# A model's parts in words, and how the names of their tensors begin.
_TITLES = {"MODEL": "denoising network", "CLIP": "text encoder", "VAE": "VAE"}
_BEGINNINGS = {"MODEL": (_UNET,), "CLIP": _TEXT, "VAE": ("first_stage_model.", "vae.")}
_PROOF = Prompt(0, "proof", "", 0, width=64, height=64, steps=1)
# The first pause before it is looked whether an image is done, and the longest; the longest where the
# server tells it. It does so by the last of the events "executing", or by one of these.
_PAUSE_S, _LONGEST_PAUSE_S, _LONGEST_REST_S = 0.01, 0.1, 2.0
_ENDS = ("execution_error", "execution_interrupted")
# A job that is neither done nor in the queue, so often in a row, is lost.
_LOST = 5
# How often a job is begun anew.
_ROUNDS = 5


@backend
class ComfyUI:
    """A running ComfyUI, whose folder of checkpoints has the models under the names of their files.

    Merges by `weighted_sum` and `add_difference`; by any method, and whatever the weights, if it runs
    on this machine and has our node. `workflow` is a file of the menu's Export (API), in which our model
    and prompts take the place of its own. `clip_skip` counts as in stable-diffusion-webui. `timeout_s`
    is the longest that an image may take, `wait_for_server` how long a server that has gone away is
    waited for. The environment variable `auth_env` may hold "user:password" or "Bearer TOKEN", for a
    proxy before it. `verify` false takes any TLS certificate.
    """

    batch = 1
    is_remote = True

    def __init__(
        self,
        url: str = "http://127.0.0.1:8188",
        workflow: Path | None = None,
        clip_skip: int = 1,
        timeout_s: float = 600.0,
        wait_for_server: str | float = "10m",
        auth_env: str = "BAYESIAN_MERGER_AUTH",
        verify: bool = True,
    ) -> None:
        """ConfigError for options that cannot be."""
        if clip_skip < 1:
            raise ConfigError("backend.clip_skip must be 1 or more")
        self._server = Server(url, timeout_s, wait_for_server, auth_env, verify)
        # What the server tells of our jobs; the name by which it knows us.
        self._events: Events | None = None
        self._client = secrets.token_hex(16)
        # How often it had been away when it told nothing; it is listened to again when it was since.
        self._mute_at: int | None = None
        # Our last job there.
        self._job = ""
        self._clip_skip, self._timeout_s = clip_skip, timeout_s
        # Where merges lie for our node, if ComfyUI has it; whether they are all made by it.
        self._offer = Offer()
        self._is_ours = False
        self._handover: Handover | None = None
        # What our node is to load.
        self._order: Mapping[str, str] = {}
        self._claim: Claim | None = None
        self._merged = _Model({}, [], [], [])
        self._workflow_file = workflow
        self._own: Workflow | None = None
        # The parts of the merge that are in no image, and the first merge that was asked about.
        self._idle: list[str] = []
        self._first: Recipe | None = None
        # Of each node, as the server describes them.
        self._inputs: dict[str, Mapping[str, Any]] = {}

    def check(
        self,
        prompts: Sequence[Prompt],
        architecture: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[str]:
        """ConfigError for no ComfyUI, models that it cannot use or merge, unknown samplers."""
        url = self._server.url
        try:
            system = self._server.look("/system_stats")["system"]
            version = str(system.get("comfyui_version", "of unknown version"))[:40]
        except (Refused, Strange, KeyError, TypeError, AttributeError) as error:
            denied = self._server.denied(error) if isinstance(error, Refused) else None
            other = ConfigError(f"backend.url: {url} is no ComfyUI ({error})")
            raise denied or other from error
        self._offer = offered(self._server, 2 * sum(math.prod(one) for one in shapes.values()))
        if architecture not in _NODES and not self._offer.folder:
            raise ConfigError(
                f"back end comfyui merges {' and '.join(_NODES)}, and the models are {architecture}"
            )
        needed = ["KSampler", "CheckpointLoaderSimple"]
        for node in (*needed, *([_NODES[architecture]] if architecture in _NODES else [])):
            self._inputs[node] = self._required(node)
        notes = [f"ComfyUI {version} at {url}; {self._way()}"]
        self._own = Workflow(self._workflow_file, self._class) if self._workflow_file else None
        takes = self._own.takes if self._own else set(PARTS)
        held = [part for part in PARTS if any(n.startswith(_BEGINNINGS[part]) for n in shapes)]
        if missing := [_TITLES[part] for part in PARTS if part in takes and part not in held]:
            raise ConfigError(
                f"the merge holds no {' and no '.join(missing)}, which the images need; name a workflow "
                f"that loads its own (backend.workflow)"
            )
        self._idle = [part for part in held if part not in takes]
        if self._own:
            return [
                *notes,
                "steps, CFG scale, sampler and all else but prompts, seeds and sizes are the workflow's",
                *self._own.notes,
                *self._idle_notes(architecture),
            ]
        samplers = self._choices("KSampler", "sampler_name")
        schedulers = self._choices("KSampler", "scheduler")
        mistakes = []
        for prompt in prompts:
            for what, known, spelling in (
                ("sampler", samplers, _sampler(prompt)[0]),
                ("scheduler", schedulers, _sampler(prompt)[1]),
            ):
                if spelling not in known:
                    names = [*known, *(_SAMPLERS if what == "sampler" else _SCHEDULERS)]
                    hint = nearest(spelling, names) or f"; it has: {', '.join(known)}"
                    mistakes.append(
                        f"payload {prompt.payload}: ComfyUI has no {what} {spelling!r}{hint}"
                    )
        if mistakes:
            raise ConfigError("\n".join(dict.fromkeys(mistakes)))
        if extra := sorted({key for prompt in prompts for key in prompt.extra}):
            notes.append(f"payload fields this back end does not use: {', '.join(extra)}")
        return notes

    def require(self, recipe: Recipe, merged: Merge) -> None:
        """ConfigError for a merge that ComfyUI's nodes cannot make, if it has not ours.

        And where the search seems to vary nothing that an image shows.
        """
        if self._idle:
            self._require_effect(recipe, merged)
        self._choose(recipe, merged)

    def _require_effect(self, recipe: Recipe, merged: Merge) -> None:
        """ConfigError if this merge and the first of its method differ only in what is in no image."""
        if self._first is None or self._first.method != recipe.method:
            self._first = recipe
        idle = tuple(begin for part in self._idle for begin in _BEGINNINGS[part])
        shown = {key for n in merged if not n.startswith(idle) for key in merged.moved_by(n)}
        varied = [
            (weight, block)
            for weight, values in recipe.weights.items()
            for block, value in values.items()
            if self._first.weights[weight][block] != value
        ]
        if varied and not shown.intersection(varied):
            titles = " and ".join(_TITLES[part] for part in self._idle)
            names = ", ".join(f"{block}_{weight}" for weight, block in varied)
            raise ConfigError(
                f"the workflow has its own {titles}, and the search varies nothing else ({names}); take "
                f"it from the checkpoint's loader there, or search other weights"
            )

    def _idle_notes(self, architecture: str) -> list[str]:
        """What of the merge, and of our options, the workflow does not use."""
        blocks = {"CLIP": "CLIP, T5" if architecture == "flux" else "base", "VAE": "VAE"}
        notes = []
        for part in self._idle:
            weights = f" ({blocks[part]})" if part in blocks else ""
            notes.append(
                f"the workflow has its own {_TITLES[part]}; weights of the merge's{weights} change "
                f"nothing"
            )
        if "CLIP" in self._idle and self._clip_skip > 1:
            notes.append(
                "backend.clip_skip changes nothing, as the workflow has its own text encoder"
            )
        return notes

    def _choose(self, recipe: Recipe, merged: Merge) -> None:
        """Have our node load the merges if ComfyUI's cannot make this one; ConfigError without it."""
        try:
            self._nodes(recipe, merged)
        except ConfigError as error:
            if not self._offer.folder:
                why = (
                    f"; our node cannot be used: {self._offer.fault}" if self._offer.fault else ""
                )
                raise ConfigError(
                    f"{error}, or install our node (docs/comfyui.md){why}"
                ) from error
            self._is_ours = True

    def take(self) -> None:
        """Have our node's place for merges, if it is used; ConfigError if another run has it."""
        if self._is_ours and not (self._claim and self._claim.is_watched):
            assert self._offer.folder
            self._claim = Claim(self._server, self._offer.folder)
            self._claim.take()
            self._claim.watch()

    def load(self, recipe: Recipe, merged: Merge) -> None:
        """Make the nodes of the merge; TrialError if ComfyUI's model is not the merge.

        ConfigError for one that its nodes cannot make.
        """
        self._choose(recipe, merged)
        if self._is_ours:
            self._hand_over(recipe, merged)
            return
        self._merged = self._skipping(self._nodes(recipe, merged))
        # ComfyUI merges when an image is made, so the smallest one is, which also proves that it can.
        # With a workflow of the user's its first image does: the models may hold no text encoder.
        if self._own is None:
            self._done(self._built_in(_PROOF))

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        """Images one by one, in the server's queue."""
        for prompt in prompts:
            done = self._done(self._workflow(prompt))
            # The server may have been started anew, or be another by now.
            if "merge" in _outputs(done):
                self._confirm(done)
            made = self._picture(done)
            # A workflow of the user's may enlarge what it makes.
            image = decoded(made, None if self._own else (prompt.width, prompt.height))
            yield Sample(image, prompt)

    def give_up(self) -> None:
        """From now on, wait no more for the server if it is away."""
        self._server.give_up()

    def close(self) -> None:
        """Close the connections, and remove the merge."""
        is_held = bool(self._handover and self._job)
        if self._handover:
            self._handover.close()
        if self._claim:
            self._claim.leave()
        if self._events:
            self._events.close()
        self._handover = self._claim = self._events = None
        if is_held:
            self._free()
        self._server.close()

    def _way(self) -> str:
        """How it merges, in words."""
        if self._offer.folder:
            return (
                f"it merges with its own nodes, or loads merges by our node ({self._offer.folder})"
            )
        fault = f" (it has our node, but: {self._offer.fault})" if self._offer.fault else ""
        return f"it merges the models with its own nodes{fault}"

    def _hand_over(self, recipe: Recipe, merged: Merge) -> None:
        """Have our node load the merge, and tell what the model then is."""
        self.take()
        folder = self._offer.folder
        assert folder
        if not folder.is_dir():  # somebody has removed it
            self._handover = None
            self._offer = renewed(self._server, folder, merged)
        if self._handover is None:
            file = folder / f"{STEM}{self._offer.token[:16]}.safetensors"
            self._handover = Handover(file)
        self._handover.put(merged)
        self._order = {
            "file": self._handover.path.stem,
            "name": f"{STEM}{recipe.digest()}",
            "live": json.dumps(self._handover.probes()),
        }
        nodes = {"merge": _node(_OURS, **self._order)}
        self._merged = self._skipping(_Model(nodes, *(["merge", slot] for slot in range(3))))
        # It needs no image to load the merge and to tell of it.
        self._confirm(self._done(nodes))

    def _confirm(self, done: Mapping[str, Any]) -> None:
        """TrialError if our node tells that it has loaded anything but the merge."""
        assert self._handover
        try:
            receipt = json.loads(_outputs(done)["merge"]["bayesian_merger"][0])
            told, values = receipt["name"], receipt["live"]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise TrialError("ComfyUI tells nothing of the model that it has loaded") from error
        if told != self._order["name"]:
            raise TrialError(f"ComfyUI did not take the merge, it has {str(told)[:80]}")
        self._handover.confirm(values, json.loads(self._order["live"]))

    def _free(self) -> None:
        """Have ComfyUI let go of the merge, which is of no use to anybody.

        As it lets go of all else too, only if our job is the last there and no other waits.
        """
        with suppress(Refused, Strange, ConfigError):
            queue = self._server.look("/queue")
            at_work = [*_jobs(queue, "queue_running"), *_jobs(queue, "queue_pending")]
            last = self._server.look("/history?max_items=1")
            if {*at_work, *(last if isinstance(last, dict) else [])} <= {self._job}:
                self._server.try_post("/free", {"unload_models": True, "free_memory": True})

    def _skipping(self, merged: _Model) -> _Model:
        """The model whose text encoder stops at the layer that `clip_skip` names."""
        if self._clip_skip == 1:
            return merged
        skipped = {"clip": merged.clip, "stop_at_clip_layer": -self._clip_skip}
        nodes = {**merged.nodes, "skip": _node("CLIPSetLastLayer", **skipped)}
        return merged._replace(nodes=nodes, clip=["skip", 0])

    def _required(self, node: str) -> Mapping[str, Any]:
        """The inputs of a node, as the server describes them."""
        try:
            found = self._server.look(f"/object_info/{node}")[node]["input"]["required"]
        except (Refused, Strange, KeyError, TypeError) as error:
            raise ConfigError(
                f"backend.url: the ComfyUI at {self._server.url} has no node {node}; update it"
            ) from error
        return found if isinstance(found, dict) else {}

    def _class(self, node: str) -> NodeClass | None:
        """What the server says of a class of nodes; None if it has no such."""
        try:
            found = self._server.look(f"/object_info/{quote(node)}")[node]
            kinds, is_end = found["output"], found.get("output_node") is True
        except (Refused, Strange, KeyError, TypeError, AttributeError):
            return None
        return NodeClass([str(kind) for kind in kinds] if isinstance(kinds, list) else [], is_end)

    def _choices(self, node: str, name: str) -> list[str]:
        """What an input of a node may be."""
        # [["euler", ...], {...}], or in newer versions ["COMBO", {"options": ["euler", ...]}].
        kind = self._inputs[node].get(name)
        first, *rest = kind if isinstance(kind, list) and kind else [[]]
        if not isinstance(first, list):
            first = rest[0].get("options") if rest and isinstance(rest[0], dict) else []
        return [str(option) for option in first] if isinstance(first, list) else []

    def _nodes(self, recipe: Recipe, merged: Merge) -> _Model:
        """The loaders of the models, and what merges them."""
        if recipe.architecture not in _NODES:
            raise ConfigError(f"ComfyUI has no node that merges {recipe.architecture}")
        if recipe.method not in _METHODS:
            raise ConfigError(
                f"back end comfyui merges by {' and '.join(_METHODS)}, not by {recipe.method}"
            )
        if recipe.clip or recipe.vae == "base":
            what = "merge.clip" if recipe.clip else "merge.vae = 'base'"
            raise ConfigError(f"back end comfyui has nothing for {what}")
        strange = [n for n in merged if not n.startswith((_UNET, *_TEXT)) and merged.moved_by(n)]
        if strange:
            raise ConfigError(
                f"back end comfyui merges no VAE, as the search would ({strange[0]})"
            )
        graph: Graph = {}
        for letter, model in zip("abc", recipe.models, strict=False):
            graph[letter] = _node("CheckpointLoaderSimple", ckpt_name=self._file(model.name))
        texts = [n for n in merged if n.startswith(_TEXT) and merged.moved_by(n)]
        other, clip, clip2 = "b", ["a", 1], ["b", 1]
        if recipe.method == "add_difference":
            difference = {"model1": ["b", 0], "model2": ["c", 0], "multiplier": 1.0}
            graph["difference"] = _node("ModelMergeSubtract", **difference)
            graph["sum"] = _node("ModelMergeAdd", model1=["a", 0], model2=["difference", 0])
            other = "sum"
        shares = self._shares(recipe, merged)
        graph["model"] = _node(
            _NODES[recipe.architecture], model1=["a", 0], model2=[other, 0], **shares
        )
        if texts and recipe.method == "add_difference":
            pair = {"clip1": ["b", 1], "clip2": ["c", 1], "multiplier": 1.0}
            graph["text difference"] = _node("CLIPMergeSubtract", **pair)
            graph["text sum"] = _node("CLIPMergeAdd", clip1=["a", 1], clip2=["text difference", 0])
            clip2 = ["text sum", 0]
        if texts:
            ratio = 1.0 - _alpha(recipe, merged, texts, "base")
            graph["clip"] = _node("CLIPMergeSimple", clip1=["a", 1], clip2=clip2, ratio=ratio)
            clip = ["clip", 0]
        return _Model(graph, ["model", 0], clip, [recipe.vae, 2])

    def _shares(self, recipe: Recipe, merged: Merge) -> dict[str, float]:
        """The share of the first model in each part of the U-Net that ComfyUI's node knows."""
        node = _NODES[recipe.architecture]
        found = self._inputs[node]
        parts = [str(name) for name in found if name not in ("model1", "model2")]
        names = [name for name in merged if name.startswith(_UNET)]
        held: dict[str, list[str]] = {part: [] for part in parts}
        for name in names:
            inside = name.removeprefix(_UNET)
            fitting = [part for part in parts if inside.startswith(part.rstrip(".") + ".")]
            if not fitting:
                raise ConfigError(f"ComfyUI's node {node} has no weight for {inside}")
            held[max(fitting, key=len)].append(name)
        return {part: 1.0 - _alpha(recipe, merged, held[part], part) for part in parts}

    def _file(self, name: str) -> str:
        """The server's name of a checkpoint, which may lie in a folder."""
        known = self._choices("CheckpointLoaderSimple", "ckpt_name")
        found = [one for one in known if PureWindowsPath(one).name == name]
        if name in found:
            return name
        if len(found) > 1:
            raise ConfigError(
                f"ComfyUI has {len(found)} checkpoints {name!r}: {', '.join(found)}; rename one"
            )
        if not found:
            raise ConfigError(
                f"ComfyUI has no checkpoint {name!r}{nearest(name, known)}; put the models into its "
                f"folder models/checkpoints"
            )
        return found[0]

    def _workflow(self, prompt: Prompt) -> Graph:
        """The whole workflow of an image."""
        if self._own is None:
            return self._built_in(prompt)
        model = self._merged
        return {**model.nodes, **self._own.of([model.model, model.clip, model.vae], prompt)}

    def _built_in(self, prompt: Prompt) -> Graph:
        """The workflow of one sampler."""
        clip = self._merged.clip
        sampler, scheduler = _sampler(prompt)
        size = {"width": prompt.width, "height": prompt.height, "batch_size": 1}
        return {
            **self._merged.nodes,
            "positive": _node("CLIPTextEncode", text=prompt.prompt, clip=clip),
            "negative": _node("CLIPTextEncode", text=prompt.negative_prompt, clip=clip),
            "latent": _node("EmptyLatentImage", **size),
            "sampler": _node(
                "KSampler",
                model=self._merged.model,
                positive=["positive", 0],
                negative=["negative", 0],
                latent_image=["latent", 0],
                seed=prompt.seed,
                steps=prompt.steps,
                cfg=prompt.cfg_scale,
                sampler_name=sampler,
                scheduler=scheduler,
                denoise=1.0,
            ),
            "image": _node("VAEDecode", samples=["sampler", 0], vae=self._merged.vae),
            SHOWN: _node("PreviewImage", images=["image", 0]),
        }

    def _done(self, workflow: Graph) -> Mapping[str, Any]:
        """What the server tells of a workflow when it has succeeded.

        Begun anew if the server forgets it, or somebody interrupts it there.
        """
        fault = ""
        for _ in range(_ROUNDS):
            job = self._begun(workflow)
            try:
                done = self._waited(job)
            except BaseException:
                self._forget(job)
                raise
            if done is None:
                fault = "forgets its jobs"
                continue
            try:
                _require_success(done)
            except _InterruptedError as error:
                fault = str(error)
                continue
            return done
        raise TrialError(f"ComfyUI {fault} again and again")

    def _begun(self, workflow: Graph) -> str:
        self._listen()
        try:
            answer = self._server.post("/prompt", {"prompt": workflow, "client_id": self._client})
            self._job = str(answer["prompt_id"])
            return self._job
        except Refused as error:
            raise TrialError(f"ComfyUI refuses the workflow: {error}") from error
        except (Strange, Slow, KeyError, TypeError) as error:
            raise TrialError(f"ComfyUI: {error}") from error

    def _listen(self) -> None:
        """Hear what the server tells of our jobs, if it does."""
        if self._mute_at == self._server.n_lost or (self._events and self._events.is_open):
            return
        self._events = self._server.listen(f"/ws?clientId={self._client}")
        if self._events is None:
            self._mute_at = self._server.n_lost

    def _waited(self, job: str) -> Mapping[str, Any] | None:
        """What the server tells of the job when it is done; None if it knows nothing of it.

        The time that it waits for the jobs of others, or is away, does not count.
        """
        pause, missed, n_lost = _PAUSE_S, 0, self._server.n_lost
        end = time.monotonic() + self._timeout_s
        has_rested = is_told = False
        while time.monotonic() < end:
            if self._server.is_given_up:
                raise RunError("stopped, before ComfyUI was done")
            history = self._asked(f"/history/{job}")
            if isinstance(done := history.get(job), dict):
                if self._events and has_rested and not is_told:
                    self._events.close()
                    self._events, self._mute_at = None, self._server.n_lost
                return done
            if pause >= _LONGEST_PAUSE_S:
                queue = self._asked("/queue")
                is_running, is_pending = (
                    job in _jobs(queue, name) for name in ("queue_running", "queue_pending")
                )
                missed = 0 if is_running or is_pending else missed + 1
                if missed >= _LOST:
                    return None
                if is_pending or self._server.n_lost > n_lost:
                    n_lost = self._server.n_lost
                    end = time.monotonic() + self._timeout_s
            is_told = self._rest(job, pause) or is_told
            has_rested = True
            pause = min(1.3 * pause, _LONGEST_PAUSE_S)
        raise TrialError(f"ComfyUI has made no image in {self._timeout_s:g} s")

    def _rest(self, job: str, pause: float) -> bool:
        """Wait a little, or till the server tells that the job is done; False if it told nothing."""
        if self._events is None or not self._events.is_open:
            self._server.wait(pause)
            return True
        is_told = False
        end = time.monotonic() + _LONGEST_REST_S
        while self._events.is_open and (left := end - time.monotonic()) > 0:
            if self._server.is_given_up:
                break
            told = self._events.next(min(left, _LONGEST_PAUSE_S))
            data = told.get("data") if told else None
            if told and isinstance(data, dict) and data.get("prompt_id") == job:
                is_told = True
                is_last = told.get("type") == "executing" and data.get("node") is None
                if is_last or told.get("type") in _ENDS:
                    break
        return is_told or not self._events.is_open

    def _asked(self, path: str) -> Mapping[str, Any]:
        try:
            found = self._server.get(path)
        except (Refused, Strange, Slow) as error:
            raise TrialError(f"ComfyUI: {error}") from error
        return found if isinstance(found, dict) else {}

    def _forget(self, job: str) -> None:
        """Take the job from the queue, or stop it, as far as the server is there."""
        with suppress(Refused, Strange, ConfigError):
            self._server.try_post("/queue", {"delete": [job]})
            # Older versions stop whatever runs, and the queue may be others' too.
            if job in _jobs(self._server.look("/queue"), "queue_running"):
                self._server.try_post("/interrupt", {"prompt_id": job})

    def _picture(self, done: Mapping[str, Any]) -> bytes:
        """The PNG that a workflow has made."""
        try:
            image = _outputs(done)[SHOWN]["images"][0]
            place = {key: str(image[key]) for key in ("filename", "subfolder", "type")}
        except (KeyError, TypeError, IndexError):
            raise TrialError("ComfyUI was done without an image") from None
        try:
            return self._server.fetch(f"/view?{urlencode(place)}")
        except (Refused, Strange, Slow) as error:
            raise TrialError(f"ComfyUI: {error}") from error


def _outputs(done: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the nodes of a job have told, by their names."""
    found = done.get("outputs")
    return found if isinstance(found, dict) else {}


def _require_success(done: Mapping[str, Any]) -> None:
    """TrialError for a job that failed or was interrupted."""
    status = done.get("status")
    status = status if isinstance(status, dict) else {}
    if status.get("status_str") == "success":
        return
    messages = status.get("messages")
    pairs = [m for m in (messages if isinstance(messages, list) else []) if _is_message(m)]
    told = {name: entry for name, entry in pairs}
    if "execution_interrupted" in told:
        raise _InterruptedError("is interrupted in what it makes")
    error = told.get("execution_error", {})
    kind, said = error.get("exception_type", ""), error.get("exception_message", "no reason")
    raise TrialError(f"ComfyUI: {kind} {' '.join(str(said).split())[:300]}")


def _jobs(queue: object, name: str) -> list[object]:
    """The jobs of a part of the queue, whose entries are [number, job, ...]."""
    entries = queue.get(name) if isinstance(queue, dict) else None
    known = [e for e in (entries if isinstance(entries, list) else []) if isinstance(e, list)]
    return [entry[1] for entry in known if len(entry) > 1]


def _is_message(message: object) -> bool:
    """Whether it is a name and a table."""
    if not isinstance(message, list) or len(message) != 2:
        return False
    return isinstance(message[0], str) and isinstance(message[1], dict)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _sampler(prompt: Prompt) -> tuple[str, str]:
    """Sampler and scheduler by ComfyUI's names; "DPM++ 2M Karras" is both."""
    sampler, scheduler = prompt.sampler_name, prompt.scheduler
    for end in _SCHEDULERS:
        first = sampler.removesuffix(f" {end}")
        if first != sampler and first in _SAMPLERS and scheduler in ("Automatic", end):
            return _SAMPLERS[first], _SCHEDULERS[end]
    return _SAMPLERS.get(sampler, sampler), _SCHEDULERS.get(scheduler, scheduler)


def _alpha(recipe: Recipe, merged: Merge, names: Iterable[str], part: str) -> float:
    """The one weight of these tensors; ConfigError if they have several, 0 if none is merged."""

    def value(key: Key) -> float:
        return recipe.weights[key[0]][key[1]]

    found = {value(key) for name in names for key in merged.moved_by(name)}
    if len(found) > 1:
        raise ConfigError(
            f"ComfyUI's nodes have one weight for {part}, and the search has several there; leave out "
            f"presets and names of smaller parts"
        )
    alpha = found.pop() if found else 0.0
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(
            f"ComfyUI's nodes take weights from 0 to 1, and {part} has {alpha:g}; narrow search.ranges"
        )
    return alpha
