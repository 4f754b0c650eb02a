"""ComfyUI as the back end: beside a server that answers as it does, and beside the real one."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import toy_plugin
from comfyui_fake import FakeComfyUI
from comfyui_modules import NODE
from PIL import Image
from proxy_fake import Fault, Proxy, cuts
from safetensors.torch import load_file, save_file
from test_names import known_layout
from test_run import Silent

from bayesian_merger import config as configuration
from bayesian_merger import run, setup
from bayesian_merger.backends import comfyui as module
from bayesian_merger.data import Outcome, Prompt
from bayesian_merger.errors import ConfigError, RunError, TrialError
from bayesian_merger.setup import Setup


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    models.mkdir()
    for name, value in {"zero": 0.0, "one": 1.0, "half": 0.5}.items():
        toy_plugin.write_model(models / f"{name}.safetensors", value, vae=True)
    size = "width = 64\nheight = 64\n"
    (tmp_path / "portrait.toml").write_text(f'prompt = "a portrait"\n{size}')
    (tmp_path / "landscape.toml").write_text(f'prompt = "a lake"\n{size}')
    (tmp_path / "config.toml").write_text(
        """
        models = { a = "models/zero.safetensors", b = "models/one.safetensors" }
        search = { images = 12 }
        panel = { payloads = ["portrait.toml", "landscape.toml"] }
        heldout = { images = 4, select_images = 2, candidates = 2 }
        backend = { name = "comfyui" }
        scorers = { exposure = { target = 0.6 } }
        """
    )
    return tmp_path


@pytest.fixture
def fake(folder: Path) -> Iterator[FakeComfyUI]:
    server = FakeComfyUI(folder / "models")
    yield server
    server.stop()


def ready(folder: Path, url: str, *overrides: str) -> Setup:
    options = (f"backend.url={url}", *overrides)
    return setup.prepare(configuration.load(folder / "config.toml", options), folder, "toy")


def start(folder: Path, url: str, *overrides: str, into: str = "run") -> Outcome:
    chosen = ready(folder, url, *overrides)
    try:
        return run.run(chosen, folder / into, Silent(), report=False)
    finally:
        chosen.backend.close()


def painted(folder: Path, url: str, *overrides: str, name: str = "even") -> Image.Image:
    """The first image of the panel by a baseline."""
    chosen = ready(folder, url, *overrides)
    recipe = chosen.baseline(name)
    try:
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
        (sample,) = chosen.backend.generate(chosen.panel[:1])
    finally:
        chosen.backend.close()
    return sample.image


@pytest.mark.parametrize("new_style", [False, True])
def test_run_finds_the_better_merge(folder: Path, fake: FakeComfyUI, new_style: bool) -> None:
    fake.new_style = new_style
    outcome = start(folder, fake.url)
    assert outcome.finished
    assert outcome.gain["over_even"].mean > 0


@pytest.mark.parametrize("model", [0.0, 0.5, 1.0])
def test_nodes_have_the_share_of_the_first_model(
    folder: Path, fake: FakeComfyUI, model: float
) -> None:
    name = {0.0: "a", 0.5: "even", 1.0: "b"}[model]
    image = painted(folder, fake.url, name=name)
    graph = fake.graphs[-1]
    assert graph["model"]["class_type"] == "ModelMergeSD1"
    shares = [v for k, v in graph["model"]["inputs"].items() if k.startswith("input_blocks.")]
    assert shares == [1 - model] * 12
    assert graph["clip"]["inputs"]["ratio"] == 1 - model
    assert image.size == (64, 64)
    assert float(np.asarray(image).mean()) == pytest.approx(64 + 128 * model, abs=4)


def test_each_block_has_its_own_share(folder: Path, fake: FakeComfyUI) -> None:
    chosen = ready(folder, fake.url)
    blocks = list(toy_plugin.TENSORS)
    params = {f"{block}_alpha": i / 100 for i, block in enumerate(blocks)}
    recipe = chosen.recipe(params)
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    inputs = fake.graphs[-1]["model"]["inputs"]
    assert inputs["input_blocks.3."] == pytest.approx(1 - params["IN03_alpha"])
    assert inputs["middle_block.0."] == pytest.approx(1 - params["M00_alpha"])
    assert inputs["output_blocks.11."] == pytest.approx(1 - params["OUT11_alpha"])
    assert fake.graphs[-1]["clip"]["inputs"]["ratio"] == pytest.approx(1.0)
    chosen.backend.close()


@pytest.mark.parametrize(
    ("block", "value", "said"),
    [
        ("IN03", 1.5, "take weights from 0 to 1, and input_blocks"),
        ("base", -0.5, "and base has -0.5"),
    ],
)
def test_weights_that_its_nodes_do_not_take_are_said(
    folder: Path, fake: FakeComfyUI, block: str, value: float, said: str
) -> None:
    ranges = f"search.ranges={{ {block}_alpha = [{min(value, 0.0)}, {max(value, 1.0)}] }}"
    with pytest.raises(ConfigError, match=said):
        ready(folder, fake.url, ranges)
    assert fake.graphs == []


def test_add_difference_is_put_together(folder: Path, fake: FakeComfyUI) -> None:
    options = ("merge.method=add_difference", "models.c=models/half.safetensors")
    image = painted(folder, fake.url, *options)
    # 0 + 0.5 (1 - 0.5)
    assert float(np.asarray(image).mean()) == pytest.approx(64 + 128 * 0.25, abs=4)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ('sampler_name = "Euler a"', ("euler_ancestral", "normal")),
        ('sampler_name = "DPM++ 2M Karras"', ("dpmpp_2m", "karras")),
        ('sampler_name = "DPM++ 2M"\nscheduler = "SGM Uniform"', ("dpmpp_2m", "sgm_uniform")),
        ('sampler_name = "dpmpp_2m"\nscheduler = "karras"', ("dpmpp_2m", "karras")),
    ],
)
def test_samplers_go_by_the_names_of_comfyui(
    folder: Path, fake: FakeComfyUI, text: str, sent: tuple[str, str]
) -> None:
    (folder / "portrait.toml").write_text(f'prompt = "x"\nwidth = 64\nheight = 64\n{text}\n')
    painted(folder, fake.url, "backend.clip_skip=2")
    inputs = fake.graphs[-1]["sampler"]["inputs"]
    assert (inputs["sampler_name"], inputs["scheduler"]) == sent
    assert fake.graphs[-1]["skip"]["inputs"]["stop_at_clip_layer"] == -2


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ('sampler_name = "Eulr"', (), "no sampler 'Eulr'; did you mean 'Euler'"),
        ('scheduler = "Karas"', (), "no scheduler 'Karas'; did you mean 'Karras'"),
        ("", ("backend.clip_skip=0",), "clip_skip must be 1"),
        ("", ("backend.url=http://127.0.0.1:9",), "nothing answers"),
        ("", ("backend.timeout_s=0",), "timeout_s is 0"),
    ],
)
def test_what_comfyui_lacks_is_said_before_the_run(
    folder: Path, fake: FakeComfyUI, text: str, options: tuple[str, ...], said: str
) -> None:
    (folder / "portrait.toml").write_text(f'prompt = "x"\nwidth = 64\nheight = 64\n{text}\n')
    with pytest.raises(ConfigError, match=said):
        ready(folder, fake.url, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("merge.method=slerp",), "merges by weighted_sum and add_difference, not by slerp"),
        (("merge.clip=true",), "has nothing for merge.clip"),
        (('search.methods=["slerp"]',), "not by slerp"),
    ],
)
def test_what_its_nodes_cannot_merge_is_said_before_an_image(
    folder: Path, fake: FakeComfyUI, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        painted(folder, fake.url, *options)
    assert fake.graphs == []


@pytest.fixture
def with_node(folder: Path) -> Iterator[FakeComfyUI]:
    """A ComfyUI that has our node."""
    server = FakeComfyUI(folder / "models", home=folder / "home")
    yield server
    server.stop()


def places(folder: Path) -> list[str]:
    """What is in our node's folder, but for its token."""
    return sorted(p.name for p in (folder / "home").glob("*/*") if p.name != "token")


