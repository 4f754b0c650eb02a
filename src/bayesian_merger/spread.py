"""Several servers as one back end: each gets the merge, and makes its share of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from bayesian_merger.backends import Backend, Merge, Particular
from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.errors import ConfigError


class Spread:
    """Back ends of one kind, one for each server.

    An image of the panel is always made by the same server, so that merges are compared on pictures of
    the same machine.
    """

    is_remote = True

    def __init__(self, engines: Sequence[Backend]) -> None:
        self._engines = tuple(engines)
        self.batch = len(self._engines)
        self._threads = [ThreadPoolExecutor(1) for _ in self._engines]

    def check(
        self,
        prompts: Sequence[Prompt],
        architecture: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[str]:
        """The warnings of all; ConfigError with the mistakes of all."""
        notes: list[str] = []
        mistakes: list[str] = []
        for engine in self._engines:
            try:
                notes += engine.check(prompts, architecture, shapes)
            except ConfigError as error:
                mistakes.append(str(error))
        if mistakes:
            raise ConfigError("\n".join(dict.fromkeys(mistakes)))
        return list(dict.fromkeys(notes))

    def require(self, recipe: Recipe, merged: Merge) -> None:
        """ConfigError for a merge that one of them cannot load."""
        for engine in self._engines:
            if isinstance(engine, Particular):
                engine.require(recipe, merged)

    def load(self, recipe: Recipe, merged: Merge) -> None:
        """Make `merged` the model of all, at once; the first fault of any."""
        self._at_once([(one.load, (recipe, merged)) for one in self._engines])

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        """One sample for each prompt, in order; the servers work side by side."""
        waiting = [
            self._threads[prompt.index % self.batch].submit(
                _one, self._engines[prompt.index % self.batch], prompt
            )
            for prompt in prompts
        ]
        try:
            for future in waiting:
                yield future.result()
        finally:
            _end(waiting)

    def close(self) -> None:
        """Close all, whatever befalls one of them."""
        with ExitStack() as stack:
            for engine, thread in zip(self._engines, self._threads, strict=True):
                stack.callback(engine.close)
                stack.callback(thread.shutdown, cancel_futures=True)

    def _at_once(self, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        waiting = [
            thread.submit(function, *arguments)
            for thread, (function, arguments) in zip(self._threads, calls, strict=True)
        ]
        try:
            for future in waiting:
                future.result()
        finally:
            _end(waiting)


def _one(engine: Backend, prompt: Prompt) -> Sample:
    (sample,) = engine.generate([prompt])
    return sample


def _end(waiting: Sequence[Future[Any]]) -> None:
    """Begin nothing more, and wait for what has begun: a server has one thing to do at a time."""
    for future in waiting:
        future.cancel()
    for future in waiting:
        if not future.cancelled():
            future.exception()
