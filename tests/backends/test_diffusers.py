from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bayesian_merger
from bayesian_merger.backends import Key, Merge
from bayesian_merger.backends import diffusers as module
from bayesian_merger.backends.diffusers import Diffusers
from bayesian_merger.checkpoint import Checkpoint, Layout
from bayesian_merger.data import Prompt, Recipe
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.merge import Merged, Merger, even_weights
from bayesian_merger.names import COMPONENTS

DEMO = Path(bayesian_merger.__file__).parent / "demo"
CAPTIONS = [
    "a plain red circle on a white background",
    "a striped blue star on a pink background",
    "a dotted green heart on a black background",
]


def prompts(
    sampler: str = "DPM++ 2M", scheduler: str = "Automatic", steps: int = 4
) -> list[Prompt]:
    return [
        Prompt(i, "p", caption, 100 + i, "", 64, 64, steps, 3.0, sampler, scheduler)
        for i, caption in enumerate(CAPTIONS)
    ]


@pytest.fixture(scope="module")
def merger() -> Merger:
    return Merger([Checkpoint(DEMO / "crisp.safetensors"), Checkpoint(DEMO / "vivid.safetensors")])


@pytest.fixture(scope="module")
def live() -> Iterator[Diffusers]:
    back_end = Diffusers(device="cpu", batch=2, config=DEMO / "config")
    yield back_end
    back_end.close()


def even(merger: Merger, alpha: float) -> tuple[Recipe, Merged]:
    weights = even_weights("weighted_sum", merger.blocks, alpha)
    recipe = Recipe("weighted_sum", "sd1", merger.references(), weights, precision="fp32")
    return recipe, merger.merge(recipe)


def pictures(back_end: Diffusers, wanted: list[Prompt]) -> np.ndarray:
    return np.stack([np.asarray(sample.image) for sample in back_end.generate(wanted)])


@pytest.mark.parametrize("cfg_scale", [3.0, 1.0])
def test_merge_at_zero_makes_the_pictures_that_diffusers_makes_of_model_a(
    merger: Merger, live: Diffusers, cfg_scale: float
) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(DEMO / "crisp.safetensors"), config=str(DEMO / "config"), local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    wanted = [replace(prompt, cfg_scale=cfg_scale) for prompt in prompts()]
    expected = pipe(
        [p.prompt for p in wanted],
        num_inference_steps=4,
        guidance_scale=cfg_scale,
        width=64,
        height=64,
        generator=[torch.Generator().manual_seed(p.seed) for p in wanted],
        output_type="np",
    ).images
    live.load(*even(merger, 0.0))
    made = pictures(live, wanted) / 255
    # Rounding to 8 bits and other batches leave less than one step.
    assert np.abs(made - expected).max() <= 1.01 / 255


def test_pictures_repeat_exactly_and_other_weights_make_others(
    merger: Merger, live: Diffusers
) -> None:
    live.load(*even(merger, 0.0))
    first = pictures(live, prompts())
    live.load(*even(merger, 1.0))
    second = pictures(live, prompts())
    live.load(*even(merger, 0.0))
    assert (pictures(live, prompts()) == first).all()
    assert all((a != b).any() for a, b in zip(first, second, strict=True))


def test_samples_come_in_order_with_their_prompts(merger: Merger, live: Diffusers) -> None:
    live.load(*even(merger, 0.5))
    wanted = [*prompts(), *prompts(sampler="Euler")]
    assert [sample.prompt for sample in live.generate(wanted)] == wanted


def check(back_end: Diffusers, wanted: list[Prompt]) -> list[str]:
    layout = Checkpoint(DEMO / "crisp.safetensors").layout
    return back_end.check(wanted, "sd1", {name: entry.shape for name, entry in layout.items()})


class Plain(Merge):
    """Given tensors as a merge."""

    def __init__(self, merged: Mapping[str, Tensor]) -> None:
        self._merged = merged

    def __getitem__(self, name: str) -> Tensor:
        return self._merged[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)

    @property
    def layout(self) -> Mapping[str, Layout]:
        return {name: Layout(tuple(x.shape), x.dtype) for name, x in self._merged.items()}

    def write_file(self, path: Path) -> None:
        raise NotImplementedError

    def moved_by(self, name: str) -> Sequence[Key]:
        return []

    def slopes(self, name: str, gradient: Tensor) -> Mapping[Key, float]:
        return {}


class Fickle(Plain):
    """Tensors that are others each time they are read, as if the live model had not kept them."""

    reads = 0

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return super().__getitem__(name) + self.reads


