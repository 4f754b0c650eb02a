from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle
from outcomes import BLOCKS, a_recipe
from PIL import Image
from test_cli import Command
from test_cli import command as command

from bayesian_merger import plots, report
from bayesian_merger.blocks import FLUX, SD3, SDXL, Architecture
from bayesian_merger.recipes import to_toml

UNET = ",".join(f"{i / 24:.3f}" for i in range(25))


def drawn(path: Path) -> set[str]:
    """The names of the parts of an SVG."""
    return set(re.findall(r'<g id="([^"]+)"', path.read_text()))


def test_any_weights_are_drawn(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "unet.png"
    assert command("draw", "--weights", UNET, "--base", "0", "-o", str(path))[0] == 0
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.height > image.width > 800


def test_svg_holds_a_box_for_each_block_and_is_the_same_each_time(
    tmp_path: Path, command: Command
) -> None:
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        assert command("draw", "--weights", "GRAD_V", "-o", str(path))[0] == 0
    assert {*BLOCKS} <= drawn(paths[0])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_weights_without_base_are_drawn_without_it(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "unet.svg"
    assert command("draw", "--weights", UNET, "-o", str(path))[0] == 0
    assert drawn(path) & {"base", "IN00"} == {"IN00"}


def test_second_weight_stands_beside_the_first(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "unet.svg"
    given = ["--weights", "0.25", "--beta", "1.5", "--arch", "sdxl"]
    assert command("draw", *given, "-o", str(path))[0] == 0
    names = drawn(path)
    assert {*SDXL.blocks, *(f"{block}'" for block in SDXL.blocks)} <= names
    assert "OUT08' outside" in names
    assert "OUT08 outside" not in names


def test_recipe_is_drawn_with_its_models(tmp_path: Path, command: Command) -> None:
    recipe = tmp_path / "best.toml"
    recipe.write_text(to_toml(a_recipe(), {}))
    path = tmp_path / "unet.svg"
    assert command("draw", str(recipe), "-o", str(path), "--dark")[0] == 0
    assert {*BLOCKS} <= drawn(path)


@pytest.mark.parametrize("architecture", [SD3, FLUX])
def test_blocks_of_a_transformer_stand_in_columns_apart(architecture: Architecture) -> None:
    blocks = architecture.blocks
    figure = plots.unet(dict.fromkeys(blocks, 0.5), blocks=blocks)
    patches = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    boxes = {patch.get_gid(): patch.get_bbox() for patch in patches}
    assert boxes.keys() == set(blocks)
    for one in blocks:
        for other in blocks:
            if one != other:
                assert not boxes[one].padded(-0.01).overlaps(boxes[other].padded(-0.01))
    width, height = figure.get_size_inches()
    assert height < 3 * width
    network = architecture.network
    # Down, then to the right.
    places = [(round(boxes[block].x0, 3), round(boxes[block].y0, 3)) for block in network]
    assert places == sorted(places)
    assert len({x for x, _ in places}) >= 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "name a recipe to draw, or the weights with --weights"),
        (["--weights", "1,2,3"], "--weights: 3 numbers, but SD1.5 takes"),
        (["--weights", "nan"], "--weights: the weight of base is nan"),
        (["--weights", "GRAD_W"], "unknown preset of weights 'GRAD_W'; did you mean 'GRAD_V'?"),
        (["--weights", "0.5", "--names", "one"], "--names one: write it as A,B"),
        (["--weights", "0.5", "-o", "unet.gif"], "unet.gif: name the output .png or .svg"),
        (["nothing.toml"], "nothing.toml: no such file"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_a_line(
    command: Command, given: list[str], told: str
) -> None:
    code, _, err = command("draw", *given)
    assert code == 2
    assert told in err


def test_drawing_replaces_no_file_unasked(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "unet.png"
    path.write_text("mine")
    code, _, err = command("draw", "--weights", "0.5", "-o", str(path))
    assert code == 2
    assert "exists; choose another name or give --overwrite" in err
    assert path.read_text() == "mine"
    assert command("draw", "--weights", "0.5", "-o", str(path), "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["RECIPE", "--beta", "0.5"], "leave --beta or it out"),
        (["RECIPE", "--arch", "sdxl"], "leave --arch or it out"),
        (["RECIPE", "--weights", "0.5"], "leave --weights or it out"),
        (["--weights", "0.5", "--beta-base", "0.2"], "there is no --beta"),
        (["--weights", "0.5", "--names", "one,two,three"], "write it as A,B"),
        (["--weights", ",".join(["0.5"] * 26), "--base", "0.1"], "that of the base already"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    tmp_path: Path, command: Command, given: list[str], said: str
) -> None:
    recipe = tmp_path / "best.toml"
    recipe.write_text(to_toml(a_recipe(), {}))
    options = [recipe if one == "RECIPE" else one for one in given]
    code, _, err = command("draw", *options, "-o", tmp_path / "unet.png")
    assert code == 2
    assert said in " ".join(err.split())


def test_run_folder_and_best_log_are_drawn_as_the_recipe(tmp_path: Path, command: Command) -> None:
    weights = {"alpha": {block: n / 40 for n, block in enumerate(BLOCKS)}}
    (tmp_path / "best.toml").write_text(to_toml(a_recipe(weights), {}))
    (tmp_path / "best.log").write_text(report.best_log(a_recipe(weights)))
    names = ("--names", "shapes,colours")
    for given, name in ((tmp_path, "folder"), (tmp_path / "best.log", "log")):
        code, _, err = command("draw", given, *names, "-o", tmp_path / f"{name}.svg")
        assert code == 0, err
    assert (tmp_path / "folder.svg").read_bytes() == (tmp_path / "log.svg").read_bytes()
