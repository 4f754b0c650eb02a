"""The named presets of merge-block-weighted: a merge's weights as curves over the network's depth.

Names, order and numbers are those of csv/preset.tsv in bbc-mc/sdweb-merge-block-weighted-gui, which
supermerger and sd-meh have taken over; the text encoder's weight, which that file leaves out, is
theirs. They list 25 numbers for the U-Net of SD1.5; here each is a formula for networks of any depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bayesian_merger.blocks import Architecture
from bayesian_merger.errors import ConfigError
from bayesian_merger.registry import nearest

Formula = Callable[[float], float]


@dataclass(frozen=True)
class Curve:
    """A weight in [0, 1] for each depth, which `about` says in words.

    `at` takes the depth in [0, 1], 0 for the network's first block and 1 for its last. `base` is
    the weight of the text encoders.
    """

    about: str
    at: Formula
    base: float = 0.0


def weights(name: str, architecture: Architecture) -> dict[str, float]:
    """Block -> its weight by the curve called `name`; ConfigError for an unknown name.

    Curves made of steps have, in deeper and shallower networks, the weight of SD1.5's nearest block.

    Besides the names in `CURVES`, in upper or lower case, other tools' spellings are known:
    "R_" is "REVERSE_" or "REVERSE-", "SMOOTHSTEP*2" is "SMOOTHSTEP2" or "2SMOOTHSTEP", and
    "SMOOTHSTEP/2", "/3" and "/4" are "HALF_SMOOTHSTEP", "ONE_THIRD_" and "ONE_FOURTH_".
    """
    curve = _find(name)
    network = architecture.network
    return {
        **dict.fromkeys(architecture.encoders, curve.base),
        **{block: curve.at(i / (len(network) - 1)) for i, block in enumerate(network)},
    }


def _find(name: str) -> Curve:
    plain = _plain(name)
    for known, curve in CURVES.items():
        if _plain(known) == plain:
            return curve
    raise ConfigError(
        f"unknown preset of weights {name!r}{nearest(name.upper(), CURVES)} "
        "('bayesian-merger list presets' shows all)"
    )


def _plain(name: str) -> str:
    """One spelling for all those of a name: "SMOOTHSTEP*2", "R_SMOOTHSTEP/2", "TRUE_R_..."."""
    plain = name.upper().replace("-", "_").replace("REVERSE_", "R_")
    for divisor, fraction in enumerate(("HALF_", "ONE_THIRD_", "ONE_FOURTH_"), start=2):
        if plain.startswith(fraction):
            return f"{plain.removeprefix(fraction)}/{divisor}"
    plain = re.sub(r"^(\d)(R_)?SMOOTHSTEP$", r"\2SMOOTHSTEP*\1", plain)
    return re.sub(r"SMOOTHSTEP(\d)$", r"SMOOTHSTEP*\1", plain)


def _place(depth: float) -> int:
    """The nearest of SD1.5's U-Net blocks, 0 (IN00) to 24 (OUT11), with 12 (M00) in the middle."""
    return round(24 * depth)


def _flat(weight: float) -> Formula:
    return lambda depth: weight


def _from(first: int, last: int = 24, weight: float = 1.0) -> Formula:
    """`weight` from place `first` to place `last`, 0 elsewhere."""
    return lambda depth: weight if first <= _place(depth) <= last else 0.0


def _around(near: int, far: int) -> Formula:
    """1 where the middle is `near` to `far` places away, on either side, 0 elsewhere."""
    return lambda depth: 1.0 if near <= abs(_place(depth) - 12) <= far else 0.0


def _reverse(formula: Formula) -> Formula:
    return lambda depth: 1.0 - formula(depth)


def _fold(value: float) -> float:
    """`value` sent back into [0, 1] as between mirrors at 0 and 1: its distance to an even number."""
    return abs(value - 2 * round(value / 2))


def _valley(depth: float) -> float:
    return abs(2 * depth - 1)


def _out12_5(depth: float) -> float:
    return (_from(12)(depth) + _from(13)(depth)) / 2


def _ring08_soft(depth: float) -> float:
    # Places in between are met by deeper networks and lie on the slopes, hence no `_place`.
    from_ring = abs(abs(24 * depth - 12) - 5)
    return min(1.0, max(0.0, 1.5 - from_ring / 2))


def _smoothstep(depth: float) -> float:
    return depth * depth * (3 - 2 * depth)


def _scaled(factor: int) -> Formula:
    return lambda depth: _fold(factor * _smoothstep(depth))


def _repeated(times: int) -> Formula:
    return lambda depth: _smoothstep(_fold(times * depth))


def _cosine(depth: float) -> float:
    return (1 + math.cos(math.pi * depth)) / 2


def _hermite(depth: float, start: float) -> float:
    """The cubic from `start` to 1 whose slope is 25/6 at both ends."""
    step = _smoothstep(depth)
    return (1 - step) * start + step + 25 / 6 * depth * (1 - depth) * (1 - 2 * depth)


