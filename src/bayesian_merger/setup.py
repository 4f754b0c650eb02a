"""A configuration -> everything that a run needs, opened and checked before time is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bayesian_merger import config as configuration
from bayesian_merger import curves, devices, metadata, methods, prompts, space
from bayesian_merger import guide as guides
from bayesian_merger.backends import Backend, Differentiable, Particular, backend
from bayesian_merger.blocks import Architecture
from bayesian_merger.checkpoint import sha256_of
from bayesian_merger.config import Config
from bayesian_merger.data import RIVALS, Prompt, Recipe, Weights
from bayesian_merger.errors import ConfigError, MergerError, TrialError
from bayesian_merger.merge import Merger, even_weights, n_used, open_model
from bayesian_merger.registry import import_file, module_of, nearest
from bayesian_merger.scorers import About, Comparing, DifferentiableScorer, Scorer, scorer
from bayesian_merger.server import key_of
from bayesian_merger.space import Parameter, Space
from bayesian_merger.spread import Spread
from bayesian_merger.study.proposals import FRESH, Objective, Params, Plan, Stop
from bayesian_merger.values import Measure, shares

METHOD = "method"
BASELINES = {"a": 0.0, "even": 0.5, "b": 1.0}
# Options that a resumed run may have otherwise: where, how many at once, how long, not what is made.
_MAY_CHANGE = ("device", "batch", "timeout_s", "start_timeout_s", "undo_s")
_WHERE = ("url", "models_dir", "extension", "timeout_s", "wait_for_server", "auth_env", "verify")
_MOST_IMAGES = 10_000
_USUAL_IMAGES = 500
# How much of the other a merge beside A or B has.
_BESIDE = 0.2
_FOLLOWS = (
    "the score can be differentiated, so the search follows its gradient; "
    "search.optimiser = 'bayes' does without"
)
_LEADS = "by pairs a value is the lead over the even merge: 1 wins 73 % of pairs, 2 wins 88 %"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, opened and checked; relative paths are below `folder`.

    `only` holds, of scorers that do not judge all images, the payloads of those that they do.
    """

    config: Config
    folder: Path
    title: str
    merger: Merger
    space: Space
    plan: Plan
    panel: tuple[Prompt, ...]
    select_panel: tuple[Prompt, ...]
    heldout_panel: tuple[Prompt, ...]
    backend: Backend
    scorers: Mapping[str, Scorer]
    measure: Measure
    only: Mapping[str, frozenset[str]]
    warnings: tuple[str, ...]
    fresh: Callable[[int], Prompt]

    @property
    def rigid(self) -> list[str]:
        """What of the images and their scores cannot be differentiated."""
        return _rigid(self.config, self.backend, self.scorers)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the run."""
        if self.plan.optimiser == "gradient" != self.config.search.optimiser:
            return (*self.warnings, _FOLLOWS)
        return (*self.warnings, _LEADS) if self.comparer else self.warnings

    @property
    def follows_even(self) -> bool:
        """Whether the baseline where a search by the gradient begins is followed too.

        Several scores have no common measure before the baselines, and the panel has as many images of
        a payload that counts little as of others.
        """
        n_weights = len({prompt.weight for prompt in self.panel if prompt.weight > 0})
        is_plain = self.measure.norm == "none" and len(self.scorers) == n_weights == 1
        return self.plan.optimiser == "gradient" and is_plain

    @property
    def comparer(self) -> Comparing | None:
        """The scorer that chooses between two pictures, where pairs stand in place of scores."""
        return _comparer(self.scorers)

    def judges(self, prompt: Prompt) -> list[str]:
        """The scorers of an image."""
        return judges(self.scorers, self.only, prompt)

    def prompt(self, item: int) -> Prompt:
        """An image of the panel, or from FRESH on one beside it."""
        return self.fresh(item - FRESH) if item >= FRESH else self.panel[item]

    def judged_on(self, stage: str, item: int) -> Prompt:
        """An image of the panel of a stage."""
        panels = {"select": self.select_panel, "heldout": self.heldout_panel}
        if panel := panels.get(stage):
            return next(prompt for prompt in panel if prompt.index == item)
        return self.prompt(item)

    def recipe(self, params: Params) -> Recipe:
        """The recipe that the parameters of the search give."""
        method = params.get(METHOD, self.config.merge.method)
        return _recipe(self.config.merge, self.merger, method, self.space.weights(params))

    def params(self, recipe: Recipe) -> dict[str, Any] | None:
        """The parameters that give a merge of these models, or None if the search has none for it."""
        known = _methods(self.config)
        if recipe.method not in known or recipe.vae != self.config.merge.vae:
            return None
        # A weight that the method does not have may be anything.
        middle = self.space.weights(
            {n: (low + high) / 2 for n, (low, high) in self.plan.bounds.items()}
        )
        values = self.space.values({**middle, **recipe.weights})
        if values is None:
            return None
        return {**values, METHOD: recipe.method} if len(known) > 1 else dict(values)

    def baseline(self, name: str) -> Recipe:
        """Model A, model B, each with its own VAE, or the merge with every weight at one half."""
        merge = self.config.merge
        method, vae = merge.method, str(merge.vae)
        if name != "even":
            method = "weighted_sum"
            # A VAE that is searched has a weight, by which a parent's is merged too.
            if "VAE" in self.space.blocks:
                vae = "a"
            elif self.merger.has_other_vae_in_b:
                vae = name
        # Two of three models may share blocks that all three do not.
        blocks = dict.fromkeys((*self.merger.architecture.blocks, *self.space.blocks))
        weights = even_weights(method, blocks, BASELINES[name])
        return replace(_recipe(merge, self.merger, method, weights), vae=vae)

    def beside(self, parent: str) -> dict[str, float] | None:
        """The parameters of model A, or B, with a little of the other, as far as the ranges go.

        None where the weights do not lead from A to B.
        """
        if self.config.merge.method != "weighted_sum" or self.plan.choices:
            return None
        share = abs(BASELINES[parent] - _BESIDE)
        return {n: min(max(share, low), high) for n, (low, high) in self.plan.bounds.items()}

    def extremes(self) -> list[Recipe]:
        """Merges at both ends of all ranges, by each method."""
        found = []
        for method in _methods(self.config):
            for end in (0, 1):
                flat: dict[str, Any] = {name: pair[end] for name, pair in self.plan.bounds.items()}
                found.append(self.recipe({**flat, METHOD: method}))
        return found

    def n_images(self) -> int:
        """Images of the whole run."""
        candidates = self.config.heldout.candidates
        return (
            len(self.panel) * len(BASELINES)
            + self.plan.n_images
            + len(self.select_panel) * (candidates if candidates > 1 else 0)
            + len(self.heldout_panel) * (len(BASELINES) + 1)
        )

    def n_questions(self) -> int:
        """How often a person is asked in the whole run, if no trial fails: of an image, or of a pair."""
        if not self.comparer:
            return self.n_images()
        panel, select, heldout = (
            sum(prompt.weight > 0 for prompt in prompts)
            for prompts in (self.panel, self.select_panel, self.heldout_panel)
        )
        return (
            panel * (len(BASELINES) - 1)
            + self.plan.n_images
            + select * (self.config.heldout.candidates - 1)
            + heldout * len(BASELINES)
        )

    def about(self) -> dict[str, Any]:
        """What a report of the run needs to know beside its trials."""
        return {
            "title": self.title,
            "blocks": self.space.blocks,
            "models": [Path(model.name).stem for model in self.merger.references()],
            "config": configuration.as_plain(self.config),
            "measure": asdict(self.measure),
            "by_pairs": self.comparer is not None,
            "zero": self._zero,
            "trials": self.plan.n_trials,
            "panel": [p.to_dict() for p in self.panel],
            "select_panel": [p.to_dict() for p in self.select_panel],
            "heldout_panel": [p.to_dict() for p in self.heldout_panel],
        }

    @property
    def _zero(self) -> str:
        """By pairs, what the search expects a merge's lead over."""
        # As the search orders what it can propose.
        known = [n for n in ("even", "a", "b") if self.params(self.baseline(n)) is not None]
        return RIVALS[f"over_{known[0]}"] if known else "its first trial"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must not change between two starts of one run."""
        plain = configuration.as_plain(self.config)
        backend_options, *scorer_options = (
            {k: v for k, v in options.items() if k not in _MAY_CHANGE}
            for options in (plain["backend"], *plain["scorers"].values())
        )
        backend_options = {k: v for k, v in backend_options.items() if k not in _WHERE}
        names = (
            "options",
            "init",
            "seed",
            "start",
            "methods",
            "presets",
            "smooth",
            "freeze",
            "ranges",
            "groups",
        )
        search = {name: plain["search"][name] for name in names}
        search["optimiser"] = self.plan.optimiser
        merge = {k: plain["merge"][k] for k in ("method", "vae", "precision", "clip", "seed")}
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
            "backend": backend_options,
            "scorers": dict(zip(plain["scorers"], scorer_options, strict=True)),
            "value": plain["value"],
            "guards": plain["guards"],
            "files": {key: sha256_of(path) for key, path in self._files().items()},
            "images": {name: len(panel) for name, panel in panels.items()},
            **{name: {str(p.index): p.to_dict() for p in panel} for name, panel in panels.items()},
        }

    def _files(self) -> dict[str, Path]:
        """The files, beside the models, on which scores depend: plugins, and options' files."""
        engine, chosen = self.config.backend, self.config.scorers
        found = {f"plugins.{i}.{p.name}": p for i, p in enumerate(self.config.plugins)}
        if self.config.search.guide:
            found["search.guide"] = self.config.search.guide
        options = _of_server(engine.options, 0)
        for key, path in backend.files(engine.name, options, self.folder).items():
            found[f"backend.{key}"] = path
        for name, entry in chosen.items():
            for key, path in scorer.files(_kind(name, entry), entry.options, self.folder).items():
                found[f"scorers.{name}.{key}"] = path
        return found


