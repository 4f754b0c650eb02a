"""The user's own workflow of ComfyUI, with our model, prompts and seeds in its marked places."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from bayesian_merger.data import Prompt
from bayesian_merger.errors import ConfigError
from bayesian_merger.workflow import SHOWN, Graph, NodeClass, Workflow

KINDS: Mapping[str, list[str]] = {
    "CheckpointLoaderSimple": ["MODEL", "CLIP", "VAE"],
    "UNETLoader": ["MODEL"],
    "DualCLIPLoader": ["CLIP"],
    "VAELoader": ["VAE"],
    "LoraLoader": ["MODEL", "CLIP"],
    "CLIPTextEncode": ["CONDITIONING"],
    "CLIPTextEncodeSDXL": ["CONDITIONING"],
    "EmptyLatentImage": ["LATENT"],
    "KSampler": ["LATENT"],
    "RandomNoise": ["NOISE"],
    "VAEDecode": ["IMAGE"],
    "ImageUpscale": ["IMAGE"],
    "SaveImage": [],
    "PreviewImage": [],
    "SaveAnimatedWEBP": [],
    "SaveLatent": [],
    "ImageSaveAndPass": ["IMAGE"],
}
PROMPT = Prompt(0, "portrait", "a portrait", 17, negative_prompt="blurry", width=640, height=512)
MODEL = (["m", 0], ["c", 0], ["v", 2])

Change = Callable[[Graph], object]


def class_of(kind: str) -> NodeClass | None:
    """What the server says of a class of nodes."""
    return NodeClass(KINDS[kind], "Save" in kind) if kind in KINDS else None


def node(kind: str, title: str = "", /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}


PLAIN = {
    "4": node("CheckpointLoaderSimple", ckpt_name="own.safetensors"),
    "10": node("LoraLoader", model=["4", 0], clip=["4", 1], lora_name="x", strength_model=0.5),
    "6": node("CLIPTextEncode", text="their prompt", clip=["10", 1]),
    "7": node("CLIPTextEncode", text="their negative", clip=["10", 1]),
    "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    "3": node(
        "KSampler",
        **{
            "model": ["10", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
        **{"seed": 3, "steps": 30, "cfg": 5.5, "sampler_name": "euler", "scheduler": "karras"},
    ),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "9": node("SaveImage", images=["8", 0], filename_prefix="mine"),
}


def opened(tmp_path: Path, graph: object) -> Workflow:
    (tmp_path / "mine.json").write_text(json.dumps(graph))
    return Workflow(tmp_path / "mine.json", class_of)


def changed(change: Change, graph: Graph = PLAIN) -> Graph:
    found = deepcopy(graph)
    change(found)
    return found


def titled(**titles: str) -> Change:
    def change(graph: Graph) -> None:
        for title, name in titles.items():
            graph[name]["_meta"]["title"] = title.upper()

    return change


def test_plain_workflow_needs_no_marks(tmp_path: Path) -> None:
    workflow = opened(tmp_path, PLAIN)
    found = workflow.of(MODEL, PROMPT)
    assert workflow.notes == []
    assert "own 4" not in found  # its model is not loaded
    assert found["own 10"]["inputs"]["model"] == ["m", 0]
    assert found["own 10"]["inputs"]["clip"] == ["c", 0]
    assert found["own 8"]["inputs"] == {"samples": ["own 3", 0], "vae": ["v", 2]}
    assert found["own 6"]["inputs"] == {"text": "a portrait", "clip": ["own 10", 1]}
    assert found["own 7"]["inputs"]["text"] == "blurry"
    assert found["own 5"]["inputs"] == {"width": 640, "height": 512, "batch_size": 1}
    sampler = found["own 3"]["inputs"]
    assert (sampler["seed"], sampler["steps"], sampler["cfg"]) == (17, 30, 5.5)
    assert sampler["positive"] == ["own 6", 0]
    # Nothing is saved into the user's folder.
    assert found[SHOWN] == {"class_type": "PreviewImage", "inputs": {"images": ["own 8", 0]}}


def test_same_workflow_twice_is_the_same(tmp_path: Path) -> None:
    workflow = opened(tmp_path, PLAIN)
    assert workflow.of(MODEL, PROMPT) == workflow.of(MODEL, PROMPT)


def second_pass(graph: Graph) -> None:
    """Enlarges the image by a second sampler, and saves both images."""
    again = deepcopy(graph["3"])
    again["inputs"] |= {"latent_image": ["3", 0], "denoise": 0.5, "seed": 4}
    graph["13"] = again
    graph["18"] = node("VAEDecode", samples=["13", 0], vae=["4", 2])
    graph["19"] = node("SaveImage", images=["18", 0], filename_prefix="large")


def test_marks_tell_which_of_several_is_meant(tmp_path: Path) -> None:
    graph = changed(second_pass)
    images = (
        r"several nodes may be the image, node 9 \(SaveImage\), node 19 \(SaveImage\); give the"
    )
    with pytest.raises(ConfigError, match=images):
        opened(tmp_path, graph)
    graph = changed(titled(image="19"), graph)
    seeds = r"several nodes may be the seed, node 3 \(KSampler\), node 13 \(KSampler\)"
    with pytest.raises(ConfigError, match=seeds):
        opened(tmp_path, graph)
    found = opened(tmp_path, changed(titled(seed="3"), graph)).of(MODEL, PROMPT)
    assert found[SHOWN]["inputs"]["images"] == ["own 18", 0]
    assert not [name for name, one in found.items() if one["class_type"] == "SaveImage"]
    assert (found["own 3"]["inputs"]["seed"], found["own 13"]["inputs"]["seed"]) == (17, 4)


def test_only_what_the_image_needs_is_looked_at(tmp_path: Path) -> None:
    """Another image's second sampler makes nothing unclear, nor does its unknown node matter."""

    def change(graph: Graph) -> None:
        second_pass(graph)
        graph["18"]["class_type"] = "Magic"

    workflow = opened(tmp_path, changed(titled(image="9", seed="13"), changed(change)))
    found = workflow.of(MODEL, PROMPT)
    assert workflow.notes == []
    assert set(found) == {SHOWN, *(f"own {name}" for name in ("10", "6", "7", "5", "3", "8"))}
    assert found["own 3"]["inputs"]["seed"] == 17


