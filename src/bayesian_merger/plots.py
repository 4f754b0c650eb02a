"""Results -> figures, pure: no pyplot state, no global settings.

The only module that knows matplotlib.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, font_manager, rc_context, rcdefaults
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Transform

from bayesian_merger.checkpoint import whole_file
from bayesian_merger.data import Estimate, Outcome, Result, Slice

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class _Theme:
    """The colours of a figure. A is orange and B purple, as at the ends of the map of weights."""

    paper: str
    ink: str
    soft: str
    line: str
    trial: str
    best: str
    a: str
    b: str
    even: str
    shades: tuple[float, float]

    def of(self, name: str) -> str:
        """The colour of "a", "b", "even" or "best", and the text's for any other name."""
        return str(getattr(self, name)) if name in ("a", "b", "even", "best") else self.ink


_LIGHT = _Theme(
    paper="#ffffff",
    ink="#1c1b1a",
    soft="#6b6863",
    line="#dedbd5",
    trial="#3d6b8f",
    best="#00786b",
    a="#b35806",
    b="#6a3d9a",
    even="#6b6863",
    shades=(0.0, 0.85),
)
_DARK = _Theme(
    paper="#1b1b1a",
    ink="#eceae6",
    soft="#a5a19a",
    line="#3a3936",
    trial="#8fb8d8",
    best="#4fc7b5",
    a="#f0a35c",
    b="#bfaee3",
    even="#a5a19a",
    shades=(0.3, 1.0),
)

# ColorBrewer's PuOr can be read with every common colour blindness: orange 0, white 0.5, purple 1.
_MAP = colormaps["PuOr"]
_FONT = "DejaVu Sans"  # comes with matplotlib, hence one figure on every machine
_LABELS = {"a": "A", "b": "B", "even": "even"}
_LEGEND = ("exploration", "exploitation", "recommended", "failed", "stopped")

# Sizes of the drawing of the network, in inches.
_BOX, _PITCH, _STAGGER, _GAP, _MIDDLE = (1.3, 0.34), 0.4, 0.26, 0.12, 1.4
_BOX_OF_TWO = 1.9
_MOST_ROWS = 20
_MOST_LABELS = 45
# By less than this a weight is outside [0, 1] by rounding alone.
_ROUNDING = 1e-9


@contextmanager
def _as_it_comes() -> Iterator[None]:
    """Matplotlib's own settings; a matplotlibrc, which may be in a stranger's folder, says others."""
    with rc_context():
        rcdefaults()
        yield


@_as_it_comes()
def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


@_as_it_comes()
def svg(figure: Figure) -> bytes:
    """The figure as an SVG, its letters as shapes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "bayesian-merger"}):
        # Of pictures in it; everything else is lines.
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as an SVG if the path ends so, or else as a PNG; it appears whole."""
    with whole_file(path) as file:
        file.write(svg(figure) if path.suffix.lower() == ".svg" else png(figure))


@_as_it_comes()
def convergence(outcome: Outcome, *, dark: bool = False) -> Figure:
    """The value of each trial with its standard error, and the baselines as lines.

    The line with a band is the value that is expected of the merge that the search recommended after so
    many trials, with its standard error, a star at its end. Trials without a value are marked at the
    bottom edge.
    """
    theme = _DARK if dark else _LIGHT
    figure = Figure(figsize=(8.4, 4.6), facecolor=theme.paper)
    axes = figure.add_axes((0.085, 0.125, 0.775, 0.745), facecolor=theme.paper)
    trials = [r for r in outcome.results if r.stage != "baseline"]
    baselines = {r.name: r.value for r in outcome.results if r.stage == "baseline" and r.value}
    measured = {n: (r, r.value) for n, r in enumerate(trials, start=1) if r.value}
    lost = {n: r.state for n, r in enumerate(trials, start=1) if r.state in ("failed", "stopped")}

    axes.set_xlim(0.25, max(len(trials), 1) + 0.75)
    expected = outcome.expected
    values = [*baselines.values(), *(value for _, value in measured.values()), *expected.values()]
    axes.set_ylim(*_limits(values, room_below=bool(lost)))
    _draw_frame(axes, theme)
    if not values:
        axes.set_yticks([])
    _draw_baselines(axes, baselines, theme)
    _draw_trials(axes, measured, theme)
    _draw_expected(axes, expected, theme)
    for state, marker in (("failed", "x"), ("stopped", "v")):
        some = [n for n, found in lost.items() if found == state]
        if some:
            # At the bottom edge: these trials have no value.
            edge = axes.get_xaxis_transform()
            style: dict[str, Any] = {"color": theme.soft, "ms": 6, "mew": 1.6, "label": state}
            axes.plot(some, [0.03] * len(some), marker, transform=edge, gid=state, **style)
    if not measured:
        style = _text(theme.soft, 11, ha="center", transform=axes.transAxes)
        axes.text(0.5, 0.5, "no trial is complete yet", **style)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: _LEGEND.index(labels[i]))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.01),
        ncols=6,
        frameon=False,
        borderpad=0,
        columnspacing=1.4,
        handlelength=1.4,
        handletextpad=0.5,
        labelcolor=theme.ink,
        prop={"family": _FONT, "size": 9},
    )
    return figure


