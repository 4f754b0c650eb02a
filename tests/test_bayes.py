from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesian_merger.bayes import Bayes, Judged, _log_gain
from bayesian_merger.choices import Choice
from bayesian_merger.gp import WHOLE, Array
from bayesian_merger.slopes import Slope

D = 6
PANEL = ["p", "q"] * 3


def value(point: Array) -> float:
    return -4 * float(((point - 0.3) ** 2).sum())


def shown(point: Array, place: int, chance: np.random.Generator) -> Judged:
    """The merge with the score of one image; payload p is the easier one."""
    image = place % len(PANEL)
    offset = 3.0 * (PANEL[image] == "p")
    return Judged(point, {image: value(point) + offset + 0.2 * chance.normal()})


def judged(n: int, seed: int = 0) -> list[Judged]:
    """Merges that were shown one image each."""
    chance = np.random.default_rng(seed)
    return [shown(chance.uniform(size=D), i, chance) for i in range(n)]


def test_recommended_merge_is_better_than_any_that_was_tried() -> None:
    seen = judged(60)
    (best,) = Bayes(D, PANEL, 0).few(seen, 1)
    assert value(best.point) > max(value(one.point) for one in seen)
    assert ((best.point >= 0) & (best.point <= 1)).all()
    assert best.se > 0


@pytest.mark.parametrize("place", [60, 61, 62])
@pytest.mark.parametrize("spent", [0.5, 0.9])
def test_every_rule_proposes_a_merge_within_the_box(place: int, spent: float) -> None:
    point = Bayes(D, PANEL, 0).propose(judged(60), place, spent)
    assert point.shape == (D,)
    assert ((point >= 0) & (point <= 1)).all()


def test_rules_take_turns_and_the_last_images_are_for_improvement_alone() -> None:
    seen, bayes = judged(15), Bayes(D, PANEL, 0)
    turns = [bayes.propose(seen, place, 0.5).tolist() for place in (15, 16, 17)]
    assert len({tuple(turn) for turn in turns}) == 3
    # Number 17 has improvement's turn as it is, number 16 has not.
    assert bayes.propose(seen, 17, 0.9).tolist() == turns[2]
    assert bayes.propose(seen, 16, 0.9).tolist() != turns[1]


def test_same_scores_make_the_same_proposal_in_a_new_process() -> None:
    seen = judged(40)
    old = Bayes(D, PANEL, 0)
    for n in range(30, 40):
        old.propose(seen[:n], n, 0.5)
    assert (
        old.propose(seen, 41, 0.5).tolist() == Bayes(D, PANEL, 0).propose(seen, 41, 0.5).tolist()
    )


def test_proposals_close_in_on_the_best_merge() -> None:
    seen, bayes, chance = judged(20), Bayes(D, PANEL, 0), np.random.default_rng(9)
    for place in range(20, 50):
        seen.append(shown(bayes.propose(seen, place, place / 50), place, chance))
    assert value(bayes.few(seen, 1)[0].point) > -0.1


def test_gain_falls_as_the_best_merge_becomes_known() -> None:
    gains = [Bayes(D, PANEL, 0).gain(judged(n)) for n in (40, 160)]
    assert gains[0] > gains[1] > 0


