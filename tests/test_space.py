from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesian_merger.blocks import SD1
from bayesian_merger.errors import ConfigError
from bayesian_merger.space import Parameter, Space, build

OUTS = tuple(f"OUT{i:02}_alpha" for i in range(12))
INS = tuple(f"IN{i:02}_alpha" for i in range(12))


def space(
    freeze: Mapping[str, float] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    groups: Sequence[Sequence[str]] = (),
    weights: Sequence[str] = ("alpha",),
) -> Space:
    return build(weights, SD1, freeze=freeze or {}, ranges=ranges or {}, groups=groups)


def mistakes(*args: object, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        space(*args, **options)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def by_name(found: Space) -> dict[str, Parameter]:
    return {parameter.name: parameter for parameter in found.parameters}


def test_every_block_varies_from_0_to_1_unless_told_otherwise() -> None:
    found = space()
    assert [p.name for p in found.parameters] == [f"{block}_alpha" for block in SD1.blocks]
    assert {(p.low, p.high) for p in found.parameters} == {(0.0, 1.0)}
    assert all(p.members == (p.name,) for p in found.parameters)
    assert found.frozen == {}


def test_each_weight_of_the_method_varies_in_each_block() -> None:
    found = space(weights=["alpha", "beta"])
    assert len(found.parameters) == 2 * 26
    weights = found.weights({p.name: i / 100 for i, p in enumerate(found.parameters)})
    assert {name: list(blocks) for name, blocks in weights.items()} == {
        "alpha": list(SD1.blocks),
        "beta": list(SD1.blocks),
    }
    assert weights["beta"]["base"] == 0.26


@pytest.mark.parametrize("name", ["IN00_alpha", "block_0_alpha", "IN00", "IN00_al*"])
def test_block_may_be_called_by_its_name_or_as_in_older_tools(name: str) -> None:
    found = space({name: 0.25}, {})
    assert found.frozen == {"IN00_alpha": 0.25}
    assert "IN00_alpha" not in by_name(found)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("base_alpha", "base"), ("block_12_alpha", "M00"), ("block_24_alpha", "OUT11")],
)
def test_old_numbers_count_the_unet_s_blocks(name: str, meant: str) -> None:
    assert space({name: 0.25}).frozen == {f"{meant}_alpha": 0.25}


def test_bare_block_means_the_first_weight() -> None:
    found = space({"M00": 0.5, "M00_beta": 0.25}, weights=["alpha", "beta"])
    assert found.frozen == {"M00_alpha": 0.5, "M00_beta": 0.25}


def test_pattern_names_all_that_match() -> None:
    found = space({"OUT*": 0.5}, {"IN0?_alpha": (0.2, 0.4)})
    assert found.frozen == dict.fromkeys(OUTS, 0.5)
    narrow = [p.name for p in found.parameters if (p.low, p.high) == (0.2, 0.4)]
    assert narrow == list(INS[:10])


def test_range_narrows_or_widens_a_weight() -> None:
    found = by_name(space(ranges={"M00": (-0.5, 1.5)}))
    assert (found["M00_alpha"].low, found["M00_alpha"].high) == (-0.5, 1.5)
    assert (found["IN00_alpha"].low, found["IN00_alpha"].high) == (0.0, 1.0)


def test_group_shares_one_value() -> None:
    found = space(groups=[["IN00", "IN01"], ["OUT*"]])
    assert [p.members for p in found.parameters][:2] == [INS[:2], OUTS]
    assert len(found.parameters) == 26 - 14 + 2
    values = {p.name: i / 32 for i, p in enumerate(found.parameters)}
    alpha = found.weights(values)["alpha"]
    assert alpha["IN00"] == alpha["IN01"] == 0.0
    assert {alpha[f"OUT{i:02}"] for i in range(12)} == {1 / 32}
    assert list(alpha) == list(SD1.blocks)


def test_group_takes_the_range_of_its_members() -> None:
    found = space(ranges={"IN0*": (0.2, 0.4)}, groups=[["IN00", "IN01"], ["M00", "OUT00"]])
    assert [(p.low, p.high) for p in found.parameters[:2]] == [(0.2, 0.4), (0.0, 1.0)]


def test_member_named_twice_in_a_group_is_in_it_once() -> None:
    assert space(groups=[["IN00", "block_0_alpha", "IN00*"]]).parameters[0].members == INS[:1]


def test_whole_space_may_be_one_number() -> None:
    found = space(groups=[["*"]])
    assert [p.members for p in found.parameters] == [tuple(found.names)]
    assert set(found.weights({found.parameters[0].name: 0.3})["alpha"].values()) == {0.3}


