"""Images of SDXL, by a miniature of it with both text encoders and all of its blocks.

diffusers writes the models' folders and makes the images that ours are compared with.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_names import known_layout
from torch import Tensor

from bayesian_merger.backends import Key
from bayesian_merger.backends import diffusers as module
from bayesian_merger.backends.diffusers import Diffusers
from bayesian_merger.data import Prompt, Recipe
from bayesian_merger.errors import ConfigError
from bayesian_merger.folders import Folder
from bayesian_merger.merge import Merged, Merger, even_weights
from bayesian_merger.names import COMPONENTS

BUNDLED = module._CONFIGS / "sdxl"
SMALLER: Mapping[str, Mapping[str, object]] = {
    "unet": {
        "block_out_channels": [8, 16, 16],
        "attention_head_dim": [1, 2, 2],
        "norm_num_groups": 4,
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 40,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4},
    "text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    },
    "text_encoder_2": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "projection_dim": 24,
    },
}
N_STEPS = 3
STEP = 1e-6
CLIP_L, CLIP_G, FIRST, MIDDLE = (("alpha", block) for block in ("base", "TE2", "IN00", "M00"))
SOME = {CLIP_L, CLIP_G, FIRST, MIDDLE}


def pipeline(config: Path, seed: int) -> Any:
    """diffusers' pipeline with random numbers that make pictures, but none that mean something."""
    pipe = module._pipeline(module._import_diffusers(), config, COMPONENTS["sdxl"])
    chance = torch.Generator().manual_seed(seed)
    for part in COMPONENTS["sdxl"]:
        network = getattr(pipe, part.name).to_empty(device="cpu")
        for name, tensor in network.state_dict().items():
            is_scale = "norm" in name and name.endswith("weight")
            size = 0.1 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            tensor.copy_(is_scale + size * torch.randn(tensor.shape, generator=chance))
        for name, buffer in network.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of small networks, which diffusers has saved."""
    config = tmp_path_factory.mktemp("config")
    for path in BUNDLED.rglob("*.json"):
        target = config / path.relative_to(BUNDLED)
        target.parent.mkdir(exist_ok=True)
        told = json.loads(path.read_text()) | SMALLER.get(path.parent.name, {})
        target.write_text(json.dumps(told))
    found = []
    for seed, name in enumerate(("a", "b")):
        found.append(tmp_path_factory.mktemp(name))
        pipeline(config, seed).save_pretrained(found[-1])
    return found


@pytest.fixture(scope="module")
def merger(folders: list[Path]) -> Merger:
    return Merger([Folder(folder) for folder in folders])


@pytest.fixture
def live(folders: list[Path]) -> Iterator[Diffusers]:
    back_end = Diffusers(device="cpu", batch=4, config=folders[0])
    yield back_end
    back_end.close()


def merge(merger: Merger, alpha: float, changes: Mapping[str, float]) -> tuple[Recipe, Merged]:
    blocks = {**even_weights("weighted_sum", merger.blocks, alpha)["alpha"], **changes}
    recipe = Recipe(
        "weighted_sum", "sdxl", merger.references(), {"alpha": blocks}, precision="fp32"
    )
    return recipe, merger.merge(recipe)


def prompts(negative: str = "", sampler: str = "DDIM") -> list[Prompt]:
    texts = ["a plain red circle on a white background", "a dotted blue star"]
    return [
        Prompt(i, "p", text, 100 + i, negative, 64, 96, N_STEPS, 3.0, sampler)
        for i, text in enumerate(texts)
    ]


def pictures(back_end: Diffusers, wanted: list[Prompt]) -> np.ndarray:
    return np.stack([np.asarray(sample.image) for sample in back_end.generate(wanted)]) / 255


@pytest.mark.parametrize("negative", ["", "blurry"])
@pytest.mark.parametrize("seed", [0, 1])
def test_pictures_are_those_that_diffusers_makes(
    folders: list[Path], merger: Merger, live: Diffusers, seed: int, negative: str
) -> None:
    pipe = pipeline(folders[0], seed)
    pipe.vae = pipeline(folders[0], 0).vae  # A merge keeps that of A.
    pipe.scheduler = module._import_diffusers().EulerDiscreteScheduler.from_config(
        pipe.scheduler.config
    )
    wanted = prompts(negative, "Euler")
    expected = pipe(
        [p.prompt for p in wanted],
        negative_prompt=[p.negative_prompt for p in wanted] if negative else None,
        num_inference_steps=N_STEPS,
        guidance_scale=3.0,
        width=64,
        height=96,
        generator=[torch.Generator().manual_seed(p.seed) for p in wanted],
        output_type="np",
    ).images
    assert expected.std() > 0.05
    live.load(*merge(merger, float(seed), {}))
    assert np.abs(pictures(live, wanted) - expected).max() <= 1.01 / 255


def test_each_text_encoder_changes_the_pictures(merger: Merger, live: Diffusers) -> None:
    made = []
    for changes in ({}, {"base": 1.0, "TE2": 0.0}, {"TE2": 1.0}):
        live.load(*merge(merger, 0.0, changes))
        made.append(pictures(live, prompts()))
    assert (made[0] != made[1]).any()
    assert (made[0] != made[2]).any()


def test_clip_skip_counts_from_the_layer_before_the_last(
    folders: list[Path], merger: Merger, live: Diffusers
) -> None:
    live.load(*merge(merger, 0.0, {}))
    expected = pictures(live, prompts())
    for clip_skip, is_same in ((2, True), (3, False)):
        other = Diffusers(device="cpu", batch=4, clip_skip=clip_skip, config=folders[0])
        other.load(*merge(merger, 0.0, {}))
        assert (pictures(other, prompts()) == expected).all() == is_same


def shapes_with(*markers: str) -> dict[str, tuple[int, ...]]:
    """Those of a whole SDXL, with these markers alone of all that its files may have."""
    whole = known_layout("sdxl-sgm")
    return {n: shape for n, shape in whole.items() if "." in n and not n.startswith("edm_")} | (
        dict.fromkeys(markers, ())
    )


@pytest.mark.parametrize(
    ("markers", "prediction", "found"),
    [
        ((), "auto", ("epsilon", False, "linspace")),
        (("v_pred",), "auto", ("v_prediction", False, "linspace")),
        (("v_pred", "ztsnr"), "auto", ("v_prediction", True, "trailing")),
        ((), "v", ("v_prediction", False, "linspace")),
        (("v_pred", "ztsnr"), "epsilon", ("epsilon", False, "linspace")),
    ],
)
def test_noise_schedule_is_that_of_what_the_models_predict(
    markers: tuple[str, ...], prediction: str, found: tuple[str, bool, str]
) -> None:
    back_end = Diffusers(device="cpu", prediction=prediction)
    wanted = prompts(sampler="Euler")
    back_end.check(wanted, "sdxl", shapes_with(*markers))
    scheduler = back_end._scheduler(wanted[0])
    told = scheduler.config
    assert (told.prediction_type, told.rescale_betas_zero_snr, told.timestep_spacing) == found
    # Nearly pure noise, or as much of it as SDXL has been trained on.
    assert (float(scheduler.sigmas[0]) > 1000) == found[1]


def test_prediction_holds_for_a_folder_that_says_nothing_of_it(
    folders: list[Path], merger: Merger, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    shutil.copytree(folders[0], config)
    path = config / "scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text())
    del told["prediction_type"]
    path.write_text(json.dumps(told))
    shapes = {name: entry.shape for name, entry in merger.models[0].layout.items()}
    back_end = Diffusers(device="cpu", prediction="v", config=config)
    back_end.check(prompts(), "sdxl", shapes)
    assert back_end._scheduler(prompts()[0]).config.prediction_type == "v_prediction"


def test_files_that_a_script_of_diffusers_has_written_are_read() -> None:
    shapes = shapes_with()
    usual = "conditioner.embedders.1.model.text_projection"
    shapes[f"{usual}.weight"] = shapes.pop(usual)
    back_end = Diffusers(device="cpu")
    back_end.check(prompts(), "sdxl", shapes)
    target = back_end._tables["text_encoder_2"]["text_projection.weight"]
    assert (target.tensor, target.form) == (f"{usual}.weight", "same")


def test_models_whose_images_would_be_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match="'edm_mean', so their noise schedule is that of EDM"):
        Diffusers(device="cpu").check(prompts(), "sdxl", shapes_with("edm_mean", "edm_std"))
    with pytest.raises(ConfigError, match=r"sampler 'Heun' .*ztsnr"):
        Diffusers(device="cpu").check(
            prompts(sampler="Heun"), "sdxl", shapes_with("v_pred", "ztsnr")
        )
    with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
        Diffusers(device="cpu", prediction="epsilo")


@pytest.mark.parametrize("unusual", [False, True])
def test_every_sampler_ends_on_every_schedule(
    merger: Merger, live: Diffusers, unusual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.load(*merge(merger, 0.0, {}))
    if unusual:
        live._unusual = live._predicted(["v_pred", "ztsnr"])
    monkeypatch.setattr(live, "_noise", lambda latents, time, texts: 0.1 * latents)
    ended = Counter[str]()
    for sampler, scheduler, steps in product(module._SAMPLERS, module._SCHEDULES, (4, 30)):
        some = [
            replace(p, sampler_name=sampler, scheduler=scheduler, steps=steps) for p in prompts()
        ]
        try:
            live._scheduler_class(some[0])
        except ConfigError:
            continue
        with torch.no_grad():
            assert torch.isfinite(live._denoised(some, 0)).all(), (sampler, scheduler, steps)
        ended[sampler] += 1
    assert unusual or ended.keys() == set(module._SAMPLERS)


def test_half_precision_makes_the_same_pictures_and_slopes(
    merger: Merger, live: Diffusers
) -> None:
    wanted = [replace(p, negative_prompt="blurry" if p.index else "") for p in prompts()]
    found = {}
    for dtype in (torch.float32, torch.float16):
        live.close()
        live._dtype = dtype
        live.load(*merge(merger, 1.0, {"TE2": 1.0}))
        live.load(*merge(merger, 0.5, {"TE2": 0.25}))  # only what changes is written
        made = live.follow(wanted, lambda pixels, _: mean_score(pixels), SOME, None)
        found[dtype] = pictures(live, wanted), [one.slopes for one in made]
    whole, half = found.values()
    assert np.abs(whole[0] - half[0]).mean() < 0.01
    for one, other in zip(whole[1], half[1], strict=True):
        size = np.linalg.norm(list(one.values()))
        assert np.linalg.norm([other[key] - one[key] for key in SOME]) < 0.1 * size


def mean_score(pixels: Tensor) -> Tensor:
    """Of each image: smooth, and different for every pixel."""
    wave = torch.linspace(0, 7, pixels[0].numel(), dtype=pixels.dtype).reshape(pixels[0].shape)
    return (torch.sin(3 * pixels) * torch.cos(wave)).sum((1, 2, 3))


@pytest.mark.parametrize("remakes", [False, True])
def test_slopes_through_both_text_encoders_are_the_derivatives(
    merger: Merger, live: Diffusers, remakes: bool
) -> None:
    live._dtype = torch.float64
    live._makes_calls_again = remakes
    live.load(*merge(merger, 0.5, {"TE2": 0.5}))
    if remakes:
        live._make_parts_again()
    slopes: dict[Key, float] = {}
    for one in live.follow(prompts("blurry"), lambda pixels, _: mean_score(pixels), SOME, None):
        for key, slope in one.slopes.items():
            slopes[key] = slopes.get(key, 0.0) + slope
    models = [Folder(model.path) for model in merger.models]
    for key in SOME:
        names = [
            name
            for name, place in merger.places.items()
            if key[1] in (place.part, place.block)
            and not (key == CLIP_L and place.part == "TE2")
            and place.component != "vae"
            and name in live._live
        ]
        ends = []
        for alpha in (0.5 - STEP, 0.5 + STEP, 0.5):
            for name in names:
                a, b = (model[name].double() for model in models)
                live._live[name].copy_(torch.lerp(a, b, alpha).reshape(live._live[name].shape))
            with torch.no_grad():
                pixels = live._pixels(prompts("blurry"), 0)
                ends.append(float(mean_score((pixels / 2 + 0.5).clamp(0, 1)).sum()))
        assert slopes[key] == pytest.approx((ends[1] - ends[0]) / (2 * STEP), rel=1e-4), key


def test_small_pictures_are_told(merger: Merger, live: Diffusers) -> None:
    shapes = {name: entry.shape for name, entry in merger.models[0].layout.items()}
    (said,) = live.check(prompts(), "sdxl", shapes)
    assert "poor images of 64 x 96 and the like (payloads: p)" in said
    large = [replace(prompt, width=1024, height=832) for prompt in prompts()]
    assert live.check(large, "sdxl", shapes) == []


def test_bundled_configuration_is_that_of_sdxl() -> None:
    pipe = module._pipeline(module._import_diffusers(), BUNDLED, COMPONENTS["sdxl"])
    # Parameters of stabilityai/stable-diffusion-xl-base-1.0.
    assert {
        part.name: sum(p.numel() for p in getattr(pipe, part.name).parameters())
        for part in COMPONENTS["sdxl"]
    } == {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    }
    padded = [
        tokenizer("a cat", padding="max_length")["input_ids"][-1]
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    ]
    assert padded == [49407, 0]
