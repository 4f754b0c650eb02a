"""Pictures side by side: which of them a scorer is shown that chooses between two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bayesian_merger import album, pairs
from bayesian_merger.data import Result, Sample
from bayesian_merger.scorers import Comparing
from bayesian_merger.setup import BASELINES, Setup
from bayesian_merger.study import Trial
from bayesian_merger.values import DUPLICATE, JUNK


class Rival(NamedTuple):
    """A picture of the same prompt and seed, by another merge."""

    result: Result
    sample: Sample

    @property
    def is_junk(self) -> bool:
        scores = self.result.scores[self.sample.prompt.index]
        return any(key.startswith(JUNK) and key != DUPLICATE for key in scores)


class Rivals:
    """With which pictures of `others` those of a trial are compared in pairs.

    That is the best so far of the prompt and seed. Merges that explore are compared with the one before,
    as nearly all would lose against the best, which tells nothing of them. In the confirmation it is
    those of A, B and the even merge, which are not compared with each other.
    """

    def __init__(
        self, setup: Setup, trial: Trial, others: Sequence[Result], folder: Path | None
    ) -> None:
        is_search = trial.stage in ("explore", "exploit")
        self._folder, self._is_proof = folder, trial.stage == "heldout"
        self._takes_latest = self._is_proof or trial.stage == "explore"
        self.lost: set[str] = set()
        """Whose pictures were to be compared, but are gone."""
        self._others = [
            other
            for other in others
            if other.state != "failed"
            and other.name != trial.name
            # Of a merge that the search cannot propose nothing is learnt.
            and not (is_search and setup.params(other.recipe) is None)
            and not (self._is_proof and other.name not in BASELINES)
        ]
        if self._is_proof and trial.name in BASELINES:
            self._others = []

    def of(self, sample: Sample) -> list[Rival]:
        """Those of a picture; none where it is the first of its prompt and seed, or does not count."""
        prompt = sample.prompt
        if prompt.weight <= 0:
            return []
        left = [other for other in self._others if prompt.index in other.images]
        found = []
        while left:
            one = left[-1] if self._takes_latest else pairs.champion(left, prompt.index)
            assert one is not None
            left.remove(one)
            image = album.read(self._folder, one, prompt.index) if self._folder else None
            if image is None:  # somebody has removed or changed it
                self.lost.add(one.name)
                continue
            found.append(Rival(one, Sample(image, prompt)))
            if not self._is_proof:
                break
        return found


def compared(
    comparer: Comparing,
    samples: Sequence[Sample],
    marked: Sequence[Sequence[str]],
    rivals_of: Callable[[Sample], Sequence[Rival]],
) -> list[dict[str, float]]:
    """The share of each sample in the choice between it and each of its rivals, but where it is skipped.

    Equal pictures are alike, and one that is junk loses, without a question.
    """
    table: list[dict[str, float]] = [{} for _ in samples]
    asked: list[tuple[int, str, Sample, Sample]] = []
    for row, (sample, marks) in enumerate(zip(samples, marked, strict=True)):
        for rival in rivals_of(sample):
            key = f"{pairs.OVER}{rival.result.name}"
            if album.digest_of(sample.image) == album.digest_of(rival.sample.image):
                table[row][key] = 0.5
            elif marks or rival.is_junk:
                table[row][key] = 0.5 + 0.5 * (rival.is_junk - bool(marks))
            else:
                asked.append((row, key, sample, rival.sample))
    if asked:
        shares = comparer.compare([one[2] for one in asked], [one[3] for one in asked])
        for (row, key, *_), share in zip(asked, shares, strict=True):
            if share is not None:
                table[row][key] = share
    return table
