"""What is no picture, whatever a scorer says of it: by its pixels alone.

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
    from PIL import ImageStat

    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if max(ImageStat.Stat(rgb).stddev) < _BLANK:
        return ["blank"]
    found = []
    if _full(rgb) > _SATURATED:
        found.append("saturated")
    short = min(rgb.size)
    if short >= _SMALLEST:
        grey = rgb.convert("L").reduce(max(1, short // _SIDE))
        if _likeness(np.asarray(grey, dtype=np.float64)) < _NOISE:
            found.append("noise")
    return found


def _full(rgb: Image) -> float:
    """The share of pixels that have one channel at 0 and another at 255."""
    from PIL import ImageChops

    red, green, blue = rgb.split()
    most = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    least = ImageChops.darker(ImageChops.darker(red, green), blue)
    # 255 only where both are at their ends.
    is_full = ImageChops.subtract(most, least)
    return is_full.histogram()[255] / (rgb.width * rgb.height)


def _likeness(grey: Array) -> float:
    """Correlation of neighbours, the mean of both directions; 1 where nothing differs."""
    pairs = ((grey[:, :-1], grey[:, 1:]), (grey[:-1], grey[1:]))
    found = []
    for one, other in pairs:
        spread = float(one.std() * other.std())
        together = float(((one - one.mean()) * (other - other.mean())).mean())
        found.append(together / spread if spread > 0 else 1.0)
    return sum(found) / 2
