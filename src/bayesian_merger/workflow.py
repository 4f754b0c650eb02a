"""A workflow of ComfyUI that the user has made, in which a merge and a prompt take the marked places.

A node is marked by its title, or is the only one that may be meant:

    model, clip, vae      loaders, whose results of these kinds are the merge's
    positive, negative    text encoders, whose text is the prompt's
    seed                  what has a seed or noise_seed
    size                  what has a width and a height
    image                 what shows or saves the image
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from bayesian_merger.data import Prompt
from bayesian_merger.errors import ConfigError

Graph: TypeAlias = dict[str, dict[str, Any]]
"""A workflow as the API takes it: a node's name -> its class and inputs."""

Link: TypeAlias = list[Any]
"""A result of a node, as another's input: [node, number]."""

SHOWN = "shown"
"""The name of the node whose images are the workflow's."""

_PARTS = ("MODEL", "CLIP", "VAE")
_LOADERS = ("model", "clip", "vae")
_SHOWING = ("PreviewImage", "SaveImage")
_SEEDS = ("seed", "noise_seed")
_SIDES = ("width", "height")
_TEXTS = ("text", "text_g", "text_l")
# The user's nodes, whose names are not to be ours.
_OWN = "own "
_MOST_BYTES = 16 * 2**20


class Workflow:
    """The workflow in a file, as ComfyUI exports it for its API.

    `kinds_of` tells the kinds of a node's results ("MODEL") by the node's class; none if the server has
    no such node.
    """

    def __init__(self, path: Path, kinds_of: Callable[[str], Sequence[str] | None]) -> None:
        """ConfigError if it is no such file, uses unknown nodes, or if a place is not marked."""
        self._where = f"backend.workflow: {path.name}"
        graph = self._read(path)
        kinds: dict[str, Sequence[str]] = {}
        for name, node in graph.items():
            found = kinds_of(node["class_type"])
            if found is None:
                raise ConfigError(
                    f"{self._where}: ComfyUI has no node {node['class_type']!r} (node {name}); install "
                    f"what it belongs to"
                )
            kinds[name] = found
        self._titles = {
            name: str(meta.get("title", "")).strip().casefold()
            for name, node in graph.items()
            for meta in [node["_meta"] if isinstance(node.get("_meta"), dict) else {}]
        }
        self._graph = graph
        self._loaders = self._loaders_of(kinds)
        self._shown = self._required("image", lambda n: graph[n]["class_type"] in _SHOWING)
        self._seed = self._required("seed", lambda n: self._has(n, _SEEDS))
        self._positive = self._required("positive", partial(self._is_text, side="positive"))
        self._negative = self._found("negative", partial(self._is_text, side="negative"))
        self._size = self._found("size", lambda n: all(self._has(n, [s]) for s in _SIDES))
        missing = {"negative prompt": self._negative, "size": self._size}
        self.notes = [
            f"the workflow has no node for the {what}, which stays its own"
            for what, found in missing.items()
            if found is None
        ]

    def of(self, parts: Sequence[Link], prompt: Prompt) -> Graph:
        """The workflow by a model, whose parts MODEL, CLIP and VAE are these results, for a prompt."""
        by_kind = dict(zip(_PARTS, parts, strict=True))
        found: Graph = {}
        for name, node in self._graph.items():
            if name in self._loaders or (node["class_type"] in _SHOWING and name != self._shown):
                continue
            inputs = {key: self._input(value, by_kind) for key, value in node["inputs"].items()}
            for texts, text in (
                (self._positive, prompt.prompt),
                (self._negative, prompt.negative_prompt),
            ):
                if name == texts:
                    inputs |= {key: text for key in _TEXTS if _is_own(node, key)}
            if name == self._seed:
                inputs |= {key: prompt.seed for key in _SEEDS if _is_own(node, key)}
            if name == self._size:
                inputs |= {"width": prompt.width, "height": prompt.height}
            if name == self._shown:
                # Which leaves nothing in the user's folder.
                images = inputs["images"]
                found[SHOWN] = {"class_type": "PreviewImage", "inputs": {"images": images}}
            else:
                found[_OWN + name] = {"class_type": node["class_type"], "inputs": inputs}
        return found

    def _read(self, path: Path) -> Graph:
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise ConfigError(f"{self._where}: more than {_MOST_BYTES >> 20} MiB")
            graph = json.loads(data)
        except OSError as error:
            raise ConfigError(f"{self._where}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self._where}: no JSON") from error
        if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
            raise ConfigError(
                f"{self._where}: a file of ComfyUI's editor; take the menu's Export (API)"
            )
        nodes = graph.values() if isinstance(graph, dict) else []
        if not nodes or not all(
            isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs"), dict)
            for node in nodes
        ):
            raise ConfigError(f"{self._where}: no workflow; take the menu's Export (API)")
        assert isinstance(graph, dict)
        return graph

    def _loaders_of(self, kinds: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
        """The nodes in whose place the merge comes, and the kinds of their results."""
        marked = [name for name, title in self._titles.items() if title in _LOADERS]
        if not any(self._titles[name] == "model" for name in marked):
            marked.append(
                self._required(
                    "model",
                    lambda n: (
                        "MODEL" in kinds[n]
                        and not any(map(_is_link, self._graph[n]["inputs"].values()))
                    ),
                )
            )
        for name in marked:
            if not set(_PARTS) & set(kinds[name]):
                raise ConfigError(
                    f"{self._where}: node {name}, titled {self._titles[name]!r}, loads no model"
                )
        return {name: kinds[name] for name in marked}

    def _required(self, mark: str, fits: Callable[[str], bool]) -> str:
        found = self._found(mark, fits)
        if found is None:
            raise ConfigError(
                f"{self._where}: which node is the {mark} is not clear; give that node the title {mark}"
            )
        return found

    def _found(self, mark: str, fits: Callable[[str], bool]) -> str | None:
        """The node with the title, or the only one that fits; ConfigError if several have it."""
        titled = [name for name, title in self._titles.items() if title == mark]
        if len(titled) > 1:
            raise ConfigError(f"{self._where}: {len(titled)} nodes have the title {mark}")
        if titled:
            self._require_fitting(mark, titled[0])
            return titled[0]
        fitting = [name for name in self._graph if fits(name)]
        return fitting[0] if len(fitting) == 1 else None

    def _require_fitting(self, mark: str, name: str) -> None:
        """ConfigError if the node of that title has no place for it."""
        needed = {
            "positive": _TEXTS,
            "negative": _TEXTS,
            "seed": _SEEDS,
            "size": _SIDES,
        }.get(mark)
        if needed and not self._has(name, needed):
            raise ConfigError(
                f"{self._where}: node {name}, titled {mark}, has no {' or '.join(needed)} of its own"
            )
        if mark == "image" and not _is_link(self._graph[name]["inputs"].get("images")):
            raise ConfigError(f"{self._where}: node {name}, titled image, shows no images")

    def _has(self, name: str, keys: Sequence[str]) -> bool:
        """Whether the node has one of these inputs, which no other node gives it."""
        return any(_is_own(self._graph[name], key) for key in keys)

    def _is_text(self, name: str, side: str) -> bool:
        """Whether it is the text that some node takes as its positive or negative conditioning."""
        taken = [other["inputs"].get(side) for other in self._graph.values()]
        return self._has(name, _TEXTS) and any(_is_link(one) and one[0] == name for one in taken)

    def _input(self, value: Any, by_kind: Mapping[str, Link]) -> Any:
        """An input, whose link to a loader is one to the merge."""
        if not _is_link(value):
            return value
        name, slot = value
        kinds = self._loaders.get(name)
        if kinds is None:
            return [_OWN + name, slot]
        kind = kinds[slot] if 0 <= slot < len(kinds) else ""
        if kind not in by_kind:
            raise ConfigError(
                f"{self._where}: node {name} is the merge's, which has no {kind or 'such result'}"
            )
        return by_kind[kind]


def _is_link(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return isinstance(value[0], str) and type(value[1]) is int


def _is_own(node: Mapping[str, Any], key: str) -> bool:
    """Whether the node has an input of the name, which no other node gives it."""
    return key in node["inputs"] and not _is_link(node["inputs"][key])
