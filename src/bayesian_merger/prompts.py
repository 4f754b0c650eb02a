"""Payload files and wildcards -> the panel: prompts with seeds, the same for every trial.

Two merges are compared on the same pictures (common random numbers), so that a difference between
their scores is theirs. A panel is drawn from its seed alone: the same files and seed give the same
panel on every machine.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bayesian_merger import toml, yml
from bayesian_merger.data import Prompt
from bayesian_merger.errors import ConfigError, one_line, shown
from bayesian_merger.registry import nearest

_WILDCARD = re.compile(r"__(?!\s)([^\n]+?)(?<!\s)__")
_LONGEST = 20_000  # characters of a prompt, or of a line of a wildcard file
_MOST_BYTES = 64 * 2**20  # of a file
_DEEPEST = 8  # wildcards inside wildcard lines; deeper than this is a loop


class _Fields(BaseModel):
    """The fields of a payload that every back end knows; all others are passed on in `extra`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    prompt: str = Field(pattern=r"\S")
    negative_prompt: str = ""
    seed: int = Field(-1, lt=2**63)
    width: int = Field(512, ge=8, le=8192, multiple_of=8)
    height: int = Field(512, ge=8, le=8192, multiple_of=8)
    steps: int = Field(20, ge=1, le=1000)
    cfg_scale: float = Field(7.0, ge=0.0, le=100.0, allow_inf_nan=False)
    sampler_name: str = "Euler"
    scheduler: str = "Automatic"
    score_weight: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    batch_size: int = Field(1, ge=1, le=1000)
    n_iter: int = Field(1, ge=1, le=1000)


# What sd-webui-bayesian-merger called them in its versions; what stands first goes before.
_OLD_NAMES = {
    "cfg": "cfg_scale",
    "sampler": "sampler_name",
    "sampler_index": "sampler_name",
    "neg_prompt": "negative_prompt",
}


@dataclass(frozen=True)
class Payload:
    """One payload file as read: its name and checked fields."""

    name: str
    fields: _Fields

    @property
    def n_images(self) -> int:
        """Images that one round over the payloads makes of this one."""
        return self.fields.batch_size * self.fields.n_iter


def read_payloads(paths: Sequence[Path], defaults: Mapping[str, Any]) -> tuple[Payload, ...]:
    """The payloads of `paths`, each with `defaults` under it; ConfigError naming every bad file.

    A .toml or .yaml file is one payload: its fields, or one name with a table of fields. In a .txt
    file each line that is not empty is a prompt.
    """
    usual = _renamed(defaults)
    payloads: list[Payload] = []
    mistakes: list[str] = []
    for path in paths:
        try:
            for name, fields in _tables(path):
                own = _renamed(fields)
                if "prompt" not in own and not usual.get("prompt"):
                    raise ConfigError(f'payload {path}: no prompt; add a line prompt = "..."')
                table = {**usual, **own}
                wrong = list(_mistakes(table))
                for key, text in wrong:
                    is_own = key in own or key not in usual
                    where = f"payload {path}" if is_own else "panel.defaults"
                    mistakes.append(f"{where}: {text}")
                if not wrong:
                    payloads.append(Payload(name, _Fields.model_validate(table)))
        except ConfigError as error:
            mistakes.append(str(error))
    names = [payload.name for payload in payloads]
    for name in (name for name, n in Counter(names).items() if n > 1):
        mistakes.append(f"two payloads are called {name!r}; rename one")
    if payloads and not any(payload.fields.score_weight for payload in payloads):
        mistakes.append("every payload has score_weight 0, so nothing would be judged")
    if mistakes:
        # A mistake in the defaults is found with every payload, and is one.
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    return tuple(payloads)


