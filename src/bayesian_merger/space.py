"""Which weights may vary: ranges, freezes, groups and presets over the blocks of an architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import TypeVar

import numpy as np

from bayesian_merger.blocks import ARCHITECTURES, Architecture, short_names
from bayesian_merger.data import Weights
from bayesian_merger.errors import ConfigError
from bayesian_merger.guide import Guide
from bayesian_merger.registry import nearest

_NO_GUIDE = Guide()
_V = TypeVar("_V")


@dataclass(frozen=True)
class Parameter:
    """One number that the search varies in [low, high].

    Each of its `members` (names) takes so much of the value: all of it, or on a line between two
    parameters as near as it is.
    """

    name: str
    low: float
    high: float
    members: Mapping[str, float]


@dataclass(frozen=True)
class Space:
    """The search space: parameters, and the weights that stay as they are.

    A weight's name is its block (or part) and the method's weight, "IN00_alpha"; `names` lists them
    all as name -> (weight, block). Those that are `inert` change nothing, whatever they are.
    """

    names: Mapping[str, tuple[str, str]]
    parameters: tuple[Parameter, ...]
    frozen: Mapping[str, float]
    inert: frozenset[str] = frozenset()

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks, and the parts with weights of their own."""
        return tuple(dict.fromkeys(block for _, block in self.names.values()))

    def weights(self, values: Mapping[str, float]) -> Weights:
        """The weight of each block when the parameters have `values`."""
        flat = self._flat(values)
        weights: dict[str, dict[str, float]] = {}
        for name, (weight, block) in self.names.items():
            weights.setdefault(weight, {})[block] = flat[name]
        return weights

    def _flat(self, values: Mapping[str, float]) -> dict[str, float]:
        flat: dict[str, float] = {}
        for parameter in self.parameters:
            for name, share in parameter.members.items():
                flat[name] = flat.get(name, 0.0) + share * values[parameter.name]
        return {**flat, **self.frozen}

    def slopes(self, slopes: Mapping[tuple[str, str], float]) -> dict[str, float]:
        """The derivative by each parameter from those by the weights, of (weight, block).

        A parameter of which no weight has one is left out.
        """
        found: dict[str, float] = {}
        for parameter in self.parameters:
            for name, share in parameter.members.items():
                if self.names[name] in slopes:
                    before = found.get(parameter.name, 0.0)
                    found[parameter.name] = before + share * slopes[self.names[name]]
        return found

    @property
    def searched(self) -> frozenset[tuple[str, str]]:
        """The weights that vary, as (weight, block)."""
        return frozenset(self.names[n] for p in self.parameters for n in p.members)

    def values(self, weights: Weights) -> dict[str, float] | None:
        """The parameters that give `weights`, or None if the space does not hold them.

        Weights that lack one of the names are not held.
        """
        if any(block not in weights[weight] for weight, block in self.names.values()):
            return None
        wanted = {name: weights[weight][block] for name, (weight, block) in self.names.items()}
        # One member takes all of the value.
        values = {
            p.name: wanted[max(p.members, key=p.members.__getitem__)] for p in self.parameters
        }
        if any(not p.low <= values[p.name] <= p.high for p in self.parameters):
            return None
        flat = self._flat(values)
        is_held = all(abs(flat[n] - wanted[n]) < 1e-9 for n in wanted if n not in self.inert)
        return values if is_held else None

    def without(self, inert: Sequence[Parameter]) -> Space:
        """The space in which these parameters, which change nothing, stay in the middle."""
        middles = {name: (p.low + p.high) / 2 for p in inert for name in p.members}
        return replace(
            self,
            parameters=tuple(p for p in self.parameters if p not in inert),
            frozen={**self.frozen, **middles},
            inert=self.inert | middles.keys(),
        )


