from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from bayesian_merger.data import Estimate, Prompt, Recipe, Result
from bayesian_merger.errors import RunError, TrialError
from bayesian_merger.values import Measure, Yardstick, effective_n, shares, weighted_mean

ONE = Yardstick(Measure({"taste": 1.0}), {"taste": (3.0, 7.0)})


def panel(weights: Sequence[float]) -> tuple[Prompt, ...]:
    return tuple(Prompt(i, "p", "x", seed=i, weight=w) for i, w in enumerate(weights))


def result(**scores: Sequence[float] | Mapping[int, float]) -> Result:
    """A result whose images have these scores, in the panel's order or by its index."""
    tables = {n: s if isinstance(s, Mapping) else dict(enumerate(s)) for n, s in scores.items()}
    images = dict.fromkeys(index for table in tables.values() for index in table)
    return Result(
        "explore",
        "trial 1",
        0,
        "running",
        Recipe("weighted_sum", "sd1", (), {}),
        {i: {name: table[i] for name, table in tables.items()} for i in images},
    )


# The mean and its standard error


def test_effective_n_counts_equal_weights_and_discounts_unequal_ones() -> None:
    assert effective_n([0.5, 0.5, 0.5]) == pytest.approx(3)
    assert effective_n([1.0, 1.0, 2.0]) == pytest.approx(16 / 6)
    assert effective_n([1.0, 0.0]) == 1


def test_interval_covers_the_truth_as_often_as_it_says_with_unequal_weights() -> None:
    chance = np.random.default_rng(0)
    weights = [1.0] * 4 + [0.1] * 20
    zero = result(taste=[0.0] * len(weights))
    hits = 0
    for _ in range(2000):
        noise = result(taste=chance.normal(size=len(weights)).tolist())
        found = ONE.difference(noise, zero, panel(weights))
        hits += found.low <= 0 <= found.high
    # Student with the effective n is a few per cent short where weights differ tenfold.
    assert 0.9 <= hits / 2000 <= 0.975


def test_one_weight_that_outdoes_all_others_leaves_no_error_bars() -> None:
    assert weighted_mean([1.0, 5.0], [1.0, 1e-20]) == Estimate(1.0, 0.0, 2)


def test_weighted_mean_by_hand() -> None:
    found = weighted_mean([1.0, 2.0, 4.0], [1.0, 1.0, 2.0])
    assert found.mean == 2.75
    assert found.se == pytest.approx(math.sqrt(1.6 * (1.75**2 + 0.75**2 + 2.5**2) / 16))
    assert found.n == 3


def test_equal_weights_give_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(7, 2, 50)
    for weight in (1.0, 0.3):
        found = weighted_mean(list(values), [weight] * 50)
        assert found.mean == pytest.approx(values.mean())
        assert found.se == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_values_of_no_weight_count_for_nothing() -> None:
    found = weighted_mean([1.0, 1e9, 2.0, 4.0], [1.0, 0.0, 1.0, 2.0])
    assert found == weighted_mean([1.0, 2.0, 4.0], [1.0, 1.0, 2.0])


def test_single_value_has_no_standard_error() -> None:
    assert weighted_mean([-3.0], [0.5]).mean == -3.0
    assert (weighted_mean([-3.0], [0.5]).se, weighted_mean([-3.0], [0.5]).n) == (0.0, 1)


def test_standard_error_is_the_spread_of_the_mean_over_many_panels() -> None:
    chance = np.random.default_rng(1)
    weights = [0.5] * 20 + [1.0] * 20 + [2.0] * 20
    found = [weighted_mean(list(chance.normal(0, 3, 60)), weights) for _ in range(2000)]
    spread = np.std([f.mean for f in found])
    assert np.sqrt(np.mean([f.se**2 for f in found])) == pytest.approx(spread, rel=0.05)


@settings(deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.floats(-100, 100), st.floats(0.01, 10)), min_size=2, max_size=20),
    shift=st.floats(-100, 100),
    factor=st.floats(0.1, 10),
)
def test_mean_moves_with_its_values_and_only_the_weights_ratio_counts(
    pairs: list[tuple[float, float]], shift: float, factor: float
) -> None:
    values, weights = zip(*pairs, strict=True)
    found = weighted_mean(values, weights)
    moved = weighted_mean([v * factor + shift for v in values], [w * factor for w in weights])
    assert min(values) - 1e-9 <= found.mean <= max(values) + 1e-9
    assert moved.mean == pytest.approx(found.mean * factor + shift, abs=1e-8)
    assert moved.se == pytest.approx(found.se * factor, abs=1e-8)


# The value of a result


