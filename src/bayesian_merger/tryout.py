"""One merge and a batch of images, to see whether a run can be made and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bayesian_merger.data import (
    Sample,
)
from bayesian_merger.errors import (
    TrialError,
)
from bayesian_merger.judging import (
    batches,
    differentiable_scores,
    followed,
    generate,
    load,
    no_value,
    score,
)
from bayesian_merger.scorers import Attended, Scorer
from bayesian_merger.setup import BASELINES, Setup
from bayesian_merger.values import Yardstick

# How far apart a scorer's two ways to the same score may be, as a share of the largest.
_ALIKE = 0.1


@dataclass(frozen=True)
class TryOut:
    """What one merge and one image took, in seconds, with the first image's scores.

    `images` and `merges` are those of the whole run, `run_s` its estimated time. Of the images so many
    are `followed`, with their slopes, each of which took `followed_s`. `notes` say what is wrong with
    the gradient.
    """

    merge_s: float
    image_s: float
    followed_s: float
    scores: Mapping[str, float]
    images: int
    followed: int
    merges: int
    notes: Sequence[str] = ()

    @property
    def run_s(self) -> float:
        n_plain = self.images - self.followed
        of_images = n_plain * self.image_s + self.followed * self.followed_s
        return of_images + self.merges * self.merge_s


def try_out(setup: Setup) -> TryOut:
    """One merge, one batch of images, their scores; TrialError if any is not to be had."""
    recipe = setup.baseline("even")
    # The first merge also builds the live model, so it is not the one that is timed, and another, as
    # what is loaded already would take no time.
    load(setup, setup.baseline("a"))
    start = time.monotonic()
    load(setup, recipe)
    merge_s = time.monotonic() - start
    batch = next(batches(setup.panel, setup.backend.batch))
    # The first image warms up; of another seed, as servers know what they have made.
    generate(setup, [replace(batch[0], seed=batch[0].seed ^ 1)])
    warm = time.monotonic()
    samples = generate(setup, batch)
    # Nobody is asked for a try.
    judges_of = {n: one for n, one in setup.scorers.items() if not isinstance(one, Attended)}
    scores = score(judges_of, samples, setup.only)
    per_image = (time.monotonic() - warm) / len(batch)
    per_followed, n_followed, notes = 0.0, 0, []
    if setup.plan.optimiser == "gradient":
        one = Yardstick(setup.measure)
        try:
            notes = _disagreements(setup.scorers, samples, scores)
            list(followed(setup, batch[:1], one))  # the same here
            start = time.monotonic()
            faults = [piece.fault for piece in followed(setup, batch, one) if piece.fault]
            per_followed = (time.monotonic() - start) / len(batch)
            if faults:
                notes.append(f"not every image of {len(batch)} told its gradient: {faults[0]}")
            n_followed = setup.plan.n_images + len(setup.panel) * setup.follows_even
        except TrialError as error:
            notes.append(f"a run would go on by the scores alone, without the gradient: {error}")
    merges = setup.plan.n_trials + 2 * len(BASELINES) + 1 + setup.config.heldout.candidates
    return TryOut(
        merge_s, per_image, per_followed, scores[0], setup.n_images(), n_followed, merges, notes
    )


def _disagreements(
    scorers: Mapping[str, Scorer], samples: Sequence[Sample], scores: Sequence[Mapping[str, float]]
) -> list[str]:
    """Which scorers' gradient is that of another score than they give, in words."""
    images = [np.array(sample.image.convert("RGB")) for sample in samples]
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) / 255
    notes = []
    for name, judge_of in scorers.items():
        with no_value(f"scorer {name}"), torch.no_grad():
            found = differentiable_scores(
                judge_of, pixels, [sample.prompt for sample in samples]
            ).tolist()
        own = [row[name] for row in scores]
        worst = max(range(len(own)), key=lambda i: abs(found[i] - own[i]))
        if abs(found[worst] - own[worst]) > _ALIKE * max(map(abs, own)):
            notes.append(
                f"scorer {name} gives an image {own[worst]:.4g}, but its differentiable "
                f"{found[worst]:.4g}, so the search would follow another score"
            )
    return notes
