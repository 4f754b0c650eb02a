from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from outcomes import (
    BLOCKS,
    a_recipe,
    a_result,
    an_outcome,
    an_unfinished_outcome,
    baselines,
    followed,
)
from PIL import Image

from bayesian_merger import plots
from bayesian_merger.data import Compromise, Estimate, Outcome, Slice


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return an_outcome(tmp_path_factory.mktemp("pictures"), n_trials=30)


def found(figure: Figure, gid: str) -> Any:
    """The one artist of the figure with this id."""
    artists = figure.findobj(lambda artist: artist.get_gid() == gid)
    assert len(artists) == 1, gid
    return artists[0]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]


def test_figures_are_the_same_whatever_a_matplotlibrc_says(finished: Outcome) -> None:
    expected = plots.png(plots.convergence(finished)), plots.svg(plots.convergence(finished))
    given: Any = {"text.usetex": True, "axes.facecolor": "red", "savefig.bbox": "tight"}
    with mpl.rc_context(given):
        drawn = plots.convergence(finished)
        assert (plots.png(drawn), plots.svg(drawn)) == expected
        assert {name: mpl.rcParams[name] for name in given} == given


def contrast(one: Any, other: Any) -> float:
    """Contrast ratio by WCAG 2.2."""
    shades = []
    for colour in (one, other):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        shades.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(shades) / min(shades)


