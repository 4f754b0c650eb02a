from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import fuzzed, one_line
from test_names import component, converter, known_layout, rebuilt
from torch import Tensor

from bayesian_merger.checkpoint import Checkpoint, Layout, write
from bayesian_merger.errors import CheckpointError
from bayesian_merger.folders import Folder
from bayesian_merger.names import COMPONENTS

# As in the large models, some levels are wider than the one before and need shortcuts.
WIDTHS = (8, 16, 32, 32)
CONVOLUTION = "down_blocks.0.resnets.0.conv1.weight"
OUR_CONVOLUTION = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.fixture(scope="session")
def models() -> Callable[[str], dict[str, Any]]:
    """The parts of a small pipeline of an architecture by their folders' names."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")

    def clip(kind: str) -> Any:
        config = transformers.CLIPTextConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=16,
            projection_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
        return getattr(transformers, kind)(config)

    def t5() -> Any:
        config = transformers.T5Config(
            vocab_size=9, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
        return transformers.T5EncoderModel(config)

    def vae(channels: int) -> Any:
        return diffusers.AutoencoderKL(
            block_out_channels=WIDTHS,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            norm_num_groups=4,
            latent_channels=channels,
        )

    def unet(down: str, **options: Any) -> Any:
        kinds = {"a": "CrossAttnDownBlock2D", "r": "DownBlock2D"}
        ups = {"a": "CrossAttnUpBlock2D", "r": "UpBlock2D"}
        return diffusers.UNet2DConditionModel(
            block_out_channels=WIDTHS[: len(down)],
            down_block_types=[kinds[kind] for kind in down],
            up_block_types=[ups[kind] for kind in reversed(down)],
            layers_per_block=2,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=8,
            **options,
        )

    def build(architecture: str) -> dict[str, Any]:
        torch.manual_seed(0)
        if architecture in ("sd1", "sd2"):
            return {
                "unet": unet("aaar", use_linear_projection=architecture == "sd2"),
                "text_encoder": clip("CLIPTextModel"),
                "vae": vae(4),
            }
        if architecture == "sdxl":
            options: dict[str, Any] = {
                "use_linear_projection": True,
                "transformer_layers_per_block": [1, 1, 2],
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 16,
            }
            return {
                "unet": unet("raa", **options),
                "text_encoder": clip("CLIPTextModel"),
                "text_encoder_2": clip("CLIPTextModelWithProjection"),
                "vae": vae(4),
            }
        heads = {"attention_head_dim": 8, "num_attention_heads": 1}
        width = {"joint_attention_dim": 8, "pooled_projection_dim": 8}
        if architecture == "flux":
            return {
                "transformer": diffusers.FluxTransformer2DModel(
                    in_channels=4,
                    num_layers=2,
                    num_single_layers=2,
                    axes_dims_rope=(2, 2, 4),
                    **heads,
                    **width,
                ),
                "text_encoder": clip("CLIPTextModel"),
                "text_encoder_2": t5(),
                "vae": vae(16),
            }
        return {
            "transformer": diffusers.SD3Transformer2DModel(
                sample_size=4,
                in_channels=4,
                num_layers={"sd3": 24, "sd3-large": 38}[architecture],
                caption_projection_dim=8,
                pos_embed_max_size=4,
                qk_norm="rms_norm",
                dual_attention_layers=(0, 1),
                **heads,
                **width,
            ),
            "text_encoder": clip("CLIPTextModelWithProjection"),
            "text_encoder_2": clip("CLIPTextModelWithProjection"),
            "text_encoder_3": t5(),
            "vae": vae(16),
        }

    return build


def save(parts: Mapping[str, Any], folder: Path, **options: Any) -> Path:
    for name, part in parts.items():
        part.save_pretrained(folder / name, **options)
    return with_index(folder)


def with_index(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    return folder


@pytest.fixture
def handmade(tmp_path: Path) -> Path:
    """A folder with the fewest tensors that show SD1."""
    tensors = {
        CONVOLUTION: torch.randn(2, 2, 3, 3),
        "mid_block.attentions.0.proj_in.weight": torch.randn(2, 2, 1, 1),
    }
    (tmp_path / "model" / "unet").mkdir(parents=True)
    save_file(tensors, weights(tmp_path / "model"))
    return with_index(tmp_path / "model")


def weights(folder: Path, ending: str = ".safetensors") -> Path:
    return folder / "unet" / f"diffusion_pytorch_model{ending}"


def refused(folder: Path, saying: str) -> None:
    with pytest.raises(CheckpointError, match=saying) as caught:
        Folder(folder)
    assert folder.name in one_line(caught.value)


@pytest.mark.parametrize("architecture", COMPONENTS)
def test_folder_holds_every_tensor_of_its_parts(
    tmp_path: Path, models: Callable[[str], dict[str, Any]], architecture: str
) -> None:
    parts = models(architecture)
    found = Folder(save(parts, tmp_path / "model"))
    expected: dict[str, Tensor] = {}
    for name, part in parts.items():
        # T5 has one table of words under two names, of which one is saved.
        saved = {n: t for n, t in part.state_dict().items() if "embed_tokens" not in n}
        expected |= rebuilt(component(architecture, name), saved)
    assert found.layout.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found.layout[name] == Layout(tuple(tensor.shape), tensor.dtype)


@pytest.mark.parametrize(
    ("architecture", "file"), [("sd1", "sd1-ldm"), ("sd2", "sd1-ldm"), ("sdxl", "sdxl-sgm")]
)
def test_folder_of_small_unet_and_vae_has_the_names_of_the_large_model(
    tmp_path: Path, models: Callable[[str], dict[str, Any]], architecture: str, file: str
) -> None:
    parts = models(architecture)
    found = Folder(save(parts, tmp_path / "model"))
    starts = ("model.diffusion_model.", "first_stage_model.")
    # The small SDXL has fewer layers in each of its transformers.
    known = {name for name in known_layout(file) if name.startswith(starts)}
    ours = {name for name in found.layout if name.startswith(starts)}
    assert ours <= known
    assert {n for n in known - ours if ".transformer_blocks." not in n} == set()
    unet = {name: found[name] for name in ours if name.startswith(starts[0])}
    theirs = converter("convert_ldm_unet_checkpoint")(unet, dict(parts["unet"].config))
    for name, tensor in parts["unet"].state_dict().items():
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("architecture", ["sdxl", "sd3"])
def test_shards_are_one_model(
    tmp_path: Path, models: Callable[[str], dict[str, Any]], architecture: str
) -> None:
    parts = models(architecture)
    whole = Folder(save(parts, tmp_path / "whole"))
    sharded = Folder(save(parts, tmp_path / "sharded", max_shard_size=10_000))
    assert len(list((tmp_path / "sharded" / next(iter(parts))).glob("*-of-*"))) > 1
    assert sharded.layout == whole.layout
    for name in whole.layout:
        assert torch.equal(sharded[name], whole[name]), name
    assert sharded.sha256 != whole.sha256


def test_folder_can_be_written_as_a_checkpoint(
    tmp_path: Path, models: Callable[[str], dict[str, Any]]
) -> None:
    found = Folder(save(models("sdxl"), tmp_path / "model"))
    path = tmp_path / "model.safetensors"
    write(path, found.layout, lambda name: [found[name]], {})
    assert Checkpoint(path).layout == found.layout


@pytest.mark.parametrize("architecture", ["sd1", "sd3"])
def test_absent_parts_are_absent(
    tmp_path: Path, models: Callable[[str], dict[str, Any]], architecture: str
) -> None:
    denoiser, model = next(iter(models(architecture).items()))
    found = Folder(save({denoiser: model}, tmp_path / "model"))
    assert {name.split(".")[0] for name in found.layout} == {"model"}


def test_folder_has_what_a_checkpoint_has(handmade: Path) -> None:
    found = Folder(handmade)
    assert found.path == handmade
    assert found.name == "model"
    assert found.metadata == {}
    assert torch.equal(found[OUR_CONVOLUTION], load_file(weights(handmade))[CONVOLUTION])


def test_sha256_is_of_the_weights_alone(handmade: Path) -> None:
    before = Folder(handmade).sha256
    assert len(before) == 64
    (handmade / "unet" / "README.md").write_text("words")
    assert Folder(handmade).sha256 == before
    shutil.copytree(handmade, handmade.with_name("copy"))
    assert Folder(handmade.with_name("copy")).sha256 == before
    save_file(
        {n: t + 1 for n, t in load_file(weights(handmade)).items()},
        weights(handmade),
    )
    assert Folder(handmade).sha256 != before


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("v_prediction", {"modelspec.prediction_type": "v"}),
        ("epsilon", {"modelspec.prediction_type": "epsilon"}),
        (["epsilon"], {}),
    ],
)
def test_prediction_type_comes_from_the_scheduler(
    handmade: Path, said: object, expected: Mapping[str, str]
) -> None:
    (handmade / "scheduler").mkdir()
    config = handmade / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"prediction_type": said}))
    assert Folder(handmade).metadata == expected


def test_plain_weights_are_read_rather_than_a_variant(handmade: Path) -> None:
    half = {n: t.half() for n, t in load_file(weights(handmade)).items()}
    save_file(half, weights(handmade, ".fp16.safetensors"))
    assert Folder(handmade).layout[OUR_CONVOLUTION].dtype == torch.float32
    weights(handmade).unlink()
    assert Folder(handmade).layout[OUR_CONVOLUTION].dtype == torch.float16


def test_two_variants_without_plain_weights_are_refused(handmade: Path) -> None:
    shutil.copy(weights(handmade), weights(handmade, ".fp16.safetensors"))
    weights(handmade).rename(weights(handmade, ".non_ema.safetensors"))
    refused(handmade, "model/unet: there are .*fp16.* and .*non_ema.*; keep one of them")


def test_position_ids_of_old_folders_are_left_out(handmade: Path) -> None:
    (handmade / "text_encoder").mkdir()
    name = "text_model.embeddings.position_ids"
    (handmade / "text_encoder_2").mkdir()
    ids = {name: torch.arange(77).reshape(1, 77), "text_projection.weight": torch.eye(2)}
    save_file(ids, handmade / "text_encoder_2" / "model.safetensors")
    save_file(ids, handmade / "text_encoder" / "model.safetensors")
    tensors = {**load_file(weights(handmade)), "add_embedding.linear_1.weight": torch.eye(2)}
    save_file(tensors, weights(handmade))
    found = Folder(handmade)
    kept = [name for name in found.layout if name.endswith("position_ids")]
    assert kept == ["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]


# What is refused


def test_folder_without_model_index_is_refused(handmade: Path) -> None:
    (handmade / "model_index.json").unlink()
    refused(handmade, "model_index.json: cannot be read .*is this a folder of diffusers")


@pytest.mark.parametrize(
    ("text", "saying"),
    [("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "not a table"), ("\xff", "not JSON")],
)
def test_model_index_that_is_no_table_is_refused(handmade: Path, text: str, saying: str) -> None:
    (handmade / "model_index.json").write_text(text, encoding="latin-1")
    refused(handmade, saying)


def test_huge_index_is_refused_unread(handmade: Path) -> None:
    with (handmade / "model_index.json").open("wb") as file:
        file.truncate(1 << 40)
    refused(handmade, "larger than any")


def test_folder_without_a_denoiser_is_refused(handmade: Path) -> None:
    shutil.rmtree(handmade / "unet")
    refused(handmade, "neither a unet nor a transformer")


def test_other_architecture_is_refused(handmade: Path) -> None:
    save_file({"transformer_blocks.0.norm.weight": torch.ones(1)}, weights(handmade))
    refused(handmade, "'SomePipeline' is not SD1.5")


def test_long_name_of_a_pipeline_is_told_in_short(handmade: Path) -> None:
    save_file({"transformer_blocks.0.norm.weight": torch.ones(1)}, weights(handmade))
    (handmade / "model_index.json").write_text(json.dumps({"_class_name": "A" * 1_000_000}))
    with pytest.raises(CheckpointError) as caught:
        Folder(handmade)
    assert len(str(caught.value)) < 600


def test_foreign_tensor_is_refused(handmade: Path) -> None:
    tensors = load_file(weights(handmade))
    save_file({**tensors, "encoder_hid_proj.weight": torch.ones(1)}, weights(handmade))
    refused(handmade, "model/unet: 1 tensors have no place .*encoder_hid_proj")
    save_file({**tensors, "conv_in.weight.absmax": torch.ones(1)}, weights(handmade))
    refused(handmade, "model/unet: .*absmax.*quantised by bitsandbytes")


def test_pickled_weights_are_refused_with_the_way_out(handmade: Path) -> None:
    weights(handmade).rename(weights(handmade, ".bin"))
    refused(handmade, "model/unet: .*.bin file can run code .*safe_serialization=True")


def test_part_without_weights_is_refused(handmade: Path) -> None:
    weights(handmade).unlink()
    refused(handmade, r"model/unet: there are no \.safetensors files; is the download whole")


def test_damaged_weights_are_refused(handmade: Path) -> None:
    weights(handmade).write_bytes(weights(handmade).read_bytes()[:-4])
    refused(handmade, "model/unet: diffusion_pytorch_model.safetensors: not a whole")


def sharded(handmade: Path, weight_map: object) -> Path:
    """`handmade` in two files of one tensor each, with an index."""
    for i, (name, tensor) in enumerate(load_file(weights(handmade)).items()):
        save_file({name: tensor}, weights(handmade, f"-0000{i + 1}-of-00002.safetensors"))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    weights(handmade, ".safetensors.index.json").write_text(index)
    weights(handmade).unlink()
    return handmade


def true_map(handmade: Path) -> dict[str, str]:
    names = load_file(weights(handmade))
    return {
        name: f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        for i, name in enumerate(names)
    }


def test_index_that_tells_the_truth_is_read(handmade: Path) -> None:
    before = Folder(handmade).layout
    assert Folder(sharded(handmade, true_map(handmade))).layout == before


@pytest.mark.parametrize(
    "file",
    [
        "../../secret-00001-of-00001.safetensors",
        "/etc/secret-00001-of-00001.safetensors",
        "..\\secret-00001-of-00001.safetensors",
        "secret.safetensors",
        "",
        7,
        None,
        ["a-00001-of-00001.safetensors"],
    ],
)
def test_index_cannot_lead_out_of_its_folder(handmade: Path, file: object) -> None:
    save_file({CONVOLUTION: torch.ones(1)}, handmade / "secret-00001-of-00001.safetensors")
    refused(sharded(handmade, {CONVOLUTION: file}), "is no name of a part of a model")


@pytest.mark.parametrize("weight_map", [None, [], {}, "text"])
def test_index_without_a_table_is_refused(handmade: Path, weight_map: object) -> None:
    refused(sharded(handmade, weight_map), "model/unet: .*index.json: lists no tensors")


def test_index_that_lacks_a_tensor_is_refused(handmade: Path) -> None:
    listed = true_map(handmade)
    first, second = listed
    listed[first] = listed[second]
    refused(sharded(handmade, listed), "do not hold the same tensors")


WORDS = st.sampled_from([CONVOLUTION, "weight_map", "_class_name", "a-00001-of-00002.safetensors"])
JSON = st.recursive(
    st.none() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
)


@fuzzed
@given(JSON, JSON)
def test_any_json_is_read_or_refused(handmade: Path, listed: object, said: object) -> None:
    (handmade / "model_index.json").write_text(json.dumps(said))
    index = weights(handmade, ".safetensors.index.json")
    index.write_text(json.dumps({"weight_map": listed}))
    weights(handmade).unlink(missing_ok=True)
    with pytest.raises(CheckpointError) as caught:
        Folder(handmade)
    one_line(caught.value)


def test_missing_shard_is_named(handmade: Path) -> None:
    folder = sharded(handmade, true_map(handmade))
    weights(folder, "-00002-of-00002.safetensors").unlink()
    refused(folder, "model/unet: .*00002-of-00002.safetensors: no such file")


def fused(handmade: Path, **projections: Tensor) -> Path:
    """`handmade` as SD2, whose text encoder has these projections of its attention."""
    tensors = load_file(weights(handmade))
    proj_in = "mid_block.attentions.0.proj_in.weight"
    save_file({**tensors, proj_in: torch.ones(2, 2)}, weights(handmade))
    (handmade / "text_encoder").mkdir()
    place = "text_model.encoder.layers.0.self_attn."
    named = {f"{place}{name}_proj.weight": tensor for name, tensor in projections.items()}
    save_file(named, handmade / "text_encoder" / "model.safetensors")
    return handmade


def test_fused_tensor_is_made_of_its_pieces(handmade: Path) -> None:
    pieces = {name: torch.full((2, 2), float(i)) for i, name in enumerate("qkv")}
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    found = Folder(fused(handmade, **pieces))[name]
    assert found[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_fused_tensor_that_lacks_a_piece_is_refused(handmade: Path) -> None:
    refused(fused(handmade, q=torch.ones(2, 2), v=torch.ones(2, 2)), "lacks its neighbours")


@pytest.mark.parametrize(
    "k", [torch.ones(1, 2), torch.ones(2, 3), torch.ones(2), torch.ones(2, 2).half()]
)
def test_pieces_that_do_not_fit_each_other_are_refused(handmade: Path, k: Tensor) -> None:
    refused(
        fused(handmade, q=torch.ones(2, 2), k=k, v=torch.ones(2, 2)), "differs in shape or type"
    )


def test_tensor_that_is_there_twice_is_refused(handmade: Path) -> None:
    tensors = {}
    for name in ("query", "to_q"):
        tensors[f"encoder.mid_block.attentions.0.{name}.bias"] = torch.ones(2)
    (handmade / "vae").mkdir()
    save_file(tensors, handmade / "vae" / "diffusion_pytorch_model.safetensors")
    refused(handmade, "is there twice")


def test_projection_without_two_axes_is_refused(handmade: Path) -> None:
    tensors = {**load_file(weights(handmade)), "add_embedding.linear_1.weight": torch.eye(2)}
    save_file(tensors, weights(handmade))
    (handmade / "text_encoder_2").mkdir()
    path = handmade / "text_encoder_2" / "model.safetensors"
    save_file({"text_projection.weight": torch.ones(2)}, path)
    refused(handmade, "has too few axes")
