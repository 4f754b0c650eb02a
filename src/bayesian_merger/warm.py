"""What an earlier run has found, for a new one: trials of another run, a log of the original tool."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bayesian_merger import album, judging, run, space
from bayesian_merger.bayes import Bayes, Judged
from bayesian_merger.blocks import short_names
from bayesian_merger.data import MOST_SCORE, Prompt, Recipe, Result, Sample
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.outcome import open_study, read_outcome
from bayesian_merger.setup import Setup
from bayesian_merger.study import Study
from bayesian_merger.study.proposals import Params
from bayesian_merger.study.storage import storage_errors
from bayesian_merger.values import JUNK

_N_STARTS = 5
_Identity = Mapping[str, Any]


@dataclass(frozen=True)
class Brought:
    """What a new run begins with: merges and their scores, merges to try first, merges left out.

    `of_panel` and `rescored` say how many of the scores are of the new panel's images, and of pictures
    that were judged again. `left_out` holds reason -> merges.
    """

    merges: int = 0
    scores: int = 0
    of_panel: int = 0
    rescored: int = 0
    starts: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def fork(old: Path, setup: Setup, folder: Path, storage: str | None = None) -> Brought:
    """Begin a run in `folder` with what the run in `old` has judged; `storage` is that of `old`.

    A score is taken where its scorer is the same; another scorer judges the old picture, if it was kept.
    An image of the new panel that the same back end has made is the same image; other images count by
    their own offsets. Where no trial of its search has a score here, its best merges are tried first.

    What `old` itself was brought is not brought on. ConfigError if the run in `folder` has begun its
    search or brings something else, or if nothing in `old` fits.
    """
    left_out: Counter[str] = Counter()
    with storage_errors():
        before = open_study(old, storage)
        known = _Known(before, setup, old)
    with run.locked(folder), storage_errors():
        new = _begin(setup, folder, str(old.absolute()))
        merges = searched = 0
        # What failed is not to be trusted, a trial that was interrupted is.
        baselines = [r for r in before.judged("baseline") if r.state == "complete"]
        trials = [r for r in before.searched() if r.state != "failed" and r.scores]
        for result in (*baselines, *trials):
            reason = _misfit(result.recipe, setup)
            is_baseline = result.stage == "baseline" and (
                setup.baseline(result.name).digest() == result.recipe.digest()
            )
            if reason and not is_baseline:
                left_out[reason] += 1
                continue
            try:
                found = known.scores(result)
            except TrialError as error:
                left_out[str(error)] += 1
                continue
            if not found:
                reason = "the new scorers need their pictures, which were not kept"
                if setup.comparer:
                    reason = "choices between two pictures are not brought"
                elif not known.shares_images(result):
                    reason = "a search by the gradient shows each merge images of its own"
                left_out[reason] += 1
                continue
            merges += 1
            searched += result.stage != "baseline"
            if is_baseline:
                pictures = album.folder_of(old, result.stage, result.name)
                found = _take_baseline(new, setup, result, found, pictures, folder)
            if found and not reason:
                trial = new.book("brought", f"{known.title} {result.name}", result.recipe)
                for item, scored in found.items():
                    trial.record(item, scored.scores, scored.digest)
        starts = [] if searched else _best_of(old, before, setup)
        if not merges and not starts:
            reasons = "; ".join(left_out) or "none was judged"
            raise ConfigError(f"{old}: no merge of this run can be used: {reasons}")
        new.brought(starts, known.foreign)
    return Brought(
        merges, known.n_scores, known.n_of_panel, known.n_rescored, len(starts), left_out
    )


def import_log(log: Path, setup: Setup, folder: Path) -> Brought:
    """Begin a run in `folder` that first tries what a run of sd-webui-bayesian-merger found best.

    `log` is the file of JSON lines that its optimiser bayes wrote. The scores in it are of other images
    and often of another scorer, so they are not mixed with this run's: a model of them says which few
    merges they speak for. ConfigError with the line that is wrong, or if the run has begun its search.
    """
    judged, left_out, plan = [], Counter[str](), setup.plan
    for number, (flat, target) in enumerate(_lines(log, setup)):
        values = space.start(setup.space, setup.merger.architecture, flat, "start")
        if any(not low <= values[name] <= high for name, (low, high) in plan.bounds.items()):
            left_out["outside the ranges of the new search"] += 1
        elif not abs(target) < MOST_SCORE:
            left_out["without a score"] += 1
        else:
            point = {**values, **{name: known[0] for name, known in plan.choices.items()}}
            judged.append(Judged(plan.scaled(point), {number: target}))
    if not judged:
        reasons = "; ".join(left_out) or "it holds none"
        raise ConfigError(f"{log}: no merge of this log can be used: {reasons}")
    model = Bayes(plan.d, [log.name] * (number + 1), plan.seed, choices=plan.corners)
    few = [plan.params(found.point) for found in model.few(judged, _N_STARTS)]
    with run.locked(folder), storage_errors():
        _begin(setup, folder, str(log.absolute())).brought(few, ())
    return Brought(starts=len(few), left_out=left_out)


def _begin(setup: Setup, folder: Path, source: str) -> Study:
    """The study of a new run that begins with what `source` has found; ConfigError if it has begun."""
    run.check_folder(setup, folder)
    study = open_study(folder, setup.config.search.storage, create=True)
    study.bring_from(source)
    study.begin(setup.identity, setup.about())
    return study


class _Scored(NamedTuple):
    """The scores of an image, the digest of its pixels, and its number in the old panel."""

    scores: Mapping[str, float]
    digest: str
    before: int


class _Known:
    """Which scores of an earlier run hold in a new one, and for which of its images."""

    def __init__(self, before: Study, setup: Setup, folder: Path) -> None:
        title = folder.absolute().name
        old, new = before.identity, setup.identity
        if not old:
            raise ConfigError(f"{title}: the run has not begun yet")
        self.title, self._folder = title, folder
        self._takes_scores = setup.comparer is None
        # Payloads of the images that are not of the new panel, whose numbers follow.
        self.foreign: list[str] = []
        self.n_scores = self.n_of_panel = self.n_rescored = 0
        self._panel = [Prompt.from_dict(prompt) for prompt in before.about["panel"]]
        self._scorers, self._only = setup.scorers, setup.only
        self._kept = [name for name in setup.scorers if _is_same_scorer(name, old, new)]
        same = old["backend"] == new["backend"] and _files(old, "backend.") == _files(
            new, "backend."
        )
        is_same = same and _has_plugins(old, new)
        self._items = {_picture(p): p.index for p in setup.panel} if is_same else {}
        self._n_panel = len(setup.panel)

    def shares_images(self, result: Result) -> bool:
        """Whether the result has scores of images that other merges were shown too."""
        return any(index < len(self._panel) for index in result.scores)

    def scores(self, result: Result) -> dict[int, _Scored]:
        """Image of the new run -> its scores, of those that can be had."""
        found = {
            index: {n: s for n, s in scores.items() if n in self._kept or n.startswith(JUNK)}
            for index, scores in result.scores.items()
            if index < len(self._panel) and self._takes_scores
        }
        missing = {n: judge for n, judge in self._scorers.items() if n not in self._kept}
        if missing:
            samples = [sample for index in found if (sample := self._sample(result, index))]
            again = judging.score(missing, samples, self._only) if samples else []
            found = {
                sample.prompt.index: {**found[sample.prompt.index], **scores}
                for sample, scores in zip(samples, again, strict=True)
            }
            self.n_rescored += len(found)
        self.n_scores += len(found)
        named = {
            self._item(self._panel[i]): _Scored(scores, result.images[i], i)
            for i, scores in found.items()
        }
        self.n_of_panel += sum(item < self._n_panel for item in named)
        return named

    def _sample(self, result: Result, index: int) -> Sample | None:
        """The picture of an image, if it was kept and is still what it was."""
        image = album.read(self._folder, result, index)
        return Sample(image, self._panel[index]) if image else None

    def _item(self, prompt: Prompt) -> int:
        key = _picture(prompt)
        if key not in self._items:
            self._items[key] = self._n_panel + len(self.foreign)
            self.foreign.append(f"{prompt.payload} of {self.title}")
        return self._items[key]


def _picture(prompt: Prompt) -> str:
    """All that makes the image of a prompt."""
    told = prompt.to_dict()
    return json.dumps([told[key] for key in sorted(told.keys() - {"index", "payload", "weight"})])


def _is_same_scorer(name: str, old: _Identity, new: _Identity) -> bool:
    """Whether a scorer of the new run gave scores in the old one; its share in the mean may differ."""
    options = [
        {key: value for key, value in one["scorers"].get(name, {}).items() if key != "weight"}
        for one in (old, new)
    ]
    start = f"scorers.{name}."
    return (
        name in old["scorers"]
        and options[0] == options[1]
        and _files(old, start) == _files(new, start)
        and _has_plugins(old, new)
    )


def _files(identity: _Identity, start: str) -> dict[str, str]:
    return {key: digest for key, digest in identity["files"].items() if key.startswith(start)}


def _has_plugins(old: _Identity, new: _Identity) -> bool:
    """Whether the new run has every plugin of the old one as it was."""
    return set(_files(old, "plugins.").values()) <= set(_files(new, "plugins.").values())


def _misfit(recipe: Recipe, setup: Setup) -> str:
    """Why a merge is none that the new search could propose; nothing if it is one."""
    if [m.sha256 for m in recipe.models] != [m.sha256 for m in setup.merger.references()]:
        return "their models are others"
    merge = setup.config.merge
    if (recipe.precision, recipe.clip, recipe.seed) != (merge.precision, merge.clip, merge.seed):
        return "their precision, clipping or seed of merging is another"
    if setup.params(recipe) is None:
        return "they are outside the space of the new search"
    return ""


def _take_baseline(
    new: Study,
    setup: Setup,
    result: Result,
    found: Mapping[int, _Scored],
    pictures: Path,
    folder: Path,
) -> dict[int, _Scored]:
    """Take a baseline's images of the panel as the new run's own; the others are returned."""
    trial = new.book("baseline", result.name, setup.baseline(result.name))
    kept = album.folder_of(folder, "baseline", result.name)
    kept.mkdir(parents=True, exist_ok=True)
    others = dict(found)
    for item in sorted(found.keys() & {prompt.index for prompt in setup.panel}):
        scored = others.pop(item)
        if picture := album.find(pictures, scored.before):
            name = picture.name.removeprefix(f"{scored.before:03}")
            shutil.copy2(picture, kept / f"{item:03}{name}")
        trial.record(item, scored.scores, scored.digest)
    return others


def _best_of(old: Path, before: Study, setup: Setup) -> list[Params]:
    """The merges that the old run recommends, as near to them as the new space comes."""
    outcome = read_outcome(old, before)
    few = outcome.candidates or ((outcome.leader,) if outcome.leader else ())
    models = [m.sha256 for m in setup.merger.references()]
    return [
        _nearest(result.recipe, setup)
        for result in few[:_N_STARTS]
        if [m.sha256 for m in result.recipe.models] == models
    ]


def _nearest(recipe: Recipe, setup: Setup) -> Params:
    """The merge of the new search that is nearest to a recipe, by its method if that is one of them."""
    flat = {
        name: recipe.weights[weight][block]
        for name, (weight, block) in setup.space.names.items()
        if name not in setup.space.frozen and block in recipe.weights.get(weight, {})
    }
    plan = setup.plan
    values = space.start(setup.space, setup.merger.architecture, flat, "start")
    near = {n: min(high, max(low, values[n])) for n, (low, high) in plan.bounds.items()}
    chosen = {n: recipe.method if recipe.method in k else k[0] for n, k in plan.choices.items()}
    return {**near, **chosen}


def _lines(log: Path, setup: Setup) -> Iterator[tuple[dict[str, float], float]]:
    """The weights that vary in the new search, by name, and the score of each line."""
    own = {weight for weight, _ in setup.space.names.values()}
    names = {
        alias: f"{block}_{weight}"
        for weight in ("alpha", "beta")
        for alias, block in short_names(weight, setup.merger.architecture).items()
    }
    try:
        lines = log.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{log}: cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            target = float(entry["target"])
            # Weights of a group share a value under their names, joined.
            params = {
                names[part]: float(value)
                for key, value in entry["params"].items()
                for part in key.split("-")
            }
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ConfigError(
                f"{log}, line {number}: not a trial of sd-webui-bayesian-merger's optimiser bayes, "
                f'which is {{"target": 0.5, "params": {{"block_0_alpha": 0.3, ...}}}} ({error})'
            ) from error
        yield (
            {
                name: value
                for name, value in params.items()
                if name.rpartition("_")[2] in own
                and name in setup.space.names
                and name not in setup.space.frozen
            },
            target,
        )
