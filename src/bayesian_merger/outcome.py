"""A run folder: its study -> the outcome, and the files that people read."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from bayesian_merger import album, pairs, plots, report
from bayesian_merger.checkpoint import whole_file
from bayesian_merger.data import Estimate, Model, Outcome, Prompt, Recipe, Result
from bayesian_merger.errors import ConfigError
from bayesian_merger.premises import require_plain
from bayesian_merger.recipes import to_toml
from bayesian_merger.setup import BASELINES
from bayesian_merger.study import Stage, Study, copies
from bayesian_merger.study import create as create_study
from bayesian_merger.study.storage import file_of, is_in, is_shared, require_local, storage_at
from bayesian_merger.values import JUNK, Measure, Yardstick

_FIGURE = re.compile(r"(convergence|path|slices|parallel|front|unet(-\w+)?|pictures)\.(png|svg)")
_STUDY = "study.db"
# What tells a run folder whose study lies elsewhere from other folders of its name.
_ELSEWHERE = "study.id"


def open_study(folder: Path, storage: str | None = None, *, create: bool = False) -> Study:
    """The study of the run in the folder; ConfigError if there is none and `create` is not set.

    It lies in the folder, or in the storage of that URL under the folder's name.
    """
    require_plain(folder)
    path, name = folder / _STUDY, folder.absolute().name
    if create and (file := file_of(storage) if storage else path):
        require_local(file)
    if not has_study(folder, storage):
        if not create:
            where = f"the storage has no study {name!r}" if storage else "it has no study.db"
            raise ConfigError(f"{folder}: not a run folder ({where})")
        if storage and (folder / _ELSEWHERE).is_file():
            raise ConfigError(
                f"{folder}: the study of this run is not in the storage that search.storage names; name "
                f"the one that it began in, or choose another --run-dir"
            )
        if not storage:
            create_study(path)
    if not storage:
        return Study(path)
    study = Study(storage_at(storage), name)
    try:
        if create and not is_shared(storage):
            _require_own(study, folder)
    except ConfigError:
        study.close()
        raise
    return study


def mend(folder: Path) -> str:
    """Put the last good copy in the place of the folder's study if that is damaged or gone.

    What was done is said; nothing if it is whole.
    """
    return copies.mend(folder / _STUDY)


def join(study: Study, folder: Path) -> None:
    """Make the folder one of those of a study on a server; ConfigError if it is another study's."""
    mark = folder / _ELSEWHERE
    if not mark.is_file():
        _write(mark, f"{study.own(secrets.token_hex(8))}\n")
    own = mark_of(folder)
    if study.own(own) != own:
        raise ConfigError(
            f"{folder} belongs to another study than the storage's {folder.absolute().name!r}; choose "
            f"another --run-dir"
        )


def mark_of(folder: Path) -> str:
    """What tells the study of a folder that has joined it from others of its name."""
    return (folder / _ELSEWHERE).read_text().strip()


def has_study(folder: Path, storage: str | None = None) -> bool:
    """Whether a run has begun in the folder; ConfigError if the study lies elsewhere than it is said."""
    path = folder / _STUDY
    if storage and path.is_file():
        raise ConfigError(
            f"{folder} holds a study of its own (study.db), but search.storage names another place; "
            f"leave that out, or choose another --run-dir"
        )
    if not storage and (folder / _ELSEWHERE).is_file():
        raise ConfigError(
            f"{folder}: the study of this run lies in another storage; name that by search.storage, or "
            f"for a report by --storage"
        )
    return is_in(storage, folder.absolute().name) if storage else path.is_file()


def _require_own(study: Study, folder: Path) -> None:
    """ConfigError if a study in a shared storage is that of another run folder of the same name."""
    mark = folder / _ELSEWHERE
    is_new = not mark.is_file()
    if is_new:  # first, so that a killed process does not leave the study to nobody
        _write(mark, f"{secrets.token_hex(8)}\n")
    own = mark_of(folder)
    if study.own(own) != own:
        if is_new:
            mark.unlink()
        raise ConfigError(
            f"the storage holds a study {folder.absolute().name!r} of another run folder; choose "
            f"another name by --run-dir"
        )


