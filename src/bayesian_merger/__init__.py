"""Finds the merge of Stable Diffusion checkpoints that makes the best images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesian_merger.results import Results as Results
    from bayesian_merger.study.search import Search as Search

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Optuna takes a second to import, which `--help` need not wait for.
    if name == "Search":
        from bayesian_merger.study.search import Search

        return Search
    if name == "Results":
        from bayesian_merger.results import Results

        return Results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