def prepare(config: Config, folder: Path, title: str) -> Setup:
    """`config` with everything it names opened and checked; relative paths are below `folder`.

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
    found = attempt(lambda: _space(config, merger)) if merger else None
    panels = attempt(lambda: _panels(config, folder))
    measure = attempt(lambda: _measure(config))
    only = attempt(lambda: _only(config, panels.search)) if panels else None
    scorers: dict[str, Scorer | None] = {}
    # Nothing is downloaded for a configuration that has mistakes.
    is_sound = not mistakes
    for name, chosen in config.scorers.items():
        kind, options = _kind(name, chosen), chosen.options
        check = partial(scorer.check, kind, options)
        build = partial(scorer.build, kind, options, folder)
        if is_sound:
            scorers[name] = attempt(partial(_of_section, name, kind, build))
        else:
            attempt(partial(_of_section, name, kind, check))
    attempt(lambda: _require_alone(config, scorers, panels.search if panels else ()))
    engine = attempt(lambda: _engine(config, folder))
    plan = (
        attempt(
            lambda: _plan(
                config, found, merger.architecture, panels.search, measure, engine, scorers
            )
        )
        if merger and found and panels and measure
        else None
    )
    warnings = (
        attempt(lambda: _check_backend(engine, merger, panels.search))
        if engine and merger and panels
        else None
    )
    if found and found.inert and warnings is not None:
        blocks = ", ".join(dict.fromkeys(found.names[name][1] for name in sorted(found.inert)))
        warnings.append(f"the models are the same in {blocks}, which the search leaves out")
    if mistakes or not (merger and found and plan and panels and engine and measure):
        if engine:
            engine.close()
        raise ConfigError("\n".join(mistakes))
    built = {name: judge for name, judge in scorers.items() if judge is not None}
    setup = Setup(
        config,
        folder,
        title,
        merger,
        found,
        plan,
        panels.search,
        panels.select,
        panels.heldout,
        engine,
        built,
        measure,
        only or {},
        (*(warnings or ()), *_doubts(measure, built), *_licences(built)),
        panels.fresh,
    )
    for name in BASELINES:
        merger.merge(setup.baseline(name))
    if isinstance(engine, Particular):
        try:
            for recipe in setup.extremes():
                engine.require(recipe, merger.merge(recipe))
        except MergerError:
            setup.backend.close()
            raise
    return setup


def judges(names: Iterable[str], only: Mapping[str, frozenset[str]], prompt: Prompt) -> list[str]:
    """Those of the scorers that judge an image."""
    return [name for name in names if name not in only or prompt.payload in only[name]]


def _kind(name: str, chosen: configuration.Scorer) -> str:
    """Which scorer it is; without a word, that of the name."""
    return chosen.scorer or name


def _of_section(name: str, kind: str, step: Callable[[], _T]) -> _T:
    """What the step gives; its mistakes begin with the section if that is not called as its scorer."""
    try:
        return step()
    except ConfigError as error:
        if name == kind:
            raise
        raise ConfigError(f"[scorers.{name}] {error}") from error


def _measure(config: Config) -> Measure:
    chosen, weights = config.value, {n: one.weight for n, one in config.scorers.items()}
    found = Measure(weights, chosen.normalise, chosen.combine, config.guards.penalties)
    if chosen.combine == "geometric" and chosen.normalise == "zscore":
        raise ConfigError(
            "value.combine is 'geometric', which is for positive numbers, but value.normalise 'zscore' "
            "makes negative ones; set it to 'rank', or leave it out"
        )
    return found


def _only(config: Config, panel: Sequence[Prompt]) -> dict[str, frozenset[str]]:
    """The payloads of scorers that do not judge all; ConfigError where one judges none, or none one."""
    payloads = dict.fromkeys(prompt.payload for prompt in panel)
    found, mistakes = {}, []
    for name, chosen in config.scorers.items():
        if chosen.payloads is not None:
            patterns = chosen.payloads
            found[name] = frozenset(
                p for p in payloads if any(fnmatchcase(p, x) for x in patterns)
            )
            for pattern in patterns:
                if not any(fnmatchcase(payload, pattern) for payload in payloads):
                    hint = nearest(pattern, payloads) or f"; there are: {', '.join(payloads)}"
                    mistakes.append(
                        f"scorers.{name}.payloads: no payload matches {pattern!r}{hint}"
                    )
    for prompt in {prompt.payload: prompt for prompt in panel}.values():
        if not mistakes and not judges(config.scorers, found, prompt):
            mistakes.append(
                f"payload {prompt.payload}: no scorer judges it; add one, or leave it out"
            )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return found


def _comparer(scorers: Mapping[str, Scorer | None]) -> Comparing | None:
    for one in scorers.values():
        if isinstance(one, Comparing) and one.compares:
            return one
    return None


def _require_alone(
    config: Config, scorers: Mapping[str, Scorer | None], panel: Sequence[Prompt]
) -> None:
    """ConfigError if pairs stand in place of scores, but something needs scores."""
    if not _comparer(scorers):
        return
    said = config.value.model_fields_set
    search = config.search
    counted = {prompt.payload: prompt.weight for prompt in panel if prompt.weight > 0}
    weights = ", ".join(f"{payload} {weight:g}" for payload, weight in counted.items())
    reasons = {
        f"payloads differ in score_weight ({weights}), and each pair counts alike; give all one, or 0": (
            len(set(counted.values())) > 1
        ),
        "there are other scorers, whose scores cannot be added to choices": len(scorers) > 1,
        f"value.{min(said, default='')} is for scores": bool(said),
        f"search.objectives {search.objectives!r} is for scores": search.objectives != "mean",
        f"search.optimiser {search.optimiser!r} needs scores; leave it out": (
            search.optimiser not in ("auto", "bayes")
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"a scorer asks for pairs, but {reason}; or ask for marks")


def _doubts(measure: Measure, scorers: Mapping[str, Scorer]) -> list[str]:
    """What of [value] has no effect, or another than may be meant."""
    notes = []
    if measure.norm == "none" and len(scorers) > 1:
        abouts = {name: getattr(one, "about", None) for name, one in scorers.items()}
        ranges = ", ".join(
            f"{name} {about.range}" for name, about in abouts.items() if isinstance(about, About)
        )
        notes.append(
            f"value.normalise is 'none', so scores count as they are"
            f"{f' ({ranges})' if ranges else ''}; that of the wider range counts most"
        )
    if measure.combine != "mean" and len(scorers) == 1:
        notes.append(f"value.combine is {measure.combine!r}, but there is only one scorer")
    elif measure.combine == "minimum" and len({w for w in measure.weights.values() if w}) > 1:
        notes.append("value.combine is 'minimum', for which weights make no difference")
    return notes


def _licences(scorers: Mapping[str, Scorer]) -> list[str]:
    """Which scorers may not be used for everything."""
    notes = []
    for name, one in scorers.items():
        about = getattr(one, "about", None)
        if isinstance(about, About) and about.restricts:
            notes.append(f"scorer {name} has a licence that restricts its use: {about.licence}")
    return notes


def _engine(config: Config, folder: Path) -> Backend:
    """The back end; with a list of addresses one for each, side by side.

    Other options of where and how it is may be lists as well. ConfigError if their lengths differ.
    """
    name, options = config.backend.name, config.backend.options
    urls = options.get("url")
    if not isinstance(urls, list):
        engine: Backend = backend.build(name, options, folder)
        return engine
    for key, value in options.items():
        if key in _WHERE and isinstance(value, list) and len(value) != len(urls):
            raise ConfigError(f"backend.{key} has {len(value)} entries, backend.url {len(urls)}")
    if not urls:
        raise ConfigError("backend.url names no server")
    engines: list[Backend] = []
    try:
        for i in range(len(urls)):
            engines.append(backend.build(name, _of_server(options, i), folder))
        # By now they are addresses.
        if len({key_of(str(url)) for url in urls}) < len(urls):
            raise ConfigError("backend.url names a server twice")
    except MergerError:
        for engine in engines:
            engine.close()
        raise
    return Spread(engines)


def _of_server(options: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The options of one of several servers."""
    if not isinstance(options.get("url"), list):
        return dict(options)
    return {
        key: value[i] if key in _WHERE and isinstance(value, list) else value
        for key, value in options.items()
    }