@_as_it_comes()
def parallel(outcome: Outcome, *, dark: bool = False) -> Figure:
    """Each trial that has a value as a line over the weights of its blocks, coloured by the value.

    Of a method with several weights each has axes of its own. The worse, the fainter; the thick line is
    the best merge, or the one that leads. The colours end at the 5th and the 95th percentile of the
    values, so that a lucky trial does not take all of them.
    """
    theme = _DARK if dark else _LIGHT
    shown = outcome.best or outcome.leader
    trials = sorted(
        ((result, value.mean) for result, value in outcome.tried), key=lambda trial: trial[1]
    )
    places = _searched([r for r, _ in trials] or ([shown] if shown else []), outcome.blocks)
    weights = list(dict.fromkeys(weight for weight, _ in places)) or ["alpha"]
    # In inches: axes of one height below each other, with room for the blocks' names.
    high, pitch, above, below = 3.3, 4.2, 0.4, 0.7
    up = above + pitch * (len(weights) - 1) + high + below
    figure = Figure(figsize=(8.4, up), facecolor=theme.paper)
    low, most = theme.shades
    shades = ListedColormap(
        [colormaps["viridis"](low + (most - low) * k / 255) for k in range(256)]
    )
    values = [value for _, value in trials]
    ends = np.percentile(values, [5, 95]) if values else np.array([0.0, 1.0])
    scale = ScalarMappable(Normalize(*ends), shades)
    for number, weight in enumerate(weights):
        bottom = up - above - high - pitch * number
        axes = figure.add_axes((0.07, bottom / up, 0.82, high / up), facecolor=theme.paper)
        own = [place for place in places if place[0] == weight]
        _draw_parallel(
            axes, own, [r for r, _ in trials], shown, scale.to_rgba(np.array(values)), theme
        )
        axes.set_ylabel("weight" if weight == "alpha" else weight, **_text(theme.ink, 10))
    first = figure.axes[0]
    if not trials:
        style = _text(theme.soft, 11, ha="center", transform=first.transAxes)
        first.text(0.5, 0.5, "no trial is complete yet", **style)
        return figure
    if shown:
        label = "best" if outcome.best else "recommended so far"
        text = _text(theme.ink, 9.5, ha="right", va="bottom", transform=first.transAxes)
        first.text(1.0, 1.02, f"thick line: {label}", **text)
    bar = figure.add_axes((0.915, 1 - (above + high) / up, 0.016, (high - 0.35) / up), gid="key")
    drawn = figure.colorbar(scale, cax=bar)
    drawn.outline.set(edgecolor=theme.soft, linewidth=0.7)
    bar.tick_params(colors=theme.soft, labelsize=8.5, length=3, labelfontfamily=_FONT)
    bar.yaxis.set_major_locator(MaxNLocator(4))
    bar.set_title("value", loc="left", pad=6, **_text(theme.ink, 9.5))
    return figure


