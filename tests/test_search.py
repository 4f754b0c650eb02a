"""`bayesian_merger.Search`, as other programs call it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import bayesian_merger
from bayesian_merger import Search
from bayesian_merger.errors import ConfigError, RunError
from bayesian_merger.study.proposals import OPTIMISERS, SCORE, Init, Plan
from bayesian_merger.study.search import SearchTrial

SPACE = {"IN00": (0.0, 1.0), "M00": (-0.5, 1.5), "OUT11": (0.25, 0.5)}
BEST = {"IN00": 0.3, "M00": 1.2, "OUT11": 0.25}
every_optimiser = pytest.mark.parametrize(
    "optimiser", [name for name in OPTIMISERS if name != "gradient"]
)


def score(weights: Mapping[str, float], item: int) -> float:
    """Best at BEST; images differ by their offsets and by a wave that has no system."""
    distance = sum((weights[name] - BEST[name]) ** 2 for name in BEST)
    return 2 * (item % 3) - 3 * distance + 0.1 * math.sin(97 * item + 1e3 * weights["IN00"])


def search(**options: Any) -> Search:
    return Search(SPACE, **{"images": 60, "panel": 10, "seed": 4, **options})


def spend(trial: SearchTrial) -> list[int]:
    """Judge all images of a trial; which they were."""
    seen = []
    for item in trial:
        trial.report(score(trial.weights, item))
        seen.append(item)
    return seen


def run(found: Search) -> list[tuple[dict[str, float], list[int]]]:
    return [(dict(trial.weights), spend(trial)) for trial in found]


def test_search_finds_weights_near_the_best() -> None:
    found = search(images=100)
    run(found)
    best = found.best()
    assert score(best.weights, 0) > score(BEST, 0) - 0.15
    assert best.weights.keys() == SPACE.keys()
    # The mean is that over the images: offsets of 0, 2 and 4.
    assert best.mean == pytest.approx(1.6, abs=1.0)
    assert 0 < best.se < 1


@every_optimiser
def test_images_are_spent_and_no_more_than_the_last_trial_takes(optimiser: str) -> None:
    found = search(optimiser=optimiser, init_points=4, per_trial=3)
    trials = run(found)
    n_images = [len(items) for _, items in trials]
    assert sum(n_images) == found.spent
    assert 60 <= found.spent < 60 + max(n_images)
    for weights, items in trials:
        assert all(low <= weights[name] <= high for name, (low, high) in SPACE.items())
        assert set(items) <= set(range(10))
        assert len(set(items)) == len(items)


def test_bayes_shows_each_payload_its_share_and_few_images() -> None:
    trials = run(
        search(panel=["cat", "dog", "dog", "dog", "cat", "cat", "bird"], images=42, init_points=42)
    )
    shown = [item for _, items in trials for item in items]
    # Two cats, two dogs, and the one bird twice as often.
    assert {item: shown.count(item) for item in shown} == {0: 7, 1: 7, 4: 7, 2: 7, 6: 14}


def test_payload_is_shown_as_often_as_its_share_says() -> None:
    plan = Plan(SPACE, ["cat", "dog", "bird"], images=100, shares={"dog": 2.0, "bird": 0.0})
    shown = [item for place in range(90) for item in plan.items(0, place)[:1]]
    assert [shown.count(item) for item in range(3)] == [30, 60, 0]


@pytest.mark.parametrize("n", [3, 7, 20])
def test_trial_is_shown_as_many_images_as_asked_for(n: int) -> None:
    plan = Plan(SPACE, ["cat", "dog"] * 10, images=1000, per_trial=n)
    assert {len(plan.items(place, n * place)) for place in range(5)} == {n}


def test_more_of_the_panel_is_shown_when_the_first_images_are_known() -> None:
    plan = Plan(SPACE, ["p"] * 50, images=1000)
    shown = [plan.items(0, place)[0] for place in range(1000)]
    assert [len(set(shown[n : n + 100])) for n in (0, 100, 200, 300, 400, 800)] == [
        5,
        10,
        20,
        20,
        40,
        50,
    ]


def test_other_optimisers_show_the_same_images_to_all() -> None:
    assert {tuple(items) for _, items in run(search(optimiser="tpe"))} == {tuple(range(10))}
    assert {len(items) for _, items in run(search(optimiser="tpe", per_trial=4))} == {4}


@every_optimiser
def test_search_opened_again_goes_on_as_one_that_never_stopped(
    optimiser: str, tmp_path: Path
) -> None:
    expected = run(search(optimiser=optimiser, init_points=3, per_trial=2, images=16))
    url = f"sqlite:///{tmp_path / 'search.db'}"
    found = []
    for _ in expected:
        again = search(optimiser=optimiser, init_points=3, per_trial=2, images=16, storage=url)
        trial = next(iter(again))
        first = next(iter(trial))
        trial.report(score(trial.weights, first))  # and is killed after the first image
        again = search(optimiser=optimiser, init_points=3, per_trial=2, images=16, storage=url)
        trials = iter(again)
        trial = next(trials)
        found.append((dict(trial.weights), [first, *spend(trial)]))
        next(trials, None)
    assert found == expected
    last = search(optimiser=optimiser, init_points=3, per_trial=2, images=16, storage=url)
    assert run(last) == []
    assert last.best().weights.keys() == SPACE.keys()


@pytest.mark.parametrize("optimiser", ["bayes", "tpe"])
def test_search_killed_after_any_image_ends_as_one_that_never_stopped(
    optimiser: str, tmp_path: Path
) -> None:
    options = {"optimiser": optimiser, "init_points": 2, "per_trial": 4, "images": 14}
    expected = run(search(**options))
    options["storage"] = f"sqlite:///{tmp_path / 'search.db'}"

    def lives_for_one_image() -> bool:
        for trial in search(**options):
            for item in trial:
                trial.report(score(trial.weights, item))
                return True
        return False

    while lives_for_one_image():
        pass
    assert run(search(**options)) == []
    stored = optuna.load_study(storage=options["storage"], study_name="search").trials
    assert {t.state.name for t in stored} == {"COMPLETE"}
    assert [t.params for t in stored] == [weights for weights, _ in expected]


def test_who_looks_at_the_best_in_between_changes_no_proposal() -> None:
    def looking() -> list[tuple[dict[str, float], list[int]]]:
        found, seen = search(init_points=8), []
        for trial in found:
            items = []
            for item in trial:
                trial.report(score(trial.weights, item))
                items.append(item)
                found.best()
            seen.append((dict(trial.weights), items))
        return seen

    assert looking() == run(search(init_points=8))


def test_longer_search_explores_no_more(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'search.db'}"
    run(search(images=12, storage=url))
    run(search(images=40, storage=url))
    stages = [
        t.user_attrs["stage"] for t in optuna.load_study(storage=url, study_name="search").trials
    ]
    assert stages.count("explore") == 6


def test_payload_that_does_not_count_takes_no_image_from_others() -> None:
    plan = Plan(SPACE, ["a", "b"] * 10, images=100, shares={"a": 1.0, "b": 0.0})
    assert {item for place in range(100) for item in plan.items(0, place)} == {0, 2, 4, 6, 8}


def test_trial_that_was_left_early_counts_with_what_it_has() -> None:
    found = search(per_trial=5, images=10)
    for trial in found:
        for item in trial:
            trial.report(score(trial.weights, item))
            if item % 2:
                break
    assert 10 <= found.spent < 15


@every_optimiser
def test_search_without_exploration_begins_with_one_point_of_it(optimiser: str) -> None:
    found = search(optimiser=optimiser, init_points=0, images=12, per_trial=2)
    first = run(found)[0][0]
    assert first == run(search(images=2, per_trial=2))[0][0]
    assert found.spent == 12


def test_small_space_is_explored_by_few_trials() -> None:
    plans = [
        Plan(dict.fromkeys(map(str, range(d)), (0.0, 1.0)), ["p"], images=500)
        for d in (1, 8, 26, 52)
    ]
    assert [plan.n_first for plan in plans] == [4, 32, 100, 100]


def test_panel_that_is_smaller_than_a_trial_is_shown_once() -> None:
    assert {tuple(items) for _, items in run(search(optimiser="tpe", panel=3))} == {(0, 1, 2)}


def test_trials_without_scores_end_the_search_with_a_reason() -> None:
    with pytest.raises(RunError, match="3 trials in a row were left without a score"):
        for _ in search():
            pass


def test_search_stops_when_little_is_to_be_gained(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'search.db'}"
    options = {"images": 400, "init_points": 20, "storage": url}
    found = search(**options, stop=(0.05, 3))
    trials = run(found)
    assert 20 < len(trials) < 150
    assert len(trials) % 5 == 0
    assert score(found.best().weights, 0) > score(BEST, 0) - 0.1
    assert run(search(**options, stop=(0.05, 3))) == []
    # Who expects more goes on.
    assert run(search(**{**options, "images": found.spent + 4}, stop=(0.0001, 3)))


def test_start_is_tried_first_then_the_design() -> None:
    start = [BEST, {name: high for name, (_, high) in SPACE.items()}]
    trials = run(search(start=start, images=20))
    assert [weights for weights, _ in trials[:2]] == start
    plain = run(search(images=20))
    # Without a gap in the design.
    assert trials[2][0] == plain[0][0]


@pytest.mark.parametrize("init", ["sobol", "lhs", "uniform"])
def test_exploring_trials_fill_the_space(init: Init) -> None:
    trials = run(search(init=init, init_points=32, images=32))
    for name, (low, high) in SPACE.items():
        shares = [(weights[name] - low) / (high - low) for weights, _ in trials]
        assert min(shares) < 0.15
        assert max(shares) > 0.85
        assert sum(shares) / 32 == pytest.approx(0.5, abs=0.15)


def test_any_sampler_of_optuna_may_be_named_by_its_path() -> None:
    options = {"n_startup_trials": 2}
    sampler = "optuna.samplers.GPSampler"
    found = search(optimiser=sampler, options=options, init_points=2, per_trial=6)
    trials = run(found)
    assert found.spent == 60
    explored = run(search(optimiser=sampler, options=options, init_points=10, per_trial=6))
    assert trials[:2] == explored[:2]
    assert trials[2] != explored[2]


def test_samplers_of_optunahub_are_named_by_their_path_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("optunahub")  # is no dependency: it needs git and GitHub
    package = tmp_path / "samplers" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import optuna\nclass Mine(optuna.samplers.RandomSampler):\n    pass\n"
    )
    load = partial(hub.load_local_module, registry_root=str(tmp_path))
    monkeypatch.setattr(hub, "load_module", load)
    found = search(optimiser="optunahub.samplers.mine.Mine", init_points=2, per_trial=6)
    run(found)
    assert found.spent == 60
    assert type(found.plan.sampler(0)).__name__ == "Mine"


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("optimiser", ["cmaes", "optuna.samplers.CmaEsSampler"])
def test_code_in_a_study_is_not_run(tmp_path: Path, optimiser: str) -> None:
    found = search(optimiser=optimiser, images=60, init_points=2, per_trial=2)
    run(found)
    others = search(optimiser=optimiser, images=90, init_points=2, per_trial=2)
    trials = found._study.get_trials()
    assert any("cma:optimizer:0" in trial.system_attrs for trial in trials)
    held = pickle.dumps(Payload(tmp_path / "unpickled")).hex()
    for trial in trials:
        trial.system_attrs["cma:optimizer:0"] = held
        others._study.add_trial(trial)
    with pytest.raises(RunError, match=r"no state of CMA-ES \(it names .*open\)"):
        run(others)
    assert not list(tmp_path.iterdir())


def test_what_a_failed_trial_has_measured_counts_for_nothing() -> None:
    found, other = search(images=30), search(images=30)
    run(found)
    run(other)
    other._study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.FAIL,
            params={name: high for name, (_, high) in SPACE.items()},
            distributions=other.plan.distributions,
            user_attrs={f"{SCORE}{i}": {"scores": {"score": 1e6}} for i in range(3)},
        )
    )
    assert other.best() == found.best()


@pytest.mark.parametrize("per_trial", [2, 4])
def test_at_most_half_of_the_images_explore(per_trial: int) -> None:
    plan = search(images=24, per_trial=per_trial).plan
    assert plan.n_first * per_trial <= 12


def test_no_image_more_than_wanted_is_asked_for() -> None:
    for optimiser in ("bayes", "tpe"):
        for images in (1, 14, 25):
            found = search(optimiser=optimiser, images=images)
            run(found)
            assert found.spent == images


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimiser": "bays"}, "unknown optimiser 'bays'; did you mean 'bayes'"),
        ({"optimiser": "no.such.Sampler"}, "optimiser no.such.Sampler: No module named 'no'"),
        ({"optimiser": "optuna.samplers.TPESampler", "options": {"x": 1}}, "'x'"),
        ({"optimiser": "collections.Counter"}, "collections.Counter is no Optuna sampler"),
        ({"options": {"kappa": 1}}, "optimiser bayes has no option 'kappa'"),
        ({"optimiser": None}, "optimiser is None"),
        ({"images": 0}, "images is 0"),
        ({"images": 10**9}, "a search has at most 100000 images and trials"),
        ({"images": 5.5}, "images is 5.5; give a whole number"),
        ({"images": "5"}, "images is '5'; give a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"per_trial": 1.5}, "per_trial is 1.5"),
        ({"name": 3}, "name is 3"),
        ({"panel": 2.5}, "panel is 2.5; give the number of images or the payload of each"),
        ({"panel": [1, 2]}, "panel is [1, 2]"),
        ({"panel": 10**9}, "panel is 1000000000; more than 100000 images are too many"),
        ({"stop": 0.1}, "stop is 0.1; give (min_gain, patience)"),
        ({"start": [7]}, "start 1: 7 does not map names to weights"),
        ({"start": [{**BEST, "M00": "x"}]}, "start 1: M00 is 'x', not a number"),
        ({"panel": 0}, "the panel has no image"),
        ({"init": "grid"}, "unknown init 'grid'"),
        ({"per_trial": 0}, "per_trial is 0"),
        ({"init_points": -1}, "init_points is -1"),
        ({"stop": (0.0, 3)}, "min_gain is a number above 0"),
        ({"stop": (0.1, 0)}, "patience at least 1"),
        ({"start": [{**BEST, "M00": 2.0}]}, "start 1: M00 is 2.0, outside its range -0.5 to 1.5"),
        ({"start": [{"M00": 1.0}]}, "start 1: has no 'IN00'"),
        ({"start": [{**BEST, "M01": 1.0}]}, "start 1: 'M01' does not vary; did you mean 'M00'"),
    ],
)
def test_mistake_is_told(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search(**change)
    assert said in str(caught.value)


def test_function_that_is_no_sampler_is_not_called(tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text("open(__file__ + '.ran', 'w')\ndef x(**_): pass\n")
    options = {"repo_or_dir": str(tmp_path), "model": "x", "source": "local"}
    with pytest.raises(ConfigError, match=r"torch\.hub\.load is no Optuna sampler"):
        search(optimiser="torch.hub.load", options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["hubconf.py"]


@pytest.mark.parametrize("span", [(1.0, 0.0), (0.5, 0.5), (0.0, math.nan), (-math.inf, 0.0)])
def test_range_that_is_none_is_told(span: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"IN00: from .* is no range"):
        Search({"IN00": span}, images=10, panel=5)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Search({}, images=0, panel=0, init_points=-1)
    assert len(str(caught.value).splitlines()) == 4


def test_storage_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unable to open database file"):
        search(storage=f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")


def test_stored_study_of_another_search_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'search.db'}"
    run(search(images=4, storage=url))
    with pytest.raises(
        ConfigError, match="the study 'search' belongs to another search: seed was"
    ):
        search(images=4, storage=url, seed=9)
    assert search(images=4, storage=url, seed=9, name="other").spent == 0


def of_method(weights: Mapping[str, Any], item: int) -> float:
    """Better by `slerp`, and at other weights."""
    best = {"lerp": 0.2, "slerp": 0.7, "ties": 0.5}[weights["method"]]
    bonus = {"lerp": 0.0, "slerp": 1.0, "ties": -1.0}[weights["method"]]
    return bonus + item % 3 - 4 * (float(weights["alpha"]) - best) ** 2


CHOICE: dict[str, Any] = {"alpha": (0.0, 1.0), "method": ["lerp", "slerp", "ties"]}


@every_optimiser
def test_search_chooses_by_name_beside_the_weights(optimiser: str) -> None:
    found = Search(CHOICE, images=60, panel=6, seed=2, optimiser=optimiser, per_trial=1)
    tried = set()
    for trial in found:
        tried.add(trial.weights["method"])
        for item in trial:
            trial.report(of_method(trial.weights, item))
    best = found.best().weights
    assert tried == {"lerp", "slerp", "ties"}
    assert best["method"] == "slerp"
    assert best["alpha"] == pytest.approx(0.7, abs=0.25)


def test_choice_is_kept_and_gone_on_with(tmp_path: Path) -> None:
    options: dict[str, Any] = {"images": 16, "panel": 6, "init_points": 8, "per_trial": 1}

    def proposals(found: Search, n: int) -> list[Mapping[str, Any]]:
        asked = []
        for trial in found:
            for item in trial:
                trial.report(of_method(trial.weights, item))
            asked.append(trial.weights)
            if len(asked) == n:
                break
        return asked

    whole = proposals(Search(CHOICE, **options), 16)
    url = f"sqlite:///{tmp_path / 'search.db'}"
    # A loop that is left ends its trial only when it is opened again, hence one more each time.
    parts = [*proposals(Search(CHOICE, storage=url, **options), 9)[:8]]
    parts += proposals(Search(CHOICE, storage=url, **options), 16)
    assert parts == whole


@pytest.mark.parametrize(
    ("names", "said"),
    [(["one"], "method: 'one' is no choice"), ([], "method: nothing is no choice")],
)
def test_choice_of_one_is_none(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Search({"method": names}, images=5, panel=2)
    with pytest.raises(ConfigError, match="start 1: method is 'slurp', none of lerp, slerp, ties"):
        Search(CHOICE, images=5, panel=2, start=[{"alpha": 0.5, "method": "slurp"}])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1e200, "good", None])
def test_score_that_is_no_number_is_refused(wrong: float) -> None:
    trial = next(iter(search()))
    for _ in trial:
        with pytest.raises(ValueError, match="the score of image 0 is"):
            trial.report(wrong)


def test_score_outside_the_loop_is_refused() -> None:
    trial = next(iter(search()))
    with pytest.raises(ValueError, match="inside the loop"):
        trial.report(1.0)


def test_recommendation_needs_a_score() -> None:
    with pytest.raises(RunError, match="nothing to recommend"):
        search().best()


def test_study_is_optuna_s(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'search.db'}"
    run(search(storage=url, images=12))
    stored = optuna.load_study(storage=url, study_name="search")
    assert {t.state.name for t in stored.trials} == {"COMPLETE"}
    assert stored.best_value is not None


def test_package_has_nothing_else(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Serach'"):
        bayesian_merger.Serach  # noqa: B018


def test_gradient_is_refused_by_a_search_that_is_told_no_slopes() -> None:
    with pytest.raises(ConfigError, match="gradient needs slopes, which this search is not told"):
        Search({"x": (0, 1)}, images=4, panel=2, optimiser="gradient")