def _check_backend(engine: Backend, merger: Merger, panel: Sequence[Prompt]) -> list[str]:
    first = merger.models[0]
    shapes = {name: entry.shape for name, entry in first.layout.items()}
    notes = list(merger.notes)
    said, marked = (metadata.prediction(first.layout, m) for m in (first.metadata, {}))
    if said == "v" != marked:
        notes.append(
            f"model A, {first.name}, says that it predicts v, but has no tensor v_pred, by which "
            f"programs know that; if its images are mere noise, set backend.prediction = 'v'"
        )
    return [*notes, *engine.check(panel, merger.architecture.name, shapes)]


def _open_models(config: Config) -> Merger:
    chosen = config.models
    paths = [path for path in (chosen.a, chosen.b, chosen.c) if path is not None]
    needed = 0
    for name in _methods(config):
        method = methods.get(name)
        if len(paths) < methods.n_models(method):
            raise ConfigError(
                f"merge.method {name!r} merges {methods.n_models(method)} models; "
                f"name the third as models.c"
            )
        needed = max(needed, n_used(method, name, len(paths)))
    place = devices.device(config.merge.device, "merge.device", float64=True)
    models, mistakes = [], []
    for path in paths[:needed]:
        try:
            models.append(open_model(path))
        except MergerError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    merger = Merger(models, place)
    merger.require_different()
    return merger


