"""Ask and tell, resume, and the record of everything measured; the only module that knows Optuna.

One storage holds two Optuna studies. In `search` each trial is a proposal of the optimiser, judged on
some images of the panel; in `judged` are the recipes that are measured for comparison: baselines, the
best few, held-out, and those that an earlier run has judged. A trial's recipe, scores, image digests and
timings are its user attributes, written as they arrive, so that a killed process loses at most the
images that were being made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState

from bayesian_merger.data import Compromise, Estimate, Recipe, Result, Slice
from bayesian_merger.errors import ConfigError
from bayesian_merger.study import copies, storage
from bayesian_merger.study.board import Board
from bayesian_merger.study.patience import Patient
from bayesian_merger.study.proposals import (
    FOREIGN,
    GIVEN_UP,
    OBSERVED,
    SCORE,
    STARTS,
    Params,
    Plan,
    Proposer,
    Value,
    begun,
    n_judged,
)
from bayesian_merger.study.seats import Seats
from bayesian_merger.study.storage import SEARCH, storage_errors
from bayesian_merger.study.trial import Stage as Stage
from bayesian_merger.study.trial import Trial as Trial
from bayesian_merger.study.trial import of_slopes, result_of

_SQLITE = b"SQLite format 3\0"


def require_same(study: optuna.Study, identity: Mapping[str, Any], what: str, advice: str) -> None:
    """ConfigError that `what` differs, and in which, if the study belongs to another `identity`."""
    stored = study.user_attrs.get("identity", identity)
    # As the storage gives it back: tuples are lists there, and keys are texts.
    before, now = (dict(_flat(json.loads(json.dumps(data)))) for data in (stored, identity))
    differing = [k for k in (before | now) if before.get(k) != now.get(k)]
    if differing:
        said = "; ".join(
            f"{key} was {_shown(before.get(key))}, is {_shown(now.get(key))}"
            for key in differing[:3]
        )
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(f"{what}: {said}{more}; {advice}")


def create(path: Path) -> None:
    """Make an empty study at `path`; it appears whole, so a killed process leaves no half of one."""
    for left in path.parent.glob(".new-study-*"):
        shutil.rmtree(left, ignore_errors=True)
    with (
        storage_errors(),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-study-") as folder,
    ):
        new = Path(folder) / path.name
        study = Study(new)
        study.close()
        new.replace(path)


def _is_database(path: Path) -> bool:
    """Whether SQLite may read a file: one that is new is empty."""
    with path.open("rb") as file:
        return file.read(len(_SQLITE)) in (b"", _SQLITE)


class Study:
    """The record of one run; opened again, it goes on where it was.

    It lies in a storage, or in the SQLite file at a path. Several runs share a storage by their names.
    """

    def __init__(self, place: BaseStorage | Path, name: str = "") -> None:
        """RunError if it cannot be opened, ConfigError if the file is no database of this version."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if isinstance(place, Path) and place.is_file() and not _is_database(place):
            raise ConfigError(f"{place} is no study; move it away, or choose another --run-dir")
        with storage_errors():
            self._storage = storage.at_file(place) if isinstance(place, Path) else place
            self._name = name
            self._fence: Callable[[], None] = lambda: None
            self._file = place if isinstance(place, Path) else None
            self._search, self._judged = self._part(SEARCH), self._part("judged")

    def _part(self, part: str) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage,
            study_name=f"{self._name}/{part}" if self._name else part,
            direction="maximize",
            load_if_exists=True,
        )

    def board(self) -> Board:
        """Where this run offers its images to workers; of an SQLite file a lock lies beside it."""
        turning: AbstractContextManager[object] = nullcontext()
        if isinstance(self._storage, RDBStorage) and self._storage.engine.dialect.name == "sqlite":
            turning = FileLock(f"{self._storage.engine.url.database}.turning")
        return Board(self._storage, self._part("work"), turning)

    def seats(self) -> Seats:
        """The processes that work on this run."""
        return Seats(self._storage, self._part("seats"))

    def waits(
        self, tell: Callable[[str], None], is_over: Callable[[], bool] = lambda: False
    ) -> None:
        """Tell when a server is waited for that does not answer; not once it `is_over`."""
        if isinstance(self._storage, Patient):
            self._storage.tell, self._storage.is_over = tell, is_over

    @contextmanager
    def fenced(self, require: Callable[[], None]) -> Iterator[None]:
        """Meanwhile ask `require` before a trial stores anything; it raises if another leads by now."""
        before, self._fence = self._fence, require
        try:
            yield
        finally:
            self._fence = before

    def hurries(self) -> None:
        """From now on wait for no server: this process ends."""
        if isinstance(self._storage, Patient):
            self._storage.is_over = lambda: True

    def keep_copy(self) -> None:
        """Keep a copy of a study that lies in a file of its own, for `copies.mend`.

        RunError if it is damaged, OSError if there is no room.
        """
        if self._file:
            copies.keep(self._file)

    def close(self) -> None:
        """Let go of the storage's file or connections."""
        storage.close(self._storage)

    def own(self, mark: str) -> str:
        """The mark of the run folders that this is the study of: the first that was given."""
        if "folder" not in self._search.user_attrs:
            # Several may give theirs at once: each storage knows which trial of a study was the first.
            marks = self._part("marks")
            marks.add_trial(
                optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"mark": mark})
            )
            first = marks.get_trials(deepcopy=False)[0]
            self._search.set_user_attr("folder", first.user_attrs["mark"])
        found: str = self._search.user_attrs["folder"]
        return found

    def begin(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Make this the study of the run that `identity` describes, or find that it is.

        `about` is what a report needs to know beside the trials. ConfigError as `require_same`.
        """
        self.require_same(identity)
        self._search.set_user_attr("identity", dict(identity))
        self._search.set_user_attr("about", dict(about))

    def require_same(self, identity: Mapping[str, Any]) -> None:
        """ConfigError with what differs if the study belongs to another run than `identity`."""
        place = f"the study {self._name!r}" if self._name else "the run folder"
        require_same(
            self._search,
            identity,
            f"{place} belongs to another configuration",
            "choose another --run-dir, or change it back",
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        """The run that this is the study of; empty for a study that never began."""
        identity: Mapping[str, Any] = self._search.user_attrs.get("identity", {})
        return identity

    @property
    def about(self) -> Mapping[str, Any]:
        """What `begin` stored; empty for a study that never began."""
        about: Mapping[str, Any] = self._search.user_attrs.get("about", {})
        return about

    def searching(self, plan: Plan, value: Value) -> Proposer:
        """What proposes the trials; `value` is that of one image's scores."""
        return Proposer(self._search, plan, value)

    def observe(self, result: Result, params: Params, plan: Plan) -> None:
        """Hand a judged recipe to the optimiser, where `params` of the search give it."""
        known = {t.user_attrs.get(OBSERVED) for t in self._search.get_trials(deepcopy=False)}
        if result.value is None or result.name in known:
            return
        scores = {f"{SCORE}{i}": {"scores": dict(found)} for i, found in result.scores.items()}
        slopes = dict(map(of_slopes, result.slopes))
        self._search.add_trial(
            optuna.trial.create_trial(
                params=dict(params),
                distributions=plan.distributions,
                value=result.value.mean,
                user_attrs={OBSERVED: result.name, "stage": result.stage, **scores, **slopes},
            )
        )

    def bring_from(self, source: str) -> None:
        """Begin to bring what an earlier run has judged; ConfigError if that was another source."""
        before = self._search.user_attrs.get("source", {"name": source})["name"]
        if before != source or self.searched():
            begun = f"begins with what {before} has found" if before != source else "has begun"
            raise ConfigError(f"the run {begun} already; choose another --run-dir")
        self._search.set_user_attr("source", {"name": source, "is_whole": False})

    def brought(self, starts: Sequence[Params], foreign: Sequence[str]) -> None:
        """End that with points to try first, and the payloads of images beside the panel's.

        The numbers of these images follow those of the panel's.
        """
        self._search.set_user_attr(STARTS, [dict(point) for point in starts])
        self._search.set_user_attr(FOREIGN, list(foreign))
        source = self._search.user_attrs["source"]
        self._search.set_user_attr("source", {**source, "is_whole": True})

    def require_whole(self) -> None:
        """ConfigError if bringing from an earlier run was cut off."""
        source = self._search.user_attrs.get("source")
        if source and not source["is_whole"]:
            raise ConfigError(
                f"what {source['name']} has found was not brought whole; give the same command for that "
                f"once more"
            )

    def ask(
        self,
        proposer: Proposer,
        recipe_of: Callable[[Params], Recipe],
        taken: Collection[Trial] = (),
    ) -> Trial:
        """A trial that was interrupted, or else a new proposal; none of those `taken`."""
        name = f"trial {len(begun(self._search)) + 1}"

        def about(params: Params) -> Mapping[str, Any]:
            self._fence()  # it may have taken long to find them
            return {"name": name, "recipe": recipe_of(params).to_dict()}

        frozen = proposer.begin(about, {trial.number for trial in taken})
        return Trial(self._search, frozen, self._fence)

    def is_interrupted(self, taken: Collection[Trial] = ()) -> bool:
        """Whether a trial of the search has begun and is judged by nobody, none of those `taken`."""
        numbers = {trial.number for trial in taken}
        return any(
            not trial.state.is_finished() and trial.number not in numbers
            for trial in begun(self._search)
        )

    def expect(self, recipe: Recipe, value: Estimate) -> None:
        """Store what is recommended as it stands now, and what value is expected of it."""
        self._search.set_user_attr("leader", {"recipe": recipe.to_dict(), "value": asdict(value)})
        self._search.set_user_attr(f"expected:{self.n_finished}", asdict(value))

    @property
    def given_up(self) -> str | None:
        """Why the search follows the gradient no more, if it did and does not."""
        found: str | None = self._search.user_attrs.get(GIVEN_UP)
        return found

    @property
    def leader(self) -> Result | None:
        """What was last recommended, in the name "recommended"."""
        told = self._search.user_attrs.get("leader")
        if told is None:
            return None
        recipe, value = Recipe.from_dict(told["recipe"]), Estimate(**told["value"])
        return Result.recommended("recommended", recipe, value)

    @property
    def expected(self) -> dict[int, Estimate]:
        """Number of finished trials -> the value that was then expected of what was recommended."""
        found = self._search.user_attrs.items()
        told = {int(k.partition(":")[2]): v for k, v in found if k.startswith("expected:")}
        return {n: Estimate(**told[n]) for n in sorted(told)}

    def choose(self, few: Sequence[Result]) -> None:
        """Store which recipes are to be judged again on fresh seeds, by which value."""
        told = [
            {"name": r.name, "recipe": r.recipe.to_dict(), "value": asdict(r.value)}
            for r in few
            if r.value
        ]
        self._search.set_user_attr("candidates", {"trials": self.n_finished, "few": told})

    @property
    def candidates(self) -> list[Result]:
        """What `choose` stored for the trials that there are; empty if there are more by now."""
        told = self._search.user_attrs.get("candidates", {})
        if told.get("trials") != self.n_finished:
            return []
        return [
            Result.recommended(
                one["name"], Recipe.from_dict(one["recipe"]), Estimate(**one["value"])
            )
            for one in told["few"]
        ]

    def slice(self, slices: Mapping[str, Slice]) -> None:
        """Store what each parameter does about the recommended merge."""
        told = {
            name: {
                "at": one.at,
                "places": [float(f"{x:.4g}") for x in one.places],
                "gains": [[float(f"{x:.3g}") for x in (g.mean, g.se)] for g in one.gains],
            }
            for name, one in slices.items()
        }
        self._search.set_user_attr("slices", told)

    @property
    def slices(self) -> dict[str, Slice]:
        """What `slice` stored; none while the search goes on."""
        return {
            name: Slice(
                one["at"],
                tuple(one["places"]),
                tuple(Estimate(mean, se, 0) for mean, se in one["gains"]),
            )
            for name, one in self._search.user_attrs.get("slices", {}).items()
        }

    def compromise(
        self,
        front: Sequence[Compromise] = (),
        baselines: Mapping[str, Mapping[str, Estimate]] | None = None,
    ) -> None:
        """Store the Pareto front, and what the baselines have of its objectives."""
        told = {
            "merges": [
                {"recipe": one.recipe.to_dict(), "values": _told(one.values)} for one in front
            ],
            "baselines": {name: _told(values) for name, values in (baselines or {}).items()},
        }
        self._search.set_user_attr("front", told)

    @property
    def front(self) -> tuple[list[Compromise], dict[str, dict[str, Estimate]]]:
        """What `compromise` stored."""
        told = self._search.user_attrs.get("front", {"merges": [], "baselines": {}})
        merges = [
            Compromise(Recipe.from_dict(one["recipe"]), _estimates(one["values"]))
            for one in told["merges"]
        ]
        return merges, {name: _estimates(v) for name, v in told["baselines"].items()}

    def extend(self, images: int) -> None:
        """Let a finished search spend so many more images; with 0 no more than its plan says."""
        self._search.set_user_attr("target", self.n_judged + images if images else 0)

    @property
    def target(self) -> int:
        """How many images the search may spend by `extend`; 0 where it was never extended."""
        found: int = self._search.user_attrs.get("target", 0)
        return found

    @property
    def n_finished(self) -> int:
        """Trials that have ended, in whatever state."""
        return sum(t.state.is_finished() for t in begun(self._search))

    @property
    def n_judged(self) -> int:
        """Images that were judged in the search's trials."""
        return n_judged(self._search)

    def book(self, stage: Stage, name: str, recipe: Recipe, apart: Collection[str] = ()) -> Trial:
        """The record of `recipe` in `stage`: the one there is, unless it failed, or a new one.

        Not one of the names that it is to be kept `apart` from.
        """
        for frozen in self._judged.get_trials(deepcopy=False):
            if frozen.state != TrialState.FAIL:
                result = result_of(frozen)
                is_same = (result.stage, result.recipe.digest()) == (stage, recipe.digest())
                if is_same and result.name not in apart:
                    return Trial(self._judged, frozen, self._fence)
        self._judged.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                user_attrs={"stage": stage, "name": name, "recipe": recipe.to_dict()},
            )
        )
        return Trial(self._judged, self._judged.get_trials(deepcopy=False)[-1], self._fence)

    def searched(self) -> list[Result]:
        """The search's trials in order, the one in progress included."""
        return [result_of(trial) for trial in begun(self._search)]

    def judged(self, stage: Stage) -> list[Result]:
        """What was judged in `stage`, in order."""
        results = (result_of(t) for t in self._judged.get_trials(deepcopy=False))
        return [result for result in results if result.stage == stage]


def _told(values: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(value) for name, value in values.items()}


def _estimates(told: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate(**value) for name, value in told.items()}


def _flat(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, data


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
