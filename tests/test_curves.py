from __future__ import annotations

import json
import os
import subprocess

import pytest

from bayesian_merger.blocks import ARCHITECTURES, FLUX, SD1, SD2, SDXL, Architecture
from bayesian_merger.curves import CURVES, weights
from bayesian_merger.errors import ConfigError

every_curve = pytest.mark.parametrize("name", CURVES)
every_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES.values(), ids=ARCHITECTURES
)


def unet(name: str, architecture: Architecture = SD1) -> list[float]:
    """The weights of all blocks but the text encoders'."""
    return list(weights(name, architecture).values())[len(architecture.encoders) :]


def ones(name: str, architecture: Architecture) -> set[str]:
    """The blocks that have weight 1."""
    return {block for block, weight in weights(name, architecture).items() if weight == 1}


def test_order_is_that_of_the_original() -> None:
    assert len(CURVES) == 38
    assert [*CURVES][:2] == ["GRAD_V", "GRAD_A"]
    assert [*CURVES][16:20] == [
        "SMOOTHSTEP",
        "REVERSE-SMOOTHSTEP",
        "SMOOTHSTEP*2",
        "R_SMOOTHSTEP*2",
    ]
    assert [*CURVES][-2:] == ["ALL_A", "ALL_B"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GRAD_V", {"IN00": 1, "IN03": 3 / 4, "M00": 0, "OUT02": 1 / 4, "OUT11": 1}),
        ("FLAT_25", {"IN00": 1 / 4, "M00": 1 / 4, "OUT11": 1 / 4}),
        ("WRAP08", {"IN00": 1, "IN03": 1, "IN04": 0, "OUT07": 0, "OUT08": 1, "OUT11": 1}),
        ("WRAP12", {"IN05": 1, "IN06": 0, "OUT05": 0, "OUT06": 1}),
        ("WRAP14", {"IN06": 1, "IN07": 0, "OUT04": 0, "OUT05": 1}),
        ("WRAP16", {"IN07": 1, "IN08": 0, "OUT03": 0, "OUT04": 1}),
        ("MID12_50", {"IN04": 0, "IN05": 1 / 2, "M00": 1 / 2, "OUT05": 1 / 2, "OUT06": 0}),
        ("OUT07", {"IN00": 0, "OUT04": 0, "OUT05": 1, "OUT11": 1}),
        ("OUT12", {"IN11": 0, "M00": 0, "OUT00": 1, "OUT11": 1}),
        ("OUT12_5", {"IN11": 0, "M00": 1 / 2, "OUT00": 1, "OUT11": 1}),
        ("RING08_SOFT", {"IN04": 0, "IN05": 1 / 2, "IN06": 1, "IN08": 1, "IN09": 1 / 2, "M00": 0}),
        ("RING08_5", {"IN05": 0, "IN06": 1, "IN09": 1, "IN10": 0, "OUT02": 1, "OUT06": 0}),
        ("RING10_5", {"IN04": 0, "IN05": 1, "IN09": 1, "IN10": 0, "OUT02": 1, "OUT06": 1}),
        ("RING10_3", {"IN05": 0, "IN06": 1, "IN10": 1, "IN11": 0, "OUT01": 1, "OUT06": 0}),
        # At a quarter, 3 / 16 - 2 / 64 = 5 / 32.
        ("SMOOTHSTEP", {"IN00": 0, "IN06": 5 / 32, "M00": 1 / 2, "OUT05": 27 / 32, "OUT11": 1}),
        ("SMOOTHSTEP*2", {"IN06": 5 / 16, "M00": 1, "OUT05": 5 / 16, "OUT11": 0}),
        ("SMOOTHSTEP*3", {"IN06": 15 / 32, "M00": 1 / 2, "OUT05": 17 / 32, "OUT11": 1}),
        ("SMOOTHSTEP*4", {"IN06": 5 / 8, "M00": 0, "OUT05": 5 / 8, "OUT11": 0}),
        ("SMOOTHSTEP/2", {"IN03": 5 / 32, "IN06": 1 / 2, "M00": 1, "OUT08": 5 / 32, "OUT11": 0}),
        ("SMOOTHSTEP/3", {"IN02": 5 / 32, "IN08": 1, "M00": 1 / 2, "OUT03": 0, "OUT11": 1}),
        ("SMOOTHSTEP/4", {"IN03": 1 / 2, "IN06": 1, "M00": 0, "OUT05": 1, "OUT11": 0}),
        ("COSINE", {"IN00": 1, "IN08": 3 / 4, "M00": 1 / 2, "OUT03": 1 / 4, "OUT11": 0}),
        # 5 / 32 + 25 / 6 x 1 / 4 x 3 / 4 x 1 / 2, and 27 / 32 of 1 / 24 more
        ("FAKE_CUBIC_HERMITE", {"IN00": 0, "IN06": 35 / 64, "M00": 1 / 2, "OUT11": 1}),
        ("TRUE_CUBIC_HERMITE", {"IN00": 0, "IN06": 149 / 256, "M00": 25 / 48, "OUT11": 1}),
    ],
)
def test_curve_on_sd1(name: str, expected: dict[str, float]) -> None:
    found = weights(name, SD1)
    assert {block: found[block] for block in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "reverse"),
    [
        ("GRAD_V", "GRAD_A"),
        ("SMOOTHSTEP", "REVERSE-SMOOTHSTEP"),
        *((f"SMOOTHSTEP{how}{n}", f"R_SMOOTHSTEP{how}{n}") for how in "*/" for n in (2, 3, 4)),
        ("COSINE", "REVERSE_COSINE"),
        ("TRUE_CUBIC_HERMITE", "TRUE_REVERSE_CUBIC_HERMITE"),
        ("FAKE_CUBIC_HERMITE", "FAKE_REVERSE_CUBIC_HERMITE"),
        ("ALL_A", "ALL_B"),
    ],
)
@every_architecture
def test_curve_and_its_reverse_add_up_to_one(
    name: str, reverse: str, architecture: Architecture
) -> None:
    pairs = zip(unet(name, architecture), unet(reverse, architecture), strict=True)
    assert [a + b for a, b in pairs] == pytest.approx([1.0] * len(unet(name, architecture)))


