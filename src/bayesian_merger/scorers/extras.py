"""Scorers of other packages, each by one adapter; they are installed by whoever wants them.

Their pins cannot share one environment: see `scorers.process` for one in an environment of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bayesian_merger import devices
from bayesian_merger.data import Sample
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.scorers import About, plain_words, scorer

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 8


class _Reward(NamedTuple):
    """A model of imscore: its module, its class, and where its weights are."""

    module: str
    kind: str
    repository: str


# Names, classes and repositories as the README of imscore 0.0.11 has them.
REWARDS = {
    "hpsv21": _Reward("hps", "HPSv2", "RE-N-Y/hpsv21"),
    "mps": _Reward("mps", "MPS", "RE-N-Y/mpsv1"),
    "imagereward": _Reward("imreward", "ImageReward", "RE-N-Y/ImageReward"),
    "cyclereward": _Reward("cyclereward", "CycleReward", "NagaSaiAbhinay/CycleReward-Combo"),
    "evalmuse": _Reward("evalmuse", "EvalMuse", "RE-N-Y/evalmuse"),
    "vqascore": _Reward("vqascore", "VQAScore", "RE-N-Y/clip-t5-xxl"),
    "pickscore": _Reward("pickscore", "PickScorer", "RE-N-Y/pickscore"),
    "pickscore-siglip": _Reward("preference", "SiglipPreferenceScorer", "RE-N-Y/pickscore-siglip"),
    "pickscore-clip": _Reward("preference", "CLIPPreferenceScorer", "RE-N-Y/pickscore-clip"),
    "overall-siglip": _Reward(
        "aesthetic", "SiglipAestheticScorer", "RE-N-Y/imreward-overall_rating-siglip"
    ),
}
Reward = Literal[
    "hpsv21",
    "mps",
    "imagereward",
    "cyclereward",
    "evalmuse",
    "vqascore",
    "pickscore",
    "pickscore-siglip",
    "pickscore-clip",
    "overall-siglip",
]


@scorer
class ImScore:
    """A reward model of the package imscore: HPSv2.1, MPS, ImageReward, CycleReward, VQAScore and more.

    `model` is one of them, `repository` another place of its weights than the usual: one of the hub, or
    a folder as `save_pretrained` writes it.
    """

    about = About(
        "as the model has it; negative scores are normal",
        "image and prompt",
        "that of the model",
        "imscore, transformers<5",
    )

    def __init__(self, model: Reward, repository: str = "", device: str = "auto") -> None:
        self._place = devices.device(device, "scorers.imscore.device")
        row = REWARDS[model]
        module = importlib.import_module(f"imscore.{row.module}.model")
        kind: Any = getattr(module, row.kind)
        self._model = kind.from_pretrained(repository or row.repository)
        self._model.to(self._place).eval().requires_grad_(False)
        # Of a batch this one tells a single number.
        self._at_once = 1 if model == "vqascore" else _AT_ONCE

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        import torch

        scores: list[float] = []
        for some in _alike(samples, self._at_once):
            prompts = [plain_words(sample.prompt.prompt) for sample in some]
            with torch.no_grad():
                found = self._model.score(_pixels(some).to(self._place), prompts)
            # (N,), (N, 1), or nothing but a number for one image.
            numbers = found.float().reshape(len(some), -1)
            if numbers.shape[1] != 1:
                raise TrialError(f"the model gave {numbers.shape[1]} numbers for an image")
            scores += numbers[:, 0].tolist()
        return scores


@scorer
class PyIqa:
    """A measure of technical quality without a reference, of the package pyiqa: `metric` is its name.

    Of a measure by which less is better the score is its negative.
    """

    about = About("as the measure has it", "image", "PolyForm-Noncommercial-1.0.0", "pyiqa")

    def __init__(self, metric: str, device: str = "auto") -> None:
        import pyiqa

        known = pyiqa.list_models(metric_mode="NR")
        if metric not in known:
            raise ConfigError(
                f"scorers.pyiqa.metric: pyiqa has no measure {metric!r} that needs no reference "
                f"(known: {', '.join(sorted(known))})"
            )
        self._place = devices.device(device, "scorers.pyiqa.device")
        self._metric = pyiqa.create_metric(metric, device=self._place)
        self._sign = -1.0 if self._metric.lower_better else 1.0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        import torch

        scores: list[float] = []
        for some in _alike(samples, _AT_ONCE):
            with torch.no_grad():
                found = self._metric(_pixels(some).to(self._place))
            numbers = torch.as_tensor(found).float().reshape(len(some))
            scores += [self._sign * float(number) for number in numbers]
        return scores


def _alike(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """The samples in their order, in batches of images of one size."""
    found: list[list[Sample]] = []
    for sample in samples:
        last = found[-1] if found else []
        if last and len(last) < size and last[0].image.size == sample.image.size:
            last.append(sample)
        else:
            found.append([sample])
    return found


def _pixels(samples: Sequence[Sample]) -> Tensor:
    """Images of one size as numbers in [0, 1], (N, 3, height, width)."""
    import numpy as np
    import torch

    images = np.stack([np.asarray(sample.image.convert("RGB")) for sample in samples])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 255
