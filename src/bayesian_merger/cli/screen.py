"""The two streams that commands print to."""

from __future__ import annotations

from rich.console import Console

# What is printed holds names and reasons from files, which are not markup.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def plain(text: str) -> str:
    """`text` without what a terminal would obey: names from files are anybody's."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
