from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesian_merger.blocks import ARCHITECTURES, SD1, SDXL, Architecture
from bayesian_merger.errors import ConfigError
from bayesian_merger.space import PRESETS, Parameter, Space, build, start

OUTS = tuple(f"OUT{i:02}_alpha" for i in range(12))
INS = tuple(f"IN{i:02}_alpha" for i in range(12))


def space(
    freeze: Mapping[str, float] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    groups: Sequence[Sequence[str]] = (),
    weights: Sequence[str] = ("alpha",),
    *,
    presets: Sequence[str] = (),
    smooth: int | None = None,
    architecture: Architecture = SD1,
    blocks: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
) -> Space:
    return build(
        weights,
        architecture,
        freeze=freeze or {},
        ranges=ranges or {},
        groups=groups,
        presets=presets,
        smooth=smooth,
        blocks=blocks,
        parts=parts,
    )


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
    assert all(p.members == {p.name: 1.0} for p in found.parameters)
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
    assert [tuple(p.members) for p in found.parameters][:2] == [INS[:2], OUTS]
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
    assert space(groups=[["IN00", "block_0_alpha", "IN00*"]]).parameters[
        0
    ].members == dict.fromkeys(INS[:1], 1.0)


def test_whole_space_may_be_one_number() -> None:
    found = space(groups=[["*"]])
    assert [tuple(p.members) for p in found.parameters] == [tuple(found.names)]
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
    assert only.startswith("search.ranges: M00 = [")


def test_mistake_in_a_pattern_is_told_once() -> None:
    frozen, ranged = mistakes({"OUT*": math.nan}, ranges={"IN*": (1.0, 0.0)})
    assert frozen == "search.freeze: OUT* is nan"
    assert ranged.startswith("search.ranges: IN* = [1.0, 0.0] is upside down")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weight_frozen_at_no_number_is_a_mistake(value: float) -> None:
    (only,) = mistakes({"M00": value})
    assert only == f"search.freeze: M00 is {value}"


def test_frozen_weight_with_a_range_or_a_group_is_a_mistake() -> None:
    (only,) = mistakes({"M00": 0.5}, {"M00": (0.0, 0.5)})
    assert only.startswith("search.freeze and search.ranges: M00_alpha is both frozen and given a")
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


def test_single_searches_one_value_for_each_weight_of_the_method() -> None:
    (only,) = space(presets=["single"]).parameters
    assert only == Parameter(
        "base-OUT11_alpha",
        0.0,
        1.0,
        dict.fromkeys(("base_alpha", *INS, "M00_alpha", *OUTS), 1.0),
    )
    found = space(weights=["alpha", "beta"], presets=["single"])
    assert [p.name for p in found.parameters] == ["base-OUT11_alpha", "base-OUT11_beta"]
    weights = found.weights({"base-OUT11_alpha": 0.25, "base-OUT11_beta": 0.75})
    assert weights["alpha"] == dict.fromkeys(SD1.blocks, 0.25)
    assert weights["beta"] == dict.fromkeys(SD1.blocks, 0.75)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_groups8_searches_eight_values_for_all_blocks(architecture: Architecture) -> None:
    found = space(presets=["groups8"], architecture=architecture)
    assert len(found.parameters) == 8
    assert [n for p in found.parameters for n in p.members] == [
        f"{block}_alpha" for block in architecture.blocks
    ]


def test_groups8_of_sdxl_is_called_by_first_and_last_block() -> None:
    found = space(presets=["groups8"], architecture=SDXL)
    assert [p.name for p in found.parameters] == [
        "base_alpha",
        "IN00-IN03_alpha",
        "IN04-IN06_alpha",
        "IN07-IN08_alpha",
        "M00_alpha",
        "OUT00-OUT02_alpha",
        "OUT03-OUT05_alpha",
        "OUT06-OUT08_alpha",
    ]


def test_what_the_user_freezes_or_groups_is_not_in_a_preset_s_group() -> None:
    found = space({"M00": 0.5}, groups=[["IN01", "IN04"]], presets=["groups8"])
    members = {p.name: tuple(p.members) for p in found.parameters}
    assert members["IN01_alpha-IN04_alpha"] == ("IN01_alpha", "IN04_alpha")
    assert members["IN00-IN03_alpha"] == ("IN00_alpha", "IN02_alpha", "IN03_alpha")
    assert members["IN05-IN06_alpha"] == ("IN05_alpha", "IN06_alpha")
    assert "M00_alpha" not in members["IN10-OUT02_alpha"]
    assert found.frozen == {"M00_alpha": 0.5}


