"""A merge in a file that another process maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bayesian_merger import demo
from bayesian_merger.blocks import SD1
from bayesian_merger.data import Recipe
from bayesian_merger.errors import TrialError
from bayesian_merger.handover import Handover
from bayesian_merger.merge import Merged, Merger, even_weights, open_model

DEMO = Path(demo.__file__).parent


@pytest.fixture(scope="module")
def merger() -> Merger:
    return Merger([open_model(DEMO / f"{name}.safetensors") for name in ("crisp", "vivid")])


def merged(
    merger: Merger,
    alpha: float,
    blocks: Mapping[str, float] | None = None,
    precision: str = "fp16",
) -> Merged:
    weights = even_weights("weighted_sum", SD1.blocks, alpha)
    weights["alpha"].update(blocks or {})
    models = merger.references()
    return merger.merge(Recipe("weighted_sum", "sd1", models, weights, precision=precision))


def told(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """What a server that has these tensors says of them."""
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.to(dtype).reshape(-1)
        at = [i * (len(flat) - 1) // 7 for i in range(8)]
        found[name] = {"type": str(dtype)[6:], "values": flat[at].float().tolist()}
    return found


def test_file_holds_each_merge_as_a_written_one_does(merger: Merger, tmp_path: Path) -> None:
    handover = Handover(tmp_path / "live.safetensors")
    written = tmp_path / "written.safetensors"
    for one in (merged(merger, 0.3), merged(merger, 0.3, {"IN04": 0.9}), merged(merger, 0.7)):
        handover.put(one)
        one.write_file(written)
        live, expected = load_file(handover.path), load_file(written)
        assert live.keys() == expected.keys()
        for name, tensor in expected.items():
            assert live[name].dtype == tensor.dtype
            assert torch.equal(live[name], tensor), name


def test_merge_of_other_types_gets_a_file_of_its_own(merger: Merger, tmp_path: Path) -> None:
    handover = Handover(tmp_path / "live.safetensors")
    handover.put(merged(merger, 0.3))
    handover.put(merged(merger, 0.3, precision="fp32"))
    assert torch.float32 in {x.dtype for x in load_file(handover.path).values()}
    handover.path.unlink()
    handover.put(merged(merger, 0.3, precision="fp32"))
    assert handover.path.is_file()


def test_probes_tell_of_each_block(merger: Merger, tmp_path: Path) -> None:
    handover = Handover(tmp_path / "live.safetensors")
    one = merged(merger, 0.3)
    handover.put(one)
    assert {key[1] for name in handover.probes() for key in one.moved_by(name)} == set(
        merger.blocks
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_model_that_is_the_merge_is_confirmed(
    merger: Merger, tmp_path: Path, dtype: torch.dtype
) -> None:
    handover = Handover(tmp_path / "live.safetensors")
    handover.put(merged(merger, 0.3))
    asked = handover.probes()
    live = told(load_file(handover.path), dtype)
    handover.confirm(live, asked)
    some = {name.partition(".")[0]: name for name in asked}
    assert some.keys() == {"model", "cond_stage_model"}
    handover.confirm({name: live[name] for name in some.values()}, asked)


@pytest.mark.parametrize(("start", "part"), [("model.", "U-Net"), ("cond_", "text encoder")])
def test_model_of_which_a_part_is_not_told_is_not(
    merger: Merger, tmp_path: Path, start: str, part: str
) -> None:
    handover = Handover(tmp_path / "live.safetensors")
    handover.put(merged(merger, 0.3))
    asked = handover.probes()
    live = told(load_file(handover.path), torch.float16)
    with pytest.raises(TrialError, match=f"does not tell of its model's {part}"):
        handover.confirm({n: x for n, x in live.items() if not n.startswith(start)}, asked)


@pytest.mark.parametrize("block", ["base", "IN00", "OUT11"])
def test_model_with_one_other_block_is_not(merger: Merger, tmp_path: Path, block: str) -> None:
    handover = Handover(tmp_path / "live.safetensors")
    handover.put(merged(merger, 0.3))
    before = told(load_file(handover.path), torch.float16)
    handover.put(merged(merger, 0.3, {block: 0.35}))
    with pytest.raises(TrialError, match="the server's model is not the merge"):
        handover.confirm(before, handover.probes())


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"type": "int4", "values": [0.0] * 8},
        {"type": "float16", "values": []},
        {"type": "float16", "values": ["x"] * 8},
        {"type": "float16", "values": [None] * 8},
        {"type": "float16", "values": [float("nan")] * 8},
    ],
)
def test_receipt_that_says_nothing_is_none(merger: Merger, tmp_path: Path, entry: object) -> None:
    handover = Handover(tmp_path / "live.safetensors")
    handover.put(merged(merger, 0.3))
    asked = handover.probes()
    for live in ({name: entry for name in asked}, [entry], None):
        with pytest.raises(TrialError, match=r"not the merge|does not tell"):
            handover.confirm(live, asked)