def start(
    space: Space, architecture: Architecture, given: Mapping[str, float], where: str
) -> dict[str, float]:
    """The parameters nearest to weights by their names, as `build` takes them; others are in the middle.

    A parameter that several weights share takes their mean. ConfigError for a name that does not vary.
    """
    weights = tuple(dict.fromkeys(weight for weight, _ in space.names.values()))
    book = _Names(space.names, weights, architecture, [])
    flat = {name: value for name, (_, value) in book.table(_at(f"search.{where}", given)).items()}
    for name in flat.keys() - space.inert:
        if name in space.frozen:
            book.mistake(f"search.{where}: {name} is frozen; leave it out")
    book.raise_mistakes()
    names = [name for name in flat if name not in space.frozen]
    middles = np.array([(p.low + p.high) / 2 for p in space.parameters])
    if not names:
        return dict(zip((p.name for p in space.parameters), map(float, middles), strict=True))
    shares = np.array([[p.members.get(name, 0.0) for p in space.parameters] for name in names])
    wanted = np.array([flat[name] for name in names])
    # What no given weight tells of stays in the middle.
    found = middles + np.linalg.lstsq(shares, wanted - shares @ middles)[0]
    low, high = (np.array([getattr(p, end) for p in space.parameters]) for end in ("low", "high"))
    if ((shares @ low <= wanted) & (wanted <= shares @ high)).all():
        found = found.clip(low, high)
    values = {}
    for parameter, value in zip(space.parameters, found, strict=True):
        # Without the rounding of the solution.
        whole = [flat[n] for n, share in parameter.members.items() if share == 1.0 and n in flat]
        is_whole = whole and abs(whole[0] - value) < 1e-9
        values[parameter.name] = float(whole[0] if is_whole else value)
    return values


@dataclass(frozen=True)
class Preset:
    """A ready choice of what is searched, which `about` says in words.

    `parts` get weights of their own, and each of `groups` shares one value.
    """

    about: str
    parts: tuple[str, ...] = ()
    groups: Callable[[Architecture], Sequence[Sequence[str]]] | None = None


PRESETS: Mapping[str, Preset] = {
    "single": Preset("one value for all blocks", groups=lambda a: [a.blocks]),
    "groups8": Preset("eight groups of neighbouring blocks", groups=lambda a: a.groups8),
    "te-split": Preset("each text encoder its own value", parts=("TE2", "T5")),
    "ends": Preset(
        "the embeddings of time and label and the last layer apart",
        parts=("TIME", "LABEL", "FINAL"),
    ),
    "vae": Preset("the VAE is searched too", parts=("VAE",)),
}


