from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bayesian_merger.demo import scenes
from bayesian_merger.junk import marks

SIZES = [(512, 512), (768, 512), (1024, 1024), (64, 64)]


def of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def noise(size: tuple[int, int], cell: int = 1) -> Image.Image:
    """White noise, or such of cells that are blended into each other, as a decoder does it."""
    width, height = size
    coarse = np.random.default_rng(0).integers(0, 256, (height // cell, width // cell, 3))
    return of(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colour", ["black", "white", (127, 3, 90)])
def test_one_colour_is_blank(size: tuple[int, int], colour: str | tuple[int, int, int]) -> None:
    assert marks(Image.new("RGB", size, colour)) == ["blank"]


def test_one_colour_with_the_traces_of_compression_is_blank() -> None:
    draw = np.random.default_rng(0)
    assert marks(of(np.full((64, 64, 3), 128) + draw.normal(0, 1, (64, 64, 3)))) == ["blank"]


@pytest.mark.parametrize("size", SIZES)
def test_white_noise_is_noise(size: tuple[int, int]) -> None:
    assert marks(noise(size)) == ["noise"]


@pytest.mark.parametrize("size", SIZES[:3])
def test_noise_that_a_decoder_has_smoothed_is_noise(size: tuple[int, int]) -> None:
    assert marks(noise(size, cell=8)) == ["noise"]


def test_colours_that_are_full_all_over_are_saturated() -> None:
    pixels = np.zeros((64, 64, 3))
    pixels[:40, :, 0] = 255
    pixels[40:] = (30, 80, 90)
    assert marks(of(pixels)) == ["saturated"]


def test_white_and_black_grounds_are_not_saturated() -> None:
    pixels = np.full((64, 64, 3), 255.0)
    pixels[20:40, 20:40] = (30, 80, 90)
    assert marks(of(pixels)) == []
    pixels[pixels == 255] = 0
    assert marks(of(pixels)) == []


@pytest.mark.parametrize("size", [*SIZES, (512, 768)])
def test_photograph_is_no_junk(size: tuple[int, int]) -> None:
    folder = Path(matplotlib.get_data_path()) / "sample_data"
    with Image.open(folder / "grace_hopper.jpg") as photograph:
        assert marks(photograph.convert("RGB").resize(size)) == []


def test_scenes_of_the_example_are_no_junk() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = scenes.draw(scenes.random_scenes(200, generator), generator)
    found = [marks(of(255 * picture.permute(1, 2, 0).numpy())) for picture in drawn]
    assert found == [[]] * 200


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_image_of_any_size_has_marks_or_none(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    assert set(marks(of(pixels))) <= {"blank", "saturated", "noise"}
