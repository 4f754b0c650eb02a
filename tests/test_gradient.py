"""A search that follows the gradient of the score."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_plugin
from test_run import Silent

from bayesian_merger import config as configuration
from bayesian_merger import judging, report, run, setup, tryout, warm
from bayesian_merger import outcome as outcomes
from bayesian_merger.backends import Followed
from bayesian_merger.data import Outcome, Prompt, Result
from bayesian_merger.errors import ConfigError
from bayesian_merger.setup import Setup
from bayesian_merger.study.proposals import FRESH, SCORE, Payloads, Plan
from bayesian_merger.values import Yardstick


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two models, payloads and a configuration that can be differentiated."""
    toy_plugin.write_model(tmp_path / "zero.safetensors", 0.0)
    toy_plugin.write_model(tmp_path / "one.safetensors", 1.0)
    (tmp_path / "portrait.toml").write_text('prompt = "a portrait"\n')
    (tmp_path / "landscape.toml").write_text('prompt = "a lake"\n')
    (tmp_path / "unloved.toml").write_text('prompt = "a form"\nscore_weight = 0\n')
    plugin = Path(toy_plugin.__file__).as_posix()
    (tmp_path / "config.toml").write_text(
        f"""
        plugins = ["{plugin}"]
        models = {{ a = "zero.safetensors", b = "one.safetensors" }}
        search = {{ images = 24 }}
        panel = {{ payloads = ["portrait.toml", "landscape.toml", "unloved.toml"], batch_size = 2 }}
        heldout = {{ images = 12, select_images = 4, candidates = 2 }}
        backend = {{ name = "painter" }}
        scorers = {{ nearness = {{}} }}
        """
    )
    return tmp_path


def ready(folder: Path, *overrides: str) -> Setup:
    return setup.prepare(configuration.load(folder / "config.toml", overrides), folder, "toy")


def start(folder: Path, *overrides: str, into: str = "run") -> Outcome:
    return run.run(ready(folder, *overrides), folder / into, Silent(), report=False)


def distance(result: Result) -> float:
    """Mean distance of the weights from the best ones."""
    weights = result.recipe.weights["alpha"]
    return float(np.mean([abs(weights[b] - toy_plugin.TARGET[b]) for b in weights]))


def measured(outcome: Outcome) -> list[object]:
    return [(r.name, r.scores, r.slopes, r.recipe.weights) for r in outcome.results]


def test_gradient_finds_in_few_images_what_no_other_optimiser_does(folder: Path) -> None:
    found = {
        name: start(folder, f"search.optimiser={name}", into=name) for name in ("auto", "bayes")
    }
    near = {name: distance(outcome.best) for name, outcome in found.items() if outcome.best}
    assert all(r.slopes for r in found["auto"].results if r.stage == "exploit")
    assert near["auto"] < 0.06
    assert near["auto"] < near["bayes"] / 3
    assert all(gain.low > 0 for gain in found["auto"].gain.values())


def test_auto_follows_the_gradient_where_it_can_and_says_so(folder: Path) -> None:
    chosen = ready(folder)
    assert chosen.plan.optimiser == "gradient"
    assert any("follows its gradient" in warning for warning in chosen.notes)
    assert not any("gradient" in w for w in ready(folder, "search.optimiser=gradient").notes)
    assert ready(folder, "search.optimiser=bayes").plan.optimiser == "bayes"
    assert ready(folder, "backend.name=stripes").plan.optimiser == "bayes"
    assert ready(folder, "scorers.likeness.weight=1").plan.optimiser == "bayes"