def _draw_parallel(
    axes: Axes,
    places: Sequence[tuple[str, str]],
    trials: Sequence[Result],
    shown: Result | None,
    colours: Any,
    theme: _Theme,
) -> None:
    """The trials, the worst first, as lines over places in the network; the `shown` one thick."""
    lines = [_line(result, places) for result in trials]
    across = np.arange(len(places))
    # Of hundreds of lines the best tenth is to be seen.
    power = min(4.0, 1 + len(lines) / 50)
    if lines:
        colours[:, 3] = 0.06 + 0.74 * np.linspace(0, 1, len(lines)) ** power
        colours[-1, 3] = 0.8
        columns = [np.column_stack([across, line]) for line in lines]
        axes.add_collection(LineCollection(columns, colors=colours, lw=1, gid="trials"))
    best = _line(shown, places) if shown else []
    # In no colour of a value.
    style: dict[str, Any] = {"color": theme.ink, "lw": 2.4, "ms": 4.5, "gid": "best"}
    if best:
        axes.plot(across, best, "o-", mec=theme.paper, mew=0.7, zorder=4, **style)
    known = [weight for line in (*lines, best) for weight in line if not math.isnan(weight)]
    least, most = min([0.0, *known]), max([1.0, *known])
    margin = 0.03 * (most - least)
    axes.set_ylim(least - margin, most + margin)
    axes.set_xlim(-0.5, max(len(places), 1) - 0.5)
    # As many names as can be read beside each other.
    every = max(1, math.ceil(len(places) / _MOST_LABELS))
    names = [_drawable(_shortened(block, 16)) for _, block in places]
    axes.set_xticks(across[::every], names[::every], rotation=90)
    axes.tick_params(colors=theme.soft, labelsize=8.5, length=0, labelfontfamily=_FONT)
    axes.grid(axis="x", color=theme.line, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _searched(results: Sequence[Result], blocks: Sequence[str]) -> list[tuple[str, str]]:
    """Weight and block of all that is not the same in all results, in the network's order."""
    weights = dict.fromkeys(name for result in results for name in result.recipe.weights)
    places = [(weight, block) for weight in weights for block in blocks]
    varied = [
        place
        for place in places
        if len({result.recipe.weights.get(place[0], {}).get(place[1]) for result in results}) > 1
    ]
    return varied or places


def _line(result: Result, places: Sequence[tuple[str, str]]) -> list[float]:
    """The weights of a result at the places; not a number where its method has none."""
    weights = result.recipe.weights
    return [weights.get(weight, {}).get(block, math.nan) for weight, block in places]


@_as_it_comes()
def front(outcome: Outcome, *, dark: bool = False) -> Figure:
    """What is expected of each compromise between several objectives, with its standard error.

    Two objectives are the axes. Of more, each is a place on the axis, and a merge a line of differences
    to the even merge.
    """
    theme = _DARK if dark else _LIGHT
    figure = Figure(figsize=(8.4, 4.6), facecolor=theme.paper)
    axes = figure.add_axes((0.085, 0.125, 0.775, 0.82), facecolor=theme.paper)
    names = list(outcome.front[0].values)
    merges = {str(n): one.values for n, one in enumerate(outcome.front, start=1)}
    if len(names) == 2:
        _draw_plane(axes, merges, outcome.front_baselines, names, theme)
    else:
        _draw_lines(axes, merges, outcome.front_baselines, names, theme)
    axes.tick_params(colors=theme.soft, labelsize=9, length=3, labelfontfamily=_FONT)
    axes.grid(color=theme.line, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return figure


def _draw_plane(
    axes: Axes,
    merges: Mapping[str, Mapping[str, Estimate]],
    baselines: Mapping[str, Mapping[str, Estimate]],
    names: Sequence[str],
    theme: _Theme,
) -> None:
    one, other = names
    for name, values in {**baselines, **merges}.items():
        x, y = values[one], values[other]
        colour = theme.of(name) if name in baselines else theme.best
        marker: dict[str, Any] = {"fmt": "s" if name in baselines else "o", "ms": 6, "gid": name}
        axes.errorbar(x.mean, y.mean, y.se, x.se, color=colour, elinewidth=0.8, **marker)
        style = _text(colour, 10, weight="bold", textcoords="offset points")
        # The even merge is often near the others, so names of baselines are on the other side.
        place: dict[str, Any] = {"xytext": (6, 5)}
        if name in baselines:
            place = {"xytext": (-6, -5), "ha": "right", "va": "top"}
        axes.annotate(_LABELS.get(name, name), (x.mean, y.mean), **style, **place)
    axes.set_xlabel(_drawable(one), **_text(theme.ink, 10))
    axes.set_ylabel(_drawable(other), **_text(theme.ink, 10))


def _draw_lines(
    axes: Axes,
    merges: Mapping[str, Mapping[str, Estimate]],
    baselines: Mapping[str, Mapping[str, Estimate]],
    names: Sequence[str],
    theme: _Theme,
) -> None:
    zero = {name: value.mean for name, value in baselines["even"].items()}
    drawn = {**{n: baselines[n] for n in baselines if n != "even"}, **merges}
    axes.axhline(0.0, color=theme.even, lw=1.3, ls=(0, (5, 3)))
    places = range(len(names))
    # From dark to light, without the end that the paper swallows.
    low, high = theme.shades
    shades = (
        to_hex(colormaps["viridis"](low + (high - low) * i / len(merges)))
        for i in range(len(merges))
    )
    colours = {**{n: theme.of(n) for n in baselines}, **dict(zip(merges, shades, strict=True))}
    for name, values in drawn.items():
        colour = colours[name]
        heights = [values[n].mean - zero[n] for n in names]
        errors = [values[n].se for n in names]
        style: dict[str, Any] = {"marker": "o", "ms": 4, "elinewidth": 0.8, "lw": 1.3, "gid": name}
        axes.errorbar(places, heights, errors, color=colour, **style)
    low, high = axes.get_ylim()
    ends = {"even": 0.0, **{n: v[names[-1]].mean - zero[names[-1]] for n, v in drawn.items()}}
    places_of = {name: (end - low) / (high - low) for name, end in ends.items()}
    for name, height in _apart(places_of, 0.05).items():
        text = _text(colours[name], 10, va="center", weight="bold", transform=axes.transAxes)
        axes.text(1.012, height, _LABELS.get(name, name), **text)
    axes.set_xticks(places, [_drawable(_shortened(name, 22)) for name in names])
    axes.set_ylabel("difference to the even merge ± standard error", **_text(theme.ink, 10))


@_as_it_comes()
def path(
    outcome: Outcome, slopes: Mapping[str, Estimate], where: str, *, dark: bool = False
) -> Figure:
    """The way of each parameter of `slopes` over the trials, and its slope at the merge called `where`.

    A row for each: its weight in every followed trial as a colour, and beside it how much the value
    rises with it there, with standard error.
    """
    theme = _DARK if dark else _LIGHT
    trials = outcome.followed
    names = list(slopes)
    up = 0.21 * len(names) + 1.1
    figure = Figure(figsize=(8.4, up), facecolor=theme.paper)
    high, bottom = 0.21 * len(names) / up, 0.9 / up
    way = figure.add_axes((0.15, bottom, 0.5, high), facecolor=theme.paper)
    side = figure.add_axes((0.68, bottom, 0.3, high), facecolor=theme.paper, sharey=way)
    places = [_place(name) for name in names]
    shown = [list(row) for row in zip(*(_line(r, places) for r in trials), strict=True)]
    tried = [weight for row in shown for weight in row if not math.isnan(weight)]
    low, most = min([0.0, *tried]), max([1.0, *tried])
    drawn = way.imshow(
        shown,
        cmap=_MAP,
        vmin=low,
        vmax=most,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, len(trials) + 0.5, len(names) - 0.5, -0.5),
        gid="weights",
    )
    way.set_yticks(range(len(names)), [_drawable(_shortened(_label(name), 16)) for name in names])
    way.set_xlabel("weight in each trial")
    side.errorbar(
        [one.mean for one in slopes.values()],
        range(len(names)),
        xerr=[one.se for one in slopes.values()],
        fmt="o",
        ms=4,
        lw=1.2,
        color=theme.trial,
        gid="slopes",
    )
    side.axvline(0.0, color=theme.soft, lw=0.8, zorder=0)
    side.set_xlabel(f"slope at {where} ± standard error")
    for axes in (way, side):
        axes.xaxis.label.set(**_text(theme.ink, 9))
        axes.tick_params(colors=theme.soft, labelsize=8.5, length=3, labelfontfamily=_FONT)
        axes.spines[:].set_visible(False)
        axes.grid(axis="x", color=theme.line, lw=0.6)
        axes.set_axisbelow(True)
    side.tick_params(axis="y", labelleft=False, length=0)
    bar = figure.add_axes((0.3, 0.3 / up, 0.2, 0.12 / up), gid="key")
    is_known = (low, most) == (0.0, 1.0) and any(outcome.ends(trials[0].recipe))
    ends = ("A", "B") if is_known else ("", "")
    _draw_key(figure, drawn, bar, ends, theme)
    way.grid(visible=False)
    way.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


@_as_it_comes()
def slices(outcome: Outcome, *, n: int = 12, dark: bool = False) -> Figure:
    """What the value does as one weight leaves that of the best merge, with its standard error.

    Of the `n` weights by which most would be lost, in the order of the network, all on one scale. A
    point marks the merge.
    """
    theme = _DARK if dark else _LIGHT
    order = list(outcome.slices)
    telling = sorted(order, key=lambda name: -outcome.slices[name].loss.mean)[:n]
    shown = {name: outcome.slices[name] for name in order if name in telling}
    ends = [
        gain.mean + sign * gain.se
        for one in shown.values()
        for gain in one.gains
        for sign in (-1, 1)
    ]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    n_columns = min(4, len(shown))
    n_rows = math.ceil(len(shown) / n_columns)
    # In inches. One pair of axes for all of them, as each takes longer to make than all its lines.
    across, left, pitch, room = 8.4, 0.9, 1.45, 0.3
    wide, tall = (across - left - 0.1) / n_columns - 0.2, 0.85
    up = pitch * n_rows + 0.25
    figure = Figure(figsize=(across, up), facecolor=theme.paper)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(0, up))
    axes.set_axis_off()
    heights = [x for x in MaxNLocator(3).tick_values(low, high) if low <= x <= high]
    decimals = max(0, 1 - math.floor(math.log10(high - low)))
    for number, (name, one) in enumerate(shown.items()):
        row, column = divmod(number, n_columns)
        corner = (left + column * (wide + 0.2), up - row * pitch - room - tall)
        first, last = one.places[0], one.places[-1]
        placed = (
            Affine2D()
            .translate(-first, -low)
            .scale(wide / (last - first), tall / (high - low))
            .translate(*corner)
            + axes.transData
        )
        _draw_slice(axes, name, one, placed, theme)
        axes.plot([first, last], [low, low], color=theme.line, lw=1, transform=placed)
        small: dict[str, Any] = {"textcoords": "offset points", "xycoords": placed}
        for x in (first, (first + last) / 2, last):
            style = _text(theme.soft, 8, ha="center", va="top", xytext=(0, -3), **small)
            axes.annotate(f"{x:g}", (x, low), **style)
        for y in heights if column == 0 else ():
            style = _text(theme.soft, 8, ha="right", va="center", xytext=(-5, 0), **small)
            text = f"{y:.{decimals}f}".replace("-", "−")
            axes.annotate(text, (first, y), **style)
        title = _text(theme.ink, 9.5, va="bottom")
        axes.text(
            corner[0], corner[1] + tall + 0.04, _drawable(_label(name)), gid="title", **title
        )
    axes.text(left + (across - left) / 2, 0.08, "weight", **_text(theme.ink, 10, ha="center"))
    side = _text(theme.ink, 10, ha="left", va="center", rotation=90)
    axes.text(0.08, (up + 0.3) / 2, "change of the value", **side)
    return figure