def test_blocks_of_a_preset_s_group_with_different_ranges_are_searched_apart() -> None:
    found = space(ranges={"IN01": (0.2, 0.4), "IN03": (0.2, 0.4)}, presets=["single"])
    assert {p.name: (p.low, p.high, len(p.members)) for p in found.parameters} == {
        "base-OUT11_alpha": (0.0, 1.0, 24),
        "IN01-IN03_alpha": (0.2, 0.4, 2),
    }
    (only,) = space(ranges={"*": (-0.5, 1.5)}, presets=["single"]).parameters
    assert (only.low, only.high, len(only.members)) == (-0.5, 1.5, 26)


@pytest.mark.parametrize(
    ("presets", "parts"),
    [
        (["te-split"], ["TE2"]),
        (["ends"], ["TIME", "LABEL", "FINAL"]),
        (["vae"], ["VAE"]),
        (["vae", "te-split", "ends", "vae"], ["TE2", "TIME", "LABEL", "FINAL", "VAE"]),
    ],
)
def test_preset_gives_parts_values_of_their_own(presets: list[str], parts: list[str]) -> None:
    found = space(presets=presets, architecture=SDXL, weights=["alpha", "beta"])
    names = [*SDXL.blocks, *parts]
    assert [p.name for p in found.parameters] == [
        f"{n}_{w}" for w in ("alpha", "beta") for n in names
    ]
    weights = found.weights({p.name: 0.5 for p in found.parameters})
    assert [list(given) for given in weights.values()] == [names, names]


def test_parts_stay_out_of_a_preset_s_group() -> None:
    found = space(presets=["single", "te-split", "vae"], architecture=SDXL)
    assert [p.name for p in found.parameters] == ["base-OUT08_alpha", "TE2_alpha", "VAE_alpha"]


def test_part_named_by_the_user_has_a_weight_of_its_own() -> None:
    found = space({"TIME": 0.0}, {"VAE_beta": (0.2, 0.4)}, [["FINAL", "M00"]], ["alpha", "beta"])
    assert found.frozen == {"TIME_alpha": 0.0}
    parameters = by_name(found)
    assert (parameters["VAE_beta"].low, parameters["VAE_beta"].high) == (0.2, 0.4)
    assert tuple(parameters["FINAL_alpha-M00_alpha"].members) == ("FINAL_alpha", "M00_alpha")
    weights = found.weights({p.name: 0.5 for p in found.parameters})
    assert set(weights["alpha"]) - set(SD1.blocks) == {"TIME", "FINAL"}
    assert set(weights["beta"]) - set(SD1.blocks) == {"VAE"}


def test_pattern_names_only_parts_that_something_else_names() -> None:
    assert "TIME_alpha" not in space(ranges={"*": (0.0, 0.5)}).names
    found = space(ranges={"*": (0.0, 0.5)}, presets=["ends"])
    assert by_name(found)["TIME_alpha"].high == 0.5
    (only,) = mistakes({"TIM?": 0.5})
    assert only == "search.freeze: 'TIM?' names no weight; did you mean 'TIME'?"


def test_weights_without_a_part_of_the_space_have_no_values() -> None:
    found = space(presets=["single", "vae"])
    alpha = dict.fromkeys(SD1.blocks, 0.5)
    assert found.values({"alpha": alpha}) is None
    assert found.values({"alpha": {**alpha, "VAE": 0.25}}) == {
        "base-OUT11_alpha": 0.5,
        "VAE_alpha": 0.25,
    }


def test_blocks_and_parts_that_the_models_lack_have_no_weight() -> None:
    alone: dict[str, Any] = {"blocks": SDXL.blocks[1:], "parts": ("TIME", "LABEL", "FINAL")}
    found = space(architecture=SDXL, presets=["ends", "groups8"], **alone)
    assert found.parameters[0].name == "IN00-IN03_alpha"
    assert len(found.parameters) == 7 + 3
    assert "base" not in found.weights({p.name: 0.5 for p in found.parameters})["alpha"]
    assert mistakes({"base": 0.5}, groups=[["VAE", "M00"]], architecture=SDXL, **alone) == [
        "search.freeze: 'base' names no weight; the models hold no tensor of it",
        "search.groups: 'VAE' names no weight; the models hold no tensor of it",
    ]


