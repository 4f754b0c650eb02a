"""The report of a long run of SDXL's shape, in a browser: python bench/report.py [--out FOLDER]

Runs a search of 200 trials on two small checkpoints with SDXL's 20 blocks, whose back end paints
pictures of 1024 x 1024 and whose two scorers are made up. Prints how long the page takes to write, how
large it is, and for 1400 and 390 pixels, light and dark, how long Chromium takes to open it, what it
tells the console, by how much it is wider than the screen, and what axe-core finds (where AXE names its
axe.min.js, from `npm install axe-core`). Leaves the run and screenshots in the folder. With --run, of
that run folder's report instead.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from browser import Browser
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bayesian_merger import config, outcome, run, setup
from bayesian_merger.backends import backend
from bayesian_merger.data import Prompt, Recipe, Sample
from bayesian_merger.judging import Silence
from bayesian_merger.scorers import scorer

UNET = "model.diffusion_model"
TENSORS = {
    "base": "conditioner.embedders.1.model.ln_final.weight",
    **{f"IN{i:02}": f"{UNET}.input_blocks.{i}.0.weight" for i in range(9)},
    "M00": f"{UNET}.middle_block.0.weight",
    **{f"OUT{i:02}": f"{UNET}.output_blocks.{i}.0.weight" for i in range(9)},
}
LABEL = f"{UNET}.label_emb.0.0.weight"
CONFIG = """
plugins = [{plugin}]
[models]
a = "photographic-and-sober.safetensors"
b = "vivid-and-loose.safetensors"
[backend]
name = "clouds"
[panel]
payloads = ["payloads/*.toml"]
batch_size = 6
[search]
images = 400
init_points = 40
n_iters = 160
[scorers.brightness]
[scorers.colour]
"""
PAYLOADS = {
    "portrait": "portrait of an old fisherman, weathered face, morning light, 85mm photograph",
    "city": "a rainy street of a large city at night, neon signs, reflections on wet asphalt",
    "still_life": "still life with pears and a glass jug on a wooden table, oil painting",
    "landscape": "alpine meadow below snow-covered mountains, wide angle, golden hour, high detail",
}


@backend
class Clouds:
    """Paints clouds of 1024 x 1024 whose brightness and colour depend on the merged values."""

    batch = 4

    def check(
        self, prompts: Sequence[Prompt], architecture: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[str]:
        return []

    def load(self, recipe: Recipe, merged: Mapping[str, Tensor]) -> None:
        self._values = np.array([float(merged[name].mean()) for name in TENSORS.values()])

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        # Some blocks matter much, most little; the best is between the models, and not half way.
        matter = 0.5 ** np.arange(len(self._values))
        bright = 1 - float(matter @ np.abs(self._values - 0.7)) / 2
        colour = 1 - float(matter[::-1] @ np.abs(self._values - 0.3)) / 2
        for prompt in prompts:
            chance = np.random.default_rng(prompt.seed)
            coarse = chance.normal(0, 40, (24, 24, 3)).clip(-127, 127).astype(np.int8)
            clouds = Image.fromarray((coarse.astype(int) + 128).astype(np.uint8))
            pixels = np.asarray(clouds.resize((1024, 1024), Image.Resampling.BICUBIC), float)
            grain = chance.normal(0, 5, (1024, 1024, 1))
            level = np.array([90 * bright + 20 * colour, 90 * bright, 90 * bright - 20 * colour])
            luck = chance.normal(0, 4)
            image = (pixels - 128 + grain + level + luck).clip(0, 255).astype(np.uint8)
            yield Sample(Image.fromarray(image), prompt)

    def close(self) -> None:
        pass


def _means(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([np.asarray(s.image, float).mean((0, 1)) for s in samples])


@scorer
class Brightness:
    """The mean of an image, 0 to 25.5."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return list((_means(samples).mean(1) / 10).tolist())


@scorer
class Colour:
    """How much redder than blue an image is, -25.5 to 25.5."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        means = _means(samples)
        return list(((means[:, 0] - means[:, 2]) / 10).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench-report"))
    parser.add_argument("--run", type=Path, help="A run folder to take the report of.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.disable()
    folder = options.run or searched(options.out)
    study = outcome.open_study(folder)
    with closing(study):
        found = outcome.read_outcome(folder, study)
        start = time.monotonic()
        outcome.write_page(found, folder)
        page_s = time.monotonic() - start
        outcome.write_figures(found, folder)
        figures_s = time.monotonic() - start - page_s
        print(f"written in {page_s:.1f} s, the figures beside it in {figures_s:.1f} s")
    page = folder / "report.html"
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, {len(found.results) - 3} trials")
    for width in (1400, 390):
        for theme in ("light", "dark"):
            print(f"{width} px, {theme}: {opened(page, width, theme, options.out)}")


def searched(place: Path) -> Path:
    """The folder of a run of 200 trials, finished; what is there already is not done again."""
    for name, value in (("photographic-and-sober", 0.0), ("vivid-and-loose", 1.0)):
        tensors = {tensor: torch.full((2, 2), value) for tensor in (*TENSORS.values(), LABEL)}
        save_file(tensors, place / f"{name}.safetensors")
    (place / "payloads").mkdir(exist_ok=True)
    for name, prompt in PAYLOADS.items():
        (place / "payloads" / f"{name}.toml").write_text(
            f'prompt = "{prompt}"\nwidth = 1024\nheight = 1024\nsteps = 28\n'
        )
    path = place / "config.toml"
    path.write_text(CONFIG.format(plugin=repr(str(Path(__file__).resolve()))))
    start = time.monotonic()
    made = setup.prepare(config.load(path, []), place, "A run of two hundred trials")
    run.run(made, place / "run", Silence())
    print(f"a run of two hundred trials in {time.monotonic() - start:.0f} s")
    return place / "run"


def opened(page: Path, width: int, theme: str, out: Path) -> str:
    """What the browser tells of the page, in words."""
    with closing(
        Browser(out / f"profile-{width}-{theme}", width, 900, dark=theme == "dark")
    ) as one:
        one.goto(page.absolute().as_uri())
        one.run(
            "[...document.querySelectorAll('details')].forEach((more) => { more.open = true; })"
        )
        load_ms = one.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
        wider = one.run(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        one.shot(out / f"{width}-{theme}.png", whole=True)
        told = [f"opened in {load_ms / 1000:.2f} s", f"{wider} px wider than the screen"]
        told.append(f"console: {'; '.join(one.messages) or 'nothing'}")
        if axe := os.environ.get("AXE"):
            found = one.axe(Path(axe))
            told.append(f"axe-core: {'; '.join(found) or 'nothing'}")
    return ", ".join(told)


if __name__ == "__main__":
    main()
