"""The ways in which a merge reaches a server: as a file in its folder, or into its memory."""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from bayesian_merger.data import Recipe
from bayesian_merger.errors import ConfigError, RunError, TrialError
from bayesian_merger.guard import JOURNAL, STEM, Guard, journal_of, leave_folder, sweep
from bayesian_merger.handover import Handed, Handover
from bayesian_merger.server import Refused, Server, Strange

Ask = Callable[..., Any]
"""Verb ("get", "post"), path and body -> the server's answer, a table or a list; TrialError."""

API = "/sdapi/v1"
_EXTENSION = "/bayesian-merger/v1"


class Claim:
    """The folder of our merges for a server, which one run has at a time.

    If this process is killed, a guard gives the server its settings back and empties the folder.
    """

    def __init__(self, folder: Path, url: str, auth_env: str, verify: bool, wait_s: float) -> None:
        self.folder = folder
        self._url, self._options = url, (auth_env, verify, wait_s)
        self._lock: FileLock | None = None
        self._guard: Guard | None = None
        self._token = ""

    @property
    def is_watched(self) -> bool:
        """Whether the guard is there."""
        return self._guard is not None

    def take(self) -> Mapping[str, Any]:
        """Have the folder, and what its journal says of the run before.

        ConfigError if another run has it, or if it cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            if not self._lock:
                lock = FileLock(self.folder / ".lock")
                lock.acquire(timeout=0)
                self._lock = lock
            # First of all, so that the guard of a run before leaves the folder alone.
            before, self._token = journal_of(self.folder), secrets.token_hex(8)
            self._note(before)
        except Timeout:
            raise ConfigError(
                f"{self.folder}: another run has the server at {self._url}; wait for it or stop it"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error.strerror})") from error
        return before

    def watch(self, path: str = "", settings: Mapping[str, str] | None = None) -> None:
        """Empty the folder and note the settings, which are posted to `path` if we are killed."""
        settings = settings or {}
        self._note(settings)
        sweep(self.folder)
        self._guard = Guard(self._url, path, settings, self.folder, self._token, *self._options)

    def leave(self) -> None:
        """Nothing is to be given back any more: empty the folder, for anybody to have it."""
        if self._guard:
            self._guard.dismiss()
        self._end()
        leave_folder(self.folder)

    def abandon(self) -> None:
        """Leave it to the guard, or to the next run."""
        if self._guard:
            self._guard.leave()
        self._end()

    def _end(self) -> None:
        self._guard = None
        if self._lock:
            self._lock.release()
            self._lock = None

    def _note(self, journal: Mapping[str, Any]) -> None:
        text = json.dumps({**journal, "token": self._token})
        (self.folder / JOURNAL).write_text(text, encoding="utf-8")


class Delivery(Protocol):
    """A way. `folder` is for what is ours there, `name` what the server calls the merge that it has."""

    folder: Path
    name: str | None

    def bring(self, recipe: Recipe, merged: Handed) -> None:
        """Have the server make its images by the merge.

        TrialError if it does not; RunError if it never will.
        """
        ...

    def choose(self) -> None:
        """Have it do so again, after it was started anew or somebody chose another checkpoint."""
        ...

    def forget(self) -> None:
        """Let go of the files, which may be removed then."""
        ...


class ByFile:
    """A file in the server's folder of checkpoints, which it is told to choose."""

    def __init__(self, url: str, models_dir: Path, ask: Ask) -> None:
        place = hashlib.sha256(url.encode()).hexdigest()[:8]
        self.folder = models_dir / f"{STEM}{place}"
        self.name: str | None = None
        self._url, self._ask = url, ask
        self._held: Path | None = None

    def bring(self, recipe: Recipe, merged: Handed) -> None:
        path = self.folder / f"{STEM}{recipe.digest()}.safetensors"
        if self._held != path:
            merged.write_file(path)
            try:
                self._choose(path)
            except BaseException:
                sweep(self.folder, self._held)
                raise
            self._held, self.name = path, path.stem
            sweep(self.folder, path)

    def choose(self) -> None:
        assert self._held is not None
        self._choose(self._held)

    def forget(self) -> None:
        self._held = self.name = None

    def _choose(self, path: Path) -> None:
        """Have the server load the file; RunError if it sees none, TrialError if it does not load."""
        self._ask("post", f"{API}/refresh-checkpoints")
        models = self._ask("get", f"{API}/sd-models")
        titles = [str(one.get("title")) for one in models if isinstance(one, dict)]
        title = next((title for title in titles if path.stem in title), None)
        if title is None:
            raise RunError(
                f"the server at {self._url} does not see {path}; name the folder in which it "
                f"finds its checkpoints as backend.models_dir"
            )
        self._ask("post", f"{API}/options", {"sd_model_checkpoint": title})
        now = str(self._ask("get", f"{API}/options").get("sd_model_checkpoint"))
        if path.stem not in now:
            raise TrialError(f"the server did not take the merge, it has {now}")