def _draw_slice(axes: Axes, name: str, one: Slice, placed: Transform, theme: _Theme) -> None:
    """The line of one weight with its band and the point of the merge, `placed` on the figure."""
    means = [gain.mean for gain in one.gains]
    below = [gain.mean - gain.se for gain in one.gains]
    above = [gain.mean + gain.se for gain in one.gains]
    style: dict[str, Any] = {"transform": placed}
    axes.plot([one.places[0], one.places[-1]], [0, 0], color=theme.line, lw=1, zorder=0, **style)
    axes.fill_between(
        one.places, below, above, color=theme.best, alpha=0.18, lw=0, gid=f"{name} band", **style
    )
    axes.plot(one.places, means, color=theme.best, lw=1.6, gid=name, **style)
    point: dict[str, Any] = {"ms": 5, "color": theme.best, "mec": theme.paper}
    axes.plot([one.at], [0], "o", gid=f"{name} at", **point, **style)


def _place(parameter: str) -> tuple[str, str]:
    """Weight and block of a parameter's first member: "IN00-IN03_alpha" is that of IN00."""
    return parameter.split("-")[-1].partition("_")[2], re.split("[-_]", parameter)[0]


def _label(parameter: str) -> str:
    """A parameter without the weight that most methods have alone."""
    return parameter.replace("_alpha", "")


