"""The two streams that commands print to."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment


def plain(text: str) -> str:
    """`text` without what a terminal would obey: names from files are anybody's."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class _Screen(Console):
    """Shows no text but plain one, whoever wrote it; what is obeyed is of this program alone."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            told = text if control else "\n".join(map(plain, text.split("\n")))
            yield Segment(told, style, control)


# What is printed holds names and reasons from files, which are not markup.
out = _Screen(highlight=False, markup=False, emoji=False)
err = _Screen(stderr=True, highlight=False, markup=False, emoji=False)


class Diagnostics(logging.Handler):
    """Prints what the log is told, which may quote servers and other programs."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), soft_wrap=True)
