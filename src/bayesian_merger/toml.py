"""TOML on every supported Python: the standard library's reader, or its backport on 3.10."""

from __future__ import annotations

import re
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOMLDecodeError = tomllib.TOMLDecodeError
_MOST = 2**23  # characters of a file, which may hold pictures
_MOST_PIECES = 100_000  # lines and commas
# The reader takes time and memory by the square of the parts of a key; twenty words may well follow each
# other in a text.
_DOTTED = re.compile(
    r"""(?:^|[\[{,])[ \t]*(?:(?:[\w-]+|"(?:[^"\\\n]|\\.){0,200}"|'[^'\n]{0,200}')[ \t]*\.[ \t]*){20}""",
    re.MULTILINE,
)


def loads(text: str) -> dict[str, Any]:
    """The document as plain data; TOMLDecodeError if it is not TOML, too large or nested without end."""
    try:
        require_short(text)
    except ValueError as error:
        raise TOMLDecodeError(str(error)) from None
    if found := _DOTTED.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise TOMLDecodeError(f"nested too deeply (line {line} has a key of more than 20 parts)")
    try:
        document: dict[str, Any] = tomllib.loads(text)
        return document
    except RecursionError:
        raise TOMLDecodeError("nested too deeply") from None


def require_short(text: str) -> None:
    """ValueError for what takes a reader of TOML or YAML many seconds."""
    if len(text) > _MOST:
        raise ValueError(f"more than {_MOST} characters")
    if len(text.splitlines()) + text.count(",") > _MOST_PIECES:
        raise ValueError(f"more than {_MOST_PIECES} lines and commas")