def _space(config: Config, merger: Merger) -> Space:
    search = config.search
    weights: dict[str, float] = {}
    for name in _methods(config):
        own = methods.weights(methods.get(name))
        if not own:
            raise ConfigError(f"merge.method {name!r} has no weights to search")
        weights |= own
    guide = guides.read(search.guide).of(weights) if search.guide else guides.Guide()
    found = space.build(
        list(weights),
        merger.architecture,
        presets=search.presets,
        smooth=search.smooth,
        blocks=merger.blocks,
        parts=merger.parts,
        freeze=search.freeze,
        ranges=search.ranges,
        groups=search.groups,
        guide=guide,
    )
    for name in _methods(config):
        _require_domains(found, name, guide)
    merge = config.merge
    if merge.vae == "b" and "VAE" in found.blocks:
        raise ConfigError(
            "merge.vae is 'b', which copies B's VAE, but search.presets, ranges, freeze or groups name "
            "a weight of the VAE; leave out one"
        )
    inert = _inert(found, config, merger)
    if len(inert) == len(found.parameters):
        raise ConfigError(
            "the models are the same in every block that is searched, so every merge is the same"
        )
    return found.without(inert)


def _methods(config: Config) -> tuple[str, ...]:
    """The merge methods of the search by name; the first is that of the baselines."""
    return tuple(dict.fromkeys([config.merge.method, *config.search.methods]))


