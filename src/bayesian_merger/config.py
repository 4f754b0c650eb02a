"""One TOML file -> frozen sections; every mistake is reported at once, with its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
    ValidationError,
    ValidationInfo,
)

from bayesian_merger import toml
from bayesian_merger.errors import ConfigError, shown
from bayesian_merger.registry import nearest

_WINDOWS_HINT = "write Windows paths with / or in 'single quotes'"


class Section(BaseModel):
    """A table of the file; frozen, and unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _beside_config(value: Any, info: ValidationInfo) -> Any:
    """Paths in the file are relative to the file, `~` is the user's home."""
    if isinstance(value, str) and value:
        if any(ord(character) < 32 for character in value):
            raise ValueError(f"a backslash became a control character; {_WINDOWS_HINT}")
        folder = (info.context or {}).get("folder", Path())
        try:
            return folder / Path(value).expanduser()
        except RuntimeError as error:  # ~ of an unknown user
            raise ValueError(str(error)) from error
    return value


def _plainly_beside_config(value: Any, info: ValidationInfo) -> Any:
    """Such a path, which a link leads nowhere else."""
    path = _beside_config(value, info)
    if isinstance(path, Path):
        _require_beside(value, [path], (info.context or {}).get("folder", Path()))
    return path


def _require_beside(given: str, paths: Sequence[Path], folder: Path) -> None:
    """ValueError if what is written as a path beside the configuration is a link that leads elsewhere.

    What is in it becomes prompts, and the folder may be a stranger's. A path from the root or with ".."
    in it is seen to lead where it does.
    """
    written = Path(given).expanduser()
    if written.is_absolute() or ".." in written.parts:
        return
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link that leads out of the configuration's folder, to {path.resolve()}; "
                f"name that itself if it is meant"
            )


ConfigPath = Annotated[Path, BeforeValidator(_beside_config)]


def _storage_beside_config(value: Any, info: ValidationInfo) -> Any:
    """A relative SQLite file is below the configuration's folder, as every path in it."""
    start = "sqlite:///"
    if isinstance(value, str) and value.startswith(start):
        folder = (info.context or {}).get("folder", Path())
        return start + (folder / value.removeprefix(start)).as_posix()
    return value


def _artifacts_beside_config(value: Any, info: ValidationInfo) -> Any:
    """A bucket, or a folder as every path in the file."""
    is_bucket = isinstance(value, str) and value.startswith("s3://")
    found = value if is_bucket else _beside_config(value, info)
    return str(found) if isinstance(found, Path) else found


ArtifactsPlace = Annotated[str, BeforeValidator(_artifacts_beside_config)]
StorageUrl = Annotated[str, BeforeValidator(_storage_beside_config)]


