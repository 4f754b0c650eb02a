"""Which merge to try next, and which to recommend, from the scores of single images.

Three rules propose in turn, as no one of them is best everywhere: the upper confidence bound, which
looks where little is known; Thompson sampling, which varies some weights of the best merge so far; and
the expected improvement over that merge. What is recommended is the maximum of the expected score over
all merges, not the merge that was luckiest; where slopes are known, that of the score's lower bound, by
several processes of which each lacks some of the merges (Breiman 1996, Bagging predictors); by choices,
that of the lower bound of the lead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bayesian_merger.choices import Choice
from bayesian_merger.gp import (
    WHOLE,
    Array,
    Belief,
    Chosen,
    Data,
    Expecting,
    Model,
    Posterior,
    Prior,
)
from bayesian_merger.slopes import Slope, pooled

_KAPPA = 2.0
# Downwards, where slopes or choices lead.
_CAUTION, _CAUTION_BY_PAIRS = 1.0, 0.5
# Processes that recommend a merge together, where slopes lead, and steps of the fit of each from the
# hyperparameters of one with all merges.
_N_BAGS, _N_FITTED = 5, 15
_N_SAMPLED = 400
_N_VARIED = 20
_STEP = 0.3
_CHANGED = 0.2
# The hyperparameters are fitted anew after so many further merges, or a twentieth of them.
_EVERY = 3
# Of the images, those that only the expected improvement spends: nothing is learnt for later then.
_LAST = 0.15
# Merges whose weights differ by less on average are one and the same candidate.
_NEAR = 0.05
# Compromises whose expected scores differ by less, in standard deviations, are one.
_TELLING = 0.05


class Judged(NamedTuple):
    """A merge with the scores of the images it has been shown, and the slopes of some of them.

    Or with the choices between its pictures and those of merges before it, by their places in the list.
    """

    point: Array
    scores: Mapping[int, float]
    slopes: Sequence[Slope] = ()
    choices: Sequence[Choice] = ()


class Recommended(NamedTuple):
    """A merge [d], and its expected score with standard error."""

    point: Array
    mean: float
    se: float


class _Panel(Protocol):
    """The payload of each image."""

    def __getitem__(self, item: int, /) -> str: ...


class Bayes:
    """Proposes merges in [0, 1]^d; the same scores make the same proposals.

    With `by_pairs` there are choices in place of scores, and what is expected of a merge is its lead
    over the first.

    `panel` names the payload of each image, `shares` says how much a payload counts beside others.
    `choices` are coordinates of which one is 1 and the others 0, a group for each thing to choose.
    `gain` is that of the slopes, if there are any.
    """

    def __init__(
        self,
        d: int,
        panel: _Panel,
        seed: int,
        shares: Mapping[str, float] | None = None,
        choices: Sequence[slice] = (),
        gain: Prior = WHOLE,
        by_pairs: bool = False,
    ) -> None:
        self.d, self.panel, self.seed, self.shares = d, panel, seed, shares
        self._by_pairs = by_pairs
        self._box, self._gain = _Box(d, choices), gain
        self._fitted: tuple[tuple[int, int, bool], Model] | None = None

    def propose(
        self, judged: Sequence[Judged], place: int, spent: float, awaited: Sequence[Array] = ()
    ) -> Array:
        """The merge to try in trial number `place`, when a share `spent` of the images is.

        The scores of the merges `awaited`, one image each, are not known yet.
        """
        known, incumbent = self._now(judged)
        posterior: Belief = known
        if awaited:
            assert self._fitted
            points = torch.from_numpy(np.array(awaited))
            posterior = Expecting(known, points, self._fitted[1].noise)
        rule = _RULES[-1 if spent >= 1 - _LAST else place % len(_RULES)]
        chance = np.random.default_rng([self.seed, place])
        return rule(posterior, incumbent, self._box, chance).numpy()

    def gain(self, judged: Sequence[Judged]) -> float:
        """By how much the score is expected to rise if the most promising merge were known exactly."""
        posterior, incumbent = self._now(judged)
        chance = np.random.default_rng(self.seed)
        promising = _improvement(posterior, incumbent, self._box, chance)
        log_gain = float(_log_improvement(posterior, incumbent)(promising[None]))
        return posterior.data.scale * math.exp(log_gain)

    def best(self, judged: Sequence[Judged]) -> Recommended:
        """The merge of the highest expected score, as far as the next proposal knows it."""
        posterior, incumbent = self._now(judged)
        return Recommended(incumbent.numpy(), *posterior.expected(incumbent))

    def few(self, judged: Sequence[Judged], n: int) -> list[Recommended]:
        """The merge of the highest expected score, then the judged ones that should be nearly as good.

        The first need not have been tried. They are apart from each other, so that they are not all
        wrong in the same way.
        """
        model, posterior = self._fitted_to(judged)
        middle = torch.full((1, self.d), 0.5, dtype=torch.float64)
        learnt = [posterior]
        if len(posterior.data.sloped):
            learnt = [self._refitted(model, some) for some in _bags(judged)]
        value = self._mean_of(learnt)
        if self._by_pairs:
            # A bad merge may seem good by chance; what is tried next may be less sure.
            value = _lead_bounds(posterior, -_CAUTION_BY_PAIRS)
        best = self._climbed(value, posterior.data.points, 5, self._box.of_each_choice(middle))
        found = [Recommended(best.numpy(), *posterior.expected(best))]
        for i in posterior.at_points.argsort()[::-1]:
            point = judged[i].point
            if len(found) < n and all(_apart(point, one.point) > _NEAR for one in found):
                found.append(Recommended(point, *posterior.expected(torch.from_numpy(point))))
        return found[:n]

    def slices(self, judged: Sequence[Judged], point: Array, n: int) -> tuple[Array, Array]:
        """Mean and standard error [d, n] of the gain as one coordinate of a merge goes from 0 to 1.

        The others stay as they are, at `n` places of equal distance.
        """
        _, posterior = self._fitted_to(judged)
        here = torch.from_numpy(point)
        lines = here.repeat(self.d, n, 1)
        lines[range(self.d), :, range(self.d)] = torch.linspace(0, 1, n, dtype=torch.float64)
        x = lines.reshape(self.d * n, self.d)
        with torch.no_grad():
            mean, variance = posterior.lead_over(here)(x)
        scale = posterior.data.scale
        return (
            (scale * mean).view(self.d, n).numpy(),
            (scale * variance.sqrt()).view(self.d, n).numpy(),
        )

    def learnt(self, judged: Sequence[Judged]) -> Posterior:
        """What the scores say of every merge, by hyperparameters of their own."""
        return self._fitted_to(judged)[1]

    def _fitted_to(self, judged: Sequence[Judged]) -> tuple[Model, Posterior]:
        data = self._data(judged)
        model = self._model(data)  # of its own: who asks in between changes no proposal
        model.fit(data, n_steps=60)
        return model, model.posterior(data)

    def _refitted(self, model: Model, judged: Sequence[Judged]) -> Posterior:
        """What fewer merges say, by hyperparameters near those of the `model` of all."""
        data = self._data(judged)
        own = self._model(data)
        if len(own.theta) == len(model.theta):  # else none of these has slopes
            own.theta = model.theta.copy()
        own.fit(data, n_steps=_N_FITTED)
        return own.posterior(data)

    def compromises(self, learnt: Sequence[Posterior], n: int) -> list[Array]:
        """Merges of which none is expected to be better than another in every one of several scores.

        At most `n`, that of the highest expected score of each kind first, then those that are furthest
        from these in what is expected of them.
        """
        m = len(learnt)
        chance = np.random.default_rng(self.seed)
        shares = torch.from_numpy(
            np.concatenate([np.eye(m), chance.dirichlet(np.ones(m), 10 * m)])
        )
        tried = torch.cat([posterior.data.points for posterior in learnt])
        means = torch.stack([posterior.mean(tried) for posterior in learnt], 1)
        found = []
        for share in shares:

            def value(x: Tensor, share: Tensor = share) -> Tensor:
                return sum(
                    (s * p.mean(x) for s, p in zip(share, learnt, strict=True)), x.new_zeros(())
                )

            starts = tried[(means @ share).argsort(descending=True)[:3]]
            found.append(self._box.climb(value, starts))
        points = torch.cat([torch.stack(found), tried])
        expected = np.array([posterior.mean(points).numpy() for posterior in learnt]).T
        return [points[i].numpy() for i in _spread(expected, n)]

    def _climbed(
        self, value: Callable[[Tensor], Tensor], points: Tensor, n: int, *others: Tensor
    ) -> Tensor:
        """The merge of the highest value, climbing from the best `n` points and from others."""
        with torch.no_grad():
            few = value(points).argsort(descending=True)[:n]
        return self._box.climb(value, torch.cat([points[few], *others]))

    def _mean_of(self, learnt: Sequence[Posterior]) -> Callable[[Tensor], Tensor]:
        """The expected score, of several processes the mean of theirs.

        Slopes lead on to merges of which little is known, so with them it is the lower bound.
        """
        is_sloped = any(len(p.data.sloped) for p in learnt)
        each = [_bounds(p, -_CAUTION) if is_sloped else p.mean for p in learnt]
        scales = [p.data.scale / learnt[0].data.scale for p in learnt]

        def value(x: Tensor) -> Tensor:
            told = [scale * of_one(x) for scale, of_one in zip(scales, each, strict=True)]
            return torch.stack(told).mean(0)

        return value

    def _now(self, judged: Sequence[Judged]) -> tuple[Posterior, Tensor]:
        """The posterior and its best merge, with hyperparameters that were fitted now and then."""
        # A resumed search fits to the same merges as one that never stopped.
        step = max(_EVERY, len(judged) // 20)
        posterior = self._posterior(judged, max(1, len(judged) // step * step))
        return posterior, self._climbed(self._mean_of([posterior]), posterior.data.points, 1)

    def _posterior(self, judged: Sequence[Judged], n_fitted: int) -> Posterior:
        data = self._data(judged)
        n_told = sum(len(one.scores) + len(one.choices) for one in judged[:n_fitted])
        key = (n_fitted, n_told, len(data.sloped) > 0)
        if self._fitted is None or self._fitted[0] != key:
            model = self._model(data)
            model.fit(self._data(judged[:n_fitted]))
            self._fitted = (key, model)
        return self._fitted[1].posterior(data)

    def _model(self, data: Data | Chosen) -> Model:
        return Model(self.d, self._gain if len(data.sloped) else None, self._by_pairs)

    def _data(self, judged: Sequence[Judged]) -> Data | Chosen:
        if self._by_pairs:
            every = [choice for one in judged for choice in one.choices]
            known = [c for c in every if max(c.first, c.second) < len(judged)]
            return Chosen(np.array([one.point for one in judged]), known)
        rows = [(i, *entry) for i, one in enumerate(judged) for entry in one.scores.items()]
        point, image, y = (list(column) for column in zip(*rows, strict=True))
        points = np.array([one.point for one in judged])
        payloads = [self.panel[i] for i in image]
        return Data(
            points, point, image, payloads, y, self.shares, pooled([one.slopes for one in judged])
        )


def _bags(judged: Sequence[Judged]) -> list[list[Judged]]:
    """The merges without every fifth of them, in all ways, but always with the first of all."""
    return [
        [one for n, one in enumerate(judged) if n == 0 or n % _N_BAGS != bag]
        for bag in range(_N_BAGS)
    ]


def _spread(values: Array, n: int) -> list[int]:
    """At most `n` of the rows that no other row beats in every column, far apart, the best first."""
    front = [
        i
        for i, row in enumerate(values)
        if not ((values >= row).all(1) & (values > row).any(1)).any()
    ]
    chosen = list(
        dict.fromkeys(max(front, key=lambda i: values[i, j]) for j in range(len(values[0])))
    )
    while len(chosen) < n:
        distance = {i: min(np.abs(values[i] - values[j]).sum() for j in chosen) for i in front}
        furthest = max(front, key=distance.__getitem__)
        if distance[furthest] < _TELLING:
            break
        chosen.append(furthest)
    return chosen[:n]


def _apart(one: Array, other: Array) -> float:
    """Mean difference of the weights."""
    return float(np.abs(one - other).mean())


class _Box:
    """Where a search looks: [0, 1]^d, at a corner in the coordinates of each choice."""

    def __init__(self, d: int, choices: Sequence[slice]) -> None:
        self.d, self.choices = d, choices
        self._is_free = np.ones(d, bool)
        for group in choices:
            self._is_free[group] = False

    def of_each_choice(self, points: Tensor) -> Tensor:
        """The points with each choice of one thing, other things as they are or chosen first."""
        corners = [self.chosen(points, [0] * len(self.choices))] if self.choices else [points]
        for number, group in enumerate(self.choices):
            for place in range(1, group.stop - group.start):
                others = [0] * len(self.choices)
                others[number] = place
                corners.append(self.chosen(points, others))
        return torch.cat(corners)

    def chosen(self, points: Tensor, places: Sequence[int]) -> Tensor:
        """The points with these choices."""
        found = points.clone()
        for group, place in zip(self.choices, places, strict=True):
            found[:, group] = 0.0
            found[:, group.start + place] = 1.0
        return found

    def climb(self, value: Callable[[Tensor], Tensor], starts: Tensor) -> Tensor:
        """Where `value` (of points [n, d] -> [n]) is largest, of climbs from the starts."""

        def loss(flat: Array) -> tuple[float, Array]:
            x = torch.from_numpy(flat).view(starts.shape).requires_grad_()
            total = -value(x).sum()
            (slope,) = torch.autograd.grad(total, x)
            return float(total.detach()), slope.flatten().numpy()

        first = starts.numpy()
        low = np.where(self._is_free, 0.0, first).ravel()
        high = np.where(self._is_free, 1.0, first).ravel()
        found = minimize(
            loss,
            first.ravel(),
            jac=True,
            method="L-BFGS-B",
            bounds=np.column_stack([low, high]),
            options={"maxiter": 60},
        )
        with torch.no_grad():
            x = torch.from_numpy(found.x).view(starts.shape)
            return x[value(x).argmax()]

    def starts(
        self, incumbent: Tensor, chance: np.random.Generator, *, near: int, apart: int
    ) -> Tensor:
        """The incumbent, merges near it, and merges anywhere, these with each choice."""
        close = incumbent + torch.from_numpy(chance.normal(0.0, 0.1, (near, self.d)))
        anywhere = torch.from_numpy(chance.uniform(size=(apart, self.d)))
        return torch.cat(
            [
                incumbent[None],
                self._like(close.clamp(0.0, 1.0), incumbent),
                self.of_each_choice(anywhere),
            ]
        )

    def around(self, incumbent: Tensor, chance: np.random.Generator) -> Tensor:
        """Merges that vary some weights of the incumbent, and now and then a choice."""
        varied = chance.random((_N_SAMPLED, self.d)) < min(1.0, _N_VARIED / self.d)
        steps = torch.from_numpy(varied * chance.normal(0.0, _STEP, (_N_SAMPLED, self.d)))
        found = self._like((incumbent + steps).clamp(0.0, 1.0), incumbent)
        for group in self.choices:
            n = group.stop - group.start
            rows = np.flatnonzero(chance.random(_N_SAMPLED) < _CHANGED)
            found[rows, group] = torch.eye(n, dtype=torch.float64)[
                chance.integers(n, size=len(rows))
            ]
        return found

    def _like(self, points: Tensor, one: Tensor) -> Tensor:
        """The points with the choices of another."""
        return torch.where(torch.from_numpy(self._is_free), points, one)


def _bounds(posterior: Belief, n_errors: float) -> Callable[[Tensor], Tensor]:
    """So many standard deviations above the expected score."""

    def value(x: Tensor) -> Tensor:
        mean, variance = posterior.mean_and_variance(x)
        return mean + n_errors * variance.sqrt()

    return value


def _lead_bounds(posterior: Posterior, n_errors: float) -> Callable[[Tensor], Tensor]:
    """So many standard deviations above the expected lead over the first merge."""
    lead = posterior.lead_over(posterior.data.points[0])

    def value(x: Tensor) -> Tensor:
        mean, variance = lead(x)
        return mean + n_errors * variance.sqrt()

    return value


def _bound(posterior: Belief, incumbent: Tensor, box: _Box, chance: np.random.Generator) -> Tensor:
    starts = box.starts(incumbent, chance, near=1, apart=3)
    return box.climb(_bounds(posterior, _KAPPA), starts)


def _improvement(
    posterior: Belief, incumbent: Tensor, box: _Box, chance: np.random.Generator
) -> Tensor:
    value = _log_improvement(posterior, incumbent)
    return box.climb(value, box.starts(incumbent, chance, near=3, apart=2))


def _log_improvement(posterior: Belief, incumbent: Tensor) -> Callable[[Tensor], Tensor]:
    """Log E[max(0, f(x) - f(incumbent))]; Ament et al. 2023, arXiv:2310.20708."""
    lead = posterior.lead_over(incumbent)

    def value(x: Tensor) -> Tensor:
        mean, variance = lead(x)
        sd = variance.sqrt()
        return sd.log() + _log_gain(mean / sd)

    return value


def _log_gain(u: Tensor) -> Tensor:
    """log(phi(u) + u Phi(u)), also where that is far too small for a float."""
    near, far = u.clamp(min=-1.0), u.clamp(max=-1.0)
    density = torch.exp(-0.5 * near**2) / math.sqrt(2 * math.pi)
    log_near = torch.log(density + near * torch.special.ndtr(near))
    ratio = math.sqrt(math.pi / 2) * torch.special.erfcx(-far / math.sqrt(2))
    log_far = -0.5 * far**2 - 0.5 * math.log(2 * math.pi) + torch.log1p(far * ratio)
    return torch.where(u > -1.0, log_near, log_far)


def _sampled(
    posterior: Belief, incumbent: Tensor, box: _Box, chance: np.random.Generator
) -> Tensor:
    """The best of merges near the incumbent in one function drawn from the posterior."""
    x = box.around(incumbent, chance)
    jitter = 1e-6 * posterior.kernel.variance * torch.eye(_N_SAMPLED, dtype=torch.float64)
    with torch.no_grad():
        root = torch.linalg.cholesky(posterior.covariance(x, x) + jitter)
        drawn = posterior.mean(x) + root @ torch.from_numpy(chance.normal(size=_N_SAMPLED))
    return x[drawn.argmax()]


_RULES = (_bound, _sampled, _improvement)
N_RULES = len(_RULES)
