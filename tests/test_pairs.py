from __future__ import annotations

import pytest
from outcomes import a_result

from bayesian_merger import pairs
from bayesian_merger.data import Interval, Preference, Result


def judged(name: str, **shares: dict[str, float]) -> Result:
    """Images "i0", "i1" ... -> what they were compared with, and their share."""
    scores = {
        int(image[1:]): {f"over.{rival}": share for rival, share in found.items()}
        for image, found in shares.items()
    }
    return a_result(name, value=0.0).but(scores=scores)


A = judged("a", i0={}, i1={})
EVEN = judged("even", i0={"a": 1.0}, i1={"a": 0.0})
B = judged("b", i0={"even": 0.0}, i1={"a": 0.5})


def test_champion_is_who_has_won_last() -> None:
    assert pairs.champion([A], 0) is A
    assert pairs.champion([A, EVEN, B], 0) is EVEN
    assert pairs.champion([A, EVEN, B], 1) is A
    assert pairs.champion([A, EVEN, B], 7) is None


def test_who_was_compared_with_another_is_no_champion() -> None:
    late = judged("trial 1", i0={"b": 1.0})
    assert pairs.champion([A, EVEN, B, late], 0) is EVEN


def test_choices_are_those_between_the_results() -> None:
    found = pairs.choices([A, EVEN, B])
    assert [tuple(choice) for choice in found] == [
        (0, 1, 0, 1.0),
        (1, 1, 0, 0.0),
        (0, 2, 1, 0.0),
        (1, 2, 0, 0.5),
    ]
    assert len(pairs.choices([EVEN, B])) == 1


def test_leads_are_over_the_even_merge_or_else_over_the_mean() -> None:
    leads = pairs.leads([A, EVEN, B])
    assert (leads["even"].mean, leads["even"].se, leads["even"].n) == (0, 0, 3)
    assert leads["a"].mean > leads["b"].mean
    assert leads["a"].se > 0
    others = [judged(name, **{}) for name in ("trial 1", "trial 2")]
    others[1] = judged("trial 2", i0={"trial 1": 1.0})
    found = pairs.leads(others)
    assert found["trial 2"].mean == pytest.approx(-found["trial 1"].mean)
    assert found["trial 2"].mean > 0


def test_margin_is_what_was_won_less_what_was_lost() -> None:
    # Wilson's interval of 17 of 20: 0.6396 to 0.9476.
    found = pairs.margin(Preference(17, 3, 9))
    assert found.mean == pytest.approx(0.7)
    assert (found.low, found.high) == pytest.approx((0.2792, 0.8952), abs=1e-4)
    assert pairs.margin(Preference(0, 0, 9)) == Interval(0, -1, 1)


def test_margin_of_pairs_that_were_all_won_is_not_certain() -> None:
    found = pairs.margin(Preference(4, 0, 0))
    assert 0 < found.low < 0.1 < found.mean == found.high == 1


def test_preference_is_told_in_words() -> None:
    assert pairs.preference(B, "a") == Preference(0, 0, 1)
    assert pairs.preference(EVEN, "a") == Preference(1, 1, 0)
    assert pairs.sentence(Preference(0, 0, 1)) == "alike in all 1 pairs"
    assert pairs.sentence(Preference(17, 3, 2)) == (
        "preferred in 17 of 20 pairs (85%, 95 % interval 64% to 95%; 2 alike)"
    )