def _recipe(merge: configuration.Merge, merger: Merger, method: str, weights: Weights) -> Recipe:
    known = methods.weights(methods.get(method))
    return Recipe(
        method=method,
        architecture=merger.architecture.name,
        models=merger.references(),
        weights={name: blocks for name, blocks in weights.items() if name in known},
        vae=merge.vae,
        precision=merge.precision,
        clip=merge.clip,
        seed=merge.seed,
    )


def _inert(found: Space, config: Config, merger: Merger) -> list[Parameter]:
    """The parameters that make the same merge at their low end, in the middle and at their high end."""
    ends = [
        found.weights({p.name: p.low + share * (p.high - p.low) for p in found.parameters})
        for share in (0.0, 0.5, 1.0)
    ]
    merges = [
        [merger.merge(_recipe(config.merge, merger, method, weights)) for weights in ends]
        for method in _methods(config)
    ]

    def changes(name: str) -> bool:
        try:
            return any(
                not torch.equal(low[name], other[name])
                for low, *others in merges
                for other in others
            )
        except TrialError:  # the first trial tells what is wrong
            return True

    inert = []
    for parameter in found.parameters:
        held = {found.names[member][1] for member in parameter.members}
        places = merger.places.items()
        names = [name for name, place in places if {place.block, place.part} & held]
        if not any(changes(name) for name in names):
            inert.append(parameter)
    return inert


