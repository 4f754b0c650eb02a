"""Images in this process with diffusers: merged tensors go straight into the live model."""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bayesian_merger import devices
from bayesian_merger.backends import Followed, Judge, Key, Merge, backend
from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.errors import ConfigError, GradientError, TrialError, first_line
from bayesian_merger.names import COMPONENTS, Component, Target
from bayesian_merger.registry import nearest

# The samplers of stable-diffusion-webui by their diffusers names and settings, after the table in
# the diffusers documentation, "Schedulers", section on A1111 equivalents.
_SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DDIM": ("DDIMScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
# Noise schedules by their switch in a diffusers scheduler.
_SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "Automatic": {},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Beta": {"use_beta_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
}
# What a model predicts, by the scheduler's name for it.
_PREDICTIONS = {"auto": "", "epsilon": "epsilon", "v": "v_prediction"}
_log = logging.getLogger(__name__)
_LONGEST = 300  # characters of what diffusers says
_CONFIGS = Path(__file__).parent / "configs"
# Bytes for each pixel of an image whose graph is kept whole, or where parts of it are made again; the
# VAE has the most of it.
_GRAPH, _SPARE_GRAPH = 24_000, 7_500
# In float32, for each pixel and channel of the first level: the graph of one call of the U-Net. Of all
# calls a CPU keeps so many bytes.
_CALL, _KEPT = 45, 2 * 10**9
# Pixels of an image; SDXL's training has few that are smaller.
_SMALLEST_XL = 768**2
# Gradients of a score are too small for half precision; the largest factor that is tried.
_ENLARGED = 2.0**16


