"""Results + figures -> one HTML page that needs no network, `result.json`, `best.log`."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageOps

from bayesian_merger import plots
from bayesian_merger.blocks import ARCHITECTURES
from bayesian_merger.data import Estimate, Interval, Outcome, Prompt, Recipe
from bayesian_merger.recipes import to_toml
from bayesian_merger.values import mean_slopes

_LABELS = {"a": "A", "b": "B", "even": "even", "best": "best"}
_GAINS = {"over_a": "over A", "over_b": "over B", "over_even": "over even"}

_MAX_ROWS = 24  # prompts shown with their pictures; more would make the page too heavy to post
_AS_IS_BYTES = 64 * 1024
_MAX_SIDE = 512
_REFRESH_S = 30


def html(outcome: Outcome) -> str:
    """The run as one page, finished or not, that takes nothing from the network."""
    shown = outcome.best or outcome.leader
    start, slopes = first_slopes(outcome)
    template = _environment().get_template("report.html")
    return template.render(
        outcome=outcome,
        labels=_LABELS,
        refresh_s=None if outcome.finished else _REFRESH_S,
        models=dict(zip("ABC", outcome.models, strict=False)),
        progress=_progress(outcome),
        gains=_gains_chart(outcome),
        heldout=sorted(outcome.heldout.items(), key=lambda item: item[1].mean, reverse=True),
        selected=_selected(outcome),
        pairs=_pairs(outcome),
        n_panel=len(_shown_panel(outcome)),
        convergence=_drawn(partial(plots.convergence, outcome)),
        convergence_alt=_convergence_alt(outcome),
        path=_drawn(partial(plots.path, outcome, slopes, start)) if slopes else None,
        path_alt=_path_alt(outcome, start),
        path_start=start,
        slices=_drawn(partial(plots.slices, outcome)) if outcome.slices else None,
        slices_alt=_slices_alt(outcome),
        front=_drawn(partial(plots.front, outcome)) if outcome.front else None,
        front_alt=_front_alt(outcome),
        shown=shown,
        unets=_unets(outcome, shown.recipe) if shown else [],
        weights_text=best_log(shown.recipe).strip() if shown else "",
        recipe_text=to_toml(shown.recipe, {}).strip() if shown else "",
        lost=[r for r in outcome.results if r.state in ("failed", "stopped")],
        seconds=_phases(outcome.seconds),
        settings=list(_settings(outcome.config)),
    )


def result_json(outcome: Outcome) -> dict[str, Any]:
    """The run in numbers, ready for JSON; null where something is not known (yet)."""
    states = [result.state for result in outcome.results if result.stage != "baseline"]
    best = outcome.best.recipe if outcome.best else None
    return {
        "images": outcome.images,
        "trials": {state: states.count(state) for state in ("complete", "stopped", "failed")},
        "seconds": dict(outcome.seconds),
        "heldout": {name: _plain(outcome.heldout.get(name)) for name in _LABELS},
        "gain": {name: _plain(outcome.gain.get(name)) for name in _GAINS},
        "pairs": {name: vars(told) for name, told in outcome.preferences.items()},
        "best": {
            "method": best.method if best else None,
            "weights": {name: dict(w) for name, w in best.weights.items()} if best else None,
        },
        "gradient_given_up": outcome.given_up,
        "verdict": outcome.verdict(),
        "finished": outcome.finished,
    }


def best_log(recipe: Recipe) -> str:
    """The weights as block-merge extensions take them, for each weight of the method.

    The base weight, an empty line, the other blocks' weights with commas between, an empty line.
    """
    base, *others = ARCHITECTURES[recipe.architecture].blocks
    lines = []
    for blocks in recipe.weights.values():
        # What the models do not hold, or hold alike, is A's, whatever its weight.
        numbers = [repr(float(blocks.get(b, 0.0))) for b in others]
        lines += [repr(float(blocks.get(base, 0.0))), "", ",".join(numbers), ""]
    return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True)
class _Picture:
    """An image as the page holds it."""

    name: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class _Pair:
    """One prompt and seed with the picture that each model made of it; None for a lost file."""

    prompt: Prompt
    pictures: Mapping[str, _Picture | None]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bayesian_merger"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, signed=_signed, number=_number)
    return environment


def _shown_panel(outcome: Outcome) -> tuple[Prompt, ...]:
    """The panel of the saved pictures: the search's until the held-out one is judged."""
    return outcome.heldout_panel if outcome.finished else outcome.panel


