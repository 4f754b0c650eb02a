"""Images by a running webui: stable-diffusion-webui, Forge, reForge or SD.Next, by its HTTP API.

Of these servers a success proves nothing: unknown samplers are replaced, unknown checkpoints ignored.
So all names are looked up in the server's own lists before the run, and what an image was made with is
read back from its answer.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from bayesian_merger.backends import Merge, backend
from bayesian_merger.checkpoint import SUFFIXES
from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.delivery import (
    ByFile,
    Claim,
    Delivery,
    IntoMemory,
    is_of_network,
    offered,
    size_of,
)
from bayesian_merger.errors import ConfigError, RunError, TrialError, one_line
from bayesian_merger.guard import Former, is_given, is_ours, spellings
from bayesian_merger.pictures import decoded
from bayesian_merger.server import Refused, Server, Slow, Strange, is_here
from bayesian_merger.stock import (
    API,
    AUTOMATIC,
    SETTINGS,
    Stock,
    is_own,
    overridden,
    tables,
    taken,
    texts,
    vaes_of,
)

_log = logging.getLogger(__name__)
# A field that payloads have since 1.6 of stable-diffusion-webui.
_OF_1_6 = "refiner_checkpoint"
# How long a server that is away at the end is waited for; then its guard does so.
_LAST_WAIT_S = 3.0
# How often an image is begun anew, and why.
_ROUNDS = 5
_OTHER = "its checkpoint is changed"
_INTERRUPTED = "images are interrupted"
_LOST = "images are lost, or it cannot be seen whether they are whole,"


class _OtherModelError(TrialError):
    """The server has another checkpoint than the merge."""


class _InterruptedError(TrialError):
    """Somebody has interrupted the image."""


@backend
class WebUI:
    """A running stable-diffusion-webui, Forge, reForge or SD.Next, started with --api.

    If the webui has our extension and runs on this machine, each merge goes straight into its memory,
    unless `extension` is false. Otherwise it goes as a file into `models_dir`, the server's folder of
    checkpoints as it is seen from here (by default the one that the server names), and is removed after
    the next. At the end the server has its former checkpoint again. `timeout_s` is the longest that an
    image or the loading of a checkpoint may take, `wait_for_server` how long a server that has gone away
    is waited for ("10m"). The environment variable `auth_env` may hold "user:password" (--api-auth) or
    "Bearer TOKEN". `verify` false takes any TLS certificate.
    """

    batch = 1
    is_remote = True

    def __init__(
        self,
        url: str = "http://127.0.0.1:7860",
        models_dir: Path | None = None,
        extension: bool = True,
        timeout_s: float = 600.0,
        wait_for_server: str | float = "10m",
        auth_env: str = "BAYESIAN_MERGER_AUTH",
        verify: bool = True,
    ) -> None:
        """ConfigError for options that cannot be."""
        self._server = Server(url, timeout_s, wait_for_server, auth_env, verify)
        self._given_dir = models_dir
        self._wants_extension = extension
        self._delivery: Delivery | None = None
        self._tells_jobs = True
        # SD.Next's, which alone tells it, and lists only those of its settings that were ever changed.
        self._version: Mapping[str, Any] | None = None
        self._stock: Stock | None = None
        # What the server had before the run; the settings that payloads override, and as it has them.
        self._former = Former()
        self._overridden: Sequence[str] = ()
        self._usual: Mapping[str, Any] = {}
        self._n_lost = 0
        self._claim: Claim | None = None

    def check(
        self,
        prompts: Sequence[Prompt],
        architecture: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[str]:
        """Look up all that the prompts name in the server's lists; ConfigError with every mistake."""
        options = self._options()
        is_next = bool(self._version)
        self._stock = stock = taken(self._server, prompts, options, is_next)
        if stock.fields and _OF_1_6 not in stock.fields and not is_next:
            raise ConfigError(
                f"backend.url: the webui at {self._server.url} is older than version 1.6; update it"
            )
        mistakes = stock.mistakes(prompts)
        try:
            way = self._way(stock.models, shapes)
        except ConfigError as error:
            mistakes.append(str(error))
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        named = [name for prompt in prompts for name in overridden(prompt)]
        self._overridden = list(dict.fromkeys(named))
        # Each part of an image is a job of its own there.
        self._tells_jobs = not is_next
        kind = _kind(options, stock)
        if self._version:
            kind = f"SD.Next {self._version.get('commit', '')}".strip()[:40]
        notes = [f"{kind} at {self._server.url}; {way}"]
        if is_own(vae := options.get("sd_vae")):
            notes.append(f"the server uses its own VAE, {vae}, and not that of the merge")
        ignored = {
            prompt.scheduler
            for prompt in prompts
            for names in [stock.named(prompt)]
            if "scheduler" not in names and prompt.scheduler not in names["sampler_name"]
        }
        if ignored := ignored - {AUTOMATIC}:
            notes.append(
                f"the server has no choice of schedulers, so its own setting holds, not "
                f"{', '.join(sorted(ignored))}"
            )
        if stock.vaes is None and (vaes := {v for prompt in prompts for v in vaes_of(prompt)}):
            notes.append(
                f"the server tells of no VAEs, so nothing is known of {', '.join(sorted(vaes))} "
                f"(Forge takes them by its setting forge_additional_modules only)"
            )
        if modules := options.get("forge_additional_modules"):
            notes.append(
                f"Forge replaces parts of every merge: {', '.join(map(str, modules))[:200]}"
            )
        return notes

    def require(self, recipe: Recipe, merged: Merge) -> None:
        """ConfigError or CheckpointError if there is no room for the merge."""
        assert self._delivery is not None
        self._delivery.require(size_of(merged))

    def load(self, recipe: Recipe, merged: Merge) -> None:
        """Have the server make its images by the merge, and read back that it does."""
        self.take()
        assert self._delivery is not None
        before = self._delivery.name
        self._delivery.bring(recipe, merged)
        if self._delivery.name != before:
            # What was lost till it was read back that the server has it is of no account.
            self._n_lost = self._server.n_lost

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        """Images one by one, each with what the server says it was made with read back."""
        for prompt in prompts:
            yield Sample(self._image(prompt), prompt)

    def give_up(self) -> None:
        """From now on, wait no more for the server if it is away."""
        self._server.give_up()

    def close(self) -> None:
        """Give the server its former checkpoint back and remove the merge."""
        try:
            if self._claim:
                if self._claim.is_watched:
                    self._server.wait_s = min(self._server.wait_s, _LAST_WAIT_S)
                    self._give_back()
                else:
                    self._claim.abandon()
        except (RunError, TrialError) as error:
            # The guard does it, if the server is back soon, or the next run.
            _log.warning("the webui has not got its checkpoint back yet: %s", error)
            if self._claim:
                self._claim.abandon()
        finally:
            self._claim = None
            self._server.close()

    def _options(self) -> Mapping[str, Any]:
        """The server's settings, which tell that it is a webui; ConfigError if it is none."""
        url = self._server.url
        try:
            found = self._server.look(f"{API}/options")
        except Refused as error:
            if error.status == 404:
                advice = "start the webui with --api"
                if url.endswith(API):
                    advice = f"leave {API} out of its address"
                raise ConfigError(f"backend.url: {url} has no API; {advice}") from error
            other = ConfigError(f"backend.url: {url}{API}/options: {error}")
            raise self._server.denied(error) or other from error
        except Strange as error:
            raise ConfigError(f"backend.url: {url} is no webui: {error}") from error
        told = self._server.look_for(f"{API}/version")
        self._version = told if isinstance(told, dict) and "commit" in told else None
        if not isinstance(found, dict) or not ("sd_model_checkpoint" in found or self._version):
            raise ConfigError(f"backend.url: {url} is no webui that is known")
        return found

    def _way(
        self, models: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]
    ) -> str:
        """Choose how merges reach the server, and say it; ConfigError if there is no way."""
        why = ""
        if self._wants_extension:
            offer = offered(self._server, 2 * sum(math.prod(shape) for shape in shapes.values()))
            if offer.folder:
                self._delivery = IntoMemory(self._server, offer, self._asked)
                unused = "; backend.models_dir is not needed" if self._given_dir else ""
                return (
                    f"our extension there takes each merge into its memory, from {offer.folder} by the "
                    f"loader of {offer.loader}{unused}"
                )
            if offer.fault:
                why = f" (it has our extension, but: {offer.fault})"
        folder = self._folder(models)
        self._delivery = ByFile(self._server, folder, self._asked)
        return f"each merge is a file in {folder}{why}"

    def _folder(self, models: Sequence[Mapping[str, Any]]) -> Path:
        """The server's folder of checkpoints, as it is seen from here."""
        files = [str(one.get("filename") or "") for one in models]
        files = [file for file in files if not is_ours(file)]
        if self._given_dir is not None:
            folder = self._given_dir
            if not folder.is_dir():
                raise ConfigError(f"backend.models_dir: {folder} is no folder")
            names = {_name(file) for file in files}
            here = {path.name for path in folder.rglob("*") if path.is_file()}
            if names and not names & here:
                raise ConfigError(
                    f"backend.models_dir: {folder} has none of the {len(names)} checkpoints that the "
                    f"server lists (first: {min(names)}); name the folder in which it finds them"
                )
            return folder
        # A server elsewhere may name any folder of ours.
        is_own = is_here(urlsplit(self._server.url).hostname or "")
        seen = [Path(file) for file in files if is_own and not is_of_network(Path(file))]
        folders = [
            file.parent for file in seen if file.suffix.lower() in SUFFIXES and file.is_file()
        ]
        if not folders:
            first = f" (it has {files[0]})" if files else ""
            raise ConfigError(
                f"the server's folder of checkpoints cannot be seen from here{first}; name it as "
                f"backend.models_dir, by the path that it has on this machine"
            )
        # The folder itself rather than one below it.
        return min(folders, key=lambda folder: len(folder.parts))

    def take(self) -> None:
        """Have the server; what it had before is kept for later, and ConfigError if another run has it.

        Kept on the disk too, and with a guard, as this process may be killed.
        """
        assert self._delivery is not None
        self._claim = self._claim or Claim(self._server, self._delivery.folder)
        if self._claim.is_watched:
            return
        before = self._claim.take()
        options = self._asked("get", f"{API}/options")
        now = options.get("sd_model_checkpoint")
        now = now if isinstance(now, str) else ""
        if is_of_before := is_ours(now):  # of a run that was killed, and so was its guard
            now = str(before.settings.get("sd_model_checkpoint", ""))
        if not now and isinstance(told := self._server.look_for(f"{API}/checkpoint"), dict):
            now = str(told.get("title") or "")  # SD.Next, before anything was chosen there
        if not now or is_ours(now):
            models = tables(self._asked("get", f"{API}/sd-models", kind=list))
            titles = [str(one.get("title")) for one in models]
            now = next((title for title in titles if not is_ours(title)), "")
            if is_of_before:
                text = "%s has a merge of an earlier run, and nothing tells what it had before: %s"
                _log.warning(text, self._server.url, f"it will have {now}")
        # Where somebody has chosen another checkpoint since, its settings are somebody's too.
        left = before.options if is_of_before else {}
        known = {**options, **left}
        self._usual = {name: known[name] for name in self._overridden if name in options}
        self._former = Former(
            f"{API}/options",
            {"sd_model_checkpoint": now} if now else {},
            {**left, **self._usual},
        )
        self._claim.watch(self._former)

    def _give_back(self) -> None:
        """RunError or TrialError if the server does not take its checkpoint."""
        settings = self._former.settings
        if self._former.options:
            with suppress(TrialError):
                self._asked("post", f"{API}/options", self._former.options)
        if settings and not any(map(self._takes, spellings(settings))):
            raise TrialError(f"the server does not take {settings['sd_model_checkpoint']}")
        assert self._claim
        assert self._delivery
        self._delivery.forget()
        self._claim.leave()
        with suppress(TrialError, RunError):
            self._asked("post", f"{API}/refresh-checkpoints")

    def _takes(self, settings: Mapping[str, str]) -> bool:
        """Whether the server has the settings when it was asked to."""
        with suppress(TrialError):
            self._asked("post", f"{API}/options", settings)
            return is_given(self._asked("get", f"{API}/options"), settings)
        return False

    def _choose(self) -> None:
        assert self._delivery is not None
        self._delivery.choose()
        self._n_lost = self._server.n_lost

    def _image(self, prompt: Prompt) -> Image.Image:
        """The image of a prompt, made by the merge though the connection be lost in between."""
        fault, doubtful = "", set()
        for _ in range(_ROUNDS):
            if self._server.n_lost > self._n_lost or fault == _OTHER:
                self._choose()  # the server may have been started anew
            fault = _LOST
            try:
                image, is_whole = self._made(prompt)
            except _OtherModelError:
                fault = _OTHER
                continue
            except _InterruptedError:
                fault = _INTERRUPTED
                continue
            except TrialError:
                if self._server.n_lost == self._n_lost:
                    raise
                continue
            if self._server.n_lost == self._n_lost:
                # Two that are alike were not both interrupted.
                if is_whole or image.tobytes() in doubtful:
                    return image
                doubtful.add(image.tobytes())
        raise TrialError(f"the server at {self._server.url}: {fault} again and again")

    def _made(self, prompt: Prompt) -> tuple[Image.Image, bool]:
        """An image, and whether it is known that nobody has interrupted it."""
        assert self._stock
        wanted: dict[str, Any] = {
            "prompt": prompt.prompt,
            "negative_prompt": prompt.negative_prompt,
            "seed": prompt.seed,
            "width": prompt.width,
            "height": prompt.height,
            "steps": prompt.steps,
            "cfg_scale": prompt.cfg_scale,
            **self._stock.named(prompt),
        }
        # A webui whose file of settings lacks one that is overridden keeps it so for later images.
        if settings := {**self._usual, **overridden(prompt)}:
            wanted[SETTINGS] = settings
        always = {"batch_size": 1, "n_iter": 1, "save_images": False, "send_images": True}
        asked = {**always, **self._stock.hires(prompt), **prompt.extra, **wanted}
        try:
            answer = self._asked("post", f"{API}/txt2img", asked)
        except TrialError as error:
            raise TrialError(f"payload {prompt.payload}: {error}") from error
        images = answer.get("images")
        if not isinstance(images, list) or not images:
            raise TrialError("the server answered without an image")
        told = self._read_back(wanted, answer.get("info"))
        state = self._asked("get", f"{API}/progress?skip_current_image=true").get("state")
        state = state if isinstance(state, dict) else {}
        ours, latest = told.get("job_timestamp"), state.get("job_timestamp")
        is_whole = not (self._tells_jobs and ours and latest) or ours == latest
        # Of another job that has begun since, the state says nothing of ours.
        if is_whole and (state.get("interrupted") or state.get("skipped")):
            raise _InterruptedError("the image was interrupted in the webui")
        first = told.get("index_of_first_image")
        first = first if isinstance(first, int) and 0 <= first < len(images) else 0
        try:
            data = base64.b64decode(str(images[first]).rpartition(",")[2], validate=True)
        except ValueError as error:
            raise TrialError(f"the server's image cannot be read ({one_line(error)})") from error
        size = None if _changes_size(prompt) else (prompt.width, prompt.height)
        return decoded(data, size), is_whole

    def _read_back(self, wanted: Mapping[str, Any], info: object) -> Mapping[str, Any]:
        """What the server tells of an image; TrialError if it was made with anything else."""
        assert self._delivery is not None
        try:
            told = json.loads(info) if isinstance(info, str) else info
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise TrialError("the server does not say what the image was made with")
        lines = texts(told.get("infotexts"))
        line = lines[0].rpartition("\n")[2] if lines else ""
        said = dict(re.findall(r"(?:^|, )([A-Z][A-Za-z ]*): ([^,]*)", line))
        seeds = told.get("all_seeds")
        made: dict[str, Any] = {
            key: told.get(key) for key in ("width", "height", "steps", "cfg_scale", "sampler_name")
        }
        made["seed"] = seeds[0] if isinstance(seeds, list) and seeds else told.get("seed")
        if "Schedule type" in said:
            made["scheduler"] = said["Schedule type"]
        for key, value in made.items():
            if key in wanted and not self._is_alike(key, wanted, value):
                raise TrialError(
                    f"the image was asked for with {key} {wanted[key]}, and made with {value}"
                )
        model = str(told.get("sd_model_name") or said.get("Model") or "")
        if not model:  # the webui can be told not to say it
            model = str(self._asked("get", f"{API}/options").get("sd_model_checkpoint"))
        if not self._delivery.name or self._delivery.name not in model:
            raise _OtherModelError(f"the image was made by {model[:80]}, not by the merge")
        return told

    def _is_alike(self, key: str, wanted: Mapping[str, Any], made: object) -> bool:
        assert self._stock
        asked = wanted[key]
        if key == "scheduler" and made == AUTOMATIC and asked != AUTOMATIC:
            # So it calls a sampler's own schedule.
            own = self._stock.samplers[str(wanted["sampler_name"])].schedule
            return own == self._stock.schedulers[str(asked)].name
        if isinstance(asked, float) and isinstance(made, int | float):
            return math.isclose(asked, made)
        return bool(made == asked)

    def _asked(self, verb: str, path: str, body: Any = None, kind: type = dict) -> Any:
        """The answer, an empty one if it is of another kind; what the server refuses fails the trial."""
        try:
            found = self._server.get(path) if verb == "get" else self._server.post(path, body)
        except (Refused, Strange) as error:
            raise TrialError(f"the server: {error}") from error
        except Slow as error:
            raise TrialError(
                f"the server: {error}; is the webui busy with something else? Else raise "
                f"backend.timeout_s"
            ) from error
        return found if isinstance(found, kind) else kind()


def _changes_size(prompt: Prompt) -> bool:
    """Whether an image may have another size than its prompt: hires fix, scripts."""
    return any(prompt.extra.get(k) for k in ("enable_hr", "script_name", "alwayson_scripts"))


def _kind(options: Mapping[str, Any], stock: Stock) -> str:
    """Which webui it is; of stable-diffusion-webui which versions, as far as they differ for us."""
    for start, name in {"reforge_": "reForge", "forge_": "Forge"}.items():
        if any(option.startswith(start) for option in options):
            return name
    return f"stable-diffusion-webui {stock.versions}"


def _name(file: str) -> str:
    """The last part of a path of any system."""
    return PureWindowsPath(file).name
