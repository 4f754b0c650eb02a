"""Merge methods: pure functions of tensors.

The signature is the contract: positional tensors say how many models a method takes, keyword-only
parameters are its weights, one value for each block. Shapes are equal, types float32, devices equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from bayesian_merger.registry import Registry

Weight = float
"""A merge coefficient of a method; the search may vary it for each block."""

Method = Callable[..., Tensor]

method: Registry[Method] = Registry("merge method", "bayesian_merger.methods")


def n_models(function: Method) -> int:
    """How many models `function` merges."""
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


def weights(function: Method) -> dict[str, float]:
    """The names of the method's weights with their defaults, in order."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
