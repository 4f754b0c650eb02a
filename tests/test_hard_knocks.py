"""What goes wrong around a run: failures at bad moments, files that moved, half-made studies."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
import torch
import toy_plugin
from safetensors.torch import load_file, save_file
from test_run import Silent, measured, start
from test_run import folder as folder
from torch import Tensor
from webui_fake import A1111, FakeWebUI

from bayesian_merger import config as configuration
from bayesian_merger import judging, run, setup, study
from bayesian_merger import outcome as outcomes
from bayesian_merger.data import Outcome, Prompt, Recipe, Sample
from bayesian_merger.errors import CheckpointError, ConfigError, RunError, TrialError
from bayesian_merger.methods import method


def begin(folder: Path, *overrides: str) -> setup.Setup:
    return setup.prepare(configuration.load(folder / "config.toml", overrides), folder, "toy")


def finish(ready: setup.Setup, folder: Path) -> tuple[Outcome, Silent]:
    observer = Silent()
    return run.run(ready, folder / "run", observer, report=False), observer


class Failing:
    """A back end that fails for some recipes on some panels."""

    def __init__(self, inner: object, fails: object) -> None:
        self._inner, self._fails = inner, fails
        self.batch = 4

    def check(
        self, prompts: Sequence[Prompt], architecture: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[str]:
        return []

    def load(self, recipe: Recipe, merged: Mapping[str, Tensor]) -> None:
        self.recipe = recipe
        self._inner.load(recipe, merged)  # type: ignore[attr-defined]

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        if self._fails(self.recipe, prompts):  # type: ignore[operator]
            raise TrialError("the model made NaN images")
        yield from self._inner.generate(prompts)  # type: ignore[attr-defined]

    def close(self) -> None: ...


def with_backend(ready: setup.Setup, fails: object) -> setup.Setup:
    object.__setattr__(ready, "backend", Failing(ready.backend, fails))
    return ready


def test_half_made_study_is_made_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "run").mkdir()

    def killed(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            start(folder)
    assert not (folder / "run" / "study.db").exists()
    assert start(folder).finished
    tables = sqlite3.connect(folder / "run" / "study.db").execute(
        "select study_name from studies order by study_name"
    )
    assert tables.fetchall() == [("judged",), ("search",)]


def test_renamed_model_is_the_same_model(folder: Path) -> None:
    before = start(folder)
    (folder / "one.safetensors").rename(folder / "uno.safetensors")
    after, observer = finish(begin(folder, "models.b=uno.safetensors"), folder)
    assert observer.made == 0
    assert after.images == before.images
    assert after.gain == before.gain


def test_candidate_that_fails_on_fresh_seeds_gives_way_to_the_next(folder: Path) -> None:
    ready = begin(folder)
    fresh = {p.seed for p in ready.select_panel}
    best: list[str] = []

    def fails(recipe: Recipe, prompts: Sequence[Prompt]) -> bool:
        if prompts[0].seed in fresh and not best:
            best.append(recipe.digest())
        return prompts[0].seed in fresh and recipe.digest() == best[0]

    outcome, _ = finish(with_backend(ready, fails), folder)
    assert outcome.finished
    assert outcome.best is not None
    assert outcome.leader is not None
    assert outcome.leader.recipe.digest() == best[0] != outcome.best.recipe.digest()


def test_chosen_merge_that_fails_on_held_out_seeds_gives_way_to_the_second(folder: Path) -> None:
    ready = begin(folder)
    held = {p.seed for p in ready.heldout_panel}
    baselines = {ready.baseline(name).digest() for name in setup.BASELINES}
    lost: list[str] = []

    def fails(recipe: Recipe, prompts: Sequence[Prompt]) -> bool:
        digest = recipe.digest()
        if prompts[0].seed in held and digest not in baselines and not lost:
            lost.append(digest)
        return prompts[0].seed in held and digest in lost

    outcome, _ = finish(with_backend(ready, fails), folder)
    assert outcome.finished
    assert outcome.best is not None
    assert [r.recipe.digest() for r in outcome.selected] == [lost[0], outcome.best.recipe.digest()]


def test_fewer_candidates_after_a_stop_choose_among_those(folder: Path) -> None:
    ready = begin(folder)
    held = {p.seed for p in ready.heldout_panel}
    with pytest.raises(RunError, match="held-out a cannot be judged"):
        finish(with_backend(ready, lambda recipe, prompts: prompts[0].seed in held), folder)
    outcome, _ = finish(begin(folder, "heldout.candidates=1"), folder)
    assert outcome.finished
    assert len(outcome.selected) == 1
    assert outcome.leader is not None
    assert outcome.best is not None
    assert outcome.best.recipe == outcome.leader.recipe


def test_repeated_baseline_counts_once(folder: Path) -> None:
    two = ("scorers.exposure={}", "search.n_iters=0")
    whole = start(folder, *two, into="whole")
    ready = begin(folder, *two)
    calls: list[int] = []

    def fails(recipe: Recipe, prompts: Sequence[Prompt]) -> bool:
        calls.append(1)
        return len(calls) == 2

    with pytest.raises(RunError, match="baseline a cannot be judged"):
        finish(with_backend(ready, fails), folder)
    outcome, _ = finish(begin(folder, *two), folder)
    assert [r.name for r in outcome.results if r.stage == "baseline"] == ["a", "even", "b"]
    assert outcome.gain == whole.gain
    means = {name: estimate.mean for name, estimate in outcome.heldout.items()}
    assert outcome.gain["over_a"].mean == pytest.approx(means["best"] - means["a"])


def test_extended_run_is_not_finished_until_its_new_trials_are(folder: Path) -> None:
    start(folder)
    ready = begin(folder, "search.n_iters=8")
    with pytest.raises(RunError):
        finish(with_backend(ready, lambda recipe, prompts: True), folder)
    found = outcomes.read_outcome(folder / "run", outcomes.open_study(folder / "run"))
    assert not found.finished
    assert found.best is None
    assert not found.gain


def test_back_end_that_stops_following_the_merge_is_found_and_can_be_mended(folder: Path) -> None:
    with pytest.raises(RunError, match="all their images are the same"):
        start(folder, "backend.fault=frozen")
    ready = begin(folder, "backend.fault=frozen")
    ready.backend._fault = ""  # type: ignore[attr-defined]
    outcome, observer = finish(ready, folder)
    assert outcome.finished
    # Nothing that the broken back end made is kept.
    assert measured(outcome) == measured(start(folder, into="whole"))
    assert observer.made == 100


@pytest.mark.parametrize("optimiser", ["bayes", "tpe"])
def test_back_end_that_stops_following_the_merge_in_mid_search_is_found(
    folder: Path, optimiser: str
) -> None:
    ready = begin(folder, f"search.optimiser={optimiser}", "search.n_iters=40")
    loads: list[Recipe] = []

    def stops(recipe: Recipe, prompts: Sequence[Prompt]) -> bool:
        loads.append(recipe)
        ready.backend._inner._fault = "frozen" if len(loads) > 12 else ""  # type: ignore[attr-defined]
        return False

    with pytest.raises(RunError, match=r"all their images are the same.*begin anew in another"):
        finish(with_backend(ready, stops), folder)
    assert len(loads) < 12 + 20


def test_back_end_that_stops_following_the_merge_at_the_end_proves_nothing(folder: Path) -> None:
    ready = begin(folder)
    held = {p.seed for p in ready.heldout_panel}

    def stops(recipe: Recipe, prompts: Sequence[Prompt]) -> bool:
        is_held = prompts[0].seed in held
        ready.backend._inner._fault = "frozen" if is_held else ""  # type: ignore[attr-defined]
        return False

    with pytest.raises(
        RunError, match="held-out even cannot be judged: a and even have different"
    ):
        finish(with_backend(ready, stops), folder)
    outcome, _ = finish(begin(folder), folder)
    assert outcome.finished
    assert measured(outcome) == measured(start(folder, into="whole"))


def test_difference_of_b_is_not_told_as_the_score_of_b(folder: Path) -> None:
    toy_plugin.write_model(folder / "half.safetensors", 0.5)
    start(folder, "models.c=half.safetensors", "merge.method=add_difference")
    rows = sqlite3.connect(folder / "run" / "study.db").execute(
        "select value_json from trial_user_attributes where key = 'observed' order by value_json"
    )
    assert [row[0] for row in rows.fetchall()] == ['"even"']


def test_parents_keep_their_own_vae(folder: Path) -> None:
    for value, vae_of_b in ((1.0, "b"), (0.0, "a")):
        for model, own in {"zero": 0.0, "one": value}.items():
            path = folder / f"{model}.safetensors"
            vae = {"first_stage_model.encoder.conv_in.weight": torch.full((2,), own)}
            save_file({**load_file(path), **vae}, path)
        ready = begin(folder)
        # One that both have is known as that of the search's merges.
        vaes = {name: ready.baseline(name).vae for name in setup.BASELINES}
        assert vaes == {"a": "a", "even": "a", "b": vae_of_b}


def test_changed_plugin_is_another_configuration(folder: Path) -> None:
    own = folder / "own.py"
    own.write_text("# version 1\n")
    plugin = Path(toy_plugin.__file__).as_posix()
    both = f'plugins=["{plugin}", "own.py"]'
    start(folder, both)
    own.write_text("# version 2\n")
    with pytest.raises(ConfigError, match=r"plugins\.1\.own\.py was"):
        start(folder, both)


def test_other_files_in_the_run_folder_are_left_alone(folder: Path) -> None:
    (folder / "run" / "mine").mkdir(parents=True)
    for path in ("mine/.x.12.part", ".download.part"):
        (folder / "run" / path).write_text("mine")
    (folder / "run" / ".report.html.4711.part").write_text("half a page")
    start(folder)
    left = {p.name for p in (folder / "run").rglob(".*.part")}
    assert left == {".x.12.part", ".download.part"}


def test_best_merge_never_overwrites_a_model(folder: Path) -> None:
    (folder / "run").mkdir()
    path = (folder / "one.safetensors").rename(folder / "run" / "best.safetensors")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is one of the models"):
        start(folder, "models.b=run/best.safetensors")
    assert path.read_bytes() == before


def test_scorer_that_raises_fails_the_trial(folder: Path) -> None:
    (folder / "broken.py").write_text(
        "from bayesian_merger.scorers import scorer\n"
        "@scorer\n"
        "class Broken:\n"
        '    """Raises."""\n'
        "    def __call__(self, samples):\n"
        "        raise ZeroDivisionError('no taste')\n"
    )
    plugin = Path(toy_plugin.__file__).as_posix()
    with pytest.raises(RunError, match="scorer broken: ZeroDivisionError: no taste"):
        start(folder, f'plugins=["{plugin}", "broken.py"]', "scorers.broken={}")


def test_scorer_without_memory_says_what_to_try(folder: Path) -> None:
    (folder / "large.py").write_text(
        "import torch\n"
        "from bayesian_merger.scorers import scorer\n"
        "@scorer\n"
        "class Large:\n"
        '    """Needs a large GPU."""\n'
        "    def __call__(self, samples):\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')\n"
    )
    plugin = Path(toy_plugin.__file__).as_posix()
    with pytest.raises(RunError, match=r"scorer large: out of GPU memory; .*device = 'cpu'"):
        start(folder, f'plugins=["{plugin}", "large.py"]', "scorers.large={}")


def test_batches_hold_prompts_of_equal_settings(folder: Path) -> None:
    (folder / "portrait.toml").write_text('prompt = "a portrait"\nheight = 640\n')
    ready = begin(folder, "panel.batch_size=4")
    sizes = [len(batch) for batch in judging.batches(ready.panel, 4)]
    assert sizes == [4, 4]
    assert sorted(p.index for batch in judging.batches(ready.panel, 4) for p in batch) == list(
        range(8)
    )


def test_old_names_of_the_text_encoder_are_understood(folder: Path) -> None:
    path = folder / "one.safetensors"
    tensors = load_file(path)
    save_file({n.replace(".text_model.", "."): t for n, t in tensors.items()}, path)
    outcome = start(folder)
    (b,) = (r for r in outcome.results if r.name == "b")
    whole_b = measured(outcome)[2][1]
    toy_plugin.write_model(path, 1.0)
    again = start(folder, into="again")
    assert whole_b == measured(again)[2][1] == b.scores


def test_block_that_the_models_do_not_share_is_refused(folder: Path) -> None:
    path = folder / "one.safetensors"
    tensors = load_file(path)
    save_file(
        {re.sub(r"text_model\..*", "text_model.other", n): t for n, t in tensors.items()}, path
    )
    with pytest.raises(ConfigError, match="shares no tensor of block base"):
        begin(folder)


def test_search_leaves_a_region_that_fails(folder: Path) -> None:
    outcome = start(folder, "backend.fault=weak", "search.init_points=4", "search.n_iters=12")
    states = [r.state for r in outcome.results if r.stage != "baseline"]
    assert len(states) == 16
    assert states.count("complete") >= 6


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ('prompt = "x"\nmade = 2024-01-01\n', "field 'made' is"),
        ('prompt = "x"\nscale = nan\n', "field 'scale' is nan"),
        ('prompt = "a __hair colour__ cat"\n', "unknown wildcard __hair colour__"),
        ('prompt = "a __pla.ce__ cat"\n', "unknown wildcard __pla.ce__"),
        ("prompt = '   '\n", "prompt"),
        ("x = " + "[" * 20_000, "nested too deeply"),
    ],
)
def test_bad_payload_is_found_before_the_run(folder: Path, payload: str, said: str) -> None:
    (folder / "portrait.toml").write_text(payload)
    with pytest.raises(ConfigError) as caught:
        begin(folder)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_device_that_cannot_be_used_is_told_in_one_line(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=r"merge\.device: .* cannot be used") as caught:
        begin(folder, f"merge.device={device}")
    assert len(str(caught.value).splitlines()) == 1


def test_run_folder_that_cannot_be_made_is_bad_input(folder: Path) -> None:
    ready = begin(folder)
    with pytest.raises(ConfigError, match="cannot be made a run folder"):
        run.run(ready, folder / "config.toml" / "run", Silent(), report=False)


def test_range_that_the_method_does_not_take_is_a_mistake(folder: Path) -> None:
    tensor_sum = ("merge.method=tensor_sum", 'search.ranges={"M00_beta" = [0.0, 2.0]}')
    with pytest.raises(ConfigError, match=r"M00_beta in \[0, 2\], but tensor_sum takes 0 to 1"):
        begin(folder, *tensor_sum)


def test_presets_decide_what_is_searched(folder: Path) -> None:
    ready = begin(folder, 'search.presets=["groups8"]')
    assert len(ready.space.parameters) == 8
    with pytest.raises(ConfigError, match="did you mean 'groups8'"):
        begin(folder, 'search.presets=["group8"]')
    assert start(folder, 'search.presets=["single"]', into="single").finished


def test_lora_is_searched_in_the_blocks_that_it_touches(folder: Path) -> None:
    name = f"{toy_plugin.UNET}.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    state = {**load_file(folder / "zero.safetensors"), name: torch.zeros(4, 4)}
    save_file(state, folder / "zero.safetensors")
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    pieces = {"lora_up": torch.ones(4, 1), "lora_down": torch.ones(1, 4)}
    lora = {f"{module}.{piece}.weight": tensor for piece, tensor in pieces.items()}
    save_file(lora, folder / "one.safetensors")
    ready = begin(folder)
    assert [p.name for p in ready.space.parameters] == ["M00_alpha"]
    merged = ready.merger.merge(ready.baseline("even"))
    assert set(merged[name].flatten().tolist()) == {0.5}


def test_baselines_need_no_c_for_what_only_a_and_b_hold(folder: Path) -> None:
    state = load_file(folder / "one.safetensors")
    alone = {n: t / 2 for n, t in state.items() if n.startswith(toy_plugin.UNET)}
    save_file(alone, folder / "unet.safetensors")
    three = ("models.c=unet.safetensors", "merge.method=add_difference")
    ready = begin(folder, *three)
    assert "base_alpha" not in ready.space.names
    for name in setup.BASELINES:
        assert len(ready.merger.merge(ready.baseline(name))) == len(state)


def test_method_that_takes_no_half_is_searched_where_it_can(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "_found", {name: method.get(name) for name in method.names()})
    plugin = """
