"""Where a search looks next: the optimisers by name, and which images a merge is shown."""

from __future__ import annotations

import importlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate, count, islice, pairwise
from numbers import Real
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from bayesian_merger import pairs
from bayesian_merger.bayes import N_RULES, Bayes, Judged, Recommended
from bayesian_merger.data import Estimate, Slice, Slopes
from bayesian_merger.errors import ConfigError, one_line
from bayesian_merger.gp import PARTIAL, WHOLE, Array
from bayesian_merger.registry import nearest
from bayesian_merger.slopes import Slope
from bayesian_merger.study.evolution import Evolution
from bayesian_merger.values import weighted_mean

Init = Literal["sobol", "lhs", "uniform"]
Params: TypeAlias = Mapping[str, Any]
"""A number for each weight that varies, and a name for each thing to choose."""

Value = Callable[[Mapping[str, float]], float] | None
"""The scores of one image -> its value; None where choices stand in place of scores."""

# Attributes of a trial: the scores of its images and their slopes, whether these are wanted, and why
# they were not to be had.
SCORE, SLOPE, FOLLOWS, UNFOLLOWED = "score:", "slope:", "follows", "unfollowed"
# Attributes of a study that goes on from another: points to try first, the payloads of images beside
# the panel's; and of a trial that was judged elsewhere, its name.
STARTS, FOREIGN, OBSERVED = "starts", "foreign", "observed"
_GAIN = "gain:"
_EVERY = 5
_N_SLICED = 11
_USUAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "tpe": ("optuna.samplers.TPESampler", {"multivariate": True, "n_startup_trials": 0}),
    "cmaes": ("optuna.samplers.CmaEsSampler", {"n_startup_trials": 0}),
    "random": ("optuna.samplers.RandomSampler", {}),
    "sobol": ("optuna.samplers.QMCSampler", {"scramble": True}),
}
OPTIMISERS = ("bayes", "gradient", *_USUAL)
# These know the scores of single images.
_OURS = OPTIMISERS[:2]
# Images of a trial, for optimisers that hear of their mean only.
_N_MEAN = 10
# Bayes takes so few images in turn at first, and twice as many when each was shown twice so often. Of
# fewer it learns what becomes these images and not what is better; of more it cannot tell the easy ones.
_FEWEST, _SHOWN = 5, 10
# Gradient takes images that no merge was shown: so many for a merge, and a sixteenth of those shown so
# far, in threes; near the best merge only many images tell where to go.
_FOLLOWED, _OF_SHOWN = 6, 48
MOST_IMAGES = 100_000
"""More than any search has use for."""
FRESH = 1 << 20
"""The numbers of images beside the panel begin here: payload by payload in the order of the panel."""
# It is given up when it leads to worse merges: the last four trials, or third of them, on images that no
# proposal was made on, score so many standard errors less than the merge where it began.
_FEWEST_LED, _MISLED = 4, 2.5
# And when so many merges in a row told no slope: of memory too small, or a score that does not change.
_SILENT = 2
# A search begins beside a parent if their weights differ by less on average; A and B differ by 1.
_BESIDE = 0.25
# Attribute of a search that gives it up, with the reason.
GIVEN_UP = "gradient given up"
# The name of the merge that is recommended, which need not have been tried.
RECOMMENDED = "recommended"


class Objective(NamedTuple):
    """One of several things to be good at: a scorer's score, or the value on a payload's images."""

    name: str
    kind: Literal["scorer", "payload"]


class Stop(NamedTuple):
    """When a search ends early: `patience` times in a row no more than `min_gain` was to be expected.

    `min_gain` is in the units of the value. What a search expects is computed after every fifth trial.
    """

    min_gain: float
    patience: int = 3