def build(
    weights: Sequence[str],
    architecture: Architecture,
    *,
    freeze: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    groups: Sequence[Sequence[str]],
    guide: Guide = _NO_GUIDE,
    presets: Sequence[str] = (),
    smooth: int | None = None,
    blocks: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
) -> Space:
    """The space of `weights` (of a method) over the blocks, each in [0, 1] unless narrowed.

    Names are "IN00_alpha", the original's "block_0_alpha" and "base_alpha", a bare block ("IN00")
    for the method's first weight, or a pattern ("OUT*"). A part ("TIME") has a weight of its own if
    a preset or, by its full name, a freeze, range or group asks for it; patterns do not. What a `guide`
    says is added; of entries spelt alike, that of `freeze` or `ranges` holds.

    `blocks` and `parts` are those that the models hold, None for all. A preset that groups takes
    the blocks that are neither frozen nor in `groups`; those given different ranges stay apart. With
    `smooth` such blocks of the network lie on straight lines between so many of them, the knots.

    All mistakes are in one ConfigError.
    """
    blocks = [b for b in architecture.blocks if blocks is None or b in blocks]
    parts = [p for p in architecture.parts if parts is None or p in parts]
    chosen, mistakes = _chosen(presets, parts, architecture)
    freezes = {
        **_at(f"{guide.where}: frozen_params", guide.freeze),
        **_at("search.freeze", freeze),
    }
    limits = {
        **_at(f"{guide.where}: custom_ranges", guide.ranges),
        **_at("search.ranges", ranges),
    }
    grouped = [
        *((f"{guide.where}: groups", *counted) for counted in enumerate(guide.groups, start=1)),
        *(("search.groups", *counted) for counted in enumerate(groups, start=1)),
    ]
    asked = {*freezes, *limits, *chain(*groups, *guide.groups)}
    # A bare part is its first weight, as a bare block is.
    asked |= {f"{name}_{weights[0]}" for name in asked}
    asked |= {f"{p}_{w}" for preset in chosen for p in preset.parts for w in weights}
    names = {
        f"{block}_{weight}": (weight, block)
        for weight in weights
        for block in (*blocks, *(p for p in parts if f"{p}_{weight}" in asked))
    }
    book = _Names(names, weights, architecture, mistakes)
    frozen, spans = book.table(freezes), book.table(limits)
    for name, (where, value) in freezes.items():
        if not math.isfinite(value):
            book.mistake(f"{where}: {name} is {value}")
    for name, (where, _) in frozen.items():
        if name in spans:
            both = _joined(where, spans[name][0])
            book.mistake(f"{both}: {name} is both frozen and given a range; keep one of them")
    for name, (where, (low, high)) in limits.items():
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            book.mistake(
                f"{where}: {name} = [{low}, {high}] is upside down; put the low end first"
            )
    parameters = []
    taken: dict[str, tuple[str, int]] = {}
    for where, number, group in grouped:
        members = [name for pattern in group for name in book.find(where, pattern)]
        members = list(dict.fromkeys(members))
        for member in members:
            if member in frozen:
                book.mistake(f"{where}: {member} of group {number} is frozen; take it out of one")
            if member in taken:
                other, n = taken[member]
                book.mistake(f"{_joined(other, where)}: {member} is in groups {n} and {number}")
            taken[member] = (where, number)
        ends = {spans[member][1] for member in members if member in spans}
        if len(ends) > 1:
            book.mistake(f"{where}: group {number} has members with different ranges")
        if members:
            low, high = ends.pop() if ends else (0.0, 1.0)
            parameters.append(Parameter("-".join(members), low, high, dict.fromkeys(members, 1.0)))
    ranged = {name: ends for name, (_, ends) in spans.items()}
    left = {n: place for n, place in names.items() if n not in frozen and n not in taken}
    if smooth is not None:
        if any(preset.groups for preset in chosen):
            book.mistake("search.smooth and a preset of groups exclude each other; keep one")
        for weight in weights:
            curve = {
                n: b for n, (w, b) in left.items() if w == weight and b in architecture.network
            }
            parameters += _knots(curve, ranged, smooth, architecture, book)
            left = {n: place for n, place in left.items() if n not in curve}
    parameters += _ungrouped(left, ranged, chosen, architecture)
    if not parameters and not book.mistakes:
        where = _joined(*(where for where, _ in frozen.values()))
        book.mistake(f"{where}: every weight is frozen, so there is nothing to search")
    book.raise_mistakes()
    return Space(names, tuple(parameters), {name: value for name, (_, value) in frozen.items()})


def _at(where: str, given: Mapping[str, _V]) -> dict[str, tuple[str, _V]]:
    """Each entry with the place where it stands."""
    return {name: (where, value) for name, value in given.items()}


def _joined(*places: str) -> str:
    return " and ".join(dict.fromkeys(places))


def _chosen(
    presets: Sequence[str], parts: Sequence[str], architecture: Architecture
) -> tuple[list[Preset], list[str]]:
    """The presets of these names, and the mistakes in them; `parts` are those that the models hold."""
    mistakes = []
    for name in presets:
        if name not in PRESETS:
            mistakes.append(f"search.presets: no preset {name!r}{nearest(name, PRESETS)}")
        elif PRESETS[name].parts and not set(PRESETS[name].parts) & set(parts):
            mistakes.append(
                f"search.presets: {name!r} fits nowhere, these {architecture.title} models have "
                f"no part {' or '.join(PRESETS[name].parts)}; take it out"
            )
    known = [name for name in dict.fromkeys(presets) if name in PRESETS]
    grouping = [name for name in known if PRESETS[name].groups]
    if len(grouping) > 1:
        mistakes.append(f"search.presets: {' and '.join(grouping)} exclude each other; keep one")
    return [PRESETS[name] for name in known], mistakes