@pytest.mark.parametrize(
    "options",
    [
        ("merge.method=slerp",),
        ("merge.clip=true",),
        ("search.ranges={ IN03_alpha = [0.0, 1.5] }",),
    ],
)
def test_what_its_nodes_cannot_merge_our_node_loads(
    folder: Path, with_node: FakeComfyUI, options: tuple[str, ...]
) -> None:
    image = painted(folder, with_node.url, *options)
    graph = with_node.graphs[-1]
    assert graph["merge"]["class_type"] == "BayesianMergerLoader"
    assert "model" not in graph
    assert float(np.asarray(image).mean()) == pytest.approx(64 + 128 * 0.5, abs=4)
    assert places(folder) == []


def test_run_by_our_node_shows_each_merge(folder: Path, with_node: FakeComfyUI) -> None:
    outcome = start(folder, with_node.url, "merge.method=slerp", "backend.clip_skip=2")
    assert outcome.finished
    assert with_node.graphs[-1]["positive"]["inputs"]["clip"] == ["skip", 0]
    digests = {name for r in outcome.results for name in r.images.values()}
    assert len(digests) == sum(len(r.images) for r in outcome.results)
    assert outcome.gain["over_even"].mean > 0
    assert places(folder) == []


def test_what_its_own_nodes_can_merge_is_left_to_them(
    folder: Path, with_node: FakeComfyUI
) -> None:
    painted(folder, with_node.url)
    assert with_node.graphs[-1]["model"]["class_type"] == "ModelMergeSD1"
    assert places(folder) == []


@pytest.mark.parametrize(
    ("receipt", "said"),
    [
        ({}, "tells nothing of the model"),
        ({"bayesian_merger": []}, "tells nothing of the model"),
        ({"bayesian_merger": ["x"]}, "tells nothing of the model"),
        (
            {"bayesian_merger": ['{"name": "own", "live": {}}']},
            "did not take the merge, it has own",
        ),
    ],
)
def test_wrong_receipt_of_our_node_fails_the_trial(
    folder: Path, with_node: FakeComfyUI, receipt: object, said: str
) -> None:
    with_node.receipts = lambda told: receipt
    with pytest.raises(TrialError, match=said):
        painted(folder, with_node.url, "merge.method=slerp")
    assert places(folder) == []


