"""Image and text encoders of the CLIP and SigLIP kind: pictures or prompts -> features.

A tower is loaded once, whoever asks for it, and knows the features of a picture that it has seen, so
that several scorers of one picture cost little more than one.
"""

from __future__ import annotations

import json
import re
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bayesian_merger.errors import ConfigError, first_line, shown

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_AT_ONCE = 32
_MOST_SEEN = 1024
# As PIL numbers them, which the files of the hub do.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_OF_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures.

    They are scaled so that the shorter edge is `short`, or else the whole `size` (height, width); then
    the middle of `crop` (height, width) is cut out.
    """

    short: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resampling: str = "bicubic"

    @classmethod
    def read(cls, folder: Path) -> Preprocessing:
        """What preprocessor_config.json in the folder says; ConfigError if it cannot be followed."""
        path = folder / "preprocessor_config.json"
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if not (said.get("do_resize", True) and said.get("do_rescale", True)):
                raise ValueError("pictures are not scaled")
            plain = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
            said |= plain if not said.get("do_normalize", True) else {}
            size, crop = said.get("size", 224), said.get("crop_size")
            short = size if isinstance(size, int) else size.get("shortest_edge")
            if isinstance(size, int) and not said.get("do_center_crop"):
                short, size = None, {"height": size, "width": size}
            return cls(
                short,
                None if short else (int(size["height"]), int(size["width"])),
                _pair(crop) if said.get("do_center_crop") else None,
                _three(said.get("image_mean", (0.5, 0.5, 0.5))),
                _three(said.get("image_std", (0.5, 0.5, 0.5))),
                _RESAMPLING[said.get("resample", 3)],
            )
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such file; it says how a model wants its pictures"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path}: cannot be followed ({type(error).__name__}: {first_line(error)})"
            ) from error

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pictures (N, 3, height, width) in [0, 1] as the model wants them; gradients pass.

        Those of bytes, which must be on the CPU, are scaled as such, as PIL does it, and much faster.
        """
        is_bytes = pixels.dtype == torch.uint8
        height, width = pixels.shape[-2:]
        size = self.size
        if self.short:
            scale = self.short / min(height, width)
            size = (
                self.short if height <= width else int(height * scale),
                self.short if width <= height else int(width * scale),
            )
        if size and size != (height, width):
            pixels = interpolate(pixels, size=size, mode=self.resampling, antialias=True)
            if not is_bytes:
                pixels = pixels.clamp(0, 1)  # bicubic overshoots
        if self.crop:
            pixels = _middle(pixels, self.crop)
        if is_bytes:
            pixels = pixels / 255
        mean, std = (pixels.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (pixels - mean) / std


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return int(size), int(size)


def _three(numbers: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, numbers)
    return red, green, blue


def _middle(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(pixels.shape[-2:], size, strict=True))
    return pixels[..., top : top + size[0], left : left + size[1]]


def ready(images: Sequence[Image], preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Pictures as a model wants them (N, 3, height, width), on its device."""
    found: list[Tensor] = []
    start = 0
    while start < len(images):  # those of one size at once
        end = start + 1
        while end < len(images) and images[end].size == images[start].size:
            end += 1
        stack = np.stack([np.asarray(_in_rgb(image)) for image in images[start:end]])
        # Scaled before it is sent, it is little to send.
        found.append(preprocessing(torch.from_numpy(stack).permute(0, 3, 1, 2)).to(device))
        start = end
    return torch.cat(found)


def _in_rgb(image: Image) -> Image:
    return image if image.mode == "RGB" else image.convert("RGB")


class Tower:
    """A CLIP or SigLIP model in a folder, as `save_pretrained` writes it."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """ConfigError if the folder holds none."""
        from transformers import AutoModel

        self._folder, self._device, self._dtype = folder, device, dtype
        self._preprocessing = Preprocessing.read(folder)
        model = loaded(AutoModel, folder)
        for verb in ("get_image_features", "get_text_features"):
            if not hasattr(model, verb):
                raise ConfigError(
                    f"{folder}: {type(model).__name__} is no model of images and texts, as CLIP and "
                    f"SigLIP are"
                )
        self._model = model.to(dtype).eval().requires_grad_(False)
        # Prompts are few, and each is read once.
        self._model.vision_model.to(device)
        if hasattr(model, "visual_projection"):
            model.visual_projection.to(device)
        self._tokenizer: Any = None
        self._seen: OrderedDict[int, tuple[weakref.ref[Image], Tensor]] = OrderedDict()
        self._read: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def n_features(self) -> int:
        """How many features there are of a picture or a text: D."""
        if hasattr(self._model, "visual_projection"):
            return int(self._model.visual_projection.out_features)
        return int(self._model.config.vision_config.hidden_size)

    @property
    def scale(self) -> float:
        """By how much the cosine of picture and prompt is to be multiplied: exp(logit_scale)."""
        return float(self._model.logit_scale.exp())

    def of_images(self, images: Sequence[Image]) -> Tensor:
        """Features (N, D), float32, not normalised."""
        missing = [image for image in images if self._known(image) is None]
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            with torch.no_grad():
                features = self._encoded(ready(some, self._preprocessing, self._device))
            for image, feature in zip(some, features, strict=True):
                self._seen[id(image)] = (weakref.ref(image), feature)
        found = [self._known(image) for image in images]
        while len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return torch.stack([feature for feature in found if feature is not None])

    def _known(self, image: Image) -> Tensor | None:
        """The features of a picture that was seen: that very object, as its number may come again."""
        reference, feature = self._seen.get(id(image), (None, None))
        return feature if reference and reference() is image else None

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Features (N, D), float32, of pictures (N, 3, height, width) in [0, 1], with gradients."""
        return self._encoded(self._preprocessing(pixels.to(self._device, wide(self._dtype))))

    def _encoded(self, pixels: Tensor) -> Tensor:
        found = self._model.get_image_features(pixel_values=pixels.to(self._dtype))
        return _tensor(found).to(wide(self._dtype))

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Features (N, D) of texts, float32, not normalised; what is too long is cut."""
        for text in dict.fromkeys(texts):
            if text not in self._read:
                self._read[text] = self._encoded_text(text)
        found = torch.stack([self._read[text] for text in texts])
        while len(self._read) > _MOST_SEEN:
            self._read.popitem(last=False)
        return found

    def require_texts(self) -> None:
        """ConfigError if the model's folder has no tokenizer that tells one text from another."""
        is_there = any((self._folder / name).is_file() for name in _OF_TOKENIZERS)
        # Without its files transformers 5 makes one up that reads every word alike.
        if not is_there or torch.equal(self._ids("a cat"), self._ids("the dogs")):
            raise ConfigError(
                f"{self._folder}: the tokenizer's files are missing (tokenizer.json, or vocab.json and "
                f"merges.txt, or spiece.model); put them beside config.json"
            )

    def _ids(self, text: str) -> Tensor:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = loaded(AutoTokenizer, self._folder)
        found: Tensor = self._tokenizer(
            [text],
            padding="max_length",  # SigLIP was trained so, and CLIP does not look behind the end
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )["input_ids"]
        return found

    def _encoded_text(self, text: str) -> Tensor:
        with torch.no_grad():
            found = self._model.get_text_features(input_ids=self._ids(text))
        return _tensor(found)[0].to(self._device, wide(self._dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which features and pixels are kept: of 32 bits, or more if the model has them."""
    return torch.promote_types(dtype, torch.float32)


def _tensor(found: Any) -> Tensor:
    """Features as transformers 4 returns them, and 5 within an output."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


def loaded(kind: Any, folder: Path) -> Any:
    """A model, or a tokenizer, that transformers reads from a folder.

    The hub is not asked, and no code that lies in the folder is run. ConfigError if it cannot be read,
    or if the file lacks weights of the model, which would be random.
    """
    from transformers.utils import logging

    _require_own_attention(folder)
    is_model = hasattr(kind, "from_config")
    before, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        found = kind.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            **({"output_loading_info": True} if is_model else {}),
        )
    except Exception as error:  # transformers raises what it likes
        raise ConfigError(
            f"{folder}: transformers cannot read it ({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        logging.set_verbosity(before)
        if has_bar:
            logging.enable_progress_bar()
    if not is_model:
        return found
    model, info = found
    missing = sorted(n for n in info["missing_keys"] if not n.endswith("position_ids"))
    if missing or info.get("mismatched_keys"):
        raise ConfigError(
            f"{folder}: its weights are not those of {type(model).__name__}, which config.json "
            f"names ({len(missing)} are missing, the first {missing[:1]})"
        )
    return model


_towers: weakref.WeakValueDictionary[tuple[Path, torch.device, str], Tower] = (
    weakref.WeakValueDictionary()
)


def tower(folder: Path, device: torch.device, precision: str) -> Tower:
    """The tower in the folder; the same to all who ask while one of them holds it."""
    key = (folder.resolve(), device, precision)
    found = _towers.get(key)
    if found is None:
        found = _towers[key] = Tower(folder, device, DTYPES[precision])
    return found


def _require_own_attention(folder: Path) -> None:
    """ConfigError if config.json names an attention whose code transformers would fetch from the hub."""
    try:
        left = [json.loads((folder / "config.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError):
        return  # which transformers tells
    while left:
        found = left.pop()
        if isinstance(found, dict):
            for key, value in found.items():
                is_told = re.fullmatch(r"_?(attn|experts)_implementation(_internal)?", key)
                if is_told and value not in (None, "eager", "sdpa"):
                    raise ConfigError(
                        f"{folder}: config.json wants {key} {shown(value)}, which may be code of "
                        f"others; only eager and sdpa are taken"
                    )
                left.append(value)
        elif isinstance(found, list):
            left += found
