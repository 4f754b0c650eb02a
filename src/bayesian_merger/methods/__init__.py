"""Merge methods: pure functions of tensors.

The signature is the contract:

- positional tensors say how many models a method takes; `*more: Tensor` takes any further number;
- keyword-only parameters are its weights, one value for each block, with defaults that make a
  sensible merge; `Share` instead of `Weight` says that only [0, 1] makes sense;
- a keyword-only `generator` makes it a random method: it draws on the CPU, so that the same seed
  gives the same merge on every device, and whoever calls it seeds the generator.

Tensors come in float32, finite, of one shape (a number, a vector, a matrix, a convolution's
[out, in, 3, 3]; also empty ones) and on one device. A method leaves them as they are and returns a new
float32 tensor of that shape, finite as long as its weights are in their domains.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar, get_args

import torch
from torch import Tensor

from bayesian_merger.errors import ConfigError
from bayesian_merger.methods import mecha
from bayesian_merger.registry import Registry


@dataclass(frozen=True)
class Domain:
    """The values, ends included, between which a weight makes sense."""

    low: float
    high: float


Weight = float
"""A merge coefficient of a method, any finite number; the search may vary it for each block."""

Share = Annotated[float, Domain(0.0, 1.0)]
"""A weight that makes sense only in [0, 1], such as the part of the values that is kept."""

Method = Callable[..., Tensor]
F = TypeVar("F", bound=Method)

method: Registry[Method] = Registry("merge method", "bayesian_merger.methods")

_elementwise: set[Method] = set()
_linear: set[Method] = set()


def get(name: str) -> Method:
    """The method called `name`, or sd-mecha's NAME for "mecha:NAME"; ConfigError if there is none."""
    if name.startswith(mecha.PREFIX):
        return mecha.get(name)
    try:
        return method.get(name)
    except ConfigError as error:
        raise ConfigError(
            f"{error} A method of your own needs its file: --plugin, plugins"
        ) from None


def elementwise(function: F) -> F:
    """`function`, marked: its result at a position depends on the models at that position only.

    So it may be computed in pieces of any size. Stands below `@method`.
    """
    _elementwise.add(function)
    return function


def linear(function: F) -> F:
    """`function`, marked: for given weights it is one linear combination of the models.

    So it is elementwise, and its coefficients are all that need be known. It must take float64
    tensors as well. Stands below `@method`.
    """
    _linear.add(function)
    return elementwise(function)


def is_elementwise(function: Method) -> bool:
    """Whether `function` may be computed in pieces."""
    return function in _elementwise


def is_linear(function: Method) -> bool:
    """Whether `coefficients` tells all about `function`."""
    return function in _linear


def coefficients(function: Method, weights: Mapping[str, float], n: int) -> tuple[float, ...]:
    """By what a linear `function` multiplies each of `n` models before it adds them up."""
    models = torch.eye(n, dtype=torch.float64)
    return tuple(function(*models, **weights).tolist())


def n_models(function: Method) -> int:
    """How many models `function` merges at least."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional for p in _parameters(function))


def takes_more(function: Method) -> bool:
    """Whether `function` merges any number of models from `n_models` on."""
    return any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in _parameters(function))


def is_random(function: Method) -> bool:
    """Whether `function` wants a `generator`."""
    return any(p.name == "generator" for p in _keywords(function))


def weights(function: Method) -> dict[str, float]:
    """The names of the method's weights with their defaults, in order.

    ConfigError if a weight has no number as its default.
    """
    found = {p.name: p.default for p in _keywords(function) if p.name != "generator"}
    for name, default in found.items():
        if not isinstance(default, (int, float)):
            raise ConfigError(
                f"merge method {getattr(function, '__name__', function)}: its weight {name} needs a "
                f"number as default"
            )
    return found


def domains(function: Method) -> dict[str, Domain]:
    """The domains of those weights that have one; ConfigError if an annotation cannot be read."""
    return {
        parameter.name: note
        for parameter in _keywords(function)
        for note in get_args(_annotation(function, parameter))[1:]
        if isinstance(note, Domain)
    }


def _parameters(function: Method) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _keywords(function: Method) -> Iterator[inspect.Parameter]:
    return (p for p in _parameters(function) if p.kind is inspect.Parameter.KEYWORD_ONLY)


def _annotation(function: Method, parameter: inspect.Parameter) -> object:
    # Text, after `from __future__ import annotations`. Only that of a weight is read: those of the
    # tensors may name what is imported for type checkers alone.
    annotation = parameter.annotation
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        while isinstance(annotation, str):
            annotation = eval(annotation, names)
    except (NameError, SyntaxError) as error:
        raise ConfigError(
            f"merge method {getattr(function, '__name__', function)}: the annotation of "
            f"{parameter.name} cannot be read ({error}); import the name at the top of the file"
        ) from error
    return annotation