def read_outcome(folder: Path, study: Study) -> Outcome:
    """The run in `folder` as it stands, from the study alone."""
    about = study.about
    if not about:
        raise ConfigError(f"{folder}: the run has not begun yet")
    baselines = [r for r in study.judged("baseline") if r.state == "complete"]
    searched = study.searched()
    panels = {
        name: tuple(Prompt.from_dict(p) for p in about[name])
        for name in ("panel", "heldout_panel")
    }
    few = study.candidates[: about["config"]["heldout"]["candidates"]]
    selected = ranking(study, few) or []
    by_pairs = bool(about.get("by_pairs"))
    # With pairs what A, B and the even merge have is not theirs who are chosen, whoever that is.
    heldout = study.judged("heldout")
    confirmed = chosen(selected, [r for r in heldout if not (by_pairs and r.name in BASELINES)])
    judged = {r.name: r for r in heldout if r.name in BASELINES and r.state == "complete"}
    finished = bool(few) and confirmed is not None and len(judged) == len(BASELINES)
    front, of_front = study.front
    gain, preferences = {}, {}
    if finished and confirmed is not None:
        judged["best"] = confirmed
        if by_pairs:
            preferences = {
                f"over_{name}": pairs.preference(confirmed, name) for name in sorted(BASELINES)
            }
            gain = {key: pairs.margin(told) for key, told in preferences.items()}
        elif yardstick := yardstick_of(study):
            gain = {
                f"over_{name}": yardstick.difference(
                    confirmed, judged[name], panels["heldout_panel"]
                )
                for name in sorted(BASELINES)
            }
    stages: tuple[Stage, ...] = ("baseline", "select", "heldout")
    everything = [*searched, *(result for stage in stages for result in study.judged(stage))]
    seconds: dict[str, float] = {}
    for result in everything:
        for phase, spent in result.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    stage = "heldout" if finished else "baseline"
    names = {name: name for name in BASELINES}
    if finished:
        names["best"] = judged["best"].name
    return Outcome(
        title=about["title"],
        blocks=tuple(about["blocks"]),
        models=tuple(about["models"]),
        config=about["config"],
        panel=panels["panel"],
        heldout_panel=panels["heldout_panel"],
        results=(*baselines, *searched),
        trials=about["trials"],
        selected=tuple(selected),
        candidates=tuple(few),
        leader=study.leader,
        expected=study.expected,
        best=judged["best"] if finished else None,
        heldout={name: r.value for name, r in sorted(judged.items()) if r.value and finished},
        by_scorer=_by_scorer(judged, panels["heldout_panel"]) if finished and not by_pairs else {},
        gain=gain,
        pictures={
            key: album.saved(album.folder_of(folder, stage, name)) for key, name in names.items()
        },
        front=tuple(front),
        front_baselines=of_front,
        images=sum(len(result.scores) for result in everything),
        seconds=seconds,
        finished=finished,
        given_up=study.given_up,
        slices=study.slices,
        by_pairs=by_pairs,
        zero=about.get("zero", "the even merge"),
        preferences=preferences,
    )


def _by_scorer(
    judged: Mapping[str, Result], panel: Sequence[Prompt]
) -> dict[str, dict[str, Estimate]]:
    """The mean score that each scorer gave each result, over the images of the panel that it judged."""
    scorers = dict.fromkeys(
        name
        for result in judged.values()
        for scores in result.scores.values()
        for name in scores
        if not name.startswith(JUNK)
    )
    found: dict[str, dict[str, Estimate]] = {}
    for name, result in sorted(judged.items()):
        for scorer in scorers:
            own = [p for p in panel if scorer in result.scores.get(p.index, {})]
            if own:
                one = Yardstick(Measure({scorer: 1.0}))
                found.setdefault(name, {})[scorer] = one.estimate(result, own)
    return found


def yardstick_of(study: Study) -> Yardstick | None:
    """What turns the scores of a run into values; None for choices, and before the baselines."""
    about = study.about
    baselines = [r for r in study.judged("baseline") if r.state == "complete"]
    if about.get("by_pairs") or len(baselines) < len(BASELINES):
        return None
    # Runs that were begun before there was anything but weights have these alone.
    measure = Measure(**about.get("measure", {"weights": about.get("weights")}))
    panel = [Prompt.from_dict(prompt) for prompt in about["panel"]]
    return Yardstick.from_baselines(measure, baselines, panel)


