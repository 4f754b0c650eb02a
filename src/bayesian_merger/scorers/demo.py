"""The scorer of the embedded example: does a picture show the scene that its prompt names, and well?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bayesian_merger.data import Sample
from bayesian_merger.scorers import About, scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

SIZE = 64
WEIGHTS = Path(__file__).parents[1] / "demo" / "scorer.safetensors"
WORDS: dict[str, float] = {
    **dict.fromkeys(("plain", "striped", "dotted"), 0.2),
    **dict.fromkeys(("red", "orange", "yellow", "green", "blue", "purple"), 0.3),
    **dict.fromkeys(("circle", "square", "triangle", "star", "heart", "ring"), 0.3),
    **dict.fromkeys(("white", "black", "teal", "pink"), 0.2),
}
"""The words that the scorer knows, with their share in the adherence."""


@scorer
class Demo:
    """How well a picture shows its prompt, in [0, 10]; higher is better. For the example's scenes.

    10 * (0.7 adherence + 0.3 quality): adherence is the mean degree, by share, to which the words
    of the prompt apply to the picture; unknown words do not count, and without a known word quality
    stands alone. The network was trained by `tools/make_demo.py` on drawn scenes and their faults;
    `weights` is its file.
    """

    about = About("0 to 10", "image and prompt", "MIT")

    def __init__(self, device: str = "cpu", weights: Path = WEIGHTS) -> None:
        from safetensors.torch import load_file

        self.device = device
        self._network = network()
        state = load_file(weights)
        self._network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        self._network.to(device).eval().requires_grad_(False)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        import numpy as np
        import torch

        if not samples:
            return []
        pictures = [
            torch.from_numpy(np.array(sample.image.convert("RGB"))).permute(2, 0, 1)[None] / 255
            for sample in samples
        ]
        pixels = torch.cat([_resized(picture.to(self.device)) for picture in pictures])
        with torch.no_grad():
            scores = self.differentiable(pixels, [sample.prompt.prompt for sample in samples])
        return [float(score) for score in scores]

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """One score each for `pixels` (N, 3, height, width) in [0, 1], with gradients to them."""
        degrees = self._network(_resized(pixels.to(self.device))).sigmoid()
        words, quality = degrees[:, :-1], degrees[:, -1]
        shares = words.new_tensor([_shares(prompt) for prompt in prompts])
        total = shares.sum(1)
        adherence = (shares * words).sum(1) / total.clamp(min=1e-6)
        scores: Tensor = 10 * (0.7 * adherence.where(total > 0, quality) + 0.3 * quality)
        return scores


def network() -> nn.Sequential:
    """Pictures (N, 3, 64, 64) in [0, 1] -> logits (N, 20): the degree of each word, and quality."""
    from torch import nn

    def layer(n_in: int, n_out: int, kernel: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2)
        return nn.Sequential(convolution, nn.GroupNorm(8, n_out), nn.SiLU())

    return nn.Sequential(
        layer(3, 32, 5, 2),
        layer(32, 48, 3, 2),
        layer(48, 48, 3, 1),
        layer(48, 72, 3, 2),
        layer(72, 72, 3, 1),
        layer(72, 96, 3, 2),
        nn.Flatten(),
        nn.Linear(96 * (SIZE // 16) ** 2, 128),
        nn.SiLU(),
        nn.Linear(128, len(WORDS) + 1),
    )


def _resized(pixels: Tensor) -> Tensor:
    from torch.nn.functional import interpolate

    if pixels.shape[-2:] == (SIZE, SIZE):
        return pixels
    return interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)


def _shares(prompt: str) -> list[float]:
    named = set(re.findall(r"[a-z]+", prompt.lower()))
    return [share if word in named else 0.0 for word, share in WORDS.items()]