def test_live_model_that_does_not_hold_the_merge_fails_the_trial(
    merger: Merger, live: Diffusers
) -> None:
    recipe, merged = even(merger, 0.5)
    with pytest.raises(TrialError, match="does not hold the merge"):
        live.load(recipe, Fickle(merged))


def test_checkpoint_without_some_tensors_fails_with_their_name(merger: Merger) -> None:
    recipe, merged = even(merger, 0.5)
    some = {n: t for n, t in merged.items() if "output_blocks.3.1" not in n}
    with pytest.raises(ConfigError, match=r"lacks .* tensors of the unet"):
        Diffusers(device="cpu", config=DEMO / "config").load(recipe, Plain(some))


def test_nan_images_fail_the_trial(merger: Merger) -> None:
    back_end = Diffusers(device="cpu", config=DEMO / "config")
    recipe, merged = even(merger, 0.5)
    broken = dict(merged) | {
        "first_stage_model.decoder.conv_out.bias": torch.full((3,), float("inf")),
    }
    back_end.load(recipe, Plain(broken))
    with pytest.raises(TrialError, match="NaN"):
        list(back_end.generate(prompts()[:1]))


def test_batch_that_is_too_large_for_the_gpu_is_halved_once(
    merger: Merger, caplog: pytest.LogCaptureFixture
) -> None:
    back_end = Diffusers(device="cpu", batch=3, config=DEMO / "config")
    back_end.load(*even(merger, 0.5))
    whole = pictures(back_end, prompts())
    most = 2
    batches: list[int] = []

    def short(unet: object, given: tuple[Tensor, ...]) -> None:
        n_images = len(given[0]) // 2  # with and without the prompt
        batches.append(n_images)
        if n_images > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    back_end._pipe.unet.register_forward_pre_hook(short)
    # In another batch an image is rounded otherwise.
    assert np.abs(pictures(back_end, prompts()).astype(int) - whole).max() <= 1
    assert batches == [3] + 4 * [2] + 4 * [1]
    batches.clear()
    pictures(back_end, prompts())
    assert batches == 4 * [2] + 4 * [1]
    assert caplog.text.count("3 images at once; from now on half as many are made") == 1
    most = 1
    with pytest.raises(TrialError, match=r"with 2 images at once; lower backend\.batch"):
        list(back_end.generate(prompts()))


def test_merge_that_overflows_in_half_precision_is_computed_in_bfloat16(
    merger: Merger, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, merged = even(merger, 0.5)
    # Beyond the range of half precision before the first norm, which takes it back.
    name = "model.diffusion_model.input_blocks.0.0.weight"
    wide = Plain({**merged, name: merged[name] * 1e5})
    exact = Diffusers(device="cpu", config=DEMO / "config")
    exact.load(recipe, wide)
    back_end = Diffusers(device="cpu", config=DEMO / "config")
    back_end._dtype = torch.float16
    back_end.load(recipe, Plain({n: t.half() for n, t in wide.items()}))
    found, expected = pictures(back_end, prompts()), pictures(exact, prompts())
    assert np.abs(found.astype(int) - expected).mean() < 4
    pictures(back_end, prompts())
    assert caplog.text.count("such images are made in bfloat16") == 1


@pytest.mark.parametrize("sampler", module._SAMPLERS)
def test_every_sampler_makes_pictures(merger: Merger, live: Diffusers, sampler: str) -> None:
    live.load(*even(merger, 0.0))
    made = pictures(live, prompts(sampler, steps=6)[:1])
    assert made.std() > 5
    if sampler != "Euler":
        assert (made != pictures(live, prompts("Euler", steps=6)[:1])).any()


@pytest.mark.parametrize("scheduler", module._SCHEDULES)
def test_every_schedule_makes_pictures(merger: Merger, live: Diffusers, scheduler: str) -> None:
    live.load(*even(merger, 0.0))
    assert pictures(live, prompts("DPM++ 2M", scheduler, steps=6)[:1]).std() > 5


def test_old_name_of_a_karras_sampler_means_the_same(merger: Merger, live: Diffusers) -> None:
    live.load(*even(merger, 0.0))
    old = pictures(live, prompts("DPM++ 2M Karras"))
    assert (old == pictures(live, prompts("DPM++ 2M", "Karras"))).all()
    assert (old != pictures(live, prompts("DPM++ 2M"))).any()


def test_scheduler_of_one_payload_does_not_leak_into_the_next(
    merger: Merger, live: Diffusers
) -> None:
    live.load(*even(merger, 0.0))
    alone = pictures(live, prompts("Euler"))
    after = pictures(live, [*prompts("DPM++ 2M", "Karras"), *prompts("Euler")])[3:]
    assert (after == alone).all()


def test_scheduler_that_a_sampler_does_not_have_is_refused(live: Diffusers) -> None:
    with pytest.raises(ConfigError, match="'Euler a' has no scheduler 'Karras'"):
        check(live, prompts("Euler a", "Karras"))


def test_unknown_sampler_is_refused_with_the_nearest(live: Diffusers) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'DPM\+\+ 2M'"):
        check(live, prompts("DPM+ 2M"))
    with pytest.raises(ConfigError, match="did you mean 'Karras'"):
        check(live, prompts(scheduler="Karas"))


def test_prompt_syntax_that_is_read_as_plain_text_is_told(live: Diffusers) -> None:
    weighted = Prompt(0, "p", "a (red:1.3) circle", 1, extra={"hr_scale": 2})
    said = check(live, [weighted])
    assert "(word:1.2)" in said[0]
    assert "hr_scale" in said[1]


def test_clip_skip_makes_other_pictures_and_1_is_the_last_layer(
    merger: Merger, live: Diffusers
) -> None:
    skipping = Diffusers(device="cpu", batch=2, clip_skip=2, config=DEMO / "config")
    for back_end in (live, skipping):
        back_end.load(*even(merger, 0.0))
    assert (pictures(skipping, prompts()) != pictures(live, prompts())).any()


def test_clip_skip_beyond_the_text_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="clip_skip: 20 is more than"):
        check(Diffusers(device="cpu", clip_skip=20, config=DEMO / "config"), prompts())


