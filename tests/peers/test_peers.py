"""The methods beside those of sd-meh and sd-mecha, on the same tensors; run by `make peers`.

Where ours differ it is on purpose, and a test says how and why.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayesian_merger import methods
from bayesian_merger.methods.differences import multiply_difference, similarity_add_difference
from bayesian_merger.methods.exchange import tensor_sum, top_k_tensor_sum
from bayesian_merger.methods.geometry import (
    euclidean_add_difference,
    model_stock,
    perpendicular_component,
    slerp,
)
from bayesian_merger.methods.sparse import dare_add_difference, della, ties, ties_add_difference
from bayesian_merger.methods.sums import weighted_subtraction, weighted_sum

PEERS = os.environ.get("BAYESIAN_MERGER_PEERS", "")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PEERS, reason="BAYESIAN_MERGER_PEERS names no Python that has them"),
]

SHAPES = {"number": (), "vector": (60,), "matrix": (40, 30), "kernel": (8, 6, 3, 3)}
ARRAYS = ("vector", "matrix", "kernel")


def make_tensors() -> dict[str, Tensor]:
    """Models a and b near their ancestor c, d near a, and differences, in all shapes; special ones."""
    chance = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for kind, shape in SHAPES.items():
        c, e, f, g = (torch.randn(shape, generator=chance) for _ in range(4))
        models = {"a": c + 0.3 * e, "b": c + 0.3 * f, "c": c, "d": c + 0.3 * e + 0.1 * g}
        found |= {f"{kind} {name}": model for name, model in models.items()}
        found |= {f"{kind} {name}-c": models[name] - c for name in "abd"}
    found["zeros"] = torch.zeros(40, 30)
    found["ones"] = torch.ones(40, 30)
    found["tiny"] = torch.full((4,), 1e-4)
    found["-tiny"] = -found["tiny"]
    found["many a"] = torch.randn(100_000, generator=chance).half().float()
    found["many b"] = (
        (found["many a"] + 0.1 * torch.randn(100_000, generator=chance)).half().float()
    )
    found["rising"] = torch.linspace(0.01, 1, 100_000)
    found["zero"] = torch.zeros(2)
    found["up"], found["down"] = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])
    found["opposite"] = torch.tensor([-1.0, 0.1])
    found["large a"] = torch.full((2**25,), 0.1)
    found["large b"] = torch.cat([torch.zeros(2**24), torch.full((2**24,), 0.1)])
    return found


TENSORS = make_tensors()


@dataclass(frozen=True)
class Call:
    """A call of a peer's function with tensors of TENSORS, converted to `dtype`."""

    peer: str
    method: str
    inputs: tuple[str, ...]
    weights: Mapping[str, Any]
    dtype: str = "float32"


def meh(method: str, *inputs: str, **weights: float) -> Call:
    return Call("sd-meh", method, inputs, weights)


def mecha(method: str, *inputs: str, **weights: float) -> Call:
    return Call("sd-mecha", method, inputs, weights)


@dataclass(frozen=True)
class Same:
    """A method of ours that gives what `finish(theirs, *models)` does; models in the order of ours."""

    ours: str
    models: str
    weights: Mapping[str, float]
    theirs: Call
    finish: Callable[..., Tensor] = lambda theirs, *models: theirs
    shapes: tuple[str, ...] = tuple(SHAPES)


def same_as_meh(name: str, *shapes: str, **weights: float) -> Same:
    models = "abc"[: methods.n_models(methods.get(name))]
    return Same(
        name, models, weights, meh(name, *models, **weights), shapes=shapes or tuple(SHAPES)
    )


