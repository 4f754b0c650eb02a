"""Scorers of taste: a small trained head on the features that a CLIP or SigLIP model has of an image.

A head is a file of linear layers. Those that people know are rows of one table; `head` takes any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from bayesian_merger import devices
from bayesian_merger.checkpoint import Checkpoint
from bayesian_merger.data import Sample
from bayesian_merger.errors import ConfigError, MergerError
from bayesian_merger.hub import (
    CLIP_B32,
    CLIP_L14,
    SIGLIP_SO400M,
    File,
    each,
    file,
    folder,
    require,
)
from bayesian_merger.scorers import About, Precision, scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

Activation = Literal["none", "relu", "gelu", "leaky_relu", "sigmoid"]


@scorer
class Head:
    """Any head of linear layers in a file, on the image features of a CLIP or SigLIP model.

    `weights` is the file, `repository` the model on the hub, or `tower` a folder with it; without
    either it is the one that the file names, as of `train-scorer`, or CLIP ViT-L/14. `activation`
    stands between the layers, `last` behind the last; of several outputs, `output` is the score.
    Features have length 1, unless `normalised` is false.
    """

    about = About("as it was trained", needs="weights, transformers, a CLIP or SigLIP model")

    def __init__(
        self,
        weights: Path,
        tower: Path | None = None,
        repository: str = "",
        activation: Activation = "none",
        last: Activation = "none",
        normalised: bool = True,
        output: int = 0,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> None:
        where = f"scorers.{type(self).__name__.lower()}"
        require(**{f"{where}.weights": weights, f"{where}.tower": tower})
        try:
            checkpoint = Checkpoint(weights)
            state = {name: checkpoint[name].float() for name in checkpoint.layout}
            layers = _layers(state, activation, last)
        except MergerError as error:
            raise ConfigError(f"{where}.weights: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{where}.weights: {weights.name}: {error}") from error
        place = devices.device(device, f"{where}.device")
        if not tower and not repository and (known := checkpoint.metadata.get("tower")):
            raise ConfigError(
                f"{where}: {weights.name} was learnt on a model in a folder called {known!r}; name that "
                f"by tower"
            )
        named = repository or checkpoint.metadata.get("repository") or CLIP_L14
        tower = tower or folder(named, f"{where}.tower")
        from bayesian_merger.towers import tower as shared

        self._tower = shared(tower, place, precision)
        if self._tower.n_features != layers.n_in:
            raise ConfigError(
                f"{where}: {weights.name} takes {layers.n_in} features, but the model in {tower} gives "
                f"{self._tower.n_features}; name the one that it was trained on by repository or tower"
            )
        if not 0 <= output < layers.n_out:
            raise ConfigError(
                f"{where}: output {output}, but the file has {layers.n_out} outputs, 0 to "
                f"{layers.n_out - 1}"
            )
        self._layers = layers.all.to(place)
        self._normalised, self._output = normalised, output

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        import torch

        if not samples:
            return []
        with torch.no_grad():
            scores = self._scores(self._tower.of_images([sample.image for sample in samples]))
        return [float(score) for score in scores]

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """One score each for `pixels` (N, 3, height, width) in [0, 1], with gradients to them."""
        return self._scores(self._tower.of_pixels(pixels))

    def _scores(self, features: Tensor) -> Tensor:
        from torch.nn.functional import normalize

        scores: Tensor = self._layers(normalize(features) if self._normalised else features)
        return scores[:, self._output]


class _Layers(NamedTuple):
    """Layers, and how many numbers they take and give."""

    all: nn.Sequential
    n_in: int
    n_out: int


def _layers(state: Mapping[str, Tensor], activation: Activation, last: Activation) -> _Layers:
    """The layers that a file holds, in the order of the numbers in their names; dropout has none.

    An activation stands behind each linear layer but the last, before its batch norm. ValueError for
    other layers, or for some that do not fit each other.
    """
    from torch import nn

    steps = {"relu": nn.ReLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid}
    places: dict[str, dict[str, Tensor]] = {}
    for name in sorted(state, key=_natural):
        place, _, kind = name.rpartition(".")
        places.setdefault(place, {})[kind] = state[name]
    found: list[nn.Module] = []
    widths: list[int] = []
    for place, tensors in places.items():
        weight = tensors.get("weight")
        layer: nn.Module
        if weight is not None and weight.ndim == 2:
            n_out, n_in = weight.shape
            layer = nn.Linear(n_in, n_out, "bias" in tensors)
        elif weight is not None and "running_mean" in tensors and found:
            n_in = n_out = len(weight)
            layer = nn.BatchNorm1d(n_in)
        else:
            raise ValueError(f"{_held(place, tensors)} are no linear layer")
        if widths and widths[-1] != n_in:
            raise ValueError(f"{place} takes {n_in} numbers, but gets {widths[-1]}")
        widths = [*widths, n_out] if widths else [n_in, n_out]
        try:
            layer.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{_held(place, tensors)} are no plain layer") from error
        if found and isinstance(found[-1], nn.Linear) and activation != "none":
            found.append(steps[activation]())
        found.append(layer)
    if not found:
        raise ValueError("it holds no layers")
    if last != "none":
        found.append(steps[last]())
    return _Layers(nn.Sequential(*found).eval().requires_grad_(False), widths[0], widths[-1])


def _held(place: str, tensors: Mapping[str, Tensor]) -> str:
    """The tensors of a layer, by their names and shapes."""
    names = (f"{place}.{kind}" if place else kind for kind in tensors)
    shapes = (tuple(tensor.shape) for tensor in tensors.values())
    return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))


def _natural(name: str) -> list[tuple[int, str]]:
    """For a sorting by the numbers in names: layers.10 after layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Row:
    """A head that people know: its file, and what a file of tensors does not tell."""

    name: str
    about: str
    file: File
    range: str
    licence: str
    repository: str = CLIP_L14
    activation: Activation = "none"
    last: Activation = "none"