def test_with_one_scorer_the_value_is_its_score() -> None:
    assert ONE.value({"taste": 6.5}) == 6.5
    assert ONE.estimate(result(taste=[6.0, 8.0]), panel([1, 1])).mean == 7.0


def test_payload_s_weight_is_its_share_in_the_mean() -> None:
    assert ONE.estimate(result(taste=[6.0, 8.0]), panel([3, 1])).mean == 6.5


def test_negative_scores_are_scores_like_others() -> None:
    found = ONE.estimate(result(taste=[-3.0, -1.0]), panel([1, 1]))
    assert (found.mean, found.n) == (-2.0, 2)
    assert found.se == pytest.approx(1.0)


def test_estimate_counts_only_the_images_that_are_there() -> None:
    found = ONE.estimate(result(taste={3: 4.0, 1: 2.0}), panel([1, 1, 1, 3]))
    assert (found.mean, found.n) == (3.5, 2)


def test_several_scorers_are_normalised_by_the_baselines_before_they_are_averaged() -> None:
    baselines = [
        result(taste=[4.0, 6.0], sharpness=[100.0, 300.0]),
        result(taste=[4.0, 6.0], sharpness=[100.0, 300.0]),
    ]
    yardstick = Yardstick.from_baselines(
        Measure({"taste": 3.0, "sharpness": 1.0}), baselines, panel([1, 1])
    )
    assert yardstick.value({"taste": 5.0, "sharpness": 200.0}) == 0.0
    # (3 x 2 spreads - 1 x 1 spread) / 4
    assert yardstick.value({"taste": 7.0, "sharpness": 100.0}) == 1.25


def test_unit_of_a_scorer_does_not_matter_beside_another() -> None:
    chance = np.random.default_rng(2)
    taste, sharpness = chance.normal(5, 1, 12), chance.normal(0.5, 0.1, 12)
    yardsticks = [
        Yardstick.from_baselines(
            Measure({"taste": 1.0, "sharpness": 2.0}),
            [result(taste=list(taste), sharpness=list(factor * sharpness))],
            panel([1] * 12),
        )
        for factor in (1, 1000)
    ]
    assert yardsticks[0].value({"taste": 6.0, "sharpness": 0.4}) == pytest.approx(
        yardsticks[1].value({"taste": 6.0, "sharpness": 400.0})
    )


@pytest.mark.parametrize("score", [0.1, 0.7, 0.0, -3.3, 1e9])
def test_scorer_that_gives_all_baselines_the_same_score_is_only_shifted(score: float) -> None:
    baselines = [result(taste=[4.0, 6.0, 5.0], flat=[score] * 3)]
    yardstick = Yardstick.from_baselines(
        Measure({"taste": 1.0, "flat": 1.0}), baselines, panel([1] * 3)
    )
    assert yardstick.value({"taste": 5.0, "flat": score + 1}) == pytest.approx(0.5)


def test_baselines_without_scores_are_no_yardstick() -> None:
    with pytest.raises(RunError, match="no baseline could be judged"):
        Yardstick.from_baselines(Measure({"taste": 1.0}), [result(taste=[])], panel([1]))


def test_trial_is_valued_as_if_it_had_seen_the_whole_panel() -> None:
    # Image 0 is harder than image 1 by 4, and image 2 is in between.
    baselines = [result(taste=[1.0, 5.0, 3.0]), result(taste=[2.0, 6.0, 4.0])]
    yardstick = Yardstick.from_baselines(Measure({"taste": 1.0}), baselines, panel([1, 1, 1]))
    assert yardstick.offsets == pytest.approx({0: -2.0, 1: 2.0, 2: 0.0})
    for scores in ({0: 3.0}, {1: 7.0}, {0: 3.0, 1: 7.0}, {2: 5.0, 1: 7.0}):
        assert yardstick.trial(result(taste=scores), panel([1, 1, 1])).mean == pytest.approx(5.0)


def test_offsets_of_a_weighted_panel_are_from_its_weighted_mean() -> None:
    baselines = [result(taste=[0.0, 8.0]), result(taste=[4.0, 12.0])]
    yardstick = Yardstick.from_baselines(Measure({"taste": 1.0}), baselines, panel([3, 1]))
    assert yardstick.offsets == pytest.approx({0: -2.0, 1: 6.0})


def test_error_of_a_trial_is_that_of_the_baselines_over_its_images() -> None:
    chance = np.random.default_rng(0)
    offsets, levels = chance.normal(0, 3, 40), (0.0, 5.0, 2.0)
    baselines = [
        result(taste=list(level + offsets + chance.normal(0, 0.5, 40))) for level in levels
    ]
    images = panel([1] * 40)
    yardstick = Yardstick.from_baselines(Measure({"taste": 1.0}), baselines, images)
    assert yardstick.noise == pytest.approx(0.5, rel=0.15)
    for n in (1, 4):
        found = yardstick.trial(result(taste=[1.0] * n), images)
        assert found.se == pytest.approx(yardstick.noise / n**0.5)
        assert found.n == n