from typing import Annotated
from torch import Tensor
from bayesian_merger.methods import Domain, method

@method
def stretched(a: Tensor, b: Tensor, *, alpha: Annotated[float, Domain(1.0, 2.0)] = 1.5) -> Tensor:
    return a + alpha * (b - a)
"""
    (folder / "stretched.py").write_text(plugin)
    ready = begin(
        folder,
        "merge.method=stretched",
        'search.ranges={"*"=[1.0,2.0]}',
        f'plugins=["{Path(toy_plugin.__file__).as_posix()}", "stretched.py"]',
    )
    assert {p.low for p in ready.space.parameters} == {1.0}


def test_vae_of_b_leaves_no_vae_to_search(folder: Path) -> None:
    for name in ("zero", "one"):
        state = load_file(folder / f"{name}.safetensors")
        number = float(name == "one")
        state["first_stage_model.encoder.conv_in.weight"] = torch.full((2,), number)
        save_file(state, folder / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"merge\.vae is 'b'.*search\.presets"):
        begin(folder, "merge.vae=b", 'search.presets=["vae"]')
    ready = begin(folder, 'search.presets=["vae"]')
    assert "VAE_alpha" in ready.space.names
    # A parent's VAE is its own, by weight 0 or 1.
    for name, expected in (("a", 0.0), ("b", 1.0)):
        vae = ready.merger.merge(ready.baseline(name))["first_stage_model.encoder.conv_in.weight"]
        assert set(vae.tolist()) == {expected}


def stop_in_search(folder: Path) -> None:
    """Leave a run that was interrupted after its baselines, whose study was copied before."""
    loads: list[Recipe] = []

    def stops(recipe: Recipe, prompts: Sequence[Prompt]) -> bool:
        loads.append(recipe)
        if len(loads) == 10:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        finish(with_backend(begin(folder), stops), folder)


def test_damaged_study_goes_on_from_its_last_good_copy(folder: Path) -> None:
    stop_in_search(folder)
    (folder / "run" / "study.db").write_bytes(b"SQLite format 3\0" + b"nonsense" * 9999)
    outcome, observer = finish(begin(folder), folder)
    (note,) = (text for text in observer.lines if "damaged" in text)
    assert "the run goes on from the copy of 20" in note
    assert (folder / "run" / "study.damaged-1.db").is_file()
    whole = start(folder, into="whole")
    assert measured(outcome) == measured(whole)
    assert outcome.gain == whole.gain
    # What the baselines had is in the copy.
    assert observer.made == outcome.images - 18


def touch(path: Path) -> None:
    os.utime(path, ns=(10**18, 10**18))


def unplug(path: Path) -> None:
    path.rename(path.with_name("away"))


def cut_off(path: Path) -> None:
    shutil.copy(path, path.with_name("away"))
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (touch, "has changed since it was opened"),
        (unplug, "can no longer be read"),
        (cut_off, "has changed since it was opened"),
    ],
)
def test_model_that_changes_in_the_run_stops_it_and_fails_no_trial(
    folder: Path, harm: Callable[[Path], None], said: str
) -> None:
    loads: list[Recipe] = []
    model = folder / "one.safetensors"

    class Harming(Failing):
        def load(self, recipe: Recipe, merged: Mapping[str, Tensor]) -> None:
            loads.append(recipe)
            if len(loads) == 5:
                harm(model)
            super().load(recipe, merged)

    ready = begin(folder)
    object.__setattr__(ready, "backend", Harming(ready.backend, lambda recipe, prompts: False))
    with pytest.raises(CheckpointError, match=f"one.safetensors: .*{said}") as told:
        finish(ready, folder)
    assert len(str(told.value).splitlines()) == 1
    if (folder / "away").exists():
        (folder / "away").replace(model)
    outcome, _ = finish(begin(folder), folder)
    assert measured(outcome) == measured(start(folder, into="whole"))
    assert all(result.state == "complete" for result in outcome.results)


def test_run_folder_goes_on_on_another_machine(folder: Path, tmp_path: Path) -> None:
    whole = start(folder, into="whole")
    stop_in_search(folder)
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("elsewhere", "whole"))
    for model in ("zero", "one"):
        (folder / f"{model}.safetensors").unlink()
    outcome, observer = finish(begin(other), other)
    assert measured(outcome) == measured(whole)
    assert 0 < observer.made < whole.images
    assert str(other) in (other / "run" / "best.toml").read_text()


# A disk of little space, which grows whenever the run stops for it.
FILLING = """
import json, subprocess, sys
from itertools import count
from pathlib import Path
from test_run import measured, start
from bayesian_merger.errors import MergerError

folder, disk = Path(sys.argv[1]), Path(sys.argv[1], sys.argv[2])
disk.mkdir(parents=True)
said = []
for n_kib in count(100, 150):
    more = ",remount" if said else ""
    told = ["-t", "tmpfs", "-o", f"size={n_kib}k{more}", "none", str(disk)]
    subprocess.run(["mount", *told], check=True)
    try:
        outcome = start(folder, "output.save_images=all", report=True)
    except (MergerError, OSError) as error:
        said.append(str(error))
    else:
        break
print(json.dumps([said, repr((measured(outcome), outcome.gain))]))
"""


def can_mount(folder: Path) -> bool:
    told = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)]
    return bool(shutil.which("unshare")) and subprocess.run(told, check=False).returncode == 0


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        ("run", "database or disk is full"),
        pytest.param("run/images", "No space left on device", marks=pytest.mark.slow),
    ],
)
def test_run_goes_on_whenever_its_disk_was_full(folder: Path, disk: str, reason: str) -> None:
    if not can_mount(folder):
        pytest.skip("no disk can be mounted here")
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FILLING, str(folder), disk],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, found = json.loads(done.stdout.splitlines()[-1])
    assert len(said) > 1
    assert all(reason in one and len(one.splitlines()) == 1 for one in said), said
    whole = start(folder, "output.save_images=all", into="whole")
    assert found == repr((measured(whole), whole.gain))


SLOW = """
import os, time
from pathlib import Path