def _starts(config: Config, found: Space, architecture: Architecture) -> list[dict[str, Any]]:
    """The parameters of search.start: presets of the method's first weight, or weights by name."""
    first = next(weight for weight, _ in found.names.values())
    points = []
    for number, wanted in enumerate(config.search.start, start=1):
        chosen = _first_choice(config)
        if isinstance(wanted, str):
            weights = curves.weights(wanted, architecture)
            given = {
                name: weights[block]
                for name, (weight, block) in found.names.items()
                if weight == first and block in weights and name not in found.frozen
            }
        else:
            given = {name: value for name, value in wanted.items() if not isinstance(value, str)}
            chosen |= {name: value for name, value in wanted.items() if isinstance(value, str)}
        point = space.start(found, architecture, given, f"start {number}")
        if isinstance(wanted, str):  # as near to it as the ranges are
            ends = {p.name: (p.low, p.high) for p in found.parameters}
            point = {name: min(max(v, ends[name][0]), ends[name][1]) for name, v in point.items()}
        points.append({**point, **chosen})
    return points


def _choices(config: Config) -> dict[str, tuple[str, ...]]:
    """What the search chooses beside the weights."""
    known = _methods(config)
    return {METHOD: known} if len(known) > 1 else {}


def _first_choice(config: Config) -> dict[str, str]:
    return {name: known[0] for name, known in _choices(config).items()}


