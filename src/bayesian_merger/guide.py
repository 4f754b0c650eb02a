"""The guide.yaml of sd-webui-bayesian-merger: what it froze, in which ranges it searched, its groups."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bayesian_merger import yml
from bayesian_merger.errors import ConfigError, one_line
from bayesian_merger.registry import nearest


@dataclass(frozen=True)
class Guide:
    """What a guide says of weights by their names, and where it stands, for messages."""

    where: str = ""
    freeze: Mapping[str, float] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    groups: Sequence[Sequence[str]] = ()

    def of(self, weights: Container[str]) -> Guide:
        """Without the names that end in a letter which is none of the method's `weights`.

        The guide that came with sd-webui-bayesian-merger froze base_beta for every method.
        """
        strange = tuple(f"_{letter}" for letter in ("alpha", "beta") if letter not in weights)
        return replace(
            self,
            freeze={n: value for n, value in self.freeze.items() if not n.endswith(strange)},
            ranges={n: limits for n, limits in self.ranges.items() if not n.endswith(strange)},
            # A group of which nothing is left stays, as messages count them.
            groups=[[n for n in group if not n.endswith(strange)] for group in self.groups],
        )


class _File(BaseModel):
    """The file's fields by the names that a configuration has for them; an empty one is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    freeze: dict[str, float] = Field({}, alias="frozen_params")
    ranges: dict[str, tuple[float, float]] = Field({}, alias="custom_ranges")
    groups: list[list[str]] = []

    @field_validator("freeze", "ranges", "groups", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: Any, info: Any) -> Any:
        return ([] if info.field_name == "groups" else {}) if value is None else value


def read(path: Path) -> Guide:
    """The guide at `path`; ConfigError with every mistake, one on a line."""
    where = f"search.guide: {path}"
    try:
        data = yml.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {one_line(error)}") from error
    if not isinstance(data, dict | None):
        raise ConfigError(f"{where}: no table of frozen_params, custom_ranges, groups")
    try:
        found = _File.model_validate({str(key): value for key, value in (data or {}).items()})
    except ValidationError as error:
        known = [field.alias or name for name, field in _File.model_fields.items()]
        mistakes = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            if detail["type"] == "extra_forbidden":
                mistakes.append(f"unknown key {key!r}{nearest(key, known)}")
            else:
                mistakes.append(f"{key}: {detail['msg']}")
        raise ConfigError("\n".join(f"{where}: {text}" for text in mistakes)) from None
    return Guide(where, found.freeze, found.ranges, found.groups)
