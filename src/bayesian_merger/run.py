"""One trial, and the loop around it.

config -> space -> ask -> merge -> generate -> score -> tell -> report
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from bayesian_merger import pairs
from bayesian_merger.backends import Backend, Exclusive
from bayesian_merger.checkpoint import remove_parts
from bayesian_merger.crew import Alone, Crew, Hands, Others
from bayesian_merger.data import (
    Compromise,
    Estimate,
    Outcome,
    Prompt,
    Result,
)
from bayesian_merger.errors import (
    CheckpointError,
    ConfigError,
    MergerError,
    NothingChangedError,
    RunError,
    SkippedError,
    TakenError,
    TrialError,
    first_line,
)
from bayesian_merger.gathering import gathering
from bayesian_merger.joining import Leading, helps, leads
from bayesian_merger.judging import NEAR, Host, Observer, distance, judge, judge_and_follow
from bayesian_merger.merge import Merger
from bayesian_merger.outcome import (
    has_study,
    join,
    mend,
    open_study,
    ranking,
    read_outcome,
    write_outcome,
    write_page,
    write_recipe,
)
from bayesian_merger.premises import require_plain
from bayesian_merger.scorers import Attended
from bayesian_merger.setup import BASELINES, Setup
from bayesian_merger.study import Stage, Study, Trial
from bayesian_merger.study.proposals import FRESH, RECOMMENDED, Objective, Plan, Proposer
from bayesian_merger.study.seats import pulse
from bayesian_merger.study.storage import is_shared, storage_errors
from bayesian_merger.values import JUNK, Measure, Yardstick, weighted_mean

_FAILURES_IN_A_ROW = 3
_REPORT_EVERY_S = 60.0
# So many times as long as the report took there is none.
_SHARE = 20
# A run that was stopped earlier leaves no report.
_WORTH_A_REPORT_S = 10.0
_TELL_EVERY = 5
# So many equal images of merges that are apart are not the same by chance.
_TELLING = 3
_MOST_COMPROMISES = 8
_BLANK = f"{JUNK}blank"


def run(
    setup: Setup,
    folder: Path,
    observer: Observer,
    more: int | None = None,
    hire: Callable[[], Hands] | None = None,
    *,
    report: bool = True,
) -> Outcome:
    """The whole run in `folder`, from wherever an earlier start of it ended.

    `more` images are spent beyond those of a finished search; 0 takes back what was to be spent so. The
    images are judged by the workers that `hire` gives, or by this process. Without `report` there is no
    report.html.

    RunError if it cannot go on, ConfigError if the folder belongs to another configuration.
    """
    if is_shared(setup.config.search.storage):
        return _together(setup, folder, observer, more, hire, report)
    if setup.config.output.artifacts:
        raise ConfigError(
            "output.artifacts hands on the pictures of several machines, but search.storage names no "
            "server by which they could work together; leave it out"
        )
    with locked(folder):
        return _lead(setup, folder, observer, more, hire, report)


def _together(
    setup: Setup,
    folder: Path,
    observer: Observer,
    more: int | None,
    hire: Callable[[], Hands] | None,
    report: bool,
) -> Outcome:
    """`run` beside others that have the same storage: it leads or helps, whatever is wanted of it."""
    _make(folder)
    hired: list[Hands] = []

    def kept() -> Hands:
        assert hire
        if not hired:
            hired.append(hire())
        return hired[0]

    def close() -> None:
        for hands in hired:
            hands.close()

    with storage_errors(), ExitStack() as stack:
        stack.callback(close)
        study = open_study(folder, setup.config.search.storage, create=True)
        stack.callback(study.close)
        study.waits(observer.noted)

        def require_same() -> None:
            study.require_same(as_begun(setup, study).identity)

        require_same()
        n_joined = study.n_judged
        join(study, folder)
        gathering(setup, folder)  # which tells if its place cannot be had
        seats = study.seats()
        while True:
            seat = leads(seats)
            if seat is None:
                last = helps(study, seats, kept if hire else None, observer.noted, require_same)
                if last and last.is_done:
                    return _shown(study, setup, folder, observer, report)
                continue
            if more and study.n_judged != n_joined:
                more = None  # another process has spent them, or was about to
            try:
                with pulse(seat.beat), storage_errors(), study.fenced(seat.require):
                    others = Leading(seats, seat)
                    outcome = _lead(
                        setup,
                        folder,
                        observer,
                        more,
                        kept if hire else None,
                        report,
                        (study, others),
                    )
                seat.leave("the run is over", is_done=True)
                return outcome
            except TakenError:
                observer.noted(f"{seat} leads the run no more, as another process has taken over")
                with storage_errors():
                    seat.leave("another process has taken over")
            except BaseException as error:
                study.hurries()
                is_fatal = isinstance(error, (MergerError, OSError))
                with suppress(MergerError), storage_errors():
                    seat.leave(first_line(error), is_fatal=is_fatal)
                raise


def _lead(
    setup: Setup,
    folder: Path,
    observer: Observer,
    more: int | None,
    hire: Callable[[], Hands] | None,
    report: bool,
    shared: tuple[Study, Others] | None = None,
) -> Outcome:
    """`run` in a folder that no other process leads.

    Of a study that is `shared` with others it keeps the workers and the study at its end.
    """
    begun = time.monotonic()
    with storage_errors(), ExitStack() as stack:
        if shared is None:  # others may write there just now
            remove_parts(folder)
        if not setup.config.search.storage and (mended := mend(folder)):
            observer.noted(mended)
        check_folder(setup, folder)
        if hire is None:
            take(setup.backend)
        for name, judge_of in setup.scorers.items():
            if isinstance(judge_of, Attended):
                if not isinstance(observer, Host):
                    raise ConfigError(f"scorer {name} asks a person, and here nobody can answer")
                stack.callback(judge_of.leave)
                observer.asked(judge_of.attend(folder, setup.n_questions()))
        if shared:
            study, others = shared
        else:
            study, others = open_study(folder, setup.config.search.storage, create=True), Alone()
            stack.callback(study.close)
        setup = as_begun(setup, study)
        study.require_same(setup.identity)
        study.require_whole()
        is_finished = bool(study.about) and read_outcome(folder, study).finished
        if note := _extend(study, more, is_finished):
            observer.noted(note)
        setup = replace(setup, plan=_extended(setup.plan, study.target))
        study.begin(setup.identity, setup.about())
        crew = None
        if hire:
            crew = Crew(study.board(), hire, observer, others)
            if shared is None:
                stack.callback(crew.close)
        observer.planned(setup.n_images())
        for note in setup.notes:
            observer.noted(note)

        try:
            yardstick = baselines(study, setup, folder, observer, crew)
            _keep_copy(study, observer)
            _observe_brought(study, setup, yardstick)
            due = begun + _REPORT_EVERY_S if report else math.inf
            _search(study, setup, yardstick, folder, observer, due, crew)
            _keep_copy(study, observer)
            if not read_outcome(folder, study).finished:
                _confirm(study, setup, yardstick, folder, observer, crew)
            elif more is None:
                observer.noted("the run was finished; --more N extends it by N images")
            if not study.slices:
                _slice(study, setup, yardstick, folder)
            _keep_copy(study, observer)
        except TakenError:
            raise  # the run goes on elsewhere
        except (KeyboardInterrupt, MergerError, OSError):
            # Whatever ended it, somebody wants to see how far it came, and now.
            study.hurries()
            if crew:
                crew.leave()
            if report and time.monotonic() - begun > _WORTH_A_REPORT_S:
                # The error that counts is raised.
                with suppress(MergerError), storage_errors(), _noted(observer):
                    write_page(read_outcome(folder, study), folder, is_alive=False)
            raise

        outcome = _shown(study, setup, folder, observer, report)
        assert outcome.best is not None
        if setup.config.output.save_best:
            try:
                # On the CPU, as `bayesian-merger merge` does it, so that both write the same bytes.
                setup.merger.require_unchanged()
                merged = Merger(setup.merger.models).merge(outcome.best.recipe)
                merged.save(folder / "best.safetensors")
            except CheckpointError as error:
                raise RunError(
                    f"{error}; the report and best.toml are written, and the same command tries again"
                ) from error
        return outcome


def _shown(study: Study, setup: Setup, folder: Path, observer: Observer, report: bool) -> Outcome:
    """The outcome of a run that is over, once the files are written that people read."""
    _gather(study, setup, folder, observer, is_over=True)
    outcome = read_outcome(folder, study)
    write_outcome(outcome, folder, setup.merger.references())
    if report:
        with _noted(observer):
            write_page(outcome, folder)
    return outcome


def _keep_copy(study: Study, observer: Observer) -> None:
    """Keep a copy of the study; RunError if it is damaged."""
    try:
        study.keep_copy()
    except OSError as error:  # a full disk
        observer.noted(f"no copy of the study could be kept ({error})")


def _gather(
    study: Study, setup: Setup, folder: Path, observer: Observer, *, is_over: bool = False
) -> None:
    """Bring the pictures of other machines into the folder, as far as pictures are kept."""
    try:
        pictures = gathering(setup, folder)
        if pictures is None or not place_of(setup, folder, is_compared=True):
            return
        results = [*study.judged("baseline"), *study.judged("heldout")]
        if place_of(setup, folder, is_compared=False):
            results += [*study.searched(), *study.judged("select")]
        if is_over:
            pictures.send_left(results)
        n_missing = pictures.fetch(results, setup)
        if n_missing and is_over:
            observer.noted(f"{n_missing} pictures are missing, whose machines did not send them")
    except (ConfigError, OSError) as error:
        observer.noted(f"the pictures of other machines could not be fetched ({error})")


@contextmanager
def _noted(observer: Observer) -> Iterator[None]:
    """What people read cannot be written just now: that is noted, and no reason to end the run."""
    try:
        yield
    except OSError as error:  # a full disk; on Windows, a program that has the page open
        observer.noted(f"the report could not be written ({error})")


def take(engine: Backend) -> None:
    """Have the back end before anything is begun; RunError if it is not to be had."""
    try:
        if isinstance(engine, Exclusive):
            engine.take()
    except TrialError as error:
        raise RunError(f"the back end: {error}; the same command tries it again") from error


def _extend(study: Study, more: int | None, is_finished: bool) -> str:
    """Let the search spend `more` images or take them back; what there is to say of it."""
    if more == 0:
        left = max(0, study.target - study.n_judged)
        study.extend(0)
        return f"{left} images are taken back" if left else "there was nothing to take back"
    if more and is_finished:
        study.extend(more)
        return f"{more} images beyond the {study.n_judged} of the finished run"
    if more and not study.target:
        return "the run is not finished; --more extends it when it is"
    return ""


def as_begun(setup: Setup, study: Study) -> Setup:
    """With the optimiser that `auto` chose when the run began, if it can still be had."""
    begun = study.identity.get("search", {}).get("optimiser")
    is_free = setup.config.search.optimiser == "auto"
    if is_free and (begun == "bayes" or (begun == "gradient" and not setup.rigid)):
        return replace(setup, plan=replace(setup.plan, optimiser=begun))
    return setup


def _extended(plan: Plan, target: int) -> Plan:
    """The plan of a run that was extended to `target` images; what had ended it ends it no more."""
    if not target:
        return plan
    ended_early = plan.stop is not None or plan.n_iters is not None
    images = target if ended_early else max(target, plan.images or 0)
    return replace(plan, images=images, n_iters=None, stop=None)


def baselines(
    study: Study, setup: Setup, folder: Path, observer: Observer, crew: Crew | None = None
) -> Yardstick:
    """Judge A, the even merge and B; they set the scale of the values and anchor the search."""
    trials = _judged_baselines("baseline", study, setup, setup.panel, folder, observer, crew)
    results = [trial.result() for trial in trials]
    yardstick = _yardstick(setup, results)
    values = _values(setup, yardstick, results, setup.panel)
    for trial in trials:
        if not trial.is_complete:
            trial.complete(values[trial.name])
        if params := setup.params(trial.recipe):
            study.observe(trial.result(), params, setup.plan)
        observer.finished(trial.result(), None)
    return yardstick


def _yardstick(setup: Setup, baselines: Sequence[Result]) -> Yardstick:
    """What turns scores into values; of choices there are none."""
    if setup.comparer:
        return Yardstick(setup.measure)
    return Yardstick.from_baselines(setup.measure, baselines, setup.panel)


def _values(
    setup: Setup, yardstick: Yardstick, results: Sequence[Result], panel: Sequence[Prompt]
) -> dict[str, Estimate]:
    """The values of results on a panel; with pairs, their leads over the even merge or their mean."""
    if setup.comparer:
        return pairs.leads(results)
    return {result.name: yardstick.estimate(result, panel) for result in results}


def _judged_baselines(
    stage: Stage,
    study: Study,
    setup: Setup,
    panel: Sequence[Prompt],
    folder: Path,
    observer: Observer,
    crew: Crew | None,
) -> list[Trial]:
    """A, the even merge and B, judged in a stage and not yet completed; RunError if one cannot be."""
    trials = [study.book(stage, name, setup.baseline(name)) for name in BASELINES]
    keep = place_of(setup, folder, is_compared=True)
    # One that is complete without its slopes had none to be had.
    is_followed = {
        trial.name: stage == "baseline"
        and trial.name == "even"
        and setup.follows_even
        and not trial.is_complete
        for trial in trials
    }
    if crew:
        for trial in trials:
            crew.offer(trial, panel, follows=is_followed[trial.name])
    for number, trial in enumerate(trials, start=1):
        observer.started(stage, trial.name, len(panel))
        try:
            if crew:
                crew.judge(trial, panel)
            elif is_followed[trial.name]:
                measure = Yardstick(setup.measure)
                judge_and_follow(trial, panel, setup, observer, keep, measure)
            else:
                before = [t.result() for t in trials[: number - 1]]
                judge(trial, panel, setup, observer, keep, others=before)
            _require_change([t.result() for t in trials[:number]], setup)
            _require_pictures(trial.result())
        except TrialError as error:
            # What a back end made that fails here is not to be trusted, hence all or none.
            for doubtful in trials:
                if not doubtful.is_complete:
                    doubtful.fail(str(error))
            what = "baseline" if stage == "baseline" else "held-out"
            raise RunError(
                f"{what} {trial.name} cannot be judged: {error}; the same command tries it again"
            ) from error
    return trials


def _observe_brought(study: Study, setup: Setup, yardstick: Yardstick) -> None:
    """Hand what an earlier run has judged to the optimiser, as far as it can be compared."""
    counted = {prompt.index for prompt in setup.panel if prompt.weight > 0}
    for result in study.judged("brought"):
        params = setup.params(result.recipe)
        if params is None or not result.scores or setup.comparer:
            continue
        if counted & result.scores.keys():
            value = yardstick.trial(result, setup.panel)
        elif setup.plan.optimiser in ("bayes", "gradient"):
            # Of other images: these learn how easy they are, other optimisers would not.
            values = [yardstick.value(scores) for scores in result.scores.values()]
            value = weighted_mean(values, [1.0] * len(values))
        else:
            continue
        study.observe(result.but(value=value), params, setup.plan)


def _search(
    study: Study,
    setup: Setup,
    yardstick: Yardstick,
    folder: Path,
    observer: Observer,
    due: float,
    crew: Crew | None,
) -> None:
    """Ask, judge, tell, until the trials are spent; a failed trial only has no value.

    The report is written when it is `due`, and from then on every minute, or less often if that takes
    long.
    """
    failures = 0
    is_told = False
    # What an earlier, shorter run of this folder has confirmed is not replaced by a mere leader.
    is_confirmed = any(r.name not in BASELINES for r in study.judged("heldout"))
    models = () if is_confirmed else setup.merger.references()
    proposer = searching(study, setup, yardstick)
    before = [r for r in study.searched() if r.state != "running"]
    n_before = sum(len(result.scores) for result in before)
    observer.judged(n_before, made=False)
    if not proposer.is_over():
        study.compromise()  # that of a shorter run holds no more
        study.slice({})
        if before:
            told = f"{n_before} images of {len(before)} trials are judged already"
            observer.noted(f"the search goes on: {told}")

    for trial, error in _attempts(study, proposer, setup, yardstick, folder, observer, crew):
        if not isinstance(error, SkippedError):
            failures = failures + 1 if error else 0
        if isinstance(error, NothingChangedError):
            raise RunError(
                f"{error}. What was judged before may be false too: begin anew in another --run-dir"
            ) from error
        if failures >= _FAILURES_IN_A_ROW:
            raise RunError(f"{failures} trials in a row failed, the last with: {error}") from error
        is_time = study.n_finished % _TELL_EVERY == 0 and study.n_finished >= proposer.plan.n_first
        if is_time and (best := proposer.best()):
            study.expect(setup.recipe(best[0]), best[1])
            if models:
                write_recipe(setup.recipe(best[0]), folder, models)
        observer.finished(trial.result(), study.leader)
        if study.given_up and not is_told:
            is_told = True
            observer.noted(f"{study.given_up}, so the search goes on by the scores alone")
        if time.monotonic() > due:
            start = time.monotonic()
            _gather(study, setup, folder, observer)
            with _noted(observer):
                outcome = read_outcome(folder, study)
                write_outcome(outcome, folder, models)
                write_page(outcome, folder)
            _keep_copy(study, observer)
            due = time.monotonic() + max(_REPORT_EVERY_S, _SHARE * (time.monotonic() - start))
    if proposer.has_stopped:
        observer.noted(f"the search ends after {study.n_judged} images, as search.stop says")
    front = proposer.front(_MOST_COMPROMISES) if setup.plan.objectives else []
    study.compromise(
        [Compromise(setup.recipe(params), values) for params, values in front],
        {
            baseline.name: {
                one.name: _at(one, baseline, setup, yardstick) for one in setup.plan.objectives
            }
            for baseline in study.judged("baseline")
            if baseline.state == "complete"
        },
    )
    if len(study.candidates) < setup.config.heldout.candidates:
        wanted = setup.config.heldout.candidates
        # Parameters that the chosen method lacks make no other merge.
        few: dict[str, Result] = {}
        found = proposer.few(2 * wanted)
        for name, params, value in found:
            recipe = setup.recipe(params)
            # Choices know merges by their names, and a longer search recommends another.
            is_taken = name == RECOMMENDED or name in BASELINES
            own = f" {recipe.digest()[:6]}" if setup.comparer and is_taken else ""
            few.setdefault(recipe.digest(), Result.recommended(f"{name}{own}", recipe, value))
        recommended = list(few.values())[:wanted]
        study.choose(recommended)
        if recommended and (expected := recommended[0].value):
            study.expect(recommended[0].recipe, expected)


def _slice(study: Study, setup: Setup, yardstick: Yardstick, folder: Path) -> None:
    """Store what each weight of the best merge does, where the search has tried enough to tell.

    The gradient stays near its way, and says itself what each weight does.
    """
    best = read_outcome(folder, study).best
    params = setup.params(best.recipe) if best else None
    if params and setup.plan.optimiser != "gradient":
        study.slice(searching(study, setup, yardstick).slices(params))


def searching(study: Study, setup: Setup, yardstick: Yardstick) -> Proposer:
    """What proposes the trials; by the gradient it begins beside a parent that beats the even merge.

    That is, if it does so beyond doubt on the images of the baselines.
    """
    origin = None
    if setup.plan.optimiser == "gradient":
        judged = {r.name: r for r in study.judged("baseline") if r.state == "complete"}
        leads = {
            name: yardstick.difference(judged[name], judged["even"], setup.panel)
            for name in ("a", "b")
        }
        best = max(leads, key=lambda name: leads[name].mean)
        origin = setup.beside(best) if leads[best].low > 0 else None
    value = None if setup.comparer else yardstick.value
    return study.searching(replace(setup.plan, origin=origin), value)


def _attempts(
    study: Study,
    proposer: Proposer,
    setup: Setup,
    yardstick: Yardstick,
    folder: Path,
    observer: Observer,
    crew: Crew | None,
) -> Iterator[tuple[Trial, TrialError | None]]:
    """The trials of the search as they end, and the error of one that failed."""
    if crew is None:
        while not proposer.is_over():
            yield attempt(study, proposer, setup, yardstick, folder, observer)
        return
    # Merges of few images are judged beside each other; of others the images are.
    is_wide = setup.plan.optimiser == "bayes"
    flight: list[Trial] = []
    while True:
        while (
            crew.wants()
            and (is_wide or not flight)
            and (study.is_interrupted(flight) or not proposer.is_promised())
        ):
            trial, panel = _asked(study, proposer, setup, observer, flight)
            crew.offer(trial, panel, follows=trial.follows)
            flight.append(trial)
        if not flight:
            return
        crew.tend()
        ended = [trial for trial in flight if crew.is_ready(trial)]
        for trial in ended:
            flight.remove(trial)
            yield trial, _told(study, trial, setup, yardstick, partial(crew.conclude, trial))
        if not ended:
            crew.rest()


def _asked(
    study: Study,
    proposer: Proposer,
    setup: Setup,
    observer: Observer,
    flight: Sequence[Trial] = (),
) -> tuple[Trial, list[Prompt]]:
    """The next trial of the search beside those in `flight`, and the images that it is judged on."""
    start = time.monotonic()
    trial = study.ask(proposer, setup.recipe, flight)
    trial.spend(ask=time.monotonic() - start)
    panel = [setup.prompt(i) for i in trial.items or ()]
    observer.started(trial.stage, trial.name, len(panel))
    return trial, panel


def attempt(
    study: Study,
    proposer: Proposer,
    setup: Setup,
    yardstick: Yardstick,
    folder: Path,
    observer: Observer,
) -> tuple[Trial, TrialError | None]:
    """Ask, judge, tell: one trial of the search. The error of a failed one, which only has no value."""
    trial, panel = _asked(study, proposer, setup, observer)
    keep = place_of(setup, folder, is_compared=False)
    others = [*study.judged("baseline"), *study.searched()]

    def judged() -> None:
        if trial.follows:
            judge_and_follow(trial, panel, setup, observer, keep, yardstick, others)
        else:
            judge(trial, panel, setup, observer, keep, others=others)

    return trial, _told(study, trial, setup, yardstick, judged)


def _told(
    study: Study, trial: Trial, setup: Setup, yardstick: Yardstick, judged: Callable[[], None]
) -> TrialError | None:
    """End a trial of the search with its value once it is `judged`, or without for the error of that."""
    try:
        judged()
        _require_change([*study.judged("baseline"), *study.searched()], setup)
    except TrialError as error:
        trial.fail(str(error))
        return error
    if setup.comparer:
        known = [*study.judged("baseline"), *study.searched()]
        trial.complete(pairs.leads([r for r in known if r.state != "failed"])[trial.name])
        return None
    further = [setup.prompt(i) for i in trial.items or () if i >= FRESH]
    trial.complete(yardstick.trial(trial.result(), setup.panel, further))
    return None


def place_of(setup: Setup, folder: Path, *, is_compared: bool) -> Path | None:
    """The folder, if pictures are kept: those of the comparison of A, B, even and best, or others."""
    wanted = setup.config.output.save_images
    # A picture may be compared with any that was made before.
    is_kept = wanted == "all" or setup.comparer or (wanted == "best" and is_compared)
    return folder if is_kept else None


def _at(objective: Objective, baseline: Result, setup: Setup, yardstick: Yardstick) -> Estimate:
    """What a baseline has of one of several objectives."""
    if objective.kind == "scorer":
        name = objective.name
        own = [p for p in setup.panel if name in baseline.scores.get(p.index, {})]
        return Yardstick(Measure({name: 1.0})).estimate(baseline, own)
    return yardstick.estimate(baseline, [p for p in setup.panel if p.payload == objective.name])


def _confirm(
    study: Study,
    setup: Setup,
    yardstick: Yardstick,
    folder: Path,
    observer: Observer,
    crew: Crew | None,
) -> None:
    """Choose the best of the few best on fresh seeds, then measure it against the baselines on others.

    The luckiest trial wins a search, so its own score flatters it; seeds that no choice was made on
    do not.
    """
    few = study.candidates[: setup.config.heldout.candidates]
    if not few:
        raise RunError("no trial was completed, so there is no merge to confirm")

    def booked(stage: Stage, one: Result) -> Trial:
        # With pairs even a parent is compared with itself, to be compared with the others.
        return study.book(stage, one.name, one.recipe, BASELINES if setup.comparer else ())

    def attempt(stage: Stage, trial: Trial, panel: Sequence[Prompt]) -> Trial | None:
        keep = place_of(setup, folder, is_compared=stage == "heldout")
        observer.started(stage, trial.name, len(panel))
        try:
            others = [other for other in study.judged(stage) if other.name != trial.name]
            if crew:
                crew.judge(trial, panel)
            else:
                judge(trial, panel, setup, observer, keep, others=others)
            _require_change([*others, trial.result()], setup)
        except TrialError as error:
            trial.fail(str(error))
            observer.finished(trial.result(), None)
            return None
        return trial

    def complete(trials: Sequence[Trial], panel: Sequence[Prompt]) -> None:
        values = _values(setup, yardstick, [trial.result() for trial in trials], panel)
        for trial in trials:
            if not trial.is_complete:
                trial.complete(values[trial.name])
            observer.finished(trial.result(), None)

    # Choices tell of one what they tell of all, hence last.
    panel = setup.select_panel
    several = [booked("select", one) for one in few] if len(few) > 1 else []
    if crew:
        for trial in several:
            crew.offer(trial, panel)
    complete([t for trial in several if (t := attempt("select", trial, panel))], panel)
    panel = setup.heldout_panel
    waiting = _judged_baselines("heldout", study, setup, panel, folder, observer, crew)
    if not setup.comparer:
        complete(waiting, panel)
        waiting = []
    for one in ranking(study, few) or []:
        if best := attempt("heldout", booked("heldout", one), panel):
            complete([*waiting, best], panel)
            return
    raise RunError(f"none of the {len(few)} best merges can be judged on fresh seeds")


def _require_pictures(result: Result) -> None:
    """TrialError if all images are junk."""
    marks = [[key for key in scores if key.startswith(JUNK)] for scores in result.scores.values()]
    if marks and all(marks):
        kinds = dict.fromkeys(key.removeprefix(JUNK) for keys in marks for key in keys)
        raise TrialError(f"all its {len(marks)} images are junk: {', '.join(kinds)}")


def _require_change(results: Sequence[Result], setup: Setup) -> None:
    """NothingChangedError if merges of clearly other weights have made the very same images.

    Each image is compared with the one before it of the same prompt and seed. One or two may well be
    alike, so it takes the last three, and all of a merge that was judged on more. What is marked as
    blank tells nothing.
    """
    latest: dict[int, Result] = {}
    alike: list[tuple[Result, Result]] = []
    for now in results:
        if now.state == "failed":
            continue
        told = [i for i in now.images if _BLANK not in now.scores.get(i, {})]
        before = {
            item: latest[item]
            for item in told
            if item in latest and distance(now, latest[item], setup) > NEAR
        }
        same = [one for item, one in before.items() if one.images[item] == now.images[item]]
        alike = [*alike, *((one, now) for one in same)] if len(same) == len(before) else []
        latest.update(dict.fromkeys(now.images, now))
    if len(alike) >= min(_TELLING, len(setup.panel)):
        one, now = alike[-1]
        raise NothingChangedError(
            f"{one.name} and {now.name} have different weights, but all their images are the "
            f"same: A and B are alike in what is searched, or the back end does not load the merge"
        )


def check_folder(setup: Setup, folder: Path) -> None:
    """ConfigError or CheckpointError if `setup` cannot run in `folder`: another run's, or no space."""
    storage = setup.config.search.storage
    if has_study(folder, storage):
        study = open_study(folder, storage)
        try:
            study.require_same(as_begun(setup, study).identity)
        finally:
            study.close()
    best = folder / "best.safetensors"
    if setup.config.output.save_best:
        if any(model.path.resolve() == best.resolve() for model in setup.merger.models):
            raise ConfigError(f"{best} is one of the models, and would be overwritten; move it")
        setup.merger.merge(setup.baseline("a")).require_space(best)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made a run folder ({error.strerror})") from error
    require_plain(folder)


def is_alive(folder: Path, storage: str | None = None) -> bool:
    """Whether a process works on the run in the folder now."""
    if is_shared(storage):
        study = open_study(folder, storage)
        try:
            return study.seats().give_signs()
        finally:
            study.close()
    try:
        with locked(folder):
            return False
    except ConfigError:
        return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the run folder; ConfigError if one is in it."""
    _make(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder}: another process is running here; wait for it or stop it"
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()