SAME = [
    same_as_meh("weighted_sum", alpha=0.3),
    same_as_meh("weighted_subtraction", alpha=0.3, beta=0.6),
    same_as_meh("tensor_sum", *ARRAYS, alpha=0.5, beta=0.25),
    same_as_meh("tensor_sum", *ARRAYS, alpha=0.5, beta=0.75),
    same_as_meh("add_difference", alpha=0.7),
    same_as_meh("sum_twice", alpha=0.3, beta=0.6),
    same_as_meh("triple_sum", alpha=0.3, beta=0.6),
    same_as_meh("euclidean_add_difference", alpha=0.3),
    same_as_meh("multiply_difference", alpha=0.3, beta=0.6),
    same_as_meh("top_k_tensor_sum", *ARRAYS, alpha=0.5, beta=0.25),
    same_as_meh("top_k_tensor_sum", *ARRAYS, alpha=0.5, beta=0.75),
    same_as_meh("similarity_add_difference", alpha=0.3, beta=0.6),
    same_as_meh("distribution_crossover", alpha=0.3, beta=0.6),
    same_as_meh("distribution_crossover", alpha=0.3, beta=0.0),
    same_as_meh("ties_add_difference", alpha=0.7, beta=1.0),
    Same("weighted_sum", "ab", {"alpha": 0.3}, mecha("weighted_sum", "a", "b", alpha=0.3)),
    Same("n_average", "abd", {}, mecha("n_average", "a", "b", "d")),
    Same("add_difference", "abc", {"alpha": 0.7}, mecha("add_difference", "a", "b-c", alpha=0.7)),
    Same("slerp", "ab", {"alpha": 0.3}, mecha("slerp", "a", "b", alpha=0.3)),
    Same(
        "cosine_add_difference_a",
        "ab",
        {"alpha": 0.3},
        mecha("add_cosine_a", "a", "b", alpha=0.3),
    ),
    Same(
        "cosine_add_difference_b",
        "ab",
        {"alpha": 0.3},
        mecha("add_cosine_b", "a", "b", alpha=0.3),
    ),
    Same(
        "train_difference",
        "abc",
        {"alpha": 0.3},
        mecha("train_difference_mask", "a", "b", "c", alpha=0.3),
        lambda mask, a, b, c: a + mask * (b - c),
    ),
    Same(
        "perpendicular_component",
        "abc",
        {},
        mecha("perpendicular_component", "a-c", "b-c"),
        lambda component, a, b, c: a + component,
    ),
    Same(
        "model_stock",
        "cad",
        {},
        mecha("model_stock", "a-c", "d-c"),
        lambda difference, c, a, d: c + difference,
        ("vector",),
    ),
    Same(
        "ties",
        "cabd",
        {"density": 1.0},
        mecha("ties_sum", "a-c", "b-c", "d-c", k=1.0, vote_sgn=True),
        lambda difference, c, *others: c + difference,
    ),
    Same(
        "ties_add_difference",
        "abc",
        {"beta": 1.0},
        mecha("ties_sum", "a-c", "b-c", k=1.0),
        lambda difference, a, b, c: c + difference,
    ),
    Same(
        "tensor_sum",
        "ab",
        {"alpha": 0.5, "beta": 0.25},
        mecha("tensor_sum", "a", "b", width=0.5, offset=0.25),
    ),
]
EACH = [(same, shape) for same in SAME for shape in same.shapes]

