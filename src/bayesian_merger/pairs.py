"""Pairs of pictures of one prompt and seed: which is compared with which, and who leads by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binomtest

from bayesian_merger.choices import Choice, strengths
from bayesian_merger.data import Estimate, Interval, Preference, Result

Scores = Mapping[int, Mapping[str, float]]
"""Image -> its scores."""

OVER = "over."
"""The beginning of what stands for a choice among the scores of an image: "over.trial 7" -> share."""


def rivals(scores: Mapping[str, float]) -> dict[str, float]:
    """The results that an image was compared with, and its share in each choice."""
    return {key.removeprefix(OVER): x for key, x in scores.items() if key.startswith(OVER)}


def champion(results: Sequence[Result], image: int) -> Result | None:
    """Who has made the best picture of an image so far, of results in the order they were judged in."""
    best: Result | None = None
    for result in results:
        if image in result.scores:
            share = rivals(result.scores[image]).get(best.name) if best else None
            # Who was compared with none, or with one that is lost, is no better for all that is known.
            if best is None or (share is not None and share > 0.5):
                best = result
    return best


def choices(results: Sequence[Result]) -> list[Choice]:
    """All choices between two of the results, by their numbers."""
    return [one for some in by_number([(r.name, r.scores) for r in results]) for one in some]


def by_number(judged: Sequence[tuple[str, Scores]]) -> list[list[Choice]]:
    """Of each merge, by its name and its images' scores, the choices between it and another of them."""
    numbers = {name: number for number, (name, _) in enumerate(judged)}
    return [
        [
            Choice(image, number, numbers[rival], share)
            for image, scores in images.items()
            for rival, share in rivals(scores).items()
            if rival in numbers
        ]
        for number, (_, images) in enumerate(judged)
    ]


def leads(results: Sequence[Result]) -> dict[str, Estimate]:
    """How far the strength of each result is above that of "even", or without that above their mean.

    A lead of 1 wins 73 % of pairs, 2 wins 88 %, of pictures with equal luck. The standard error is that
    of a fit of all choices.
    """
    if not results:
        return {}
    known = choices(results)
    means, covariance = strengths(known, len(results))
    names = [result.name for result in results]
    is_reference = np.array([name == "even" for name in names])
    share = is_reference if is_reference.any() else np.ones(len(names))
    found = {}
    for number, name in enumerate(names):
        weights = np.eye(len(names))[number] - share / share.sum()
        variance = max(float(weights @ covariance @ weights), 0.0)
        n = sum(number in (choice.first, choice.second) for choice in known)
        found[name] = Estimate(float(weights @ means), math.sqrt(variance), n)
    return found


def valued(results: Sequence[Result]) -> list[Result]:
    """The results with their leads for values, where they are complete."""
    found = leads([result for result in results if result.state != "failed"])
    return [r.but(value=found[r.name]) if r.state == "complete" else r for r in results]


def margin(told: Preference) -> Interval:
    """Pairs won less pairs lost, as a share of both, with Wilson's 95 % interval."""
    n = told.won + told.lost
    if not n:
        return Interval(0.0, -1.0, 1.0)
    share = binomtest(told.won, n).proportion_ci(method="wilson")
    return Interval(2 * told.won / n - 1, 2 * float(share.low) - 1, 2 * float(share.high) - 1)


def sentence(told: Preference) -> str:
    """How often the first was preferred, with the 95 % interval."""
    n = told.won + told.lost
    if not n:
        return f"alike in all {told.alike} pairs" if told.alike else "not compared"
    share = margin(told)
    low, high = (0.5 + 0.5 * end for end in (share.low, share.high))
    return (
        f"preferred in {told.won} of {n} pairs ({told.won / n:.0%}, 95 % interval {low:.0%} to "
        f"{high:.0%}; {told.alike} alike)"
    )


def preference(result: Result, rival: str) -> Preference:
    """How often the pictures of a result were chosen over those of a rival."""
    shares = [
        rivals(scores)[rival] for scores in result.scores.values() if rival in rivals(scores)
    ]
    return Preference(
        sum(share > 0.5 for share in shares),
        sum(share < 0.5 for share in shares),
        sum(share == 0.5 for share in shares),
    )
