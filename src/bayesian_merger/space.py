"""Which weights may vary: ranges, freezes and groups over the blocks of an architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from bayesian_merger.blocks import Architecture, short_names
from bayesian_merger.data import Weights
from bayesian_merger.errors import ConfigError
from bayesian_merger.registry import nearest

_V = TypeVar("_V")


@dataclass(frozen=True)
class Parameter:
    """One number that the search varies in [low, high]; its `members` (names) share the value."""

    name: str
    low: float
    high: float
    members: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """The search space: parameters, and the weights that stay as they are.

    A weight's name is its block and the method's weight, "IN00_alpha"; `names` lists them all as
    name -> (weight, block).
    """

    names: Mapping[str, tuple[str, str]]
    parameters: tuple[Parameter, ...]
    frozen: Mapping[str, float]

    def weights(self, values: Mapping[str, float]) -> Weights:
        """The weight of each block when the parameters have `values`."""
        flat = dict(self.frozen)
        for parameter in self.parameters:
            flat.update(dict.fromkeys(parameter.members, values[parameter.name]))
        weights: dict[str, dict[str, float]] = {}
        for name, (weight, block) in self.names.items():
            weights.setdefault(weight, {})[block] = flat[name]
        return weights

    def values(self, weights: Weights) -> dict[str, float] | None:
        """The parameters that give `weights`, or None if the space does not hold them."""
        flat = {name: weights[weight][block] for name, (weight, block) in self.names.items()}
        values: dict[str, float] = {}
        for parameter in self.parameters:
            first, *others = (flat[member] for member in parameter.members)
            if any(other != first for other in others):
                return None
            if not parameter.low <= first <= parameter.high:
                return None
            values[parameter.name] = first
        if any(flat[name] != value for name, value in self.frozen.items()):
            return None
        return values


def build(
    weights: Sequence[str],
    architecture: Architecture,
    *,
    freeze: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    groups: Sequence[Sequence[str]],
) -> Space:
    """The space of `weights` (of a method) over the blocks, each in [0, 1] unless narrowed.

    Names are "IN00_alpha", the original's "block_0_alpha" and "base_alpha", a bare block ("IN00")
    for the method's first weight, or a pattern ("OUT*"). All mistakes are in one ConfigError.
    """
    names = {f"{b}_{w}": (w, b) for w in weights for b in architecture.blocks}
    book = _Names(names, weights, architecture)
    frozen = book.table("freeze", freeze)
    spans = book.table("ranges", ranges)
    for name, value in frozen.items():
        if not math.isfinite(value):
            book.mistake(f"search.freeze: {name} is {value}")
        if name in spans:
            book.mistake(f"search: {name} is both frozen and given a range; keep one of them")
    for name, (low, high) in spans.items():
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            book.mistake(
                f"search.ranges: {name} = [{low}, {high}] is upside down; put the low end first"
            )
    parameters = []
    taken: dict[str, int] = {}
    for number, group in enumerate(groups, start=1):
        members = [name for pattern in group for name in book.find("groups", pattern)]
        members = list(dict.fromkeys(members))
        for member in members:
            if member in frozen:
                book.mistake(
                    f"search.groups: {member} of group {number} is frozen; take it out of one"
                )
            if member in taken:
                book.mistake(f"search.groups: {member} is in groups {taken[member]} and {number}")
            taken[member] = number
        limits = {spans[member] for member in members if member in spans}
        if len(limits) > 1:
            book.mistake(f"search.groups: group {number} has members with different ranges")
        if members:
            low, high = limits.pop() if limits else (0.0, 1.0)
            parameters.append(Parameter("-".join(members), low, high, tuple(members)))
    for name in names:
        if name not in frozen and name not in taken:
            low, high = spans.get(name, (0.0, 1.0))
            parameters.append(Parameter(name, low, high, (name,)))
    if not parameters and not book.mistakes:
        book.mistake("search.freeze: every weight is frozen, so there is nothing to search")
    book.raise_mistakes()
    return Space(names, tuple(parameters), frozen)


class _Names:
    """Finds weights by any of their names and collects the mistakes."""

    def __init__(
        self,
        names: Mapping[str, tuple[str, str]],
        weights: Sequence[str],
        architecture: Architecture,
    ) -> None:
        self.mistakes: list[str] = []
        self._canonical = list(names)
        self._aliases: dict[str, str] = {
            block: f"{block}_{weights[0]}" for block in architecture.blocks
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
            return [self._aliases[pattern]]
        hits = {name for alias, name in self._aliases.items() if fnmatchcase(alias, pattern)}
        if not hits:
            self.mistake(
                f"search.{where}: {pattern!r} names no weight{nearest(pattern, self._aliases)}"
            )
        return [name for name in self._canonical if name in hits]

    def table(self, where: str, given: Mapping[str, _V]) -> dict[str, _V]:
        """`given` with each pattern replaced by the weights it names."""
        found: dict[str, _V] = {}
        for pattern, value in given.items():
            for name in self.find(where, pattern):
                if name in found and found[name] != value:
                    self.mistake(
                        f"search.{where}: {name} is given twice, the second time as {pattern!r}"
                    )
                found[name] = value
        return found
