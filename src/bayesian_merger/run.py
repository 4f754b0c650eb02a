"""One trial, and the loop around it.

config -> space -> ask -> merge -> generate -> score -> tell -> report
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from bayesian_merger import config as configuration
from bayesian_merger import methods, plots, prompts, report, space
from bayesian_merger.backends import Backend, backend
from bayesian_merger.checkpoint import Checkpoint, whole_file
from bayesian_merger.config import Config
from bayesian_merger.data import Model, Outcome, Prompt, Recipe, Result, Sample, Weights
from bayesian_merger.errors import ConfigError, MergerError, RunError, TrialError
from bayesian_merger.merge import Merger, even_weights
from bayesian_merger.recipes import to_toml
from bayesian_merger.registry import import_file
from bayesian_merger.scorers import Scorer, scorer
from bayesian_merger.study import Plan, Study, Trial
from bayesian_merger.values import Yardstick

BASELINES = {"a": 0.0, "even": 0.5, "b": 1.0}
_FAILURES_IN_A_ROW = 3
_REPORT_EVERY_S = 60.0
_T = TypeVar("_T")


class Observer(Protocol):
    """Is told how the run goes on; the library itself prints nothing."""

    def planned(self, images: int, trials: int) -> None:
        """The run will have made so many images and trials when it is done."""
        ...

    def started(self, stage: str, name: str, images: int) -> None:
        """A recipe is being judged on so many images."""
        ...

    def judged(self, images: int, made: bool) -> None:
        """Scores of so many more images stand; `made` now, or by an earlier start of the run."""
        ...

    def finished(self, result: Result, leader: Result | None) -> None:
        """A recipe was judged or failed; `leader` is the best trial so far."""
        ...

    def noted(self, text: str) -> None:
        """Something that the user should know."""
        ...


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, opened and checked."""

    config: Config
    title: str
    merger: Merger
    plan: Plan
    panel: tuple[Prompt, ...]
    select_panel: tuple[Prompt, ...]
    heldout_panel: tuple[Prompt, ...]
    backend: Backend
    scorers: Mapping[str, Scorer]
    weights: Mapping[str, float]
    warnings: tuple[str, ...]

    def recipe(self, weights: Weights) -> Recipe:
        """The recipe of the configured method with `weights`."""
        merge = self.config.merge
        return Recipe(
            method=merge.method,
            architecture=self.merger.architecture.name,
            models=self.merger.references(),
            weights=weights,
            vae=merge.vae,
            precision=merge.precision,
        )

    def baseline(self, name: str) -> Recipe:
        """Model A, model B, or the merge with every weight at one half."""
        method = self.config.merge.method if name == "even" else "weighted_sum"
        weights = even_weights(method, self.merger.architecture, BASELINES[name])
        return replace(self.recipe(weights), method=method)

    def n_images(self) -> int:
        """Images of the whole run."""
        search, heldout = self.config.search, self.config.heldout
        trials = search.init_points + search.n_iters
        return (
            len(self.panel) * (len(BASELINES) + trials)
            + len(self.select_panel) * min(heldout.candidates, trials)
            + len(self.heldout_panel) * (len(BASELINES) + 1)
        )

    def identity(self) -> dict[str, Any]:
        """What must not change between two starts of one run."""
        plain = configuration.as_plain(self.config)
        options = {k: v for k, v in plain["backend"].items() if k not in ("device", "batch")}
        search = {
            k: plain["search"][k] for k in ("optimiser", "seed", "freeze", "ranges", "groups")
        }
        merge = {k: plain["merge"][k] for k in ("method", "vae", "precision")}
        panels = {
            "panel": self.panel,
            "select_panel": self.select_panel,
            "heldout_panel": self.heldout_panel,
        }
        return {
            "models": {
                letter: model.sha256
                for letter, model in zip("abc", self.merger.references(), strict=False)
            },
            "merge": merge,
            "search": search,
            "backend": options,
            "scorers": plain["scorers"],
            **{name: {str(p.index): p.to_dict() for p in panel} for name, panel in panels.items()},
        }