def _rigid(
    config: Config, engine: Backend | None, scorers: Mapping[str, Scorer | None]
) -> list[str]:
    """What cannot be differentiated; what could not be built has been told."""
    found = [
        f"scorer {name}"
        for name, one in scorers.items()
        if one and not isinstance(one, DifferentiableScorer)
    ]
    if engine and not isinstance(engine, Differentiable):
        found.insert(0, f"back end {config.backend.name}")
    return found


def _optimiser(
    config: Config, measure: Measure, engine: Backend | None, scorers: Mapping[str, Scorer | None]
) -> str:
    """The optimiser by name, where `auto` leaves the choice; ConfigError for gradient without one."""
    search = config.search
    if search.optimiser not in ("auto", "gradient"):
        return _sampler(search.optimiser, config.plugins)
    reasons = [f"{what} cannot be differentiated" for what in _rigid(config, engine, scorers)]
    if search.optimiser == "auto" and not methods.is_linear(methods.get(config.merge.method)):
        reasons.append(f"method {config.merge.method} is not linear")
    if not measure.is_linear:
        reasons.append("value.combine and value.normalise make no weighted mean of the scores")
    if len(_methods(config)) > 1:
        reasons.append("a choice among search.methods has no slope")
    if search.objectives != "mean":
        reasons.append("search.objectives asks for more than the mean, which is what it follows")
    if not reasons:
        return "gradient"
    if search.optimiser == "auto" and "last" in search.options:
        raise ConfigError(
            f"search.options: 'last' is of the gradient, which does not fit, as {reasons[0]}; "
            f"leave it out"
        )
    if search.optimiser == "gradient":
        raise ConfigError(
            f"search.optimiser 'gradient' does not fit, as {reasons[0]}; choose 'bayes', or 'auto' for "
            f"what fits"
        )
    return "bayes"


def _sampler(name: str, plugins: Sequence[Path]) -> str:
    """The optimiser by a path that can be imported; ConfigError for code that no plugin names.

    A configuration may be a stranger's, and a module runs when it is imported.
    """
    module, _, sampler = name.rpartition(".")
    if module in ("", "optuna.samplers"):
        return name
    for plugin in plugins:
        if plugin.stem == module:
            return f"{module_of(plugin)}.{sampler}"
    raise ConfigError(
        f"search.optimiser: {name!r} is neither optuna.samplers.NAME nor in a plugin; put it into a "
        f"Python file, name that in plugins, and write FILE.NAME (of OptunaHub: NAME = "
        f"optunahub.load_module('samplers/...').NAME)"
    )


def _plan(
    config: Config,
    found: Space,
    architecture: Architecture,
    panel: Sequence[Prompt],
    measure: Measure,
    engine: Backend | None,
    scorers: Mapping[str, Scorer | None],
) -> Plan:
    search = config.search
    # Who says nothing wants a good merge in the morning.
    images = _USUAL_IMAGES if search.images is None and search.n_iters is None else search.images
    plan = Plan(
        bounds={p.name: (p.low, p.high) for p in found.parameters},
        choices=_choices(config),
        objectives=_objectives(config, panel),
        panel=[prompt.payload for prompt in panel],
        shares=shares(panel),
        images=images,
        n_iters=search.n_iters,
        optimiser=_optimiser(config, measure, engine, scorers),
        options=search.options,
        init=search.init,
        init_points=search.init_points,
        start=_starts(config, found, architecture),
        stop=Stop(search.stop.min_gain, search.stop.patience) if search.stop else None,
        per_trial=search.images_per_trial,
        seed=search.seed,
    )
    try:
        plan.check()
    except ConfigError as error:
        raise ConfigError(
            "\n".join(f"search: {line}" for line in str(error).splitlines())
        ) from error
    return plan


