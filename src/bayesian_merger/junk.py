"""What is no picture, whatever a scorer says of it: plain NumPy, of an image alone.

A mark never enters the mean silently: it fails the trial or costs a penalty, as the user says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[np.float64]

# A wall in one colour, compressed, has more contrast than this; of 255.
_BLANK = 2.0
# The share of pixels in colours that are full, with one channel at 0 and another at 255.
_SATURATED = 0.5
# How alike neighbours are in noise; in pictures it is .6 and more.
_NOISE = 0.25
# Noise of a latent is smooth below the size of its cells, so images are looked at in so many pixels.
_SIDE = 64
# Of fewer pixels nothing can be said.
_SMALLEST = 16


def marks(image: Image) -> list[str]:
    """Which of "blank", "saturated" and "noise" an RGB image is, if any."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    if float(pixels.std(axis=(0, 1)).max()) < _BLANK:
        return ["blank"]
    found = []
    is_full = (pixels.min(axis=2) == 0) & (pixels.max(axis=2) == 255)
    if float(is_full.mean()) > _SATURATED:
        found.append("saturated")
    grey = pixels.mean(axis=2)
    if min(grey.shape) >= _SMALLEST and _likeness(_shrunk(grey)) < _NOISE:
        found.append("noise")
    return found


def _shrunk(grey: Array) -> Array:
    """Means of squares, so many that the shorter side has about `_SIDE`."""
    step = max(1, min(grey.shape) // _SIDE)
    height, width = (n // step * step for n in grey.shape)
    squares = grey[:height, :width].reshape(height // step, step, width // step, step)
    found: Array = squares.mean(axis=(1, 3))
    return found


def _likeness(grey: Array) -> float:
    """Correlation of neighbours, the mean of both directions; 1 where nothing differs."""
    pairs = ((grey[:, :-1], grey[:, 1:]), (grey[:-1], grey[1:]))
    found = []
    for one, other in pairs:
        spread = float(one.std() * other.std())
        together = float(((one - one.mean()) * (other - other.mean())).mean())
        found.append(together / spread if spread > 0 else 1.0)
    return sum(found) / 2