def test_frozen_weights_keep_their_value_even_outside_0_to_1() -> None:
    found = space({"base": -0.5, "IN*": 2.0})
    alpha = found.weights({p.name: 0.5 for p in found.parameters})["alpha"]
    assert alpha["base"] == -0.5
    assert alpha["IN11"] == 2.0
    assert alpha["M00"] == 0.5


@settings(deadline=None, derandomize=True)
@given(data=st.data())
def test_values_are_found_back_from_the_weights_they_give(data: st.DataObject) -> None:
    found = space(
        {"base": 0.25}, {"OUT*": (0.2, 0.6), "M00": (-1.0, 2.0)}, [["IN00", "IN01"], ["OUT0*"]]
    )
    values = {p.name: data.draw(st.floats(p.low, p.high)) for p in found.parameters}
    assert found.values(found.weights(values)) == values


def test_weights_that_the_space_does_not_hold_have_no_values() -> None:
    found = space({"base": 0.25}, {"M00": (0.2, 0.6)}, [["IN00", "IN01"]])

    def values_with(**blocks: float) -> object:
        alpha = {**dict.fromkeys(SD1.blocks, 0.5), "base": 0.25, **blocks}
        return found.values({"alpha": alpha})

    assert values_with() is not None
    assert values_with(base=0.5) is None
    assert values_with(M00=0.1) is None
    assert values_with(M00=0.7) is None
    assert values_with(IN00=0.4) is None
    assert values_with(IN00=0.4, IN01=0.4) is not None
    assert values_with(OUT05=1.5) is None


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("freeze", {"freeze": {"IN00_alfa": 0.5}}),
        ("ranges", {"ranges": {"IN00_alfa": (0.0, 0.5)}}),
        ("groups", {"groups": [["IN00_alfa", "M00"]]}),
    ],
)
def test_unknown_name_is_a_mistake_with_the_nearest_known(
    where: str, options: Mapping[str, object]
) -> None:
    (only,) = mistakes(**options)
    assert only == f"search.{where}: 'IN00_alfa' names no weight; did you mean 'IN00_alpha'?"


@pytest.mark.parametrize(
    "name", ["IN12", "OUT12_alpha", "block_25_alpha", "M01*", "IN00_beta", ""]
)
def test_name_that_touches_no_tensor_is_a_mistake(name: str) -> None:
    (only,) = mistakes({name: 0.5})
    assert f"{name!r} names no weight" in only


@pytest.mark.parametrize("limits", [(0.5, 0.2), (0.5, 0.5), (math.nan, 1.0), (0.0, math.inf)])
def test_range_without_room_is_a_mistake(limits: tuple[float, float]) -> None:
    (only,) = mistakes(ranges={"M00": limits})
    assert only.startswith("search.ranges: M00_alpha = [")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weight_frozen_at_no_number_is_a_mistake(value: float) -> None:
    (only,) = mistakes({"M00": value})
    assert only == f"search.freeze: M00_alpha is {value}"


def test_frozen_weight_with_a_range_or_a_group_is_a_mistake() -> None:
    (only,) = mistakes({"M00": 0.5}, {"M00": (0.0, 0.5)})
    assert "M00_alpha is both frozen and given a range" in only
    (only,) = mistakes({"M00": 0.5}, groups=[["IN00"], ["M00", "OUT00"]])
    assert "M00_alpha of group 2 is frozen" in only


def test_weight_in_two_groups_is_a_mistake() -> None:
    (only,) = mistakes(groups=[["IN00", "M00"], ["OUT00"], ["M*"]])
    assert only == "search.groups: M00_alpha is in groups 1 and 3"


def test_group_of_members_with_different_ranges_is_a_mistake() -> None:
    (only,) = mistakes(ranges={"IN00": (0.0, 0.5), "IN01": (0.0, 0.6)}, groups=[["IN00", "IN01"]])
    assert only == "search.groups: group 1 has members with different ranges"


def test_weight_given_twice_with_different_values_is_a_mistake() -> None:
    (only,) = mistakes({"IN00": 0.5, "block_0_alpha": 0.6})
    assert only == "search.freeze: IN00_alpha is given twice, the second time as 'block_0_alpha'"
    assert space({"IN00": 0.5, "block_0_alpha": 0.5}).frozen == {"IN00_alpha": 0.5}


def test_freezing_everything_leaves_nothing_to_search() -> None:
    assert "nothing to search" in mistakes({"*": 0.5})[0]


def test_all_mistakes_are_told_at_once() -> None:
    found = mistakes(
        {"IN99": 0.5, "M00": math.nan}, {"OUT99": (0.0, 1.0), "base": (1.0, 0.0)}, [["X"], ["M00"]]
    )
    assert len(found) == 6