def test_auto_leaves_methods_that_are_not_linear_to_bayes(folder: Path) -> None:
    assert ready(folder, "merge.method=slerp").plan.optimiser == "bayes"
    by_name = ready(folder, "merge.method=slerp", "search.optimiser=gradient")
    assert by_name.plan.optimiser == "gradient"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("backend.name=stripes", "back end stripes cannot be differentiated"),
        ("scorers.likeness.weight=1", "scorer likeness cannot be differentiated"),
        ("search.objectives=payloads", "search.objectives asks for more than the mean"),
        ('search.methods=["slerp"]', "a choice among search.methods has no slope"),
    ],
)
def test_gradient_is_refused_with_the_reason_and_auto_takes_bayes(
    folder: Path, override: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"'gradient' does not fit, as {reason}"):
        ready(folder, "search.optimiser=gradient", override)
    assert ready(folder, override).plan.optimiser == "bayes"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{ last = 0 }", "last is 0; give a number of steps from 1 on"),
        ("{ last = 1.5 }", "last is 1.5"),
        ("{ lost = 1 }", "optimiser gradient has no option 'lost'; known: last"),
    ],
)
def test_options_are_checked(folder: Path, options: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ready(folder, f"search.options={options}")


def test_each_trial_is_shown_images_that_no_other_was_and_more_of_them_later() -> None:
    plan = Plan({"x": (0.0, 1.0)}, ["p"] * 4, images=400, optimiser="gradient")
    shown: list[int] = []
    sizes: list[int] = []
    while len(shown) < 400:
        items = plan.items(len(sizes), len(shown))
        shown += items
        sizes.append(len(items))
    assert shown == list(range(FRESH, FRESH + len(shown)))
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1], len(sizes)) == (6, 24, plan.n_trials)


def test_prompts_and_seeds_of_new_images_are_in_the_record(folder: Path) -> None:
    outcome = start(folder, "search.images=12")
    chosen = ready(folder, "search.images=12")
    stored = outcomes.open_study(folder / "run")._search.get_trials()
    found = {
        key: told["prompt"]
        for trial in stored
        for key, told in trial.user_attrs.items()
        if key.startswith(SCORE) and "prompt" in told
    }
    assert len(found) == sum(len(r.scores) for r in outcome.results if r.stage != "baseline") == 12
    assert found[f"{SCORE}{FRESH}"] == chosen.prompt(FRESH).to_dict()


def test_new_images_are_of_payloads_that_count_and_of_seeds_of_their_own(folder: Path) -> None:
    chosen = ready(folder)
    fresh = [chosen.prompt(FRESH + i) for i in (3, 0, 1, 2, 40)]
    assert [p.payload for p in fresh] == [
        "landscape",
        "portrait",
        "landscape",
        "portrait",
        "portrait",
    ]
    assert [p.index - FRESH for p in fresh] == [3, 0, 1, 2, 40]
    seeds = [p.seed for p in (*chosen.panel, *chosen.select_panel, *chosen.heldout_panel, *fresh)]
    assert len(set(seeds)) == len(seeds)


def test_slopes_are_those_of_the_mean_score(folder: Path) -> None:
    chosen = ready(folder, "backend.noise=0.0")
    chosen.backend.load(chosen.baseline("even"), chosen.merger.merge(chosen.baseline("even")))
    prompts = [chosen.prompt(FRESH + i) for i in range(2)]
    ((_, slopes, _),) = judging.followed(chosen, prompts, Yardstick(chosen.measure))
    assert slopes
    assert slopes["IN00_alpha"] == pytest.approx(10 * 2 * 0.3 / 26, rel=1e-5)
    assert slopes["base_alpha"] == pytest.approx(-10 * 2 * 0.3 / 26, rel=1e-5)


def test_slopes_are_those_of_the_scorers_that_judge_an_image(folder: Path) -> None:
    both = ('scorers.twice={ scorer = "nearness", sharpness = 20.0, payloads = ["portrait"] }',)
    chosen = ready(folder, "backend.noise=0.0", 'value.normalise="none"', *both)
    chosen.backend.load(chosen.baseline("even"), chosen.merger.merge(chosen.baseline("even")))
    prompts = [chosen.prompt(FRESH + i) for i in range(2)]
    pieces = [judging.followed(chosen, [one], Yardstick(chosen.measure)) for one in prompts]
    slopes = {p.payload: next(piece).slopes for p, piece in zip(prompts, pieces, strict=True)}
    plain, more = slopes["landscape"], slopes["portrait"]
    assert plain
    assert more
    assert plain["IN00_alpha"] == pytest.approx(10 * 2 * 0.3 / 26, rel=1e-5)
    assert more["IN00_alpha"] == pytest.approx(1.5 * plain["IN00_alpha"], rel=1e-5)