@backend
class Diffusers:
    """Stable Diffusion pipelines of the diffusers library, in this process.

    `device` is "auto" (CUDA, else Apple's MPS, else CPU) or a torch device. `batch` images are made
    at once. `clip_skip` counts as in stable-diffusion-webui: 1 uses the text encoder's last layer,
    2 the one before, which SDXL has in both cases. `prediction` is what the models predict, "epsilon"
    or "v"; "auto" goes by the tensors v_pred and ztsnr, as ComfyUI does. `config` is a folder in
    diffusers layout (model_index.json and so on, no weights) for models of another size than the
    architecture's; by default the one in this package.
    """

    def __init__(
        self,
        device: str = "auto",
        batch: int = 4,
        clip_skip: int = 1,
        prediction: str = "auto",
        config: Path | None = None,
    ) -> None:
        """ConfigError if diffusers is not installed or an option is out of range."""
        if batch < 1 or clip_skip < 1:
            raise ConfigError("backend.batch and backend.clip_skip must be 1 or more")
        if prediction not in _PREDICTIONS:
            raise ConfigError(
                f"backend.prediction: unknown {prediction!r}{nearest(prediction, _PREDICTIONS)} "
                f"(known: {', '.join(_PREDICTIONS)})"
            )
        self.batch = batch
        self._clip_skip = clip_skip
        self._prediction = prediction
        self._config = config
        self._auto = device == "auto"
        self._device = devices.device(device, "backend.device")
        # Half precision is for GPUs: on a CPU it is slower and less exact.
        self._dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        # Of a followed image the graph of one call of the U-Net is kept at a time, or of all that are
        # small, on a CPU. Where that is too much, parts of the call and of the VAE are made again too,
        # and the models that are merged no longer lie on the GPU.
        self._makes_calls_again = self._device.type != "cpu"
        self._makes_parts_again = False
        self._enlarged = _ENLARGED if self._dtype == torch.float16 else 1.0
        # Whether `batch` images at once were too many for the GPU's memory, so that half as many are.
        self._halves = False
        # The U-Net's tensors in bfloat16, while images are made that overflow in half precision.
        self._wide: dict[str, Tensor] = {}
        self._is_overflow_told = False
        self._lib = _import_diffusers()
        self._pipe: Any = None
        # The model's own noise schedule, whatever sampler is in use, and how it is another than usual.
        self._schedule: Any = None
        self._unusual: Mapping[str, Any] = {}
        self._live: dict[str, Tensor] = {}  # the checkpoint's name -> tensor of the pipeline
        self._held: Merge | None = None  # what the live tensors are
        # For each part of the pipeline, its own name of each tensor -> what of the checkpoint it is.
        self._tables: dict[str, dict[str, Target]] = {}

    def check(
        self,
        prompts: Sequence[Prompt],
        architecture: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[str]:
        """Warnings for what diffusers reads otherwise; ConfigError for unknown samplers and tensors."""
        self._plan(architecture, shapes)
        for prompt in prompts:
            self._scheduler_class(prompt)
        said = []
        if self._device.type == "cpu" and self._auto:
            said.append(
                "images are made on the CPU, as torch finds no GPU; with an NVIDIA GPU install torch "
                "by the command for CUDA that https://pytorch.org/get-started/locally shows"
            )
        if any(
            re.search(r"[(\[].+:[\d.]+[)\]]|<lora:", p.prompt + p.negative_prompt) for p in prompts
        ):
            said.append(
                "a prompt uses (word:1.2) weights or <lora:...>, which this back end reads as plain text"
            )
        if small := [p for p in prompts if self._is_xl and p.width * p.height < _SMALLEST_XL]:
            names = ", ".join(dict.fromkeys(prompt.payload for prompt in small))
            said.append(
                f"SDXL is trained on about 1024 x 1024 pixels, and makes poor images of "
                f"{small[0].width} x {small[0].height} and the like (payloads: {names})"
            )
        extra = sorted({key for prompt in prompts for key in prompt.extra})
        if extra:
            said.append(f"payload fields this back end does not use: {', '.join(extra)}")
        return said

    def load(self, recipe: Recipe, merged: Merge) -> None:
        """Write `merged` into the live pipeline, which is built on the first call, and read it back."""
        with _enough_memory("while loading the merge; close other programs on the GPU"):
            if not self._live:
                self._build(recipe.architecture, merged)
            held, self._held = self._held, None  # nothing is known of it until all is written
            with torch.inference_mode():
                merged.write(self._live, since=held)
                self._prove(merged)
            self._held = merged

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        """Images in batches of prompts with equal size, steps, CFG scale, sampler and scheduler."""
        for _, alike in groupby(prompts, lambda prompt: prompt.settings):
            group = list(alike)
            for start in range(0, len(group), self.batch):
                yield from self._samples(group[start : start + self.batch])

    def _samples(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        """Images at once, or in halves from the first time on that the GPU's memory is too small."""
        if not self._halves:
            try:
                images = self._images(prompts)
            except _OutOfMemory:
                if len(prompts) == 1:
                    raise
                self._halves = True
                _log.warning(
                    "out of GPU memory with %d images at once; from now on half as many are made",
                    len(prompts),
                )
            else:
                yield from map(Sample, images, prompts)
                return
        # Outside the clause, whose error holds on to memory.
        half = -(-len(prompts) // 2)
        for some in (prompts[:half], prompts[half:]):
            if some:
                yield from map(Sample, self._images(some), some)

    def close(self) -> None:
        """Free the live model."""
        self._pipe, self._live, self._tables, self._held = None, {}, {}, None
        self._makes_parts_again = False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def follow(
        self, prompts: Sequence[Prompt], judge: Judge, wanted: Set[Key], last: int | None
    ) -> Iterator[Followed]:
        """Images with slopes, one by one: images differ much in these."""
        factor = self._enlarged
        for prompt in prompts:
            self._spare_memory(prompt, prompt.steps if last is None else min(last, prompt.steps))
            found, factor = self._followed(prompt, judge, wanted, last, factor)
            yield found

    def _followed(
        self, prompt: Prompt, judge: Judge, wanted: Set[Key], last: int | None, factor: float
    ) -> tuple[Followed, float]:
        """In half precision the score is enlarged, up to `factor`, as far as the gradient stays finite.

        Also returns by how much it was; the next image of a merge begins with that. An image whose
        gradient is never finite has no slopes.
        """
        first = factor
        while True:
            # In a function of its own, so that what it held is free before the next try.
            try:
                found = self._backward(prompt, judge, wanted, last, factor)
                if not found.fault:
                    return found, factor
                if factor <= 1:
                    return found, first
                factor /= 16
            except _OutOfMemory as error:
                if not self._needs_less():
                    needed = prompt.width * prompt.height * _SPARE_GRAPH / 1e9
                    raise TrialError(
                        f"out of GPU memory: an image of {prompt.width} x {prompt.height} pixels takes "
                        f"about {needed:.1f} GB with its gradient, beside the models; "
                        f"lower the size in payload {prompt.payload}, or set search.optimiser = 'bayes'"
                    ) from error

    def _backward(
        self,
        prompt: Prompt,
        judge: Judge,
        wanted: Set[Key],
        last: int | None,
        factor: float,
    ) -> Followed:
        """One image, and the slopes of `factor` times its score, divided by that, if they are finite."""
        slopes: dict[Key, float] = {}
        fault = ""
        with self._folding(wanted, slopes):
            pixels = self._pixels([prompt], last)
            with _enough_memory("for the gradient"):
                scores = judge((pixels / 2 + 0.5).clamp(0, 1), [prompt])
                try:
                    torch.autograd.backward(scores.sum() * factor)
                except GradientError as error:
                    fault = str(error)
        (image,) = _as_images(pixels.detach())
        if fault:
            return Followed([Sample(image, prompt)], {}, fault)
        return Followed(
            [Sample(image, prompt)], {key: slope / factor for key, slope in slopes.items()}
        )

    def _spare_memory(self, prompt: Prompt, n_steps: int) -> None:
        """Where a graph would not fit.

        Not every driver says so, that of Windows goes on at a crawl; a CPU's system ends the process.
        """
        pixels = prompt.width * prompt.height
        if not self._makes_calls_again:
            width = self._pipe.unet.config.block_out_channels[0]
            if n_steps * pixels * width * _CALL > _KEPT:
                self._makes_calls_again = True
                self._make_parts_again()
            return
        free = devices.free(self._device)
        if free is None or pixels * _GRAPH > free:
            self._make_parts_again()
        if free is not None and pixels * _SPARE_GRAPH > free:
            self._keep_no_models()

    def _needs_less(self) -> bool:
        """From now on less memory, for more time; False if nothing more can be spared."""
        if not self._makes_parts_again:
            self._make_parts_again()
            return True
        return self._keep_no_models()

    def _keep_no_models(self) -> bool:
        """Read the models that are merged anew for each image's slopes; False if that is so already."""
        assert self._held is not None, "nothing is loaded"
        had_some = self._held.spare_memory()
        if had_some and self._device.type == "cuda":
            torch.cuda.empty_cache()
        return had_some

    def _make_parts_again(self) -> None:
        """Up to half as much time again for a graph."""
        if self._makes_parts_again:
            return
        self._makes_parts_again = True
        for module in (self._pipe.unet, self._pipe.vae):
            module.enable_gradient_checkpointing()
        # Whole blocks of the VAE are large: at 1024 x 1024 pixels one needs 9 GiB, a part of it 4.
        for block in self._pipe.vae.decoder.up_blocks:
            for part in block.resnets:
                part.forward = partial(_made_again, part.forward)

    @contextmanager
    def _folding(self, wanted: Set[Key], slopes: dict[Key, float]) -> Iterator[None]:
        """Turn the gradient of each parameter into slopes and free it, as soon as it is known."""
        held = self._held
        assert held is not None, "nothing is loaded"
        hooks: list[Any] = []
        chosen: list[Tensor] = []

        def fold(target: Target, parameter: Tensor) -> None:
            assert held is not None
            assert parameter.grad is not None
            gradient = _whole(target, parameter.grad)
            for key, slope in held.slopes(target.tensor, gradient).items():
                slopes[key] = slopes.get(key, 0.0) + slope
            parameter.grad = None

        for part, table in self._tables.items():
            for own, parameter in getattr(self._pipe, part).named_parameters():
                if wanted & set(held.moved_by(table[own].tensor)):
                    chosen.append(parameter.requires_grad_(True))
                    hooks.append(
                        parameter.register_post_accumulate_grad_hook(partial(fold, table[own]))
                    )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in chosen:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _images(self, prompts: Sequence[Prompt]) -> list[Image.Image]:
        with torch.inference_mode():
            return _as_images(self._pixels(prompts, 0))

    def _pixels(self, prompts: Sequence[Prompt], last: int | None) -> Tensor:
        """Pixels (N, 3, height, width), about [-1, 1], with a graph as `follow` has it."""
        with _enough_memory(
            f"with {len(prompts)} images at once; lower backend.batch or close other programs on the GPU"
        ):
            latents = self._finite(prompts, last)
            vae = self._pipe.vae
            scaled = latents.to(vae.dtype) / vae.config.scaling_factor
            # In float32 the VAE needs most of the memory, hence one by one.
            pieces = scaled.split(len(prompts) if self._device.type == "cpu" else 1)
            pixels = torch.cat([vae.decode(piece).sample for piece in pieces])
        if not bool(torch.isfinite(pixels).all()):
            raise TrialError("the model made NaN images")
        return pixels

    def _finite(self, prompts: Sequence[Prompt], last: int | None) -> Tensor:
        """Latents as `_denoised` has them; without a graph those that overflow are made in bfloat16."""
        latents = self._denoised(prompts, last)
        if last != 0 or self._dtype != torch.float16 or bool(torch.isfinite(latents).all()):
            return latents
        if not self._is_overflow_told:
            self._is_overflow_told = True
            _log.warning(
                "a merge makes NaN images in half precision; such images are made in bfloat16"
            )
        tensors = self._pipe.unet.state_dict().items()
        self._wide = {name: tensor.to(torch.bfloat16) for name, tensor in tensors}
        try:
            return self._denoised(prompts, last)
        finally:
            self._wide = {}

    def _denoised(self, prompts: Sequence[Prompt], last: int | None) -> Tensor:
        """Latents of the images, as the library's pipeline makes them."""
        first, pipe = prompts[0], self._pipe
        pipe.scheduler = scheduler = self._scheduler(first)
        is_guided = first.cfg_scale > 1
        # Noise is drawn on the CPU for each image, so a seed means the same on every device.
        seeds = [torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts]
        with torch.set_grad_enabled(last != 0):
            texts = self._embedded([prompt.prompt for prompt in prompts])
            if is_guided:
                without = self._embedded([p.negative_prompt for p in prompts], is_negative=True)
                texts = _Texts(*(torch.cat(both) for both in zip(without, texts, strict=True)))
        scheduler.set_timesteps(first.steps, device=self._device)
        # Where rounding makes its first times equal, diffusers would begin at the second and run out.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        latents: Tensor = pipe.prepare_latents(
            len(prompts),
            pipe.unet.config.in_channels,
            first.height,
            first.width,
            texts.states.dtype,
            self._device,
            seeds,
        )
        extra = pipe.prepare_extra_step_kwargs(seeds, 0.0)
        n_free = 0 if last is None else max(0, len(scheduler.timesteps) - last)
        for number, time in enumerate(scheduler.timesteps):
            is_followed = last != 0 and number >= n_free
            with torch.set_grad_enabled(is_followed):
                both = torch.cat([latents] * 2) if is_guided else latents
                both = scheduler.scale_model_input(both, time)
                if is_followed:
                    # GroupNorm's backward pass crashes on a CPU where its input needs no gradient.
                    both.requires_grad_(True)
                given = texts if is_followed else _Texts(*(text.detach() for text in texts))
                found = self._noise(both, time, given)
                if is_guided:
                    free, told = found.chunk(2)
                    found = free + first.cfg_scale * (told - free)
                latents = scheduler.step(found, time, latents, **extra, return_dict=False)[0]
        return latents

    def _noise(self, latents: Tensor, time: Tensor, texts: _Texts) -> Tensor:
        """What the U-Net finds; on a GPU its graph is not kept, but made again."""

        def found(latents: Tensor, states: Tensor, summaries: Tensor) -> Tensor:
            more: dict[str, Any] = {}
            if self._is_xl:
                # Of an image that was neither shrunk nor cropped: height and width.
                size = [n * self._pipe.vae_scale_factor for n in latents.shape[-2:]]
                sizes = torch.tensor([[*size, 0, 0, *size]], dtype=states.dtype)
                sizes = sizes.to(self._device).expand(len(latents), -1)
                more = {"added_cond_kwargs": {"text_embeds": summaries, "time_ids": sizes}}
            more["return_dict"] = False
            if self._wide:
                given = (latents.bfloat16(), time, states.bfloat16())
                wide: Tensor = functional_call(self._pipe.unet, self._wide, given, more)[0]
                return wide.to(latents.dtype)
            noise: Tensor = self._pipe.unet(latents, time, states, **more)[0]
            return noise

        if not (self._makes_calls_again and torch.is_grad_enabled()):
            return found(latents, *texts)
        # Reentrant: each call frees its own gradients of the parameters, rather than all at the end.
        again: Tensor = checkpoint(found, latents, *texts, use_reentrant=True)
        return again

    def _embedded(self, texts: Sequence[str], is_negative: bool = False) -> _Texts:
        """The texts' token states from the layer that `clip_skip` chooses, and of SDXL its summaries."""
        pipe = self._pipe
        if not self._is_xl:
            found = self._encoded(pipe.tokenizer, pipe.text_encoder, texts)
            if self._clip_skip == 1:
                return _Texts(found.last_hidden_state, found.last_hidden_state[:, 0])
            # transformers 5.6 dropped the level "text_model".
            norm = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm
            skipped: Tensor = norm(found.hidden_states[-self._clip_skip])
            return _Texts(skipped, skipped[:, 0])
        both = [
            self._encoded(pipe.tokenizer, pipe.text_encoder, texts),
            self._encoded(pipe.tokenizer_2, pipe.text_encoder_2, texts),
        ]
        # SDXL was trained on the layer before the last, without the norm.
        layer = -max(2, self._clip_skip)
        states = torch.cat([found.hidden_states[layer] for found in both], -1)
        summaries: Tensor = both[1].text_embeds
        if is_negative:
            # And on zeros instead of no text, which stable-diffusion-webui gives it too.
            is_text = torch.tensor([bool(text) for text in texts], device=states.device)
            states = states * is_text[:, None, None]
            summaries = summaries * is_text[:, None]
        return _Texts(states, summaries)

    def _encoded(self, tokenizer: Any, encoder: Any, texts: Sequence[str]) -> Any:
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return encoder(tokens.input_ids.to(self._device), output_hidden_states=True)

    @property
    def _is_xl(self) -> bool:
        return "text_encoder_2" in self._tables

    def _plan(self, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """An empty pipeline and the tables of names; ConfigError if the checkpoint does not fill it."""
        folder = self._config or _CONFIGS / architecture
        parts = COMPONENTS[architecture]
        has_config = self._config is not None or folder.is_dir()
        if not has_config or not any(part.name == "unet" for part in parts):
            known = ", ".join(sorted(path.name for path in _CONFIGS.iterdir()))
            raise ConfigError(
                f"the back end 'diffusers' makes images with {known} only, not yet with "
                f"{architecture}; bayesian-merger merge merges it without a search"
            )
        if self._config is not None:
            _require_files(folder, parts)
        encoders = [part.name for part in parts if part.name.startswith("text_encoder")]
        try:
            self._pipe = _pipeline(self._lib, folder, parts)
            n_layers = min(getattr(self._pipe, name).config.num_hidden_layers for name in encoders)
        except Exception as error:  # diffusers and transformers raise what they like
            raise ConfigError(
                f"backend.config: {folder} holds no configuration that diffusers can follow "
                f"({type(error).__name__}: {first_line(error)[:_LONGEST]})"
            ) from error
        self._schedule, self._unusual = self._pipe.scheduler.config, self._predicted(shapes)
        self._live, self._held = {}, None
        if self._clip_skip > n_layers:
            raise ConfigError(
                f"backend.clip_skip: {self._clip_skip} is more than the {n_layers} layers of "
                f"{' or '.join(encoders)}"
            )
        self._tables = {part.name: self._table(part, shapes) for part in parts}

    def _table(self, part: Component, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Target]:
        """Each tensor of a part of the pipeline -> what of the checkpoint it is."""
        own = getattr(self._pipe, part.name).state_dict()
        if part.name == "vae":
            spelt = _vae_targets(self._pipe.vae, shapes)
        else:
            spelt = {name: target for tensor in shapes for name, target in part.spellings(tensor)}
        if missing := sorted(set(own) - set(spelt)):
            raise ConfigError(
                f"the checkpoint lacks {len(missing)} tensors of the {part.name} (first: "
                f"{missing[0]!r}); choose a whole checkpoint, or for one of another size than "
                f"{part.name}/config.json says set backend.config to the folder of its configuration"
            )
        for name, tensor in own.items():
            target = spelt[name]
            found, expected = shapes[target.tensor], _whole(target, tensor).shape
            if math.prod(found) != expected.numel() or found[:1] != tuple(expected[:1]):
                raise ConfigError(
                    f"tensor {target.tensor!r} has shape {list(found)}, not {list(expected)}; "
                    f"is it an inpainting model, or another size (see backend.config)?"
                )
        return {name: spelt[name] for name in own}

    def _predicted(self, names: Iterable[str]) -> dict[str, Any]:
        """How the models' noise schedule is another than the configuration's.

        By what they predict; those of v may also begin at pure noise, at a signal-to-noise ratio of zero
        (Lin et al. 2023, arXiv:2305.08891).
        """
        known = set(names)
        if edm := sorted(name for name in known if name.startswith("edm_")):
            raise ConfigError(
                f"the models have the tensor {edm[0]!r}, so their noise schedule is that of EDM, which "
                f"the back end 'diffusers' does not make; bayesian-merger merge merges them without a "
                f"search"
            )
        told = _PREDICTIONS[self._prediction] or ("v_prediction" if "v_pred" in known else "")
        found: dict[str, Any] = {"prediction_type": told} if told else {}
        if told == "v_prediction" and "ztsnr" in known:
            found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return found

    def _build(self, architecture: str, merged: Mapping[str, Tensor]) -> None:
        """Memory on the device for the pipeline's tensors."""
        if not self._tables:
            self._plan(architecture, {name: tuple(merged[name].shape) for name in merged})
        for part, table in self._tables.items():
            module = getattr(self._pipe, part)
            # The VAE overflows in half precision, hence float32 for it. nn.Module's own `to`: the
            # one of diffusers warns about every cast.
            wide = torch.promote_types(self._dtype, torch.float32)
            torch.nn.Module.to(module, wide if part == "vae" else self._dtype)
            module.to_empty(device=self._device).requires_grad_(False).eval()
            for name, buffer in module.named_buffers():
                if name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
            for own, tensor in module.state_dict(keep_vars=True).items():
                target = table[own]
                if target.of > 1:
                    # Neighbours in the checkpoint share their memory, so that they are written at once.
                    whole = self._live.setdefault(target.tensor, _whole(target, tensor.data))
                    tensor.data = _part(target, whole).view(tensor.shape)
                else:
                    self._live[target.tensor] = target.arrange(tensor.detach())
        if self._makes_parts_again:
            self._make_parts_again()

    def _prove(self, merged: Mapping[str, Tensor]) -> None:
        """TrialError unless the modules that make images hold the merge, by a few of its tensors."""
        for part, table in self._tables.items():
            state = getattr(self._pipe, part).state_dict()
            for own in list(state)[:: max(1, len(state) // 8)]:
                target, held = table[own], state[own].cpu()
                found = _part(target, merged[target.tensor].to(held.dtype).cpu())
                if not torch.equal(held, found.reshape(held.shape)):
                    raise TrialError(
                        f"the live model does not hold the merge: tensor {target.tensor!r} differs"
                    )

    def _scheduler(self, prompt: Prompt) -> Any:
        name, settings = self._scheduler_class(prompt)
        # Not as part of the schedule, of which diffusers drops what it believes to be defaults.
        return getattr(self._lib, name).from_config(
            self._schedule, **{**self._unusual, **settings}
        )

    def _scheduler_class(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        sampler, schedule = prompt.sampler_name, prompt.scheduler
        # Up to 1.8, stable-diffusion-webui wrote the schedule at the end of the sampler's name.
        for ending in ("Karras", "Exponential"):
            if sampler.endswith(f" {ending}"):
                sampler, schedule = sampler.removesuffix(f" {ending}"), ending
        where = f"payload {prompt.payload}"
        if sampler not in _SAMPLERS:
            raise ConfigError(
                f"{where}: unknown sampler {sampler!r}{nearest(sampler, _SAMPLERS)} "
                f"(known: {', '.join(_SAMPLERS)})"
            )
        if schedule not in _SCHEDULES:
            raise ConfigError(
                f"{where}: unknown scheduler {schedule!r}{nearest(schedule, _SCHEDULES)} "
                f"(known: {', '.join(_SCHEDULES)})"
            )
        name, settings = _SAMPLERS[sampler]
        # diffusers ignores a setting that a scheduler does not have, so it is looked up first.
        known = inspect.signature(getattr(self._lib, name).__init__).parameters
        if not set(_SCHEDULES[schedule]) <= set(known):
            raise ConfigError(
                f"{where}: sampler {sampler!r} has no scheduler {schedule!r} in diffusers"
            )
        if not self._unusual.keys() <= known.keys():
            raise ConfigError(
                f"{where}: sampler {sampler!r} of diffusers cannot begin at pure noise, as models with "
                f"the tensor ztsnr do; take 'Euler'"
            )
        return name, {**settings, **_SCHEDULES[schedule]}


def _as_images(pixels: Tensor) -> list[Image.Image]:
    values = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]


def _made_again(forward: Callable[..., Tensor], *inputs: Tensor, temb: None) -> Tensor:
    """What a part of the VAE finds, whose graph is not kept; the VAE has no `temb`, times to embed."""
    if not torch.is_grad_enabled():
        return forward(*inputs, temb=temb)
    found: Tensor = checkpoint(forward, *inputs, temb=temb, use_reentrant=False)
    return found


class _Texts(NamedTuple):
    """What n texts tell the U-Net: token states (n, 77, width), and to SDXL summaries (n, width).

    Others do not read the summaries, which are then states of the first token.
    """

    states: Tensor
    summaries: Tensor


class _OutOfMemory(TrialError):
    """The GPU's memory is too small."""


@contextmanager
def _enough_memory(otherwise: str) -> Iterator[None]:
    """_OutOfMemory where the GPU's memory is too small for the block."""
    try:
        yield
    except RuntimeError as error:
        # Not every device has an error class for this.
        if "out of memory" not in str(error).lower():
            raise
        raise _OutOfMemory(f"out of GPU memory {otherwise}") from error


def _import_diffusers() -> Any:
    try:
        import transformers.utils.logging as quiet

        # Without torchvision transformers warns about image processors that are never used here.
        before = quiet.get_verbosity()
        quiet.set_verbosity_error()
        try:
            import diffusers
            from diffusers import StableDiffusionPipeline  # noqa: F401 - imports the lazy parts
        finally:
            quiet.set_verbosity(before)
    except ImportError as error:
        raise ConfigError(
            f"the back end 'diffusers' needs the packages diffusers and transformers ({error}); "
            f"install them with: pip install -e '.[diffusers]' in the folder of this program"
        ) from error
    return diffusers


def _pipeline(diffusers: Any, folder: Path, parts: Sequence[Component]) -> Any:
    """The pipeline that the configuration in `folder` describes, without memory for its tensors."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def encoder_config(part: str) -> Any:
        found = CLIPTextConfig.from_pretrained(folder / part)
        # Where it names another, transformers would fetch that code from the hub.
        found._attn_implementation = "sdpa"
        return found

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(
            diffusers.UNet2DConditionModel.load_config(folder / "unet")
        )
        vae = diffusers.AutoencoderKL.from_config(
            diffusers.AutoencoderKL.load_config(folder / "vae")
        )
        text_encoder = CLIPTextModel(encoder_config("text_encoder"))
        others: dict[str, Any] = {}
        if any(part.name == "text_encoder_2" for part in parts):
            others["text_encoder_2"] = CLIPTextModelWithProjection(
                encoder_config("text_encoder_2")
            )
    made = partial(
        diffusers.StableDiffusionPipeline,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if others:
        others["tokenizer_2"] = _tokenizer(folder / "tokenizer_2", pad="!")
        made = partial(diffusers.StableDiffusionXLPipeline, add_watermarker=False)
    pipe = made(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(folder / "tokenizer"),
        # Latents are not clipped; the library's default for a folder that does not say so is to clip.
        scheduler=diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False),
        **others,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenizer(folder: Path, pad: str | None = None) -> Any:
    """The tokenizer in `folder`, or where it has none, SD1's, which fills texts up with `pad`."""
    from transformers import CLIPTokenizer

    if folder.is_dir():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    found = CLIPTokenizer.from_pretrained(_CONFIGS / "sd1" / "tokenizer", local_files_only=True)
    if pad:
        found.pad_token = pad
    return found


def _require_files(folder: Path, parts: Sequence[Component]) -> None:
    needed = [f"{part.name}/config.json" for part in parts] + ["scheduler/scheduler_config.json"]
    # Without its files transformers makes an empty tokenizer and says nothing.
    encoders = [part.name for part in parts if part.name.startswith("text_encoder")]
    for tokenizer in (name.replace("text_encoder", "tokenizer") for name in encoders):
        needed.append(f"{tokenizer}/tokenizer_config.json")
        pair = [f"{tokenizer}/vocab.json", f"{tokenizer}/merges.txt"]
        if not all((folder / name).is_file() for name in pair):
            needed.append(f"{tokenizer}/tokenizer.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if not folder.is_dir():
        raise ConfigError(f"backend.config: there is no folder {folder}")
    if missing:
        raise ConfigError(f"backend.config: {folder} lacks {', '.join(missing)}")


def _whole(target: Target, values: Tensor) -> Tensor:
    """The checkpoint's tensor of which `values` are `target`, with zeros where they are but a part."""
    arranged = target.arrange(values)
    if target.of == 1:
        return arranged
    n_rows = len(arranged) * target.of // (target.last - target.first)
    found = arranged.new_zeros((n_rows, *arranged.shape[1:]))
    found[target.rows(n_rows)] = arranged
    return found


def _part(target: Target, whole: Tensor) -> Tensor:
    """What `target` is of a checkpoint's tensor, as the pipeline has it but for axes of length 1."""
    assert target.form != "swapped", "no tensor of these pipelines is"
    if target.of > 1:
        whole = whole[target.rows(len(whole))]
    return whole.transpose(0, 1) if target.form == "transposed" else whole


def _vae_targets(vae: Any, names: Iterable[str]) -> dict[str, Target]:
    """What of the checkpoint each tensor of the VAE is, which may have any number of levels.

    diffusers' converter only moves values and drops axes, so fed with numbers it returns the table.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ours = [n for n in names if n.startswith("first_stage_model.")]
    numbered = {n: torch.full((1, 1, 1, 1), float(i)) for i, n in enumerate(ours)}
    if not ours:
        return {}
    converted = convert_ldm_vae_checkpoint(numbered, dict(vae.config))
    return {own: Target(ours[int(tensor.item())]) for own, tensor in converted.items()}
