"""What a webui has: samplers, schedules, upscalers and more; and what payloads name that it lacks.

Of what these servers lack they ignore or replace the name in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, NamedTuple

from bayesian_merger.data import Prompt
from bayesian_merger.errors import ConfigError
from bayesian_merger.registry import nearest
from bayesian_merger.server import Refused, Server, Strange

API = "/sdapi/v1"
AUTOMATIC = "Automatic"
SETTINGS = "override_settings"

# The schedules of stable-diffusion-webui 1.9.0 to 1.9.2, which have them and do not list them.
_UNLISTED = ("Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform")
# Fields that would take another model than the merge, or give no image back.
_REFUSED = {
    "send_images": "the images are needed",
    "force_task_id": "each image is a task of its own",
    "refiner_checkpoint": "it would take another model than the merge",
    "hr_checkpoint_name": "it would take another model than the merge",
}
# Settings that would do so too; those by which a server puts a part of its own into every model.
_OF_MODELS = ("sd_model_checkpoint", "sd_checkpoint_hash", "forge_additional_modules")
_OWN_PARTS = {"sd_unet": "U-Net", "sd_text_encoder": "text encoder"}
_NONE = ("automatic", "none", "default", "")
_LORA = re.compile(r"<lora:([^:>]+)")
_MOST_NAMED = 4


class Sampler(NamedTuple):
    """A sampler of the server: its name, and the schedule that it has by itself."""

    name: str
    schedule: str | None


class Scheduler(NamedTuple):
    """A noise schedule of the server: as its answers name it, and as samplers do."""

    label: str
    name: str


class Stock(NamedTuple):
    """What the server has, by every spelling that it takes; None for what it does not tell."""

    samplers: Mapping[str, Sampler]
    schedulers: Mapping[str, Scheduler]
    upscalers: Sequence[str] | None
    styles: Sequence[str] | None
    loras: Sequence[str] | None
    vaes: Sequence[str] | None
    scripts: Sequence[str] | None
    models: Sequence[Mapping[str, Any]]
    fields: Sequence[str] | None
    settings: Mapping[str, Any]
    tells_all_settings: bool

    @property
    def versions(self) -> str:
        """Of stable-diffusion-webui which versions have this, as far as they differ for us."""
        labels = {known.label for known in self.schedulers.values()}
        if labels == {*_UNLISTED}:
            return "1.9.0 to 1.9.2"
        return "1.9.3 or later" if labels else "1.6 to 1.8"

    def named(self, prompt: Prompt) -> dict[str, str]:
        """Sampler and schedule as this server calls them; ConfigError if it has none of the name."""
        sampler, scheduler = prompt.sampler_name, prompt.scheduler
        labels = list(dict.fromkeys(known.label for known in self.schedulers.values()))
        if sampler not in self.samplers:
            # "DPM++ 2M Karras" is two names since 1.9 of stable-diffusion-webui.
            ends = [end for end in self.schedulers if sampler.endswith(f" {end}")]
            split = next(
                (end for end in ends if sampler.removesuffix(f" {end}") in self.samplers), None
            )
            if split is not None and scheduler in (AUTOMATIC, split):
                sampler, scheduler = sampler.removesuffix(f" {split}"), split
        if not self.schedulers and scheduler != AUTOMATIC:
            joined = f"{sampler} {scheduler}"
            if joined in self.samplers:
                return {"sampler_name": self.samplers[joined].name}
            if any(name.endswith(" Karras") for name in self.samplers):
                raise ConfigError(
                    f"the server has no sampler {joined!r}; leave out the scheduler, or choose another "
                    f"sampler"
                )
        if sampler not in self.samplers:
            both = [f"{one} {label}" for one in self.samplers for label in labels]
            hint = nearest(sampler, [*self.samplers, *both], cutoff=0.8)
            hint = hint or f"; it has: {', '.join(list(self.samplers)[:30])}"
            raise ConfigError(f"the server has no sampler {sampler!r}{hint}")
        if not self.schedulers:
            return {"sampler_name": self.samplers[sampler].name}
        if scheduler not in self.schedulers and scheduler != AUTOMATIC:
            hint = nearest(scheduler, labels) or f"; it has: {', '.join(labels)}"
            raise ConfigError(f"the server has no scheduler {scheduler!r}{hint}")
        schedule = self.schedulers.get(scheduler)
        return {
            "sampler_name": self.samplers[sampler].name,
            "scheduler": schedule.label if schedule else AUTOMATIC,
        }

    def mistakes(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the server would ignore, replace or refuse of all that the prompts name, in words."""
        found: dict[str, list[str]] = {}
        for prompt in prompts:
            for mistake in self._mistakes_of(prompt):
                found.setdefault(mistake, []).append(prompt.payload)
        told = []
        for mistake, payloads in found.items():
            names = list(dict.fromkeys(payloads))
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            told.append(f"payload {', '.join(names[:_MOST_NAMED])}{more}: {mistake}")
        return [*told, *self._own_parts()]

    def hires(self, prompt: Prompt) -> dict[str, Any]:
        """What Forge needs of a prompt with hires fix as its page sends it, and its API does not."""
        of_page = {"hr_additional_modules": ["Use same choices"], "hr_cfg": prompt.cfg_scale}
        if not prompt.extra.get("enable_hr"):
            return {}
        return {name: value for name, value in of_page.items() if name in (self.fields or ())}

    def _own_parts(self) -> Iterator[str]:
        for name, part in _OWN_PARTS.items():
            if is_own(own := self.settings.get(name)):
                yield (
                    f"the server puts a {part} of its own into every model, {own}; choose None as its "
                    f"setting {name}"
                )

    def _mistakes_of(self, prompt: Prompt) -> Iterator[str]:
        try:
            self.named(prompt)
        except ConfigError as error:
            yield str(error)
        for name, value in prompt.extra.items():
            if name in _REFUSED and not (name == "send_images" and value is True):
                yield f"leave out {name}, {_REFUSED[name]}"
            elif self.fields is not None and name not in self.fields:
                yield f"the server knows no field {name!r}{nearest(name, self.fields)}"
        if not isinstance(prompt.extra.get(SETTINGS, {}), dict):
            yield f"{SETTINGS} is no table"
        for name in overridden(prompt):
            if name in _OF_MODELS or name in _OWN_PARTS:
                yield f"{SETTINGS}.{name} would take another model than the merge"
            elif self.tells_all_settings and name not in self.settings:
                yield f"the server has no setting {name!r}{nearest(name, self.settings)}"
        styles, scripts = (prompt.extra.get(name) for name in ("styles", "alwayson_scripts"))
        if styles and not isinstance(styles, list):
            yield "styles is no list"
        if scripts and not isinstance(scripts, dict):
            yield "alwayson_scripts is no table"
        for kind, wanted, known in self._wares(prompt):
            if known is not None and wanted.casefold() not in map(str.casefold, known):
                yield f"the server has no {kind} {wanted!r}{nearest(wanted, known)}"

    def _wares(self, prompt: Prompt) -> Iterator[tuple[str, str, Iterable[str] | None]]:
        """All else that a prompt names: its kind, its name, and what the server has of the kind."""
        extra = prompt.extra
        styles, scripts = extra.get("styles"), extra.get("alwayson_scripts")
        for style in styles if isinstance(styles, list) else ():
            yield "style", str(style), self.styles
        for script in (*(scripts if isinstance(scripts, dict) else ()), extra.get("script_name")):
            if script:
                yield "script", str(script), self.scripts
        for name in _loras(prompt):
            yield "LoRA", name, self.loras
        for name in vaes_of(prompt):
            yield "VAE", name, self.vaes
        if not extra.get("enable_hr"):
            return
        schedulers = [*self.schedulers, "Use same scheduler"] if self.schedulers else None
        of_hr: Mapping[str, tuple[str, Iterable[str] | None]] = {
            "hr_upscaler": ("upscaler", self.upscalers),
            "hr_sampler_name": ("sampler", [*self.samplers, "Use same sampler"]),
            "hr_scheduler": ("scheduler", schedulers),
        }
        for key, (kind, known) in of_hr.items():
            if extra.get(key):
                yield kind, str(extra[key]), known


