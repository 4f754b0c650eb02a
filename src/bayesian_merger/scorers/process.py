"""A scorer in a process of its own: any language, any environment, JSON lines in and out."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from PIL import Image

from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.scorers import About, scorer

_log = logging.getLogger(__name__)
# How often it is started anew for the same images.
_STARTS = 3
_LONGEST_LINE = 1 << 20
_LAST_WAIT_S = 3.0
# After so long it is told that the program is waited for.
_SILENT_S = 10.0


@scorer
class Process:
    """A program that reads lines of JSON, one for each image, and answers each with a line.

    It is started once, in `folder` (the configuration's by default), by `command`, in which "python" is
    the Python of this program. A line has "id", "image" (the path of a PNG file), "prompt",
    "negative_prompt", "seed" and "payload"; the answer has the "id" and a "score", or an "error", which
    fails the trial. Lines may be answered in any order. A program that dies is started anew; one that
    takes longer than `timeout_s` for an image, or `start_timeout_s` for the first, is stopped.
    """

    about = About("as the program says", "image and prompt", needs="a program of yours")

    def __init__(
        self,
        command: list[str],
        folder: Path = Path(),
        timeout_s: float = 60.0,
        start_timeout_s: float = 300.0,
    ) -> None:
        """ConfigError if it cannot be started, or does not answer a first, grey image."""
        if not command or not all(command):
            raise ConfigError("scorers.process.command names no program")
        if not (0 < timeout_s < math.inf and 0 < start_timeout_s < math.inf):
            raise ConfigError("scorers.process.timeout_s must be more than 0")
        found = sys.executable if command[0] == "python" else _program(command[0], folder)
        if not found:
            raise ConfigError(
                f"scorers.process.command: there is no program {command[0]!r}, neither by its path nor "
                f"in {folder.absolute()}"
            )
        self._command = [found, *command[1:]]
        self._folder, self._timeout_s, self._start_timeout_s = folder, timeout_s, start_timeout_s
        self._child: _Child | None = None
        self._n_asked, self._has_answered = 0, False
        try:
            self([Sample(Image.new("RGB", (64, 64), "grey"), Prompt(0, "first", "a picture", 0))])
        except _SaidError:
            pass  # it may want another picture, but it answers
        except TrialError as error:
            raise ConfigError(f"scorers.process: {error}") from error

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        if not samples:
            return []
        with tempfile.TemporaryDirectory(prefix="bayesian-merger-") as place:
            lines: dict[int, str] = {}
            for sample in samples:
                self._n_asked += 1
                path = Path(place) / f"{self._n_asked}.png"
                sample.image.save(path, compress_level=1)
                lines[self._n_asked] = json.dumps(
                    {
                        "id": self._n_asked,
                        "image": str(path),
                        "prompt": sample.prompt.prompt,
                        "negative_prompt": sample.prompt.negative_prompt,
                        "seed": sample.prompt.seed,
                        "payload": sample.prompt.payload,
                    }
                )
            found = self._answers(lines)
        return [found[number] for number in lines]

    def _answers(self, lines: dict[int, str]) -> dict[int, float]:
        """Number of a line -> its score; TrialError if one is not to be had."""
        found: dict[int, Any] = {}
        fault = ""
        # One that has never answered will not do so the next time.
        n_starts = _STARTS if self._has_answered else 1
        for _ in range(n_starts):
            if self._child is None:
                self._child = _Child(self._command, self._folder, self._start_timeout_s)
            child = self._child
            try:
                child.ask([line for number, line in lines.items() if number not in found])
                while len(found) < len(lines):
                    told = child.answer(self._timeout_s)
                    if told["id"] in lines:
                        found[told["id"]] = told
                self._has_answered = True
                # All of them, as it should not be at images by then that are gone.
                return {number: _score_of(told, child.name) for number, told in found.items()}
            except _DeadError as error:
                fault = str(error)
                self._child = None
                if n_starts > 1:
                    _log.warning("%s has died, and is started anew (%s)", child.name, fault)
            except _SlowError:
                child.end()
                self._child = None
                raise
        often = " again and again" if n_starts > 1 else ""
        raise TrialError(f"{self._command[-1]} has died{often}: {fault}")


class _SaidError(TrialError):
    """The program says that it cannot score an image."""


class _SlowError(TrialError):
    """The program takes too long."""


class _DeadError(Exception):
    """The program has ended."""


class _Child:
    """A program that runs. What it says is read by threads, so that no pipe is ever full."""

    def __init__(self, command: Sequence[str], folder: Path, first_timeout_s: float) -> None:
        more: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is not for it
        if sys.platform == "win32":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
            more = {"creationflags": flags}
        try:
            self._process = subprocess.Popen(
                list(command),
                cwd=folder,
                # What it prints must not wait in a buffer.
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                **more,
            )
        except OSError as error:
            raise TrialError(f"{command[0]} cannot be started ({error.strerror})") from error
        self.name = command[-1] if len(command) > 1 else command[0]
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._complaints: deque[str | None] = deque(maxlen=20)
        self._first_timeout_s: float | None = first_timeout_s
        assert self._process.stdout
        assert self._process.stderr
        # None of these may hold on to this object, whose end is that of the program.
        heard = (
            (self._process.stdout, self._said.put),
            (self._process.stderr, self._complaints.append),
        )
        self._threads = [threading.Thread(target=_read, args=one, daemon=True) for one in heard]
        for thread in self._threads:
            thread.start()
        self._writers: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _end, self._process, self._threads, self._writers)

    def ask(self, lines: Sequence[str]) -> None:
        """Hand it the lines, without waiting for it to read them."""
        assert self._process.stdin
        text = "".join(f"{line}\n" for line in lines)
        writer = threading.Thread(target=_write, args=(self._process.stdin, text), daemon=True)
        self._writers[:] = [one for one in self._writers if one.is_alive()] + [writer]
        writer.start()

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next answer; what is none is passed over."""
        allowed = self._first_timeout_s or timeout_s
        end = time.monotonic() + allowed
        silent_till = time.monotonic() + _SILENT_S
        while True:
            try:
                line = self._said.get(timeout=max(0.0, min(end, silent_till) - time.monotonic()))
            except queue.Empty:
                if time.monotonic() < end:
                    silent_till = math.inf
                    _log.warning("waiting for %s, up to %g s", self.name, allowed)
                    continue
                option = "start_timeout_s" if self._first_timeout_s else "timeout_s"
                last = self._last_line()
                raise _SlowError(
                    f"{self.name} has not answered in {allowed:g} s{last}; raise {option} if it needs "
                    f"longer"
                ) from None
            if line is None:
                if not self._finalizer.alive:  # by us, as the whole run ends
                    raise TrialError(f"{self.name} was ended")
                raise _DeadError(self._last_words())
            told = _answer_in(line)
            if told is None:
                self._complaints.append(line)
                continue
            self._first_timeout_s = None
            return told

    def end(self) -> None:
        """Stop it."""
        self._finalizer()

    def _last_words(self) -> str:
        """How it ended, and what it said last."""
        self.end()
        return f"exit code {self._process.returncode}{self._last_line()}"

    def _last_line(self) -> str:
        """What it said last that is no answer, after a colon."""
        lines = [line.strip() for line in [*self._complaints] if line and line.strip()]
        return f": {lines[-1][:300]}" if lines else ""


def _read(stream: IO[str], hear: Callable[[str | None], None]) -> None:
    """Every line, none of them endless, and at last None."""
    with suppress(ValueError, OSError):  # closed by the end of us
        while line := stream.readline(_LONGEST_LINE):
            hear(line)
    hear(None)


def _write(stream: IO[str], text: str) -> None:
    with suppress(ValueError, OSError):  # that it has ended is told by its output
        stream.write(text)
        stream.flush()


def _answer_in(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_answer = isinstance(found, dict) and type(found.get("id")) is int
    return found if is_answer and ("score" in found or "error" in found) else None


def _score_of(told: Mapping[str, Any], name: str) -> float:
    """The score of an answer; TrialError if it has none."""
    if "error" in told:
        raise _SaidError(f"{name}: {' '.join(str(told['error']).split())[:300]}")
    score = told["score"]
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise TrialError(f"{name} answered without a score: {json.dumps(told)[:200]}")
    return float(score)


def _end(
    process: subprocess.Popen[str],
    readers: Sequence[threading.Thread],
    writers: Sequence[threading.Thread],
) -> None:
    """Close its input, by which it should end, and stop it if it does not."""
    # What does not read cannot be told, and who writes to it holds the pipe.
    if any(writer.is_alive() for writer in writers):
        process.kill()
        for writer in writers:
            writer.join(_LAST_WAIT_S)
    with suppress(OSError):
        if process.stdin:
            process.stdin.close()
    try:
        process.wait(_LAST_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for reader, stream in zip(readers, (process.stdout, process.stderr), strict=True):
        # A child that it has left behind may hold the pipe open.
        reader.join(_LAST_WAIT_S)
        if stream and not reader.is_alive():
            stream.close()


def _program(name: str, folder: Path) -> str | None:
    """A program by its path from the folder, or by its name there or where the system looks."""
    place = folder.absolute()
    if Path(name).name != name:
        return shutil.which(place / name)
    return shutil.which(
        name, path=os.pathsep.join([str(place), os.environ.get("PATH", os.defpath)])
    )
