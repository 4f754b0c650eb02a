from __future__ import annotations

from pathlib import Path

import pytest
from test_hard_knocks import begin
from test_run import folder as folder

from bayesian_merger.errors import ConfigError
from bayesian_merger.guide import read

OLD = """
frozen_params:
  base_alpha: 0.25
  base_beta: 0.5
custom_ranges:
  block_0_alpha: [0.2, 0.4]
groups:
  - [base_beta, block_0_beta]
  - [block_1_alpha, block_2_alpha, block_2_beta]
  - [block_23_alpha, block_24_alpha]
"""


@pytest.fixture
def guide(folder: Path) -> Path:
    (folder / "guide.yaml").write_text(OLD)
    return folder


def test_guide_of_the_original_is_read_as_it_is(guide: Path) -> None:
    space = begin(guide, "search.guide=guide.yaml").space
    assert space.frozen == {"base_alpha": 0.25}
    found = {tuple(p.members): (p.low, p.high) for p in space.parameters}
    assert found[("IN00_alpha",)] == (0.2, 0.4)
    assert ("IN01_alpha", "IN02_alpha") in found
    assert ("OUT10_alpha", "OUT11_alpha") in found
    assert len(found) == 26 - 1 - 2


def test_configuration_goes_before_the_guide(guide: Path) -> None:
    space = begin(guide, "search.guide=guide.yaml", "search.freeze.base_alpha=0.75").space
    assert space.frozen == {"base_alpha": 0.75}


@pytest.mark.parametrize("text", ["", "frozen_params:\ncustom_ranges:\ngroups:\n", "{}"])
def test_empty_guide_changes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "guide.yaml").write_text(text)
    found = read(tmp_path / "guide.yaml")
    assert (found.freeze, found.ranges, found.groups) == ({}, {}, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("frozen_param: {}", "unknown key 'frozen_param'; did you mean 'frozen_params'"),
        ("frozen_params: {base_alpha: half}", "frozen_params.base_alpha: Input should be"),
        ("custom_ranges: {base_alpha: [0.5]}", "custom_ranges.base_alpha.1: Field required"),
        ("groups: [base_alpha]", "groups.0: Input should be"),
        ("- 1", "no table of frozen_params"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_mistake_in_a_guide_is_told_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "guide.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "guide.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"search.guide: {tmp_path / 'guide.yaml'}: ")
    assert said in line


def test_missing_guide_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "guide.yaml")


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (
            "custom_ranges: {block_0_alpha: [0.5, 0.4]}",
            [],
            "GUIDE: custom_ranges: block_0_alpha = [0.5, 0.4] is upside down",
        ),
        ("frozen_params: {block_0: 0.5}", [], "GUIDE: frozen_params: 'block_0' names no weight"),
        ("groups: [[base_beta], [block_30_alpha]]", [], "GUIDE: groups: 'block_30_alpha' names"),
        (
            "groups: [[base_beta], [IN00, IN01], [IN01, M00]]",
            [],
            "GUIDE: groups: IN01_alpha is in groups 2 and 3",
        ),
        (
            "groups: [[IN00, IN01]]",
            ['search.groups=[["IN01", "M00"]]'],
            "GUIDE: groups and search.groups: IN01_alpha is in groups 1 and 1",
        ),
        (
            "{frozen_params: {IN00: 0.5}, groups: [[IN00, IN01]]}",
            [],
            "GUIDE: groups: IN00_alpha of group 1 is frozen",
        ),
        (
            "{custom_ranges: {IN00: [0, 0.5], IN01: [0, 0.6]}, groups: [[IN00, IN01]]}",
            [],
            "GUIDE: groups: group 1 has members with different ranges",
        ),
        (
            "frozen_params: {IN00: 0.5}",
            ["search.ranges.IN00=[0.2, 0.4]"],
            "GUIDE: frozen_params and search.ranges: IN00_alpha is both frozen and given a range",
        ),
        (
            "frozen_params: {block_0_alpha: 0.5}",
            ["search.freeze.IN00=0.6"],
            "GUIDE: frozen_params and search.freeze: IN00_alpha is given twice, the second time",
        ),
        ('frozen_params: {"*": 0.5}', [], "GUIDE: frozen_params: every weight is frozen"),
    ],
)
def test_mistake_in_what_a_guide_names_is_told_with_the_guide_s_place(
    guide: Path, text: str, overrides: list[str], said: str
) -> None:
    (guide / "guide.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        begin(guide, "search.guide=guide.yaml", *overrides)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(said.replace("GUIDE", f"search.guide: {guide / 'guide.yaml'}"))


def test_range_of_a_guide_that_the_method_does_not_take_names_the_guide(guide: Path) -> None:
    (guide / "guide.yaml").write_text("custom_ranges: {block_12_beta: [0.5, 2.0]}")
    with pytest.raises(ConfigError) as caught:
        begin(guide, "search.guide=guide.yaml", "merge.method=tensor_sum")
    places = f"search.ranges or search.freeze or search.guide: {guide / 'guide.yaml'}"
    assert str(caught.value).endswith(f"; narrow {places}")


# What is tried first


def test_start_is_tried_first(folder: Path) -> None:
    ready = begin(folder, 'search.start=["GRAD_V", {"IN00" = 0.25, "OUT*" = 1.0}]')
    grad, given = ready.plan.start
    assert (grad["IN00_alpha"], grad["M00_alpha"], grad["base_alpha"]) == (1.0, 0.0, 0.0)
    assert (given["IN00_alpha"], given["OUT05_alpha"], given["M00_alpha"]) == (0.25, 1.0, 0.5)
    assert ready.plan.first(0) == grad


def test_preset_beyond_the_ranges_is_tried_as_near_as_they_are(folder: Path) -> None:
    for space in ('search.ranges={ "OUT0*" = [0.2, 1.0] }', "search.smooth=6"):
        ready = begin(folder, 'search.start=["GRAD_V"]', space)
        (grad,) = ready.plan.start
        assert all(low <= grad[name] <= high for name, (low, high) in ready.plan.bounds.items())


def test_start_of_a_group_is_the_mean_of_its_members(folder: Path) -> None:
    groups = 'search.groups=[["IN00", "M00"]]'
    (grad,) = begin(folder, 'search.start=["GRAD_V"]', groups).plan.start
    assert grad["IN00_alpha-M00_alpha"] == 0.5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['search.start=["GRAD_W"]'], "did you mean 'GRAD_V'"),
        (['search.start=[{"IN99" = 0.5}]'], "search.start 1: 'IN99' names no weight"),
        (
            ['search.start=[{"TE2" = 0.5}]'],
            "'TE2' names no weight; it is one of SDXL, SD3, SD3.5 large, and the models are SD1.5",
        ),
        (['search.start=[{"IN00" = nan}]'], "search.start.0: IN00 is neither a"),
        (["search.start=[5]"], "search.start.0: neither the name of a preset nor"),
        (
            ['search.start=[{"IN00" = 1.5}]'],
            "start 1: IN00_alpha is 1.5, outside its range 0 to 1",
        ),
        (
            ['search.start=[{"IN00" = 0.5}]', "search.freeze.IN00=0.5"],
            "search.start 1: IN00_alpha is frozen; leave it out",
        ),
    ],
)
def test_mistake_in_a_start_is_told(folder: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        begin(folder, *overrides)
    assert said in str(caught.value)
