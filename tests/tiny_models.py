"""Small models with random weights, saved as those of the hub are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bayesian_merger

TOKENIZER = Path(bayesian_merger.__file__).parent / "backends/configs/sd1/tokenizer"
CLIP_PICTURES = {
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
SIGLIP_PICTURES = {
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}

_SECOND: dict[str, tuple[int, ...]] = {
    "layers.0": (1024, 768),
    "layers.2": (128, 1024),
    "layers.4": (64, 128),
    "layers.6": (16, 64),
    "layers.7": (1, 16),
}
# The layers of the heads that people know, as their files have them.
HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    "laion_v1": {"": (1, 768)},
    "chad": _SECOND,
    "laion": _SECOND,
    "ava_logos": _SECOND,
    "chadscorer": _SECOND,
    "ava_logos_relu": {
        "layers.0": (1024, 768),
        "layers.3": (128, 1024),
        "layers.6": (64, 128),
        "layers.9": (16, 64),
        "layers.11": (1, 16),
    },
    "waifu_v3": {
        "layers.0": (2048, 768),
        "layers.2": (2048,),
        "layers.4": (512, 2048),
        "layers.6": (512,),
        "layers.8": (256, 512),
        "layers.10": (256,),
        "layers.12": (128, 256),
        "layers.14": (128,),
        "layers.16": (32, 128),
        "layers.18": (1, 32),
    },
    "aesthetic_v2_5": {
        "scoring_head.0": (1024, 1152),
        "scoring_head.2": (128, 1024),
        "scoring_head.4": (64, 128),
        "scoring_head.6": (16, 64),
        "scoring_head.8": (1, 16),
    },
    "aes": {"fc1": (256, 512), "fc2": (128, 256), "fc3": (1, 128)},
}


def _encoder(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **more,
    }


def clip(folder: Path, n_features: int = 24, seed: int = 0) -> Path:
    """A CLIP model with the real tokenizer; with `n_features` of images and of texts."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config=_encoder(vocab_size=49408, max_position_embeddings=77),
        vision_config=_encoder(image_size=32, patch_size=8),
        projection_dim=n_features,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return _with_pictures(folder, CLIP_PICTURES)


def siglip(folder: Path) -> Path:
    """A SigLIP model without a tokenizer; its features have 32 numbers."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    config = SiglipConfig(
        text_config=_encoder(vocab_size=100, max_position_embeddings=16),
        vision_config=_encoder(image_size=32, patch_size=8),
    )
    SiglipModel(config).save_pretrained(folder)
    return _with_pictures(folder, SIGLIP_PICTURES)


def classifier(folder: Path, labels: tuple[str, ...] = ("aesthetic", "not_aesthetic")) -> Path:
    """A BEiT classifier with these labels."""
    from transformers import BeitConfig, BeitForImageClassification

    torch.manual_seed(0)
    config = BeitConfig(
        **_encoder(image_size=32, patch_size=8),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    BeitForImageClassification(config).save_pretrained(folder)
    return _with_pictures(folder, SIGLIP_PICTURES)


def n_features(name: str) -> int:
    """How many features a head takes."""
    return next(iter(HEADS[name].values()))[-1]


def head_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A file of random layers as torch.save writes it, one number being a batch norm; its arrays."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for place, shape in shapes.items():
        prefix = f"{place}." if place else ""
        scale = shape[-1] ** 0.5 if len(shape) > 1 else 1.0
        state[f"{prefix}weight"] = torch.randn(shape, generator=generator) / scale
        state[f"{prefix}bias"] = torch.randn(shape[0], generator=generator)
        if len(shape) == 1:
            state[f"{prefix}running_mean"] = torch.randn(shape, generator=generator)
            state[f"{prefix}running_var"] = torch.rand(shape, generator=generator) + 0.5
            state[f"{prefix}num_batches_tracked"] = torch.tensor(9)
    torch.save(state, path)
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def _with_pictures(folder: Path, said: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder
