"""Merge methods, back ends and scorers by name: one decorated object in one file adds one."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from bayesian_merger.errors import ConfigError, MergerError, one_line, shown

_HERE = Path()
T = TypeVar("T", bound=Callable[..., Any])


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The text "; did you mean 'x'?" with the nearest known name, or nothing if none is near.

    `cutoff` is the likeness, in [0, 1] and without regard to case, from which a name counts as near.
    """
    spellings = {spelling.casefold(): spelling for spelling in known}
    close = difflib.get_close_matches(name.casefold(), list(spellings), n=1, cutoff=cutoff)
    return f"; did you mean {spellings[close[0]]!r}?" if close else ""


class Registry(Generic[T]):
    """The plugins of one kind, found in the modules of `package` when first asked for."""

    def __init__(self, kind: str, package: str, common: Iterable[str] = ()) -> None:
        """With the keys that a section of the configuration takes beside the options of any plugin."""
        self.kind = kind
        self._package, self._common = package, tuple(common)
        self._found: dict[str, T] = {}
        self._discovered = False

    def __call__(self, plugin: T) -> T:
        """Register `plugin` under its lower-case name; used as a decorator."""
        name = plugin.__name__.lower()
        other = self._found.get(name)
        if other is not None and inspect.getfile(other) != inspect.getfile(plugin):
            raise ConfigError(
                f"two {self.kind}s are called {name!r}: {other.__module__}, {plugin.__module__}"
            )
        self._found[name] = plugin
        return plugin

    def names(self) -> list[str]:
        """All registered names, sorted."""
        if not self._discovered:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._discovered = True
        return sorted(self._found)

    def get(self, name: str) -> T:
        """The plugin called `name`; ConfigError with the nearest known name if there is none."""
        names = self.names()
        if name not in self._found:
            plugin, colon, model = name.partition(":")
            if colon and plugin in names and "model" in _parameters(self.get(plugin)):
                hint = f"; write [{self.kind}s.{plugin}] and model = {model!r}"
            else:
                hint = nearest(name, names) or f"; known: {', '.join(names)}."
            raise ConfigError(f"unknown {self.kind} {name!r}{hint}")
        return self._found[name]

    def check(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` validated and converted by the annotations of the plugin's constructor.

        Keyword-only parameters are not options. All mistakes are reported at once in a ConfigError.
        """
        plugin = self.get(name)
        try:
            model = _options_model(name, plugin)
        except NameError as error:
            raise ConfigError(
                f"{self.kind} {name}: an annotation of its constructor is unknown ({error})"
            ) from error
        try:
            checked = model.model_validate(dict(options))
        except ValidationError as error:
            where, known = f"{self.kind} {name}", [*model.model_fields, *self._common]
            foreign = self._foreign(key for key in options if key not in known)
            mistakes = [
                _mistake(where, detail, known)
                for detail in error.errors()
                if detail["loc"][0] not in foreign
            ]
            if foreign:
                owned = ", ".join(f"{key!r} (of {owners})" for key, owners in foreign.items())
                mistakes.append(
                    f"{where}: unknown option {owned}; take out what belongs to another {self.kind} "
                    f"(known: {_listed(known)})"
                )
            raise ConfigError("; ".join(mistakes)) from None
        return {key: getattr(checked, key) for key in checked.model_fields_set}

    def options(self, name: str) -> str:
        """The options of a plugin, with what they are if nobody says, in words."""
        return ", ".join(
            key
            if one.default in (inspect.Parameter.empty, None)
            else f"{key} = {_shown(one.default)}"
            for key, one in _parameters(self.get(name)).items()
        )

    def _foreign(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of `keys` that are options of other plugins, with the names of these."""
        known = {name: _parameters(self.get(name)) for name in self.names()}
        owners = {key: [name for name, own in known.items() if key in own] for key in keys}
        return {key: ", ".join(names) for key, names in owners.items() if names}

    def build(self, name: str, options: Mapping[str, Any], folder: Path = _HERE) -> Any:
        """The plugin called with its checked options; relative paths among them are below `folder`."""
        given = {**self.check(name, options), **self._paths(name, options, folder)}
        try:
            return self.get(name)(**given)
        except MergerError:
            raise
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{self.kind} {name} needs the package {error.name}, which is not installed; "
                f"pip install {_extra_of(name) or error.name}"
            ) from error
        except Exception as error:  # a user's constructor may raise anything
            raise ConfigError(
                f"{self.kind} {name}: {type(error).__name__}: {one_line(error)}"
            ) from error

    def files(
        self, name: str, options: Mapping[str, Any], folder: Path = _HERE
    ) -> dict[str, Path]:
        """The options, given or by default, that name files which exist."""
        paths = self._paths(name, options, folder)
        return {key: path for key, path in paths.items() if path.is_file()}

    def _paths(self, name: str, options: Mapping[str, Any], folder: Path) -> dict[str, Path]:
        """The options that are paths, given or by default, below `folder`."""
        defaults = {key: p.default for key, p in _parameters(self.get(name)).items()}
        return {
            key: folder / value.expanduser()
            for key, value in {**defaults, **self.check(name, options)}.items()
            if isinstance(value, Path)
        }


def module_of(path: Path) -> str:
    """The module that a user's Python file becomes by `import_file`."""
    return f"bayesian_merger_plugin_{path.stem}"


def import_file(path: Path) -> None:
    """Import a user's Python file, so that the plugins it decorates are registered."""
    spec = importlib.util.spec_from_file_location(module_of(path), path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"plugin {path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ConfigError(f"plugin {path}: {type(error).__name__}: {one_line(error)}") from error


def _extra_of(name: str) -> str:
    """What installs all that a plugin needs, if the program has an extra of its name."""
    extras = importlib.metadata.metadata("bayesian-merger").get_all("Provides-Extra") or ()
    return f'-e ".[{name}]" in the folder of this program' if name in extras else ""


def _parameters(
    plugin: Callable[..., Any], *, evaluated: bool = False
) -> dict[str, inspect.Parameter]:
    """The parameters that are options, by name; NameError if annotations to be evaluated are unknown."""
    parameters = inspect.signature(plugin, eval_str=evaluated).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def _options_model(name: str, plugin: Callable[..., Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for key, parameter in _parameters(plugin, evaluated=True).items():
        required = parameter.default is inspect.Parameter.empty
        untyped = parameter.annotation is inspect.Parameter.empty
        fields[key] = (
            Any if untyped else parameter.annotation,
            ... if required else parameter.default,
        )
    return create_model(
        name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields
    )


def _mistake(where: str, detail: Any, known: list[str]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown option {key!r}{nearest(key, known)} (known: {_listed(known)})"
    if detail["type"] == "missing":
        return f"{where}: option {key!r} is missing"
    return f"{where}: option {key!r}: {detail['msg']} (found {shown(detail['input'])})"


def _shown(value: object) -> str:
    return repr(str(value) if isinstance(value, Path) else value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
