"""A search of any function of weights, image by image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from bayesian_merger.data import MOST_SCORE
from bayesian_merger.errors import ConfigError, RunError
from bayesian_merger.study import require_same
from bayesian_merger.study.proposals import (
    MOST_IMAGES,
    SCORE,
    Init,
    Params,
    Plan,
    Proposer,
    Stop,
    n_judged,
    scores_of,
)
from bayesian_merger.study.storage import storage_at, storage_errors

_NAME = "score"
_SILENT_IN_A_ROW = 3


@dataclass(frozen=True)
class Best:
    """Recommended weights, and what score to expect of them: mean and standard error.

    The standard error is that of the mean over all images of the kind that were judged, by the model
    that chose the weights; measure them on fresh images for a figure that no choice was made on.
    """

    weights: Params
    mean: float
    se: float


class SearchTrial:
    """Weights to be judged. Iterating gives the images of the panel to judge them on, in order."""

    def __init__(self, study: optuna.Study, frozen: FrozenTrial) -> None:
        self._trial = optuna.trial.Trial(study, frozen._trial_id)
        self._items: list[int] = frozen.user_attrs["items"]
        self._scores = {i: found[_NAME] for i, found in scores_of(frozen).items()}
        self._item: int | None = None
        self.number = frozen.number
        self.weights: Params = dict(frozen.params)

    def __iter__(self) -> Iterator[int]:
        for item in self._items:
            if item not in self._scores:
                self._item = item
                yield item
        self._item = None

    def report(self, score: float) -> None:
        """Store the score of the image that was given last; higher is better.

        ValueError if it is not finite or beyond 1e100, or if no image was asked for.
        """
        if self._item is None:
            raise ValueError("report a score inside the loop over the trial's images")
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) < MOST_SCORE:
            raise ValueError(
                f"the score of image {self._item} is {score!r}, no number below 1e100"
            )
        scores = {_NAME: number}
        with storage_errors():
            self._trial.set_user_attr(f"{SCORE}{self._item}", {"scores": scores})
        self._scores[self._item] = number

    @property
    def mean(self) -> float | None:
        """The mean score so far."""
        return sum(self._scores.values()) / len(self._scores) if self._scores else None


class Search:
    """Finds the weights with the highest expected score in few images.

        search = Search({"IN00": (0, 1), "IN01": (0, 1)}, images=500, panel=50)
        for trial in search:
            for item in trial:
                trial.report(score(trial.weights, item))
        best = search.best()

    `space` gives the range of each weight, or the names of which one is to be chosen. `panel` is the
    number of images that can be asked for, or the payload of each, so that easy payloads are told from
    good merges. The same `item` should be the same prompt and seed for all trials: merges that were
    shown the same images are compared best. A search is over when `images` are spent.

    `optimiser` is "bayes", "tpe", "cmaes", "random", "sobol" or the dotted path of an Optuna sampler,
    with `options`. The points of `start` are tried first, then `init_points` that explore as `init` says
    ("sobol", "lhs", "uniform"); a trial is shown `per_trial` images. What is None is chosen well.
    `stop` is (min_gain, patience): the search ends early when it has expected to gain less than that,
    in units of the score, so many times in a row.

    With `storage`, the URL of an Optuna storage, every score is kept there under `name` as it is
    reported; the same search opened again goes on with what is missing.
    """

    def __init__(
        self,
        space: Mapping[str, tuple[float, float] | Sequence[str]],
        *,
        images: int,
        panel: int | Sequence[str],
        seed: int = 0,
        optimiser: str = "bayes",
        options: Mapping[str, Any] | None = None,
        start: Sequence[Params] = (),
        init: Init = "sobol",
        init_points: int | None = None,
        per_trial: int | None = None,
        stop: tuple[float, int] | None = None,
        storage: str | None = None,
        name: str = "search",
    ) -> None:
        """ConfigError for mistakes, for a storage that does not answer and for another's study."""
        _require_kinds(
            images=images, seed=seed, init_points=init_points, per_trial=per_trial, name=name
        )
        bounds, choices = _parted(space)
        self.plan = Plan(
            bounds=bounds,
            choices=choices,
            panel=_payloads(panel),
            images=images,
            optimiser=optimiser,
            options=options or {},
            init=init,
            init_points=init_points,
            per_trial=per_trial,
            start=_starts(start),
            stop=_stop(stop),
            seed=int(seed),
        )
        if optimiser == "gradient":
            raise ConfigError(
                "optimiser gradient needs slopes, which this search is not told; take bayes"
            )
        self.plan.check()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with storage_errors():
            self._study = optuna.create_study(
                storage=storage and storage_at(storage),
                study_name=name,
                direction="maximize",
                load_if_exists=True,
            )
            identity = {
                "space": {**self.plan.bounds, **self.plan.choices},
                "panel": self.plan.panel,
                "optimiser": optimiser,
                "options": dict(self.plan.options),
                "init": init,
                "start": [
                    {n: v if isinstance(v, str) else float(v) for n, v in point.items()}
                    for point in self.plan.start
                ],
                "seed": self.plan.seed,
            }
            require_same(
                self._study,
                identity,
                f"the study {name!r} belongs to another search",
                "choose another name, or change it back",
            )
            self._study.set_user_attr("identity", identity)
        self._proposer = Proposer(self._study, self.plan, lambda scores: scores[_NAME])

    @property
    def spent(self) -> int:
        """Images that were judged."""
        return n_judged(self._study)

    def __iter__(self) -> Iterator[SearchTrial]:
        """Trials until the images are spent; one that was left without any score has failed."""
        silent = 0
        while not self._is_over():
            with storage_errors():
                trial = SearchTrial(self._study, self._proposer.begin())
            yield trial
            with storage_errors():
                if trial.mean is None:
                    self._study.tell(trial.number, state=TrialState.FAIL)
                else:
                    self._study.tell(trial.number, trial.mean)
            silent = silent + 1 if trial.mean is None else 0
            if silent == _SILENT_IN_A_ROW:
                raise RunError(f"{silent} trials in a row were left without a score")

    def _is_over(self) -> bool:
        with storage_errors():
            return self._proposer.is_over()

    def best(self) -> Best:
        """The recommended weights, which need not have been tried; RunError before any score."""
        with storage_errors():
            found = self._proposer.few(1)
        if not found:
            raise RunError("no image was judged, so there is nothing to recommend")
        _, weights, value = found[0]
        return Best(weights, value.mean, value.se)