# What the tests of differences ask for, by the names that they use.
OTHER = {
    "half": replace(meh("weighted_sum", "many a", "many b", alpha=0.3), dtype="float16"),
    "subtract all": meh("weighted_subtraction", "ones", "zeros", alpha=1.0, beta=1.0),
    "inexact window": meh("tensor_sum", "zeros", "ones", alpha=0.7, beta=0.1),
    "no difference": meh("euclidean_add_difference", "ones", "ones", "ones", alpha=0.5),
    "untouched a": meh(
        "multiply_difference", "matrix c", "matrix b", "matrix c", alpha=1.0, beta=0.0
    ),
    "tiny": replace(
        meh("similarity_add_difference", "tiny", "-tiny", "-tiny", alpha=1.0, beta=1.0),
        dtype="float16",
    ),
    "trim": meh("ties_add_difference", "vector a", "vector b", "vector c", alpha=1.0, beta=0.5),
    "trim all": meh(
        "ties_add_difference", "vector a", "vector b", "vector c", alpha=1.0, beta=0.0
    ),
    "conflict": meh("ties_add_difference", "up", "down", "zero", alpha=1.0, beta=1.0),
    "empty window": mecha("top_k_tensor_sum", "vector a", "vector b", width=0.0, offset=0.5),
    "large": mecha("slerp", "large a", "large b", alpha=0.5),
    "no direction": mecha("perpendicular_component", "zeros", "matrix b-c"),
    "rows": mecha("model_stock", "matrix a-c", "matrix d-c"),
    "opposite": mecha("model_stock", "up", "opposite"),
    "dare": mecha("dropout", "rising", probability=0.75, seed=1),
    "della": mecha(
        "ties_sum_with_dropout",
        "rising",
        probability=0.6,
        della_eps=0.5,
        k=1.0,
        apply_stock=True,
        seed=1,
    ),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The results of all calls, by name; made by one process of the peers' Python."""
    folder = tmp_path_factory.mktemp("peers")
    calls = dict(OTHER)
    for same, shape in EACH:
        inputs = tuple(f"{shape} {name}" for name in same.theirs.inputs)
        calls[name_of(same, shape)] = replace(same.theirs, inputs=inputs)
    save_file(TENSORS, folder / "inputs.safetensors")
    described = {name: asdict(call) for name, call in calls.items()}
    (folder / "calls.json").write_text(json.dumps(described))
    script = Path(__file__).with_name("oracle.py")
    files = [folder / name for name in ("inputs.safetensors", "calls.json", "out.safetensors")]
    done = subprocess.run([PEERS, script, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


def name_of(same: Same, shape: str) -> str:
    weights = ", ".join(f"{name} {value}" for name, value in same.weights.items())
    return f"{same.ours} ({weights}) of {same.theirs.peer}, {shape}"


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("same", "shape"), EACH, ids=[name_of(*each) for each in EACH])
def test_method_gives_what_the_peer_gives(
    same: Same, shape: str, theirs: dict[str, Tensor]
) -> None:
    models = [TENSORS[f"{shape} {name}"] for name in same.models]
    ours = methods.get(same.ours)(*models, **same.weights)
    expected = same.finish(theirs[name_of(same, shape)], *models)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


def test_float32_rounds_correctly_where_half_precision_does_not(
    theirs: dict[str, Tensor],
) -> None:
    a, b = TENSORS["many a"], TENSORS["many b"]
    exact = (0.7 * a.double() + 0.3 * b.double()).half()
    assert (weighted_sum(a, b, alpha=0.3).half() == exact).float().mean() > 0.999
    assert (theirs["half"] == exact).float().mean() < 0.9


def test_weighted_subtraction_of_all_is_limited_and_not_by_a_factor_of_ten_billion(
    theirs: dict[str, Tensor],
) -> None:
    ours = weighted_subtraction(TENSORS["ones"], TENSORS["zeros"], alpha=1.0, beta=1.0)
    assert ours.unique().tolist() == [1024.0]  # type: ignore[no-untyped-call]
    assert theirs["subtract all"].min() > 1e9


def test_tensor_sum_rounds_the_rows_that_sd_meh_cuts_off(theirs: dict[str, Tensor]) -> None:
    # 0.1 + 0.7 is a little less than 0.8, so its window ends at row int(31.99...) of 40.
    ours = tensor_sum(TENSORS["zeros"], TENSORS["ones"], alpha=0.7, beta=0.1)
    assert int(ours[:, 0].sum()) == 28
    assert int(theirs["inexact window"][:, 0].sum()) == 27


def test_euclidean_add_difference_without_a_difference_is_finite(
    theirs: dict[str, Tensor],
) -> None:
    ones = TENSORS["ones"]
    assert torch.equal(euclidean_add_difference(ones, ones, ones), ones)
    assert bool(theirs["no difference"].isnan().all())


def test_multiply_difference_has_no_sign_where_the_sum_has_none(theirs: dict[str, Tensor]) -> None:
    # sd-meh copies the sign of a zero: all that b learnt, in either direction, goes upwards.
    b, c = TENSORS["matrix b"], TENSORS["matrix c"]
    assert torch.equal(multiply_difference(c, b, c, alpha=1.0, beta=0.0), c)
    torch.testing.assert_close(theirs["untouched a"], c + (b - c).abs())


def test_similarity_of_small_numbers_does_not_vanish(theirs: dict[str, Tensor]) -> None:
    # The square of 1e-4 is 0 in half precision, and sd-meh takes opposite numbers for equal ones.
    a, b = TENSORS["tiny"], TENSORS["-tiny"]
    torch.testing.assert_close(similarity_add_difference(a, b, b, alpha=1.0, beta=1.0), a)
    assert bool((theirs["tiny"] == 0).all())


def test_trimming_keeps_the_share_and_not_one_more(theirs: dict[str, Tensor]) -> None:
    a, b, c = (TENSORS[f"vector {name}"] for name in "abc")
    one_more = ties_add_difference(a, b, c, beta=0.5 + 1 / 60)
    torch.testing.assert_close(theirs["trim"], one_more)
    assert torch.equal(ties_add_difference(a, b, c, beta=0.0), c)
    assert not torch.equal(theirs["trim all"], c)


def test_ties_elects_by_size_as_in_the_paper_and_sd_meh_by_number(
    theirs: dict[str, Tensor],
) -> None:
    up, down, zero = TENSORS["up"], TENSORS["down"], TENSORS["zero"]
    assert torch.equal(ties(zero, up, down, density=1.0), down)
    assert torch.equal(theirs["conflict"], zero)
    assert torch.equal(ties_add_difference(up, down, zero, beta=1.0), zero)


def test_top_k_tensor_sum_of_an_empty_window_changes_nothing(theirs: dict[str, Tensor]) -> None:
    # sd-mecha's windows include the value before the first.
    a, b = TENSORS["vector a"], TENSORS["vector b"]
    assert torch.equal(top_k_tensor_sum(a, b, alpha=0.0, beta=0.5), a)
    assert int((theirs["empty window"] != a).sum()) == 1


def test_slerp_of_large_tensors_has_the_right_length(theirs: dict[str, Tensor]) -> None:
    # Their norms are summed in float32.
    a, b = TENSORS["large a"], TENSORS["large b"]
    length = (a.double().norm() + b.double().norm()) / 2
    ours = slerp(a, b).double().norm()
    torch.testing.assert_close(ours, length, rtol=1e-6, atol=0)
    assert abs(theirs["large"].double().norm() / length - 1) > 1e-3


def test_component_perpendicular_to_nothing_is_the_whole(theirs: dict[str, Tensor]) -> None:
    a, b = TENSORS["matrix c"], TENSORS["matrix b"]
    torch.testing.assert_close(perpendicular_component(a, b, a), b)
    assert not theirs["no direction"].any()


def test_model_stock_has_one_angle_for_a_tensor_and_sd_mecha_one_for_each_row(
    theirs: dict[str, Tensor],
) -> None:
    # The paper's is layer by layer.
    c, a, d = (TENSORS[f"matrix {name}"] for name in "cad")
    by_row = torch.stack([model_stock(*rows) for rows in zip(c, a, d, strict=True)])
    torch.testing.assert_close(c + theirs["rows"], by_row, rtol=1e-5, atol=2e-6)
    assert not torch.allclose(model_stock(c, a, d), by_row, atol=1e-3)


def test_model_stock_of_models_that_disagree_does_not_grow(theirs: dict[str, Tensor]) -> None:
    zero, up, slant = TENSORS["zero"], TENSORS["up"], TENSORS["opposite"]
    assert torch.equal(model_stock(zero, up, slant), zero)
    assert theirs["opposite"].norm() > 10 * up.norm()


def test_dare_keeps_and_scales_as_sd_mecha_does(theirs: dict[str, Tensor]) -> None:
    rising = TENSORS["rising"]
    zero = torch.zeros_like(rising)
    ours = dare_add_difference(zero, rising, zero, density=0.25, generator=chance())
    for merged in (ours, theirs["dare"]):
        torch.testing.assert_close(merged, torch.where(merged != 0, 4 * rising, zero))
        # Four standard deviations.
        assert float((merged != 0).float().mean()) == pytest.approx(0.25, abs=0.0055)


def test_della_drops_as_sd_mecha_does_but_keeps_the_mean_as_in_the_paper(
    theirs: dict[str, Tensor],
) -> None:
    rising = TENSORS["rising"]
    ours = della(torch.zeros_like(rising), rising, density=0.4, epsilon=0.5, generator=chance())
    tenths = torch.arange(10) / 10 + 0.05
    expected = 0.4 + 0.5 * (tenths - 0.5)
    for merged in (ours, theirs["della"]):
        kept = (merged != 0).float().reshape(10, -1).mean(1)
        torch.testing.assert_close(kept, expected, rtol=0, atol=0.02)
    means = rising.reshape(10, -1).mean(1)
    torch.testing.assert_close(
        ours.reshape(10, -1).mean(1) / means, torch.ones(10), rtol=0.05, atol=0
    )
    torch.testing.assert_close(
        theirs["della"].reshape(10, -1).mean(1) / means, expected / 0.4, rtol=0.1, atol=0
    )