def prepare(config: Config, folder: Path, title: str) -> Setup:
    """`config` with everything it names opened and checked; paths of payloads are below `folder`.

    ConfigError with every mistake found, one on a line; nothing is written.
    """
    mistakes: list[str] = []

    def attempt(step: Callable[[], _T]) -> _T | None:
        try:
            return step()
        except MergerError as error:
            mistakes.append(str(error))
            return None

    for plugin in config.plugins:
        attempt(partial(import_file, plugin))
    merger = attempt(lambda: _open_models(config))
    plan = attempt(lambda: _plan(config, merger)) if merger else None
    panels = attempt(lambda: _panels(config, folder))
    weights = {name: chosen.weight for name, chosen in config.scorers.items()}
    scorers = {
        name: attempt(partial(scorer.build, name, chosen.options))
        for name, chosen in config.scorers.items()
    }
    engine = attempt(lambda: backend.build(config.backend.name, config.backend.options))
    warnings = attempt(lambda: engine.check(panels[0])) if engine and panels else None
    if mistakes or not (merger and plan and panels and engine):
        raise ConfigError("\n".join(mistakes))
    return Setup(
        config, title, merger, plan, *panels, engine, scorers, weights, tuple(warnings or ())
    )


def judge(
    trial: Trial, panel: Sequence[Prompt], setup: Setup, observer: Observer, keep: Path | None
) -> None:
    """One trial: merge, generate, score, image by image; what the trial has is not made again.

    Images go to the folder `keep`, if given, before their scores are stored. TrialError if the
    merge, an image or a score is not to be had.
    """
    # The panel is cut at the same places whatever is missing, so that each image repeats exactly.
    batches = list(_batches(panel, setup.backend.batch))
    observer.judged(sum(p.index in trial.scores for p in panel), made=False)
    todo = [batch for batch in batches if any(p.index not in trial.scores for p in batch)]
    if not todo:
        return
    start = time.monotonic()
    setup.backend.load(trial.recipe, setup.merger.merge(trial.recipe))
    trial.spend(merge=time.monotonic() - start)
    for batch in todo:
        start = time.monotonic()
        samples = list(setup.backend.generate(batch))
        generated = time.monotonic()
        scores = _score(setup.scorers, samples)
        scored = time.monotonic()
        fresh = 0
        for sample, found in zip(samples, scores, strict=True):
            if sample.prompt.index not in trial.scores:
                if keep:
                    _save_image(sample, keep / f"{sample.prompt.index:03}.png")
                trial.record(sample.prompt.index, found, _digest(sample))
                fresh += 1
        trial.spend(generate=generated - start, score=scored - generated)
        observer.judged(fresh, made=True)


@dataclass(frozen=True)
class TryOut:
    """What one merge and one image took, in seconds, with the first image's scores.

    `images` and `trials` are those of the whole run, `run_s` its estimated time.
    """

    merge_s: float
    image_s: float
    scores: Mapping[str, float]
    images: int
    trials: int

    @property
    def run_s(self) -> float:
        return self.images * self.image_s + self.trials * self.merge_s


def try_out(setup: Setup) -> TryOut:
    """One merge, one batch of images, their scores; TrialError if any is not to be had."""
    recipe = setup.baseline("even")
    # The first merge also builds the live model, so it is not the one that is timed.
    setup.backend.load(recipe, setup.merger.merge(recipe))
    start = time.monotonic()
    setup.backend.load(recipe, setup.merger.merge(recipe))
    merged = time.monotonic()
    batch = setup.panel[: setup.backend.batch]
    scores = _score(setup.scorers, list(setup.backend.generate(batch)))
    per_image = (time.monotonic() - merged) / len(batch)
    trials = _n_trials(setup.config) + 2 * len(BASELINES) + 1 + setup.config.heldout.candidates
    return TryOut(merged - start, per_image, scores[0], setup.n_images(), trials)


def check_folder(setup: Setup, folder: Path) -> None:
    """ConfigError or CheckpointError if `setup` cannot run in `folder`: another run's, or no space."""
    if (folder / "study.db").is_file():
        open_study(folder).require_same(setup.identity())
    if setup.config.output.save_best:
        setup.merger.merge(setup.baseline("a")).require_space(folder / "best.safetensors")