def write_outcome(outcome: Outcome, folder: Path, models: Sequence[Model] = ()) -> None:
    """result.json and the best recipes so far, each written whole."""
    _write(folder / "result.json", json.dumps(report.result_json(outcome), indent=2) + "\n")
    _write_front(outcome, folder, models)
    found = outcome.best or outcome.leader
    # Without the models' places a recipe that is lost is better than none.
    if found is not None and (models or not (folder / "best.toml").is_file()):
        write_recipe(found.recipe, folder, models)


def write_page(outcome: Outcome, folder: Path, *, is_alive: bool = True) -> None:
    """report.html, written whole; of an unfinished run it renews itself while that `is_alive`."""
    _write(folder / "report.html", report.html(outcome, is_alive=is_alive))


def write_figures(outcome: Outcome, run_dir: Path) -> None:
    """Each figure of the report and a contact sheet, as PNG and SVG; those that are no more go."""
    folder = run_dir / "figures"
    drawn = {name: draw() for name, (draw, _) in report.figures(outcome).items()}
    if pictures := report.sheet(outcome):
        drawn["pictures"] = plots.contact_sheet(pictures)
    paths = {folder / f"{name}{suffix}": name for name in drawn for suffix in (".png", ".svg")}
    for left in folder.glob("*"):
        # Only what this has made.
        if left not in paths and _FIGURE.fullmatch(left.name):
            left.unlink()
    for path, name in paths.items():
        plots.save(drawn[name], path)


def _write_front(outcome: Outcome, folder: Path, models: Sequence[Model]) -> None:
    """The recipes of the compromises; those of an earlier front go, without models none is replaced."""
    recipes = {folder / "front" / f"{n}.toml": one for n, one in enumerate(outcome.front, start=1)}
    for left in (folder / "front").glob("*.toml"):
        if left not in recipes and left.stem.isdecimal():
            left.unlink(missing_ok=True)
    for path, one in recipes.items():
        if not models and path.is_file():
            continue
        with whole_file(path) as file:
            file.write(to_toml(one.recipe, {m.sha256: m.path for m in models}).encode())


def write_recipe(recipe: Recipe, folder: Path, models: Sequence[Model]) -> None:
    """best.toml, which rebuilds the merge, and best.log, the weights as people paste them."""
    with whole_file(folder / "best.toml") as file:
        file.write(to_toml(recipe, {m.sha256: m.path for m in models}).encode())
    _write(folder / "best.log", report.best_log(recipe))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())


def ranking(study: Study, few: Sequence[Result]) -> list[Result] | None:
    """`ranked` by what was judged on fresh seeds; choices make one scale of all of that."""
    if len(few) == 1:
        return list(few)  # there is nothing to choose
    judged = study.judged("select")
    if study.about.get("by_pairs"):
        judged = pairs.valued(judged)
    return ranked(few, judged)


def ranked(few: Sequence[Result], judged: Sequence[Result]) -> list[Result] | None:
    """The candidates as judged on fresh seeds, best first, without those that failed there.

    None while one of them is still to be judged.
    """
    records = [_record(candidate, judged) for candidate in few]
    if any(record is None or record.state == "running" for record in records):
        return None
    return sorted((r for r in records if r and r.state == "complete"), key=mean, reverse=True)


def chosen(selected: Sequence[Result], heldout: Sequence[Result]) -> Result | None:
    """The held-out result of the first of `selected` that did not fail there, if it stands already.

    The order was made before, so that held-out values choose nothing.
    """
    for candidate in selected:
        record = _record(candidate, heldout)
        if record is None or record.state != "failed":
            return record if record and record.state == "complete" else None
    return None


def _record(wanted: Result, judged: Sequence[Result]) -> Result | None:
    """What is known of a recipe: its complete result, or else the latest."""
    digest = wanted.recipe.digest()
    found = [r for r in judged if r.recipe.digest() == digest]
    return next((r for r in found if r.state == "complete"), found[-1] if found else None)


def mean(result: Result) -> float:
    """The value of a result that has one."""
    assert result.value is not None
    return result.value.mean
