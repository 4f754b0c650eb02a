"""YAML as plain data. Its aliases are refused, by which a few lines can stand for billions."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.events import AliasEvent

YAMLError = yaml.YAMLError


class Loader(yaml.SafeLoader):
    """Makes nothing but plain data, of what the file itself spells out."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """What YAML calls a node; ComposerError for an alias."""
        if self.check_event(AliasEvent):
            found = self.peek_event()  # type: ignore[no-untyped-call]
            raise ComposerError(
                None, None, f"the alias *{found.anchor}; write out what it means", found.start_mark
            )
        return super().compose_node(parent, index)


def loads(text: str, loader: type[Loader] = Loader) -> Any:
    """The document as plain data; YAMLError, ValueError or RecursionError if it is none."""
    return yaml.load(text, loader)
