"""A workflow of ComfyUI that the user has made, in which a merge and a prompt take the marked places.

A node is marked by its title, or is the only one that may be meant:

    model, clip, vae      loaders, whose results of these kinds are the merge's
    positive, negative    text encoders, whose text is the prompt's
    seed                  what has a seed or noise_seed
    size                  what has a width and a height
    image                 what shows or saves the image

Only what that image needs is looked at, and sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from bayesian_merger.data import Prompt
from bayesian_merger.errors import ConfigError

Graph: TypeAlias = dict[str, dict[str, Any]]
"""A workflow as the API takes it: a node's name -> its class and inputs."""

Link: TypeAlias = list[Any]
"""A result of a node, as another's input: [node, number]."""

SHOWN = "shown"
"""The name of the node whose images are the workflow's."""

PARTS = ("MODEL", "CLIP", "VAE")
"""The kinds of results that are a model's parts."""

_LOADERS = ("model", "clip", "vae")
_SHOWING = ("PreviewImage", "SaveImage")
_SEEDS = ("seed", "noise_seed")
_SIDES = ("width", "height")
_TEXTS = ("text", "text_g", "text_l")
# The user's nodes, whose names are not to be ours.
_OWN = "own "
_MOST_BYTES = 16 * 2**20


class NodeClass(NamedTuple):
    """The kinds of a node's results ("MODEL"), and whether it runs though nobody takes these."""

    kinds: Sequence[str]
    is_end: bool = False