@pytest.mark.parametrize(
    "name",
    [
        *("GRAD_V", "GRAD_A", "FLAT_25", "FLAT_75", "WRAP08", "WRAP12", "WRAP14", "WRAP16"),
        *("RING08_SOFT", "RING08_5", "RING10_5", "RING10_3", "SMOOTHSTEP*2", "SMOOTHSTEP*4"),
        *("SMOOTHSTEP/2", "SMOOTHSTEP/4"),
    ],
)
@every_architecture
def test_the_way_up_mirrors_the_way_down(name: str, architecture: Architecture) -> None:
    assert unet(name, architecture) == pytest.approx(unet(name, architecture)[::-1], abs=1e-12)


@pytest.mark.parametrize(
    "name", ["SMOOTHSTEP", "SMOOTHSTEP*3", "SMOOTHSTEP/3", "COSINE", "FAKE_CUBIC_HERMITE"]
)
@every_architecture
def test_curve_turned_round_is_its_reverse(name: str, architecture: Architecture) -> None:
    turned = [1 - weight for weight in unet(name, architecture)[::-1]]
    assert unet(name, architecture) == pytest.approx(turned, abs=1e-12)


@every_curve
@every_architecture
def test_every_block_has_a_weight_between_zero_and_one(
    name: str, architecture: Architecture
) -> None:
    found = weights(name, architecture)
    assert tuple(found) == architecture.blocks
    assert all(0 <= weight <= 1 for weight in found.values())


@every_curve
@every_architecture
def test_text_encoders_stay_those_of_model_a_except_in_all_b(
    name: str, architecture: Architecture
) -> None:
    found = weights(name, architecture)
    assert {found[e] for e in architecture.encoders} == {1.0 if name == "ALL_B" else 0.0}


@every_curve
@every_architecture
def test_ends_of_the_network_have_the_same_weights_in_every_architecture(
    name: str, architecture: Architecture
) -> None:
    here, sd1 = unet(name, architecture), unet(name)
    assert (here[0], here[-1]) == (sd1[0], sd1[-1])


@every_curve
def test_sd2_has_the_weights_of_sd1(name: str) -> None:
    assert weights(name, SD2) == weights(name, SD1)


@every_curve
def test_middle_of_sdxl_has_the_weight_of_the_middle_of_sd1(name: str) -> None:
    assert weights(name, SDXL)["M00"] == weights(name, SD1)["M00"]


def test_smooth_curves_are_taken_at_the_blocks_relative_depth() -> None:
    # IN03 is a sixth of the way through SDXL, and IN04 through SD1.5.
    assert weights("GRAD_V", SDXL)["IN03"] == pytest.approx(2 / 3)
    assert weights("COSINE", SDXL)["IN03"] == pytest.approx(weights("COSINE", SD1)["IN04"])
    # S00 is the 21st of 59 blocks.
    assert weights("GRAD_A", FLUX)["S00"] == pytest.approx(40 / 58)


def test_steps_are_those_of_the_nearest_block_of_sd1() -> None:
    # In SDXL a block is 4/3 of one of SD1.5: IN02 is nearest to IN03, and IN03 is at IN04.
    assert ones("WRAP08", SDXL) == {"IN00", "IN01", "IN02", "OUT06", "OUT07", "OUT08"}
    assert ones("OUT12", SDXL) == {f"OUT{i:02}" for i in range(9)}
    # In Flux a block is 12/29 of one: the first 9 are nearer to IN03 than to IN04.
    assert ones("WRAP08", FLUX) == {
        *("IN", "D00", "D01", "D02", "D03", "D04", "D05", "D06", "D07"),
        *("S30", "S31", "S32", "S33", "S34", "S35", "S36", "S37", "OUT"),
    }


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("grad_v", "GRAD_V"),
        ("REVERSE_SMOOTHSTEP", "REVERSE-SMOOTHSTEP"),
        ("R_SMOOTHSTEP", "REVERSE-SMOOTHSTEP"),
        ("SMOOTHSTEP2", "SMOOTHSTEP*2"),
        ("2SMOOTHSTEP", "SMOOTHSTEP*2"),
        ("r_smoothstep3", "R_SMOOTHSTEP*3"),
        ("4R_SMOOTHSTEP", "R_SMOOTHSTEP*4"),
        ("REVERSE-SMOOTHSTEP*4", "R_SMOOTHSTEP*4"),
        ("HALF_SMOOTHSTEP", "SMOOTHSTEP/2"),
        ("ONE_THIRD_R_SMOOTHSTEP", "R_SMOOTHSTEP/3"),
        ("one_fourth_smoothstep", "SMOOTHSTEP/4"),
        ("R_COSINE", "REVERSE_COSINE"),
        ("TRUE_R_CUBIC_HERMITE", "TRUE_REVERSE_CUBIC_HERMITE"),
    ],
)
def test_spellings_of_other_tools_are_understood(spelling: str, name: str) -> None:
    assert weights(spelling, SD1) == weights(name, SD1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("GRAD_W", "; did you mean 'GRAD_"),
        ("smothstep*2", "; did you mean 'SMOOTHSTEP*2'?"),
        ("SMOOTHSTEP*5", "; did you mean 'SMOOTHSTEP*"),
        ("xyzzy", "'xyzzy' ('bayesian-merger list presets' shows all)"),
        ("", "''"),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        weights(name, SD1)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


@every_curve
def test_curve_is_described_in_one_short_line(name: str) -> None:
    about = CURVES[name].about
    assert about
    assert "\n" not in about
    assert len(about) <= 60


@pytest.mark.peers
def test_curves_are_those_of_sd_meh_in_its_order() -> None:
    python = os.environ.get("BAYESIAN_MERGER_PEERS")
    if not python:
        pytest.skip("BAYESIAN_MERGER_PEERS names no Python that has sd-meh")
    code = "import json, sd_meh.presets as p; print(json.dumps(p.BLOCK_WEIGHTS_PRESETS))"
    printed = subprocess.run([python, "-I", "-c", code], check=True, capture_output=True).stdout
    tables = json.loads(printed)
    assert len(tables) == len(CURVES)
    for (theirs, table), ours in zip(tables.items(), CURVES, strict=True):
        # The tables have ten digits.
        assert list(weights(ours, SD1).values()) == pytest.approx(table, rel=0, abs=1e-9)
        assert weights(theirs, SD1) == weights(ours, SD1)