@_as_it_comes()
def unet(
    weights: Mapping[str, float],
    *,
    blocks: Sequence[str],
    second: Mapping[str, float] | None = None,
    title: str = "",
    names: tuple[str, str] = ("A", "B"),
    dark: bool = False,
) -> Figure:
    """The network as a U, each block coloured by its weight and with the weight written in it.

    Of a method with two weights the `second` stands at the right of the first.

    IN blocks go down on the left, OUT blocks up on the right, each beside the IN block that feeds
    it; `base` lies on top. A transformer's blocks stand in columns. A weight below 0 or above 1
    keeps its number and is hatched.
    """
    theme = _DARK if dark else _LIGHT
    rows = {b: [weights[b]] if second is None else [weights[b], second[b]] for b in blocks}
    wide = _BOX[0] if second is None else _BOX_OF_TWO
    places, width, height = _layout(blocks, wide)
    above, below, side = 0.55 if title else 0.2, 1.0, 0.25
    across, up = width + 2 * side, height + above + below
    figure = Figure(figsize=(across, up), facecolor=theme.paper)
    axes = figure.add_axes(
        (side / across, below / up, width / across, height / up),
        xlim=(0, width),
        ylim=(height, 0),
    )
    axes.set_axis_off()
    if title:
        style = _text(theme.ink, 12, ha="center", va="center")
        shown = _shortened(title, int(9.5 * across))
        figure.text(0.5, 1 - 0.28 / up, _drawable(shown), **style)
    # The skip connections of the U-Net: IN00 feeds OUT11, IN01 feeds OUT10, ...
    ins, _, outs = _arms(blocks) if _has_arms(blocks) else ([], [], [])
    for one, other in zip(ins, reversed(outs), strict=False):
        left, right, y = places[one][0] + wide, places[other][0], places[one][1] + _BOX[1] / 2
        axes.plot([left, right], [y, y], color=theme.line, lw=0.9, zorder=0)
    for block in blocks:
        _draw_block(axes, block, rows[block], places[block], theme)

    bar = figure.add_axes((0.5 - 1 / across, 0.5 / up, 2 / across, 0.14 / up))
    scale = ScalarMappable(Normalize(0, 1), _MAP)
    _draw_key(figure, scale, bar, names, theme)
    if any(_is_outside(weight) for row in rows.values() for weight in row):
        note = "hatched: below 0 or above 1"
        style = _text(theme.soft, 8.5, ha="center", va="center")
        figure.text(0.5, 0.13 / up, note, **style)
    return figure