def test_search_by_anything_but_a_weighted_mean_does_without_the_gradient(folder: Path) -> None:
    assert ready(folder).plan.optimiser == "gradient"
    assert ready(folder, 'value.combine="minimum"').plan.optimiser == "bayes"
    with pytest.raises(ConfigError, match="make no weighted mean of the scores"):
        ready(folder, 'value.normalise="rank"', "search.optimiser=gradient")


def test_payloads_have_their_share_of_new_images() -> None:
    panel = ["portrait", "lake", "form"] * 2
    shares = {"portrait": 1.0, "lake": 3.0, "form": 0.0}
    plan = Plan({"x": (0.0, 1.0)}, panel, shares=shares, images=400, optimiser="gradient")
    items = [item for n in range(0, 240, 6) for item in plan.items(n // 6, n)[:6]]
    assert len(set(items)) == len(items) == 240
    found = [Payloads(panel, (), shares)[item] for item in items]
    assert found.count("lake") == 180
    assert found.count("portrait") == 60


def test_payload_that_counts_more_decides(folder: Path) -> None:
    """Payloads want opposite merges: at equal shares the best weight is 0.5, at 9 to 1 it is 0.82."""
    plain = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(plain.replace("nearness", "torn"))
    options = ("search.images=48", 'search.groups=[["*"]]')
    equal = start(folder, *options, into="equal").best
    (folder / "landscape.toml").write_text('prompt = "a lake"\nscore_weight = 9\n')
    torn = start(folder, *options, into="torn").best
    assert equal
    assert torn
    assert equal.recipe.weights["alpha"]["IN00"] == pytest.approx(0.5, abs=0.08)
    assert torn.recipe.weights["alpha"]["IN00"] == pytest.approx(0.82, abs=0.08)


def test_run_without_a_gradient_goes_on_where_it_was_cut_off(folder: Path) -> None:
    options = ["backend.fault=rigid", "backend.at=20"]
    with pytest.raises(KeyboardInterrupt):
        start(folder, *options)
    again = ready(folder, *options)
    again.backend._at = 0  # type: ignore[attr-defined]
    resumed = run.run(again, folder / "run", Silent(), report=False)
    assert resumed.finished
    assert measured(resumed) == measured(start(folder, "backend.fault=rigid", into="whole"))
    assert measured(run.run(again, folder / "run", Silent(), report=False)) == measured(resumed)


@pytest.mark.parametrize("slope", [math.inf, math.nan, 1e200])
def test_slopes_that_are_no_numbers_count_as_none(
    folder: Path, slope: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(self: object, *given: Any) -> Iterator[Followed]:
        for piece in followed(self, *given):
            yield Followed(piece.samples, dict.fromkeys(piece.slopes, slope))

    chosen, observer = ready(folder), Silent()
    painter = type(chosen.backend)
    followed = painter.follow  # type: ignore[attr-defined]
    monkeypatch.setattr(painter, "follow", follow)
    outcome = run.run(chosen, folder / "run", observer, report=False)
    assert outcome.finished
    told = [[piece.by for piece in r.slopes] for r in outcome.results if r.slopes]
    assert told == [[{}, {}]] * 3  # the even merge and two more, which are followed no further
    assert "(the slope by" in str(outcome.given_up)
    assert any("without its gradient: the slope by" in line for line in observer.lines)


def test_slopes_of_other_images_count_where_one_image_has_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(self: object, *given: Any) -> Iterator[Followed]:
        for number, piece in enumerate(followed(self, *given)):
            yield Followed(piece.samples, {}, "too steep") if number == 0 else piece

    chosen, observer = ready(folder), Silent()
    painter = type(chosen.backend)
    followed = painter.follow  # type: ignore[attr-defined]
    monkeypatch.setattr(painter, "follow", follow)
    outcome = run.run(chosen, folder / "run", observer, report=False)
    assert outcome.given_up is None
    told = [[bool(piece.by) for piece in r.slopes] for r in outcome.results if r.slopes]
    assert all(not first and all(rest) for first, *rest in told)
    assert "3 of 6 images of trial 1 told no gradient: too steep" in observer.lines


def test_groups_freezes_and_ranges_hold(folder: Path) -> None:
    outcome = start(
        folder,
        'search.groups=[["IN00", "IN02"]]',
        "search.freeze={ base = 0.3 }",
        'search.ranges={ "OUT*" = [0.4, 0.6] }',
    )
    for result in outcome.results[3:]:
        weights = result.recipe.weights["alpha"]
        assert weights["base"] == 0.3
        assert weights["IN00"] == weights["IN02"]
        assert all(0.4 <= weights[f"OUT{i:02}"] <= 0.6 for i in range(12))
        slopes = [slope for piece in result.slopes for slope in piece.by]
        assert "base_alpha" not in slopes
        assert "IN00_alpha-IN02_alpha" in slopes


@pytest.mark.parametrize("at", [8, 23, 46])
def test_interrupted_run_ends_as_if_nothing_had_happened(folder: Path, at: int) -> None:
    options = ["backend.fault=stop", f"backend.at={at}"]
    with pytest.raises(KeyboardInterrupt):
        start(folder, *options, into="cut")
    again = ready(folder, *options)
    again.backend._at = -1  # type: ignore[attr-defined]
    resumed = run.run(again, folder / "cut", Silent(), report=False)
    whole = start(folder, into="whole")
    assert measured(resumed) == measured(whole)
    assert resumed.heldout == whole.heldout


@pytest.mark.parametrize("fault", ["flat", "rigid"])
def test_search_goes_on_by_the_scores_where_merges_tell_no_slope(folder: Path, fault: str) -> None:
    observer = Silent()
    outcome = run.run(
        ready(folder, f"backend.fault={fault}"), folder / "run", observer, report=False
    )
    assert outcome.finished
    assert not any(piece.by for result in outcome.results for piece in result.slopes)
    trials = [r for r in outcome.results if r.stage != "baseline"]
    assert all(r.state == "complete" for r in trials)
    # Two merges on new images, the others on those of the panel.
    assert [min(r.scores) >= FRESH for r in trials[:4]] == [True, True, False, False]
    assert sum("2 merges in a row told no slope" in line for line in observer.lines) == 1
    failed = [line for line in observer.lines if "without its gradient: " in line]
    assert len(failed) == (3 if fault == "rigid" else 0)  # the even merge and two more


def test_fork_of_a_search_by_the_gradient_begins_with_its_best_merges(folder: Path) -> None:
    before = start(folder)
    chosen = ready(folder, "search.optimiser=bayes", "search.seed=1")
    brought = warm.fork(folder / "run", chosen, folder / "new")
    assert brought.starts == len(before.candidates) == 2
    reasons = list(brought.left_out)
    assert reasons == ["a search by the gradient shows each merge images of its own"]


def test_gradient_that_misleads_is_given_up_and_the_search_goes_on_by_scores(folder: Path) -> None:
    observer = Silent()
    options = ("backend.fault=contrary", "search.images=54", "search.seed=1")
    outcome = run.run(ready(folder, *options), folder / "run", observer, report=False)
    trials = [r for r in outcome.results if r.stage != "baseline"]
    followed = [bool(trial.slopes) for trial in trials]
    assert followed == sorted(followed, reverse=True)
    assert 4 < sum(followed) < 9
    assert all(item < FRESH for trial in trials if not trial.slopes for item in trial.scores)
    assert sum("score worse than the one it began at" in line for line in observer.lines) == 1
    assert "score worse than the one it began at" in str(outcome.given_up)
    assert outcome.best is not None
    assert distance(outcome.best) < 0.35  # of the even merge .3, of where the gradient led .7


def test_poor_merges_to_start_with_are_not_the_gradients_fault(folder: Path) -> None:
    """What the user gave says nothing of where the gradient leads."""
    poor = ", ".join(f"{{ base = {value} }}" for value in (1.0, 0.9, 0.95, 0.85, 0.8))
    ends = 'search.ranges={ "*" = [0.0, 1.0] }'
    outcome = start(folder, f"search.start=[{poor}]", ends, "search.images=48")
    assert all(r.slopes for r in outcome.results if r.stage in ("explore", "exploit"))


def test_run_that_began_by_scores_stays_so_under_auto(folder: Path) -> None:
    start(folder, "search.optimiser=bayes")
    assert not start(folder, "search.images=26").followed


def test_what_the_scores_alone_speak_for_is_judged_on_fresh_images_too(folder: Path) -> None:
    outcome = start(folder)
    assert [r.name for r in outcome.candidates] == ["recommended", "by scores alone"]


def test_check_tells_what_an_image_costs_with_its_gradient(folder: Path) -> None:
    tried = tryout.try_out(ready(folder))
    assert tried.followed == 24 + 6
    assert tried.followed_s > 0
    assert tryout.try_out(ready(folder, "search.optimiser=bayes")).followed == 0


@pytest.mark.parametrize(
    ("differentiable", "said"),
    [
        ("raise torch.OutOfMemoryError('CUDA out of memory')", "out of GPU memory"),
        ("return -pixels.mean((1, 2, 3))", "gives an image 0.4"),
        ("return pixels.mean()", r"differentiable gave the shape \(\), not \(4,\)"),
        (
            "return pixels.mean((1, 2, 3)) * float('nan')",
            r"differentiable gave \[nan, nan, nan, nan\]",
        ),
        ("return pixels.detach().mean((1, 2, 3))", "does not depend on the pixels"),
        ("raise ValueError('no face')", "scorer brightness: ValueError: no face"),
    ],
)
def test_check_tells_what_is_wrong_with_a_scorers_gradient(
    folder: Path, differentiable: str, said: str
) -> None:
    (folder / "brightness.py").write_text(
        f"""
import numpy as np
import torch
from bayesian_merger.scorers import scorer

@scorer
class Brightness:
    'The mean of all pixels.'

    def __call__(self, samples):
        return [float(np.asarray(s.image).mean()) / 255 for s in samples]

    def differentiable(self, pixels, prompts):
        {differentiable}
"""
    )
    plain = (folder / "config.toml").read_text().replace("nearness", "brightness")
    brought = plain.replace("plugins = [", 'plugins = ["brightness.py", ')
    (folder / "config.toml").write_text(brought)
    (note,) = tryout.try_out(ready(folder)).notes
    assert re.search(said, note)
    assert "brightness" in note


@pytest.mark.parametrize("at", [0, 30])
def test_merge_whose_first_images_tell_no_gradient_is_followed_no_further(
    folder: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(self: object, prompts: Sequence[Prompt], *given: Any) -> Iterator[Followed]:
        for prompt in prompts:
            for piece in followed(self, [prompt], *given):
                is_new = prompt.index >= FRESH
                yield Followed(piece.samples, {}, "too steep") if is_new else piece

    def steep(*options: str) -> Setup:
        chosen = ready(folder, *options)
        monkeypatch.setattr(type(chosen.backend), "follow", follow)
        return chosen

    followed = type(ready(folder).backend).follow  # type: ignore[attr-defined]
    options = ("backend.fault=stop", f"backend.at={at}") if at else ()
    if at:
        with pytest.raises(KeyboardInterrupt):
            run.run(steep(*options), folder / "run", Silent(), report=False)
    chosen = steep(*options)
    chosen.backend._at = -1  # type: ignore[attr-defined]
    outcome = run.run(chosen, folder / "run", Silent(), report=False)
    told = [[bool(piece.by) for piece in r.slopes] for r in outcome.results if r.slopes]
    assert told == [[True] * 6, [False] * 2, [False] * 2]
    assert "too steep" in str(outcome.given_up)


def test_check_tells_of_images_without_a_gradient(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(self: object, *given: Any) -> Iterator[Followed]:
        for piece in followed(self, *given):
            yield Followed(piece.samples, {}, "too steep")

    chosen = ready(folder)
    painter = type(chosen.backend)
    followed = painter.follow  # type: ignore[attr-defined]
    monkeypatch.setattr(painter, "follow", follow)
    (note,) = tryout.try_out(chosen).notes
    assert note.startswith("not every image of ")
    assert note.endswith("told its gradient: too steep")


def test_last_where_auto_takes_bayes_is_refused_with_the_reason(folder: Path) -> None:
    said = "'last' is of the gradient, which does not fit, as scorer likeness cannot be differentiated"
    with pytest.raises(ConfigError, match=said):
        ready(folder, "scorers.likeness.weight=1", "search.options={ last = 4 }")


def test_ranges_without_the_even_merge_show_the_slopes_where_the_search_began(
    folder: Path,
) -> None:
    (folder / "landscape.toml").write_text('prompt = "a lake"\nscore_weight = 3\n')
    outcome = start(folder, 'search.ranges={ "*" = [0.0, 0.4] }')
    where, slopes = report.first_slopes(outcome)
    assert where == "trial 1"
    assert slopes.keys() == {f"{block}_alpha" for block in toy_plugin.TARGET}


def test_parents_that_score_well_do_not_hold_the_search(folder: Path) -> None:
    """Of the even merge the slopes lead up; that a parent is better yet is for the proof to say."""
    outcome = start(folder, "search.images=24")
    assert [len(r.slopes) for r in outcome.results[:3]] == [0, 2, 0]
    chosen = ready(folder)
    study = outcomes.open_study(folder / "run")
    proposer = study.searching(chosen.plan, lambda scores: scores["nearness"])
    known = [one.point for one in proposer._bayes._judged(proposer.study)]
    assert len(known) == 5
    assert not any(np.ptp(point) == 0 and point[0] != 0.5 for point in known)


@pytest.mark.parametrize(
    ("a", "b", "began", "knows"),
    [(0.0, 1.0, 0.5, []), (0.0, 1.4, 0.5, []), (0.5, 1.4, 0.2, [0.0]), (-0.4, 0.5, 0.8, [1.0])],
)
def test_search_begins_beside_a_parent_that_beats_the_even_merge(
    folder: Path, a: float, b: float, began: float, knows: list[float]
) -> None:
    """The best of the merges between them has 0.5 in every block; nearby a parent's score counts."""
    toy_plugin.write_model(folder / "zero.safetensors", a)
    toy_plugin.write_model(folder / "one.safetensors", b)
    outcome = start(folder, "search.images=12")
    first = outcome.followed[0]
    assert [*first.recipe.weights["alpha"].values()] == [began] * 26
    assert report.first_slopes(outcome)[0] == ("the even merge" if began == 0.5 else first.name)
    chosen = ready(folder, "search.images=12")
    study = outcomes.open_study(folder / "run")
    proposer = run.searching(study, chosen, Yardstick(chosen.measure))
    points = [one.point for one in proposer._bayes._judged(proposer.study)]
    assert [point[0] for point in points if np.ptp(point) == 0 and point[0] in (0, 1)] == knows


def test_search_begins_at_the_even_merge_where_a_parent_beats_it_by_chance(folder: Path) -> None:
    """A is a little better, by less than images differ in how they like it."""
    toy_plugin.write_model(folder / "zero.safetensors", 0.48)
    toy_plugin.write_model(folder / "one.safetensors", 0.54)
    outcome = start(folder, "search.images=12", "backend.noise=0.2")
    a, even, b = (r.value.mean for r in outcome.results[:3] if r.value)
    assert max(a, b) > even
    assert set(outcome.followed[0].recipe.weights["alpha"].values()) == {0.5}


def test_search_begins_where_the_ranges_have_a_place_beside_a_parent_or_in_their_middle(
    folder: Path,
) -> None:
    plan = Plan({"x": (0.0, 1.0), "y": (-1.0, 3.0)}, ["p"], images=20, optimiser="gradient")
    assert plan.n_first == 1
    assert plan.first(0) == {"x": 0.5, "y": 1.0}
    assert set((ready(folder).beside("a") or {}).values()) == {0.2}
    frozen = ready(folder, "search.freeze={base = 0.0}").beside("a") or {}
    assert [*frozen.values()] == [0.2] * 25
    narrow = ready(folder, 'search.ranges={ "*" = [0.3, 0.6] }')
    assert set((narrow.beside("a") or {}).values()) == {0.3}
    assert set((narrow.beside("b") or {}).values()) == {0.6}
    toy_plugin.write_model(folder / "two.safetensors", 2.0)
    assert ready(folder, "merge.method=sum_twice", "models.c=two.safetensors").beside("a") is None


def test_image_of_the_panel_is_found_by_its_number(folder: Path) -> None:
    chosen = ready(folder)
    found: list[Prompt] = [chosen.prompt(i) for i in range(len(chosen.panel))]
    assert found == list(chosen.panel)
