from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
import torch
import toy_plugin
from safetensors.torch import load_file, save_file

from bayesian_merger import config as configuration
from bayesian_merger import outcome as outcomes
from bayesian_merger import recipes, run, setup
from bayesian_merger.blocks import SD1
from bayesian_merger.data import Outcome, Result
from bayesian_merger.errors import ConfigError, RunError
from bayesian_merger.study.storage import url_of

PLUGINS = f'plugins=["{Path(toy_plugin.__file__).as_posix()}", "fragile.py"]'
FRAGILE = """
from bayesian_merger.methods import method

@method
def fragile(a, b, *, alpha=0.5):
    if alpha > 0.7:
        raise ArithmeticError("the matrix is singular")
    return a + alpha * (b - a)
"""


class Silent:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.made = self.known = 0
        self.lines: list[str] = []

    def planned(self, images: int) -> None:
        self.total = images

    def started(self, stage: str, name: str, images: int) -> None:
        self.lines.append(f"{stage} {name}")

    def judged(self, images: int, made: bool) -> None:
        self.made += images * made
        self.known += images * (not made)

    def finished(self, result: Result, leader: Result | None) -> None:
        pass

    def noted(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two models, two payloads and a configuration."""
    toy_plugin.write_model(tmp_path / "zero.safetensors", 0.0)
    toy_plugin.write_model(tmp_path / "one.safetensors", 1.0)
    (tmp_path / "portrait.toml").write_text('prompt = "a portrait"\n')
    (tmp_path / "landscape.toml").write_text('prompt = "a __place__"\n')
    (tmp_path / "wild").mkdir()
    (tmp_path / "wild" / "place.txt").write_text("lake\nvalley\n")
    plugin = Path(toy_plugin.__file__).as_posix()
    (tmp_path / "config.toml").write_text(
        f"""
        plugins = ["{plugin}"]
        [models]
        a = "zero.safetensors"
        b = "one.safetensors"
        [search]
        init_points = 4
        n_iters = 3
        images_per_trial = 6
        [panel]
        payloads = ["*e.toml", "portrait.toml"]
        wildcards_dir = "wild"
        batch_size = 3
        [heldout]
        images = 8
        select_images = 4
        candidates = 2
        [backend]
        name = "stripes"
        [scorers.likeness]
        [output]
        save_best = true
        """
    )
    return tmp_path


def start(folder: Path, *overrides: str, into: str = "run", report: bool = False) -> Outcome:
    config = configuration.load(folder / "config.toml", overrides)
    ready = setup.prepare(config, folder, "toy")
    return run.run(ready, folder / into, Silent(), report=report)


def measured(outcome: Outcome) -> list[tuple[str, Mapping[int, Mapping[str, float]], object]]:
    return [(r.name, r.scores, r.recipe.weights) for r in (*outcome.results, *outcome.selected)]


def test_run_finds_a_merge_that_beats_its_parents_and_says_how_sure_that_is(folder: Path) -> None:
    outcome = start(folder, "search.init_points=6", "search.n_iters=8")
    assert outcome.finished
    assert all(gain.low > 0 for gain in outcome.gain.values()), outcome.gain
    assert "beats A, B and the even merge" in outcome.verdict()
    assert outcome.heldout["best"].n == 8


def test_result_json_counts_images_and_trials(folder: Path) -> None:
    outcome = start(folder)
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["trials"] == {"complete": 7, "stopped": 0, "failed": 0}
    assert result["images"] == 10 * 6 + 2 * 4 + 4 * 8 == outcome.images
    assert set(result["gain"]) == {"over_a", "over_b", "over_even"}
    assert result["best"]["method"] == "weighted_sum"


def test_best_toml_rebuilds_best_safetensors_byte_for_byte(folder: Path) -> None:
    start(folder)
    recipe = recipes.read(folder / "run" / "best.toml")
    recipes.open_models(recipe, folder).merge(recipe).save(folder / "again.safetensors")
    best = (folder / "run" / "best.safetensors").read_bytes()
    assert (folder / "again.safetensors").read_bytes() == best


def test_same_seed_gives_the_same_result_twice_and_another_seed_another(folder: Path) -> None:
    first = start(folder, into="one")
    assert measured(start(folder, into="two")) == measured(first)
    assert measured(start(folder, "search.seed=1", into="three")) != measured(first)


@pytest.mark.parametrize(
    "at", [7, 40, 61, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 19, 59, 75))]
)
def test_interrupted_run_goes_on_and_ends_as_if_nothing_had_happened(
    folder: Path, at: int
) -> None:
    whole = start(folder, into="whole")
    with pytest.raises(KeyboardInterrupt):
        start(folder, "backend.fault=stop", f"backend.at={at}", into="cut")
    # `fault` is part of the back end's options, so it is set back where the run remembers them.
    observer = Silent()
    config = configuration.load(folder / "config.toml", ["backend.fault=stop", "backend.at=0"])
    ready = setup.prepare(config, folder, "toy")
    with pytest.raises(ConfigError, match=r"backend\.at was .*, is 0"):
        run.run(ready, folder / "cut", observer, report=False)
    config = configuration.load(folder / "config.toml", ["backend.fault=stop", f"backend.at={at}"])
    ready = setup.prepare(config, folder, "toy")
    ready.backend._at = -1  # type: ignore[attr-defined]
    resumed = run.run(ready, folder / "cut", observer, report=False)
    assert measured(resumed) == measured(whole)
    assert resumed.images == whole.images
    # At most the batch that was being made is made again; nothing else is.
    assert whole.images - at < observer.made <= whole.images - at + 4
    assert observer.made + observer.known == observer.total
    assert sum("the search goes on: " in line for line in observer.lines) == (20 <= at < 60)
    assert resumed.heldout == whole.heldout


def test_finished_run_makes_no_further_image(folder: Path) -> None:
    start(folder)
    observer = Silent()
    config = configuration.load(folder / "config.toml")
    run.run(setup.prepare(config, folder, "toy"), folder / "run", observer, report=False)
    assert observer.made == 0


def test_more_iterations_extend_a_finished_run(folder: Path) -> None:
    before = start(folder)
    after = start(folder, "search.n_iters=5")
    assert [r.scores for r in after.results[:10]] == [r.scores for r in before.results]
    assert len(after.results) == 12


def test_more_images_extend_a_finished_run_and_are_gone_on_with(folder: Path) -> None:
    before = start(folder)
    config = configuration.load(folder / "config.toml", ["backend.fault=stop"])
    with pytest.raises(ConfigError):  # another configuration promises nothing
        run.run(
            setup.prepare(config, folder, "toy"), folder / "run", Silent(), more=500, report=False
        )
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    object.__setattr__(ready.backend, "_fault", "stop")
    object.__setattr__(ready.backend, "_at", 9)
    with pytest.raises(KeyboardInterrupt):
        run.run(ready, folder / "run", Silent(), more=18, report=False)
    for more in (18, None):  # the same command ends it, and a plain one adds nothing
        ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
        after = run.run(ready, folder / "run", Silent(), more, report=False)
        assert [r.scores for r in after.results[:10]] == [r.scores for r in before.results]
        assert len(after.results) == 13


def test_images_that_were_to_be_spent_further_can_be_taken_back(folder: Path) -> None:
    start(folder)
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    object.__setattr__(ready.backend, "_fault", "stop")
    object.__setattr__(ready.backend, "_at", 15)
    with pytest.raises(KeyboardInterrupt):
        run.run(ready, folder / "run", Silent(), more=90_000, report=False)
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    after = run.run(ready, folder / "run", Silent(), more=0, report=False)
    assert after.finished
    assert 10 < len(after.results) < 20


def test_failed_trial_has_no_value_and_the_search_goes_on(folder: Path) -> None:
    outcome = start(folder, "backend.fault=weak")
    failed = [r for r in outcome.results if r.state == "failed"]
    assert failed
    assert all(r.value is None and r.reason == "out of memory" for r in failed)
    assert outcome.finished
    assert outcome.best is not None
    assert outcome.best.recipe.weights["alpha"]["IN00"] <= 0.5


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["backend.fault=crash"], "the merge: RuntimeError: the device is gone"),
        (
            ["merge.method=fragile", PLUGINS, 'search.groups=[["*"]]'],
            "fragile, tensor BASE: ArithmeticError: the matrix is singular",
        ),
    ],
)
def test_crash_of_a_plugin_fails_its_trial_and_not_the_run(
    folder: Path, overrides: list[str], reason: str
) -> None:
    (folder / "fragile.py").write_text(FRAGILE)
    outcome = start(folder, *overrides)
    reasons = {r.reason for r in outcome.results if r.state == "failed"}
    assert reasons == {reason.replace("BASE", repr(toy_plugin.TENSORS["base"]))}
    assert outcome.finished


def test_back_end_that_loses_an_image_stops_the_run(folder: Path) -> None:
    with pytest.raises(RunError, match=r"the back end made 3 images for 4 prompts"):
        start(folder, "backend.fault=lossy")


def test_method_whose_weights_are_not_called_alpha_is_searched(folder: Path) -> None:
    outcome = start(folder, "merge.method=between")
    assert outcome.finished
    searched = [r.recipe for r in outcome.results if r.stage != "baseline"]
    assert all(set(recipe.weights) == {"left", "right"} for recipe in searched)
    assert start(folder, "merge.method=between").images == outcome.images


def test_optimiser_is_told_only_baselines_that_the_search_could_have_proposed(
    folder: Path,
) -> None:
    def known(vae: str) -> set[str]:
        into = f"{vae}-{other}"
        start(folder, f"merge.vae={vae}", "search.n_iters=0", into=into)
        url = url_of(folder / into / "study.db")
        trials = optuna.load_study(study_name="search", storage=url).trials
        return {t.user_attrs.get("observed") for t in trials} - {None}

    for other in (1.0, 2.0):
        for model, value in {"zero": 1.0, "one": other}.items():
            path = folder / f"{model}.safetensors"
            vae = {"first_stage_model.encoder.conv_in.weight": torch.full((2,), value)}
            save_file({**load_file(path), **vae}, path)
        is_same = other == 1.0
        assert known("a") == {"a", "even", *("b" * is_same)}
        assert known("b") == {"b", "even", *("a" * is_same)}


def test_three_failures_in_a_row_stop_the_run_with_the_reason(folder: Path) -> None:
    with pytest.raises(RunError, match=r"3 trials in a row failed.*the server went away"):
        start(folder, "backend.fault=dead")


def test_back_end_that_ignores_the_merge_stops_the_run_before_the_search(folder: Path) -> None:
    with pytest.raises(RunError, match="all their images are the same"):
        start(folder, "backend.fault=frozen")
    outcome = outcomes.read_outcome(folder / "run", outcomes.open_study(folder / "run"))
    assert not [r for r in outcome.results if r.stage != "baseline"]


def test_run_that_finds_nothing_better_says_so(folder: Path) -> None:
    # With the sign turned, the parents are further from the target than the merges in this range.
    middle = 'search.ranges={"*" = [0.45, 0.55]}'
    outcome = start(folder, "scorers.likeness.sign=-1.0", "search.n_iters=0", middle)
    assert outcome.gain["over_a"].mean < 0
    assert "is worse than A" in outcome.verdict()


def test_negative_scores_are_scores_like_others(folder: Path) -> None:
    outcome = start(folder, "search.n_iters=2")
    assert outcome.leader is not None
    assert outcome.leader.value is not None
    assert outcome.leader.value.mean < 0


def test_report_is_there_when_the_merge_cannot_be_written(folder: Path) -> None:
    in_the_way = folder / "run" / "best.safetensors"
    in_the_way.mkdir(parents=True)
    with pytest.raises(
        RunError, match=r"best\.safetensors.*the report and best\.toml are written"
    ):
        start(folder)
    in_the_way.rmdir()
    assert json.loads((folder / "run" / "result.json").read_text())["finished"]
    before = (folder / "run" / "best.toml").read_bytes()
    start(folder)
    assert (folder / "run" / "best.safetensors").is_file()
    assert (folder / "run" / "best.toml").read_bytes() == before


def test_confirmed_best_stays_until_an_extension_has_confirmed_its_own(folder: Path) -> None:
    before = start(folder, "backend.fault=stop")
    confirmed = {n: (folder / "run" / n).read_bytes() for n in ("best.toml", "best.safetensors")}
    config = configuration.load(
        folder / "config.toml", ["backend.fault=stop", "search.n_iters=30"]
    )
    ready = setup.prepare(config, folder, "toy")
    ready.backend._at = 150  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run.run(ready, folder / "run", Silent(), report=False)
    outcome = outcomes.read_outcome(folder / "run", outcomes.open_study(folder / "run"))
    assert before.best
    assert outcome.leader
    assert outcome.leader.recipe != before.best.recipe
    for name, content in confirmed.items():
        assert (folder / "run" / name).read_bytes() == content


@pytest.mark.parametrize("name", ["50%20off {braces} ä #1 'x'", "a?b 100%"])
def test_run_folder_may_have_any_name(folder: Path, name: str) -> None:
    start(folder, "search.n_iters=1", into=name)
    assert (folder / name / "study.db").is_file()
    assert start(folder, "search.n_iters=1", into=name).finished


def test_run_folder_that_cannot_be_written_is_refused(folder: Path) -> None:
    (folder / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        start(folder)


def test_every_model_that_is_missing_is_named_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as told:
        start(folder, "models.a=no.safetensors", "models.b=nope.safetensors")
    assert "no.safetensors: no such file" in str(told.value)
    assert "nope.safetensors: no such file" in str(told.value)


@pytest.mark.parametrize("vae", ["b", "base"])
def test_vae_of_b_is_refused_where_b_has_none(folder: Path, vae: str) -> None:
    state = load_file(folder / "zero.safetensors")
    save_file(
        {**state, "first_stage_model.encoder.conv_in.weight": torch.ones(2)},
        folder / "zero.safetensors",
    )
    with pytest.raises(ConfigError, match=r"model B, one\.safetensors, holds no whole VAE"):
        start(folder, f"merge.vae={vae}")


def test_changed_file_of_a_scorer_is_another_configuration(folder: Path) -> None:
    bonus = folder / "bonus.txt"
    bonus.write_text("1")
    start(folder, "scorers.likeness.bonus=bonus.txt", "search.n_iters=1")
    start(folder, "scorers.likeness.bonus=bonus.txt", "search.n_iters=1")
    bonus.write_text("2")
    with pytest.raises(ConfigError, match=r"files\.scorers\.likeness\.bonus was"):
        start(folder, "scorers.likeness.bonus=bonus.txt", "search.n_iters=1")


def test_payload_with_odd_keys_for_the_back_end_can_be_resumed(folder: Path) -> None:
    (folder / "odd.yaml").write_text("prompt: a lake\nscripts: [{1: 2}]\n")
    settings = ('panel.payloads=["odd.yaml"]', "search.n_iters=1")
    assert start(folder, *settings).images == start(folder, *settings).images


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("search.seed=5", "search.seed was 0, is 5"),
        ("merge.precision=fp32", "merge.precision was 'fp16', is 'fp32'"),
        ("scorers.likeness.sharpness=5.0", "scorers.likeness.sharpness was not set, is 5.0"),
        ("search.freeze.IN00=0.5", ": search.freeze.IN00 was not set, is 0.5;"),
    ],
)
def test_folder_of_another_configuration_is_refused_with_what_differs(
    folder: Path, override: str, named: str
) -> None:
    start(folder, "search.n_iters=1")
    before = (folder / "run" / "result.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        start(folder, override, "search.n_iters=1")
    assert named in str(caught.value)
    assert (folder / "run" / "result.json").read_bytes() == before


def test_frozen_weights_stay_and_ranges_hold(folder: Path) -> None:
    outcome = start(folder, "search.freeze.base=0.25", 'search.ranges={"OUT*" = [0.4, 0.6]}')
    searched = [r for r in outcome.results if r.stage != "baseline"]
    assert all(r.recipe.weights["alpha"]["base"] == 0.25 for r in searched)
    for result in searched:
        outs = [v for b, v in result.recipe.weights["alpha"].items() if b.startswith("OUT")]
        assert all(0.4 <= value <= 0.6 for value in outs)
    assert outcome.results[0].recipe.weights["alpha"]["base"] == 0.0


def test_three_models_are_searched_with_add_difference(folder: Path) -> None:
    toy_plugin.write_model(folder / "half.safetensors", 0.5)
    outcome = start(folder, "models.c=half.safetensors", "merge.method=add_difference")
    assert outcome.finished
    assert {r.name: r.recipe.method for r in outcome.results[:3]} == {
        "a": "weighted_sum",
        "even": "add_difference",
        "b": "weighted_sum",
    }


@pytest.mark.parametrize(
    "optimiser", ["tpe", "cmaes", "random", "sobol", "optuna.samplers.GPSampler"]
)
def test_other_optimisers_run_too(folder: Path, optimiser: str) -> None:
    few = ("search.init_points=2", "search.n_iters=1")
    assert start(folder, f"search.optimiser={optimiser}", *few).finished


def test_optimiser_of_a_plugin_runs_too(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "import optuna\nclass Mine(optuna.samplers.RandomSampler):\n    pass\n"
    )
    plugins = PLUGINS.replace("fragile", "mine")
    assert start(folder, plugins, "search.optimiser=mine.Mine").finished


@pytest.mark.parametrize(
    "optimiser",
    [
        "stranger.Mine",
        "os.path.join",
        "optunahub.samplers.x.X",
        "optuna.samplers._base.BaseSampler",
    ],
)
def test_configuration_imports_nothing_but_optuna_and_its_plugins(
    folder: Path, monkeypatch: pytest.MonkeyPatch, optimiser: str
) -> None:
    (folder / "stranger.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(
        ConfigError, match=r"search\.optimiser: .* is neither optuna\.samplers\.NAME"
    ):
        start(folder, f"search.optimiser={optimiser}")


def test_search_ends_when_its_images_are_spent(folder: Path) -> None:
    override = ("search.images=15", "search.images_per_trial=4")
    outcome = start(folder, *override)
    trials = [r for r in outcome.results if r.stage != "baseline"]
    assert [len(r.scores) for r in trials] == [4, 4, 4, 3]


def test_search_ends_when_little_is_to_be_gained(folder: Path) -> None:
    override = (
        "search.images=300",
        "search.init_points=5",
        "search.stop={min_gain=100, patience=1}",
    )
    outcome = start(folder, *override)
    assert outcome.finished
    assert len(outcome.results) == 3 + 5
    assert start(folder, *override).images == outcome.images


def test_trial_of_few_images_is_valued_as_if_it_had_seen_the_panel(folder: Path) -> None:
    outcome = start(folder, "search.images_per_trial=1", "search.n_iters=1")
    baselines = {r.name: r for r in outcome.results[:3]}
    (shown,) = outcome.results[3].scores
    lucky = sum(r.scores[shown]["likeness"] for r in baselines.values()) / 3
    usual = sum(r.value.mean for r in baselines.values() if r.value) / 3
    value = outcome.results[3].value
    assert value is not None
    assert value.mean == pytest.approx(
        outcome.results[3].scores[shown]["likeness"] - lucky + usual
    )
    assert value.se > 0


def command(folder: Path, into: str = "killed") -> list[str]:
    run_dir = str(folder / into)
    config = str(folder / "config.toml")
    slow = "backend.delay_s=0.01"
    return [
        sys.executable,
        "-m",
        "bayesian_merger",
        "run",
        config,
        "--run-dir",
        run_dir,
        "--set",
        slow,
    ]


def kill_and_finish(folder: Path, times: int, *more: str) -> None:
    """Kill the run at random moments, then let it end, and compare it with one left alone."""
    chance = random.Random(times)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    overrides = [part for override in more for part in ("--set", override)]
    for _ in range(times):
        process = subprocess.Popen(
            [*command(folder), *overrides, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert process.stdout
        process.stdout.readline()  # it is about to begin, or to go on
        time.sleep(chance.uniform(0.0, 1.5))
        assert process.poll() is None, "it was over before it could be killed so often"
        process.kill()
        process.communicate()
    # The unbroken one too with a single thread: of several the sums are rounded otherwise.
    for into in ("killed", "whole"):
        done = subprocess.run(
            [*command(folder, into), *overrides],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    killed, whole = (
        outcomes.read_outcome(folder / into, outcomes.open_study(folder / into))
        for into in ("killed", "whole")
    )
    assert measured(killed) == measured(whole)
    assert killed.images == whole.images
    assert killed.heldout == whole.heldout
    assert not list((folder / "killed").rglob(".*.part"))


def test_killed_run_is_finished_by_the_same_command(folder: Path) -> None:
    kill_and_finish(folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "n_iters"), [(10, 3), (100, 60)])
def test_run_killed_many_times_loses_and_doubles_nothing(
    folder: Path, times: int, n_iters: int
) -> None:
    kill_and_finish(folder, times, "backend.delay_s=0.1", f"search.n_iters={n_iters}")


def test_second_process_in_the_folder_is_turned_away(folder: Path) -> None:
    process = subprocess.Popen(
        [*command(folder), "--set", "backend.delay_s=0.2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (folder / "killed" / "study.db").exists():
            assert process.poll() is None
            time.sleep(0.05)
        second = subprocess.run(command(folder), capture_output=True, text=True, check=False)
    finally:
        process.kill()
        process.wait()
    assert second.returncode == 2
    assert "another process is running here" in second.stderr


def test_clock_that_jumps_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = start(folder)
    days, now = iter(range(10**6)), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400 * (-1) ** next(days) * next(days))
    jumped = start(folder, into="jumped")
    assert measured(jumped) == measured(plain)
    assert jumped.gain == plain.gain


def test_study_may_lie_in_a_storage_that_several_runs_share(folder: Path) -> None:
    storage = f"search.storage=sqlite:///{folder / 'all.db'}"
    one = start(folder, storage, "search.n_iters=1", into="one", report=True)
    other = start(folder, storage, "search.n_iters=1", "search.seed=5", into="other")
    assert measured(one) != measured(other)
    assert start(folder, storage, "search.n_iters=1", into="one").images == one.images
    assert not (folder / "one" / "study.db").exists()
    assert "all.db" not in (folder / "one" / "report.html").read_text()
    with pytest.raises(
        ConfigError, match=r"the study 'one' belongs to another .* search.seed was 0"
    ):
        start(folder, storage, "search.n_iters=1", "search.seed=5", into="one")


def test_study_in_a_storage_belongs_to_one_run_folder(folder: Path) -> None:
    storage = "search.storage=sqlite:///all.db"  # beside the configuration, like other files
    start(folder, storage, "search.n_iters=1", into="x/one")
    assert (folder / "all.db").is_file()
    with pytest.raises(ConfigError, match="a study 'one' of another run folder"):
        start(folder, storage, "search.n_iters=1", into="y/one")
    assert not (folder / "y" / "one" / "study.id").exists()
    with pytest.raises(ConfigError, match="lies in another storage"):
        start(folder, "search.n_iters=1", into="x/one")
    with pytest.raises(ConfigError, match="lies in another storage"):
        outcomes.open_study(folder / "x" / "one")
    missing = f"sqlite:///{folder / 'none.db'}"
    with pytest.raises(ConfigError, match="the storage has no study 'one'"):
        outcomes.open_study(folder / "x" / "one", missing)
    assert not (folder / "none.db").exists()
    # What it has found is not overwritten by a run that begins elsewhere.
    before = (folder / "x" / "one" / "best.toml").read_bytes()
    with pytest.raises(ConfigError, match="is not in the storage that search"):
        start(folder, f"search.storage={missing}", "search.seed=5", into="x/one")
    assert not (folder / "none.db").exists()
    assert (folder / "x" / "one" / "best.toml").read_bytes() == before


def test_run_folder_with_a_study_of_its_own_takes_no_storage_beside_it(folder: Path) -> None:
    start(folder, "search.n_iters=1")
    with pytest.raises(ConfigError, match="holds a study of its own"):
        start(folder, "search.n_iters=1", f"search.storage=sqlite:///{folder / 'all.db'}")


def with_same(folder: Path, *blocks: str) -> None:
    """Make model B in these blocks what A is."""
    tensors = {
        name: torch.full((2, 2), 0.0 if block in blocks else 1.0)
        for block, name in toy_plugin.TENSORS.items()
    }
    save_file(tensors, folder / "one.safetensors")


def test_blocks_in_which_the_models_are_the_same_leave_the_search(folder: Path) -> None:
    with_same(folder, "base", "IN03", "M00")
    ready = setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")
    assert len(ready.plan.bounds) == 23
    observer = Silent()
    outcome = run.run(ready, folder / "run", observer, report=False)
    assert (
        "the models are the same in IN03, M00, base, which the search leaves out" in observer.lines
    )
    assert {r.recipe.weights["alpha"]["M00"] for r in outcome.results[3:]} == {0.5}
    # A and the even merge are what the search could have proposed, as M00 changes nothing in them.
    study = outcomes.open_study(folder / "run")
    told = [t.user_attrs.get("observed") for t in study._search.get_trials(deepcopy=False)]
    assert {"a", "even"} <= set(told)


def test_group_stays_in_the_search_if_one_of_its_blocks_differs(folder: Path) -> None:
    with_same(folder, "IN03", "M00")
    config = configuration.load(folder / "config.toml", ['search.groups=[["M00", "OUT00"]]'])
    bounds = setup.prepare(config, folder, "toy").plan.bounds
    assert "M00_alpha-OUT00_alpha" in bounds
    assert "IN03_alpha" not in bounds


def test_models_that_are_the_same_in_all_that_is_searched_are_refused(folder: Path) -> None:
    with_same(folder, "IN03", "M00")
    others = ", ".join(f"{b} = 0.5" for b in toy_plugin.TENSORS if b not in ("IN03", "M00"))
    with pytest.raises(ConfigError, match="the same in every block that is searched"):
        start(folder, f"search.freeze={{ {others} }}")


HALF = """
from bayesian_merger.methods import method

@method
def half(a, b, *, beta=0.5):
    return a + 0.5 * beta * (b - a)
"""


def test_method_is_chosen_beside_the_weights(folder: Path) -> None:
    (folder / "fragile.py").write_text(HALF)
    override = (PLUGINS, 'search.methods=["half"]', "search.init_points=8", "search.n_iters=4")
    outcome = start(folder, *override)
    assert outcome.finished
    recipes_of = {r.recipe.method: r.recipe for r in outcome.results[3:]}
    assert {method: set(r.weights) for method, r in recipes_of.items()} == {
        "weighted_sum": {"alpha"},
        "half": {"beta"},
    }
    found = outcomes.open_study(folder / "run")._search.get_trials(deepcopy=False)
    assert [t.params["method"] for t in found[:3]] == ["weighted_sum"] * 3
    assert all(len(t.params) == 1 + 2 * 26 for t in found)
    for trial, result in zip(found[3:], outcome.results[3:], strict=True):
        assert trial.params["method"] == result.recipe.method
    assert measured(start(folder, *override)) == measured(outcome)


def test_candidates_of_a_chosen_method_are_different_merges(folder: Path) -> None:
    (folder / "fragile.py").write_text(HALF.replace("def half", "def halved"))
    override = (PLUGINS, 'search.methods=["halved"]', 'search.presets=["single"]')
    outcome = start(folder, *override, "search.n_iters=8", "heldout.candidates=4")
    digests = [r.recipe.digest() for r in outcome.candidates]
    assert len(set(digests)) == len(digests) >= 2


def test_weight_that_a_method_lacks_keeps_none_of_its_merges_out(folder: Path) -> None:
    (folder / "fragile.py").write_text(HALF.replace("def half", "def part"))
    override = (PLUGINS, 'search.methods=["part"]', "search.freeze={base_beta = 0.3}")
    first = 'search.start=[{method = "part", "IN*_beta" = 0.2}]'
    start(folder, *override, "search.n_iters=0", first)
    trials = outcomes.open_study(folder / "run")._search.get_trials(deepcopy=False)
    assert [t.user_attrs.get("observed") for t in trials][:3] == ["a", "even", "b"]
    assert (trials[3].params["method"], trials[3].params["IN00_beta"]) == ("part", 0.2)


def test_start_may_name_what_the_models_share(folder: Path) -> None:
    with_same(folder, "base", "OUT03")
    override = ('search.start=[{base = 0.2, "OUT*" = 1.0}, "GRAD_V"]', "search.n_iters=0")
    first = start(folder, *override).results[3].recipe.weights["alpha"]
    assert (first["OUT02"], first["OUT03"], first["IN00"]) == (1.0, 0.5, 0.5)


def test_method_that_lacks_its_third_model_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'add_difference' merges 3 models"):
        start(folder, 'search.methods=["add_difference"]')
    with pytest.raises(ConfigError, match="unknown merge method 'slurp'; did you mean 'slerp'"):
        start(folder, 'search.methods=["slurp"]')
    with pytest.raises(ConfigError, match="'n_average' has no weights to search"):
        start(folder, 'search.methods=["n_average"]')


def test_scorer_judges_the_payloads_that_it_is_told_to(folder: Path) -> None:
    outcome = start(
        folder,
        'scorers.contrast.payloads=["port*"]',
        'scorers.sharp={ scorer = "likeness", sharpness = 20.0 }',
        "search.objectives=scorers",
    )
    by_payload: dict[str, set[frozenset[str]]] = {}
    for result in outcome.results:
        for index, scores in result.scores.items():
            by_payload.setdefault(outcome.panel[index].payload, set()).add(frozenset(scores))
    assert by_payload == {
        "portrait": {frozenset({"likeness", "contrast", "sharp"})},
        "landscape": {frozenset({"likeness", "sharp"})},
    }
    for scores in outcome.results[0].scores.values():
        assert scores["sharp"] == pytest.approx(2 * scores["likeness"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (('scorers.likeness.payloads=["portrat"]',), "no payload matches 'portrat'; did you mean"),
        (('scorers.likeness.payloads=["x*"]',), r"no payload matches 'x\*'; there are: landscape"),
        (('scorers.likeness.payloads=["portrait"]',), "payload landscape: no scorer judges it"),
        (('scorers.mine.scorer="likenes"',), "unknown scorer 'likenes'; did you mean 'likeness'"),
        (('value.combine="geometric"', 'value.normalise="zscore"'), "makes negative ones"),
        (("guards.blank=-1",), "neither 'fail', 'off' nor a positive penalty"),
        (('guards.blank="no"',), "neither 'fail', 'off' nor a positive penalty"),
    ],
)
def test_mistakes_in_how_scores_are_combined_are_told(
    folder: Path, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        start(folder, *options)


def test_junk_costs_its_penalty_and_is_told(folder: Path) -> None:
    # Stripes beyond what can be painted are all white.
    white = ("search.ranges={'*' = [0.5, 3.0]}", 'search.groups=[["*"]]', "search.n_iters=6")
    outcome, lines = seen(folder, *white, into="penalty")
    marked = [r for r in outcome.results if any("junk.blank" in s for s in r.scores.values())]
    assert marked
    assert all(r.state == "complete" and r.value for r in marked)
    assert any("images of trial" in line and "are junk: blank" in line for line in lines)
    with pytest.raises(RunError, match="all their images are the same"):
        seen(folder, *white, 'guards={ blank = "off", duplicate = "off" }', into="off")


def test_junk_may_fail_its_trial(folder: Path) -> None:
    with pytest.raises(RunError, match=r"3 trials in a row failed.*seed \d+ is junk: blank"):
        start(folder, "search.ranges={'*' = [2.5, 3.0]}", 'guards.blank="fail"')


def test_baseline_of_nothing_but_junk_stops_the_run(folder: Path) -> None:
    toy_plugin.write_model(folder / "one.safetensors", 3.0)
    with pytest.raises(RunError, match=r"baseline b cannot .*all its 6 images are junk: blank"):
        start(folder)


def test_image_of_another_merge_is_junk(folder: Path) -> None:
    with pytest.raises(RunError, match=r"baseline even cannot be judged.* is junk: duplicate"):
        start(folder, "backend.fault=frozen", 'guards.duplicate="fail"')


@pytest.mark.parametrize("combine", ["minimum", "geometric"])
def test_search_by_another_mean_finds_a_better_merge(folder: Path, combine: str) -> None:
    second = "scorers.nearness.weight=2.0"
    outcome = start(folder, f"value.combine={combine}", second, "search.n_iters=8")
    assert outcome.config["search"]["optimiser"] == "auto"
    assert outcome.gain["over_even"].low > 0


def test_score_that_cannot_be_combined_fails_the_trial_and_not_the_run(folder: Path) -> None:
    (folder / "bonus.txt").write_text("7.0")
    outcome = start(
        folder,
        'value={ combine = "geometric", normalise = "none" }',
        "scorers.likeness.bonus='bonus.txt'",
        "scorers.contrast.weight=1.0",
        # Merges at the ends are so bad that their scores are negative.
        "search.ranges={'*' = [-0.6, 1.6]}",
        'search.groups=[["*"]]',
    )
    failed = [r for r in outcome.results if r.state == "failed"]
    assert failed
    assert all("of which there is no geometric mean" in r.reason for r in failed)
    assert outcome.finished


def seen(folder: Path, *overrides: str, into: str) -> tuple[Outcome, list[str]]:
    """The run, and what its observer was told."""
    ready = setup.prepare(configuration.load(folder / "config.toml", overrides), folder, "toy")
    observer = Silent()
    return run.run(ready, folder / into, observer, report=False), observer.lines


@pytest.mark.parametrize("optimiser", ["bayes", "tpe"])
def test_finished_search_tells_what_each_weight_does(folder: Path, optimiser: str) -> None:
    outcome = start(folder, f"search.optimiser={optimiser}")
    assert outcome.slices.keys() == {f"{block}_alpha" for block in SD1.blocks}
    for one in outcome.slices.values():
        assert (one.places[0], one.places[-1]) == (0, 1)
        assert 0 <= one.at <= 1
        assert one.loss.mean >= 0