def slow(folder):
    Path(folder, "asked").write_text(str(os.getpid()))
    time.sleep(60)
"""
SLOW_PLUGIN = (
    SLOW
    + """
from bayesian_merger.scorers import scorer

@scorer
class Slow:
    'Takes its time.'
    def __call__(self, samples):
        slow(Path(__file__).parent)
"""
)
SLOW_PROGRAM = (
    SLOW
    + """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["payload"] != "first":
        slow(".")
    print(json.dumps({"id": asked["id"], "score": 1}))
"""
)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to hear")
@pytest.mark.parametrize(
    ("source", "told"),
    [
        (SLOW_PROGRAM, 'scorers.process = { command = ["python", "slow.py"], timeout_s = 90 }'),
        pytest.param(
            SLOW_PLUGIN,
            'scorers.slow = {}\nplugins = ["slow.py"]',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_signal_to_end_does_not_wait_for_a_slow_scorer_beside_a_server(
    folder: Path, source: str, told: str
) -> None:
    server = FakeWebUI(A1111, folder)
    server.chosen = server.loaded = "zero.safetensors"
    (folder / "slow.py").write_text(source)
    (folder / "lake.toml").write_text('prompt = "a lake"\nwidth = 64\nheight = 64\n')
    (folder / "config.toml").write_text(
        f"{told}\n"
        'models = { a = "zero.safetensors", b = "one.safetensors" }\n'
        'panel = { payloads = ["lake.toml"] }\n'
        f'backend = {{ name = "webui", url = "{server.url}" }}\n'
        "search = { images = 4 }\n"
        "heldout = { images = 2, select_images = 2 }\n"
    )
    command = [sys.executable, "-m", "bayesian_merger", "run", str(folder / "config.toml")]
    with (folder / "said.log").open("w") as log:
        run = subprocess.Popen(
            [*command, "--run-dir", str(folder / "run")], stdout=log, stderr=log
        )
    try:
        asked = folder / "asked"
        end = time.monotonic() + 60
        while not (asked.is_file() and asked.read_text()) and time.monotonic() < end:
            assert run.poll() is None, (folder / "said.log").read_text()
            time.sleep(0.1)
        run.terminate()
        assert run.wait(10) == 130
    finally:
        run.kill()
        server.stop()
    assert not psutil.pid_exists(int(asked.read_text()))