def _fake_hermite(depth: float) -> float:
    return _hermite(depth, 0.0)


def _true_hermite(depth: float) -> float:
    # The field's curve starts at 1/24, but the first block has 0.
    return _hermite(depth, 1 / 24) if depth > 0 else 0.0


CURVES: Mapping[str, Curve] = {
    "GRAD_V": Curve("1 at both ends, falling evenly to 0 in the middle", _valley),
    "GRAD_A": Curve("0 at both ends, rising evenly to 1 in the middle", _reverse(_valley)),
    "FLAT_25": Curve("0.25 everywhere", _flat(0.25)),
    "FLAT_75": Curve("0.75 everywhere", _flat(0.75)),
    "WRAP08": Curve("1 in the first 4 and the last 4 of 25 blocks", _around(9, 12)),
    "WRAP12": Curve("1 in the first 6 and the last 6 of 25 blocks", _around(7, 12)),
    "WRAP14": Curve("1 in the first 7 and the last 7 of 25 blocks", _around(6, 12)),
    "WRAP16": Curve("1 in the first 8 and the last 8 of 25 blocks", _around(5, 12)),
    # 14 blocks in spite of its name, and one more before the middle than after it.
    "MID12_50": Curve("0.5 from IN05 to OUT05, 0 outside", _from(5, 18, 0.5)),
    "OUT07": Curve("1 in the last 7 of 25 blocks", _from(18)),
    "OUT12": Curve("1 in the last 12 of 25 blocks", _from(13)),
    "OUT12_5": Curve("OUT12 with 0.5 in the middle", _out12_5),
    "RING08_SOFT": Curve("RING10_5 with soft edges: 0.5, 1, 1, 1, 0.5 twice", _ring08_soft),
    "RING08_5": Curve("1 in 4 blocks each way, 3 to 6 from the middle", _around(3, 6)),
    "RING10_5": Curve("1 in 5 blocks each way, 3 to 7 from the middle", _around(3, 7)),
    "RING10_3": Curve("1 in 5 blocks each way, 2 to 6 from the middle", _around(2, 6)),
    "SMOOTHSTEP": Curve("from 0 to 1, flat at both ends", _smoothstep),
    "REVERSE-SMOOTHSTEP": Curve("1 - SMOOTHSTEP", _reverse(_smoothstep)),
    "SMOOTHSTEP*2": Curve("2 x SMOOTHSTEP, turned back at 1", _scaled(2)),
    "R_SMOOTHSTEP*2": Curve("1 - SMOOTHSTEP*2", _reverse(_scaled(2))),
    "SMOOTHSTEP*3": Curve("3 x SMOOTHSTEP, turned back at 1 and at 0", _scaled(3)),
    "R_SMOOTHSTEP*3": Curve("1 - SMOOTHSTEP*3", _reverse(_scaled(3))),
    "SMOOTHSTEP*4": Curve("4 x SMOOTHSTEP, turned back at 1 and at 0", _scaled(4)),
    "R_SMOOTHSTEP*4": Curve("1 - SMOOTHSTEP*4", _reverse(_scaled(4))),
    "SMOOTHSTEP/2": Curve("SMOOTHSTEP up in one half and down in the other", _repeated(2)),
    "R_SMOOTHSTEP/2": Curve("1 - SMOOTHSTEP/2", _reverse(_repeated(2))),
    "SMOOTHSTEP/3": Curve("SMOOTHSTEP up, down and up in thirds", _repeated(3)),
    "R_SMOOTHSTEP/3": Curve("1 - SMOOTHSTEP/3", _reverse(_repeated(3))),
    "SMOOTHSTEP/4": Curve("SMOOTHSTEP up, down, up and down in quarters", _repeated(4)),
    "R_SMOOTHSTEP/4": Curve("1 - SMOOTHSTEP/4", _reverse(_repeated(4))),
    "COSINE": Curve("from 1 to 0 as half a cosine wave", _cosine),
    "REVERSE_COSINE": Curve("1 - COSINE", _reverse(_cosine)),
    "TRUE_CUBIC_HERMITE": Curve(
        "FAKE_CUBIC_HERMITE from 1/24, but 0 in the first block", _true_hermite
    ),
    "TRUE_REVERSE_CUBIC_HERMITE": Curve("1 - TRUE_CUBIC_HERMITE", _reverse(_true_hermite)),
    "FAKE_CUBIC_HERMITE": Curve("from 0 to 1, steep at both ends", _fake_hermite),
    "FAKE_REVERSE_CUBIC_HERMITE": Curve("1 - FAKE_CUBIC_HERMITE", _reverse(_fake_hermite)),
    "ALL_A": Curve("0 everywhere", _flat(0.0)),
    "ALL_B": Curve("1 everywhere, text encoders too", _flat(1.0), base=1.0),
}
