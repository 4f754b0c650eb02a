"""New runs that begin with what earlier ones found: `fork` and `import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_run import Silent, start
from test_run import folder as folder  # a fixture

from bayesian_merger import album, run, setup, study, warm
from bayesian_merger import config as configuration
from bayesian_merger import outcome as outcomes
from bayesian_merger.data import Outcome
from bayesian_merger.errors import ConfigError, RunError
from bayesian_merger.setup import Setup

LIGHT = '''
import numpy
from bayesian_merger.scorers import scorer
@scorer
class Light:
    """How light a picture is, in [0, 1]."""

    def __call__(self, samples):
        return [numpy.asarray(sample.image).mean() / 255 for sample in samples]
'''


def begin(folder: Path, *overrides: str) -> Setup:
    return setup.prepare(configuration.load(folder / "config.toml", overrides), folder, "toy")


def fork(folder: Path, *overrides: str, into: str = "new") -> warm.Brought:
    return warm.fork(folder / "run", begin(folder, *overrides), folder / into)


def go_on(folder: Path, *overrides: str, into: str = "new") -> tuple[Outcome, int]:
    """The new run to its end, and how many images it made itself."""
    observer = Silent()
    outcome = run.run(begin(folder, *overrides), folder / into, observer, report=False)
    return outcome, observer.made


def with_light(folder: Path) -> tuple[str, ...]:
    """Settings for another scorer than the one of the configuration."""
    (folder / "light.py").write_text(LIGHT)
    plugins = [configuration.load(folder / "config.toml").plugins[0], folder / "light.py"]
    return (f"plugins={json.dumps([str(p) for p in plugins])}", "scorers={light = {}}")


def observed(folder: Path, into: str = "new") -> list[Any]:
    """What the optimiser of a run was told of beside its own trials."""
    trials = outcomes.open_study(folder / into)._search.get_trials(deepcopy=False)
    return [t for t in trials if t.user_attrs.get("stage") == "brought"]


def test_larger_panel_begins_with_all_scores_and_makes_only_new_images(folder: Path) -> None:
    before = start(folder)
    larger = "panel.batch_size=5"  # ten images instead of six
    brought = fork(folder, larger)
    assert (brought.merges, brought.scores, brought.of_panel) == (10, 60, 60)
    after, made = go_on(folder, larger)
    # Three baselines have four new images each, the others are not made again.
    assert made == after.images - 3 * 6
    for old, new in zip(before.results[:3], after.results[:3], strict=True):
        assert {i: new.scores[i] for i in old.scores} == old.scores
        assert {i: new.images[i] for i in old.images} == old.images
    told = observed(folder)
    assert [t.user_attrs["observed"] for t in told] == [f"run trial {n}" for n in range(1, 8)]
    assert [t.params for t in told] == [
        {f"{block}_alpha": value for block, value in r.recipe.weights["alpha"].items()}
        for r in before.results[3:]
    ]
    assert after.finished


def test_what_is_known_is_not_explored_again(folder: Path) -> None:
    start(folder)
    settings = ("panel.batch_size=5", "search.init_points=4")
    fork(folder, *settings)
    assert [r.stage for r in go_on(folder, *settings)[0].results[3:]].count("explore") == 4
    loaded = configuration.load(folder / "config.toml", ["panel.batch_size=5"])
    search = loaded.search.model_copy(
        update={
            "init_points": None,
            "images": 40,
            "n_iters": None,
            "images_per_trial": None,
        }
    )
    ready = setup.prepare(loaded.model_copy(update={"search": search}), folder, "toy")
    assert ready.plan.n_first == 20
    warm.fork(folder / "run", ready, folder / "free")
    results = run.run(ready, folder / "free", Silent(), report=False).results
    assert [r.stage for r in results].count("explore") == 20 - 7


def test_other_scorers_judge_the_pictures_that_were_kept(folder: Path) -> None:
    keep = "output.save_images=all"
    before = start(folder, keep)
    light = with_light(folder)
    brought = fork(folder, *light)
    assert (brought.merges, brought.scores, brought.rescored) == (10, 60, 60)
    after, made = go_on(folder, *light)
    assert made == after.images - 3 * 6
    # The score of a picture is what the new scorer says of the same merge judged by itself.
    fresh = start(folder, *light, into="fresh")
    assert [r.scores for r in after.results[:3]] == [r.scores for r in fresh.results[:3]]
    assert before.results[3].scores.keys() == {0, 1, 2, 3, 4, 5}
    assert all("light" in found for found in observed(folder)[0].user_attrs["score:0"].values())


def test_picture_that_is_not_what_it_was_is_not_judged(folder: Path) -> None:
    start(folder, "output.save_images=all")
    one, other = (
        album.saved(album.folder_of(folder / "run", "explore", name))
        for name in ("trial 1", "trial 2")
    )
    one[2].write_bytes(other[2].read_bytes())
    one[3].write_bytes(b"no picture")
    one[4].unlink()
    assert fork(folder, *with_light(folder)).scores == 60 - 3


def test_best_merges_are_tried_first_where_no_trial_has_a_score(folder: Path) -> None:
    before = start(folder)
    light = with_light(folder)
    brought = fork(folder, *light)
    # The pictures of the baselines are always kept, those of the seven trials were not.
    assert (brought.merges, brought.rescored, brought.starts) == (3, 18, 2)
    assert list(brought.left_out.values()) == [7]
    after, made = go_on(folder, *light)
    assert made == after.images - 18
    firsts = [r.recipe.weights for r in after.results[3:5]]
    assert firsts == [r.recipe.weights for r in before.candidates]


def test_other_back_end_makes_other_images_of_the_same_panel(folder: Path) -> None:
    start(folder)
    noisier = "backend.noise=0.2"
    brought = fork(folder, noisier)
    assert (brought.scores, brought.of_panel) == (60, 0)
    after, made = go_on(folder, noisier)
    assert made == after.images
    (one, *_) = observed(folder)
    assert {key for key in one.user_attrs if key.startswith("score:")} == {
        f"score:{i}" for i in range(6, 12)
    }


def test_optimiser_that_hears_of_means_only_is_told_of_the_panels_images_alone(
    folder: Path,
) -> None:
    start(folder)
    tpe = "search.optimiser=tpe"
    fork(folder, tpe, "panel.batch_size=5")
    go_on(folder, tpe, "panel.batch_size=5")
    assert len(observed(folder)) == 7
    # Of a smaller panel it is told what it holds.
    fork(folder, tpe, "panel.batch_size=1", into="small")
    go_on(folder, tpe, "panel.batch_size=1", into="small")
    assert len(observed(folder, "small")) == 7
    fork(folder, tpe, "backend.noise=0.2", into="noisy")
    go_on(folder, tpe, "backend.noise=0.2", into="noisy")
    assert observed(folder, "noisy") == []


def test_merges_outside_the_new_space_are_left_out(folder: Path) -> None:
    start(folder)
    brought = fork(folder, 'search.ranges={"IN00" = [0.45, 0.55]}', "panel.batch_size=5")
    assert brought.left_out["they are outside the space of the new search"] >= 5


def test_nothing_is_brought_from_other_models(folder: Path) -> None:
    start(folder)
    with pytest.raises(
        ConfigError, match="no merge of this run can be used: their models are others"
    ):
        fork(folder, "models.a=one.safetensors", "models.b=zero.safetensors")


def test_run_that_has_begun_is_not_begun_again(folder: Path) -> None:
    start(folder)
    with pytest.raises(ConfigError, match="has begun already"):
        warm.fork(folder / "run", begin(folder), folder / "run")


def test_fork_that_was_cut_off_is_repeated_before_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder)
    larger = "panel.batch_size=5"
    left = [20]

    def record(self: study.Trial, *args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        original(self, *args)

    original = study.Trial.record
    monkeypatch.setattr(study.Trial, "record", record)
    with pytest.raises(KeyboardInterrupt):
        fork(folder, larger)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="was not brought whole; give the same command"):
        go_on(folder, larger)
    brought = fork(folder, larger)
    assert (brought.merges, brought.scores) == (10, 60)
    whole = fork(folder, larger, into="whole")
    assert brought == whole
    outcomes_of = [go_on(folder, larger, into=name)[0] for name in ("new", "whole")]
    assert [r.scores for r in outcomes_of[0].results] == [r.scores for r in outcomes_of[1].results]


def test_run_begins_with_one_earlier_run_only(folder: Path) -> None:
    start(folder)
    start(folder, "search.seed=1", into="other")
    fork(folder, "panel.batch_size=5")
    with pytest.raises(ConfigError, match=r"begins with what .*run has found already"):
        warm.fork(folder / "other", begin(folder, "panel.batch_size=5"), folder / "new")
    with pytest.raises(ConfigError, match=r"begins with what .*run has found already"):
        imported(folder, a_log(folder / "x.json", line(1.0, base_alpha=0.5)), "panel.batch_size=5")


def test_what_failed_is_not_trusted(folder: Path) -> None:
    with pytest.raises(RunError):
        start(folder, "backend.fault=frozen")
    with pytest.raises(ConfigError, match="no merge of this run can be used: none was judged"):
        fork(folder, "panel.batch_size=5")
    assert not (folder / "new" / "images").exists()


def test_image_that_does_not_count_in_the_new_panel_is_no_value(folder: Path) -> None:
    start(folder, "search.images_per_trial=1")
    (folder / "portrait.toml").write_text('prompt = "a portrait"\nscore_weight = 0.0\n')
    fork(folder, "search.images_per_trial=1")
    assert go_on(folder, "search.images_per_trial=1")[0].finished


def test_scorer_that_gives_no_number_leaves_a_merge_out(folder: Path) -> None:
    start(folder, "output.save_images=all")
    light = with_light(folder)
    (folder / "light.py").write_text(LIGHT.replace(".mean() / 255", ".mean() * numpy.nan"))
    brought = fork(folder, *light)
    assert (brought.merges, brought.starts) == (0, 2)
    assert brought.left_out == {"scorer light gave nan": 10}


def a_log(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def line(target: float, **params: float) -> str:
    return json.dumps({"target": target, "params": params, "datetime": {"elapsed": 1.0}})


def imported(folder: Path, log: Path, *overrides: str) -> warm.Brought:
    return warm.import_log(log, begin(folder, *overrides), folder / "new")


def test_log_of_the_original_says_what_is_tried_first(folder: Path) -> None:
    shares = [i / 10 for i in range(10)]
    log = a_log(
        folder / "bbwm.json",
        *(
            line(-((x - 0.6) ** 2), base_alpha=0.5, **{f"block_{i}_alpha": x for i in range(25)})
            for x in shares
        ),
    )
    assert imported(folder, log) == warm.Brought(starts=5)
    after, _ = go_on(folder)
    tried = [r.recipe.weights["alpha"] for r in after.results[3:8]]
    assert tried[0]["IN00"] == pytest.approx(0.6, abs=0.1)
    assert all(weights["base"] == 0.5 for weights in tried[1:])
    assert {weights["OUT11"] for weights in tried[1:]} <= set(shares)


def test_log_with_groups_other_letters_and_frozen_weights_is_read(folder: Path) -> None:
    log = a_log(
        folder / "bbwm.json",
        "",
        line(1.0, **{"block_0_alpha-block_1_alpha": 0.7, "base_beta": 0.2, "block_2_alpha": 0.9}),
        line(2.0, block_0_alpha=1.4),
        line(float("nan"), block_0_alpha=0.4),
    )
    brought = imported(folder, log, "search.freeze={IN02 = 0.25}")
    assert brought.starts == 1
    assert brought.left_out == {
        "outside the ranges of the new search": 1,
        "without a score": 1,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "line 1: not a trial"),
        (
            line(1.0, block_0_alpha=0.5) + "\n" + line(1.0, block_99_alpha=0.5),
            "line 2: not a trial",
        ),
        ('{"target": "x", "params": {}}', "line 1: not a trial"),
        ("[" * 100_000, "line 1: not a trial"),
        (f'{{"target": {10**400}, "params": {{}}}}', "line 1: not a trial"),
        ("", "no merge of this log can be used: it holds none"),
    ],
)
def test_log_that_is_none_is_told_with_its_line(folder: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        imported(folder, a_log(folder / "bbwm.json", text))
    assert not (folder / "new" / "study.db").exists()
