"""The embedded example: what its files are, and that the real job runs on them."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Command
from test_cli import command as command

import bayesian_merger
from bayesian_merger import blocks
from bayesian_merger.checkpoint import Checkpoint

DEMO = Path(bayesian_merger.__file__).parent / "demo"
SHORT = (
    "--init-points=1",
    "--n-iters=1",
    "--set=heldout.candidates=1",
    "--set=heldout.select_images=6",
    "--set=heldout.images=12",
    "--set=panel.batch_size=2",
)


@pytest.mark.parametrize("name", ["crisp", "vivid"])
def test_checkpoint_has_the_layout_of_sd15_in_few_megabytes(name: str) -> None:
    found = Checkpoint(DEMO / f"{name}.safetensors")
    assert blocks.detect(found.layout).name == "sd1"
    assert sum(n.startswith("model.diffusion_model.") for n in found.layout) == 686
    assert found.path.stat().st_size < 5_000_000


def test_the_two_models_differ_in_every_block() -> None:
    a, b = (Checkpoint(DEMO / f"{name}.safetensors") for name in ("crisp", "vivid"))
    architecture = blocks.detect(a.layout)
    differing = {architecture.place(n).block for n in a.layout if not torch.equal(a[n], b[n])}
    assert differing >= set(architecture.blocks)


def short(command: Command, run_dir: Path) -> dict[str, Any]:
    """What a short demo has found."""
    code, out, err = command("demo", "--run-dir", run_dir, *SHORT)
    assert code == 0, err
    assert str(run_dir / "report.html") in out.replace("\n", "")
    found: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return found


def test_demo_asks_no_network_and_its_merges_beat_the_parents(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(_: socket.socket, address: object) -> None:
        asked.append(address)
        raise OSError("the demo asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = short(command, tmp_path / "run")
    assert not asked
    even = found["heldout"]["even"]
    for parent in (found["heldout"]["a"], found["heldout"]["b"]):
        assert even["mean"] - parent["mean"] > 2 * (even["se"] + parent["se"])


@pytest.mark.slow
def test_demo_gives_the_same_result_twice(command: Command, tmp_path: Path) -> None:
    first, second = (short(command, tmp_path / name) for name in ("first", "second"))
    for key in ("images", "trials", "heldout", "gain", "best", "verdict"):
        assert first[key] == second[key]
    files = [(tmp_path / name / "best.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_script_that_made_the_example_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import make_demo  # here, as it turns the model hub off for the whole process

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for steps in ("VAE_STEPS", "DECODER_STEPS", "SCORER_STEPS"):
        monkeypatch.setattr(make_demo, steps, 2)
    monkeypatch.setattr(make_demo, "N_LATENTS", 64)
    monkeypatch.setattr(make_demo, "N_JUDGED", 112)
    domains = {
        name: dataclasses.replace(domain, steps=4) for name, domain in make_demo.DOMAINS.items()
    }
    monkeypatch.setattr(make_demo, "DOMAINS", domains)
    monkeypatch.setattr(sys, "argv", ["make_demo.py", "--out", str(tmp_path)])
    make_demo.main()
    for name in ("crisp", "vivid", "scorer"):
        made, shipped = (Checkpoint(d / f"{name}.safetensors") for d in (tmp_path, DEMO))
        assert made.layout == shipped.layout
    for folder in ("config/tokenizer", "config/unet", "config/text_encoder", "wildcards"):
        for path in (tmp_path / folder).rglob("*.*"):
            assert path.read_bytes() == (DEMO / path.relative_to(tmp_path)).read_bytes()
