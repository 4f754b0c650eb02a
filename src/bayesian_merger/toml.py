"""TOML on every supported Python: the standard library's reader, or its backport on 3.10."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOMLDecodeError = tomllib.TOMLDecodeError


def loads(text: str) -> dict[str, Any]:
    """The document as plain data; TOMLDecodeError if it is not TOML or nested without end."""
    try:
        document: dict[str, Any] = tomllib.loads(text)
        return document
    except RecursionError:
        raise TOMLDecodeError("nested too deeply") from None