def _objectives(config: Config, panel: Sequence[Prompt]) -> list[Objective]:
    wanted = config.search.objectives
    if wanted == "mean":
        return []
    if wanted == "scorers":
        found = [Objective(name, "scorer") for name in config.scorers]
    else:
        names = dict.fromkeys(p.payload for p in panel if p.weight > 0)
        found = [Objective(name, "payload") for name in names]
    if len(found) < 2:
        raise ConfigError(f"search.objectives: there is only one of the {wanted}; leave it out")
    return found


def _require_domains(found: Space, method: str, guide: guides.Guide) -> None:
    """ConfigError for a range or a frozen weight outside what the method takes."""
    domains = methods.domains(methods.get(method))
    spans = {name: (p.low, p.high) for p in found.parameters for name in p.members}
    spans |= {name: (value, value) for name, value in found.frozen.items()}
    places = " or ".join(filter(None, ("search.ranges", "search.freeze", guide.where)))
    for name, (low, high) in spans.items():
        domain = domains.get(found.names[name][0])
        if domain and not domain.low <= low <= high <= domain.high:
            raise ConfigError(
                f"search: {name} in [{low:g}, {high:g}], but {method} takes {domain.low:g} to "
                f"{domain.high:g}; narrow {places}"
            )


class _Panels(NamedTuple):
    """The panel of the search, images beside it by number, and the panels of the confirmation.

    The search never sees the seeds of the latter.
    """

    search: tuple[Prompt, ...]
    fresh: Callable[[int], Prompt]
    select: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]


class _Fresh:
    """The images of the rounds after those of the panel, of payloads that count."""

    def __init__(self, draw: Callable[[int], tuple[Prompt, ...]], n_rounds: int) -> None:
        self._draw, self._n_rounds, self._n_drawn = draw, n_rounds, n_rounds
        self._found: list[Prompt] = []

    def __call__(self, number: int) -> Prompt:
        while number >= len(self._found):
            self._n_drawn *= 2
            drawn = self._draw(self._n_drawn)
            further = drawn[len(drawn) * self._n_rounds // self._n_drawn :]
            self._found = [
                replace(prompt, index=FRESH + i)
                for i, prompt in enumerate(p for p in further if p.weight > 0)
            ]
        return self._found[number]


def _panels(config: Config, folder: Path) -> _Panels:
    payloads = prompts.read_payloads(config.payload_files(folder), config.panel.defaults)
    wildcards = prompts.read_wildcards(config.panel.wildcards_dir)
    per_round = prompts.n_images(payloads)
    seed = config.search.seed
    heldout = config.heldout
    for key, n_images in (
        ("panel.batch_size", config.panel.batch_size * per_round),
        ("heldout.images", heldout.images),
        ("heldout.select_images", heldout.select_images),
    ):
        if n_images > _MOST_IMAGES:
            raise ConfigError(f"{key}: {n_images} images are more than {_MOST_IMAGES}; lower it")

    def fresh(name: str, images: int) -> tuple[Prompt, ...]:
        rounds = math.ceil(images / per_round)
        return prompts.draw_panel(
            payloads, wildcards, rounds=rounds, seed=f"{seed}/{name}", fresh=True
        )

    def of_search(rounds: int) -> tuple[Prompt, ...]:
        return prompts.draw_panel(payloads, wildcards, rounds=rounds, seed=f"{seed}/panel")

    return _Panels(
        of_search(config.panel.batch_size),
        _Fresh(of_search, config.panel.batch_size),
        fresh("select", heldout.select_images),
        fresh("heldout", heldout.images),
    )