def taken(
    server: Server, prompts: Sequence[Prompt], settings: Mapping[str, Any], is_next: bool
) -> Stock:
    """What the server has now; ConfigError if it does not tell of its samplers and checkpoints.

    Its LoRAs and VAEs are looked for anew if it lacks one that the prompts name. SD.Next does not tell
    of all its `settings`, and finds LoRAs by more than their names.
    """
    samplers: dict[str, Sampler] = {}
    for one in tables(_needed(server, "samplers")):
        options = one.get("options")
        own = options.get("scheduler") if isinstance(options, dict) else None
        found = Sampler(str(one.get("name")), own)
        for spelling in (found.name, *texts(one.get("aliases"))):
            samplers.setdefault(spelling, found)
    schedulers: dict[str, Scheduler] = {}
    for one in tables(server.look_for(f"{API}/schedulers")):
        schedule = Scheduler(str(one.get("label", one.get("name"))), str(one.get("name")))
        for spelling in (*schedule, *texts(one.get("aliases"))):
            schedulers.setdefault(spelling, schedule)
    fields = _fields(server)
    if not schedulers and "scheduler" in (fields or ()):
        schedulers = {name: Scheduler(name, name.casefold()) for name in _UNLISTED}
    loras = None
    if not is_next:
        wanted = {name for prompt in prompts for name in _loras(prompt)}
        loras = _names_anew(server, "loras", "name", "alias", refresh="refresh-loras", of=wanted)
    wanted = {name for prompt in prompts for name in vaes_of(prompt)}
    scripts = server.look_for(f"{API}/scripts")
    upscalers = [
        name
        for path in ("upscalers", "latent-upscale-modes")
        for name in _names(server, path, "name") or ()
    ]
    return Stock(
        samplers=samplers,
        schedulers=schedulers,
        upscalers=upscalers or None,
        styles=_names(server, "prompt-styles", "name"),
        loras=loras,
        vaes=_names_anew(server, "sd-vae", "model_name", refresh="refresh-vae", of=wanted),
        scripts=texts(scripts.get("txt2img")) if isinstance(scripts, dict) else None,
        models=tables(_needed(server, "sd-models")),
        fields=fields,
        settings=settings,
        tells_all_settings=not is_next,
    )


