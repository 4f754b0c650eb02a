"""sd-mecha's methods as ours, by the name "mecha:NAME"; needs the extra `mecha`."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any, get_origin

import torch
from torch import Generator, Tensor

from bayesian_merger.errors import ConfigError, TrialError, one_line
from bayesian_merger.registry import nearest

PREFIX = "mecha:"
_KEY = "tensor"


def names() -> list[str]:
    """All names, with the prefix, that `get` can give; ConfigError if sd-mecha is not installed."""
    return sorted(PREFIX + theirs.identifier for theirs in _all() if not _refusal(theirs))


def get(name: str) -> Callable[..., Tensor]:
    """sd-mecha's method for "mecha:NAME", with a signature by the contract of `methods`.

    Its weights are its floats and those of its tensors that have a default; a seed is drawn from a
    generator; other options keep their defaults. If it merges differences ('delta'), model A is the
    ancestor that they are taken from, and a difference that it returns is added to A.
    ConfigError if sd-mecha is not installed, has no such method, or has one that does not merge the
    tensors of several models one by one. What it raises when called becomes a TrialError.
    """
    for theirs in _all():
        if PREFIX + theirs.identifier == name:
            if refusal := _refusal(theirs):
                raise ConfigError(f"merge method {name!r} cannot be used: it {refusal}")
            return _adapted(theirs)
    raise ConfigError(f"unknown merge method {name!r}{nearest(name, names())}")


def _all() -> list[Any]:
    try:
        import sd_mecha
    except ImportError as error:
        raise ConfigError(
            f"merge methods named {PREFIX}... need sd-mecha ({error}); "
            f"pip install -e '.[mecha]' in the folder of this program"
        ) from error
    return list(sd_mecha.extensions.merge_methods.get_all())


def _refusal(theirs: Any) -> str | None:
    """Why `theirs` cannot be a function of tensors and numbers that gives a merged tensor, if so."""
    parameters, returned = _parameters(theirs), theirs.get_return_type().data
    models = [p for p in parameters if _is_model(p)]
    if theirs.wrapped_is_class or theirs.interface is not None:
        return "works on whole models"
    for parameter in parameters:
        if parameter.annotation.data.model_config is not None:
            return f"is for {parameter.annotation.data.model_config.identifier} only"
        if parameter.default is Parameter.empty and parameter not in models:
            return f"has an option without a default, {parameter.name!r}"
    if returned.interface is not Tensor or _spaces(returned) == ["param"]:
        return "does not return a tensor of a model"
    if _spaces(returned) == ["delta"] and not _has_ancestor(models):
        return "returns a difference of models"
    if len(models) + _has_ancestor(models) < 2 and not any(map(_is_repeated, models)):
        return "takes one model only"
    return None


def _adapted(theirs: Any) -> Callable[..., Tensor]:
    models = [p for p in _parameters(theirs) if _is_model(p)]
    options = {p.name: p for p in _parameters(theirs) if not _is_model(p)}
    has_ancestor = _has_ancestor(models)
    returns_difference = _spaces(theirs.get_return_type().data) == ["delta"]

    def merged(*tensors: Tensor, generator: Generator | None = None, **weights: float) -> Tensor:
        a, inputs = tensors[0], tensors[int(has_ancestor) :]
        # What comes after the last named model are models of its kind.
        kinds = [*models, *models[-1:] * (len(inputs) - len(models))]
        given: dict[str, Any] = {
            name: a.new_tensor(value) if _type(options[name]) is Tensor else value
            for name, value in weights.items()
        }
        for name in filter(_is_seed, options):
            given[name] = int(torch.randint(2**31, (), generator=generator))
        if theirs.has_varkwargs:
            given["key"] = _KEY
        arguments = [_argument(*pair, a) for pair in zip(kinds, inputs, strict=True)]
        try:
            result: Tensor = theirs.__wrapped__(*arguments, **given)
        except Exception as error:  # it may raise anything
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise TrialError(f"{merged.__name__}: {reason}") from error
        return (a + result if returns_difference else result).to(a.dtype)

    merged.__name__ = PREFIX + theirs.identifier
    merged.__doc__ = f"The method {theirs.identifier} of sd-mecha."
    merged.__signature__ = _signature(models, options)  # type: ignore[attr-defined]
    return merged


def _signature(models: Sequence[Parameter], options: Mapping[str, Parameter]) -> inspect.Signature:
    n_least = max(2, len(models) + _has_ancestor(models))
    positional = [
        Parameter(letter, Parameter.POSITIONAL_ONLY) for letter in string.ascii_lowercase[:n_least]
    ]
    if _is_repeated(models[-1]):
        positional.append(Parameter("more", Parameter.VAR_POSITIONAL))
    keywords = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=float(option.default))
        for name, option in options.items()
        if _type(option) in (float, Tensor)
    ]
    if any(map(_is_seed, options)):
        keywords.append(Parameter("generator", Parameter.KEYWORD_ONLY))
    return inspect.Signature([*positional, *keywords])


def _argument(parameter: Parameter, tensor: Tensor, ancestor: Tensor) -> Any:
    # A copy, since some of the methods write into their arguments.
    own = tensor - ancestor if _is_difference(parameter) else tensor.clone()
    return own if _type(parameter) is Tensor else {_KEY: own}


def _parameters(theirs: Any) -> list[Parameter]:
    parameters = theirs.get_signature().parameters.values()
    return [p for p in parameters if p.kind is not Parameter.VAR_KEYWORD]


def _type(parameter: Parameter) -> Any:
    interface = parameter.annotation.data.interface
    return get_origin(interface) or interface


def _is_model(parameter: Parameter) -> bool:
    kind = _type(parameter)
    is_tensor = inspect.isclass(kind) and issubclass(kind, Tensor | Mapping)
    return is_tensor and parameter.default is Parameter.empty


def _is_repeated(parameter: Parameter) -> bool:
    return parameter.kind is Parameter.VAR_POSITIONAL


def _is_difference(parameter: Parameter) -> bool:
    return _spaces(parameter.annotation.data) == ["delta"]


def _is_seed(name: str) -> bool:
    return name.endswith("seed")


def _has_ancestor(models: Sequence[Parameter]) -> bool:
    return any(map(_is_difference, models))


def _spaces(data: Any) -> list[str]:
    """The names of the spaces ('weight', 'delta', 'param') that a tensor may be in."""
    space = data.merge_space
    return [s.identifier for s in (space if hasattr(space, "__iter__") else (space,))]
