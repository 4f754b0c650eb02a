"""Several servers as one back end: each gets the merge, and makes its share of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Thread
from typing import Any

from bayesian_merger.backends import Backend, Exclusive, Merge, Particular, Patient
from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.errors import ConfigError


class _Worker:
    """A thread that does one thing after another.

    It does not hold up the end of the program, as those of concurrent.futures do.
    """

    def __init__(self) -> None:
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def order() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # noqa: BLE001 - who waits raises it
                    future.set_exception(error)

        self._orders.put(order)
        return future

    def end(self) -> None:
        """Wait for the end of what has been submitted."""
        self._orders.put(None)
        self._thread.join()

    def _work(self) -> None:
        while order := self._orders.get():
            order()


class Spread:
    """Back ends of one kind, one for each server.

    An image of the panel is always made by the same server, so that merges are compared on pictures of
    the same machine.
    """

    is_remote = True

    def __init__(self, engines: Sequence[Backend]) -> None:
        self._engines = tuple(engines)
        self.batch = len(self._engines)
        self._workers = [_Worker() for _ in self._engines]

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

    def take(self) -> None:
        """Have all servers; ConfigError if another run has one."""
        for engine in self._engines:
            if isinstance(engine, Exclusive):
                engine.take()

    def load(self, recipe: Recipe, merged: Merge) -> None:
        """Make `merged` the model of all, at once; the first fault of any."""
        waiting = [
            worker.submit(engine.load, recipe, merged)
            for worker, engine in zip(self._workers, self._engines, strict=True)
        ]
        try:
            faults = [future.exception() for future in waiting]
        finally:
            for future in waiting:
                future.cancel()
        for fault in faults:
            if fault:
                raise fault

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        """One sample for each prompt, in order; the servers work side by side.

        Where one fails, what the others have made or begun comes first, and then the fault.
        """
        waiting = []
        for prompt in prompts:
            i = prompt.index % self.batch
            waiting.append(self._workers[i].submit(_one, self._engines[i], prompt))
        fault: BaseException | None = None
        try:
            for future in waiting:
                if fault is None or not future.cancel():
                    if error := future.exception():
                        fault = fault or error
                    else:
                        yield future.result()
            if fault:
                raise fault
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Close all, whatever befalls one of them, when each has ended what it is at."""
        for engine in self._engines:
            if isinstance(engine, Patient):
                engine.give_up()
        with ExitStack() as stack:
            for engine, worker in zip(self._engines, self._workers, strict=True):
                stack.callback(engine.close)
                stack.callback(worker.end)


def _one(engine: Backend, prompt: Prompt) -> Sample:
    (sample,) = engine.generate([prompt])
    return sample
