"""The little world of the embedded example: a scene is four words, and can be drawn and captioned.

A batch of scenes is a LongTensor of shape (N, 4): per scene the index of its pattern, colour, shape
and background in `WORDS`. `caption` turns a row into text, `draw` a batch into pictures.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.88, 0.13, 0.16),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.98, 0.87, 0.16),
    "green": (0.13, 0.66, 0.27),
    "blue": (0.13, 0.31, 0.90),
    "purple": (0.55, 0.17, 0.72),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (0.95, 0.95, 0.94),
    "black": (0.07, 0.07, 0.09),
    "teal": (0.16, 0.60, 0.62),
    "pink": (0.98, 0.74, 0.80),
}
WORDS: dict[str, tuple[str, ...]] = {
    "pattern": ("plain", "striped", "dotted"),
    "colour": tuple(COLOURS),
    "shape": ("circle", "square", "triangle", "star", "heart", "ring"),
    "background": tuple(BACKGROUNDS),
}
PATTERN, COLOUR, SHAPE, BACKGROUND = range(4)
SIZES = tuple(len(words) for words in WORDS.values())
N_HELD_OUT = 48


def caption(scene: Sequence[int] | Tensor) -> str:
    """The scene in words, such as "a dotted blue star on a pink background"."""
    pattern, colour, shape, background = (
        words[int(index)] for words, index in zip(WORDS.values(), scene, strict=True)
    )
    return f"a {pattern} {colour} {shape} on a {background} background"


def all_scenes() -> Tensor:
    """Every combination of the words, of shape (432, 4)."""
    return torch.tensor(list(itertools.product(*(range(n) for n in SIZES))))


def held_out() -> Tensor:
    """Which of `all_scenes` no model and no scorer was trained on: 48 of 432, as a bool mask."""
    mask = torch.zeros(math.prod(SIZES), dtype=torch.bool)
    mask[random.Random(432).sample(range(len(mask)), N_HELD_OUT)] = True
    return mask


def random_scenes(n: int, generator: torch.Generator, *, from_held_out: bool = False) -> Tensor:
    """`n` scenes of the training combinations, or of the held-out ones, of shape (n, 4)."""
    mask = held_out()
    pool = all_scenes()[mask if from_held_out else ~mask]
    return pool[torch.randint(len(pool), (n,), generator=generator)]


def palette(group: int, indices: Tensor) -> Tensor:
    """The nominal colours of colour (or background) words, of shape (N, 3)."""
    table = {COLOUR: COLOURS, BACKGROUND: BACKGROUNDS}[group]
    return torch.tensor(list(table.values()))[indices]


def draw(
    scenes: Tensor,
    generator: torch.Generator,
    *,
    size: int = 64,
    colours: Tensor | None = None,
    backgrounds: Tensor | None = None,
    wobble: Tensor | float = 0.0,
) -> Tensor:
    """Pictures of the scenes, of shape (N, 3, size, size) in [0, 1].

    Place, size, phase of the pattern and hue vary a little by `generator`. `colours` and
    `backgrounds` of shape (N, 3), or (N, 3, size, size), replace the nominal ones. `wobble`, for
    all or per scene, distorts the outline: 0 is exact, 0.1 sloppy, from 0.3 on it is a blob.
    """
    n = len(scenes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *(shape or (1, 1)), generator=generator)

    grid = (torch.arange(size) + 0.5) / size
    down, right = torch.meshgrid(grid, grid, indexing="ij")
    radius = uniform(0.28, 0.36)
    x = (right - uniform(0.43, 0.57)) / radius
    y = (down - uniform(0.43, 0.57)) / radius
    wobbles = torch.as_tensor(wobble, dtype=torch.float32).reshape(-1, 1, 1)
    wavy_x = x + wobbles * _ripple(y, x, uniform(0, 2 * math.pi, 2, 1, 1))
    wavy_y = y + wobbles * _ripple(x, y, uniform(0, 2 * math.pi, 2, 1, 1))

    sharpness = size * radius * 2.2
    distance = _distances(wavy_x, wavy_y)[scenes[:, SHAPE], torch.arange(n)]
    inside = torch.sigmoid(-distance * sharpness)[:, None]
    dark = _pattern(scenes[:, PATTERN], x, y, uniform(0, 2 * math.pi), sharpness)[:, None]

    tint = uniform(0.96, 1.04, 3, 1, 1)
    colour = palette(COLOUR, scenes[:, COLOUR]) if colours is None else colours
    ground = palette(BACKGROUND, scenes[:, BACKGROUND]) if backgrounds is None else backgrounds
    colour = _as_picture(colour) * tint * (1 - 0.62 * dark)
    light = 1.04 - 0.10 * down
    ground = _as_picture(ground) * uniform(0.97, 1.03, 3, 1, 1) * light
    return (inside * colour + (1 - inside) * ground).clamp(0, 1)


def _as_picture(colour: Tensor) -> Tensor:
    return colour[:, :, None, None] if colour.ndim == 2 else colour


def _ripple(along: Tensor, across: Tensor, phase: Tensor) -> Tensor:
    slow = torch.sin(3.3 * along + phase[:, 0])
    fast = torch.sin(6.1 * along + 1.7 * across + phase[:, 1])
    return slow + 0.7 * fast


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Signed distances to the outline of each shape word (negative inside), (6, N, size, size).

    `x`, `y` are in units of the shape's radius, y downwards. The heart follows Inigo Quilez,
    https://iquilezles.org/articles/distfunctions2d.
    """
    rho = torch.hypot(x, y)
    circle = rho - 1
    square = torch.maximum(x.abs(), y.abs()) - 0.88
    triangle = torch.maximum(y - 0.75, 0.868 * x.abs() - 0.497 * (y + 1.05))

    # A fifth of the star is the half plane below the line from its tip to its inner corner.
    fifth = 2 * math.pi / 5
    angle = (torch.atan2(x, -y) + fifth / 2) % fifth - fifth / 2
    across, along = rho * angle.abs().sin(), rho * angle.cos()
    tip, corner_x, corner_y = 1.15, 0.5 * math.sin(fifth / 2), 0.5 * math.cos(fifth / 2)
    edge = math.hypot(corner_x, tip - corner_y)
    star = (across * (tip - corner_y) + (along - tip) * corner_x) / edge

    u, v = x.abs() * 0.60, 0.57 - y * 0.60
    lobe = torch.hypot(u - 0.25, v - 0.75) - math.sqrt(2) / 4
    fold = 0.5 * (u + v).clamp(min=0)
    cheek = torch.minimum(torch.hypot(u, v - 1), torch.hypot(u - fold, v - fold))
    heart = torch.where(u + v > 1, lobe, cheek * torch.sign(u - v)) / 0.60

    ring = (rho - 0.74).abs() - 0.27
    return torch.stack([circle, square, triangle, star, heart, ring])


def _pattern(patterns: Tensor, x: Tensor, y: Tensor, phase: Tensor, sharpness: Tensor) -> Tensor:
    """How dark the pattern makes each point, in [0, 1], of shape (N, size, size)."""
    stripes = torch.sigmoid(5 * torch.sin(8.2 * (x + y) + phase))
    period = 0.62
    dot_x = (x + period / 2) % period - period / 2
    dot_y = (y + period / 2) % period - period / 2
    dots = torch.sigmoid((0.19 - torch.hypot(dot_x, dot_y)) * sharpness)
    return torch.stack([torch.zeros_like(x), stripes, dots])[patterns, torch.arange(len(patterns))]
