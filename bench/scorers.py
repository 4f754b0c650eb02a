"""How long a CLIP-based scorer takes beside the bare forward of its model on the same images.

The models have the shapes of those of the hub and random weights, which take as long. One process, in
turns; median of several. `python bench/scorers.py [--rounds 5] [--images 8] [--threads 2]`
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from bayesian_merger.data import Prompt, Sample
from bayesian_merger.scorers import scorer
from bayesian_merger.towers import Preprocessing, ready

PICTURES = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SHAPES: dict[str, dict[str, Any]] = {
    "ViT-B/32": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
    },
    "ViT-L/14": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def model(folder: Path, shape: dict[str, Any]) -> Any:
    from transformers import CLIPConfig, CLIPModel

    vision = {**shape, "intermediate_size": 4 * shape["hidden_size"], "image_size": 224}
    config = CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=768)
    found = CLIPModel(config).eval()
    found.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    return found


def samples(n: int, size: int, seed: int) -> list[Sample]:
    draw = np.random.default_rng(seed)
    coarse = [draw.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(n)]
    images = [Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC) for c in coarse]
    return [Sample(image, Prompt(i, "p", "a cat", i)) for i, image in enumerate(images)]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    where = torch.cuda.get_device_name() if asked.device == "cuda" else platform.processor()
    print(f"{where or platform.machine()}, {asked.threads} threads, torch {torch.__version__}")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            bare = model(folder, shape).to(asked.device)
            weights = folder / "head.pth"
            torch.save({"weight": torch.randn(1, 768), "bias": torch.zeros(1)}, weights)
            options = {"tower": str(folder), "device": asked.device}
            judge = scorer.build("head", {**options, "weights": str(weights)})
            preprocessing = Preprocessing.read(folder)
            for size in (512, 1024):
                times: dict[str, list[float]] = {"bare": [], "scorer": []}
                for n in range(asked.rounds + 1):
                    some = samples(asked.images, size, n)
                    pixels = ready(
                        [s.image for s in some], preprocessing, torch.device(asked.device)
                    )
                    with torch.no_grad():
                        by = {
                            "bare": seconds(partial(forward, bare, pixels)),
                            "scorer": seconds(partial(judge, some)),
                        }
                    for key, spent in by.items():
                        times[key] += [spent] * (n > 0)
                one, other = (median(times[key]) / asked.images for key in ("bare", "scorer"))
                print(
                    f"{name}, {size} x {size}: bare {1e3 * one:.1f} ms, scorer {1e3 * other:.1f} ms "
                    f"an image, ratio {other / one:.3f} (median of {asked.rounds})"
                )


def forward(bare: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The bare model's image features, waited for."""
    found = bare.get_image_features(pixel_values=pixels)
    features: torch.Tensor = getattr(found, "pooler_output", found)
    return features.cpu()


if __name__ == "__main__":
    main()