class IntoMemory:
    """A file that our extension in the server loads from memory; it tells what the model then is."""

    def __init__(self, folder: Path, token: str, ask: Ask) -> None:
        self.folder = folder
        self.name: str | None = None
        self._token, self._ask = token, ask
        self._file: Handover | None = None
        self._generation = 0

    def bring(self, recipe: Recipe, merged: Handed) -> None:
        name = f"{STEM}{recipe.digest()}"
        if self.name != name:
            self.name = None
            if self._file is None:
                self._file = Handover(self.folder / f"{STEM}{self._token[:16]}.safetensors")
            self._file.put(merged)
            self._load(name)
            self.name = name

    def choose(self) -> None:
        assert self.name is not None
        self._load(self.name)

    def forget(self) -> None:
        if self._file:
            self._file.close()
        self._file = self.name = None

    def _load(self, name: str) -> None:
        """TrialError if the receipt is not that of the merge."""
        assert self._file is not None
        live = self._file.probes()
        order = {"token": self._token, "file": self._file.path.name, "name": name, "live": live}
        receipt = self._ask("post", f"{_EXTENSION}/load", order)
        receipt = receipt if isinstance(receipt, dict) else {}
        generation = receipt.get("generation")
        if receipt.get("name") != name:
            raise TrialError(f"the server did not take the merge, it has {receipt.get('name')}")
        if not isinstance(generation, int) or generation <= self._generation:
            raise TrialError(f"the server's receipt is an old one, number {generation}")
        self._generation = generation
        self._file.confirm(receipt.get("live"), live)


class Offer(NamedTuple):
    """A place that our extension in a server has for merges, or why there is none."""

    folder: Path | None = None
    token: str = ""
    loader: str = ""
    fault: str = ""


def offered(server: Server, shapes: Mapping[str, tuple[int, ...]]) -> Offer:
    """Ask for a place for merges of two bytes a value; nothing and no fault without our extension."""
    n_bytes = 2 * sum(math.prod(shape) for shape in shapes.values())
    try:
        found = server.look(f"{_EXTENSION}/place", {"bytes": n_bytes})
    except Refused as error:
        return Offer() if error.status in (404, 405) else Offer(fault=str(error))
    except Strange:
        return Offer()
    found = found if isinstance(found, dict) else {}
    folder, token = Path(str(found.get("folder"))), str(found.get("token"))
    is_place = folder.is_absolute() and re.fullmatch(r"bayesian-merger-[0-9a-f]{8}", folder.name)
    if not is_place or not re.fullmatch(r"[0-9a-f]{32}", token):
        return Offer(fault="its answer names no place for merges")
    try:
        is_here = (folder / "token").read_text(encoding="ascii") == token
    except (OSError, ValueError):
        is_here = False
    if not is_here:
        return Offer(fault=f"its folder {folder} cannot be seen from here")
    return Offer(folder, token, str(found.get("loader"))[:40])