def _knots(
    curve: Mapping[str, str],
    spans: Mapping[str, tuple[float, float]],
    n: int,
    architecture: Architecture,
    book: _Names,
) -> Iterator[Parameter]:
    """A parameter for each of `n` of the weights `curve` (name -> block), about equally far apart.

    The others are interpolated by their depth in the network.
    """
    limits = {spans.get(name, (0.0, 1.0)) for name in curve}
    if n > len(curve):
        book.mistake(f"search.smooth: {n} knots for {len(curve)} blocks; take fewer")
    elif len(limits) > 1:
        book.mistake(
            "search.smooth: its weights have different ranges; freeze or group those that are apart"
        )
    else:
        ((low, high),) = limits
        names = list(curve)
        knots = [names[round(i * (len(names) - 1) / (n - 1))] for i in range(n)]
        depth = {name: architecture.network.index(block) for name, block in curve.items()}
        for i, knot in enumerate(knots):
            hat = np.eye(n)[i]
            at = np.interp(list(depth.values()), [depth[k] for k in knots], hat)
            members = {name: float(share) for name, share in zip(names, at, strict=True) if share}
            yield Parameter(knot, low, high, members)


def _ungrouped(
    names: Mapping[str, tuple[str, str]],
    spans: Mapping[str, tuple[float, float]],
    presets: Sequence[Preset],
    architecture: Architecture,
) -> Iterator[Parameter]:
    """A parameter for each weight, or for those that share a preset's group and a range.

    The latter is called by its first and last block, "IN00-IN03_alpha".
    """
    groups = [group for p in presets if p.groups for group in p.groups(architecture)]
    group_of = {block: group[0] for group in groups for block in group}
    shared: dict[tuple[str, str, tuple[float, float]], list[str]] = {}
    for name, (weight, block) in names.items():
        key = (weight, group_of.get(block, block), spans.get(name, (0.0, 1.0)))
        shared.setdefault(key, []).append(name)
    for (weight, _, (low, high)), members in shared.items():
        first, last = names[members[0]][1], names[members[-1]][1]
        called = members[0] if len(members) == 1 else f"{first}-{last}_{weight}"
        yield Parameter(called, low, high, dict.fromkeys(members, 1.0))


class _Names:
    """Finds weights by any of their names and collects the mistakes."""

    def __init__(
        self,
        names: Mapping[str, tuple[str, str]],
        weights: Sequence[str],
        architecture: Architecture,
        mistakes: list[str],
    ) -> None:
        self.mistakes, self._architecture = mistakes, architecture
        self._canonical = list(names)
        # Those of blocks and parts that the models lack are known too, to say so.
        self._aliases: dict[str, str] = {
            block: f"{block}_{weights[0]}" for block in (*architecture.blocks, *architecture.parts)
        }
        for weight in weights:
            for alias, block in short_names(weight, architecture).items():
                self._aliases[alias] = f"{block}_{weight}"

    def mistake(self, text: str) -> None:
        self.mistakes.append(text)

    def raise_mistakes(self) -> None:
        if self.mistakes:
            raise ConfigError("\n".join(self.mistakes))

    def find(self, where: str, pattern: str) -> list[str]:
        """The weights that `pattern` names, in the order of the blocks; a mistake if there is none."""
        if pattern in self._aliases:
            hits = {self._aliases[pattern]}
            hint = "; the models hold no tensor of it"
        else:
            hits = {name for alias, name in self._aliases.items() if fnmatchcase(alias, pattern)}
            hint = self._elsewhere(pattern) or nearest(pattern, self._aliases)
        found = [name for name in self._canonical if name in hits]
        if not found:
            self.mistake(f"{where}: {pattern!r} names no weight{hint}")
        return found

    def _elsewhere(self, name: str) -> str:
        """That a name is one of other architectures, if it is."""
        of = [a.title for a in ARCHITECTURES.values() if name in (*a.blocks, *a.parts)]
        if not of:
            return ""
        return f"; it is one of {', '.join(of)}, and the models are {self._architecture.title}"

    def table(self, given: Mapping[str, tuple[str, _V]]) -> dict[str, tuple[str, _V]]:
        """`given`, values with their places, with each pattern replaced by the weights it names."""
        found: dict[str, tuple[str, _V]] = {}
        for pattern, (where, value) in given.items():
            for name in self.find(where, pattern):
                if name in found and found[name][1] != value:
                    both = _joined(found[name][0], where)
                    self.mistake(f"{both}: {name} is given twice, the second time as {pattern!r}")
                found[name] = (where, value)
        return found
