"""The ways in which a merge reaches a server: as a file in its folder, or into its memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout
from platformdirs import user_state_path

from bayesian_merger.checkpoint import require_space, whole_file
from bayesian_merger.data import Recipe
from bayesian_merger.errors import ConfigError, RunError, TrialError
from bayesian_merger.guard import JOURNAL, STEM, Former, Guard, clear, journal_of, sweep
from bayesian_merger.handover import Handed, Handover
from bayesian_merger.server import Refused, Server, Strange
from bayesian_merger.stock import API, tables

Ask = Callable[..., Any]
"""Verb ("get", "post"), path, body and kind (a dict) -> the server's answer; TrialError."""

_EXTENSION = "/bayesian-merger/v1"
_NOTHING = Former()


class Claim:
    """A server, which one run of this user has at a time, whatever way its merges take.

    If this process is killed, a guard gives the server what it had and empties `folder`.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        # On a disk, and not among the merges, which may lie in memory.
        self._home = user_state_path("bayesian-merger", appauthor=False) / "servers" / server.key
        self._lock: FileLock | None = None
        self._guard: Guard | None = None
        self._token = ""

    @property
    def is_watched(self) -> bool:
        """Whether the guard is there."""
        return self._guard is not None

    def take(self) -> Former:
        """Have the server; what the run before has noted of it, if that did not give it back.

        ConfigError if another run has it, or if nothing can be noted.
        """
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            if not self._lock:
                lock = FileLock(self._home / ".lock")
                lock.acquire(timeout=0)
                self._lock = lock
            # First of all, so that the guard of a run before leaves the server alone.
            before, self._token = _former(journal_of(self._home)), secrets.token_hex(8)
            self._note(before)
        except Timeout:
            raise ConfigError(
                f"another run has the server at {self._server.url}; wait for it or stop it"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self._home}: cannot be written ({error.strerror})") from error
        return before

    def watch(self, former: Former = _NOTHING) -> None:
        """Empty the folder and note what the server had, which it gets if we are killed."""
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be made ({error.strerror})") from error
        self._note(former)
        sweep(self._folder)
        of = self._server
        self._guard = Guard(
            of.url,
            former,
            self._folder,
            self._home,
            self._token,
            of.auth_env,
            of.verify,
            of.wait_s,
        )

    def leave(self) -> None:
        """Nothing is to be given back any more: empty the folder, for anybody to have the server."""
        if self._guard:
            self._guard.dismiss()
        clear(self._folder, self._home)
        self._end()

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

    def _note(self, former: Former) -> None:
        text = json.dumps({**former._asdict(), "url": self._server.url, "token": self._token})
        with whole_file(self._home / JOURNAL) as file:
            file.write(text.encode())


def _former(journal: Mapping[str, Any]) -> Former:
    """What a journal says that the server had."""
    found = (journal.get("settings"), journal.get("options"))
    settings, options = ({**one} if isinstance(one, dict) else {} for one in found)
    return Former(str(journal.get("path", "")), settings, options)


class Delivery(Protocol):
    """A way. `folder` is for what is ours there, `name` what the server calls the merge that it has."""

    folder: Path
    name: str | None

    def require(self, n_bytes: int) -> None:
        """CheckpointError or ConfigError if there is no room for a merge of so many bytes."""
        ...

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

    def __init__(self, server: Server, models_dir: Path, ask: Ask) -> None:
        self.folder = models_dir / f"{STEM}{server.key}"
        self.name: str | None = None
        self._url, self._ask = server.url, ask
        self._held: Path | None = None

    def require(self, n_bytes: int) -> None:
        # The merge before stays until the server has taken the next.
        require_space(self.folder / f"{STEM}.safetensors", 2 * n_bytes)

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
        models = tables(self._ask("get", f"{API}/sd-models", kind=list))
        titles = [str(one.get("title")) for one in models]
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

    def __init__(self, server: Server, offer: Offer, ask: Ask) -> None:
        assert offer.folder
        self.folder = offer.folder
        self.name: str | None = None
        self._server, self._token, self._ask = server, offer.token, ask
        self._file: Handover | None = None

    def require(self, n_bytes: int) -> None:
        if fault := offered(self._server, n_bytes).fault:
            raise ConfigError(f"the server has no place for a merge: {fault}")

    def bring(self, recipe: Recipe, merged: Handed) -> None:
        name = f"{STEM}{recipe.digest()}"
        if self.name != name:
            self.name = None
            if not self.folder.is_dir():
                self._renew(merged)
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

    def _renew(self, merged: Handed) -> None:
        """Have the folder made again, which somebody has removed; RunError if it is not."""
        self.forget()
        self._token = renewed(self._server, self.folder, merged).token

    def _load(self, name: str) -> None:
        """TrialError if the receipt is not that of the merge."""
        assert self._file is not None
        live, nonce = self._file.probes(), secrets.token_hex(8)
        file = {"token": self._token, "file": self._file.path.name}
        order = {**file, "name": name, "nonce": nonce, "live": live}
        receipt = self._ask("post", f"{_EXTENSION}/load", order)
        if receipt.get("name") != name:
            told = str(receipt.get("name"))[:80]
            raise TrialError(f"the server did not take the merge, it has {told}")
        if receipt.get("nonce") != nonce:
            raise TrialError("the server's receipt is not of this merge, but an old one")
        self._file.confirm(receipt.get("live"), live)


class Offer(NamedTuple):
    """A place that our extension in a server has for merges, or why there is none."""

    folder: Path | None = None
    token: str = ""
    loader: str = ""
    fault: str = ""


def is_of_network(path: Path) -> bool:
    """Whether Windows would ask another machine for it, and tell that who we are."""
    return str(path).startswith(("\\\\", "//"))


def size_of(merged: Handed) -> int:
    """The bytes of a merge's tensors."""
    return sum(entry.n_bytes for entry in merged.layout.values())


def offered(server: Server, n_bytes: int) -> Offer:
    """Ask for a place for so many bytes; nothing and no fault without our extension."""
    try:
        found = server.look(f"{_EXTENSION}/place", {"bytes": n_bytes})
    except Refused as error:
        return Offer() if error.status in (404, 405) else Offer(fault=str(error))
    except Strange:
        return Offer()
    found = found if isinstance(found, dict) else {}
    folder = Path(str(found.get("folder")))
    is_near = folder.is_absolute() and not is_of_network(folder)
    if not (is_near and re.fullmatch(r"bayesian-merger-[0-9a-f]{8}", folder.name)):
        return Offer(fault="its answer names no place for merges")
    token = _token_in(folder)
    if not token or hashlib.sha256(token.encode()).hexdigest() != found.get("token_sha256"):
        return Offer(fault=f"its folder {folder} cannot be seen from here, or is another's")
    return Offer(folder, token, str(found.get("loader"))[:40])


def renewed(server: Server, folder: Path, merged: Handed) -> Offer:
    """The place in a folder that was removed, made again; RunError if it is not."""
    offer = offered(server, size_of(merged))
    if offer.folder != folder:
        raise RunError(f"{folder} is gone, and with it the place for merges; {offer.fault}")
    return offer


def _token_in(folder: Path) -> str:
    """What is in the file "token" of a folder of this user's alone; nothing if it is another's."""
    file = folder / "token"
    try:
        of_folder, of_file = folder.lstat(), file.lstat()
        if not (stat.S_ISDIR(of_folder.st_mode) and stat.S_ISREG(of_file.st_mode)):
            return ""
        if os.name != "nt" and (of_folder.st_uid != os.getuid() or of_folder.st_mode & 0o077):
            return ""
        return file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
