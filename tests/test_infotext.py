from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bayesian_merger import album, infotext
from bayesian_merger.data import Prompt, Sample

WEBUI = """a cat, (fluffy:1.2)
on a mat
Negative prompt: dog,
blurry
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234, Size: 512x512"""
GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 42, "positive": ["6", 0], "negative": ["7", 0], "model": ["4", 0]},
    },
    "6": {
        "class_type": "ConditioningZeroOut",
        "inputs": {"strength": 1.0, "conditioning": ["9", 0]},
    },
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dog", "clip": ["4", 1]}},
    "9": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a cat"}},
}


def test_text_of_webuis_is_read() -> None:
    told = infotext.read({"parameters": WEBUI})
    assert told == ("a cat, (fluffy:1.2)\non a mat", "dog,\nblurry", 1234)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a cat", ("a cat", "", None)),
        ("a cat\nSteps: 20, Seed: 5", ("a cat", "", 5)),
        ("Steps: 20, Seed: 5", ("", "", 5)),
        ("a cat\nNegative prompt: dog", ("a cat", "dog", None)),
        ("the Steps: 3 of a stair\nSteps: 20, Seed: 5", ("the Steps: 3 of a stair", "", 5)),
        ("", ("", "", None)),
    ],
)
def test_text_of_webuis_may_lack_parts(text: str, told: tuple[str, str, int | None]) -> None:
    assert infotext.read({"parameters": text}) == told


def test_workflow_of_comfyui_is_followed_to_its_texts() -> None:
    assert infotext.read({"prompt": json.dumps(GRAPH)}) == ("a cat", "dog", 42)


@pytest.mark.parametrize(
    "graph",
    ["{", "[]", "7", '{"3": 7}', '{"3": {"inputs": {"positive": ["3", 0], "negative": 3}}}'],
)
def test_workflow_that_is_none_tells_nothing(graph: str) -> None:
    assert infotext.read({"prompt": graph}) == ("", "", None)


# Of more than that the format of webuis does not tell where it ends.
words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=60)


@given(words, words, st.integers(0, 2**63 - 1))
def test_what_is_written_is_read_back(prompt: str, negative: str, seed: int) -> None:
    made = Prompt(0, "p", prompt, seed, negative)
    assert infotext.read({"parameters": infotext.written(made)}) == (
        prompt.strip(),
        negative.strip(),
        seed,
    )


def test_images_of_a_run_tell_their_prompt(tmp_path: Path) -> None:
    prompt = Prompt(0, "p", "ein Kätzchen", 7, "dog")
    path = album.save(Sample(Image.new("RGB", (8, 8)), prompt), tmp_path, {}, "0123456789abcdef")
    with Image.open(path) as image:
        assert infotext.read(image.info) == ("ein Kätzchen", "dog", 7)
        assert image.info["parameters"].endswith(", Size: 512x512, Recipe: 0123456789abcdef")


def test_seed_of_more_digits_than_python_reads_is_none() -> None:
    told = infotext.read({"parameters": f"a cat\nSteps: 2, Seed: {'9' * 5000}, Size: 8x8"})
    assert told == ("a cat", "", None)


def test_workflow_with_many_ways_to_nowhere_is_read_at_once() -> None:
    graph: dict[str, object] = {
        str(i): {"inputs": {"one": [str(i + 1), 0], "other": [str(i + 1), 1]}} for i in range(45)
    }
    graph["s"] = {"inputs": {"positive": ["0", 0], "negative": ["0", 0], "seed": 3}}
    assert infotext.read({"prompt": json.dumps(graph)}) == ("", "", 3)