def read_wildcards(folder: Path | None) -> dict[str, tuple[str, ...]]:
    """Lines of each .txt file in `folder` (and below) by its name without the suffix.

    ConfigError for a link out of the folder, as it may lead to a file that no prompt should tell.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError(f"panel.wildcards_dir: {folder} is not a folder")
    wildcards = {}
    for path in sorted(folder.rglob("*.txt")):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"panel.wildcards_dir: {path} leads out of its folder, to {path.resolve()}; put a copy "
                f"of that there, or remove it"
            )
        lines = (line.strip() for line in _text(path).splitlines())
        kept = tuple(line for line in lines if line and not line.startswith("#"))
        if max(map(len, kept), default=0) > _LONGEST:
            raise ConfigError(f"{path}: a line of more than {_LONGEST} characters is no wildcard")
        wildcards[path.relative_to(folder).with_suffix("").as_posix()] = kept
    return wildcards


def draw_panel(
    payloads: Sequence[Payload],
    wildcards: Mapping[str, Sequence[str]],
    *,
    rounds: int,
    seed: str,
    fresh: bool = False,
) -> tuple[Prompt, ...]:
    """`rounds` rounds over all payloads, interleaved, with wildcards and seeds drawn from `seed`.

    A payload's own seed is kept (counting up) unless `fresh` asks for new ones. ConfigError for an
    unknown wildcard.
    """
    panel: list[Prompt] = []
    for turn in range(rounds):
        for payload in payloads:
            fields = payload.fields
            for image in range(payload.n_images):
                # Each image has a stream of its own, so that adding a payload moves no other.
                chance = random.Random(f"{seed}/{payload.name}/{turn}/{image}")
                drawn = chance.randrange(2**32)
                kept = fields.seed + turn * payload.n_images + image
                panel.append(
                    Prompt(
                        index=len(panel),
                        payload=payload.name,
                        prompt=_fill(fields.prompt, wildcards, chance, payload.name),
                        negative_prompt=_fill(
                            fields.negative_prompt, wildcards, chance, payload.name
                        ),
                        seed=drawn if fresh or fields.seed < 0 else kept,
                        width=fields.width,
                        height=fields.height,
                        steps=fields.steps,
                        cfg_scale=fields.cfg_scale,
                        sampler_name=fields.sampler_name,
                        scheduler=fields.scheduler,
                        weight=fields.score_weight,
                        extra=dict(fields.model_extra or {}),
                    )
                )
    return tuple(panel)


def n_images(payloads: Sequence[Payload]) -> int:
    """Images of one round over `payloads`."""
    return sum(payload.n_images for payload in payloads)


def _fill(
    text: str, wildcards: Mapping[str, Sequence[str]], chance: random.Random, payload: str
) -> str:
    def draw(found: re.Match[str]) -> str:
        name = found[1]
        if name not in wildcards:
            known = ", ".join(wildcards) or "none; set panel.wildcards_dir"
            raise ConfigError(f"payload {payload}: unknown wildcard __{name}__ (known: {known})")
        if not wildcards[name]:
            raise ConfigError(f"payload {payload}: the file of wildcard __{name}__ holds no line")
        return chance.choice(wildcards[name])

    for _ in range(_DEEPEST):
        if len(text) > _LONGEST:
            raise ConfigError(
                f"payload {payload}: a prompt of more than {_LONGEST} characters ({text[:60]!r}...)"
            )
        text, n_drawn = _WILDCARD.subn(draw, text)
        if not n_drawn:
            return text
    raise ConfigError(f"payload {payload}: wildcards name each other in a circle ({text[:60]!r})")


def _tables(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    text = _text(path)
    if path.suffix.lower() == ".txt":
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise ConfigError(f"payload {path}: no prompt; write one on each line")
        return [(f"{path.stem}-{i}", {"prompt": p}) for i, p in enumerate(prompts, start=1)]
    try:
        if path.suffix.lower() == ".toml":
            data: Any = toml.loads(text)
        elif path.suffix.lower() in (".yaml", ".yml"):
            data = yml.loads(text)
        else:
            raise ConfigError(f"payload {path}: not a .toml, .yaml or .txt file")
    except ValueError as error:
        kind = "TOML" if path.suffix.lower() == ".toml" else "YAML"
        raise ConfigError(f"payload {path}: not valid {kind}: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f'payload {path}: no fields; add a line prompt = "..."')
    # sd-webui-bayesian-merger wrote one name with the fields below it.
    if len(data) == 1 and isinstance(only := next(iter(data.values())), dict):
        return [(str(next(iter(data))), only)]
    return [(path.stem, data)]


def _mistakes(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field of a payload that is wrong, and what is wrong with it."""
    try:
        _Fields.model_validate(table)
    except ValidationError as error:
        for detail in error.errors():
            place = ".".join(str(part) for part in detail["loc"])
            field = str(detail["loc"][0])
            yield field, f"{place}: {detail['msg']} (found {shown(detail['input'])})"
    for name in (n for n in table if isinstance(n, str) and n not in _Fields.model_fields):
        meant = nearest(name, _Fields.model_fields, cutoff=0.85)
        if meant and not name.startswith("hr_"):  # fields of webuis: hr_scheduler
            yield name, f"unknown field {name!r}{meant}"
        try:
            json.dumps(table[name], allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            yield name, f"field {shown(name)} is {shown(table[name])}, not JSON"


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Old names of fields under their present ones."""
    renamed = dict(fields)
    for old, new in _OLD_NAMES.items():
        if old in renamed:
            value = renamed.pop(old)
            renamed.setdefault(new, value)
    return renamed


def _text(path: Path) -> str:
    try:
        if not path.is_file():  # a pipe may have no end
            raise ConfigError(f"{path}: cannot be read (it is no file)")
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"{path}: larger than {_MOST_BYTES >> 20} MiB, so no file of prompts"
            )
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
