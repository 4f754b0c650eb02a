"""The small frozen values that travel between the steps of a run."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Weights = Mapping[str, Mapping[str, float]]
"""Merge weights: name of the method's weight ("alpha") -> block ("IN00") -> value."""

MOST_SCORE = 1e100
"""No score is as large: its square must be a number too."""
RIVALS = {"over_a": "A", "over_b": "B", "over_even": "the even merge"}
"""What the best merge is compared with on held-out seeds, as keys of `Outcome.gain` -> in words."""

_LONGEST_NAME = 255  # of a file, on every system

State = Literal["running", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class Model:
    """A checkpoint as a recipe knows it: by name and content; `path` only says where to look first."""

    name: str
    sha256: str
    path: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Recipe:
    """Everything that rebuilds a merge.

    `weights` covers each block of the models for each weight of the method; a part of a block may
    have a weight of its own. `vae` names the source of the VAE: "a" and "b" copy a model's, "base"
    merges it with the base weight. `precision` is the type of the merged tensors ("fp16"). `clip`
    keeps each value between A's and B's. `seed` is that of methods with chance.
    """

    method: str
    architecture: str
    models: tuple[Model, ...]
    weights: Weights
    vae: str = "a"
    precision: str = "fp16"
    clip: bool = False
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, without the paths, so that it is the same on every machine."""
        return {
            "method": self.method,
            "architecture": self.architecture,
            "vae": self.vae,
            "precision": self.precision,
            "clip": self.clip,
            "seed": self.seed,
            "models": [{"name": m.name, "sha256": m.sha256} for m in self.models],
            "weights": {name: dict(blocks) for name, blocks in self.weights.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote, models with a `path` if there is one.

        ValueError with what is wrong where data is not one.
        """
        needed = ("method", "architecture", "models", "weights")
        data = _table(data, "the recipe", needed, (*needed, "vae", "precision", "clip", "seed"))
        if not isinstance(data["models"], list):
            raise ValueError("models is no list; write each as [[models]]")
        return cls(
            method=_text(data["method"], "method"),
            architecture=_text(data["architecture"], "architecture"),
            models=tuple(_model(entry, i) for i, entry in enumerate(data["models"], start=1)),
            weights={
                _text(name, "a weight"): _numbers(blocks, f"weights.{name}")
                for name, blocks in _table(data["weights"], "weights").items()
            },
            vae=_text(data.get("vae", "a"), "vae"),
            precision=_text(data.get("precision", "fp16"), "precision"),
            clip=_flag(data.get("clip", False), "clip"),
            seed=_seed(data.get("seed", 0)),
        )

    def digest(self) -> str:
        """Sixteen hexadecimal digits that two recipes share only if they rebuild the same merge."""
        # A model is its content: a file that was renamed makes no other merge.
        content = self.to_dict() | {"models": [model.sha256 for model in self.models]}
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _table(
    value: object, what: str, needed: Iterable[str] = (), known: Iterable[str] | None = None
) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {reprlib.repr(value)}, not a table")
    for key in needed:
        if key not in value:
            raise ValueError(f"{what} has no {key!r}")
    for key in value:
        if known is not None and key not in known:
            raise ValueError(f"{what} has an unknown key {reprlib.repr(key)}")
    return value


def _model(value: object, number: int) -> Model:
    keys = ("name", "sha256")
    entry = _table(value, f"model {number}", keys, (*keys, "path"))
    texts = {key: _text(entry[key], f"{key} of model {number}") for key in keys}
    path = entry.get("path")
    if not isinstance(path, str | None):
        raise ValueError(f"path of model {number} is {reprlib.repr(path)}, not text")
    return Model(**texts, path=Path(path) if path else None)


def _numbers(value: object, what: str) -> dict[str, float]:
    found = {}
    for block, number in _table(value, what).items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{what}: {block} is {reprlib.repr(number)}, not a number")
        try:
            found[_text(block, "a block")] = float(number)
        except OverflowError:
            raise ValueError(f"{what}: {block} is too large a number") from None
    return found


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{what} is {reprlib.repr(value)}, neither true nor false")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_NAME:
        raise ValueError(f"{what} is {reprlib.repr(value)}, not a name")
    return value


def _seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"seed is {reprlib.repr(value)}, not a whole number from 0 to 2^63")
    return value