def _of_github(place: str, sha256: str) -> File:
    return File(f"https://raw.githubusercontent.com/{place}", sha256)


_LAION = "LAION-AI/aesthetic-predictor/6d122adad522ab246644d9dc1c6d7a3810ee255f"
_IMPROVED = (
    "christophschuhmann/improved-aesthetic-predictor/6934dd81792f086e613a121dbce43082cb8be85e"
)
_CHAD = "grexzen/SD-Chad/5e4e513be1d980a49cc4b7d244d97c18ca733fb7"
_AUTO = "Xerxemi/sdweb-auto-MBW/67bde8acfbcf84d37b5e232f327400ebf1f1c0ab/scripts/classifiers"

# Layers and activations are those of the repositories' own code, which names the model as well.
ROWS = (
    Row(
        "laion_v1",
        "LAION's first predictor of what people rate as aesthetic: one linear layer.",
        _of_github(
            f"{_LAION}/sa_0_4_vit_l_14_linear.pth",
            "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        ),
        "about 1 to 10",
        "MIT",
    ),
    Row(
        "chad",
        "LAION's second predictor, sac+logos+ava1-l14-linearMSE.pth: `chad` of "
        "sd-webui-bayesian-merger, and its default.",
        _of_github(
            f"{_IMPROVED}/sac%2Blogos%2Bava1-l14-linearMSE.pth",
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        ),
        "about 1 to 10, mostly 4.5 to 7",
        "Apache-2.0",
    ),
    Row(
        "laion",
        "`laion` of sd-webui-bayesian-merger, laion-sac-logos-ava-v2.safetensors: the very tensors of "
        "`chad`.",
        _of_github(
            f"{_AUTO}/laion/laion-sac-logos-ava-v2.safetensors",
            "dc122ae2a2c3963e80183128c4f5b368b8306b9b831860785db43739f818ae04",
        ),
        "about 1 to 10, mostly 4.5 to 7",
        "Apache-2.0",
    ),
    Row(
        "ava_logos",
        "ava+logos-l14-linearMSE.pth, LAION's second predictor without the ratings of SAC: `chad` of "
        "the last versions of sd-webui-bayesian-merger.",
        _of_github(
            f"{_IMPROVED}/ava%2Blogos-l14-linearMSE.pth",
            "390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff",
        ),
        "about 1 to 10",
        "Apache-2.0",
    ),
    Row(
        "ava_logos_relu",
        "ava+logos-l14-reluMSE.pth, as `ava_logos`, but with activations between its layers.",
        _of_github(
            f"{_IMPROVED}/ava%2Blogos-l14-reluMSE.pth",
            "0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4",
        ),
        "about 1 to 10",
        "Apache-2.0",
        activation="relu",
    ),
    Row(
        "chadscorer",
        "chadscorer.pth of SD-Chad, LAION's second predictor trained further on images of Stable "
        "Diffusion; not `chad` of sd-webui-bayesian-merger.",
        _of_github(
            f"{_CHAD}/chadscorer.pth",
            "ba265592f419d88ad66216257d54c57eae08ae2fde0b8be167bbe7ddc09206bd",
        ),
        "about 1 to 10",
        "Apache-2.0",
    ),
    Row(
        "aes",
        "aes-B32-v0 of Waifu Diffusion: how aesthetic an anime picture is.",
        _of_github(
            f"{_AUTO}/aesthetic/aes-B32-v0.safetensors",
            "dda8c653a305cc8fcb1bb9614065dfec05c071fc4b757a26ebbb73ca9145c32f",
        ),
        "0 to 1",
        "CreativeML OpenRAIL-M",
        repository=CLIP_B32,
        activation="relu",
        last="sigmoid",
    ),
    Row(
        "waifu_v3",
        "Waifu scorer v3: how good an anime picture is. Not cut at 0 and 10, as there.",
        File(
            "https://huggingface.co/Eugeoter/waifu-scorer-v3/resolve/"
            "c2a747fd61d310a90e9cbbf8fc590c522f234424/model.safetensors",
            "7def1b66314e318d9b045ff225fd51bb83bfbca855b12b2e213a5483efe37efd",
            "waifu-scorer-v3.safetensors",
        ),
        "about 0 to 10",
        "OpenRAIL",
        activation="relu",
    ),
    Row(
        "aesthetic_v2_5",
        "Aesthetic predictor v2.5 on SigLIP, which knows illustrations better than LAION's; its author "
        "calls 5.5 and more great.",
        _of_github(
            "discus0434/aesthetic-predictor-v2-5/c0e15567fa61252cbff43d70c49a8bd27202ca9a/models/"
            "aesthetic_predictor_v2_5.pth",
            "a6caf256b3dc434273c98dcb12f6bf17c5d4fc647d8df11f038386923dd06220",
        ),
        "about 1 to 10",
        "AGPL-3.0",
        repository=SIGLIP_SO400M,
    ),
)


def _scorer_of(row: Row) -> type[Head]:
    """The class of one row, whose options are where the files are."""

    def constructor(
        self: Head,
        weights: Path | None = None,
        tower: Path | None = None,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> None:
        where = f"scorers.{row.name}"
        require(**{f"{where}.weights": weights, f"{where}.tower": tower})
        devices.device(device, f"{where}.device")
        place, path = each(
            lambda: tower or folder(row.repository, f"{where}.tower"),
            lambda: weights or file(row.file, f"{where}.weights"),
        )
        Head.__init__(
            self,
            path,
            place,
            activation=row.activation,
            last=row.last,
            device=device,
            precision=precision,
        )

    needs = f"transformers, {row.file.name}, {row.repository.partition('@')[0]}"
    return type(
        row.name,
        (Head,),
        {
            "__init__": constructor,
            "__doc__": row.about,
            "about": About(row.range, "image", row.licence, needs),
        },
    )


for _row in ROWS:
    scorer(_scorer_of(_row))