def _require_kinds(*, name: object, **numbers: object) -> None:
    """ConfigError for what is no whole number, or a seed below 0, or a name that is no text."""
    for what, number in numbers.items():
        if number is None and what in ("init_points", "per_trial"):
            continue
        if not isinstance(number, Integral) or (what == "seed" and number < 0):
            raise ConfigError(f"{what} is {number!r}; give a whole number")
    if not isinstance(name, str):
        raise ConfigError(f"name is {name!r}; give a text")


def _parted(
    space: Mapping[str, tuple[float, float] | Sequence[str]],
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[str, ...]]]:
    """Ranges, and names of which one is to be chosen; ConfigError for what is neither."""
    bounds, choices = {}, {}
    for key, given in space.items():
        try:
            if not isinstance(given, str) and all(isinstance(one, str) for one in given):
                choices[key] = tuple(map(str, given))
            else:
                low, high = map(float, given)
                bounds[key] = (low, high)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{key}: {given!r} is neither a range nor a list of names"
            ) from error
    return bounds, choices


def _payloads(panel: int | Sequence[str]) -> list[str]:
    """The payload of each image; ConfigError if it is neither their number nor their names."""
    if isinstance(panel, Integral):
        n_images = int(panel)
        if n_images > MOST_IMAGES:
            raise ConfigError(f"panel is {panel}; more than {MOST_IMAGES} images are too many")
        return [""] * n_images
    if (
        isinstance(panel, str)
        or not isinstance(panel, Sequence)
        or not all(isinstance(name, str) for name in panel)
    ):
        raise ConfigError(f"panel is {panel!r}; give the number of images or the payload of each")
    return list(panel)


def _starts(points: Iterable[object]) -> tuple[Params, ...]:
    """ConfigError for a point that is no mapping."""
    found = []
    for number, point in enumerate(points, start=1):
        if not isinstance(point, Mapping):
            raise ConfigError(f"start {number}: {point!r} does not map names to weights")
        found.append(point)
    return tuple(found)


def _stop(given: tuple[float, int] | None) -> Stop | None:
    """ConfigError if it is no pair."""
    if given is None:
        return None
    try:
        min_gain, patience = given
        return Stop(float(min_gain), int(patience))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"stop is {given!r}; give (min_gain, patience)") from error
