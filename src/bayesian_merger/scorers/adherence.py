"""Scorers of a picture beside its prompt, by models that were trained on pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bayesian_merger import devices
from bayesian_merger.data import Sample
from bayesian_merger.hub import CLIP_L14, PICKSCORE, folder, require
from bayesian_merger.scorers import About, Precision, plain_words, scorer

if TYPE_CHECKING:
    from torch import Tensor


@scorer
class ClipScore:
    """How well a picture fits its prompt: 100 times the cosine of their features. Not its beauty.

    By any CLIP or SigLIP model: `repository` on the hub, or `tower`, a folder with it. Marks of webuis,
    as (word:1.2), are left out; what is longer than the model reads, 77 tokens for CLIP, is cut.
    Hessel et al. 2021, arXiv:2104.08718, without their factor and their cut at 0.
    """

    about = About("-100 to 100, mostly 15 to 40", "image and prompt", "MIT", "transformers, CLIP")

    def __init__(
        self,
        tower: Path | None = None,
        repository: str = CLIP_L14,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> None:
        where = f"scorers.{type(self).__name__.lower()}"
        require(**{f"{where}.tower": tower})
        place = devices.device(device, f"{where}.device")
        tower = tower or folder(repository, f"{where}.tower")
        from bayesian_merger.towers import tower as shared

        self._tower = shared(tower, place, precision)
        self._tower.require_texts()
        self._scale = 100.0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        import torch

        if not samples:
            return []
        with torch.no_grad():
            features = self._tower.of_images([sample.image for sample in samples])
            scores = self._scores(features, [sample.prompt.prompt for sample in samples])
        return [float(score) for score in scores]

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """One score each for `pixels` (N, 3, height, width) in [0, 1], with gradients to them."""
        return self._scores(self._tower.of_pixels(pixels), prompts)

    def _scores(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        from torch.nn.functional import cosine_similarity

        texts = self._tower.of_texts([plain_words(prompt) for prompt in prompts])
        return self._scale * cosine_similarity(features, texts)


@scorer
class PickScore(ClipScore):
    """What people preferred of two pictures for one prompt, learnt from half a million choices.

    The cosine of picture and prompt by CLIP ViT-H/14, trained further, times the model's own factor,
    which is about 100. Kirstain et al. 2023, arXiv:2305.01569, equation 1.
    """

    about = About(
        "mostly 17 to 24", "image and prompt", "MIT", "transformers, PickScore_v1 (4 GB)"
    )

    def __init__(
        self,
        tower: Path | None = None,
        repository: str = PICKSCORE,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(tower, repository, device, precision)
        self._scale = self._tower.scale
