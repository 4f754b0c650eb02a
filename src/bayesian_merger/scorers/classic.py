"""Scorers that need no model: for tests, sanity checks and guards, not for taste."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bayesian_merger.data import Sample
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import About, scorer


def _luminance(sample: Sample) -> np.ndarray:
    """Luminance in [0, 1], shape (height, width); ITU-R BT.601, as Pillow's mode L."""
    return np.asarray(sample.image.convert("L"), dtype=np.float64) / 255


@scorer
class Exposure:
    """Closeness of an image's mean luminance to `target`, in [0, 1]; higher is better."""

    about = About("0 to 1")

    def __init__(self, target: float = 0.5) -> None:
        """ConfigError unless `target` is in [0, 1]."""
        if not 0 <= target <= 1:
            raise ConfigError(f"scorers.exposure.target: {target} is not in [0, 1]")
        self._target = target

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [1 - abs(float(_luminance(s).mean()) - self._target) for s in samples]


@scorer
class Contrast:
    """Standard deviation of an image's luminance, doubled: 0 for a flat image, 1 for black and white."""

    about = About("0 to 1")

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [2 * float(_luminance(s).std()) for s in samples]
