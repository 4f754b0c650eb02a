"""A back end and a scorer whose best merge is known, as a user would bring them: one plugin file.

Checkpoint A holds 0 and B holds 1 in every block, so that the merged value of a block is its weight.
The back end paints the 26 values as grey stripes, with noise from the seed; the scorer compares the
stripes with a target.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bayesian_merger.backends import Followed, Judge, Key, Merge, backend
from bayesian_merger.blocks import SD1
from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.errors import TrialError
from bayesian_merger.methods import Weight, method
from bayesian_merger.scorers import scorer

UNET = "model.diffusion_model"
TENSORS = {
    "base": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    **{f"IN{i:02}": f"{UNET}.input_blocks.{i}.0.weight" for i in range(12)},
    "M00": f"{UNET}.middle_block.0.weight",
    **{f"OUT{i:02}": f"{UNET}.output_blocks.{i}.0.weight" for i in range(12)},
}
VAE = "first_stage_model.decoder.conv_in.weight"
TARGET = {block: 0.8 if i % 2 else 0.2 for i, block in enumerate(SD1.blocks)}


def write_model(path: Path, value: float, *, vae: bool = False, text: bool = True) -> Path:
    """A checkpoint with `value` in every block; perhaps with a VAE, or without a text encoder."""
    tensors = {n: torch.full((2, 2), value) for b, n in TENSORS.items() if text or b != "base"}
    save_file(tensors | ({VAE: torch.zeros(2, 2)} if vae else {}), path)
    return path


@backend
class Stripes:
    """Paints the merged value of each block.

    `fault`: "frozen" ignores the merge, "weak" fails where IN00 is above 0.5, "crash" does so with an
    error of no kind that is known, "dead" fails on every search trial, "stop" interrupts the process
    at image number `at`, "lossy" gives one image too few of every batch.
    """

    def __init__(
        self,
        batch: int = 4,
        noise: float = 0.05,
        delay_s: float = 0.0,
        fault: str = "",
        at: int = 0,
    ) -> None:
        self.batch = batch
        self._noise, self._delay_s, self._fault, self._at = noise, delay_s, fault, at
        self._values = np.zeros(len(TENSORS))
        self._made = 0

    def check(
        self, prompts: Sequence[Prompt], architecture: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[str]:
        return []

    def load(self, recipe: Recipe, merged: Mapping[str, Tensor]) -> None:
        values = np.array([float(merged[name].float().mean()) for name in TENSORS.values()])
        searched = len(set(next(iter(recipe.weights.values())).values())) > 1
        if self._fault == "dead" and searched:
            raise TrialError("the server went away")
        if self._fault == "crash" and values[1] > 0.5 and searched:
            raise RuntimeError("the device is gone\nand more that nobody reads")
        if self._fault == "weak" and values[1] > 0.5 and searched:
            raise TrialError("out of memory")
        if self._fault != "frozen":
            self._values = values

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        for prompt in prompts[: -1 if self._fault == "lossy" else None]:
            time.sleep(self._delay_s)
            self._made += 1
            if self._fault in ("stop", "rigid") and self._made == self._at:
                raise KeyboardInterrupt
            noise = np.random.default_rng(prompt.seed).normal(0, self._noise, len(self._values))
            grey = np.clip((self._values + noise) * 128 + 64, 0, 255).astype(np.uint8)
            rows = np.repeat(np.repeat(grey[None, :], 16, 0), 2, 1)
            yield Sample(Image.fromarray(np.stack([rows] * 3, -1)), prompt)

    def close(self) -> None:
        pass


@backend
class Painter(Stripes):
    """Stripes with a graph behind them, three at once.

    With the fault "flat" the score seems not to depend on the merge, and the other way with "contrary";
    with "rigid" no image can be followed, and image number `at` interrupts the process.
    """

    def load(self, recipe: Recipe, merged: Mapping[str, Tensor]) -> None:
        super().load(recipe, merged)
        assert isinstance(merged, Merge)
        self._merged = merged

    def follow(
        self, prompts: Sequence[Prompt], judge: Judge, wanted: Set[Key], last: int | None
    ) -> Iterator[Followed]:
        if self._fault == "rigid":
            raise TrialError("out of memory for the gradient")
        for some in (prompts[i : i + 3] for i in range(0, len(prompts), 3)):
            samples = list(self.generate(some))
            tensors = {n: self._merged[n].float().requires_grad_() for n in TENSORS.values()}
            values = torch.stack([tensor.mean() for tensor in tensors.values()])
            noise = [
                np.random.default_rng(p.seed).normal(0, self._noise, len(values)) for p in some
            ]
            grey = (values + torch.tensor(np.array(noise))) * 128 + 64
            pixels = (grey / 255).clamp(0, 1).repeat_interleave(2, 1)[:, None, None]
            mean = judge(pixels.expand(-1, 3, 16, -1), some).mean()
            mean = mean * {"flat": 0, "contrary": -1}.get(self._fault, 1)
            gradients = torch.autograd.grad(mean, list(tensors.values()))
            slopes: dict[Key, float] = {}
            for name, gradient in zip(tensors, gradients, strict=True):
                slopes |= self._merged.slopes(name, gradient)
            yield Followed(samples, {key: slopes[key] for key in slopes.keys() & wanted})


@method
def between(a: Tensor, b: Tensor, *, left: Weight = 0.5, right: Weight = 0.5) -> Tensor:
    """Between the models by the mean of two weights, neither of which is called alpha."""
    return a + (left + right) / 2 * (b - a)


@scorer
class Likeness:
    """Minus the mean distance of the painted stripes from the target, at most 0; negative always."""

    def __init__(
        self, sharpness: float = 10.0, sign: float = 1.0, bonus: Path | None = None
    ) -> None:
        self._sharpness, self._sign = sharpness, sign
        self._bonus = float(bonus.read_text()) if bonus else 0.0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        target = np.array([TARGET[block] for block in TENSORS])
        rows = [np.asarray(s.image, float)[0, ::2, 0] for s in samples]
        distances = [float(np.mean(np.abs((row - 64) / 128 - target))) for row in rows]
        return [self._bonus - self._sign * self._sharpness * distance for distance in distances]


@scorer
class Nearness:
    """Minus the mean square of what Likeness takes the mean distance of; can be differentiated."""

    def __init__(self, sharpness: float = 10.0) -> None:
        self._sharpness = sharpness

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        pixels = [torch.from_numpy(np.array(s.image)).permute(2, 0, 1) / 255 for s in samples]
        return self.differentiable(
            torch.stack(pixels), [s.prompt.prompt for s in samples]
        ).tolist()

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        values = (pixels[:, 0, 0, ::2] * 255 - 64) / 128
        return -self._sharpness * ((values - self._wanted(pixels, prompts)) ** 2).mean(1)

    def _wanted(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels.new_tensor([TARGET[block] for block in TENSORS])


@scorer
class Torn(Nearness):
    """Wants every weight at 0.9 for a lake, at 0.1 for anything else."""

    def _wanted(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels.new_tensor([[0.9 if "lake" in prompt else 0.1] for prompt in prompts])
