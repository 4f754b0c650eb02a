"""YAML of anybody: plain data not much larger than the file, or an error in one line."""

from __future__ import annotations

from typing import Any

from yaml import MappingNode, Node, SafeLoader, YAMLError

from bayesian_merger.errors import one_line
from bayesian_merger.toml import require_short

_MOST_DIGITS = 1000
_GROWTH = 1_000_000  # characters and values that aliases may stand for in any file
_LONGEST = 300  # characters of what PyYAML says, which may quote the file


class _Dateless(SafeLoader):
    """YAML as Hydra reads it: what looks like a date is a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, looks) for tag, looks in known if not tag.endswith(":timestamp")]
        for first, known in SafeLoader.yaml_implicit_resolvers.items()
    }


def loads(text: str, *, dates: bool = True) -> Any:
    """The document as plain data; ValueError if it is not YAML, or grows without end by its aliases.

    Without `dates`, what looks like one is a text.
    """
    require_short(text)
    try:
        loader = SafeLoader(text) if dates else _Dateless(text)
        root = loader.get_single_node()
        if root is None:
            return None
        # No file that spells out all that it stands for has more than two values to a character.
        _require_small(root, _GROWTH + 2 * len(text), {})
        return loader.construct_document(root)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ValueError(one_line(error)[:_LONGEST]) from error
    except Exception as error:  # PyYAML raises anything for !!int of no number
        raise ValueError("a value is not of the kind that its tag (!!int) says") from error


def _require_small(node: Node, most: int, known: dict[int, int]) -> int:
    """The characters and values that a node stands for; ValueError if these are too many, or no text."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = most  # to what it is in itself
    line = node.start_mark.line + 1
    if isinstance(node.value, str):
        try:
            node.value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text in line {line} holds what is no character") from error
        if node.tag.endswith((":int", ":float")) and len(node.value) > _MOST_DIGITS:
            # Of base 60 ("1:30:00") it is read in a time by the square of its length.
            raise ValueError(f"the number in line {line} has more than {_MOST_DIGITS} digits")
        size = 1 + len(node.value)
    else:
        is_table = isinstance(node, MappingNode)
        parts = [part for pair in node.value for part in pair] if is_table else node.value
        size = 1 + sum(_require_small(part, most, known) for part in parts)
    if size > most:
        raise ValueError(
            f"what begins in line {line} is endless, or longer than {most} characters with its "
            f"aliases (*name) written out"
        )
    known[id(node)] = size
    return size