def test_model_that_is_another_fails_the_trial(folder: Path, with_node: FakeComfyUI) -> None:
    chosen = ready(folder, with_node.url, "merge.method=slerp")
    first: list[dict[str, Any]] = []

    def stale(told: Any) -> Any:
        receipt = json.loads(told["bayesian_merger"][0])
        first.append(receipt)
        return {"bayesian_merger": [json.dumps({**receipt, "live": first[0]["live"]})]}

    with_node.receipts = stale
    for name in ("a", "b"):
        recipe = chosen.baseline(name)
        if name == "b":
            with pytest.raises(TrialError, match="the server's model is not the merge"):
                chosen.backend.load(recipe, chosen.merger.merge(recipe))
        else:
            chosen.backend.load(recipe, chosen.merger.merge(recipe))
    chosen.backend.close()


def test_image_by_another_merge_fails_the_trial(folder: Path, with_node: FakeComfyUI) -> None:
    chosen = ready(folder, with_node.url, "merge.method=slerp")
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    with_node.receipts = lambda told: {"bayesian_merger": ['{"name": "own", "live": {}}']}
    with pytest.raises(TrialError, match="did not take the merge, it has own"):
        list(chosen.backend.generate(chosen.panel[:1]))
    with_node.receipts = lambda told: told
    assert len(list(chosen.backend.generate(chosen.panel[:1]))) == 1
    chosen.backend.close()


@pytest.mark.parametrize(
    ("case", "is_freed"),
    [("alone", True), ("a job of others runs", False), ("others had the last job", False)],
)
def test_merge_of_our_node_is_let_go_of_at_the_end_unless_others_have_something_there(
    folder: Path, with_node: FakeComfyUI, case: str, is_freed: bool
) -> None:
    chosen = ready(folder, with_node.url, "merge.method=slerp")
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    assert with_node.freed == []
    if case == "a job of others runs":
        with_node.others = ["theirs"]
    elif case == "others had the last job":
        httpx.post(f"{with_node.url}/prompt", json={"prompt": {}, "client_id": "x"})
        while "job-2" not in httpx.get(f"{with_node.url}/history?max_items=1").json():
            time.sleep(0.01)
    chosen.backend.close()
    assert with_node.freed == [{"unload_models": True, "free_memory": True}] * is_freed


def test_models_that_comfyui_merges_stay_there(folder: Path, with_node: FakeComfyUI) -> None:
    painted(folder, with_node.url)
    assert with_node.freed == []


def test_two_runs_do_not_share_our_node(folder: Path, with_node: FakeComfyUI) -> None:
    first, second = (ready(folder, with_node.url, "merge.method=slerp") for _ in range(2))
    recipe = first.baseline("even")
    first.backend.load(recipe, first.merger.merge(recipe))
    with pytest.raises(ConfigError, match="another run has the server"):
        second.backend.load(recipe, second.merger.merge(recipe))
    first.backend.close()
    second.backend.close()


@pytest.mark.parametrize(
    ("body", "status"), [(1000, 200), (0, 400), ("many", 400), (None, 400), (10**18, 507)]
)
def test_our_node_has_a_place_for_merges_if_there_is_room(
    with_node: FakeComfyUI, body: object, status: int
) -> None:
    assert with_node.ours.place(body)[0] == status


@pytest.mark.skipif(os.name == "nt", reason="links and owners are of Unix")
@pytest.mark.parametrize("name", ["bayesian-merger-0123456789abcdef", "../own", "/etc/passwd", ""])
def test_our_node_loads_nothing_but_merges(
    folder: Path, with_node: FakeComfyUI, name: str
) -> None:
    place = Path(with_node.ours.place(1000)[1]["folder"])
    (place / "bayesian-merger-0123456789abcdef.safetensors").symlink_to(
        folder / "models" / "one.safetensors"
    )
    toy_plugin.write_model(place.parent / "own.safetensors", 0.5)
    with pytest.raises(ValueError, match=r"no merge|no file of a merge"):
        with_node.ours.BayesianMergerLoader().load(name, "x", "[]")


def test_vae_that_would_be_searched_is_refused(folder: Path, fake: FakeComfyUI) -> None:
    for name, value in {"zero": 0.0, "one": 1.0}.items():
        path = folder / "models" / f"{name}.safetensors"
        vae = {"first_stage_model.encoder.conv_in.weight": torch.full((2, 2), value)}
        save_file({**load_file(path), **vae}, path)
    with pytest.raises(ConfigError, match="merges no VAE, as the search would"):
        ready(folder, fake.url, "search.ranges={ VAE = [0.0, 1.0] }")


