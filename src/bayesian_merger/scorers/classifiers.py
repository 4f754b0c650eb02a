"""Scorers that are classifiers of pictures: the probability of the label that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesian_merger import devices
from bayesian_merger.data import Sample
from bayesian_merger.errors import ConfigError
from bayesian_merger.hub import folder, require
from bayesian_merger.registry import nearest
from bayesian_merger.scorers import About, Precision, scorer

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 16


@scorer
class Classifier:
    """The probability, in [0, 1], that a model for image classification gives to one `label`.

    `repository` is the model on the hub ("owner/name@revision"), or `model` a folder with it. A model
    whose labels do not exclude each other gives each its own probability.
    """

    about = About("0 to 1", needs="transformers, a model for image classification")

    def __init__(
        self,
        label: str,
        repository: str = "",
        model: Path | None = None,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> None:
        where = f"scorers.{type(self).__name__.lower()}"
        require(**{f"{where}.model": model})
        self._place = devices.device(device, f"{where}.device")
        if model is None:
            if not repository:
                raise ConfigError(f"{where}: name a repository of the hub, or a folder as model")
            model = folder(repository, f"{where}.model")
        from transformers import AutoModelForImageClassification

        from bayesian_merger.towers import DTYPES, Preprocessing, loaded

        self._preprocessing = Preprocessing.read(model)
        network: Any = loaded(AutoModelForImageClassification, model)
        labels = {str(name): int(i) for i, name in network.config.id2label.items()}
        if label not in labels:
            known = ", ".join(list(labels)[:10])
            raise ConfigError(
                f"{where}.label: the model in {model} has no label {label!r}"
                f"{nearest(label, labels)} (known: {known})"
            )
        self._label = labels[label]
        is_multi = network.config.problem_type == "multi_label_classification"
        self._is_single = len(labels) == 1 or is_multi
        self._dtype = DTYPES[precision]
        self._network = network.to(self._place, self._dtype).eval().requires_grad_(False)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        import torch

        from bayesian_merger.towers import ready

        scores: list[float] = []
        for start in range(0, len(samples), _AT_ONCE):
            images = [sample.image for sample in samples[start : start + _AT_ONCE]]
            with torch.no_grad():
                scores += self._scores(ready(images, self._preprocessing, self._place)).tolist()
        return scores

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """One score each for `pixels` (N, 3, height, width) in [0, 1], with gradients to them."""
        from bayesian_merger.towers import wide

        return self._scores(self._preprocessing(pixels.to(self._place, wide(self._dtype))))

    def _scores(self, pixels: Tensor) -> Tensor:
        from bayesian_merger.towers import wide

        found: Tensor = self._network(pixel_values=pixels.to(self._dtype)).logits
        logits = found.to(wide(self._dtype))
        chances = logits.sigmoid() if self._is_single else logits.softmax(1)
        return chances[:, self._label]


@dataclass(frozen=True)
class Row:
    """A classifier that people know, and which of its labels is wanted."""

    name: str
    about: str
    repository: str
    label: str
    licence: str


_CAFE = "AGPL-3.0"
# The name of the wanted label, as files of the hub differ in the order of labels.
ROWS = (
    Row(
        "cafe_aesthetic",
        "Whether a picture is aesthetic, mostly for anime: of sd-webui-bayesian-merger, which took the "
        "probability of the likelier label though.",
        "cafeai/cafe_aesthetic@3bca27c5c0b6021056b1e84e5a18cf1db9fe5d4c",
        "aesthetic",
        _CAFE,
    ),
    Row(
        "cafe_style",
        "Whether a picture is of a style: anime, or by `label` real_life, 3d, manga_like, other.",
        "cafeai/cafe_style@d5ae1a7ac05a12ab84732c25f2ea7225d35ac81b",
        "anime",
        _CAFE,
    ),
    Row(
        "cafe_waifu",
        "Whether a picture shows a waifu. Its repository is not pinned: name a revision, or a folder.",
        "cafeai/cafe_waifu",
        "waifu",
        _CAFE,
    ),
    Row(
        "aesthetic_shadow_v2",
        "How good an anime picture is. Its author has withdrawn it: name a copy, or a folder.",
        "shadowlilac/aesthetic-shadow-v2",
        "hq",
        "CC-BY-NC-4.0",
    ),
    Row(
        "imclasif_quality",
        "Whether the quality of a picture is good.",
        "sanali209/imclasif-quality-v001@fe08effe5145e04dfe54b6a27f5054cb780bb49a",
        "good",
        "",
    ),
)


def _scorer_of(row: Row) -> type[Classifier]:
    """The class of one row, whose options are the label and where the files are."""

    def constructor(
        self: Classifier,
        label: str = row.label,
        repository: str = row.repository,
        model: Path | None = None,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> None:
        Classifier.__init__(self, label, repository, model, device, precision)

    needs = f"transformers, {row.repository.partition('@')[0]}"
    return type(
        row.name,
        (Classifier,),
        {
            "__init__": constructor,
            "__doc__": row.about,
            "about": About("0 to 1", "image", row.licence, needs),
        },
    )


for _row in ROWS:
    scorer(_scorer_of(_row))
