"""`bayesian-merger merge` as a tool of its own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from test_cli import Command
from test_cli import command as command
from torch import Tensor

from bayesian_merger.blocks import SD1
from bayesian_merger.checkpoint import Checkpoint
from bayesian_merger.curves import CURVES
from bayesian_merger.methods import Weight, method

IN05 = toy.BLOCKS["IN05"][0]
BASE = toy.BLOCKS["base"][1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models a, b, c whose every number is 0, 8, 2."""
    for name, value in (("a", 0.0), ("b", 8.0), ("c", 2.0)):
        toy.write_toy(tmp_path / f"{name}.safetensors", value=value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _methods_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is known to no other."""
    method.names()
    monkeypatch.setattr(method, "_found", dict(method._found))


AB = ("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors")


def made(here: Path, tensor: str = IN05) -> float:
    (value,) = set(Checkpoint(here / "m.safetensors")[tensor].flatten().tolist())
    return float(value)


def numbers(n: int) -> str:
    return ",".join(str(i / 32) for i in range(n))


@pytest.mark.parametrize(
    ("flags", "in05", "base"),
    [
        ((), 4.0, 4.0),
        (("--alpha", "0.25"), 2.0, 2.0),
        (("--alpha", "-0.5"), -4.0, -4.0),
        (("--alpha", "ALL_B"), 8.0, 8.0),
        (("--alpha", "grad_v", "--precision", "fp32"), 8 * 7 / 12, 0.0),
        (("--alpha", numbers(26)), 8 * 6 / 32, 0.0),
        (("--alpha", "0.75", "--alpha-blocks", numbers(25)), 8 * 5 / 32, 6.0),
        (("--alpha", "0.75", "--alpha-blocks", "FLAT_25"), 2.0, 6.0),
        (("--alpha", "0.75", "--alpha-blocks", "0.25"), 2.0, 6.0),
        (("--alpha-blocks", numbers(26)), 8 * 6 / 32, 0.0),
        (("--alpha", "GRAD_V", "-w", "base=0.5", "-w", "IN05=1"), 8.0, 4.0),
        (("--alpha", "0.5", "-w", "IN05_alpha=1"), 8.0, 4.0),
        (("--alpha", "1", "-w", "IN*=0.25"), 2.0, 8.0),
        (("-w", "alpha=1", "-w", "base_alpha=0", "-w", "block_5_alpha=0.25"), 2.0, 0.0),
        (("--alpha", "2", "--clip"), 8.0, 8.0),
    ],
)
def test_weights_are_given_as_number_preset_list_or_by_name(
    here: Path, command: Command, flags: tuple[str, ...], in05: float, base: float
) -> None:
    code, out, err = command(*AB, *flags)
    assert code == 0, err
    assert "wrote m.safetensors" in out
    assert made(here) == pytest.approx(in05, rel=1e-6)
    assert made(here, BASE) == pytest.approx(base, rel=1e-6)


def test_three_models_and_a_method_with_other_weights(here: Path, command: Command) -> None:
    abc = ("merge", "a.safetensors", "b.safetensors", "c.safetensors", "-o", "m.safetensors")
    assert command(*abc, "--method", "add_difference", "--alpha", "0.5")[0] == 0
    assert made(here) == 3.0
    flags = ("--method", "ties", "-w", "density=1", "--overwrite")
    assert command(*abc, *flags)[0] == 0
    assert made(here) == 5.0


def test_weight_far_off_is_noted(here: Path, command: Command) -> None:
    _, out, _ = command(*AB, "--alpha", "15", "-w", "base=0.5")
    assert "note: 25 of 26 weights alpha are below -1 or above 2, the first 15 (IN00)" in out
    assert "note" not in command(*AB, "--alpha", "1.5", "--overwrite")[1]


def test_part_named_by_its_weight_leaves_its_block(here: Path, command: Command) -> None:
    assert command(*AB, "--alpha", "0", "-w", "TIME_alpha=1")[0] == 0
    assert made(here, toy.BLOCKS["IN00"][1]) == 8.0
    assert made(here, toy.BLOCKS["IN00"][0]) == 0.0


def test_merge_is_rebuilt_from_the_recipe_in_its_own_metadata(
    here: Path, command: Command
) -> None:
    assert command(*AB, "--alpha", "COSINE", "--vae", "base")[0] == 0
    told = Checkpoint(here / "m.safetensors").metadata
    recipe = json.loads(told["merge_recipe"])
    assert recipe["weights"]["alpha"]["IN00"] == CURVES["COSINE"].at(0)
    assert json.loads(told["sd_merge_recipe"])["interp_method"] == "weighted_sum"
    assert {m["name"] for m in json.loads(told["sd_merge_models"]).values()} == {
        "a.safetensors",
        "b.safetensors",
    }


@pytest.mark.parametrize(
    "flags",
    [
        ("--alpha", "COSINE", "--vae", "base"),
        ("--alpha", "0", "-w", "IN00=-0.0"),
        ("--method", "whole_numbers"),
    ],
)
def test_merge_is_rebuilt_byte_for_byte_from_its_own_metadata(
    here: Path, command: Command, flags: tuple[str, ...]
) -> None:
    @method
    def whole_numbers(a: Tensor, b: Tensor, *, alpha: Weight = 1) -> Tensor:
        return a + alpha * (b - a)

    assert command(*AB, *flags)[0] == 0
    assert command("merge", "m.safetensors", "-o", "again.safetensors")[0] == 0
    assert (here / "again.safetensors").read_bytes() == (here / "m.safetensors").read_bytes()
    code, out, _ = command("merge", "m.safetensors", "--dry-run")
    assert code == 0
    assert "OUT11" in out


def test_models_of_one_name_are_told_apart_by_their_content(here: Path, command: Command) -> None:
    for name in "ab":
        (here / name).mkdir()
        (here / f"{name}.safetensors").rename(here / name / "model.safetensors")
    paths = ("a/model.safetensors", "b/model.safetensors")
    assert command("merge", *paths, "-o", "m.safetensors")[0] == 0
    again = ("merge", "m.safetensors", "-o", "again.safetensors")
    assert "put it there or name its folder" in command(*again)[2]
    assert "is not the file of the recipe" in command(*again, "--models-dir", "b")[2]
    assert command(*again, "--models-dir", "b", "--models-dir", "a")[0] == 0


def test_pattern_means_every_weight_that_it_fits(here: Path, command: Command) -> None:
    abc = ("merge", "a.safetensors", "b.safetensors", "c.safetensors", "-o", "m.safetensors")
    flags = ("--method", "sum_twice", "--alpha", "0", "--beta", "0", "--dry-run")
    _, out, _ = command(*abc, *flags, "-w", "IN*=1", "-w", "OUT*_beta=0.5", "-w", "M00=0.25")
    lines = [line.split(maxsplit=3) for line in out.splitlines()]
    merged = {line[0]: line[3].strip() for line in lines if len(line) == 4}
    assert merged["IN05"] == "alpha 1, beta 1"
    assert merged["OUT05"] == "alpha 0, beta 0.5"
    assert merged["M00"] == "alpha 0.25, beta 0"


def test_dry_run_says_what_would_happen_and_writes_nothing(here: Path, command: Command) -> None:
    before = sorted(here.iterdir())
    code, out, err = command(
        "merge", "a.safetensors", "b.safetensors", "--alpha", "GRAD_A", "--dry-run"
    )
    assert code == 0, err
    assert sorted(here.iterdir()) == before
    lines = [line.split() for line in out.splitlines()]
    assert ["M00", "2", "0.0", "alpha", "1"] in lines
    assert ["VAE", "2", "0.0", "A's"] in lines
    assert out.startswith("weighted_sum of A a.safetensors, B b.safetensors; fp16, A's VAE\n")
    assert {line[0] for line in lines} >= set(SD1.blocks)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a.safetensors", "b.safetensors"), "-o"),
        (("a.safetensors", *AB[3:]), "name model B as well"),
        ((*AB[1:], "--alpha", "GRAD_W"), "did you mean 'GRAD_V'"),
        ((*AB[1:], "--alpha", numbers(20)), "20 numbers, but SD1.5 takes 26 (base,"),
        ((*AB[1:], "--alpha", numbers(25)), "without base they go to --alpha-blocks"),
        ((*AB[1:], "--alpha-blocks", numbers(9)), "takes 25 (IN00 ... OUT11), or 26 with base"),
        ((*AB[1:], "--alpha", "0,4"), "did you mean 0.4?"),
        ((*AB[1:], "--alpha", "groups8"), "groups8 is a preset of searches"),
        ((*AB[1:], "-w", "in05_ALPHA=0.1"), "did you mean 'IN05_alpha'"),
        ((*AB[1:], "-w", "TE2_alpha=1"), "these SD1.5 models have no TE2 to merge"),
        ((*AB[1:], "--method", "n_average", "--alpha", "1"), "n_average has no weights"),
        ((*AB[1:3], "best.toml", *AB[3:]), "best.toml is a recipe, which says all"),
        ((*AB[1:], "--seed", str(2**63)), "--seed"),
        ((*AB[1:], "--alpha", "0.1 0.2 0.3"), "write the numbers with commas between"),
        ((*AB[1:], "--alpha", "0.1,x"), "'x' is not a number"),
        ((*AB[1:], "--alpha", "nan"), "alpha of block base is nan; give a finite number"),
        ((*AB[1:], "--beta", "0.1"), "weighted_sum has no such weight"),
        ((*AB[1:], "-w", "IN5_alpha=0.1"), "did you mean 'IN05_alpha'"),
        ((*AB[1:], "-w", "IN05_alpha"), "write it as NAME=VALUE"),
        ((*AB[1:], "--method", "weigted_sum"), "did you mean 'weighted_sum'"),
        ((*AB[1:], "--method", "add_difference"), "merges 3 models, but 2 are given"),
        (("a.safetensors", "b.safetensors", "c.safetensors", *AB[3:]), "merges 2 models, but 3"),
        (("a.safetensors", "a.safetensors", *AB[3:]), "models A and B are the same file"),
        (("a.safetensors", "no.safetensors", *AB[3:]), "no such file"),
        (("a.safetensors", "b.safetensors", "-o", "b.safetensors"), "exists"),
        (("a.safetensors", "b.safetensors", "-o", "b.safetensors", "--overwrite"), "is one of"),
        (("a.safetensors", "b.safetensors", "-o", "folder.safetensors"), "is a folder"),
        (("a.safetensors", "b.safetensors", "-o", "m.ckpt"), "name the output .safetensors"),
        ((*AB[1:], "--precision", "fp12"), "fp12"),
        ((*AB[1:], "--alpha-blocks", ""), "unknown preset of weights ''"),
        ((*AB[1:3], "-o", "m" * 300 + ".safetensors"), "cannot be written (File name too long)"),
        ((*AB[1:], "--vae", "b", "-w", "VAE_alpha=1"), "leave out one"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(
    here: Path, command: Command, arguments: tuple[str, ...], said: str
) -> None:
    (here / "folder.safetensors").mkdir()
    before = {p: p.stat().st_mtime_ns for p in here.iterdir()}
    code, _, err = command("merge", *arguments)
    assert code == 2
    assert said in " ".join(err.split())
    assert {p: p.stat().st_mtime_ns for p in here.iterdir()} == before


def test_recipe_takes_no_weights_beside_it(here: Path, command: Command) -> None:
    assert command(*AB)[0] == 0
    code, _, err = command("merge", "m.safetensors", "--alpha", "0.5", "-o", "n.safetensors")
    assert code == 2
    assert "leave out --alpha" in err


def test_disk_without_room_is_told_before_anything_is_written(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    code, _, err = command(*AB)
    assert code == 2
    assert "free on that disk" in err
    assert not (here / "m.safetensors").exists()


def test_model_with_nan_is_named_with_its_tensor(here: Path, command: Command) -> None:
    broken = {IN05: torch.full((2, 3), torch.nan)}
    toy.write_toy(here / "b.safetensors", value=8.0, changes=broken)
    code, _, err = command(*AB)
    assert code == 2
    assert f"tensor '{IN05}' of model B, b.safetensors, holds NaN" in " ".join(err.split())
    assert not (here / "m.safetensors").exists()


def test_notes_are_told(here: Path, command: Command) -> None:
    first = toy.BLOCKS["IN00"][0]
    for name, channels in (("a", 9), ("b", 4)):
        toy.write_toy(here / f"{name}.safetensors", changes={first: torch.ones(2, channels, 3, 3)})
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, here / "lora.safetensors")
    code, out, err = command(*AB)
    assert code == 0, err
    assert "an inpainting model (9 input channels)" in " ".join(out.split())
    code, _, err = command("merge", "a.safetensors", "lora.safetensors", "--dry-run")
    assert code == 2
    assert "model B, lora.safetensors: 1 of 1 modules fit no tensor of model A" in err


def test_method_of_the_user_that_fails_is_told_in_one_line(here: Path, command: Command) -> None:
    (here / "mine.py").write_text(
        "from bayesian_merger.methods import method\n@method\n"
        "def falls(a, b, *, alpha: float = 0.5):\n    return a @ b\n"
    )
    code, _, err = command(*AB, "--plugin", "mine.py", "--method", "falls")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "falls, tensor" in err
    assert not (here / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("signature", "body", "said"),
    [
        ("a, b, *, alpha", "a", "its weight alpha needs a number as default"),
        ("a, b, *, alpha: float = 'half'", "a", "its weight alpha needs a number as default"),
        ("a, b, *, alpha: '0 to 1' = 0.5", "a", "the annotation of alpha cannot be read"),
        ("a, b, *, alpha: float = 0.5", "None", ", tensor '"),
        ("a, b, *, alpha: float = 0.5", "a > b", "not floating point numbers"),
    ],
)
def test_method_of_the_user_that_breaks_the_contract_is_told_in_one_line(
    here: Path, command: Command, signature: str, body: str, said: str
) -> None:
    name = "own"
    text = f"def {name}({signature}):\n    return {body}\n"
    (here / "mine.py").write_text(f"from bayesian_merger.methods import method\n@method\n{text}")
    code, _, err = command(*AB, "--plugin", "mine.py", "--method", name)
    assert (code, len(err.splitlines())) == (2, 1)
    assert said in err


def test_vae_of_b_is_asked_for_in_vain(here: Path, command: Command) -> None:
    toy.write_toy(here / "b.safetensors", value=8.0, without=toy.VAE_NAMES)
    code, _, err = command(*AB, "--vae", "b")
    assert code == 2
    assert "vae is 'b', but model B, b.safetensors, holds no whole VAE" in err


def test_file_of_a_model_that_is_a_folder_is_not_overwritten(here: Path, command: Command) -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    unet.save_pretrained(here / "model" / "unet")
    index = {"_class_name": "StableDiffusionPipeline"}
    (here / "model" / "model_index.json").write_text(json.dumps(index))
    weights = here / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(here / "model", here / "other")
    before = weights.read_bytes()
    code, _, err = command("merge", "model", "other", "-o", weights, "--overwrite", "--dry-run")
    assert code == 2
    assert "is one of the models or in it" in " ".join(err.split())
    assert weights.read_bytes() == before


def test_names_from_files_do_not_speak_to_the_terminal(here: Path, command: Command) -> None:
    (here / "best.toml").write_text(
        'method = "weighted_sum"\narchitecture = "sd1"\n[weights.alpha]\nbase = 0.5\n'
        '[[models]]\nname = "a\\u001b]0;x"\nsha256 = "0"\n'
        '[[models]]\nname = "b"\nsha256 = "1"\n'
    )
    code, _, err = command("merge", "best.toml", "-o", "m.safetensors")
    assert code == 2
    assert "\x1b]0" not in err


def test_merge_that_is_told_to_stop_leaves_nothing(here: Path) -> None:
    large = {IN05: torch.zeros(6000, 6000)}
    for name in ("a", "b"):
        toy.write_toy(here / f"{name}.safetensors", int(name == "b"), changes=large)
    before = sorted(here.iterdir())
    command = [sys.executable, "-m", "bayesian_merger", *AB, "--precision", "fp32"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and sorted(here.iterdir()) == before:
        time.sleep(0.001)
    for _ in range(3):  # by somebody without patience
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130), err  # 0 if it was done by then
    assert "Traceback" not in err
    assert not list(here.glob(".*.part"))
    assert ("stopped" in err) == (process.returncode == 130)