def test_log_gain_is_that_of_its_definition_and_smooth_far_below() -> None:
    u = torch.tensor([-3.0, -1.0, -0.999, 0.0, 2.0], dtype=torch.float64)
    density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    wanted = torch.log(density + u * torch.special.ndtr(u))
    assert _log_gain(u).tolist() == pytest.approx(wanted.tolist(), abs=1e-9)
    far = torch.tensor([-1e3, -40.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(_log_gain(far).sum(), far)
    assert torch.isfinite(slope).all()
    assert (slope > 0).all()


def test_slopes_do_not_lead_to_where_little_is_known() -> None:
    chance = np.random.default_rng(0)
    # Scores rise with the first weight and fall with the second, as far as the middle tells.
    slopes = [Slope(1, np.array([2.0, -2.0]) + chance.normal(size=2)) for _ in range(12)]
    seen = [Judged(np.array([0.5, 0.5]), dict(enumerate(chance.normal(size=12))), slopes)]
    bayes = Bayes(2, ["p"] * 12, 0)
    found, posterior = bayes.few(seen, 1)[0], bayes.learnt(seen)
    highest = bayes._box.climb(posterior.mean, torch.from_numpy(found.point)[None])
    mean, se = posterior.expected(highest)
    assert found.point[0] > 0.6
    assert found.point[1] < 0.4
    assert found.mean < mean
    assert found.se < 0.9 * se


def test_several_processes_are_misled_by_noisy_slopes_less_than_one() -> None:
    found: dict[str, list[float]] = {"several": [], "one": []}
    for seed in range(6):
        chance, bayes = np.random.default_rng(seed), Bayes(D, ["p"] * 60, 0)
        seen, point = [], np.full(D, 0.5)
        for n in range(0, 60, 6):
            scores = {n + i: value(point) + 3 * chance.normal() for i in range(6)}
            slopes = [Slope(1, -8 * (point - 0.3) + 4 * chance.normal(size=D)) for _ in range(6)]
            seen.append(Judged(point, scores, slopes))
            point = np.clip(0.3 + 0.15 * chance.normal(size=D), 0, 1)
        points = torch.from_numpy(np.array([one.point for one in seen]))
        found["several"].append(value(bayes.few(seen, 1)[0].point))
        found["one"].append(
            value(bayes._climbed(bayes._mean_of([bayes.learnt(seen)]), points, 5).numpy())
        )
    assert np.mean(found["several"]) > 0.8 * np.mean(found["one"])
    assert min(found["several"]) > min(found["one"])


@pytest.mark.parametrize(("of_scores", "of_slopes"), [(1e-6, 1e-6), (1.0, 0.0)])
def test_slopes_without_errors_are_no_error(of_scores: float, of_slopes: float) -> None:
    """Those that tell the same again and again have no covariance of full rank."""
    chance = np.random.default_rng(0)
    bayes, seen, x = Bayes(1, PANEL * 16, 0, gain=WHOLE), [], np.array([0.5])
    for n in range(0, 96, 6):
        scores = {n + i: -float((x[0] - 0.7) ** 2) + of_scores * chance.normal() for i in range(6)}
        slopes = [Slope(1, -2 * (x - 0.7) + of_slopes * chance.normal(size=1)) for _ in range(6)]
        seen.append(Judged(x, scores, slopes))
        x = bayes.best(seen).point
    assert x == pytest.approx(0.7, abs=0.02)


def compared(n: int) -> list[Judged]:
    """Merges of which each one's picture stood beside that of one before it, on four prompts in turn."""
    chance = np.random.default_rng(0)
    points = [np.full(D, 0.5), *chance.uniform(size=(n - 1, D))]
    seen = [Judged(points[0], {})]
    for number in range(1, n):
        other = int(chance.integers(number))
        lead = 4 * (value(points[number]) - value(points[other]))
        share = float(chance.random() < 1 / (1 + math.exp(-lead)))
        seen.append(Judged(points[number], {}, choices=[Choice(number % 4, number, other, share)]))
    return seen


def test_choices_recommend_a_merge_that_is_better_than_the_first() -> None:
    best, second = Bayes(D, PANEL, 0, by_pairs=True).few(compared(80), 2)
    assert value(best.point) > value(np.full(D, 0.5)) + 0.5
    assert best.mean > best.se > 0
    assert best.mean > second.mean


@pytest.mark.parametrize("place", [60, 61, 62])
def test_every_rule_proposes_by_choices(place: int) -> None:
    seen = compared(60)
    point = Bayes(D, PANEL, 0, by_pairs=True).propose(seen, place, 0.5)
    assert ((point >= 0) & (point <= 1)).all()
    again = Bayes(D, PANEL, 0, by_pairs=True)
    again.propose(seen[:50], 50, 0.5)
    assert again.propose(seen, place, 0.5).tolist() == point.tolist()


def test_slices_tell_what_is_lost_beside_the_best_merge() -> None:
    chance = np.random.default_rng(0)
    # The first weight matters, the second hardly.
    seen = [
        Judged(x, {i % 6: -8 * float((x[0] - 0.5) ** 2) + 0.05 * chance.normal()})
        for i, x in enumerate(chance.uniform(size=(60, 2)))
    ]
    bayes = Bayes(2, PANEL, 0)
    (best,) = bayes.few(seen, 1)
    means, errors = bayes.slices(seen, best.point, 11)
    assert means.shape == errors.shape == (2, 11)
    assert means[0].min() == pytest.approx(-2.0, abs=0.4)
    assert np.abs(means[1]).max() < 0.2
    assert (means < 0.1).all()
    here = round(best.point[0] * 10)
    assert errors[0, here] < errors[0, 0]


def test_merge_that_is_being_judged_is_not_proposed_again() -> None:
    seen, bayes = judged(60), Bayes(D, PANEL, 0)
    first = bayes.propose(seen, 60, 0.5)
    again = bayes.propose(seen, 60, 0.5)
    beside = bayes.propose(seen, 60, 0.5, [first] * 20)
    assert again.tolist() == first.tolist()
    assert float(np.abs(beside - first).mean()) > 0.02