def test_panel_of_one_image_tells_no_error() -> None:
    baselines = [result(taste=[1.0]), result(taste=[2.0])]
    yardstick = Yardstick.from_baselines(Measure({"taste": 1.0}), baselines, panel([1]))
    found = yardstick.trial(result(taste=[4.0]), panel([1]))
    assert (found.mean, found.se) == (4.0, 0.0)


# Differences


@pytest.mark.parametrize("n", [2, 3, 30])
def test_paired_interval_is_that_of_the_paired_t_test(n: int) -> None:
    chance = np.random.default_rng(n)
    shared = chance.normal(0, 10, n)
    mine, theirs = shared + chance.normal(1, 1, n), shared + chance.normal(0, 1, n)
    expected = ttest_rel(mine, theirs).confidence_interval(0.95)
    found = ONE.difference(result(taste=list(mine)), result(taste=list(theirs)), panel([1] * n))
    assert found.mean == pytest.approx(float(np.mean(mine - theirs)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_difference_pairs_by_image_and_leaves_out_what_one_lacks() -> None:
    mine, theirs = result(taste={0: 5.0, 1: 9.0, 2: 7.0}), result(taste={2: 6.0, 1: 6.0, 3: 0.0})
    found = ONE.difference(mine, theirs, panel([1, 1, 1, 1]))
    assert found.mean == 2.0
    back = ONE.difference(theirs, mine, panel([1, 1, 1, 1]))
    assert (back.mean, back.low, back.high) == pytest.approx((-2.0, -found.high, -found.low))


def test_difference_weighs_its_images_like_the_mean_does() -> None:
    mine, theirs, images = result(taste=[5.0, 9.0, 1.0]), result(taste=[4.0, 6.0, 1.0]), [3, 1, 0]
    found = ONE.difference(mine, theirs, panel(images))
    assert found.mean == 1.5
    assert (
        found.mean
        == ONE.estimate(mine, panel(images)).mean - ONE.estimate(theirs, panel(images)).mean
    )


def test_difference_of_a_result_with_itself_is_nothing() -> None:
    mine = result(taste=[1.0, 5.0, -2.0])
    found = ONE.difference(mine, mine, panel([1, 2, 3]))
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_difference_of_single_images_proves_nothing() -> None:
    for nine, one, weights in (([9.0], [1.0], [1]), ([9.0, 3.0], [1.0, 3.0], [1, 1e-20])):
        found = ONE.difference(result(taste=nine), result(taste=one), panel(weights))
        assert (found.mean, found.low, found.high) == (8.0, -math.inf, math.inf)


def test_paired_interval_holds_the_truth_in_95_of_100_runs() -> None:
    chance = np.random.default_rng(3)
    images = panel([1.0] * 8)
    hits = 0
    for _ in range(2000):
        theirs = chance.normal(0, 5, 8)
        mine = theirs + chance.normal(0.5, 1, 8)
        found = ONE.difference(result(taste=list(mine)), result(taste=list(theirs)), images)
        hits += found.low <= 0.5 <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_payloads_of_a_trial_keep_their_shares_however_many_images_it_saw() -> None:
    def prompt(index: int, payload: str, weight: float) -> Prompt:
        return Prompt(index, payload, "", 0, weight=weight)

    whole = [prompt(0, "p", 3.0), prompt(1, "q", 1.0), prompt(2, "p", 3.0), prompt(3, "q", 1.0)]
    assert shares(whole) == {"p": 6.0, "q": 2.0}
    found = ONE.trial(result(taste={0: 8.0, 2: 8.0, 1: 0.0}), whole)
    assert (found.mean, found.n) == (6.0, 3)


# How scores are normalised and combined


BOTH = [result(taste=[4.0, 6.0, 5.0, 7.0], sharpness=[100.0, 300.0, 200.0, 250.0])]


def yardstick(**options: Any) -> Yardstick:
    measure = Measure({"taste": 3.0, "sharpness": 1.0}, **options)
    return Yardstick.from_baselines(measure, BOTH, panel([1] * 4))


def test_image_that_only_some_scorers_judge_has_their_mean() -> None:
    found = yardstick()
    alone = found.value({"taste": 6.0})
    assert alone == pytest.approx((6.0 - 5.5) / np.std([4, 6, 5, 7]))
    assert found.value({"sharpness": 212.5}) == pytest.approx(0.0, abs=1e-12)


def test_minimum_is_the_worst_of_the_normalised_scores() -> None:
    found = yardstick(combine="minimum")
    assert found.value({"taste": 100.0, "sharpness": 212.5}) == pytest.approx(0.0, abs=1e-12)
    assert found.value({"taste": 100.0}) > 50


def test_rank_is_the_share_of_the_baselines_images_that_an_image_beats() -> None:
    chance = np.random.default_rng(0)
    taste = list(chance.normal(5, 1, 400))
    found = Yardstick.from_baselines(
        Measure({"taste": 1.0}, "rank"), [result(taste=taste)], panel([1] * 400)
    )
    for score, share in ((5.0, 0.5), (6.0, 0.841), (4.0, 0.159)):
        assert found.value({"taste": score}) == pytest.approx(share, abs=0.05)
    # It goes on beyond the best of them, but never to 1.
    assert 0.99 < found.value({"taste": 7.8}) < found.value({"taste": 8.0}) < 1


@pytest.mark.parametrize("normalise", ["zscore", "rank"])
def test_scale_and_sign_of_a_scorer_do_not_matter(normalise: Any) -> None:
    """PickScore's 20 and ImageReward's -1 mean the same."""
    chance = np.random.default_rng(2)
    reward = chance.normal(-1, 0.5, 12)
    other = chance.normal(0, 1, 12)
    found = [
        Yardstick.from_baselines(
            Measure({"reward": 1.0, "other": 1.0}, normalise),
            [result(reward=list(factor * reward + shift), other=list(other))],
            panel([1] * 12),
        ).value({"reward": factor * -0.3 + shift, "other": 0.4})
        for factor, shift in ((1, 0), (2.5, 21))
    ]
    assert found[0] == pytest.approx(found[1])


def test_geometric_mean_is_that_of_ranks_by_their_weights() -> None:
    found = yardstick(combine="geometric")
    by_rank = yardstick(normalise="rank")
    scores = {"taste": 6.5, "sharpness": 150.0}
    one, two = (by_rank.value({name: score}) for name, score in scores.items())
    assert found.value(scores) == pytest.approx(one**0.75 * two**0.25)


def test_geometric_mean_of_what_is_not_positive_has_no_value() -> None:
    found = yardstick(combine="geometric", normalise="none")
    assert found.value({"taste": 2.0, "sharpness": 2.0}) == pytest.approx(2.0)
    with pytest.raises(TrialError, match="scorer taste gave -1, of which there is no geometric"):
        found.measure.require({"taste": -1.0, "sharpness": 2.0})
    found.measure.require({"taste": 1.0, "sharpness": 2.0})
    Measure({"taste": 1.0}).require({"taste": -1.0})


def test_score_far_below_all_baselines_still_has_a_geometric_mean() -> None:
    assert 0 < yardstick(combine="geometric").value({"taste": -1e9, "sharpness": 1.0}) < 1e-6


def test_junk_costs_its_penalty_in_standard_deviations_of_the_baselines_images() -> None:
    baselines = [result(taste=[4.0, 6.0, 5.0, 7.0])]
    measure = Measure({"taste": 1.0}, penalties={"blank": 2.0})
    found = Yardstick.from_baselines(measure, baselines, panel([1] * 4))
    assert found.unit == pytest.approx(np.std([4, 6, 5, 7]))
    assert found.value({"taste": 5.0, "junk.blank": 1.0}) == pytest.approx(5 - 2 * found.unit)
    # What costs nothing is no part of the value.
    assert found.value({"taste": 5.0, "junk.noise": 1.0}) == 5.0


def test_penalty_is_measured_by_pictures_and_not_by_junk_among_the_baselines() -> None:
    marked = result(taste=[4.0, 6.0, 5.0, 7.0])
    scores = {**marked.scores, 3: {**marked.scores[3], "junk.blank": 1.0}}
    measure = Measure({"taste": 1.0}, penalties={"blank": 2.0})
    found = Yardstick.from_baselines(measure, [marked.but(scores=scores)], panel([1] * 4))
    assert found.unit == pytest.approx(np.std([4, 6, 5, 7]))


def test_factors_are_the_slopes_of_the_value() -> None:
    found = yardstick()
    factors = found.factors(["taste", "sharpness"])
    low, high = (found.value({"taste": t, "sharpness": 9.0}) for t in (5.0, 6.0))
    assert factors["taste"] == pytest.approx(high - low)
    assert found.factors(["sharpness"]) == {
        "sharpness": pytest.approx(
            found.value({"sharpness": 2.0}) - found.value({"sharpness": 1.0})
        )
    }