@_as_it_comes()
def contact_sheet(pictures: Mapping[str, Sequence[Image]], *, dark: bool = False) -> Figure:
    """A labelled row of pictures for each name; one column holds the same prompt and seed."""
    theme = _DARK if dark else _LIGHT
    n_columns = max((len(row) for row in pictures.values()), default=0)
    is_large = any(image.width >= 200 for row in pictures.values() for image in row)
    tile, left, edge = 1.92 if is_large else 0.96, 0.8, 0.1
    pitch = tile + 0.08  # whole pixels on each side
    across, up = left + n_columns * pitch + edge, len(pictures) * pitch + 2 * edge
    figure = Figure(figsize=(across, up), facecolor=theme.paper)
    for row, (name, images) in enumerate(pictures.items()):
        y = up - edge - (row + 1) * pitch + (pitch - tile) / 2
        style = _text(theme.of(name.lower()), 12, ha="right", va="center", weight="bold")
        figure.text((left - 0.14) / across, (y + tile / 2) / up, _drawable(name), **style)
        for column, image in enumerate(images):
            x = left + column * pitch
            axes = figure.add_axes((x / across, y / up, tile / across, tile / up))
            axes.set_axis_off()
            axes.imshow(image, interpolation="nearest" if image.width < 200 else "antialiased")
    return figure


def _draw_key(
    figure: Figure, scale: ScalarMappable, bar: Axes, names: Sequence[str], theme: _Theme
) -> None:
    """A colour bar of weights with the names of the models at its ends."""
    low, high = scale.get_clim()
    assert low is not None
    assert high is not None
    ends = (low, (low + high) / 2, high)
    drawn = figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=ends, format="%.3g")
    drawn.outline.set(edgecolor=theme.soft, linewidth=0.7)
    bar.tick_params(colors=theme.soft, labelsize=8.5, length=3, labelfontfamily=_FONT)
    for x, name, ha in ((-0.03, names[0], "right"), (1.03, names[1], "left")):
        label = _drawable(_shortened(name.removesuffix(".safetensors").removesuffix(".ckpt"), 22))
        style = _text(theme.ink, 9.5, ha=ha, va="center", transform=bar.transAxes)
        bar.text(x, 0.45, label, **style)


def _draw_frame(axes: Axes, theme: _Theme) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("trial", **_text(theme.ink, 10))
    axes.set_ylabel("value ± standard error", **_text(theme.ink, 10))
    axes.tick_params(colors=theme.soft, labelsize=9, length=3, labelfontfamily=_FONT)
    axes.grid(axis="y", color=theme.line, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=theme.line)


def _draw_baselines(axes: Axes, baselines: Mapping[str, Estimate], theme: _Theme) -> None:
    """A line across for each baseline, its name and value at the right edge."""
    low, high = axes.get_ylim()
    heights = {name: (value.mean - low) / (high - low) for name, value in baselines.items()}
    for name, height in _apart(heights, 0.06).items():
        mean, colour = baselines[name].mean, theme.of(name)
        style = (0, (5, 3)) if name == "even" else "-"
        axes.axhline(mean, color=colour, lw=1.3, ls=style, zorder=1, gid=name)
        label = f"{_LABELS.get(name, name)}  {mean:.4g}"
        text = _text(colour, 10, va="center", weight="bold", transform=axes.transAxes)
        axes.text(1.012, height, label, **text)


