"""Results + figures -> one HTML page that needs no network, `result.json`, `best.log`."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageOps

from bayesian_merger import pairs, plots
from bayesian_merger.blocks import ARCHITECTURES, SD1
from bayesian_merger.data import RIVALS, Estimate, Interval, Outcome, Prompt, Recipe
from bayesian_merger.pictures import pillow_errors
from bayesian_merger.recipes import to_toml
from bayesian_merger.values import Measure, mean_slopes

_LABELS = {"a": "A", "b": "B", "even": "even", "best": "best"}
_GAINS = {"over_a": "over A", "over_b": "over B", "over_even": "over even"}

_MAX_ROWS = 24  # prompts shown with their pictures; more would make the page too heavy to post
_AS_IS_BYTES = 64 * 1024
# A picture's side; of many together they are smaller, so that the page stays below 15 MB.
_MAX_SIDE = 1024
_MAX_PIXELS = 24e6
_MAX_BYTES = 13e6
_REFRESH_S = 30
# Of a picture on the contact sheet.
_SHEET_SIDE, _SHEET_COLUMNS = 384, 8


def html(outcome: Outcome, *, is_alive: bool = True) -> str:
    """The run as one page, finished or not, that takes nothing from the network.

    While an unfinished run `is_alive` the page reloads itself.
    """
    shown = outcome.best or outcome.leader
    template = _environment().get_template("report.html")
    return template.render(
        outcome=outcome,
        certainty=certainty(outcome),
        labels=_LABELS,
        refresh_s=_REFRESH_S if is_alive and not outcome.finished else None,
        models=dict(zip("ABC", outcome.models, strict=False)),
        progress=_progress(outcome),
        gains=_gains_chart(outcome),
        heldout=sorted(outcome.heldout.items(), key=lambda item: item[1].mean, reverse=True),
        selected=_selected(outcome),
        pairs=_pairs(outcome),
        n_panel=len(_shown_panel(outcome)),
        figures={name: _drawn(*figure) for name, figure in figures(outcome).items()},
        path_start=first_slopes(outcome)[0],
        n_tried=len(outcome.tried),
        scorers=_by_scorer(outcome),
        meaning=_meaning(outcome),
        shown=shown,
        weights_text=best_log(shown.recipe).strip() if shown else "",
        lines_text=one_line(shown.recipe) if shown else "",
        preset_text=preset(shown.recipe, outcome.title) if shown else "",
        recipe_text=to_toml(shown.recipe, {}).strip() if shown else "",
        lost=[
            (r.name, r.state, _public(r.reason or "not given"))
            for r in outcome.results
            if r.state in ("failed", "stopped")
        ],
        given_up=outcome.given_up and _public(outcome.given_up),
        seconds=_phases(outcome.seconds),
        settings=list(_settings(outcome.config)),
    )


def certainty(outcome: Outcome) -> str:
    """The gain over the closest rival and how sure that is: what ends the sentence of the verdict."""
    if not outcome.gain:
        return ""
    closest = min(outcome.gain, key=lambda key: outcome.gain[key].mean)
    gain = outcome.gain[closest]
    if outcome.by_pairs:
        told = f"beside {RIVALS[closest]} it was {pairs.sentence(outcome.preferences[closest])}"
    elif _is_known(gain):
        interval = f"95 % interval {_signed(gain.low)} to {_signed(gain.high)}"
        told = f"{_signed(gain.mean)} over {RIVALS[closest]} ({interval})"
    else:
        told = f"{_signed(gain.mean)} over {RIVALS[closest]}, its error unknown"
    return told


def figures(outcome: Outcome) -> dict[str, tuple[Callable[..., Any], str]]:
    """Name -> what draws the figure, light or `dark`, and what it shows in words."""
    start, slopes = first_slopes(outcome)
    shown = outcome.best or outcome.leader
    found: dict[str, tuple[Callable[..., Any], str]] = {
        "convergence": (partial(plots.convergence, outcome), _convergence_alt(outcome))
    }
    if slopes:
        draw = partial(plots.path, outcome, slopes, start)
        found["path"] = (draw, _path_alt(outcome, start))
    if outcome.slices:
        found["slices"] = (partial(plots.slices, outcome), _slices_alt(outcome))
    if (n_tried := len(outcome.tried)) > 1:
        alt = (
            f"The weights of {n_tried} trials as lines over the blocks, coloured by their values."
        )
        found["parallel"] = (partial(plots.parallel, outcome), alt)
    if outcome.front:
        found["front"] = (partial(plots.front, outcome), _front_alt(outcome))
    if shown:
        found |= _unets(outcome, shown.recipe)
    return found


def result_json(outcome: Outcome) -> dict[str, Any]:
    """The run in numbers, ready for JSON; null where something is not known (yet)."""
    states = [result.state for result in outcome.results if result.stage != "baseline"]
    best = outcome.best.recipe if outcome.best else None
    return {
        "images": outcome.images,
        "trials": {state: states.count(state) for state in ("complete", "stopped", "failed")},
        "seconds": dict(outcome.seconds),
        "heldout": {name: _plain(outcome.heldout.get(name)) for name in _LABELS},
        "scores": {
            name: {scorer: _plain(found) for scorer, found in of_it.items()}
            for name, of_it in outcome.by_scorer.items()
        },
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
    lines = []
    for base, *others in _numbers(recipe, ARCHITECTURES[recipe.architecture].blocks).values():
        lines += [base, "", ",".join(others), ""]
    return "".join(f"{line}\n" for line in lines)


def one_line(recipe: Recipe) -> str:
    """All weights in one line, base first, to six digits, for each weight of the method."""
    found = _numbers(recipe, ARCHITECTURES[recipe.architecture].blocks, "{:.6g}")
    return "\n".join(",".join(numbers) for numbers in found.values())


def preset(recipe: Recipe, title: str) -> str:
    """The weights as presets of sd-webui-supermerger, a line for each weight of the method.

    A name, a tab, and 26 numbers; those that SDXL lacks are 0. Empty for other networks than U-Nets.
    """
    if not set(ARCHITECTURES[recipe.architecture].blocks) <= set(SD1.blocks):
        return ""
    name = " ".join(re.sub(r"[:,\s]+", " ", title).split()) or "best"
    found = _numbers(recipe, SD1.blocks, "{:.6g}")
    return "\n".join(
        f"{name}{f' {weight}' if len(found) > 1 else ''}\t{','.join(numbers)}"
        for weight, numbers in found.items()
    )


def _numbers(recipe: Recipe, blocks: Sequence[str], digits: str = "{!r}") -> dict[str, list[str]]:
    """Each weight of the method at the blocks, as text; with all digits unless said."""
    # What the models do not hold, or hold alike, is A's, whatever its weight.
    return {
        weight: [digits.format(float(own.get(block, 0.0))) for block in blocks]
        for weight, own in recipe.weights.items()
    }


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
    environment.filters.update(
        duration=duration, number=_number, estimate=_estimate, digest=_digest
    )
    return environment


def _digest(script: str) -> str:
    """That by which a page names its own script, so that a browser runs no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _shown_panel(outcome: Outcome) -> tuple[Prompt, ...]:
    """The panel of the saved pictures: the search's until the held-out one is judged."""
    return outcome.heldout_panel if outcome.finished else outcome.panel