def test_nothing_else_is_saved(tmp_path: Path) -> None:
    def change(graph: Graph) -> None:
        graph["20"] = node("SaveAnimatedWEBP", images=["8", 0])
        graph["21"] = node("SaveLatent", samples=["3", 0])

    found = opened(tmp_path, changed(change)).of(MODEL, PROMPT)
    assert not [one for one in found.values() if "Save" in one["class_type"]]


def test_node_that_saves_and_is_needed_is_kept_and_noted(tmp_path: Path) -> None:
    def change(graph: Graph) -> None:
        graph["20"] = node("ImageSaveAndPass", images=["8", 0])
        graph["9"]["inputs"]["images"] = ["20", 0]

    workflow = opened(tmp_path, changed(change))
    assert workflow.of(MODEL, PROMPT)[SHOWN]["inputs"]["images"] == ["own 20", 0]
    assert workflow.notes == [
        "the image needs node 20 (ImageSaveAndPass), which may save files of its own each time"
    ]


def test_image_may_be_that_of_another_node_that_has_the_title(tmp_path: Path) -> None:
    graph = changed(lambda g: g.update({"20": node("SaveAnimatedWEBP", images=["8", 0], fps=6)}))
    found = opened(tmp_path, changed(titled(image="20"), graph)).of(MODEL, PROMPT)
    assert found[SHOWN] == {"class_type": "PreviewImage", "inputs": {"images": ["own 8", 0]}}


def loaders_apart(graph: Graph) -> None:
    graph["4"] = node("UNETLoader", "model", unet_name="x")
    graph["41"] = node("DualCLIPLoader", "clip", clip_name1="x")
    graph["42"] = node("VAELoader", vae_name="x")
    graph["10"]["inputs"]["clip"] = ["41", 0]
    graph["8"]["inputs"]["vae"] = ["42", 0]


def test_loaders_apart_are_marked_each_and_a_vae_may_stay(tmp_path: Path) -> None:
    graph = changed(loaders_apart)
    assert opened(tmp_path, graph).takes == {"MODEL", "CLIP"}
    found = opened(tmp_path, graph).of(MODEL, PROMPT)
    assert found["own 10"]["inputs"]["model"] == ["m", 0]
    assert found["own 10"]["inputs"]["clip"] == ["c", 0]
    assert found["own 8"]["inputs"]["vae"] == ["own 42", 0]
    found = opened(tmp_path, changed(titled(vae="42"), graph)).of(MODEL, PROMPT)
    assert found["own 8"]["inputs"]["vae"] == ["v", 2]
    assert "own 42" not in found


def test_both_texts_of_sdxl_and_a_seed_of_its_own_node_are_ours(tmp_path: Path) -> None:
    def change(graph: Graph) -> None:
        texts = {"text_g": "x", "text_l": "y", "width": 1024, "height": 1024}
        graph["6"] = node("CLIPTextEncodeSDXL", "positive", clip=["10", 1], **texts)
        graph["2"] = node("RandomNoise", noise_seed=5)
        graph["3"]["inputs"]["seed"] = ["2", 0]

    found = opened(tmp_path, changed(titled(size="5"), changed(change))).of(MODEL, PROMPT)
    inputs = found["own 6"]["inputs"]
    assert (inputs["text_g"], inputs["text_l"], inputs["width"]) == (
        "a portrait",
        "a portrait",
        1024,
    )
    assert found["own 2"]["inputs"]["noise_seed"] == 17
    assert found["own 3"]["inputs"]["seed"] == ["own 2", 0]


def test_places_that_it_has_not_are_noted(tmp_path: Path) -> None:
    def change(graph: Graph) -> None:
        graph["7"]["inputs"]["text"] = ["4", 1]
        del graph["5"]["inputs"]["width"]

    notes = opened(tmp_path, changed(change)).notes
    assert notes == [
        "the workflow has no node for the negative prompt, which stays its own",
        "the workflow has no node for the size, which stays its own",
    ]


def test_several_places_are_noted_by_their_nodes(tmp_path: Path) -> None:
    def change(graph: Graph) -> None:
        second_pass(graph)
        graph["15"] = node("EmptyLatentImage", width=8, height=8, batch_size=1)
        graph["17"] = node("CLIPTextEncode", text="their second negative", clip=["10", 1])
        graph["13"]["inputs"] |= {"negative": ["17", 0], "mask": ["15", 0]}

    graph = changed(titled(image="19", seed="3"), changed(change))
    own = "it stays its own unless the one that is meant has the title"
    assert opened(tmp_path, graph).notes == [
        f"several nodes of the workflow may be the negative prompt, node 7 (CLIPTextEncode), node 17 "
        f"(CLIPTextEncode); {own} negative",
        f"several nodes of the workflow may be the size, node 5 (EmptyLatentImage), node 15 "
        f"(EmptyLatentImage); {own} size",
    ]


@pytest.mark.parametrize("title", ["", "positive", "negative"])
def test_text_that_is_both_positive_and_negative_is_the_prompt(tmp_path: Path, title: str) -> None:
    graph = changed(lambda g: g["3"]["inputs"].update(negative=["6", 0]))
    graph["6"]["_meta"]["title"] = title
    workflow = opened(tmp_path, graph)
    assert workflow.of(MODEL, PROMPT)["own 6"]["inputs"]["text"] == "a portrait"
    assert workflow.notes == [
        "node 6 (CLIPTextEncode) is both positive and negative in the workflow; it takes the prompt, "
        "and negative prompts are not used"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g["10"].update(class_type="Magic"), "no node 'Magic' \\(node 10\\); install"),
        (lambda g: g.pop("4"), "there is no node 4, whose result is used; export"),
        (
            lambda g: g["4"].update(class_type="VAELoader"),
            "no node is known to be the model; give that node the title model",
        ),
        (lambda g: g["9"].update(inputs={"images": "x"}), "no node is known to be the image"),
        (lambda g: g["9"].update(inputs={}), "no node is known to be the image"),
        (titled(model="6"), "node 6, titled 'model', loads no model"),
        (titled(seed="6"), "node 6, titled seed, has no seed or noise_seed of its own"),
        (titled(positive="3"), "node 3, titled positive, has no text or"),
        (titled(image="6"), "node 6, titled image, shows no images"),
        (lambda g: (titled(size="5")(g), titled(size="6")(g)), "2 nodes have the title size"),
        (lambda g: g["6"].pop("class_type"), "no workflow; take the menu's Export"),
        (lambda g: g["6"].update(inputs=[]), "no workflow; take the menu's Export"),
        (lambda g: g.update(nodes=[]), "a file of ComfyUI's editor; take the menu's Export"),
        (lambda g: g.clear(), "no workflow"),
    ],
)
def test_workflow_that_cannot_be_used_is_refused(
    tmp_path: Path, change: Change, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"workflow: mine.json: .*{said}"):
        opened(tmp_path, changed(change))


def test_result_that_a_merge_has_not_is_refused(tmp_path: Path) -> None:
    graph = changed(lambda g: g["8"]["inputs"].update(vae=["4", 3]))
    with pytest.raises(ConfigError, match="node 4 is the merge's, which has no such result"):
        opened(tmp_path, graph).of(MODEL, PROMPT)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"a": 1}', "[" * 100_000])
def test_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.json: no "):
        Workflow(tmp_path / "mine.json", class_of)


def test_file_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.json: cannot be read \(No such file"):
        Workflow(tmp_path / "mine.json", class_of)