def _draw_trials(
    axes: Axes, measured: Mapping[int, tuple[Result, Estimate]], theme: _Theme
) -> None:
    """The values with their error bars, by stage; the more there are, the fainter."""
    alpha = min(1.0, 40 / max(len(measured), 1)) ** 0.5
    for stage, label in (("explore", "exploration"), ("exploit", "exploitation")):
        some = {n: value for n, (result, value) in measured.items() if result.stage == stage}
        if some:
            axes.errorbar(
                list(some),
                [value.mean for value in some.values()],
                yerr=[value.se for value in some.values()],
                fmt="o" if stage == "explore" else "D",
                ms=5.5 if stage == "explore" else 4.5,
                mfc=theme.paper if stage == "explore" else theme.trial,
                color=theme.trial,
                elinewidth=0.8,
                alpha=alpha,
                label=label,
                zorder=3,
            )


def _draw_expected(axes: Axes, expected: Mapping[int, Estimate], theme: _Theme) -> None:
    """The line of what was expected of the recommended merge, its band and its star."""
    if not expected:
        return
    means = [value.mean for value in expected.values()]
    low = [value.mean - value.se for value in expected.values()]
    high = [value.mean + value.se for value in expected.values()]
    band: dict[str, Any] = {"color": theme.best, "alpha": 0.18, "lw": 0, "zorder": 4}
    axes.fill_between(list(expected), low, high, gid="band", **band)
    axes.plot(list(expected), means, color=theme.best, lw=1.6, gid="expected", zorder=5)
    last = max(expected)
    axes.plot([last, last], [low[-1], high[-1]], color=theme.best, lw=1.6, gid="error", zorder=5)
    star: dict[str, Any] = {"ms": 13, "mec": theme.paper, "color": theme.best, "zorder": 6}
    axes.plot(last, means[-1], "*", label="recommended", gid="best", **star)


def _draw_block(
    axes: Axes,
    block: str,
    weights: Sequence[float],
    place: tuple[float, float, float],
    theme: _Theme,
) -> None:
    """A box for each weight, in its colour and with it in readable contrast; the first has the name."""
    x, y, width = place
    others = [_BOX_OF_TWO - _BOX[0]] * (len(weights) - 1)
    for number, (weight, own) in enumerate(
        zip(weights, [width - sum(others), *others], strict=True), start=1
    ):
        label = block if number == 1 else ""
        _draw_weight(axes, label, weight, (x, y, own), theme, block + "'" * (number - 1))
        x += own


def _draw_weight(
    axes: Axes,
    label: str,
    weight: float,
    place: tuple[float, float, float],
    theme: _Theme,
    gid: str,
) -> None:
    x, y, width = place
    outside = _is_outside(weight)
    # The map takes integers for places in its table, hence float.
    fill = to_hex(_MAP(float(min(max(weight, 0), 1))))
    ink = "#000000" if _luminance(fill) > 0.179 else "#ffffff"
    size = ((x, y), width, _BOX[1])
    edge: dict[str, Any] = {"edgecolor": theme.soft, "lw": 0.7, "clip_on": False}
    axes.add_patch(Rectangle(*size, facecolor=fill, gid=gid, **edge))
    if outside:
        hatch: dict[str, Any] = {"hatch": "////", "alpha": 0.45, "gid": f"{gid} outside"}
        axes.add_patch(Rectangle(*size, fill=False, edgecolor=ink, lw=0, **hatch))
    # The hatching must not cross the text.
    patch = {"facecolor": fill, "edgecolor": "none", "pad": 1.5} if outside else None
    middle, inset = y + _BOX[1] / 2, 0.1
    style: dict[str, Any] = {"va": "center_baseline", "bbox": patch}
    axes.text(x + inset, middle, _drawable(label), **_text(ink, 9, **style))
    style |= {"ha": "right", "weight": "bold", "gid": f"{gid} weight"}
    axes.text(x + width - inset, middle, _shown(weight), **_text(ink, 10.5, **style))


def _has_arms(blocks: Sequence[str]) -> bool:
    """Whether it is a U-Net; a transformer has one block IN, and one OUT."""
    return "IN" not in blocks