@dataclass(frozen=True)
class Prompt:
    """One entry of a panel: all that is needed to make one image again.

    `index` is its place in the panel, `payload` the file it came from, `weight` its share in the
    mean (the payload's `score_weight`). `extra` holds further fields for the back end.
    """

    index: int
    payload: str
    prompt: str
    seed: int
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg_scale: float = 7.0
    sampler_name: str = "Euler"
    scheduler: str = "Automatic"
    weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[int, int, int, float, str, str]:
        """What prompts must have in common to be made at once."""
        return (
            self.width,
            self.height,
            self.steps,
            self.cfg_scale,
            self.sampler_name,
            self.scheduler,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prompt:
        return cls(**data)


@dataclass(frozen=True)
class Sample:
    """An image (RGB) with the prompt and seed that made it."""

    image: Image
    prompt: Prompt


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over `n` images; `se` is 0 for a single image."""

    mean: float
    se: float
    n: int


@dataclass(frozen=True)
class Interval:
    """A paired mean difference with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Preference:
    """How many pairs of pictures of two merges the first has won and lost, and how many were alike."""

    won: int
    lost: int
    alike: int


@dataclass(frozen=True)
class Slopes:
    """The derivative of the mean value of some images (by panel index) by each parameter of a search.

    Empty where the value does not depend on the merge.
    """

    items: tuple[int, ...]
    by: Mapping[str, float]


@dataclass(frozen=True)
class Slice:
    """What is expected to be gained when one weight leaves `at` for other `places`, alone.

    The estimates' errors are those of the difference; their `n` tells nothing.
    """

    at: float
    places: tuple[float, ...]
    gains: tuple[Estimate, ...]

    @property
    def loss(self) -> Estimate:
        """The most that is expected to be lost at any of the places: how much the weight matters."""
        worst = min(self.gains, key=lambda gain: gain.mean)
        return Estimate(-worst.mean, worst.se, 0)


@dataclass(frozen=True)
class Result:
    """One recipe judged on a panel, as it stands in the study.

    `stage` is "baseline", "explore", "exploit", "select" or "heldout"; `name` is "a", "b", "even"
    or "trial 17". `scores` holds panel index -> scorer -> score, `images` panel index -> digest of
    the pixels; `slopes` are those of the images that were followed, `prompts` those of images that no
    panel has. `value` is None until the trial is
    complete; `reason` says why it failed.
    """

    stage: str
    name: str
    number: int
    state: State
    recipe: Recipe
    scores: Mapping[int, Mapping[str, float]]
    images: Mapping[int, str] = field(default_factory=dict)
    slopes: tuple[Slopes, ...] = ()
    prompts: Mapping[int, Prompt] = field(default_factory=dict)
    value: Estimate | None = None
    reason: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def recommended(cls, name: str, recipe: Recipe, value: Estimate) -> Result:
        """What a search recommends, and the value that it expects; it need not have been judged."""
        return cls("exploit", name, -1, "complete", recipe, {}, value=value)

    def but(self, **changes: Any) -> Result:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Compromise:
    """A merge of the Pareto front: none is expected to be better at every objective at once.

    `values` holds what is expected of it, objective -> estimate.
    """

    recipe: Recipe
    values: Mapping[str, Estimate]


@dataclass(frozen=True)
class Outcome:
    """A run as it stands, finished or not: what the report, the plots and `result.json` are made of.

    `results` are the baselines and then the search's trials in order, of which there will be about
    `trials`; `leader` is what the search recommends so far, and `expected` the value that it expected of
    that after so many trials. `candidates` are the few that it recommends at the end, `selected` the
    same judged again on fresh seeds, from which `best` was chosen. `heldout` holds "a", "b", "even" and
    "best" judged on seeds that no choice was made on, `by_scorer` what each scorer gave them there, and
    `gain` the paired differences "over_a", "over_b" and "over_even".
    `best` is None and `heldout` empty until they are known. `pictures` maps "a", "b", "even", "best" to
    saved images by panel index: held-out ones once the run is finished, before that the baselines' own.
    With pairs in place of scores (`by_pairs`) a value is a lead over the even merge, that of 1 winning
    73 % of pairs, but what is expected is one over `zero`; a gain is the pairs won less those lost, as a
    share of both, and `preferences` counts them.
    `given_up` says why the search followed the gradient no further, if it did not.
    `slices` say of each parameter what the value does as it varies about the recommended merge, once
    the search is over. `front` are the compromises between several objectives, where they were asked
    for, and `front_baselines` what the baselines have, "a" -> objective -> estimate. `seconds` is the
    time spent by phase.
    """

    title: str
    blocks: tuple[str, ...]
    models: tuple[str, ...]
    config: Mapping[str, Any]
    panel: tuple[Prompt, ...]
    heldout_panel: tuple[Prompt, ...]
    results: tuple[Result, ...]
    trials: int = 0
    candidates: tuple[Result, ...] = ()
    selected: tuple[Result, ...] = ()
    leader: Result | None = None
    expected: Mapping[int, Estimate] = field(default_factory=dict)
    best: Result | None = None
    heldout: Mapping[str, Estimate] = field(default_factory=dict)
    by_scorer: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    gain: Mapping[str, Interval] = field(default_factory=dict)
    pictures: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)
    front: tuple[Compromise, ...] = ()
    front_baselines: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    images: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    finished: bool = False
    given_up: str | None = None
    slices: Mapping[str, Slice] = field(default_factory=dict)
    by_pairs: bool = False
    zero: str = "the even merge"
    preferences: Mapping[str, Preference] = field(default_factory=dict)

    @property
    def tried(self) -> tuple[tuple[Result, Estimate], ...]:
        """The search's trials that have a value, in order, with it."""
        return tuple((r, r.value) for r in self.results if r.stage != "baseline" and r.value)

    @property
    def followed(self) -> tuple[Result, ...]:
        """The search's trials whose slopes were measured, in order."""
        return tuple(
            r for r in self.results if r.stage != "baseline" and any(s.by for s in r.slopes)
        )

    def ends(self, recipe: Recipe) -> tuple[str, str]:
        """What a weight of 0 and of 1 stand for in `recipe`: models A and B, or nothing known."""
        first, second, *_ = self.models
        return (first, second) if recipe.method == "weighted_sum" else ("", "")

    def verdict(self) -> str:
        """One sentence: does the best merge beat A, B and the even merge, and how sure is that?"""
        if not self.gain:
            return "The run has not been confirmed on held-out seeds yet."
        names = RIVALS
        beaten = [names[key] for key, gain in self.gain.items() if gain.low > 0]
        unsure = [names[key] for key, gain in self.gain.items() if gain.low <= 0 < gain.mean]
        level = [names[key] for key, gain in self.gain.items() if gain.mean <= 0 <= gain.high]
        worse = [names[key] for key, gain in self.gain.items() if gain.high < 0]
        if len(beaten) == len(self.gain):
            return f"The best merge beats {_listed(beaten)} on held-out seeds."
        parts = [
            f"beats {_listed(beaten)}" if beaten else "",
            f"is ahead of {_listed(unsure)} by less than the error bars" if unsure else "",
            f"is not better than {_listed(level)}" if level else "",
            f"is worse than {_listed(worse)}" if worse else "",
        ]
        return f"The best merge {_listed([p for p in parts if p])} on held-out seeds."


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
