"""Ask and tell, resume, and the record of everything measured; the only module that knows Optuna.

One storage holds two Optuna studies. In `search` each trial is a proposal of the optimiser; in
`judged` are the recipes that are measured for comparison: baselines, the best few, held-out.
A trial's recipe, scores, image digests and timings are its user attributes, written as they arrive,
so that a killed process loses at most the images that were being made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from bayesian_merger.data import Estimate, Recipe, Result, State, Weights
from bayesian_merger.errors import ConfigError, RunError, first_line
from bayesian_merger.space import Space

Optimiser = Literal["bayes", "tpe"]
Stage = Literal["baseline", "explore", "exploit", "select", "heldout"]

_STATES: Mapping[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
_SCORE = "score:"


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn errors of the storage (full disk, damaged file, lost server) into a RunError."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        reason = first_line(getattr(cause, "orig", None) or cause)
        raise RunError(
            f"the study cannot be read or written ({reason}); what it holds is kept, "
            f"and the same command goes on from there"
        ) from error


class Trial:
    """A recipe being judged; what is recorded is stored before the call returns."""

    def __init__(self, study: optuna.Study, frozen: FrozenTrial) -> None:
        self._study = study
        self._trial = optuna.trial.Trial(study, frozen._trial_id)
        self._result = _result(frozen)
        self.stage, self.name, self.recipe = (
            self._result.stage,
            self._result.name,
            self._result.recipe,
        )
        self.scores: dict[int, Mapping[str, float]] = dict(self._result.scores)
        self._images: dict[int, str] = dict(self._result.images)
        self._seconds: dict[str, float] = dict(self._result.seconds)
        self._value = self._result.value
        self._state = self._result.state
        self._reason = self._result.reason

    @property
    def is_complete(self) -> bool:
        return self._state == "complete"

    def record(self, index: int, scores: Mapping[str, float], image: str) -> None:
        """Store one image's scores; an image that has scores already keeps them."""
        if index not in self.scores:
            self._trial.set_user_attr(f"{_SCORE}{index}", {"scores": dict(scores), "image": image})
            self.scores[index] = dict(scores)
            self._images[index] = image

    def spend(self, **seconds: float) -> None:
        """Add to the time spent by phase."""
        for phase, spent in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent
        self._trial.set_user_attr("seconds", self._seconds)

    def complete(self, value: Estimate) -> None:
        """End the trial with its value."""
        self._value, self._state = value, "complete"
        self._trial.set_user_attr("value", {"mean": value.mean, "se": value.se, "n": value.n})
        self._study.tell(self._trial, value.mean)

    def fail(self, reason: str) -> None:
        """End the trial without a value."""
        self._reason, self._state = reason, "failed"
        self._trial.set_user_attr("reason", reason)
        self._study.tell(self._trial, state=TrialState.FAIL)

    def result(self) -> Result:
        """The trial as it stands."""
        return self._result.but(
            state=self._state,
            scores=dict(self.scores),
            images=dict(self._images),
            value=self._value,
            reason=self._reason,
            seconds=dict(self._seconds),
        )


@dataclass(frozen=True)
class Plan:
    """How the search proposes: where, by which optimiser, after how many exploring points."""

    space: Space
    method: str
    vae: str
    optimiser: Optimiser
    init_points: int
    seed: int

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {p.name: FloatDistribution(p.low, p.high) for p in self.space.parameters}


def create(path: Path) -> None:
    """Make an empty study at `path`; it appears whole, so a killed process leaves no half of one."""
    for left in path.parent.glob(".new-study-*"):
        shutil.rmtree(left, ignore_errors=True)
    with (
        storage_errors(),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-study-") as folder,
    ):
        new = Path(folder) / path.name
        study = Study(url_of(new))
        study.close()
        new.replace(path)


def url_of(path: Path) -> str:
    """The storage URL of the SQLite file at `path`, whatever characters its folders hold."""
    url = URL.create("sqlite", database=str(path.absolute())).render_as_string()
    return url.replace("{", "{{").replace("}", "}}")  # Optuna fills templates in


