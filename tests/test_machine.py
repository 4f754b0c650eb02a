"""A study under all that may befall it, beside a plain model of what it must know."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from test_fuzz import few_and_many
from test_run import folder as folder
from test_warm import begin

from bayesian_merger import warm
from bayesian_merger.data import Estimate, Result
from bayesian_merger.errors import ConfigError
from bayesian_merger.outcome import open_study
from bayesian_merger.setup import Setup
from bayesian_merger.study import Study, Trial
from bayesian_merger.study.board import Task
from bayesian_merger.study.storage import url_of

BASELINES = ("a", "even", "b")


class Killed(BaseException):
    """The process is no more."""


class Mortal(RDBStorage):  # type: ignore[misc]
    """A storage whose process is killed before a further write, if `left` says before which."""

    left: int | None = None


def _mortal(write: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Mortal, *args: Any, **options: Any) -> Any:
        if self.left is not None:
            if not self.left:
                raise Killed
            self.left -= 1
        return write(self, *args, **options)

    return call


for _name in (
    "_create_new_trial",
    "set_trial_user_attr",
    "set_trial_param",
    "set_trial_state_values",
):
    setattr(Mortal, _name, _mortal(getattr(RDBStorage, _name)))


@dataclass
class Known:
    """What must be known of a trial or a task: its images, and their scores in the order recorded."""

    items: list[int]
    state: str = "running"
    scores: dict[int, float] = field(default_factory=dict)


@dataclass
class Offer(Known):
    """And of a task the trial that it is a part of."""

    of: str = ""


scores = st.floats(-1e99, 1e99)
images = st.integers(0, 5)
picks = st.integers(0, 2**16)
# Before which write of an act its process is killed, if it is.
deaths = st.sampled_from([None] * 6 + [0, 1, 2, 5])


class Machine(RuleBasedStateMachine):
    """One process that leads, and workers, which come and go."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        super().__init__()
        self.setup, self.folder = setup, folder
        self.n_runs = self.n_acts = 0
        self.known: dict[str, Known] = {}
        self.brought: dict[str, dict[int, float]] = {}
        self.move_to(self.new_folder())

    def new_folder(self) -> Path:
        self.n_runs += 1
        place = self.folder / f"run{self.n_runs}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def move_to(self, place: Path) -> None:
        """Work on the run in that folder, whose workers are others."""
        self.place = place
        begun = open_study(place, create=True)
        begun.begin(self.setup.identity, self.setup.about())
        begun.close()
        self.offers: dict[int, Offer] = {}
        self.start()
        self.hire()

    def start(self) -> None:
        """A process that has just been started, which has nothing in its hands."""
        self.storage = Mortal(url_of(self.place / "study.db"))
        self.study = Study(self.storage)
        self.held: dict[str, Trial] = {}

    def hire(self) -> None:
        """Workers that have just been started."""
        self.theirs = Mortal(url_of(self.place / "study.db"))
        self.board = Study(self.theirs).board()
        self.tasks: dict[int, Task] = {}

    def survives(self, act: Callable[[], object], dies: int | None) -> bool:
        """Whether the act was done; otherwise its process was killed, and another was started."""
        return self.outlived(self.storage, act, dies, self.start)

    def outlived(
        self,
        storage: Mortal,
        act: Callable[[], object],
        dies: int | None,
        begin_anew: Callable[[], None],
    ) -> bool:
        storage.left = dies
        try:
            act()
        except Killed:
            begin_anew()
            return False
        finally:
            storage.left = None
        return True

    def one_held(self, pick: int) -> tuple[Trial, Known]:
        name = sorted(self.held)[pick % len(self.held)]
        return self.held[name], self.known[name]

    def one_task(self, pick: int) -> tuple[int, Task, Offer]:
        number = sorted(self.tasks)[pick % len(self.tasks)]
        return number, self.tasks[number], self.offers[number]

    def has_trials(self) -> bool:
        return bool(self.held)

    def has_tasks(self) -> bool:
        return bool(self.tasks)

    @rule(dies=deaths)
    def ask(self, dies: int | None) -> None:
        asked: list[Trial] = []
        proposer = self.study.searching(self.setup.plan, lambda found: found["likeness"])
        taken = [trial for trial in self.held.values() if trial.stage != "baseline"]
        left = [
            name
            for name, known in self.known.items()
            if name not in self.held and known.state == "running" and name not in BASELINES
        ]
        assert self.study.is_interrupted(taken) == bool(left)
        if self.survives(
            lambda: asked.append(self.study.ask(proposer, self.setup.recipe, taken)), dies
        ):
            (trial,) = asked
            n_searched = len(self.known.keys() - set(BASELINES))
            assert trial.name == (left[0] if left else f"trial {n_searched + 1}")
            self.known.setdefault(trial.name, Known(trial.items or []))
            self.take_up(trial)

    @rule(name=st.sampled_from(BASELINES), dies=deaths)
    def book(self, name: str, dies: int | None) -> None:
        booked: list[Trial] = []
        recipe = self.setup.baseline(name)
        if self.survives(lambda: booked.append(self.study.book("baseline", name, recipe)), dies):
            (trial,) = booked
            known = self.known.get(name)
            if known is None or known.state == "failed":
                self.known[name] = Known(list(range(6)))
            assert trial.is_complete == (self.known[name].state == "complete")
            if not trial.is_complete:
                self.take_up(trial)

    def take_up(self, trial: Trial) -> None:
        """Hold a trial, which comes with all that it had."""
        assert told(trial.scores) == self.known[trial.name].scores
        self.held[trial.name] = trial

    @precondition(has_trials)
    @rule(pick=picks, image=images, score=scores, dies=deaths)
    def report(self, pick: int, image: int, score: float, dies: int | None) -> None:
        trial, known = self.one_held(pick)
        if self.survives(lambda: trial.record(image, {"likeness": score}, f"{score}"), dies):
            known.scores.setdefault(image, score)

    @precondition(has_trials)
    @rule(pick=picks, mean=scores, dies=deaths)
    def complete(self, pick: int, mean: float, dies: int | None) -> None:
        trial, known = self.one_held(pick)
        value = Estimate(mean, 0.1, len(known.scores))
        if known.scores and self.survives(lambda: trial.complete(value), dies):
            known.state = "complete"
            del self.held[trial.name]

    @precondition(has_trials)
    @rule(pick=picks, dies=deaths)
    def fail(self, pick: int, dies: int | None) -> None:
        trial, known = self.one_held(pick)
        if self.survives(lambda: trial.fail("out of memory"), dies):
            known.state = "failed"
            del self.held[trial.name]

    @precondition(has_trials)
    @rule()
    def kill(self) -> None:
        self.start()

    @precondition(has_trials)
    @rule(pick=picks, dies=deaths)
    def post(self, pick: int, dies: int | None) -> None:
        trial, known = self.one_held(pick)
        items = [item for item in known.items if item not in known.scores]
        numbers: list[int] = []
        board = self.study.board()
        if items and self.survives(lambda: numbers.append(board.post(trial, items)), dies):
            self.offers[numbers[0]] = Offer(items, "waiting", of=trial.key)

    @rule(worker=st.sampled_from(["w1", "w2"]), dies=deaths)
    def take(self, worker: str, dies: int | None) -> None:
        waiting = [n for n, offer in self.offers.items() if offer.state == "waiting"]
        found: list[Task | None] = []
        is_done = self.outlived(
            self.theirs, lambda: found.append(self.board.take(worker)), dies, self.hire
        )
        if not is_done:
            if dies:  # when it had the task, before it said who it was
                self.offers[min(waiting)].state = "running"
            return
        (task,) = found
        assert (task.number if task else None) == min(waiting, default=None)
        if task:
            offer = self.offers[task.number]
            assert (task.of, task.items) == (offer.of, offer.items)
            offer.state = "running"
            self.tasks[task.number] = task

    @precondition(has_trials)
    @rule(pick=picks, n=st.integers(1, 3), score=scores, is_gathered=st.booleans())
    def pass_on(self, pick: int, n: int, score: float, is_gathered: bool) -> None:
        """Images go to a worker, which makes some of them: what seldom comes about by single acts."""
        self.post(pick, None)
        self.take("w3", None)
        for task in list(self.tasks.values())[-1:]:
            offer = self.offers[task.number]
            for image in offer.items[:n] if offer.state == "running" else ():
                task.record(image, {"likeness": score}, f"{score}")
                offer.scores.setdefault(image, score)
        if is_gathered:
            self.gather(pick, None)

    @precondition(has_tasks)
    @rule(pick=picks, image=images, score=scores)
    def work(self, pick: int, image: int, score: float) -> None:
        """A worker records an image, unless its task was taken away while it was asleep."""
        _, task, offer = self.one_task(pick)
        if offer.state == "running":
            task.record(image, {"likeness": score}, f"{score}")
            offer.scores.setdefault(image, score)
        elif image not in task.scores:
            with pytest.raises(UpdateFinishedTrialError):
                task.record(image, {"likeness": score}, f"{score}")

    @precondition(has_tasks)
    @rule(pick=picks, ends=st.sampled_from(["done", "fail", "give_back"]), dies=deaths)
    def end(self, pick: int, ends: str, dies: int | None) -> None:
        number, task, offer = self.one_task(pick)
        act = task.done if ends == "done" else lambda: getattr(task, ends)("so it was")
        if offer.state == "running":
            if self.outlived(self.theirs, act, dies, self.hire):
                offer.state = "over"
        else:
            with pytest.raises(UpdateFinishedTrialError):
                act()
        self.tasks.pop(number, None)

    @precondition(lambda self: bool(self.offers))
    @rule(pick=picks, dies=deaths)
    def withdraw(self, pick: int, dies: int | None) -> None:
        number = sorted(self.offers)[pick % len(self.offers)]
        offer = self.offers[number]
        ((_, task),) = self.study.board().some([number])
        ended: list[bool] = []
        if self.survives(lambda: ended.append(task.withdraw("lost")), dies):
            assert ended == [offer.state != "over"]
            offer.state = "over"

    @precondition(has_trials)
    @rule(pick=picks, dies=deaths)
    def gather(self, pick: int, dies: int | None) -> None:
        trial, known = self.one_held(pick)
        for task in list(self.study.board().of(trial.key)):
            found = self.offers[task.number].scores
            assert told(task.scores) == found
            fresh: list[int] = []
            if not self.survives(lambda t=task, f=fresh: f.extend(trial.gather(t)), dies):  # type: ignore[misc]
                # Some of them, in the order in which they are recorded.
                (stored,) = [r for r in self.results() if r.name == trial.name][-1:]
                known.scores.update({i: found[i] for i in stored.scores if i not in known.scores})
                return
            assert sorted(fresh) == sorted(found.keys() - known.scores.keys())
            known.scores.update({i: found[i] for i in fresh})

    @precondition(lambda self: self.n_acts > 12)  # it takes as long as many others
    @rule(moves=st.booleans())
    def fork(self, moves: bool) -> None:
        self.n_acts = 0
        usable = {
            name: known
            for name, known in self.known.items()
            if known.scores
            and (known.state == "complete" if name in BASELINES else known.state != "failed")
        }
        place = self.new_folder()
        if not usable:
            with pytest.raises(ConfigError, match="no merge of this run can be used"):
                warm.fork(self.place, self.setup, place)
            return
        brought = warm.fork(self.place, self.setup, place)
        assert brought.merges == len(usable)
        assert brought.scores == sum(len(known.scores) for known in usable.values())
        study = open_study(place)
        found = {r.name: told(r.scores) for r in study.judged("brought")}
        baselines = {r.name: told(r.scores) for r in study.judged("baseline")}
        study.close()
        assert baselines == {n: usable[n].scores for n in usable if n in BASELINES}
        title = self.place.name
        assert found == {f"{title} {n}": usable[n].scores for n in usable if n not in BASELINES}
        if moves:
            self.known = {n: Known(list(range(6)), scores=dict(baselines[n])) for n in baselines}
            self.brought = found
            self.move_to(place)

    def results(self) -> list[Result]:
        return [*self.study.judged("baseline"), *self.study.searched()]

    @invariant()
    def study_knows_what_was_told_it(self) -> None:
        self.n_acts += 1
        # Of a baseline that failed and was booked again the last.
        stored = {result.name: result for result in self.results()}
        assert stored.keys() == self.known.keys()
        for name, known in self.known.items():
            assert told(stored[name].scores) == known.scores
            assert stored[name].state == known.state
            assert bool(stored[name].value) == (known.state == "complete")
            assert bool(stored[name].reason) == (known.state == "failed")
            assert stored[name].images == {i: f"{score}" for i, score in known.scores.items()}
        searched = [known for name, known in self.known.items() if name not in BASELINES]
        assert self.study.n_judged == sum(len(known.scores) for known in searched)
        assert self.study.n_finished == sum(known.state != "running" for known in searched)
        assert {r.name: told(r.scores) for r in self.study.judged("brought")} == self.brought

    @invariant()
    def board_knows_what_was_told_it(self) -> None:
        found = dict(self.study.board().some(range(1000)))
        assert found.keys() == self.offers.keys()
        for number, offer in self.offers.items():
            task = found[number]
            assert (task.is_waiting, task.is_over) == (
                offer.state == "waiting",
                offer.state == "over",
            )
            assert told(task.scores) == offer.scores

    def teardown(self) -> None:
        self.study.close()


def told(found: Any) -> dict[int, float]:
    return {image: scores["likeness"] for image, scores in found.items()}


@few_and_many(3)
def test_study_loses_and_doubles_nothing_whatever_befalls_it(
    folder: Path, n_examples: int
) -> None:
    setup = begin(folder, "search.optimiser=random", "search.init_points=2")

    class Here(Machine):
        def __init__(self) -> None:
            super().__init__(setup, folder)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=n_examples,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )
