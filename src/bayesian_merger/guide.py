"""The guide.yaml of sd-webui-bayesian-merger: what it froze, in which ranges it searched, its groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bayesian_merger.errors import ConfigError, one_line
from bayesian_merger.registry import nearest


class Guide(BaseModel):
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
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"search.guide: {path}: no such file") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"search.guide: {path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(data, dict | None):
        raise ConfigError(
            f"search.guide: {path}: no table of frozen_params, custom_ranges, groups"
        )
    try:
        return Guide.model_validate({str(key): value for key, value in (data or {}).items()})
    except ValidationError as error:
        known = [field.alias or name for name, field in Guide.model_fields.items()]
        mistakes = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            if detail["type"] == "extra_forbidden":
                mistakes.append(f"unknown key {key!r}{nearest(key, known)}")
            else:
                mistakes.append(f"{key}: {detail['msg']}")
        raise ConfigError(
            "\n".join(f"search.guide: {path}: {text}" for text in mistakes)
        ) from None