class Study:
    """The record of one run in the storage at `url`; opened again, it goes on where it was."""

    def __init__(self, url: str) -> None:
        """RunError if the storage cannot be opened."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with storage_errors():
            try:
                self._storage = storage = optuna.storages.RDBStorage(url)
            except RuntimeError as error:  # another version of Optuna's tables
                raise RunError(first_line(error)) from error
            self._search, self._judged = (
                optuna.create_study(
                    storage=storage, study_name=name, direction="maximize", load_if_exists=True
                )
                for name in ("search", "judged")
            )

    def close(self) -> None:
        """Let go of the storage's file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def begin(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Make this the study of the run that `identity` describes, or find that it is.

        `about` is what a report needs to know beside the trials. ConfigError as `require_same`.
        """
        self.require_same(identity)
        self._search.set_user_attr("identity", dict(identity))
        self._search.set_user_attr("about", dict(about))

    def require_same(self, identity: Mapping[str, Any]) -> None:
        """ConfigError with what differs if the study belongs to another run than `identity`."""
        stored = self._search.user_attrs.get("identity", identity)
        # As the storage gives it back: tuples are lists there, and keys are texts.
        before, now = (dict(_flat(json.loads(json.dumps(data)))) for data in (stored, identity))
        differing = [k for k in (before | now) if before.get(k) != now.get(k)]
        if differing:
            said = "; ".join(
                f"{key} was {_shown(before.get(key))}, is {_shown(now.get(key))}"
                for key in differing[:3]
            )
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ConfigError(
                f"the run folder belongs to another configuration: {said}{more}; "
                f"choose another --run-dir, or change it back"
            )

    @property
    def about(self) -> Mapping[str, Any]:
        """What `begin` stored; empty for a study that never began."""
        about: Mapping[str, Any] = self._search.user_attrs.get("about", {})
        return about

    def observe(self, result: Result, plan: Plan) -> None:
        """Hand a judged baseline to the optimiser, where the search could have proposed it."""
        recipe = result.recipe
        same = (recipe.method, recipe.vae) == (plan.method, plan.vae)
        values = plan.space.values(recipe.weights) if same else None
        known = {t.user_attrs.get("baseline") for t in self._search.get_trials(deepcopy=False)}
        if values is None or result.value is None or result.name in known:
            return
        self._search.add_trial(
            optuna.trial.create_trial(
                params=values,
                distributions=plan.distributions,
                value=result.value.mean,
                user_attrs={"baseline": result.name},
            )
        )

    def ask(self, plan: Plan, recipe_of: Callable[[Weights], Recipe]) -> Trial:
        """The trial that was interrupted, or else a new proposal of `plan`."""
        started, failed = 0, False
        for frozen in self._search.get_trials(deepcopy=False):
            if "recipe" in frozen.user_attrs:
                started += 1
                failed = frozen.state == TrialState.FAIL
                if frozen.state == TrialState.RUNNING:
                    return Trial(self._search, frozen)
            elif frozen.state == TrialState.RUNNING:
                # Killed between the proposal and its recipe: nothing was measured.
                self._search.tell(frozen.number, state=TrialState.FAIL)
        name = f"trial {started + 1}"
        # An optimiser does not hear of failures and would ask for the same again, hence the detour.
        if started < plan.init_points or failed:
            values = _explore(plan, started)
            recipe = recipe_of(plan.space.weights(values))
            return self._add(self._search, "explore", name, recipe, values, plan.distributions)
        # All chance comes from the trial's place, so a resumed run proposes what it would have.
        self._search.sampler = _sampler(plan, started)
        asked = self._search.ask(plan.distributions)
        asked.set_user_attr("stage", "exploit")
        asked.set_user_attr("name", name)
        asked.set_user_attr("recipe", recipe_of(plan.space.weights(asked.params)).to_dict())
        return Trial(self._search, _frozen(self._search, asked.number))

    def book(self, stage: Stage, name: str, recipe: Recipe) -> Trial:
        """The record of `recipe` in `stage`: the one there is, unless it failed, or a new one."""
        for frozen in self._judged.get_trials(deepcopy=False):
            if frozen.state != TrialState.FAIL:
                result = _result(frozen)
                if (result.stage, result.recipe.digest()) == (stage, recipe.digest()):
                    return Trial(self._judged, frozen)
        return self._add(self._judged, stage, name, recipe, {}, {})

    def _add(
        self,
        study: optuna.Study,
        stage: Stage,
        name: str,
        recipe: Recipe,
        values: Mapping[str, float],
        distributions: Mapping[str, BaseDistribution],
    ) -> Trial:
        """A running trial written in one transaction with its recipe."""
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=dict(values),
                distributions=dict(distributions),
                user_attrs={"stage": stage, "name": name, "recipe": recipe.to_dict()},
            )
        )
        return Trial(study, study.get_trials(deepcopy=False)[-1])

    def searched(self) -> list[Result]:
        """The search's trials in order, the one in progress included."""
        return [
            _result(t) for t in self._search.get_trials(deepcopy=False) if "recipe" in t.user_attrs
        ]

    def judged(self, stage: Stage) -> list[Result]:
        """What was judged in `stage`, in order."""
        results = (_result(t) for t in self._judged.get_trials(deepcopy=False))
        return [result for result in results if result.stage == stage]


def _explore(plan: Plan, place: int) -> dict[str, float]:
    """The point at `place` of the scrambled Sobol sequence over the space."""
    sobol = qmc.Sobol(len(plan.space.parameters), scramble=True, rng=plan.seed)
    shares = sobol.random_base2((place + 1).bit_length())[place]
    return {
        p.name: p.low + float(share) * (p.high - p.low)
        for p, share in zip(plan.space.parameters, shares, strict=True)
    }


def _sampler(plan: Plan, place: int) -> optuna.samplers.BaseSampler:
    seed = int(np.random.SeedSequence([plan.seed, place]).generate_state(1)[0])
    if plan.optimiser == "bayes":
        return optuna.samplers.GPSampler(
            seed=seed, deterministic_objective=False, n_startup_trials=0
        )
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=0)


def _frozen(study: optuna.Study, number: int) -> FrozenTrial:
    return next(t for t in study.get_trials(deepcopy=False) if t.number == number)


def _result(frozen: FrozenTrial) -> Result:
    attrs = frozen.user_attrs
    measured = {
        int(key[len(_SCORE) :]): found for key, found in attrs.items() if key.startswith(_SCORE)
    }
    value = attrs.get("value")
    return Result(
        stage=attrs["stage"],
        name=attrs["name"],
        number=frozen.number,
        state=_STATES[frozen.state],
        recipe=Recipe.from_dict(attrs["recipe"]),
        scores={i: found["scores"] for i, found in sorted(measured.items())},
        images={i: found["image"] for i, found in sorted(measured.items())},
        value=Estimate(**value) if value else None,
        reason=attrs.get("reason", ""),
        seconds=attrs.get("seconds", {}),
    )


def _flat(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, data


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