@dataclass(frozen=True)
class Plan:
    """How a search proposes: where, by which optimiser, on which images.

    `bounds` are those of each parameter, `choices` the names of which one is chosen. `panel` names the
    payload of each image, and a payload's images have a share as `shares` says, or an equal one.
    `optimiser` is one of OPTIMISERS or the dotted path of an Optuna sampler, which is called with
    `options`. The first trials are `start`, the next `init_points` explore as `init` says. The search
    ends when `images` are spent or, if that is given, after `n_iters` more trials, or as `stop` says. A
    trial is shown `per_trial` images; for None, bayes shows one to merges that explore and two to
    others, gradient six new ones and later more, and other optimisers ten. With `objectives` bayes looks
    in turn for what is good on average and at each of them. Gradient begins at `origin`; for None, in
    the middle of the ranges.
    """

    bounds: Mapping[str, tuple[float, float]]
    panel: Sequence[str]
    images: int | None = None
    n_iters: int | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    optimiser: str = "bayes"
    options: Mapping[str, Any] = field(default_factory=dict)
    init: Init = "sobol"
    init_points: int | None = None
    per_trial: int | None = None
    start: Sequence[Params] = ()
    stop: Stop | None = None
    seed: int = 0
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    objectives: Sequence[Objective] = ()
    origin: Params | None = None

    def check(self) -> None:
        """ConfigError with every mistake, one on a line."""
        mistakes = [
            f"{name}: from {low} to {high} is no range; put the low end first"
            for name, (low, high) in self.bounds.items()
            if not (math.isfinite(low) and math.isfinite(high) and low < high)
        ]
        mistakes += [
            f"{name}: {', '.join(map(repr, known)) or 'nothing'} is no choice; give two or more names"
            for name, known in self.choices.items()
            if len(set(known)) < max(2, len(known))
        ]
        if not self.names:
            mistakes.append("no parameter varies, so there is nothing to search")
        if not self.panel:
            mistakes.append("the panel has no image")
        if self.images is None and self.n_iters is None:
            mistakes.append("neither images nor n_iters says when the search ends")
        if self.images is not None and self.images < 1:
            mistakes.append(f"images is {self.images}; give a search at least one")
        if max(self.images or 0, self.n_iters or 0, self.init_points or 0) > MOST_IMAGES:
            mistakes.append(f"a search has at most {MOST_IMAGES} images and trials")
        if self.n_iters is not None and self.n_first + self.n_iters < 1:
            mistakes.append("init_points and n_iters are both 0, so there is no trial")
        if self.init not in get_args(Init):
            mistakes.append(f"unknown init {self.init!r}{nearest(self.init, get_args(Init))}")
        if self.per_trial is not None and self.per_trial < 1:
            mistakes.append(f"per_trial is {self.per_trial}; a trial takes at least one image")
        if self.init_points is not None and self.init_points < 0:
            mistakes.append(f"init_points is {self.init_points}")
        if self.stop and not (0 < self.stop.min_gain < math.inf and self.stop.patience >= 1):
            mistakes.append("stop: min_gain is a number above 0, and patience at least 1")
        for number, point in enumerate(self.start, start=1):
            mistakes += self._mistakes(point, f"start {number}")
        try:
            if self.optimiser not in _OURS:
                self.sampler(0)
            mistakes += self._mistaken_options()
        except ConfigError as error:
            mistakes.append(str(error))
        if mistakes:
            raise ConfigError("\n".join(mistakes))

    def _mistaken_options(self) -> list[str]:
        known = {"bayes": [], "gradient": ["last"]}.get(self.optimiser, [*self.options])
        strange = [name for name in self.options if name not in known]
        if strange:
            hint = f"; known: {', '.join(known)}" if known else ""
            return [f"optimiser {self.optimiser} has no option {strange[0]!r}{hint}"]
        is_number = self.last is None or (type(self.last) is int and self.last >= 1)
        if self.optimiser == "gradient" and not is_number:
            return [
                f"last is {self.last!r}; give a number of steps from 1 on, or leave it out for all"
            ]
        return []

    @property
    def last(self) -> int | None:
        """Of gradient: through how many of the last denoising steps it goes, None for all."""
        found: int | None = self.options.get("last")
        return found

    def _mistakes(self, point: Params, what: str) -> list[str]:
        """What is wrong with a point that is to be tried."""
        strange = [name for name in point if name not in self.names]
        if strange:
            return [f"{what}: {strange[0]!r} does not vary{nearest(strange[0], self.names)}"]
        missing = [name for name in self.names if name not in point]
        if missing:
            return [f"{what}: has no {missing[0]!r}"]
        unknown = [(n, known) for n, known in self.choices.items() if point[n] not in known]
        if unknown:
            name, known = unknown[0]
            return [f"{what}: {name} is {point[name]!r}, none of {', '.join(known)}"]
        no_number = [n for n in self.bounds if not isinstance(point[n], Real)]
        if no_number:
            return [f"{what}: {no_number[0]} is {point[no_number[0]]!r}, not a number"]
        return [
            f"{what}: {name} is {point[name]}, outside its range {low:g} to {high:g}"
            for name, (low, high) in self.bounds.items()
            if not low <= point[name] <= high
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters: what varies, then what is chosen."""
        return (*self.bounds, *self.choices)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            **{name: FloatDistribution(low, high) for name, (low, high) in self.bounds.items()},
            **{name: CategoricalDistribution(known) for name, known in self.choices.items()},
        }

    @property
    def n_first(self) -> int:
        """How many trials are begun without the optimiser."""
        if self.init_points is not None:
            return len(self.start) + self.init_points
        if self.optimiser == "gradient":
            return len(self.start) + 1
        is_bayes = self.optimiser == "bayes"
        usual = min(4 * len(self.names), 100) if is_bayes else 10
        n_each = self.per_trial or (1 if is_bayes else _N_MEAN)
        # Half of the images at most.
        most = self.n_iters if self.images is None else self.images // (2 * n_each)
        return len(self.start) + min(usual, most or 0)

    def spent(self, n_trials: int, n_images: int) -> float:
        """How much of the search is over, from 0; it ends at 1."""
        of_images = n_images / self.images if self.images else 0.0
        if self.n_iters is None:
            return of_images
        return max(of_images, n_trials / (self.n_first + self.n_iters))

    @property
    def n_images(self) -> int:
        """Images of the whole search, if no trial fails."""
        return self._size[1]

    @property
    def n_trials(self) -> int:
        """Trials of the whole search, if none fails."""
        return self._size[0]

    @cached_property
    def _size(self) -> tuple[int, int]:
        trials = images = 0
        while self.spent(trials, images) < 1:
            images += len(self.items(trials, images, self.left(images)))
            trials += 1
        return trials, images

    @property
    def corners(self) -> list[slice]:
        """The coordinates of each choice in a point."""
        sizes = [len(self.bounds), *(len(known) for known in self.choices.values())]
        ends = list(accumulate(sizes))
        return [slice(i, j) for i, j in pairwise(ends)]

    @property
    def d(self) -> int:
        """Coordinates of a point."""
        return len(self.bounds) + sum(len(known) for known in self.choices.values())

    def scaled(self, params: Params) -> Array:
        """The parameters as a point in [0, 1]^d; what is chosen has a 1, its rivals have 0."""
        spans = self.bounds.items()
        flat = [(params[name] - low) / (high - low) for name, (low, high) in spans]
        chosen = [float(params[n] == one) for n, known in self.choices.items() for one in known]
        return np.array([*flat, *chosen])

    def params(self, point: Array) -> dict[str, Any]:
        """The parameters of a point in [0, 1]^d."""
        pairs = zip(self.bounds.items(), point, strict=False)
        # Rounding may not lead out of the range.
        flat = {n: min(high, float(low + x * (high - low))) for (n, (low, high)), x in pairs}
        chosen = zip(self.choices.items(), self.corners, strict=True)
        return {**flat, **{n: known[int(point[c].argmax())] for (n, known), c in chosen}}

    def first(self, place: int) -> dict[str, Any]:
        """A start, or an exploring point of the design."""
        if place < len(self.start):
            given = self.start[place]
            flat = {name: float(given[name]) for name in self.bounds}
            return {**flat, **{name: given[name] for name in self.choices}}
        if self.optimiser == "gradient" and place == len(self.start):
            return self.beginning
        point = self._design(place - len(self.start))
        # Towards the faces: the ends of a range tell more of a weight than its middle.
        weights = point[: len(self.bounds)]
        if self.init == "sobol":
            weights = np.sin(np.pi / 2 * weights) ** 2
        pairs = zip(self.choices.values(), point[len(self.bounds) :], strict=True)
        places = [(known, int(x * len(known))) for known, x in pairs]
        chosen = [np.eye(len(known))[i] for known, i in places]
        return self.params(np.concatenate([weights, *chosen]))

    @property
    def beginning(self) -> dict[str, Any]:
        """Where gradient begins."""
        if self.origin is not None:
            return dict(self.origin)
        flat = {name: (low + high) / 2 for name, (low, high) in self.bounds.items()}
        return {**flat, **{name: known[0] for name, known in self.choices.items()}}

    def _design(self, place: int) -> Array:
        """Point number `place` of the design, in [0, 1) for each parameter."""
        d, n = len(self.names), self.n_first - len(self.start)
        # Beyond the design there is nothing but chance.
        if self.init == "uniform" or (self.init == "lhs" and place >= n):
            drawn: Array = np.random.default_rng([self.seed, place]).uniform(size=d)
            return drawn
        if self.init == "lhs":
            found: Array = qmc.LatinHypercube(d, rng=self.seed).random(n)[place]
            return found
        point: Array = qmc.Sobol(d, rng=self.seed).random_base2((place + 1).bit_length())[place]
        return point

    def items(
        self, place: int, shown: int, left: int | None = None, follows: bool = True
    ) -> list[int]:
        """The images for trial number `place`, when trials before it were given `shown`; at most `left`.

        Those of gradient are new, of each payload by its share, but where it no longer `follows`.

        Bayes takes few images in turn, so that few offsets have to be learnt and each payload has its
        share. Other optimisers hear of means only, hence the same images for all.
        """
        if self.optimiser == "gradient" and follows:
            n = self.per_trial or max(_FOLLOWED, shown // _OF_SHOWN * 3)
            return self._turn(None, shown, n)[:left]
        if self.optimiser not in _OURS:
            return self._turn(len(self.panel), 0, self.per_trial or _N_MEAN)[:left]
        explores = len(self.start) <= place < self.n_first
        n = self.per_trial or (1 if explores else 2)
        fewest = _FEWEST
        while shown >= 2 * _SHOWN * fewest:
            fewest *= 2
        n_shown = len({payload for payload in self.panel if self.share(payload) > 0})
        return self._turn(math.ceil(max(fewest, n) / n_shown), shown, n)[:left]

    def left(self, judged: int) -> int | None:
        """How many more images may be spent; None where their number is no limit."""
        return None if self.images is None else max(1, self.images - judged)

    def _turn(self, rounds: int | None, first: int, n: int) -> list[int]:
        """`n` of the images that `_turns` gives from number `first` on, each once."""
        taken, further = self._taken.setdefault(rounds, ([], self._turns(rounds)))
        taken.extend(islice(further, max(0, first + n - len(taken))))
        return list(dict.fromkeys(taken[first : first + n]))

    @cached_property
    def _taken(self) -> dict[int | None, tuple[list[int], Iterator[int]]]:
        return {}

    def _turns(self, rounds: int | None) -> Iterator[int]:
        """Images of the first so many rounds of the payloads for ever, each payload by its share.

        None for new ones, which the payloads that count have in the order of the panel.
        """
        counted = [(item, name) for item, name in enumerate(self.panel) if self.share(name) > 0]
        of_payload: dict[str, list[int]] = {}
        for place, (item, payload) in enumerate(counted):
            of_payload.setdefault(payload, []).append(place if rounds is None else item)
        total = sum(map(self.share, of_payload))
        taken = dict.fromkeys(of_payload, 0)
        for n in count(1):
            # The payload that lags behind its share most; the first of equals.
            payload = max(of_payload, key=lambda p: n * self.share(p) / total - taken[p])
            few = of_payload[payload][:rounds]
            turn, place = divmod(taken[payload], len(few))
            yield FRESH + turn * len(counted) + few[place] if rounds is None else few[place]
            taken[payload] += 1

    def share(self, payload: str) -> float:
        """How much a payload counts beside others."""
        return self.shares.get(payload, 1.0)

    def sampler(self, place: int) -> BaseSampler:
        """Optuna's optimiser for trial number `place`, from which all its chance comes."""
        name = self.optimiser
        if not isinstance(name, str):
            raise ConfigError(f"optimiser is {name!r}; give its name")
        if name not in _USUAL and "." not in name:
            known = f"; known: {', '.join(OPTIMISERS)}, or the path of an Optuna sampler"
            raise ConfigError(f"unknown optimiser {name!r}{nearest(name, OPTIMISERS) or known}")
        path, usual = _USUAL.get(name, (name, {}))
        seed = self.seed if name == "sobol" else _seed(self.seed, place)
        module, _, cls = path.rpartition(".")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                kind = getattr(_module(module), cls)
                # Looked at before it is called: a path may name any function there is.
                if isinstance(kind, type) and issubclass(kind, BaseSampler):
                    kind = Evolution if kind is CmaEsSampler else kind
                    return kind(**{"seed": seed, **usual, **self.options})
        except Exception as error:  # a sampler of others may raise anything
            raise ConfigError(f"optimiser {name}: {one_line(error)}") from error
        raise ConfigError(f"optimiser {name} is no Optuna sampler")


@cache
def _module(path: str) -> ModuleType:
    """A module that can be imported, or after "optunahub." what OptunaHub has under that path."""
    hub, _, package = path.partition(".")
    if hub != "optunahub":
        return importlib.import_module(path)
    try:
        found: ModuleType = importlib.import_module(hub).load_module(package.replace(".", "/"))
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install it with: pip install optunahub") from error
    return found


class Payloads:
    """The payload of each image: of the panel, then the `foreign`, and from FRESH on of new ones.

    New images are of those payloads of the panel that have a share.
    """

    def __init__(
        self, panel: Sequence[str], foreign: Sequence[str], shares: Mapping[str, float]
    ) -> None:
        self._known = [*panel, *foreign]
        self._panel = [name for name in panel if shares.get(name, 1.0) > 0]

    def __getitem__(self, item: int) -> str:
        if item >= FRESH:
            return self._panel[(item - FRESH) % len(self._panel)]
        return self._known[item]


class Bayesian:
    """Proposes by a Gaussian process of the scores of single images, and of slopes where there are any.

    It reads them from the trials' attributes "score:0", "score:1" and so on, one for each image of the
    panel that a trial was shown. Images of the `foreign` payloads, which no trial is shown, count from
    there.
    """

    def __init__(self, plan: Plan, value: Value, foreign: Sequence[str] = ()) -> None:
        self._plan, self._value = plan, value
        # What is recommended is to be good at the panel.
        shares = {name: plan.shares.get(name, 1.0) for name in plan.panel}
        shares |= dict.fromkeys(foreign, 0.0)
        panel = Payloads(plan.panel, foreign, plan.shares)
        # One for each objective, as each keeps hyperparameters; the first is for all together.
        self._of = [
            Bayes(
                plan.d,
                panel,
                plan.seed,
                shares,
                plan.corners,
                WHOLE if plan.last is None else PARTIAL,
                value is None,
            )
            for _ in range(1 + len(plan.objectives))
        ]
        self._bayes = self._of[0]

    def propose(self, study: Study) -> Params:
        """The parameters to be tried next."""
        place = len(begun(study))
        spent = self._plan.spent(place, n_promised(study))
        # The rules take turns too, so an objective keeps its turn for a round of them.
        turn = place // N_RULES % (1 + len(self._plan.objectives))
        judged = self._judged(study, self._plan.objectives[turn - 1] if turn else None)
        judged = judged or self._judged(study)
        # Slopes lead to a better merge from where they are; they know little of what is far away.
        if self._follows(study):
            return self._plan.params(self._of[turn].best(judged).point)
        awaited = self._awaited(study)
        return self._plan.params(self._of[turn].propose(judged, place, spent, awaited))

    def gain(self, study: Study) -> float:
        """By how much the value is expected to rise if the most promising merge were known exactly."""
        found = self._judged(study)
        return self._bayes.gain(found) if found else math.inf

    def best(self, study: Study) -> Recommended | None:
        """The recommended point, without another fit; None where nothing was measured."""
        found = self._judged(study)
        return self._bayes.best(found) if found else None

    def few(self, study: Study, n: int) -> list[Recommended]:
        """The recommended point and the next best; none where nothing was measured."""
        found = self._judged(study)
        return self._bayes.few(found, n) if found else []

    def slices(self, study: Study, params: Params) -> dict[str, Slice]:
        """What is gained as one weight of a merge varies; none where nothing was measured."""
        found = self._judged(study)
        if not found:
            return {}
        point = self._plan.scaled(params)
        means, errors = self._bayes.slices(found, point, _N_SLICED)
        return {
            name: Slice(
                at=float(params[name]),
                places=tuple(np.linspace(low, high, _N_SLICED).tolist()),
                gains=tuple(
                    Estimate(float(m), float(e), 0) for m, e in zip(mean, error, strict=True)
                ),
            )
            for (name, (low, high)), mean, error in zip(
                self._plan.bounds.items(), means, errors, strict=False
            )
        }

    def by_scores(self, study: Study) -> Recommended | None:
        """What would be recommended without the slopes; None where there are none."""
        found = self._judged(study)
        if not any(one.slopes for one in found):
            return None
        return self._bayes.few([one._replace(slopes=()) for one in found], 1)[0]

    def mean(self, trials: Sequence[FrozenTrial]) -> Estimate | None:
        """The mean value of what the trials were shown, each payload by its share."""
        own, share = self._bayes.panel, self._plan.share
        seen = [
            (own[item], value)
            for trial in trials
            for item, value in self._values(trial, None).items()
            if share(own[item]) > 0
        ]
        n_of = Counter(payload for payload, _ in seen)
        weights = [share(payload) / n_of[payload] for payload, _ in seen]
        return weighted_mean([value for _, value in seen], weights) if seen else None

    def front(self, study: Study, n: int) -> list[tuple[Array, list[tuple[float, float]]]]:
        """Points of the Pareto front, each with mean and standard error of every objective."""
        judged = [self._judged(study, objective) for objective in self._plan.objectives]
        if not all(judged):
            return []
        learnt = [self._bayes.learnt(some) for some in judged]
        points = self._bayes.compromises(learnt, n)
        return [(x, [p.expected(torch.from_numpy(x)) for p in learnt]) for x in points]

    def _judged(self, study: Study, objective: Objective | None = None) -> list[Judged]:
        if self._value is None:
            return self._compared(study)
        found = []
        follows = self._follows(study)
        for trial in valid(study):
            values = self._values(trial, objective)
            is_known = trial.params.keys() == set(self._plan.names)
            if values and is_known and not (follows and self._is_far(trial)):
                slopes = self._slopes(trial) if follows and objective is None else []
                found.append(Judged(self._plan.scaled(trial.params), values, slopes))
        return found

    def _compared(self, study: Study) -> list[Judged]:
        """The even merge first, if the search can propose it, then the others in order."""
        trials = [t for t in valid(study) if t.params.keys() == set(self._plan.names)]
        trials.sort(key=lambda t: _name_of(t) != "even")
        choices = pairs.by_number([(_name_of(trial), scores_of(trial)) for trial in trials])
        return [
            Judged(self._plan.scaled(trial.params), {}, choices=own)
            for trial, own in zip(trials, choices, strict=True)
        ]

    def _awaited(self, study: Study) -> list[Array]:
        """The merges that are being judged, once for each image whose scores are not known."""
        found = []
        for trial in begun(study):
            if trial.state == TrialState.RUNNING and trial.params.keys() == set(self._plan.names):
                n_awaited = len(trial.user_attrs["items"]) - len(scores_of(trial))
                found += [self._plan.scaled(trial.params)] * n_awaited
        return found

    def _is_far(self, trial: FrozenTrial) -> bool:
        """Whether a trial is a parent beside which the search has not begun.

        One that scores well would hold a search that goes uphill from the even merge.
        """
        if trial.user_attrs.get("stage") != "baseline" or trial.user_attrs[OBSERVED] == "even":
            return False
        begun_at = self._plan.scaled(self._plan.beginning)
        return float(np.abs(self._plan.scaled(trial.params) - begun_at).mean()) > _BESIDE

    def _follows(self, study: Study) -> bool:
        return self._plan.optimiser == "gradient" and GIVEN_UP not in study.user_attrs

    def _slopes(self, trial: FrozenTrial) -> list[Slope]:
        """What is stored of them, by the coordinates of a point; not a number where there is none."""
        found = []
        for slopes in slopes_of(trial):
            if slopes.by:
                slope = np.full(self._plan.d, np.nan)
                for i, (name, (low, high)) in enumerate(self._plan.bounds.items()):
                    slope[i] = slopes.by.get(name, np.nan) * (high - low)
                found.append(Slope(len(slopes.items), slope))
        return found

    def _values(self, trial: FrozenTrial, objective: Objective | None) -> dict[int, float]:
        scores = scores_of(trial)
        assert self._value
        if objective is None:
            return {item: self._value(found) for item, found in scores.items()}
        if objective.kind == "scorer":
            name = objective.name
            return {item: found[name] for item, found in scores.items() if name in found}
        own = self._bayes.panel
        return {i: self._value(s) for i, s in scores.items() if own[i] == objective.name}


class Proposer:
    """Begins the trials of a search in an Optuna study.

    The study is all that it knows: a search that is opened again goes on as it would have.
    """

    def __init__(self, study: Study, plan: Plan, value: Value) -> None:
        attrs = study.user_attrs
        # A longer run explores no more than it would have.
        if plan.init_points is None:
            if "init_points" not in attrs:
                trials = study.get_trials(deepcopy=False)
                n_known = sum(t.user_attrs.get("stage") == "brought" for t in trials)
                n_wanted = plan.n_first - len(plan.start) - n_known
                study.set_user_attr("init_points", max(0, n_wanted))
            plan = replace(plan, init_points=study.user_attrs["init_points"])
        self.study = study
        self.plan = replace(plan, start=(*attrs.get(STARTS, ()), *plan.start))
        self._bayes = Bayesian(self.plan, value, attrs.get(FOREIGN, ()))

    def begin(
        self,
        about: Callable[[Params], Mapping[str, Any]] = lambda _: {},
        taken: Collection[int] = (),
    ) -> FrozenTrial:
        """A trial that was interrupted, or else a new one, running.

        `about` tells further attributes of a new trial by its parameters. The trials of the numbers
        `taken` are being judged.
        """
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING and trial.number not in taken:
                if "items" in trial.user_attrs:
                    return trial
                # Killed between the proposal and the rest: nothing was measured.
                self.study.tell(trial.number, state=TrialState.FAIL)
        plan, study = self.plan, _seen(self.study)
        before = begun(study)
        place = len(before)
        shown = sum(len(trial.user_attrs["items"]) for trial in before)
        follows = plan.optimiser == "gradient" and not self._gives_up()
        items = plan.items(place, shown, plan.left(n_promised(study)), follows)
        # An optimiser needs a score to begin with, and as it does not hear of a failure it would ask for
        # the same again.
        is_blind = not any(any(scores_of(t).values()) for t in valid(study))
        has_failed = any(trial.state == TrialState.FAIL for trial in before[-1:])
        attrs = {"stage": "exploit", FOLLOWS: follows, "items": items}
        if place < plan.n_first or is_blind or has_failed:
            params: Params = plan.first(place)
            attrs["stage"] = "explore"
        elif plan.optimiser in _OURS:
            params = self._bayes.propose(study)
        else:
            self.study.sampler = plan.sampler(place)
            asked = self.study.ask(plan.distributions)
            # The items come last: a trial that has them has all.
            for key, found in {**about(asked.params), **attrs}.items():
                asked.set_user_attr(key, found)
            trials = self.study.get_trials(deepcopy=False)
            return next(trial for trial in trials if trial.number == asked.number)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=plan.distributions,
                user_attrs={**about(params), **attrs},
            )
        )
        return self.study.get_trials(deepcopy=False)[-1]

    def _gives_up(self) -> bool:
        """Whether the gradient is followed no more, which is stored with its reason."""
        if GIVEN_UP in self.study.user_attrs:
            return True
        reason = self._fault()
        if reason:
            self.study.set_user_attr(GIVEN_UP, reason)
        return bool(reason)

    def _fault(self) -> str | None:
        """What speaks against following the gradient any further."""
        complete = [t for t in begun(self.study) if t.state == TrialState.COMPLETE]
        followed = [trial for trial in complete if trial.user_attrs[FOLLOWS]]
        last = followed[-_SILENT:]
        if len(last) == _SILENT and not any(s.by for trial in last for s in slopes_of(trial)):
            why = last[-1].user_attrs.get(UNFOLLOWED)
            return f"{_SILENT} merges in a row told no slope" + (f" ({why})" if why else "")
        led = [trial for trial in followed if trial.user_attrs["stage"] == "exploit"]
        few = led[-max(_FEWEST_LED, len(led) // 3) :]
        start = [t for t in valid(self.study) if t.params == self.plan.beginning] or followed[:1]
        at_start, at_few = (self._bayes.mean(trials) for trials in (start, few))
        if len(few) < _FEWEST_LED or not at_start or not at_few or at_start.n < 2:
            return None
        if at_few.mean < at_start.mean - _MISLED * math.hypot(at_start.se, at_few.se):
            return "the merges that the gradient led to score worse than the one it began at"
        return None

    @property
    def has_stopped(self) -> bool:
        """Whether it is over before its images or trials are spent."""
        n_finished = sum(trial.state.is_finished() for trial in begun(self.study))
        return self.is_over() and self.plan.spent(n_finished, n_judged(self.study)) < 1

    def is_over(self) -> bool:
        """Whether the images or trials are spent, or little is to be gained by more."""
        trials = begun(self.study)
        n_finished = sum(trial.state.is_finished() for trial in trials)
        if n_finished < len(trials):
            return False  # one was interrupted
        return self.is_promised()

    def is_promised(self) -> bool:
        """Whether it is over once the trials that have begun are judged."""
        study = _seen(self.study)
        trials = begun(study)
        n_finished = sum(trial.state.is_finished() for trial in trials)
        if self.plan.spent(len(trials), n_promised(study)) >= 1:
            return True
        if self.plan.stop is None or n_finished < self.plan.n_first:
            return False
        last = n_finished // _EVERY * _EVERY
        if last == n_finished and f"{_GAIN}{last}" not in self.study.user_attrs:
            self.study.set_user_attr(f"{_GAIN}{last}", self._bayes.gain(self.study))
        times = [last - i * _EVERY for i in range(self.plan.stop.patience)]
        gains = [self.study.user_attrs.get(f"{_GAIN}{n}", math.inf) for n in times]
        return bool(max(gains) < self.plan.stop.min_gain)

    def best(self) -> tuple[dict[str, Any], Estimate] | None:
        """The parameters that would be recommended now, as far as known without another fit."""
        found = self._bayes.best(self.study)
        return found and self._told(found)

    def few(self, n: int) -> list[tuple[str, dict[str, Any], Estimate]]:
        """The recommended merge and the next best: name, parameters and expected value.

        The first, "recommended", need not have been tried; the others have the names of their trials.
        After a gradient the second is what the scores alone speak for. There is none where nothing was
        measured.
        """
        found = [self._told(one) for one in self._bayes.few(self.study, n)]
        names = [RECOMMENDED, *(self._name(params) for params, _ in found[1:])]
        if n > 1 and (other := self._bayes.by_scores(self.study)):
            found.insert(1, self._told(other))
            names.insert(1, "by scores alone")
        return [(name, *one) for name, one in zip(names, found, strict=False)][:n]

    def slices(self, params: Params) -> dict[str, Slice]:
        """What is gained as one weight of a merge varies and the others stay as they are."""
        return self._bayes.slices(self.study, params)

    def front(self, n: int) -> list[tuple[dict[str, Any], dict[str, Estimate]]]:
        """At most `n` merges of the Pareto front of the objectives, and what is expected of each.

        The best at the first objective comes first.
        """
        n_images = n_judged(self.study)
        found = sorted(self._bayes.front(self.study, n), key=lambda one: -one[1][0][0])
        return [
            (
                self.plan.params(point),
                {
                    objective.name: Estimate(mean, se, n_images)
                    for objective, (mean, se) in zip(self.plan.objectives, expected, strict=True)
                },
            )
            for point, expected in found
        ]

    def _name(self, params: Params) -> str:
        """That of the trial that is nearest to the parameters."""
        wanted = self.plan.scaled(params)
        trials = [
            t
            for t in self.study.get_trials(deepcopy=False)
            if t.params.keys() == set(self.plan.names)
        ]
        nearest_one = min(
            trials, key=lambda t: float(np.abs(self.plan.scaled(t.params) - wanted).sum())
        )
        return _name_of(nearest_one)

    def _told(self, found: Recommended) -> tuple[dict[str, Any], Estimate]:
        value = Estimate(found.mean, found.se, n_judged(self.study))
        return self.plan.params(found.point), value


class _Seen:
    """What is read of a study, as it stood once: each reading asks a database for all that runs."""

    def __init__(self, study: Study) -> None:
        self.user_attrs = study.user_attrs
        self._trials: list[FrozenTrial] = study.get_trials(deepcopy=False)

    def get_trials(self, deepcopy: bool = True) -> list[FrozenTrial]:
        return self._trials


def _seen(study: Study) -> Study:
    return cast(Study, _Seen(study))


def _name_of(trial: FrozenTrial) -> str:
    attrs = trial.user_attrs
    return str(attrs.get("name") or attrs.get(OBSERVED) or f"trial {trial.number}")


def begun(study: Study) -> list[FrozenTrial]:
    """The trials in order; what was brought in from elsewhere is not among them."""
    return [t for t in study.get_trials(deepcopy=False) if "items" in t.user_attrs]


def valid(study: Study) -> list[FrozenTrial]:
    """The trials that have not failed; what a failed one has measured counts for nothing."""
    return [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]


def n_judged(study: Study) -> int:
    """Images that were judged in the trials."""
    return sum(len(scores_of(trial)) for trial in begun(study))


def n_promised(study: Study) -> int:
    """Images that were judged in the trials, or are to be in those that have begun."""
    trials = begun(study)
    running = [t for t in trials if t.state == TrialState.RUNNING]
    return n_judged(study) + sum(len(t.user_attrs["items"]) - len(scores_of(t)) for t in running)


def scores_of(trial: FrozenTrial) -> dict[int, Mapping[str, float]]:
    """Image -> its scores, in the order of the panel."""
    found = {k: v["scores"] for k, v in trial.user_attrs.items() if k.startswith(SCORE)}
    return dict(sorted((int(key[len(SCORE) :]), scores) for key, scores in found.items()))


def slopes_of(trial: FrozenTrial) -> tuple[Slopes, ...]:
    """The slopes of a trial's images, in the order of the images."""
    found = [told for key, told in trial.user_attrs.items() if key.startswith(SLOPE)]
    found.sort(key=lambda told: told["items"][0])
    return tuple(Slopes(tuple(told["items"]), told["slopes"]) for told in found)


def _seed(seed: int, place: int) -> int:
    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