def _arms(blocks: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The blocks of the U's left arm, its bottom and its right arm, in the network's order."""
    ins = [block for block in blocks if block.startswith("IN")]
    outs = [block for block in blocks if block.startswith("OUT")]
    rest = [block for block in blocks if block not in ("base", *ins, *outs)]
    return ins, rest, outs


def _layout(
    blocks: Sequence[str], wide: float
) -> tuple[dict[str, tuple[float, float, float]], float, float]:
    """Block -> (left, top, width) with y downwards, and the width and height of the drawing.

    Boxes are so `wide`.
    """
    if not _has_arms(blocks):
        return _columns(blocks, wide)
    ins, bottom, outs = _arms(blocks)
    n_rows = max(len(ins), len(outs))
    # Three blocks work at one resolution; each resolution is set in further from the side.
    lowest = max(0, n_rows - 1) // 3
    width = 2 * (wide + lowest * _STAGGER) + _MIDDLE
    first = _BOX[1] + 2 * _GAP if "base" in blocks else 0.0
    tops = [first + row * _PITCH + row // 3 * _GAP for row in range(n_rows + 1)]
    places = {"base": (0.0, 0.0, width)} if "base" in blocks else {}
    for row, block in enumerate(ins):
        places[block] = (row // 3 * _STAGGER, tops[row], wide)
    for row, block in enumerate(reversed(outs)):
        places[block] = (width - wide - row // 3 * _STAGGER, tops[row], wide)
    for place, block in enumerate(bottom):
        places[block] = ((width - wide) / 2, tops[-1] + place * _PITCH, wide)
    return places, width, max(top for _, top, _ in places.values()) + _BOX[1]


def _columns(
    blocks: Sequence[str], wide: float
) -> tuple[dict[str, tuple[float, float, float]], float, float]:
    """The places of a network without arms: down and then to the right, text encoders on top."""
    n_encoders = blocks.index("IN")
    encoders, network = blocks[:n_encoders], blocks[n_encoders:]
    n_columns = max(2, math.ceil(len(network) / _MOST_ROWS))
    n_rows = math.ceil(len(network) / n_columns)
    width = n_columns * (wide + _GAP) - _GAP
    first = _BOX[1] + 2 * _GAP if encoders else 0.0
    places = {}
    for place, block in enumerate(encoders):
        share = (width + _GAP) / len(encoders)
        places[block] = (place * share, 0.0, share - _GAP)
    for place, block in enumerate(network):
        column, row = divmod(place, n_rows)
        places[block] = (column * (wide + _GAP), first + row * _PITCH, wide)
    return places, width, max(top for _, top, _ in places.values()) + _BOX[1]


def _limits(values: Sequence[Estimate], *, room_below: bool) -> tuple[float, float]:
    """Limits that hold every error bar, with room for marks at the bottom edge if wanted."""
    low = min((value.mean - value.se for value in values), default=0.0)
    high = max((value.mean + value.se for value in values), default=1.0)
    reach = high - low or max(1.0, abs(high))
    return low - (0.12 if room_below else 0.05) * reach, high + 0.05 * reach


def _apart(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """The places nearest to the `wanted` ones, in their order, that are at least `gap` apart."""
    groups: list[tuple[list[str], float]] = []
    for name in sorted(wanted, key=lambda name: wanted[name]):
        names, centre = [name], wanted[name]
        while groups:
            others, beside = groups[-1]
            if centre - beside >= gap * (len(others) + len(names)) / 2:
                break
            groups.pop()
            names = others + names
            centre = sum(wanted[n] for n in names) / len(names)
        groups.append((names, centre))
    return {
        name: centre + (place - (len(names) - 1) / 2) * gap
        for names, centre in groups
        for place, name in enumerate(names)
    }


def _luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" by WCAG 2.2; black and white contrast alike at 0.179."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _is_outside(weight: float) -> bool:
    return not -_ROUNDING <= weight <= 1.0 + _ROUNDING


def _shown(weight: float) -> str:
    """Two decimals; more where two would hide that the weight is outside [0, 1]."""
    text = f"{weight:.2f}".replace("-0.00", "0.00")
    if _is_outside(weight) and not _is_outside(float(text)):
        return f"{weight:.4g}"
    return text


def _shortened(text: str, length: int) -> str:
    """`text` without its middle where it is longer than `length`: names differ at both ends."""
    head, tail = (length - 1) // 2, length // 2
    return text if len(text) <= length else f"{text[:head]}…{text[-tail:]}"


def _drawable(text: str) -> str:
    """`text` on one line, with a box for each character that the font lacks."""
    known = font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
    return "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in " ".join(text.split()))


def _text(colour: str, size: float, **more: Any) -> dict[str, Any]:
    """How text is set; names may hold dollar signs, which are not formulas."""
    return {"color": colour, "size": size, "family": _FONT, "parse_math": False, **more}