def points(figure: Figure) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Stage -> trial number -> value and the ends of its error bar, as they are drawn."""
    drawn: dict[str, dict[int, tuple[float, float, float]]] = {}
    for container in figure.axes[0].containers:
        line, _, (bars,) = container
        rows = zip(line.get_xdata(), line.get_ydata(), bars.get_segments(), strict=True)
        ends = {int(x): (y, *sorted(segment[:, 1])) for x, y, segment in rows}
        drawn[str(container.get_label())] = ends
    return drawn


def test_convergence_draws_each_complete_trial_with_its_standard_error(finished: Outcome) -> None:
    drawn = points(plots.convergence(finished))
    everything = drawn["exploration"] | drawn["exploitation"]
    complete = {r.name: r.value for r in finished.results if r.stage != "baseline" and r.value}
    assert {f"trial {n}" for n in everything} == set(complete)
    for n, ends in everything.items():
        value = complete[f"trial {n}"]
        assert ends == pytest.approx((value.mean, value.mean - value.se, value.mean + value.se))


def test_convergence_tells_exploration_from_exploitation_by_marker(finished: Outcome) -> None:
    figure = plots.convergence(finished)
    drawn = points(figure)
    assert set(drawn["exploration"]) == set(range(1, 11))
    assert min(drawn["exploitation"]) == 11
    markers = {container[0].get_marker() for container in figure.axes[0].containers}
    assert len(markers) == 2


def test_convergence_draws_what_was_expected_of_the_recommended_merge(finished: Outcome) -> None:
    figure = plots.convergence(finished)
    line, star = found(figure, "expected"), found(figure, "best")
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == {
        n: value.mean for n, value in finished.expected.items()
    }
    last = max(finished.expected)
    assert (list(star.get_xdata()), list(star.get_ydata())) == (
        [last],
        [finished.expected[last].mean],
    )
    band = found(figure, "band").get_paths()[0].get_extents()
    assert band.y0 == min(value.mean - value.se for value in finished.expected.values())
    assert "recommended" in legend(figure)


def test_convergence_shows_no_recommendation_before_there_is_one(tmp_path: Path) -> None:
    figure = plots.convergence(an_unfinished_outcome(tmp_path, leader=None, expected={}))
    assert "recommended" not in legend(figure)


def test_convergence_draws_and_labels_a_b_and_even(finished: Outcome) -> None:
    figure = plots.convergence(finished)
    for name, value in (("a", 7.31), ("b", 7.18), ("even", 7.91)):
        assert set(found(figure, name).get_ydata()) == {value}
    assert {"A  7.31", "B  7.18", "even  7.91"} <= set(texts(figure))


def test_convergence_labels_of_equal_baselines_do_not_overlap(tmp_path: Path) -> None:
    same = tuple(r.but(value=Estimate(7.0, 0.1, 16)) for r in baselines())
    figure = plots.convergence(
        an_unfinished_outcome(tmp_path, results=same, leader=None, expected={})
    )
    labels = [t for t in figure.axes[0].texts if "7" in t.get_text()]
    figure.draw_without_rendering()
    boxes = sorted((t.get_window_extent() for t in labels), key=lambda box: box.y0)
    assert len(boxes) == 3
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))


def test_convergence_marks_failed_and_stopped_trials_at_the_bottom_edge(tmp_path: Path) -> None:
    results = (
        *baselines(),
        a_result("trial 1", "explore", 7.0),
        a_result("trial 2", "explore", state="failed"),
        a_result("trial 3", "explore", state="stopped"),
    )
    figure = plots.convergence(an_unfinished_outcome(tmp_path, results=results))
    axes = figure.axes[0]
    for state, number in (("failed", 2), ("stopped", 3)):
        mark = found(figure, state)
        assert list(mark.get_xdata()) == [number]
        assert mark.get_transform() == axes.get_xaxis_transform()
        assert mark.get_ydata()[0] < 0.05
        assert state in legend(figure)


@pytest.mark.parametrize("results", [(), baselines()], ids=["nothing", "baselines only"])
def test_convergence_without_trials_says_so(tmp_path: Path, results: Any) -> None:
    outcome = an_unfinished_outcome(tmp_path, results=results, leader=None, expected={})
    assert "no trial is complete yet" in texts(plots.convergence(outcome))


def test_path_shows_each_weight_in_each_trial_and_its_slope_with_error(tmp_path: Path) -> None:
    outcome = an_outcome(tmp_path, results=followed())
    slopes = {
        "IN00_alpha": Estimate(2.5, 0.5, 4),
        "OUT10_alpha-OUT11_alpha": Estimate(-1.0, 0.0, 4),
        "base_alpha": Estimate(0.05, 0.1, 4),
    }
    way, side, key = plots.path(outcome, slopes, "the even merge").axes
    assert [text.get_text() for text in key.texts] == ["A", "B"]
    (image,) = way.images
    assert np.asarray(image.get_array()) == pytest.approx(
        np.array([[0.5, 0.6, 0.7, 0.8, 0.9], [0.5, 0.4, 0.3, 0.2, 0.1], [0.5] * 5])
    )
    assert [t.get_text() for t in way.get_yticklabels()] == ["IN00", "OUT10-OUT11", "base"]
    (container,) = side.containers
    points, _, (bars,) = container
    assert list(points.get_xdata()) == [2.5, -1.0, 0.05]
    assert list(points.get_ydata()) == [0, 1, 2]
    assert next(line[:, 0].tolist() for line in bars.get_segments()) == [2.0, 3.0]


def test_path_of_weights_beyond_the_models_has_their_range(tmp_path: Path) -> None:
    results = tuple(
        r.but(recipe=replace(r.recipe, weights={"high_beta": {"IN00": w}}))
        for r, w in zip(followed()[3:], (-0.5, 0.0, 0.5, 1.0, 2.0), strict=True)
    )
    outcome = an_outcome(tmp_path, results=results)
    way, _, key = plots.path(outcome, {"IN00_high_beta": Estimate(1.0, 0.5, 4)}, "trial 1").axes
    (image,) = way.images
    assert image.get_clim() == (-0.5, 2.0)
    assert [label.get_text() for label in key.get_xticklabels()] == ["-0.5", "0.75", "2"]
    # Which is which is known at 0 and 1 alone.
    assert [text.get_text() for text in key.texts] == ["", ""]
    assert np.asarray(image.get_array())[0, 0] == -0.5


def test_path_names_the_models_only_where_a_weight_leads_from_one_to_the_other(
    tmp_path: Path,
) -> None:
    results = tuple(r.but(recipe=replace(r.recipe, method="add_difference")) for r in followed())
    slopes = {"IN00_alpha": Estimate(1.0, 0.5, 4)}
    *_, key = plots.path(an_outcome(tmp_path, results=results), slopes, "the even merge").axes
    assert [text.get_text() for text in key.texts] == ["", ""]


def test_parallel_has_axes_for_each_weight_of_a_method(tmp_path: Path) -> None:
    results = [
        a_result(
            f"trial {n}",
            value=7.0 + n,
            weights={w: dict.fromkeys(BLOCKS, n / 4) for w in ("alpha", "beta")},
        )
        for n in range(4)
    ]
    outcome = an_unfinished_outcome(tmp_path, results=tuple(results), leader=results[-1])
    first, second, _ = plots.parallel(outcome).axes
    assert (first.get_ylabel(), second.get_ylabel()) == ("weight", "beta")
    for axes in (first, second):
        assert [label.get_text() for label in axes.get_xticklabels()] == list(BLOCKS)
    assert first.get_position().y0 > second.get_position().y1


def test_unet_draws_each_block_once_with_its_weight() -> None:
    weights = {block: n / 100 for n, block in enumerate(BLOCKS)}
    figure = plots.unet(weights, blocks=BLOCKS)
    for block, weight in weights.items():
        assert found(figure, f"{block} weight").get_text() == f"{weight:.2f}"
        assert isinstance(found(figure, block), Rectangle)
        assert block in texts(figure)


def test_unet_is_a_u() -> None:
    figure = plots.unet(dict.fromkeys(BLOCKS, 0.5), blocks=BLOCKS)
    boxes = {block: found(figure, block).get_bbox() for block in BLOCKS}  # y points downwards
    for arm in ("IN", "OUT"):
        heights = [boxes[f"{arm}{i:02}"].y0 for i in range(12)]
        assert heights == sorted(heights, reverse=arm == "OUT")
    # Three blocks share a level, and the skip connections are level.
    for i in range(12):
        assert boxes[f"IN{i:02}"].y0 == boxes[f"OUT{11 - i:02}"].y0
        assert boxes[f"IN{i:02}"].x0 == boxes[f"IN{i // 3 * 3:02}"].x0
    assert len({boxes[f"IN{i:02}"].x0 for i in range(12)}) == 4
    assert boxes["M00"].y0 == max(box.y0 for box in boxes.values())
    assert boxes["base"].y0 == min(box.y0 for box in boxes.values())


def test_unet_boxes_do_not_overlap() -> None:
    figure = plots.unet(dict.fromkeys(BLOCKS, 0.5), blocks=BLOCKS)
    boxes = [found(figure, block).get_bbox() for block in BLOCKS]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(("weight", "text"), [(1.3, "1.30"), (-0.2, "-0.20"), (1.001, "1.001")])
def test_unet_shows_a_weight_outside_0_and_1_as_it_is(weight: float, text: str) -> None:
    figure = plots.unet(dict.fromkeys(BLOCKS, 0.5) | {"IN03": weight}, blocks=BLOCKS)
    assert found(figure, "IN03 weight").get_text() == text
    assert found(figure, "IN03 outside").get_hatch()
    assert "hatched: below 0 or above 1" in texts(figure)
    # The colour is that of the nearer end, never of the other one.
    end = plots.unet(dict.fromkeys(BLOCKS, 1 if weight > 0 else 0), blocks=BLOCKS)
    assert found(figure, "IN03").get_facecolor() == found(end, "IN03").get_facecolor()


@pytest.mark.parametrize("weight", [0.0, 0.02, 1.0, -0.0])
def test_unet_ends_of_the_range_are_not_hatched(weight: float) -> None:
    figure = plots.unet(dict.fromkeys(BLOCKS, weight), blocks=BLOCKS)
    assert not figure.findobj(lambda artist: "outside" in (artist.get_gid() or ""))
    assert found(figure, "base weight").get_text() == f"{abs(weight):.2f}"


def test_unet_colours_go_evenly_from_a_to_b() -> None:
    weights = {block: n / 25 for n, block in enumerate(BLOCKS)}
    figure = plots.unet(weights, blocks=BLOCKS)
    redness = [c[0] - c[2] for c in (found(figure, b).get_facecolor() for b in BLOCKS)]
    assert redness[0] > 0.1
    assert redness[-1] < -0.1
    assert len(set(redness)) == 26


@pytest.mark.parametrize("dark", [False, True])
def test_unet_text_can_be_read_on_every_colour(dark: bool) -> None:
    weights = {block: n / 25 for n, block in enumerate(BLOCKS)}
    figure = plots.unet(weights, blocks=BLOCKS, dark=dark)
    for block in BLOCKS:
        fill = found(figure, block).get_facecolor()
        assert contrast(found(figure, f"{block} weight").get_color(), fill) >= 4.5


def test_unet_names_the_models_at_the_ends_of_the_colour_bar() -> None:
    names = ("shapes.safetensors", "a_very_long_name_of_a_model_v2.0.safetensors")
    figure = plots.unet(dict.fromkeys(BLOCKS, 0.5), blocks=BLOCKS, names=names)
    left, right = (t for t in figure.axes[1].texts if t.get_text())
    assert left.get_text() == "shapes"
    assert right.get_text() == "a_very_lon…_model_v2.0"
    assert left.get_position()[0] < 0 < 1 < right.get_position()[0]


def test_names_that_look_like_formulas_or_lack_glyphs_are_drawn_as_text() -> None:
    names = ("$\\frac{$_50%", "日本\nmix")
    figure = plots.unet(dict.fromkeys(BLOCKS, 0.5), blocks=BLOCKS, title="$x", names=names)
    assert plots.png(figure).startswith(b"\x89PNG")
    assert {"$x", "$\\frac{$_50%", "□□ mix"} <= set(texts(figure))


def test_unet_draws_a_network_of_another_depth() -> None:
    blocks = ("base", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9)))
    figure = plots.unet(dict.fromkeys(blocks, 0.25), blocks=blocks)
    assert all(found(figure, f"{block} weight").get_text() == "0.25" for block in blocks)


def test_contact_sheet_shows_each_picture_in_its_row() -> None:
    rows = {
        name: [Image.new("RGB", (8, 8), (50 * k, i, 0)) for i in range(3)]
        for k, name in enumerate(("A", "B", "even", "best"))
    }
    figure = plots.contact_sheet(rows)
    assert [text.get_text() for text in figure.texts] == list(rows)
    for k, text in enumerate(figure.texts):
        row = figure.axes[3 * k : 3 * k + 3]
        assert [tuple(np.asarray(a.images[0].get_array())[0, 0]) for a in row] == [
            (50 * k, i, 0) for i in range(3)
        ]
        assert all(a.get_position().y0 < text.get_position()[1] < a.get_position().y1 for a in row)
        assert [a.get_position().x0 for a in row] == sorted(a.get_position().x0 for a in row)


def test_parallel_draws_each_trial_over_the_blocks_and_the_best_on_top(finished: Outcome) -> None:
    figure = plots.parallel(finished)
    trials = sorted(
        (r for r in finished.results if r.stage != "baseline" and r.value),
        key=lambda r: r.value.mean if r.value else 0.0,
    )
    lines = found(figure, "trials")
    drawn = [segment[:, 1] for segment in lines.get_segments()]
    assert len(drawn) == len(trials)
    for line, result in zip(drawn, trials, strict=True):
        assert list(line) == [result.recipe.weights["alpha"][block] for block in BLOCKS]
    # The better, the clearer.
    alphas = lines.get_colors()[:, 3]
    assert list(alphas) == sorted(alphas)
    assert finished.best
    best = found(figure, "best")
    assert list(best.get_ydata()) == list(finished.best.recipe.weights["alpha"].values())
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == list(BLOCKS)


def test_parallel_leaves_out_what_was_not_varied_and_shows_weights_beyond_the_models(
    tmp_path: Path,
) -> None:
    results = [
        a_result(
            f"trial {n}",
            value=7.0 + n,
            weights={"alpha": {**dict.fromkeys(BLOCKS, 0.5), "M00": w}},
        )
        for n, w in enumerate((-0.5, 0.2, 1.5))
    ]
    figure = plots.parallel(an_unfinished_outcome(tmp_path, results=(*baselines(), *results)))
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["M00"]
    low, high = figure.axes[0].get_ylim()
    assert low < -0.5
    assert high > 1.5


def test_parallel_of_a_run_without_trials_says_so(tmp_path: Path) -> None:
    figure = plots.parallel(an_unfinished_outcome(tmp_path, results=baselines(), leader=None))
    assert "no trial is complete yet" in [text.get_text() for text in figure.axes[0].texts]


def test_figures_repeat_byte_for_byte(finished: Outcome) -> None:
    first, second = (plots.png(plots.convergence(finished)) for _ in range(2))
    assert first == second
    assert b"Software" not in first
    assert b"tIME" not in first


def test_figures_leave_the_global_settings_alone(finished: Outcome) -> None:
    before = dict(mpl.rcParams)
    plots.png(plots.convergence(finished, dark=True))
    plots.png(plots.unet(dict.fromkeys(BLOCKS, 1.5), blocks=BLOCKS))
    assert dict(mpl.rcParams) == before


def test_saved_figure_takes_the_place_of_an_older_one_and_leaves_nothing_else(
    tmp_path: Path,
) -> None:
    path = tmp_path / "unet.png"
    path.write_bytes(b"old")
    figure = plots.unet(dict.fromkeys(BLOCKS, 0.5), blocks=BLOCKS)
    plots.save(figure, path)
    assert path.read_bytes() == plots.png(figure)
    assert list(tmp_path.iterdir()) == [path]


def bars(axes: Axes) -> dict[str, Line2D]:
    """The lines of the error bars by what they are of."""
    containers = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    return {str(c.lines[0].get_gid()): c.lines[0] for c in containers}


def a_front(tmp_path: Path, *names: str) -> Outcome:
    """A front of three merges, the first best at the first of these objectives."""
    merges = [
        Compromise(
            a_recipe(), {n: Estimate(8 - i + 2 * i * k, 0.2, 60) for k, n in enumerate(names)}
        )
        for i in range(3)
    ]
    known = {
        b: {n: Estimate(7.0 + j, 0.1, 16) for n in names} for j, b in enumerate(("a", "even", "b"))
    }
    return an_outcome(tmp_path, front=tuple(merges), front_baselines=known)


def test_front_of_two_objectives_is_a_plane_with_every_merge_and_baseline(tmp_path: Path) -> None:
    figure = plots.front(a_front(tmp_path, "taste", "p$t$y <b>"))
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("taste", "p$t$y <b>")
    assert {text.get_text() for text in axes.texts} == {"A", "B", "even", "1", "2", "3"}
    places = {name: np.asarray(line.get_xydata())[0].tolist() for name, line in bars(axes).items()}
    assert places["2"] == [7.0, 9.0]
    assert places["even"] == [8.0, 8.0]


def test_front_of_more_objectives_shows_differences_to_the_even_merge(tmp_path: Path) -> None:
    figure = plots.front(a_front(tmp_path, "taste", "sharpness", "light"), dark=True)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["taste", "sharpness", "light"]
    assert {text.get_text() for text in axes.texts} == {"A", "B", "even", "1", "2", "3"}
    heights = {name: np.asarray(line.get_ydata()).tolist() for name, line in bars(axes).items()}
    assert heights["2"] == [-1.0, 1.0, 3.0]
    assert heights["a"] == [-1.0, -1.0, -1.0]
    colours = [line.get_color() for line in bars(axes).values()]
    assert len(set(colours)) == 5


def sliced(n: int = 20) -> dict[str, Slice]:
    places = tuple(i / 10 for i in range(11))
    return {
        f"{block}_alpha": Slice(
            0.5, places, tuple(Estimate(-(k + 1) * (x - 0.5) ** 2, 0.1, 0) for x in places)
        )
        for k, block in enumerate(BLOCKS[:n])
    }


@pytest.mark.parametrize("dark", [False, True])
def test_slices_show_the_weights_that_matter_most_in_their_order(
    tmp_path: Path, dark: bool
) -> None:
    outcome = an_outcome(tmp_path, slices=sliced())
    figure = plots.slices(outcome, dark=dark)
    (axes,) = figure.axes
    titles = [text.get_text() for text in axes.texts if text.get_gid() == "title"]
    assert titles == list(BLOCKS[8:20])
    scales = set()
    for name, one in list(sliced().items())[8:]:
        line = found(figure, name)
        assert list(np.asarray(line.get_xdata())) == list(one.places)
        assert list(np.asarray(line.get_ydata())) == [gain.mean for gain in one.gains]
        assert list(found(figure, f"{name} at").get_xdata()) == [one.at]
        # As far as they are from each other on the figure.
        (_, zero), (_, up) = line.get_transform().transform([(0, 0), (0, 1)])
        scales.add(round(up - zero, 6))
    assert len(scales) == 1
    assert len(plots.png(figure)) > 1000


def test_slices_of_a_single_weight_fill_a_figure(tmp_path: Path) -> None:
    figure = plots.slices(an_outcome(tmp_path, slices=sliced(1)))
    (axes,) = figure.axes
    (name,) = sliced(1)
    titles = [text.get_text() for text in axes.texts if text.get_gid() == "title"]
    assert titles == [name.removesuffix("_alpha")]
    line = found(figure, name)
    ends = line.get_transform().transform([(x, 0) for x in (0, 1)])[:, 0]
    assert (ends[1] - ends[0]) / figure.bbox.width > 0.8