def with_workflow(folder: Path, **changes: dict[str, Any]) -> str:
    """A workflow of the user's, some of whose nodes are changed or added, as an option."""
    graph = {
        name: {"class_type": kind, "inputs": inputs, **changes.get(f"n{name}", {})}
        for name, kind, inputs in (
            ("4", "CheckpointLoaderSimple", {"ckpt_name": "theirs"}),
            ("6", "CLIPTextEncode", {"text": "theirs", "clip": ["4", 1]}),
            ("7", "CLIPTextEncode", {"text": "theirs", "clip": ["4", 1]}),
            ("5", "EmptyLatentImage", {"width": 32, "height": 32, "batch_size": 1}),
            (
                "3",
                "KSampler",
                {
                    **{"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]},
                    **{"latent_image": ["5", 0], "seed": 1, "steps": 3, "sampler_name": "euler"},
                },
            ),
            ("8", "VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
            ("9", "SaveImage", {"images": ["8", 0]}),
        )
    }
    graph |= {name[1:]: node for name, node in changes.items() if name[1:] not in graph}
    (folder / "mine.json").write_text(json.dumps(graph))
    return "backend.workflow=mine.json"


@pytest.mark.parametrize("by", ["their nodes", "our node"])
def test_workflow_of_the_user_makes_the_images(
    folder: Path, fake: FakeComfyUI, with_node: FakeComfyUI, by: str
) -> None:
    server = with_node if by == "our node" else fake
    options = [with_workflow(folder), "backend.clip_skip=2"]
    options += ["merge.method=slerp"] if by == "our node" else []
    image = painted(folder, server.url, *options)
    graph = server.graphs[-1]
    assert len(server.graphs) == (2 if by == "our node" else 1)
    assert graph["own 3"]["inputs"]["steps"] == 3
    assert graph["own 6"]["inputs"] == {"text": "a portrait", "clip": ["skip", 0]}
    assert "own 4" not in graph
    assert image.size == (64, 64)
    assert float(np.asarray(image).mean()) == pytest.approx(64 + 128 * 0.5, abs=4)


def test_workflow_leaves_nothing_in_the_folder_of_the_user(
    folder: Path, fake: FakeComfyUI
) -> None:
    more = {"class_type": "SaveAnimatedWEBP", "inputs": {"images": ["8", 0]}}
    painted(folder, fake.url, with_workflow(folder, n10=more))
    assert fake.saved == []


def with_own_loaders(folder: Path) -> str:
    """A workflow that takes no more than the U-Net from its checkpoint."""
    texts = {n: {"inputs": {"text": "theirs", "clip": ["41", 0]}} for n in ("n6", "n7")}
    return with_workflow(
        folder,
        **texts,
        n41={"class_type": "CLIPLoader", "inputs": {}},
        n42={"class_type": "VAELoader", "inputs": {}},
        n8={"inputs": {"samples": ["3", 0], "vae": ["42", 0]}},
    )


def of_the_unet_only(folder: Path) -> None:
    for name, value in {"zero": 0.0, "one": 1.0}.items():
        toy_plugin.write_model(folder / "models" / f"{name}.safetensors", value, text=False)


def test_models_of_the_unet_only_need_a_workflow_that_has_the_rest(
    folder: Path, with_node: FakeComfyUI
) -> None:
    of_the_unet_only(folder)
    for options in ([], [with_workflow(folder)], ["merge.method=slerp"]):
        with pytest.raises(
            ConfigError, match="holds no text encoder and no VAE, which the images"
        ):
            ready(folder, with_node.url, *options)
    assert with_node.graphs == []


@pytest.mark.parametrize("options", [(), ("merge.method=slerp",)])
def test_models_of_the_unet_only_are_merged_where_the_workflow_has_the_rest(
    folder: Path, with_node: FakeComfyUI, options: tuple[str, ...]
) -> None:
    of_the_unet_only(folder)
    chosen = ready(folder, with_node.url, with_own_loaders(folder), *options)
    chosen.backend.close()
    assert not [note for note in chosen.notes if "has its own" in note]
    image = painted(folder, with_node.url, with_own_loaders(folder), *options)
    assert float(np.asarray(image).mean()) == pytest.approx(64 + 128 * 0.5, abs=4)


def test_text_encoder_that_only_one_model_has_is_taken_as_it_is(
    folder: Path, fake: FakeComfyUI
) -> None:
    toy_plugin.write_model(folder / "models" / "one.safetensors", 1.0, vae=True, text=False)
    painted(folder, fake.url)
    assert fake.graphs[-1]["positive"]["inputs"]["clip"] == ["a", 1]
    assert "clip" not in fake.graphs[-1]


def test_parts_of_the_merge_that_a_workflow_does_not_use_are_noted(
    folder: Path, fake: FakeComfyUI
) -> None:
    chosen = ready(folder, fake.url, with_own_loaders(folder), "backend.clip_skip=2")
    chosen.backend.close()
    assert [note for note in chosen.notes if "has its own" in note] == [
        "the workflow has its own text encoder; weights of the merge's (base) change nothing",
        "the workflow has its own VAE; weights of the merge's (VAE) change nothing",
        "backend.clip_skip changes nothing, as the workflow has its own text encoder",
    ]


def test_search_of_nothing_that_a_workflow_uses_is_refused(
    folder: Path, fake: FakeComfyUI
) -> None:
    frozen = ", ".join(f"{block} = 0.5" for block in toy_plugin.TENSORS if block != "base")
    options = [with_own_loaders(folder), f"search.freeze={{ {frozen} }}"]
    said = r"own text encoder and VAE, and the search varies nothing else \(base_alpha\); take"
    with pytest.raises(ConfigError, match=said):
        ready(folder, fake.url, *options)
    frozen = frozen.replace("IN03 = 0.5, ", "")
    ready(folder, fake.url, options[0], f"search.freeze={{ {frozen} }}").backend.close()


def test_workflow_that_cannot_be_used_is_said_before_an_image(
    folder: Path, fake: FakeComfyUI
) -> None:
    option = with_workflow(folder, n8={"class_type": "Magic"})
    with pytest.raises(ConfigError, match=r"workflow: mine\.json: ComfyUI has no node 'Magic'"):
        ready(folder, fake.url, option)
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        ready(folder, fake.url, "backend.workflow=none.json")
    assert fake.graphs == []


def test_workflow_is_part_of_what_a_run_is(folder: Path, fake: FakeComfyUI) -> None:
    option = with_workflow(folder)
    first = ready(folder, fake.url, option)
    first.backend.close()
    assert any("are the workflow's" in note for note in first.notes)
    before = first.identity
    other = ready(folder, fake.url, with_workflow(folder, n7={"inputs": {"text": "x"}}))
    other.backend.close()
    assert other.identity != before


def test_checkpoint_of_two_folders_is_refused(folder: Path, fake: FakeComfyUI) -> None:
    fake.twins = True
    with pytest.raises(ConfigError, match=r"has 2 checkpoints 'zero\.safetensors': .*rename one"):
        ready(folder, fake.url)


@pytest.mark.parametrize("answer", [[], {}, None, ["COMBO", []], ["COMBO", {}], [None]])
def test_lists_that_are_none_are_no_stack_trace(
    folder: Path, fake: FakeComfyUI, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    monkeypatch.setattr(
        fake, "_inputs", lambda node: {"sampler_name": answer, "scheduler": answer}
    )
    with pytest.raises(ConfigError, match="has no sampler 'euler'"):
        ready(folder, fake.url)


def test_comfyui_that_was_started_anew_between_two_trials_is_waited_for(
    folder: Path, fake: FakeComfyUI
) -> None:
    chosen = ready(folder, fake.url)
    before = fake.asked.copy()
    recipe = chosen.baseline("b")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    assert not [path for path in fake.asked - before if path.startswith("/object_info")]
    chosen.backend.close()


def test_checkpoint_that_comfyui_has_not_is_said(folder: Path, fake: FakeComfyUI) -> None:
    (folder / "models" / "one.safetensors").rename(folder / "onne.safetensors")
    with pytest.raises(
        ConfigError, match=r"no checkpoint 'onne\.safetensors'.*models/checkpoints"
    ):
        painted(folder, fake.url, "models.b=onne.safetensors")


def test_checkpoint_may_lie_in_a_folder(folder: Path, fake: FakeComfyUI) -> None:
    fake.sub = "SD 1.5\\"
    painted(folder, fake.url)
    assert fake.graphs[-1]["a"]["inputs"]["ckpt_name"] == "SD 1.5\\zero.safetensors"


@pytest.mark.parametrize(
    ("fault", "number", "said"),
    [
        ("fails", 1, "OutOfMemoryError no memory"),
        ("interrupts", 5, "ComfyUI is interrupted in what it makes again and again"),
    ],
)
def test_job_that_fails_fails_the_trial(
    folder: Path, fake: FakeComfyUI, fault: str, number: int, said: str
) -> None:
    setattr(fake, fault, number)
    with pytest.raises(TrialError, match=said):
        painted(folder, fake.url)


def test_job_that_the_user_interrupts_is_begun_anew(folder: Path, fake: FakeComfyUI) -> None:
    before = painted(folder, fake.url)
    fake.interrupts = 2
    assert painted(folder, fake.url).tobytes() == before.tobytes()
    assert fake.interrupts == 0


def test_job_that_the_server_forgets_is_begun_anew(
    folder: Path, fake: FakeComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.01)
    before = painted(folder, fake.url)
    fake.forgets = 2
    assert painted(folder, fake.url).tobytes() == before.tobytes()
    assert fake.forgets == 0


@pytest.mark.parametrize("is_told", [True, False])
def test_end_of_a_job_is_known_at_once_where_the_server_tells_it(
    folder: Path, fake: FakeComfyUI, is_told: bool
) -> None:
    """And soon where it does not."""
    fake.takes_s = 0.5
    other = {"type": "executing", "data": {"node": None, "prompt_id": "job-of-another"}}
    if is_told:
        fake.listeners = {}
        fake.babble = [b"a preview", [], "x", {"type": "status"}, {"type": 1, "data": 2}, other]
    chosen = ready(folder, fake.url)
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    before = fake.asked["/history"]
    assert len(list(chosen.backend.generate(chosen.panel[:2]))) == 2
    assert (fake.asked["/history"] - before == 4) == is_told
    chosen.backend.close()


def test_server_that_stops_telling_is_asked(folder: Path, fake: FakeComfyUI) -> None:
    fake.takes_s, fake.listeners = 0.3, {}
    chosen = ready(folder, fake.url)
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    (listener,) = fake.listeners.values()
    listener.connection.shutdown(socket.SHUT_RDWR)
    fake.listeners = None
    assert len(list(chosen.backend.generate(chosen.panel[:2]))) == 2
    chosen.backend.close()


def heard(folder: Path, fake: FakeComfyUI, n_images: int) -> Setup:
    """The setup, after a merge and some images."""
    chosen = ready(folder, fake.url)
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    assert len(list(chosen.backend.generate(chosen.panel[:1] * n_images))) == n_images
    return chosen


def test_websocket_that_is_not_to_be_had_is_tried_again_when_the_server_was_away(
    folder: Path, fake: FakeComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = heard(folder, fake, 3)
    assert fake.asked["/ws"] == 1
    monkeypatch.setattr(chosen.backend._server, "n_lost", 1)  # type: ignore[attr-defined]
    assert len(list(chosen.backend.generate(chosen.panel[:2]))) == 2
    assert fake.asked["/ws"] == 2
    chosen.backend.close()


def test_websocket_that_tells_nothing_is_given_up(
    folder: Path, fake: FakeComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_REST_S", 0.3)
    fake.listeners, fake.is_silent, fake.takes_s = {}, True, 0.1
    chosen = heard(folder, fake, 2)
    assert chosen.backend._events is None  # type: ignore[attr-defined]
    assert fake.asked["/ws"] == 1
    chosen.backend.close()


def test_websocket_that_tells_late_is_kept(
    folder: Path, fake: FakeComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_REST_S", 0.05)
    fake.listeners, fake.takes_s = {}, 0.2
    chosen = heard(folder, fake, 2)
    assert chosen.backend._events is not None  # type: ignore[attr-defined]
    assert fake.asked["/ws"] == 1
    chosen.backend.close()


def test_job_that_hangs_is_stopped_and_fails_the_trial(folder: Path, fake: FakeComfyUI) -> None:
    fake.hangs = 1
    with pytest.raises(TrialError, match="has made no image in 1 s"):
        painted(folder, fake.url, "backend.timeout_s=1")
    assert fake.stopped == [
        ("queue", {"delete": ["job-1"]}),
        ("interrupt", {"prompt_id": "job-1"}),
    ]


def test_ctrl_c_takes_the_jobs_out_of_the_queues_of_several_servers(folder: Path) -> None:
    fakes = [FakeComfyUI(folder / "models") for _ in range(2)]
    chosen = ready(folder, fakes[0].url, f"backend.url={json.dumps([f.url for f in fakes])}")
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    for fake in fakes:
        fake.hangs, fake.stopped = 1, []
    images = chosen.backend.generate(chosen.panel[:2])

    def stopped() -> None:
        with pytest.raises(RunError, match="before ComfyUI was done"):
            list(images)
        ended.append(True)

    ended: list[bool] = []
    waiting = threading.Thread(target=stopped)
    waiting.start()
    while not all(fake.graphs[-1].get("shown") and not fake.hangs for fake in fakes):
        time.sleep(0.01)
    start = time.monotonic()
    chosen.backend.close()
    waiting.join(10)
    assert ended
    assert time.monotonic() - start < 5
    for fake in fakes:
        assert [path for path, _ in fake.stopped] == ["queue", "interrupt"]
        fake.stop()


def test_place_of_our_node_that_was_removed_is_made_again(
    folder: Path, with_node: FakeComfyUI
) -> None:
    chosen = ready(folder, with_node.url, "merge.method=slerp")
    for name in ("even", "a"):
        recipe = chosen.baseline(name)
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
        [place] = (folder / "home").iterdir()
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        shutil.rmtree(place)
    chosen.backend.close()


def test_comfyui_that_asks_for_a_password_says_where_it_goes(
    folder: Path, fake: FakeComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "answer", lambda path, query, body: (401, {"detail": "no"}))
    with pytest.raises(ConfigError, match="put user:password into the environment variable BAY"):
        ready(folder, fake.url)


def test_webui_is_no_comfyui(
    folder: Path, fake: FakeComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "answer", lambda path, query, body: (200, {"detail": "hello"}))
    with pytest.raises(ConfigError, match="is no ComfyUI"):
        ready(folder, fake.url)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The real server, on the CPU, with two random checkpoints of SD1.5's size: its URL, its folder."""
    place = os.environ.get("COMFYUI_DIR")
    if not place:
        pytest.skip("COMFYUI_DIR names no folder of ComfyUI")
    base = tmp_path_factory.mktemp("comfyui")
    checkpoints = base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    # Held by no name, as the server needs the memory.
    save_file(random_model(0), checkpoints / "first.safetensors")
    save_file(
        beside(checkpoints / "first.safetensors", 0.3, 1), checkpoints / "second.safetensors"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "bayesian_merger").symlink_to(NODE.parent)
    # Half precision, as on graphics cards: by a CPU's single precision three models take 16 GB.
    command = [python, "main.py", "--cpu", "--fp16-unet", "--port", str(port)]
    with (base / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [*command, "--base-directory", str(base)], cwd=place, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, (base / "log.txt").read_text()[-2000:]
            try:
                httpx.get(f"{url}/system_stats").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url, base
    finally:
        server.kill()
        server.wait()


def random_model(seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint of SD1.5's tensors, scaled so that signals keep their size."""
    chance = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in known_layout("sd1-ldm").items():
        if name.endswith("position_ids"):
            found[name] = torch.arange(77)[None]
        elif name.startswith(("model.diffusion_model", "cond_stage", "first_stage")):
            noise = torch.randn(shape, generator=chance)
            if len(shape) > 1:
                found[name] = (noise / math.prod(shape[1:]) ** 0.5).half()
            else:
                found[name] = (float(name.endswith("weight")) + 0.02 * noise).half()
    return found


def beside(path: Path, share: float, seed: int) -> dict[str, torch.Tensor]:
    """The checkpoint with noise of a share of each tensor's spread, but for its VAE."""
    chance = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        if not tensor.is_floating_point() or name.startswith("first_stage")
        else (tensor + share * tensor.std() * torch.randn(tensor.shape, generator=chance)).half()
        for name, tensor in load_file(path).items()
    }


def only(path: Path, begin: str, new: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin so; with another beginning."""
    tensors = load_file(path)
    return {new + n.removeprefix(begin): x for n, x in tensors.items() if n.startswith(begin)}


def own(url: str, prompt: Prompt, checkpoint: str) -> bytes:
    """What the server makes of a prompt with a checkpoint as it is."""
    engine = module.ComfyUI(url)
    loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
    engine._merged = module._Model({"all": loader}, *(["all", slot] for slot in range(3)))
    try:
        return engine._picture(engine._done(engine._workflow(prompt)))
    finally:
        engine.close()


@pytest.mark.comfyui
def test_real_server_makes_the_images_of_a_and_b_and_of_our_merge(
    real: tuple[str, Path], folder: Path
) -> None:
    """At 0 and 1 to the bit; between them as a file that our engine has merged, but for rounding."""
    url, base = real
    checkpoints = base / "models" / "checkpoints"
    (folder / "portrait.toml").write_text('prompt = "x"\nwidth = 64\nheight = 64\nsteps = 2\n')
    options = [
        f"models.{m}={checkpoints}/{n}.safetensors" for m, n in (("a", "first"), ("b", "second"))
    ]
    chosen = ready(folder, url, *options, "backend.timeout_s=600")
    prompt = chosen.panel[0]
    merged = chosen.merger.merge(chosen.baseline("even"))
    merged.save(checkpoints / "even.safetensors")
    for name, file, reach in (("a", "first", 0), ("even", "even", 1), ("b", "second", 0)):
        recipe = chosen.baseline(name)
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
        (sample,) = chosen.backend.generate([prompt])
        theirs = Image.open(io.BytesIO(own(url, prompt, f"{file}.safetensors"))).convert("RGB")
        apart = [abs(x - y) for x, y in zip(sample.image.tobytes(), theirs.tobytes(), strict=True)]
        assert max(apart) <= reach
    chosen.backend.close()


@pytest.mark.comfyui
def test_real_server_loads_a_merge_of_any_method_by_our_node(
    real: tuple[str, Path], folder: Path
) -> None:
    url, base = real
    checkpoints = base / "models" / "checkpoints"
    (folder / "portrait.toml").write_text('prompt = "x"\nwidth = 64\nheight = 64\nsteps = 2\n')
    options = [
        f"models.{m}={checkpoints}/{n}.safetensors" for m, n in (("a", "first"), ("b", "second"))
    ]
    more = ("merge.method=slerp", "backend.timeout_s=600")
    chosen = ready(folder, url, *options, *more)
    prompt = chosen.panel[0]
    for name in ("a", "even"):
        recipe = chosen.baseline(name)
        merged = chosen.merger.merge(recipe)
        merged.save(checkpoints / f"slerp-{name}.safetensors")
        chosen.backend.load(recipe, merged)
        (sample,) = chosen.backend.generate([prompt])
        file = own(url, prompt, f"slerp-{name}.safetensors")
        assert sample.image.tobytes() == Image.open(io.BytesIO(file)).convert("RGB").tobytes()
    chosen.backend.close()


@pytest.mark.comfyui
def test_real_server_adds_a_difference_as_our_merge_does(
    real: tuple[str, Path], folder: Path
) -> None:
    """But for rounding, as ComfyUI adds three models one by one."""
    url, base = real
    checkpoints = base / "models" / "checkpoints"
    save_file(beside(checkpoints / "first.safetensors", 0.1, 2), checkpoints / "third.safetensors")
    (folder / "portrait.toml").write_text('prompt = "x"\nwidth = 64\nheight = 64\nsteps = 2\n')
    names = (("a", "first"), ("b", "second"), ("c", "third"))
    options = [f"models.{m}={checkpoints}/{n}.safetensors" for m, n in names]
    more = ("merge.method=add_difference", "backend.timeout_s=900")
    chosen = ready(folder, url, *options, *more)
    prompt, recipe = chosen.panel[0], chosen.baseline("even")
    merged = chosen.merger.merge(recipe)
    merged.save(checkpoints / "added.safetensors")
    chosen.backend.load(recipe, merged)
    (sample,) = chosen.backend.generate([prompt])
    theirs = Image.open(io.BytesIO(own(url, prompt, "added.safetensors"))).convert("RGB")
    apart = [abs(x - y) for x, y in zip(sample.image.tobytes(), theirs.tobytes(), strict=True)]
    assert max(apart) <= 1
    chosen.backend.close()


@pytest.mark.comfyui
def test_real_server_behind_a_bad_proxy_is_searched_as_without_it(
    real: tuple[str, Path], folder: Path
) -> None:
    url, base = real
    checkpoints = base / "models" / "checkpoints"
    (folder / "portrait.toml").write_text('prompt = "x"\nwidth = 64\nheight = 64\nsteps = 1\n')
    files = [
        f"models.{m}={checkpoints}/{n}.safetensors" for m, n in (("a", "first"), ("b", "second"))
    ]
    counts = ("search.images=2", *(f"heldout.{key}=2" for key in ("images", "select_images")))
    options = [*files, 'panel.payloads=["portrait.toml"]', *counts, "heldout.candidates=1"]

    def searched(into: str, **faults: Fault) -> tuple[Outcome, Proxy]:
        proxy = Proxy(url, **faults)
        try:
            return start(folder, proxy.url, *options, into=into), proxy
        finally:
            proxy.stop()

    whole, _ = searched("whole")
    broken, proxy = searched("broken", prompt=cuts(5), view=cuts(4), history=cuts(7))
    assert min(proxy.met[name] for name in ("prompt", "view", "history")) >= 2
    assert [r.images for r in broken.results] == [r.images for r in whole.results]
    assert [r.scores for r in broken.results] == [r.scores for r in whole.results]


@pytest.mark.comfyui
@pytest.mark.parametrize("method", ["weighted_sum", "slerp"])
def test_real_server_needs_no_more_of_the_models_than_a_workflow_takes(
    real: tuple[str, Path], folder: Path, method: str
) -> None:
    """U-Nets alone, where it loads A's text encoder and VAE: at A the images are A's to the bit."""
    url, base = real
    models = base / "models"
    begins = {
        "text_encoders/clip": "cond_stage_model.transformer.",
        "vae/vae": "first_stage_model.",
    }
    for path, begin in begins.items():
        (models / path).parent.mkdir(exist_ok=True)
        save_file(
            only(models / "checkpoints" / "first.safetensors", begin),
            models / f"{path}.safetensors",
        )
    for name in ("first", "second"):
        unet = only(models / "checkpoints" / f"{name}.safetensors", "model.", "model.")
        save_file(unet, models / "checkpoints" / f"{name}-unet.safetensors")
    (folder / "portrait.toml").write_text('prompt = "x"\nwidth = 64\nheight = 64\nsteps = 2\n')
    loaders = {
        "4": module._node("CheckpointLoaderSimple", ckpt_name="first.safetensors"),
        "41": module._node("CLIPLoader", clip_name="clip.safetensors", type="stable_diffusion"),
        "42": module._node("VAELoader", vae_name="vae.safetensors"),
    }
    engine = module.ComfyUI(url)
    engine._merged = module._Model(loaders, *([name, 0] for name in loaders))
    graph = engine._built_in(Prompt(0, "theirs", "theirs", 1, width=32, height=32, steps=2))
    engine.close()
    graph["save"] = module._node("SaveLatent", samples=["sampler", 0], filename_prefix="theirs")
    (folder / "mine.json").write_text(json.dumps(graph))
    options = [
        f"models.{m}=" + str(models / "checkpoints" / f"{n}-unet.safetensors")
        for m, n in (("a", "first"), ("b", "second"))
    ]
    more = (f"merge.method={method}", "backend.workflow=mine.json", "backend.timeout_s=600")
    chosen = ready(folder, url, *options, *more)
    recipe = chosen.baseline("a")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    (sample,) = chosen.backend.generate(chosen.panel[:1])
    chosen.backend.close()
    file = own(url, chosen.panel[0], "first.safetensors")
    assert sample.image.tobytes() == Image.open(io.BytesIO(file)).convert("RGB").tobytes()
    assert not list((base / "output").rglob("theirs*"))


@pytest.mark.comfyui
def test_real_server_is_searched(real: tuple[str, Path], folder: Path) -> None:
    url, base = real
    checkpoints = base / "models" / "checkpoints"
    for payload in ("portrait", "landscape"):
        text = f'prompt = "{payload}"\nwidth = 64\nheight = 64\nsteps = 1\n'
        (folder / f"{payload}.toml").write_text(text)
    options = [
        f"models.{m}={checkpoints}/{n}.safetensors" for m, n in (("a", "first"), ("b", "second"))
    ]
    outcome = start(folder, url, *options, "search.images=3", "heldout.select_images=2")
    assert outcome.finished
    digests = {name for r in outcome.results for name in r.images.values()}
    assert len(digests) == sum(len(r.images) for r in outcome.results)