def run(setup: Setup, folder: Path, observer: Observer) -> Outcome:
    """The whole run in `folder`, from wherever an earlier start of it ended.

    RunError if it cannot go on, ConfigError if the folder belongs to another configuration.
    """
    with _locked(folder):
        for stale in folder.rglob(".*.part"):  # a killed process leaves what it was writing
            stale.unlink()
        check_folder(setup, folder)
        study = open_study(folder, create=True)
        study.begin(setup.identity(), _about(setup))
        observer.planned(setup.n_images(), _n_trials(setup.config))
        for warning in setup.warnings:
            observer.noted(warning)

        yardstick = _baselines(study, setup, folder, observer)
        _search(study, setup, yardstick, folder, observer)
        _confirm(study, setup, yardstick, folder, observer)

        outcome = read_outcome(folder, study)
        assert outcome.best is not None
        if setup.config.output.save_best:
            setup.merger.merge(outcome.best.recipe).save(folder / "best.safetensors")
        write_outcome(outcome, folder, setup.merger.references())
        return outcome


def _baselines(study: Study, setup: Setup, folder: Path, observer: Observer) -> Yardstick:
    """Judge A, the even merge and B; they set the scale of the values and anchor the search."""
    trials = [study.book("baseline", name, setup.baseline(name)) for name in BASELINES]
    for trial in trials:
        observer.started("baseline", trial.name, len(setup.panel))
        _must(trial, setup.panel, setup, observer, folder)
        _require_change(trial.result(), [t.result() for t in trials], setup.plan)
    yardstick = Yardstick.from_baselines(setup.weights, [t.result() for t in trials])
    for trial in trials:
        if not trial.is_complete:
            trial.complete(yardstick.estimate(trial.result(), setup.panel))
        study.observe(trial.result(), setup.plan)
        observer.finished(trial.result(), None)
    return yardstick


def _search(
    study: Study, setup: Setup, yardstick: Yardstick, folder: Path, observer: Observer
) -> None:
    """Ask, judge, tell, until the trials are spent; a failed trial only has no value."""
    failures = 0
    reported = -math.inf
    while _n_finished(study) < _n_trials(setup.config):
        start = time.monotonic()
        trial = study.ask(setup.plan, setup.recipe)
        trial.spend(ask=time.monotonic() - start)
        observer.started(trial.stage, trial.name, len(setup.panel))
        keep = (
            _pictures(folder, trial.stage, trial.name) if setup.config.output.save_imgs else None
        )
        before = leader(study.searched())
        try:
            judge(trial, setup.panel, setup, observer, keep)
        except TrialError as error:
            trial.fail(str(error))
            failures += 1
            if failures >= _FAILURES_IN_A_ROW:
                raise RunError(
                    f"{failures} trials in a row failed, the last with: {error}"
                ) from error
        else:
            failures = 0
            others = [*study.judged("baseline"), *study.searched()]
            _require_change(trial.result(), others, setup.plan)
            trial.complete(yardstick.estimate(trial.result(), setup.panel))
        best = leader(study.searched())
        observer.finished(trial.result(), best)
        if best is not None and (before is None or best.number != before.number):
            _write_recipe(best.recipe, folder, setup.merger.references())
        if time.monotonic() - reported > _REPORT_EVERY_S:
            write_outcome(read_outcome(folder, study), folder, setup.merger.references())
            reported = time.monotonic()


def _confirm(
    study: Study, setup: Setup, yardstick: Yardstick, folder: Path, observer: Observer
) -> None:
    """Choose the best of the few best on fresh seeds, then measure it against the baselines on others.

    The luckiest trial wins a search, so its own score flatters it; seeds that no choice was made on
    do not.
    """
    complete = [r for r in study.searched() if r.state == "complete" and r.value]
    if not complete:
        raise RunError("no trial was completed, so there is no merge to confirm")
    complete.sort(key=_mean, reverse=True)
    chosen = {r.recipe.digest(): r for r in reversed(complete)}
    candidates = sorted(chosen.values(), key=_mean, reverse=True)[
        : setup.config.heldout.candidates
    ]
    selected = []
    for candidate in candidates:
        trial = study.book("select", candidate.name, candidate.recipe)
        observer.started("select", trial.name, len(setup.select_panel))
        _must(trial, setup.select_panel, setup, observer, None)
        if not trial.is_complete:
            trial.complete(yardstick.estimate(trial.result(), setup.select_panel))
        observer.finished(trial.result(), None)
        selected.append(trial.result())
    best = max(selected, key=_mean)
    recipes = {name: setup.baseline(name) for name in BASELINES} | {best.name: best.recipe}
    for name, recipe in recipes.items():
        trial = study.book("heldout", name, recipe)
        observer.started("heldout", name, len(setup.heldout_panel))
        _must(trial, setup.heldout_panel, setup, observer, folder)
        if not trial.is_complete:
            trial.complete(yardstick.estimate(trial.result(), setup.heldout_panel))
        observer.finished(trial.result(), None)


def _must(
    trial: Trial, panel: Sequence[Prompt], setup: Setup, observer: Observer, folder: Path | None
) -> None:
    """Judge a recipe that the run cannot do without; RunError if it fails."""
    keep = _pictures(folder, trial.stage, trial.name) if folder else None
    try:
        judge(trial, panel, setup, observer, keep)
    except TrialError as error:
        trial.fail(str(error))
        raise RunError(f"{trial.stage} {trial.name} cannot be judged: {error}") from error


def _require_change(result: Result, others: Sequence[Result], plan: Plan) -> None:
    """RunError if another merge, of clearly other weights, has made the very same images."""
    for other in others:
        same = result.images and dict(result.images) == dict(other.images)
        if same and _distance(result, other, plan) > 0.1:
            raise RunError(
                f"{other.name} and {result.name} have different weights, but all their images are the "
                f"same: A and B are alike in what is searched, or the back end does not load the merge"
            )


def _distance(one: Result, other: Result, plan: Plan) -> float:
    """Mean difference of the searched weights; models count as wholly different ones."""
    if one.recipe.method != other.recipe.method:
        return float(one.recipe.digest() != other.recipe.digest())
    searched = [plan.space.names[member] for p in plan.space.parameters for member in p.members]
    apart = [abs(one.recipe.weights[w][b] - other.recipe.weights[w][b]) for w, b in searched]
    return sum(apart) / len(apart)


def leader(results: Sequence[Result]) -> Result | None:
    """The complete trial with the highest value, or None."""
    complete = [r for r in results if r.state == "complete" and r.value]
    return max(complete, key=_mean) if complete else None


def _mean(result: Result) -> float:
    assert result.value is not None
    return result.value.mean


def open_study(folder: Path, *, create: bool = False) -> Study:
    """The study in the run folder; ConfigError if there is none and `create` is not set."""
    path = folder / "study.db"
    if not create and not path.is_file():
        raise ConfigError(f"{folder}: not a run folder (it has no study.db)")
    folder.mkdir(parents=True, exist_ok=True)
    return Study(f"sqlite:///{path.absolute().as_posix()}")


def read_outcome(folder: Path, study: Study) -> Outcome:
    """The run in `folder` as it stands, from the study alone."""
    about = study.about
    if not about:
        raise ConfigError(f"{folder}: the run has not begun yet")
    baselines, searched = study.judged("baseline"), study.searched()
    panels = {
        name: tuple(Prompt.from_dict(p) for p in about[name])
        for name in ("panel", "heldout_panel")
    }
    selected = [r for r in study.judged("select") if r.state == "complete"]
    best = max(selected, key=_mean) if selected else None
    confirmed = [r for r in study.judged("heldout") if r.state == "complete"]
    judged = {r.name: r for r in confirmed if r.name in BASELINES}
    for result in confirmed:
        if best is not None and result.recipe.digest() == best.recipe.digest():
            judged["best"] = result
    finished = len(judged) == len(BASELINES) + 1
    gain = {}
    if finished:
        yardstick = Yardstick.from_baselines(about["weights"], baselines)
        gain = {
            f"over_{name}": yardstick.difference(
                judged["best"], judged[name], panels["heldout_panel"]
            )
            for name in sorted(BASELINES)
        }
    everything = [*baselines, *searched, *study.judged("select"), *study.judged("heldout")]
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
        selected=tuple(selected),
        leader=leader(searched),
        best=best if finished else None,
        heldout={name: r.value for name, r in sorted(judged.items()) if r.value and finished},
        gain=gain,
        pictures={key: _saved(_pictures(folder, stage, name)) for key, name in names.items()},
        images=sum(len(result.scores) for result in everything),
        seconds=seconds,
        finished=finished,
    )


def write_outcome(outcome: Outcome, folder: Path, models: Sequence[Model] = ()) -> None:
    """result.json, report.html, the figures and the best recipe so far, each written whole."""
    _write(folder / "result.json", json.dumps(report.result_json(outcome), indent=2) + "\n")
    plots.save(plots.convergence(outcome), folder / "convergence.png")
    found = outcome.best or outcome.leader
    if found is not None:
        weights = next(iter(found.recipe.weights.values()))
        names = (outcome.models[0], outcome.models[1])
        plots.save(plots.unet(weights, blocks=outcome.blocks, names=names), folder / "unet.png")
        if models:
            _write_recipe(found.recipe, folder, models)
    _write(folder / "report.html", report.html(outcome))


def _write_recipe(recipe: Recipe, folder: Path, models: Sequence[Model]) -> None:
    with whole_file(folder / "best.toml") as file:
        file.write(to_toml(recipe, {m.sha256: m.path for m in models}).encode())
    _write(folder / "best.log", report.best_log(recipe))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())


def _open_models(config: Config) -> Merger:
    chosen = config.models
    method = methods.method.get(config.merge.method)
    paths = [path for path in (chosen.a, chosen.b, chosen.c) if path is not None]
    needed = methods.n_models(method)
    if len(paths) < needed:
        raise ConfigError(
            f"merge.method {config.merge.method!r} merges {needed} models; name the third as models.c"
        )
    merger = Merger([Checkpoint(path) for path in paths[:needed]], config.merge.device)
    first, second, *_ = merger.references()
    if first.sha256 == second.sha256:
        raise ConfigError(f"models.a and models.b are the same file ({first.name}, {second.name})")
    return merger


def _plan(config: Config, merger: Merger) -> Plan:
    search = config.search
    if search.init_points + search.n_iters < 1:
        raise ConfigError("search.init_points and search.n_iters are both 0, so there is no trial")
    found = space.build(
        list(methods.weights(methods.method.get(config.merge.method))),
        merger.architecture,
        freeze=search.freeze,
        ranges=search.ranges,
        groups=search.groups,
    )
    return Plan(found, search.optimiser, search.init_points, search.seed)


def _panels(
    config: Config, folder: Path
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...], tuple[Prompt, ...]]:
    """The panel of the search and the two of the confirmation, whose seeds the search never sees."""
    payloads = prompts.read_payloads(config.payload_files(folder), config.panel.defaults)
    wildcards = prompts.read_wildcards(config.panel.wildcards_dir)
    per_round = prompts.n_images(payloads)
    seed = config.search.seed

    def fresh(name: str, images: int) -> tuple[Prompt, ...]:
        rounds = math.ceil(images / per_round)
        return prompts.draw_panel(
            payloads, wildcards, rounds=rounds, seed=f"{seed}/{name}", fresh=True
        )

    return (
        prompts.draw_panel(
            payloads, wildcards, rounds=config.panel.batch_size, seed=f"{seed}/panel"
        ),
        fresh("select", config.heldout.select_images),
        fresh("heldout", config.heldout.images),
    )


def _about(setup: Setup) -> dict[str, Any]:
    return {
        "title": setup.title,
        "blocks": setup.merger.architecture.blocks,
        "models": [Path(model.name).stem for model in setup.merger.references()],
        "config": configuration.as_plain(setup.config),
        "weights": dict(setup.weights),
        "panel": [p.to_dict() for p in setup.panel],
        "heldout_panel": [p.to_dict() for p in setup.heldout_panel],
    }


def _n_trials(config: Config) -> int:
    return config.search.init_points + config.search.n_iters


def _n_finished(study: Study) -> int:
    return sum(result.state != "running" for result in study.searched())


def _score(scorers: Mapping[str, Scorer], samples: Sequence[Sample]) -> list[dict[str, float]]:
    """The scores of each sample; TrialError for a scorer that returns anything but finite numbers."""
    table: list[dict[str, float]] = [{} for _ in samples]
    for name, judge_of in scorers.items():
        scores = judge_of(samples)
        if len(scores) != len(samples):
            raise TrialError(f"scorer {name} gave {len(scores)} scores for {len(samples)} images")
        for row, score in zip(table, scores, strict=True):
            if not math.isfinite(score):
                raise TrialError(f"scorer {name} gave {score}")
            row[name] = float(score)
    return table


def _batches(panel: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(panel), size):
        yield panel[start : start + size]


def _digest(sample: Sample) -> str:
    return hashlib.sha256(sample.image.tobytes()).hexdigest()[:16]


def _pictures(folder: Path, stage: str, name: str) -> Path:
    return folder / "images" / stage / name.replace(" ", "-")


def _saved(folder: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in sorted(folder.glob("*.png")) if path.stem.isdigit()}


def _save_image(sample: Sample, path: Path) -> None:
    with whole_file(path) as file:
        sample.image.save(file, format="PNG")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the run folder; RunError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{folder}: another process is running here; wait for it or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()