def overridden(prompt: Prompt) -> Mapping[str, Any]:
    """The server's settings that a prompt overrides."""
    found = prompt.extra.get(SETTINGS)
    return found if isinstance(found, dict) else {}


def vaes_of(prompt: Prompt) -> list[str]:
    """The VAE that a prompt's settings name."""
    found = overridden(prompt).get("sd_vae")
    return [str(found)] if is_own(found) else []


def is_own(name: object) -> bool:
    """Whether a setting names a part that the server puts into every model, a VAE say."""
    return isinstance(name, str) and name.casefold() not in _NONE


def tables(value: object) -> list[Mapping[str, Any]]:
    """The tables in a list, if it is one."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def texts(value: object) -> list[str]:
    """The texts in a list, if it is one."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _needed(server: Server, name: str) -> Any:
    """What every server has."""
    try:
        return server.look(f"{API}/{name}")
    except (Refused, Strange) as error:
        raise ConfigError(f"backend.url: {server.url}{API}/{name}: {error}") from error


def _names(server: Server, path: str, *keys: str) -> list[str] | None:
    """The names in a list that only some servers have; None without it."""
    found = server.look_for(f"{API}/{path}")
    if not isinstance(found, list):
        return None
    return [str(one[key]) for one in tables(found) for key in keys if one.get(key)]


def _names_anew(
    server: Server, path: str, *keys: str, refresh: str, of: Set[str]
) -> list[str] | None:
    """`_names`, with what has come into the server's folder since it was started."""
    found = _names(server, path, *keys)
    if found is not None and not of <= {*found}:
        with suppress(Refused, Strange):
            server.look(f"{API}/{refresh}", {})
        found = _names(server, path, *keys)
    return found


def _fields(server: Server) -> list[str] | None:
    """The fields of a payload that the server knows, by its own description; None if unknown."""
    try:
        described = server.look("/openapi.json")
        body = described["paths"][f"{API}/txt2img"]["post"]["requestBody"]
        name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        return list(described["components"]["schemas"][name]["properties"])
    except (Refused, Strange, KeyError, TypeError, AttributeError):
        return None


def _loras(prompt: Prompt) -> list[str]:
    """The LoRAs that a prompt names."""
    return _LORA.findall(f"{prompt.prompt} {prompt.negative_prompt}")