def _pairs(outcome: Outcome) -> list[_Pair]:
    """The first prompts of the panel that have pictures; no score has a say in which are shown."""
    kept = {name: outcome.pictures[name] for name in _LABELS if outcome.pictures.get(name)}
    found = [p for p in _shown_panel(outcome) if any(p.index in k for k in kept.values())]
    prompts = found[:_MAX_ROWS]
    n_pictures = sum(p.index in paths for p in prompts for paths in kept.values())
    side = min(_MAX_SIDE, math.isqrt(int(_MAX_PIXELS / max(1, n_pictures))))
    while True:
        rows = [
            _Pair(
                p, {name: _picture(name, paths.get(p.index), side) for name, paths in kept.items()}
            )
            for p in prompts
        ]
        size = sum(len(one.uri) for row in rows for one in row.pictures.values() if one)
        if size <= _MAX_BYTES:
            return rows
        side = int(0.9 * side * math.sqrt(_MAX_BYTES / size))  # noise is not made smaller by JPEG


def _picture(name: str, path: Path | None, side: int) -> _Picture | None:
    """The picture embedded: a small file as it is, a large one as a JPEG of at most that `side`."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
        with pillow_errors(), Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) < _AS_IS_BYTES and image.format in ("PNG", "JPEG", "WEBP"):
                return _Picture(name, _uri(data, image.format.lower()), *image.size)
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
    except OSError:
        # A report without one picture is worth more than none.
        return None
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return _Picture(name, _uri(buffer.getvalue(), "jpeg"), *small.size)


def sheet(outcome: Outcome) -> dict[str, list[Image.Image]]:
    """The pictures of A, B, the even merge and the best on the first few prompts, by what made them."""
    kept = {name: outcome.pictures[name] for name in _LABELS if outcome.pictures.get(name)}
    shown = [p for p in _shown_panel(outcome) if all(p.index in paths for paths in kept.values())]
    found: dict[str, list[Image.Image]] = {_LABELS[name]: [] for name in kept}
    for prompt in shown if kept else ():
        row = {}
        for name, paths in kept.items():
            with (
                suppress(OSError),
                pillow_errors(),
                Image.open(paths[prompt.index]) as file,
            ):
                row[_LABELS[name]] = file.convert("RGB")
                row[_LABELS[name]].thumbnail((_SHEET_SIDE, _SHEET_SIDE), Image.Resampling.LANCZOS)
        if len(row) == len(kept):
            for label, image in row.items():
                found[label].append(image)
            if len(next(iter(found.values()))) == _SHEET_COLUMNS:
                break
    return found if any(found.values()) else {}


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _drawn(draw: Callable[..., Any], alt: str) -> dict[str, Any]:
    """The figure that `draw` makes, light and dark, embedded with its size on the page and `alt`."""
    light, dark = draw(dark=False), draw(dark=True)
    width, height = (round(side * 96) for side in light.get_size_inches())
    uris = {"light": _uri(plots.png(light), "png"), "dark": _uri(plots.png(dark), "png")}
    return {**uris, "width": width, "height": height, "alt": alt}


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
    lines = [
        f"{_LABELS.get(r.name, r.name)} {_number(r.value.mean)}"
        for r in outcome.results
        if r.stage == "baseline" and r.value
    ]
    text = f"Chart of the values of {len(outcome.tried)} trials"
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


def _unets(outcome: Outcome, recipe: Recipe) -> dict[str, tuple[Callable[..., Any], str]]:
    """The drawing of the network for each weight of the method: "unet", or "unet-beta" of several."""
    names = outcome.ends(recipe)
    drawings: dict[str, tuple[Callable[..., Any], str]] = {}
    for name, weights in recipe.weights.items():
        title = name if len(recipe.weights) > 1 else ""
        draw = partial(plots.unet, weights, blocks=outcome.blocks, title=title, names=names)
        alt = ", ".join(f"{block} {weights[block]:.2f}" for block in outcome.blocks)
        told = f"The network coloured by {name}: {alt}."
        drawings[f"unet-{name}" if title else "unet"] = (draw, told)
    return drawings


def _meaning(outcome: Outcome) -> str:
    """What a value is, where it is not simply the score of one scorer."""
    weights = {
        name: section.get("weight", 1.0)
        for name, section in outcome.config.get("scorers", {}).items()
    }
    own = outcome.config.get("value", {})
    measure = Measure(weights, own.get("normalise"), own.get("combine", "mean"))
    norm = {
        "none": "",
        "zscore": "normalised by mean and spread over the baselines' images",
        "rank": "taken as the share of the baselines' images that it beats",
    }[measure.norm]
    if outcome.by_pairs or not weights or (len(weights) == 1 and not norm):
        return ""
    if len(weights) == 1:
        return f"A value is the score, {norm}."
    how = {
        "mean": "mean" if len(set(weights.values())) == 1 else "mean, by their weights,",
        "geometric": "geometric mean",
        "minimum": "smallest",
    }[measure.combine]
    return f"A value is the {how} of the scores of an image{f', each {norm}' if norm else ''}."


def _by_scorer(outcome: Outcome) -> dict[str, Any]:
    """What each of several scorers has given A, B, the even merge and the best; empty for one alone."""
    names = list(dict.fromkeys(name for of_it in outcome.by_scorer.values() for name in of_it))
    models = sorted(outcome.by_scorer, key=list(_LABELS).index)
    return {"names": names, "models": models} if len(names) > 1 else {}


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
    # Of an address what comes before its host, and after it, may be secret.
    text = re.sub(r"(\w+)://\S*", _host, text)
    return re.sub(
        r"(?<![\w…./\\])(?:[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])+([^\s/\\]*)", r"…/\1", text
    )


def _host(address: re.Match[str]) -> str:
    """Scheme and host of an address, as far as it has one."""
    whole = address[0]
    # The last "@" ends a password that may hold any sign, but for those in a query.
    rest = whole.partition("://")[2].partition("?")[0].rpartition("@")[2]
    host = rest.partition("/")[0]
    return f"{address[1]}://{host}{'/…' if len(rest) > len(host) else ''}"


def _plain(found: Estimate | Interval | None) -> dict[str, float | None] | None:
    """The fields; None for what is not finite, as JSON has no infinity."""
    if found is None:
        return None
    return {k: x if math.isfinite(x) else None for k, x in vars(found).items()}


def _number(x: float) -> str:
    """With three decimals or four digits, and a true minus."""
    text = f"{x:.4g}" if abs(x) >= 1000 or 0 < abs(x) < 0.01 else f"{x:.3f}"
    return text.replace("-", "−")


def _estimate(found: Estimate) -> str:
    """Mean and standard error, which has the decimals of the mean unless it were 0 by that."""
    mean = _number(found.mean)
    if found.n == 1:
        return f"{mean}, error unknown"  # of a single image
    se = f"{found.se:.{len(mean.partition('.')[2])}f}"
    return f"{mean} ± {se if float(se) or not found.se else _number(found.se)}"


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