def test_checkpoint_of_another_shape_is_refused_before_it_is_loaded(live: Diffusers) -> None:
    layout = Checkpoint(DEMO / "crisp.safetensors").layout
    shapes = {name: entry.shape for name, entry in layout.items()}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = shapes | {first: (shapes[first][0], 9, *shapes[first][2:])}
    with pytest.raises(ConfigError, match="is it an inpainting model"):
        Diffusers(device="cpu", config=DEMO / "config").check(prompts(), "sd1", inpainting)
    no_vae = {n: s for n, s in shapes.items() if not n.startswith("first_stage_model.")}
    with pytest.raises(ConfigError, match=r"lacks .* tensors of the vae"):
        Diffusers(device="cpu", config=DEMO / "config").check(prompts(), "sd1", no_vae)


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path, merger: Merger) -> None:
    with pytest.raises(ConfigError, match=r"lacks .*tokenizer/tokenizer\.json"):
        check(Diffusers(device="cpu", config=tmp_path), prompts())


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "block_out_channels", "x"),
        ("unet", "down_block_types", ["Evil"]),
        ("unet", "attention_head_dim", 0),
        ("vae", "latent_channels", None),
        ("text_encoder", "hidden_size", "x"),
        ("text_encoder", "num_hidden_layers", "9"),
        ("scheduler", "num_train_timesteps", "x"),
        ("unet", "", None),
    ],
)
def test_configuration_that_cannot_be_followed_is_told_in_one_line(
    tmp_path: Path, part: str, key: str, value: object
) -> None:
    folder = changed_configuration(tmp_path, part, key, value)
    with pytest.raises(ConfigError) as caught:
        check(Diffusers(device="cpu", config=folder), prompts())
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_text_encoder_takes_no_attention_of_the_hub(tmp_path: Path, key: str) -> None:
    folder = changed_configuration(tmp_path, "text_encoder", key, "evil/kernel")
    back_end = Diffusers(device="cpu", config=folder)
    check(back_end, prompts())
    assert back_end._pipe.text_encoder.config._attn_implementation == "sdpa"


def changed_configuration(folder: Path, part: str, key: str, value: object) -> Path:
    """The demo's, with another value at a key, or with no JSON for no key."""
    shutil.copytree(DEMO / "config", folder / "config")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / "config" / part / name
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {key: value}) if key else "{nonsense")
    return folder / "config"


def test_bundled_configuration_is_that_of_sd15() -> None:
    pipe = module._pipeline(module._import_diffusers(), module._CONFIGS / "sd1", COMPONENTS["sd1"])
    sizes = [
        sum(p.numel() for p in m.parameters()) for m in (pipe.unet, pipe.vae, pipe.text_encoder)
    ]
    # Parameters of runwayml/stable-diffusion-v1-5: U-Net, VAE, CLIP ViT-L/14 text encoder.
    assert sizes == [859_520_964, 83_653_863, 123_060_480]
    assert pipe.tokenizer("a photo of a cat")["input_ids"] == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
    ]
