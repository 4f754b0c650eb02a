"""A person's marks and choices -> a linear head on image features, and how well it knows the taste."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import spearmanr

from bayesian_merger.desk import JOURNAL, SHARES, answers, is_mark
from bayesian_merger.errors import ConfigError

Array = npt.NDArray[np.float64]

_FEWEST = 20
_FOLDS = 5
_STRENGTHS = tuple(10.0 ** np.arange(-2, 3.5, 0.5))


class Pair(NamedTuple):
    """Two pictures by number, and the share of the first in the choice: 1, 0, or 0.5 for alike."""

    first: int
    second: int
    share: float


@dataclass
class Ratings:
    """What somebody has said of pictures.

    `groups` tells which pictures are of one prompt and seed, `marks` is picture by number -> mark.
    """

    pictures: list[Path] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    marks: dict[int, float] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def n(self) -> int:
        """How many answers there are."""
        return len(self.marks) + len(self.pairs)


@dataclass(frozen=True)
class Taste:
    """A head w x + b, and how well heads like it do on prompts and seeds that they were not fitted to.

    `rank_correlation` is Spearman's of marks, `agreement` the share of choices that it shares; None
    without such answers.
    """

    weight: Array
    bias: float
    strength: float
    rank_correlation: float | None
    agreement: float | None


def read(folders: Sequence[Path]) -> Ratings:
    """The ratings of runs; ConfigError if there are none, or too few to learn from."""
    found = Ratings()
    numbers: dict[Path, int] = {}
    for folder in folders:
        journal = folder / JOURNAL
        if not journal.is_file():
            raise ConfigError(
                f"{journal}: no such file; rate the pictures of a run first (scorers.manual, or rate)"
            )
        try:
            told = answers(journal)
        except OSError as error:
            raise ConfigError(f"{journal}: cannot be read ({error.strerror})") from error
        for answer in told.values():
            _take(answer, folder / "rated", found, numbers)
    if found.n < _FEWEST:
        raise ConfigError(
            f"{', '.join(map(str, folders))}: {found.n} ratings, which are too few to learn from; rate "
            f"{_FEWEST} pictures at least, better 100 (scorers.manual, or the command rate)"
        )
    if not found.pairs and len(set(found.marks.values())) < 2:
        raise ConfigError("all marks are the same, so there is no taste to be learnt")
    if len(set(found.groups)) < 2:
        raise ConfigError("all ratings are of one prompt and seed; rate others too")
    return found


def _take(told: Mapping[str, Any], place: Path, into: Ratings, numbers: dict[Path, int]) -> None:
    """Add an answer, if its pictures are still there."""
    names, answer = told.get("pictures"), told.get("answer")
    if not isinstance(names, list) or not 1 <= len(names) <= 2:
        return
    # A journal may come from anybody: nothing but names of files beside it.
    paths = [place / Path(str(name)).name for name in names]
    if not all(path.is_file() for path in paths):
        return
    group = f"{told.get('prompt')}\n{told.get('seed')}"

    def number(path: Path) -> int:
        if path not in numbers:
            numbers[path] = len(into.pictures)
            into.pictures.append(path)
            into.groups.append(group)
        return numbers[path]

    if len(paths) == 1 and is_mark(answer):
        into.marks[number(paths[0])] = float(answer)
    elif len(paths) == 2 and isinstance(answer, str) and answer in SHARES:
        into.pairs.append(Pair(number(paths[0]), number(paths[1]), SHARES[answer]))


def learn(ratings: Ratings, features: Array) -> Taste:
    """The head of the strength of regularisation that does best on prompts and seeds left out.

    `features` [N, D] are those of the pictures. Marks count by their squared error, in standard
    deviations; choices by the logistic likelihood of Bradley and Terry 1952; weights by their square.
    """
    centre = features.mean(0)
    spread = float(np.sqrt(((features - centre) ** 2).sum(1).mean())) or 1.0
    x = (features - centre) / spread
    everything = np.ones(len(x), bool)
    folds = np.array([int(hashlib.sha256(g.encode()).hexdigest(), 16) for g in ratings.groups])
    order = {g: i % _FOLDS for i, g in enumerate(sorted(set(folds.tolist())))}
    fold = np.array([order[g] for g in folds.tolist()])
    scored = []
    for strength in _STRENGTHS:
        predicted = np.full(len(x), np.nan)
        for one in range(_FOLDS):
            left_out = fold == one
            if left_out.any() and not left_out.all():
                weight = _fitted(ratings, x, ~left_out, strength)
                predicted[left_out] = x[left_out] @ weight
        correlation, agreement = _quality(ratings, predicted)
        known = [q for q in (correlation, agreement and 2 * agreement - 1) if q is not None]
        scored.append((sum(known) / max(1, len(known)), -strength, correlation, agreement))
    # The strongest of those that do as well.
    _, negative, correlation, agreement = max(scored, key=lambda s: (round(s[0], 2), -s[1]))
    weight = _fitted(ratings, x, everything, -negative)
    scale, middle = _unit(ratings)
    weight = weight * scale / spread
    return Taste(weight, middle - float(centre @ weight), -negative, correlation, agreement)


def _unit(ratings: Ratings) -> tuple[float, float]:
    """Standard deviation and mean of the marks; of choices alone 1 and 0."""
    marks = np.array(list(ratings.marks.values()))
    return (float(marks.std()) or 1.0, float(marks.mean())) if len(marks) else (1.0, 0.0)


def _fitted(ratings: Ratings, x: Array, is_used: npt.NDArray[np.bool_], strength: float) -> Array:
    """The weights [D] of the least loss over the pictures that are used."""
    scale, middle = _unit(ratings)
    marked = [i for i in ratings.marks if is_used[i]]
    wanted = (np.array([ratings.marks[i] for i in marked]) - middle) / scale
    pairs = [p for p in ratings.pairs if is_used[p.first] and is_used[p.second]]
    ahead = x[[p.first for p in pairs]] - x[[p.second for p in pairs]]
    shares = np.array([p.share for p in pairs])

    def loss(weight: Array) -> tuple[float, Array]:
        off = x[marked] @ weight - wanted
        lead = ahead @ weight
        # -log of the share that the first wins, for a choice between the two.
        choice = np.logaddexp(0, lead) - shares * lead
        value = 0.5 * (off @ off) + choice.sum() + 0.5 * strength * (weight @ weight)
        slope = x[marked].T @ off + ahead.T @ (expit(lead) - shares) + strength * weight
        return float(value), slope

    found: Array = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    return found


def _quality(ratings: Ratings, predicted: Array) -> tuple[float | None, float | None]:
    """Spearman's correlation of marks, and the share of choices, that the predictions have right."""
    marked = [i for i in ratings.marks if np.isfinite(predicted[i])]
    told, correlation = [ratings.marks[i] for i in marked], None
    if len(set(told)) > 1 and float(np.ptp(predicted[marked])) > 0:
        correlation = float(spearmanr(told, predicted[marked]).statistic)
    leads = [
        (predicted[p.first] - predicted[p.second], p.share)
        for p in ratings.pairs
        if p.share != 0.5
    ]
    known = [(lead > 0) == (share > 0.5) for lead, share in leads if np.isfinite(lead) and lead]
    return correlation, sum(known) / len(known) if known else None
