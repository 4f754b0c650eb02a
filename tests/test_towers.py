from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bayesian_merger.errors import ConfigError
from bayesian_merger.towers import Preprocessing, Tower, ready, tower

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.siglip(tmp_path_factory.mktemp("siglip"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 101), (32, 32), (20, 50)])
@pytest.mark.parametrize("said", [tiny_models.CLIP_PICTURES, tiny_models.SIGLIP_PICTURES])
def test_pictures_are_prepared_as_transformers_does_it(
    size: tuple[int, int], said: dict[str, object], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    # The one of transformers that needs no torchvision, by its name in version 5 and in 4.
    kinds = ("CLIPImageProcessorPil", "CLIPImageProcessor")
    kind = next(k for k in (getattr(transformers, name, None) for name in kinds) if k)
    theirs = kind(**{"do_center_crop": False, **said})(picture(*size), return_tensors="pt")
    ours = ready([picture(*size)], Preprocessing.read(tmp_path), CPU)
    assert ours.shape == theirs["pixel_values"].shape
    # The rounding of bytes, which the division by the deviation quadruples.
    assert float((ours - theirs["pixel_values"]).abs().max()) < 2.01 / 255 / 0.26


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("{", "JSON"),
        ('{"size": {}}', "KeyError"),
        ('{"resample": 9}', "KeyError"),
        ('{"do_resize": false}', "pictures are not scaled"),
        ("[]", "list"),
    ],
)
def test_preprocessing_that_cannot_be_followed_is_one_line(
    said: str, fault: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(said)
    with pytest.raises(
        ConfigError, match=f"preprocessor_config.json: cannot be followed .*{fault}"
    ):
        Preprocessing.read(tmp_path)


def test_pictures_may_be_left_without_normalisation(tmp_path: Path) -> None:
    said = {**tiny_models.SIGLIP_PICTURES, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    found = ready([Image.new("RGB", (64, 64), (0, 51, 255))], Preprocessing.read(tmp_path), CPU)
    assert found[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_features_are_those_of_the_bare_model(clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    bare = CLIPModel.from_pretrained(clip)
    images = [picture(48, 64), picture(64, 64, 1)]
    pixels = ready(images, Preprocessing.read(clip), CPU)
    words = CLIPTokenizer.from_pretrained(clip)(["a red circle"], return_tensors="pt")
    with torch.no_grad():
        output = bare(pixel_values=pixels, **words)
    own = Tower(clip, CPU, torch.float32)
    features, texts = own.of_images(images), own.of_texts(["a red circle"])
    normalised = features / features.norm(dim=1, keepdim=True)
    assert torch.allclose(normalised, output.image_embeds, atol=1e-5)
    assert torch.allclose(texts / texts.norm(), output.text_embeds, atol=1e-5)
    assert own.n_features == 24
    assert own.scale == pytest.approx(float(bare.logit_scale.detach().exp()))


def test_siglip_has_features_too(siglip: Path) -> None:
    own = Tower(siglip, CPU, torch.float32)
    assert own.of_images([picture(40, 30)]).shape == (1, own.n_features) == (1, 32)


def test_features_of_pixels_are_those_of_images_and_have_gradients(clip: Path) -> None:
    own = Tower(clip, CPU, torch.float32)
    image = picture(64, 48)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    pixels.requires_grad_()
    features = own.of_pixels(pixels)
    assert torch.allclose(features, own.of_images([image]), atol=1e-2)  # rounded to bytes
    features.sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0


def test_picture_is_encoded_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Tower(clip, CPU, torch.float32)
    encoded: list[int] = []
    real = own._encoded

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return real(pixels)

    monkeypatch.setattr(own, "_encoded", counted)
    images = [picture(32, 32, seed) for seed in range(3)]
    first = own.of_images(images)
    again = own.of_images([images[1], picture(32, 32, 9), images[0]])
    assert encoded == [3, 1]
    assert torch.equal(again[[2, 0]], first[:2])


def test_another_picture_in_the_place_of_one_that_is_gone_is_encoded(clip: Path) -> None:
    own = Tower(clip, CPU, torch.float32)
    expected = {seed: own.of_images([picture(32, 32, seed)])[0] for seed in range(20)}
    gc.collect()
    for seed, features in expected.items():
        assert torch.equal(own.of_images([picture(32, 32, seed)])[0], features)


def test_tower_is_shared_while_somebody_holds_it(clip: Path) -> None:
    one = tower(clip, CPU, "fp32")
    assert tower(clip / ".." / clip.name, CPU, "fp32") is one
    assert tower(clip, CPU, "bf16") is not one


def test_text_that_is_too_long_is_cut(clip: Path) -> None:
    own = Tower(clip, CPU, torch.float32)
    assert bool(torch.isfinite(own.of_texts(["a red circle " * 200])).all())


def test_code_in_the_folder_of_a_tower_is_not_run(clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    told = json.loads((folder / "config.json").read_text())
    told |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "own.py").write_text("open(__file__ + '.ran', 'w').close()\n")
    with pytest.raises(ConfigError):
        Tower(folder, CPU, torch.float32)
    assert not (folder / "own.py.ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("part", ["", "text_config"])
@pytest.mark.parametrize("kernel", ["evil/kernel", {"": "evil/kernel"}, "flash_attention_2"])
def test_code_of_the_hub_is_no_attention(
    clip: Path, tmp_path: Path, key: str, part: str, kernel: object
) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    told = json.loads((folder / "config.json").read_text())
    (told[part] if part else told)[key] = kernel
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="only eager and sdpa are taken"):
        Tower(folder, CPU, torch.float32)


def test_folder_that_holds_no_tower_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: no such file"):
        Tower(tmp_path, CPU, torch.float32)
    with pytest.raises(ConfigError, match="no model of images and texts"):
        Tower(tiny_models.classifier(tmp_path / "c"), CPU, torch.float32)
    lacking = tiny_models.siglip(tmp_path / "l")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("vision_model.post_layernorm.weight")
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 are missing, the first .*post_layernorm"):
        Tower(lacking, CPU, torch.float32)
    broken = tiny_models.siglip(tmp_path / "s")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="transformers cannot read it"):
        Tower(broken, CPU, torch.float32)