def _pairs(outcome: Outcome) -> list[_Pair]:
    """The first prompts of the panel that have pictures; no score has a say in which are shown."""
    kept = {name: outcome.pictures[name] for name in _LABELS if outcome.pictures.get(name)}
    prompts = [p for p in _shown_panel(outcome) if any(p.index in k for k in kept.values())]
    return [
        _Pair(p, {name: _picture(name, paths.get(p.index)) for name, paths in kept.items()})
        for p in prompts[:_MAX_ROWS]
    ]


def _picture(name: str, path: Path | None) -> _Picture | None:
    """The picture embedded: a small file as it is, a large one as a JPEG of moderate size."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if len(data) < _AS_IS_BYTES and image.format in ("PNG", "JPEG", "WEBP"):
                return _Picture(name, _uri(data, image.format.lower()), *image.size)
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    except (OSError, Image.DecompressionBombError):
        # A report without one picture is worth more than none.
        return None
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return _Picture(name, _uri(buffer.getvalue(), "jpeg"), *small.size)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _drawn(draw: Callable[..., Any]) -> dict[str, Any]:
    """The figure that `draw` makes, light and dark, embedded with its size on the page."""
    light, dark = draw(dark=False), draw(dark=True)
    width, height = (round(side * 96) for side in light.get_size_inches())
    uris = {"light": _uri(plots.png(light), "png"), "dark": _uri(plots.png(dark), "png")}
    return {**uris, "width": width, "height": height}


def first_slopes(outcome: Outcome) -> tuple[str, dict[str, Estimate]]:
    """Where a search by the gradient began, and how much the value rises with each parameter there.

    By all images that tell: those of the even merge, if it began there, or of its first trial. None
    for a search that followed no gradient.
    """
    if not outcome.followed:
        return "", {}
    even = {r.recipe.digest() for r in outcome.results if r.name == "even"}
    if even & {trial.recipe.digest() for trial in outcome.followed}:
        at_even = [r for r in outcome.results if r.recipe.digest() in even]
        return "the even merge", mean_slopes(at_even)
    first = outcome.followed[0]
    return first.name, mean_slopes([first])


def _path_alt(outcome: Outcome, start: str) -> str:
    """What the figure of the weights' ways shows, in words."""
    n = len(outcome.followed)
    return f"Each block's weight over {n} trials, and the slope of the score by it at {start}."


def _convergence_alt(outcome: Outcome) -> str:
    """What the convergence figure shows, in words."""
    complete = [r for r in outcome.results if r.stage != "baseline" and r.value]
    lines = [
        f"{_LABELS.get(r.name, r.name)} {_number(r.value.mean)}"
        for r in outcome.results
        if r.stage == "baseline" and r.value
    ]
    text = f"Chart of the values of {len(complete)} trials"
    if outcome.leader and outcome.leader.value:
        text += f"; {_number(outcome.leader.value.mean)} is expected of the recommended merge"
    return f"{text}; for comparison {', '.join(lines)}." if lines else f"{text}."


def _slices_alt(outcome: Outcome) -> str:
    """What the figure of the slices shows, in words: what is lost at the worst place of each weight."""
    lost = sorted(outcome.slices.items(), key=lambda item: -item[1].loss.mean)
    told = (f"{name} {_number(one.loss.mean)} ± {_number(one.loss.se)}" for name, one in lost)
    return f"Charts of the value by each weight. At its worst place each would lose: {', '.join(told)}."


def _front_alt(outcome: Outcome) -> str:
    """What the figure of the compromises shows, in words."""
    merges = [
        f"{n}: " + ", ".join(f"{name} {_number(v.mean)}" for name, v in one.values.items())
        for n, one in enumerate(outcome.front, start=1)
    ]
    return f"Chart of what is expected of each merge. {'; '.join(merges)}."


def _unets(outcome: Outcome, recipe: Recipe) -> list[dict[str, Any]]:
    """The drawing of the network for each weight of the method."""
    names = outcome.ends(recipe)
    drawings = []
    for name, weights in recipe.weights.items():
        title = name if len(recipe.weights) > 1 else ""
        draw = partial(plots.unet, weights, blocks=outcome.blocks, title=title, names=names)
        alt = ", ".join(f"{block} {weights[block]:.2f}" for block in outcome.blocks)
        drawings.append({**_drawn(draw), "alt": f"The network coloured by {name}: {alt}."})
    return drawings