def _start_point(value: Any) -> str | dict[str, float | str]:
    """One line for a mistake, where a union of types has one for each of them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ValueError("neither the name of a preset nor a table of weights")
    found: dict[str, float | str] = {}
    for name, weight in value.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not isinstance(weight, str) and not (is_number and math.isfinite(weight)):
            raise ValueError(f"{name} is neither a finite number nor a name")
        found[str(name)] = float(weight) if is_number else weight
    return found


StartPoint = Annotated[str | dict[str, float | str], PlainValidator(_start_point)]


class Models(Section):
    """[models]: the checkpoints."""

    a: ConfigPath
    b: ConfigPath
    c: ConfigPath | None = None


class Merge(Section):
    """[merge]: how they are merged."""

    method: str = "weighted_sum"
    vae: Literal["a", "b", "base"] = "a"
    precision: Literal["fp16", "bf16", "fp32", "fp8_e4m3fn", "fp8_e5m2"] = "fp16"
    clip: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = "auto"


class Stop(Section):
    """[search.stop]: end the search when it expects to gain less than `min_gain`, `patience` times."""

    min_gain: float = Field(gt=0, allow_inf_nan=False)
    patience: PositiveInt = 3


class Search(Section):
    """[search]: what may vary, and for how long."""

    images: PositiveInt | None = None
    n_iters: NonNegativeInt | None = None
    optimiser: str = "auto"
    options: dict[str, Any] = {}
    init: Literal["sobol", "lhs", "uniform"] = "sobol"
    init_points: NonNegativeInt | None = None
    images_per_trial: PositiveInt | None = None
    seed: int = Field(0, ge=0, lt=2**31)
    methods: list[str] = []
    presets: list[str] = []
    smooth: int | None = Field(None, ge=2)
    freeze: dict[str, float] = {}
    ranges: dict[str, tuple[float, float]] = {}
    groups: list[list[str]] = []
    guide: ConfigPath | None = None
    start: list[StartPoint] = []
    objectives: Literal["mean", "scorers", "payloads"] = "mean"
    stop: Stop | None = None
    # Where a study lies is no part of it, and the address may hold a password.
    storage: StorageUrl | None = Field(None, exclude=True)


class Panel(Section):
    """[panel]: the prompts that every trial is judged on."""

    payloads: list[str] = Field(min_length=1)
    wildcards_dir: Annotated[Path, BeforeValidator(_plainly_beside_config)] | None = None
    batch_size: PositiveInt = 1
    defaults: dict[str, Any] = {}


class Heldout(Section):
    """[heldout]: the confirmation on fresh seeds at the end; images are rounded up to whole rounds."""

    candidates: PositiveInt = 3
    select_images: PositiveInt = 24
    images: int = Field(64, ge=2)


class Backend(BaseModel):
    """[backend]: what makes the images; all keys but `name` are options of that back end."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "diffusers"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Scorer(BaseModel):
    """[scorers.NAME]: a scorer, by default that of this name, its weight in the mean, its options.

    It judges the images of all `payloads`, or of those whose names match one of these patterns.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    scorer: str | None = None
    weight: FiniteFloat = Field(1.0, gt=0)
    payloads: list[str] | None = Field(None, min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Value(Section):
    """[value]: how several scores of an image become one number; see values.Measure."""

    normalise: Literal["none", "zscore", "rank"] | None = None
    combine: Literal["mean", "geometric", "minimum"] = "mean"


def _junk(value: Any) -> str | float:
    """One line for a mistake, where a union of types has one for each of them."""
    if value in ("fail", "off"):
        return str(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError("neither 'fail', 'off' nor a positive penalty")
    return float(value)


Junk = Annotated[str | float, PlainValidator(_junk)]


class Guards(Section):
    """[guards]: what an image that is junk costs.

    "fail" fails its trial, a number is taken off its value, in standard deviations of the baselines'
    images, and "off" does not look.
    """

    blank: Junk = 3.0
    noise: Junk = 3.0
    saturated: Junk = 3.0
    duplicate: Junk = 3.0

    @property
    def penalties(self) -> dict[str, float]:
        found = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: junk for name, junk in found if isinstance(junk, float)}

    def of(self, mark: str) -> str | float:
        """What a mark costs."""
        found: str | float = getattr(self, mark)
        return found


class Output(Section):
    """[output]: what is left in the run folder."""

    save_best: bool = False
    save_images: Literal["all", "best", "none"] = "best"
    # Where pictures are handed on is no part of a run, and another place on each machine.
    artifacts: ArtifactsPlace | None = Field(None, exclude=True)


class Workers(Section):
    """[workers]: where the processes are that judge images."""

    launch: Literal["here", "ray"] = "here"


class Config(Section):
    """The whole file."""

    models: Models
    merge: Merge = Field(default_factory=lambda: Merge.model_validate({}))
    search: Search = Field(default_factory=lambda: Search.model_validate({}))
    panel: Panel
    heldout: Heldout = Field(default_factory=lambda: Heldout.model_validate({}))
    backend: Backend = Backend()
    scorers: dict[str, Scorer] = Field(min_length=1)
    value: Value = Field(default_factory=lambda: Value.model_validate({}))
    guards: Guards = Field(default_factory=lambda: Guards.model_validate({}))
    output: Output = Field(default_factory=lambda: Output.model_validate({}))
    # Where a run is worked on is no part of it.
    workers: Workers = Field(Workers(), exclude=True)
    plugins: list[ConfigPath] = []

    def payload_files(self, folder: Path) -> list[Path]:
        """The files that panel.payloads names; ConfigError for a pattern that matches none."""
        found: list[Path] = []
        for pattern in self.panel.payloads:
            try:
                path = Path(pattern).expanduser()
                base, relative = folder, pattern
                if path.is_absolute():
                    base = Path(path.anchor)
                    relative = path.relative_to(base).as_posix()
                hits = sorted(p for p in base.glob(relative) if p.is_file())
                _require_beside(pattern, hits, folder)
            except (ValueError, IndexError, RuntimeError) as error:  # as pathlib likes
                raise ConfigError(
                    f"panel.payloads: {pattern!r} names no files ({error})"
                ) from error
            if not hits:
                raise ConfigError(
                    f"panel.payloads: no file matches {pattern!r} in {base.resolve()}"
                )
            found += hits
        return list(dict.fromkeys(found))


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path` with `overrides` ("search.n_iters=20") on top.

    ConfigError with every mistake, one on a line.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: a folder; name the configuration file in it")
    try:
        data = toml.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; write one with `bayesian-merger init {path.parent}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except toml.TOMLDecodeError as error:
        hint = (
            f"; {_WINDOWS_HINT}"
            if any(sign in str(error) for sign in ("\\", "escape", "hex value"))
            else ""
        )
        raise ConfigError(f"{path}: not valid TOML: {error}{hint}") from error
    for override in overrides:
        _set(data, override)
    try:
        return Config.model_validate(data, context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise ConfigError("\n".join(_mistakes(path.name, error))) from None


def _set(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    shown = f"{key}=..." if equals else key  # a storage's value may hold a password
    if not equals or not all(parts):
        raise ConfigError(f"--set {shown}: write it as section.key=value")
    try:
        value: Any = toml.loads(f"value = {text}")["value"]
    except toml.TOMLDecodeError:
        value = text
    table = data
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {shown}: {part!r} is a value, not a section")
    table[parts[-1]] = value


def _mistakes(name: str, error: ValidationError) -> Iterator[str]:
    for detail in error.errors():
        place = [str(part) for part in detail["loc"]]
        key = ".".join(place)
        if detail["type"] == "extra_forbidden":
            yield f"{name}: unknown key {key!r}{nearest(place[-1], _known_keys(place[:-1]))}"
        elif detail["type"] == "missing":
            yield f"{name}: {key} is missing"
        else:
            said = detail["msg"].removeprefix("Value error, ")
            # A password is looked for nowhere but in the storage's address.
            found = "" if key == "search.storage" else f" (found {shown(detail['input'])})"
            yield f"{name}: {key}: {said}{found}"


def _known_keys(place: Sequence[str]) -> list[str]:
    """The keys of the section at `place`."""
    section: type[BaseModel] = Config
    for part in place:
        field = section.model_fields.get(part)
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        section = next(
            (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), Config
        )
    return list(section.model_fields)


def as_plain(config: Config) -> Mapping[str, Any]:
    """The configuration as plain data, ready for JSON."""
    return config.model_dump(mode="json")