class Workflow:
    """The workflow in a file, as ComfyUI exports it for its API, as far as its image needs it.

    `class_of` tells what the server says of a class of nodes; None if it has no such node. `takes`
    are the parts of the merge that the image is made with.
    """

    def __init__(self, path: Path, class_of: Callable[[str], NodeClass | None]) -> None:
        """ConfigError if it is no such file, uses unknown nodes, or if a place is not marked."""
        self._where = f"backend.workflow: {path.name}"
        self.notes: list[str] = []
        graph = self._graph = self._read(path)
        self._titles = {
            name: str(meta.get("title", "")).strip().casefold()
            for name, node in graph.items()
            for meta in [node["_meta"] if isinstance(node.get("_meta"), dict) else {}]
        }
        # Other images, and what only they need, are left out.
        self._needed = list(graph)
        self._images = graph[self._required("image", self._shows)]["inputs"]["images"]
        self._needed = self._behind(self._images, ())
        classes = {name: self._class(name, class_of) for name in self._needed}
        self._loaders = self._loaders_of({name: one.kinds for name, one in classes.items()})
        self._needed = self._behind(self._images, self._loaders)
        self.takes = self._taken()
        self._seed = self._required("seed", lambda n: self._has(n, _SEEDS))
        self._positive = self._required("positive", partial(self._is_text, side="positive"))
        self._negative = self._optional(
            "negative", "negative prompt", partial(self._is_text, side="negative")
        )
        self._size = self._optional("size", "size", self._is_sized)
        if self._negative == self._positive:
            self._negative = None
            self.notes.append(
                f"{self._described(self._positive)} is both positive and negative in the workflow; it "
                f"takes the prompt, and negative prompts are not used"
            )
        self.notes += [
            f"the image needs {self._described(name)}, which may save files of its own each time"
            for name in self._needed
            if classes[name].is_end
        ]

    def of(self, parts: Sequence[Link], prompt: Prompt) -> Graph:
        """The workflow by a model, whose parts MODEL, CLIP and VAE are these results, for a prompt."""
        by_kind = dict(zip(PARTS, parts, strict=True))
        found: Graph = {}
        for name in self._needed:
            node = self._graph[name]
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
            found[_OWN + name] = {"class_type": node["class_type"], "inputs": inputs}
        # Which leaves nothing in the user's folder.
        images = self._input(self._images, by_kind)
        found[SHOWN] = {"class_type": "PreviewImage", "inputs": {"images": images}}
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

    def _class(self, name: str, class_of: Callable[[str], NodeClass | None]) -> NodeClass:
        """What the server says of the node's class; ConfigError if it has none such."""
        kind = self._graph[name]["class_type"]
        told = class_of(kind)
        if told is None:
            raise ConfigError(
                f"{self._where}: ComfyUI has no node {kind!r} (node {name}); install what it belongs "
                f"to"
            )
        return told

    def _behind(self, result: Link, without: Collection[str]) -> list[str]:
        """The nodes that a result needs, in the file's order; not `without` and what is behind these."""
        found: set[str] = set()
        todo = [result]
        while todo:
            name = todo.pop()[0]
            if name not in self._graph:
                raise ConfigError(
                    f"{self._where}: there is no node {name}, whose result is used; export the workflow "
                    f"again"
                )
            if name not in found and name not in without:
                found.add(name)
                todo += filter(_is_link, self._graph[name]["inputs"].values())
        return [name for name in self._graph if name in found]

    def _loaders_of(self, kinds: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
        """The nodes in whose place the merge comes, and the kinds of their results."""
        marked = [name for name in self._needed if self._titles[name] in _LOADERS]
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
            if not set(PARTS) & set(kinds[name]):
                raise ConfigError(
                    f"{self._where}: node {name}, titled {self._titles[name]!r}, loads no model"
                )
        return {name: kinds[name] for name in marked}

    def _taken(self) -> set[str]:
        """The parts of the merge that are needed; ConfigError for a result that it has not."""
        inputs = [v for name in self._needed for v in self._graph[name]["inputs"].values()]
        links = filter(_is_link, [*inputs, self._images])
        return {self._kind(link) for link in links if link[0] in self._loaders}

    def _kind(self, link: Link) -> str:
        """The part of the merge that is the result of a loader; ConfigError if it is none."""
        name, slot = link
        kinds = self._loaders[name]
        kind = kinds[slot] if 0 <= slot < len(kinds) else "such result"
        if kind not in PARTS:
            raise ConfigError(f"{self._where}: node {name} is the merge's, which has no {kind}")
        return kind

    def _required(self, mark: str, fits: Callable[[str], bool]) -> str:
        found = self._fitting(mark, fits)
        if not found:
            raise ConfigError(
                f"{self._where}: no node is known to be the {mark}; give that node the title {mark}"
            )
        if len(found) > 1:
            raise ConfigError(
                f"{self._where}: several nodes may be the {mark}, {self._listed(found)}; give the one "
                f"that is meant the title {mark}"
            )
        return found[0]

    def _optional(self, mark: str, what: str, fits: Callable[[str], bool]) -> str | None:
        """The node, or None and a note."""
        found = self._fitting(mark, fits)
        if len(found) == 1:
            return found[0]
        if found:
            self.notes.append(
                f"several nodes of the workflow may be the {what}, {self._listed(found)}; it stays its "
                f"own unless the one that is meant has the title {mark}"
            )
        else:
            self.notes.append(f"the workflow has no node for the {what}, which stays its own")
        return None

    def _fitting(self, mark: str, fits: Callable[[str], bool]) -> list[str]:
        """The node with the title, or those that fit; ConfigError if several have the title."""
        titled = [name for name in self._needed if self._titles[name] == mark]
        if len(titled) > 1:
            raise ConfigError(f"{self._where}: {len(titled)} nodes have the title {mark}")
        if titled:
            self._require_fitting(mark, titled[0])
            return titled
        return [name for name in self._needed if fits(name)]

    def _listed(self, names: Iterable[str]) -> str:
        return ", ".join(map(self._described, names))

    def _described(self, name: str) -> str:
        return f"node {name} ({self._graph[name]['class_type']})"

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
        if mark == "image" and not self._has_images(name):
            raise ConfigError(f"{self._where}: node {name}, titled image, shows no images")

    def _has(self, name: str, keys: Sequence[str]) -> bool:
        """Whether the node has one of these inputs, which no other node gives it."""
        return any(_is_own(self._graph[name], key) for key in keys)

    def _has_images(self, name: str) -> bool:
        return _is_link(self._graph[name]["inputs"].get("images"))

    def _shows(self, name: str) -> bool:
        """Whether it is a node of ComfyUI's own that shows or saves images."""
        return self._graph[name]["class_type"] in _SHOWING and self._has_images(name)

    def _is_sized(self, name: str) -> bool:
        return all(self._has(name, [side]) for side in _SIDES)

    def _is_text(self, name: str, side: str) -> bool:
        """Whether it is the text that some node takes as its positive or negative conditioning."""
        taken = [self._graph[other]["inputs"].get(side) for other in self._needed]
        return self._has(name, _TEXTS) and any(_is_link(one) and one[0] == name for one in taken)

    def _input(self, value: Any, by_kind: Mapping[str, Link]) -> Any:
        """An input, whose link to a loader is one to the merge."""
        if not _is_link(value):
            return value
        name, slot = value
        return by_kind[self._kind(value)] if name in self._loaders else [_OWN + name, slot]


def _is_link(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return isinstance(value[0], str) and type(value[1]) is int


def _is_own(node: Mapping[str, Any], key: str) -> bool:
    """Whether the node has an input of the name, which no other node gives it."""
    return key in node["inputs"] and not _is_link(node["inputs"][key])