def _gains_chart(outcome: Outcome) -> dict[str, Any]:
    """The gains with the places of their dots and intervals, in percent of the chart's width."""
    known = {name: outcome.gain[name] for name in _GAINS if name in outcome.gain}
    text = _won if outcome.by_pairs else _signed
    ends = [0.0, *(x for g in known.values() for x in (g.mean, g.low, g.high) if math.isfinite(x))]
    low, high = min(ends), max(ends)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(x: float) -> float:
        # Nothing is known of a single image's error: its interval runs off the chart.
        return round(100 * (min(max(x, low), high) - low) / (high - low), 2)

    rows = [
        {
            "label": _GAINS[name],
            "mean": text(g.mean),
            "interval": f"{text(g.low)} to {text(g.high)}" if _is_known(g) else "error unknown",
            "pairs": outcome.preferences.get(name),
            "sure": g.low > 0 or g.high < 0,
            "dot": place(g.mean),
            "low": place(g.low),
            "high": place(g.high),
        }
        for name, g in known.items()
    ]
    ticks = [
        {"place": place(x), "text": text(x) if outcome.by_pairs else f"{x:+g}" if x else "0"}
        for x in _ticks(low, high)
        if not outcome.by_pairs or abs(x) <= 1
    ]
    return {"rows": rows, "ticks": ticks, "zero": place(0.0)}


def _is_known(gain: Interval) -> bool:
    return math.isfinite(gain.low) and math.isfinite(gain.high)


def _won(gain: float) -> str:
    """Of a gain by pairs, how many of them were won."""
    return f"{50 + 50 * gain:.0f} %"


def _ticks(low: float, high: float) -> list[float]:
    """Two to four round numbers between `low` and `high`, zero among them if it is."""
    rough = (high - low) / 3
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{k * step:.6g}") for k in range(first, last + 1)]


def _selected(outcome: Outcome) -> list[dict[str, Any]]:
    """The few best merges: what the search expected, what they had on fresh seeds, which was chosen.

    None where there was one alone.
    """
    if len(outcome.selected) < 2:
        return []
    before = {result.recipe.digest(): result.value for result in outcome.candidates}
    chosen = outcome.best.recipe.digest() if outcome.best else None
    return [
        {
            "name": r.name,
            "search": before.get(r.recipe.digest()),
            "fresh": r.value,
            "chosen": r.recipe.digest() == chosen,
        }
        for r in outcome.selected
    ]


def _progress(outcome: Outcome) -> dict[str, int]:
    """Trials done and planned."""
    done = sum(r.stage != "baseline" and r.state != "running" for r in outcome.results)
    return {"done": done, "planned": outcome.trials}


def _phases(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    total = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: item[1], reverse=True)
    return [{"phase": k, "seconds": s, "share": round(100 * s / total, 1)} for k, s in ordered]


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The configuration as (dotted key, value), without what should not be posted with a page."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _settings(value, f"{name}.")
        elif value and re.search(r"password|secret|token|api_?key", str(key), re.IGNORECASE):
            yield name, "left out"
        else:
            yield name, _public(value)


def _public(value: Any) -> str:
    """`value` as text; of absolute paths only the name, of addresses no user and password."""
    if value is None:
        return "not set"
    if isinstance(value, (list, tuple, dict)):
        nested = [f"({_public(v)})" if isinstance(v, (list, tuple)) else _public(v) for v in value]
        return ", ".join(nested) or "none"
    text = str(value)
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        return f"…/{PureWindowsPath(text).name}"
    return re.sub(r"://[^/@\s]+@", "://", text)


def _plain(found: Estimate | Interval | None) -> dict[str, float | None] | None:
    """The fields; None for what is not finite, as JSON has no infinity."""
    if found is None:
        return None
    return {k: x if math.isfinite(x) else None for k, x in vars(found).items()}


def _number(x: float) -> str:
    return f"{x:.4g}" if abs(x) >= 1000 or 0 < abs(x) < 0.01 else f"{x:.3f}"


def _signed(x: float) -> str:
    """The number with its sign, a true minus."""
    return f"+{_number(x)}" if x >= 0 else f"−{_number(-x)}"


def duration(seconds: float) -> str:
    """The time in the largest units that matter: "4.2 s", "3 min 05 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