def test_preset_that_is_unknown_or_fits_nowhere_is_a_mistake() -> None:
    (only,) = mistakes(presets=["group8"])
    assert only == "search.presets: no preset 'group8'; did you mean 'groups8'?"
    (only,) = mistakes(presets=["te-split"])
    assert only == (
        "search.presets: 'te-split' fits nowhere, these SD1.5 models have no part TE2 or T5; "
        "take it out"
    )
    (only,) = mistakes(presets=["vae"], parts=("TIME", "FINAL"))
    assert "'vae' fits nowhere, these SD1.5 models have no part VAE" in only


def test_two_presets_that_group_are_a_mistake() -> None:
    (only,) = mistakes(presets=["single", "ends", "groups8"])
    assert only == "search.presets: single and groups8 exclude each other; keep one"
    assert len(space(presets=["single", "single"]).parameters) == 1


def test_docs_name_every_preset() -> None:
    docs = Path(__file__).parent.parent / "docs" / "blocks.md"
    rows = docs.read_text(encoding="utf-8").partition("\n## Presets\n")[2].splitlines()
    assert [row.split("`")[1] for row in rows if row.startswith("| `")] == list(PRESETS)


def test_smooth_weights_lie_on_straight_lines_between_the_knots() -> None:
    found = space(smooth=3)
    knots = ["IN00_alpha", "M00_alpha", "OUT11_alpha"]
    assert [p.name for p in found.parameters] == [*knots, "base_alpha"]
    values = dict(zip([*knots, "base_alpha"], (0.0, 1.0, 0.5, 0.2), strict=True))
    alpha = found.weights(values)["alpha"]
    assert alpha["base"] == 0.2
    assert [alpha[f"IN{i:02}"] for i in range(12)] == pytest.approx([i / 12 for i in range(12)])
    assert [alpha[f"OUT{i:02}"] for i in range(12)] == pytest.approx(
        [1 - (i + 1) / 24 for i in range(12)]
    )
    assert found.values(found.weights(values)) == pytest.approx(values)
    assert found.values({"alpha": {**alpha, "IN05": 0.9}}) is None


@given(
    st.integers(2, 12),
    st.sets(st.sampled_from([*INS, *OUTS]), max_size=12),
    st.sampled_from([("alpha",), ("alpha", "beta")]),
)
@settings(deadline=None)
def test_smooth_space_holds_every_even_merge_and_its_own_merges(
    n: int, frozen: set[str], weights: tuple[str, ...]
) -> None:
    found = space(dict.fromkeys(frozen, 0.5), smooth=n, weights=weights)
    assert len(found.parameters) == len(weights) * (n + 1)
    even = {weight: dict.fromkeys(SD1.blocks, 0.5) for weight in weights}
    assert found.values(even) == pytest.approx({p.name: 0.5 for p in found.parameters})
    values = {p.name: i % 7 / 6 for i, p in enumerate(found.parameters)}
    made = found.weights(values)
    given = {
        name: made[weight][block]
        for name, (weight, block) in found.names.items()
        if name not in found.frozen
    }
    assert start(found, SD1, given, "start") == pytest.approx(values)
    assert all(0 <= value <= 1 for blocks in made.values() for value in blocks.values())
    assert found.values(made) == pytest.approx(values)


def test_smooth_leaves_frozen_and_grouped_blocks_and_parts_as_they_are() -> None:
    found = space(
        {"IN00": 0.25, "TIME": 0.75},
        {"M00": (0.0, 0.5), "OUT11": (0.0, 0.5)},
        [["M00", "OUT11"]],
        smooth=2,
    )
    assert [p.name for p in found.parameters] == [
        "M00_alpha-OUT11_alpha",
        "IN01_alpha",
        "OUT10_alpha",
        "base_alpha",
    ]
    values = {p.name: i / 4 for i, p in enumerate(found.parameters)}
    alpha = found.weights(values)["alpha"]
    assert (alpha["IN00"], alpha["TIME"], alpha["M00"]) == (0.25, 0.75, 0.0)
    assert alpha["OUT00"] == pytest.approx(0.25 + 0.25 * 12 / 22)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"smooth": 26}, "search.smooth: 26 knots for 25 blocks"),
        ({"smooth": 4, "presets": ["groups8"]}, "exclude each other"),
        ({"smooth": 4, "ranges": {"IN*": (0.0, 0.5)}}, "different ranges"),
    ],
)
def test_smooth_that_cannot_be_is_a_mistake(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        space(**options)
