"""Several objectives: the Pareto front that a run reports on request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_run import Silent, start
from test_run import folder as folder  # a fixture
from test_warm import LIGHT
from toy_plugin import __file__ as PLUGIN

from bayesian_merger import config as configuration
from bayesian_merger import merge, recipes, run, setup
from bayesian_merger import outcome as outcomes
from bayesian_merger.bayes import Bayes, Judged
from bayesian_merger.data import Outcome
from bayesian_merger.errors import ConfigError
from bayesian_merger.setup import Setup


def test_compromises_lead_from_one_optimum_to_the_other() -> None:
    chance = np.random.default_rng(0)
    points = chance.uniform(size=(40, 3))
    ends = np.array([[0.2, 0.5, 0.5], [0.8, 0.5, 0.5]])
    bayes = Bayes(3, ["p"] * 4, 0)
    learnt = []
    for end in ends:
        values = -((points - end) ** 2).sum(1)
        learnt.append(
            bayes.learnt(
                [
                    Judged(x, {i % 4: v})
                    for i, (x, v) in enumerate(zip(points, values, strict=True))
                ]
            )
        )
    found = np.array(bayes.compromises(learnt, 6))
    assert len(found) == 6
    assert found[0] == pytest.approx(ends[0], abs=0.1)
    assert found[1] == pytest.approx(ends[1], abs=0.1)
    # On the line between both, and none at the same place.
    assert np.abs(found[:, 1:] - 0.5).max() < 0.1
    assert np.diff(np.sort(found[:, 0])).min() > 0.02
    # None is better than another at both.
    heights = np.array([[-((x - end) ** 2).sum() for end in ends] for x in found])
    order = heights[heights[:, 0].argsort()]
    assert (np.diff(order[:, 1]) < 0.01).all()


def prepared(folder: Path, *overrides: str) -> Setup:
    """A run of two scorers."""
    (folder / "light.py").write_text(LIGHT)
    plugins = f'plugins=["{Path(PLUGIN).as_posix()}", "light.py"]'
    settings = [plugins, "scorers={likeness = {}, light = {}}", "search.n_iters=12", *overrides]
    config = configuration.load(folder / "config.toml", settings)
    return setup.prepare(config, folder, "toy")


def of_two_scorers(folder: Path, *overrides: str, into: str = "run") -> Outcome:
    return run.run(prepared(folder, *overrides), folder / into, Silent(), report=False)


def test_front_of_the_scorers_is_reported_with_recipes_and_a_figure(folder: Path) -> None:
    outcome = of_two_scorers(folder, "search.objectives=scorers")
    assert outcome.finished
    assert len(outcome.front) >= 2
    assert {name for one in outcome.front for name in one.values} == {"likeness", "light"}
    first = outcome.front[0]
    at = {n: [one.values[n].mean for one in outcome.front] for n in ("likeness", "light")}
    assert at["likeness"] == sorted(at["likeness"], reverse=True)
    assert at["light"] == sorted(at["light"])
    even = next(r for r in outcome.results if r.name == "even")
    assert outcome.front_baselines["even"]["light"].mean == pytest.approx(
        np.mean([scores["light"] for scores in even.scores.values()])
    )
    made = folder / "run"
    outcomes.write_page(outcome, made)
    outcomes.write_figures(outcome, made)
    assert (made / "figures" / "front.png").is_file()
    assert len(list((made / "front").glob("*.toml"))) == len(outcome.front)
    recipe = recipes.read(made / "front" / "1.toml")
    assert recipe.weights == first.recipe.weights
    models = [merge.open_model(folder / f"{name}.safetensors") for name in ("zero", "one")]
    merge.Merger(models).merge(recipe)
    assert "front/1.toml" in (made / "report.html").read_text()


def test_front_can_be_asked_of_a_finished_run_without_an_image(folder: Path) -> None:
    before = of_two_scorers(folder)
    assert not before.front
    after = of_two_scorers(folder, "search.objectives=scorers")
    assert after.images == before.images
    assert after.front
    again = outcomes.read_outcome(folder / "run", outcomes.open_study(folder / "run"))
    assert again.front == after.front


def test_front_of_a_longer_run_by_other_objectives_replaces_the_old_one(folder: Path) -> None:
    of_two_scorers(folder, "search.objectives=scorers")
    ready = prepared(folder, "search.objectives=payloads")
    outcome = run.run(ready, folder / "run", Silent(), more=12, report=False)
    assert {name for one in outcome.front for name in one.values} == {"portrait", "landscape"}
    assert outcome.front_baselines["a"].keys() == {"portrait", "landscape"}
    recipes_left = {path.stem for path in (folder / "run" / "front").glob("*.toml")}
    assert recipes_left == {str(n) for n in range(1, len(outcome.front) + 1)}
    of_two_scorers(folder, "search.images=1000")  # more than it has spent, but of 12 trials
    assert not list((folder / "run" / "front").glob("*.toml"))


def test_search_for_several_objectives_looks_elsewhere_and_can_be_stopped(folder: Path) -> None:
    wanted = "search.objectives=scorers"
    plain, whole = (
        of_two_scorers(folder, into="plain"),
        of_two_scorers(folder, wanted, into="whole"),
    )

    def tried(outcome: Outcome) -> list[object]:
        return [r.recipe.weights for r in outcome.results]

    assert tried(whole) != tried(plain)
    cut = (wanted, "backend.fault=stop", "backend.at=80")
    with pytest.raises(KeyboardInterrupt):
        of_two_scorers(folder, *cut, into="cut")
    ready = prepared(folder, *cut)
    ready.backend._at = -1  # type: ignore[attr-defined]
    assert tried(run.run(ready, folder / "cut", Silent(), report=False)) == tried(whole)


def test_front_of_the_payloads_has_a_value_for_each(folder: Path) -> None:
    outcome = start(folder, "search.objectives=payloads", "search.n_iters=6")
    assert {name for one in outcome.front for name in one.values} == {"portrait", "landscape"}
    assert outcome.front_baselines.keys() == {"a", "even", "b"}


def test_objectives_of_which_there_is_one_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is only one of the scorers"):
        start(folder, "search.objectives=scorers")
    with pytest.raises(ConfigError, match="there is only one of the payloads"):
        start(folder, "search.objectives=payloads", 'panel.payloads=["portrait.toml"]')


def test_figure_that_is_no_more_goes(folder: Path) -> None:
    outcome = of_two_scorers(folder)
    stale = folder / "run" / "figures" / "front.svg"
    stale.parent.mkdir()
    stale.write_text("<svg/>")
    own = stale.parent / "mine.png"  # that of the user
    own.write_bytes(b"")
    outcomes.write_figures(outcome, folder / "run")
    assert not stale.exists()
    assert own.exists()
    assert (stale.parent / "convergence.svg").is_file()
