"""The prompt that an image file tells of: as webuis write it into a PNG, and ComfyUI."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from bayesian_merger.data import Prompt, Sample

KEY = "parameters"
"""Where a PNG has it."""
# A workflow may be as deep as somebody likes.
_MOST_NODES = 50
_LONGEST = 1 << 20


class Told(NamedTuple):
    """What an image says that it was made with, as far as it says it."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None


def written(prompt: Prompt, recipe: str = "") -> str:
    """A prompt as stable-diffusion-webui writes it, with the digest of the merge's recipe."""
    scheduler = f", Schedule type: {prompt.scheduler}" if prompt.scheduler else ""
    return (
        f"{prompt.prompt}\nNegative prompt: {prompt.negative_prompt}\nSteps: {prompt.steps}, "
        f"Sampler: {prompt.sampler_name}{scheduler}, CFG scale: {prompt.cfg_scale:g}, "
        f"Seed: {prompt.seed}, Size: {prompt.width}x{prompt.height}"
        f"{f', Recipe: {recipe}' if recipe else ''}"
    )


def png(sample: Sample, recipe: str = "") -> bytes:
    """The image as a PNG file that tells its prompt, and by which recipe it was merged."""
    from PIL.PngImagePlugin import PngInfo

    about, file = PngInfo(), io.BytesIO()
    about.add_itxt(KEY, written(sample.prompt, recipe))
    sample.image.save(file, format="PNG", pnginfo=about)
    return file.getvalue()


def read(texts: Mapping[str, Any]) -> Told:
    """The prompt among the texts of an image file; nothing where there is none that can be read."""
    parameters, graph = texts.get(KEY), texts.get("prompt")
    if isinstance(parameters, str) and len(parameters) < _LONGEST:
        return _of_webui(parameters)
    if isinstance(graph, str) and len(graph) < _LONGEST:
        return _of_comfyui(graph)
    return Told()


def _of_webui(text: str) -> Told:
    settings = re.search(r"\n(Steps: \d+, .*)$", f"\n{text}", re.DOTALL)
    prompts = f"\n{text}"[: settings.start()] if settings else text
    prompt, _, negative = prompts.partition("\nNegative prompt:")
    seed = re.search(r"\bSeed: (\d{1,20})\b", settings[1]) if settings else None
    return Told(prompt.strip(), negative.strip(), int(seed[1]) if seed else None)


def _of_comfyui(text: str) -> Told:
    """Of the first sampler in a workflow, whose conditions are followed to their texts."""
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        return Told()
    nodes = graph.values() if isinstance(graph, dict) else []
    for node in nodes:
        inputs = node.get("inputs") if isinstance(node, dict) else None
        if isinstance(inputs, dict) and {"positive", "negative"} <= inputs.keys():
            seed = inputs.get("seed", inputs.get("noise_seed"))
            return Told(
                _text(graph, inputs["positive"], set()),
                _text(graph, inputs["negative"], set()),
                seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
            )
    return Told()


def _text(graph: Mapping[str, Any], link: object, seen: set[str]) -> str:
    """The first text that a link of a workflow leads to, past the nodes that were `seen`."""
    name = str(link[0]) if isinstance(link, list) and len(link) == 2 else ""
    node = graph.get(name)
    inputs = node.get("inputs") if isinstance(node, dict) else None
    if not isinstance(inputs, dict) or name in seen or len(seen) > _MOST_NODES:
        return ""
    seen.add(name)
    for name in ("text", "text_g", "text_l", "string", "value"):
        if isinstance(inputs.get(name), str):
            return str(inputs[name])
    for other in inputs.values():
        if found := _text(graph, other, seen):
            return found
    return ""
