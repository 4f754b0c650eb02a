from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesian_merger import kernels
from bayesian_merger.kernels import Sum, combine, stays_finite

TYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FACTORS = ((1.0,), (0.7, 0.3), (1.0, 0.3, -0.3), (0.1, 0.2, 0.3, 0.4))
some_types = pytest.mark.parametrize("out", TYPES, ids=str)
some_inputs = pytest.mark.parametrize("kind", TYPES, ids=str)


@pytest.fixture(params=["compiled", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loop, where llvmlite is installed, and torch in its place."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_compiler", lambda: None)
    else:
        pytest.importorskip("llvmlite")


def normal(n: int, kind: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(kind)


def summed(factors: Sequence[float], inputs: Sequence[Tensor], out: torch.dtype) -> Tensor:
    result = torch.empty(inputs[0].shape, dtype=out)
    assert combine([Sum(tuple(factors), tuple(inputs), result)]) == []
    return result


@some_inputs
@some_types
@pytest.mark.parametrize("factors", FACTORS, ids=len)
def test_compiled_loop_and_torch_give_the_same_bits(
    kind: torch.dtype,
    out: torch.dtype,
    factors: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("llvmlite")
    inputs = [normal(100_003, kind, seed) for seed in range(len(factors))]
    compiled = summed(factors, inputs, out)
    monkeypatch.setattr(kernels, "_compiler", lambda: None)
    assert torch.equal(compiled, summed(factors, inputs, out))


@pytest.mark.usefixtures("either")
@some_inputs
@some_types
@pytest.mark.parametrize("factors", FACTORS, ids=len)
def test_nearly_all_values_are_the_nearest_of_the_exact_sum(
    kind: torch.dtype, out: torch.dtype, factors: tuple[float, ...]
) -> None:
    # Independent models cancel far more often than two checkpoints of one family do.
    inputs = [normal(100_000, kind, seed) for seed in range(len(factors))]
    exact = sum(x.double() * factor for x, factor in zip(inputs, factors, strict=True))
    assert isinstance(exact, Tensor)
    share = (summed(factors, inputs, out) == exact.to(out)).double().mean().item()
    assert share > 0.9997


@pytest.mark.usefixtures("either")
@given(
    values=st.lists(st.floats(-1000, 1000, width=16), min_size=2, max_size=4),
    factors=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_sum_is_within_a_rounding_of_the_exact_one(
    values: list[float], factors: list[float]
) -> None:
    inputs = [torch.tensor([value], dtype=torch.float16) for value in values]
    terms = [Fraction(v) * Fraction(f) for v, f in zip(values, factors, strict=False)]
    exact = sum(terms, Fraction(0))
    found = summed(factors[: len(values)], inputs, torch.float32).item()
    rounding = abs(exact) / 2**24 + max(map(abs, terms)) / 2**50 + Fraction(1, 2**149)
    assert abs(Fraction(found) - exact) <= rounding


@pytest.mark.usefixtures("either")
@some_inputs
@pytest.mark.parametrize("place", [0, 777, 999])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
@some_types
def test_what_is_not_finite_is_told_even_where_its_factor_is_0(
    kind: torch.dtype, out: torch.dtype, strange: float, place: int
) -> None:
    fine, broken = torch.zeros(1000, dtype=kind), torch.zeros(1000, dtype=kind)
    broken[place] = strange
    results = [torch.empty(1000, dtype=out) for _ in range(3)]
    sums = [
        Sum((1.0, 0.0), (fine, x), r) for x, r in zip((fine, broken, fine), results, strict=True)
    ]
    assert combine(sums) == [1]


@pytest.mark.usefixtures("either")
def test_overflow_of_the_result_is_told() -> None:
    large = torch.full((5,), 60000.0, dtype=torch.float16)
    assert combine([Sum((1.0, 1.0), (large, large), torch.empty_like(large))]) == [0]
    assert combine([Sum((1e300,), (large,), torch.empty_like(large))]) == [0]
    wide = torch.empty(5)
    assert combine([Sum((1.0, 1.0), (large, large), wide)]) == []
    assert wide.tolist() == [120000.0] * 5


@pytest.mark.usefixtures("either")
def test_many_pieces_of_many_sums_all_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PIECE", 7)
    lengths = [0, 1, 6, 7, 8, 50, 0, 23]
    inputs = [(normal(n, torch.float16, n), normal(n, torch.float16, n + 1)) for n in lengths]
    results = [torch.full((n,), torch.nan, dtype=torch.float16) for n in lengths]
    sums = [Sum((0.5, 0.25), pair, r) for pair, r in zip(inputs, results, strict=True)]
    assert combine(iter(sums)) == []
    for (a, b), result in zip(inputs, results, strict=True):
        assert torch.equal(result, (a.double() * 0.5 + b.double() * 0.25).half())


@pytest.mark.usefixtures("either")
def test_shapes_and_strides_are_kept() -> None:
    a, b = normal(24, torch.float16), normal(24, torch.float16, 1)
    expected = (a.double() * 0.25 + b.double() * 0.75).half()
    whole = summed((0.25, 0.75), (a.view(2, 3, 4), b.view(2, 3, 4)), torch.float16)
    assert torch.equal(whole, expected.view(2, 3, 4))
    turned = torch.empty(4, 6, dtype=torch.float16).T
    strided = (a.view(6, 4), b.view(4, 6).T.contiguous().T.reshape(6, 4))
    assert combine([Sum((0.25, 0.75), strided, turned)]) == []
    assert torch.equal(turned, (strided[0].double() * 0.25 + strided[1].double() * 0.75).half())
    number = summed((2.0,), (torch.tensor(1.5),), torch.float32)
    assert number.item() == 3.0


@pytest.mark.parametrize("kind", FP8, ids=str)
def test_eight_bits_are_read_and_written(kind: torch.dtype) -> None:
    a, b = normal(1000, torch.float16).to(kind), normal(1000, torch.float16, 1).to(kind)
    exact = a.double() * 0.5 + b.double() * 0.5
    assert torch.equal(summed((0.5, 0.5), (a, b), torch.float32), exact.float())
    found = summed((0.5, 0.5), (a, b), kind)
    assert torch.equal(found.float(), exact.float().to(kind).float())


@pytest.mark.parametrize("kind", FP8, ids=str)
def test_overflow_of_eight_bits_is_told_where_torch_would_cut_it_off(kind: torch.dtype) -> None:
    most = torch.finfo(kind).max
    assert stays_finite(torch.tensor([most, -most]), kind)
    assert not stays_finite(torch.tensor([0.0, -2 * most]), kind)
    assert not stays_finite(torch.tensor([0.0, torch.nan]), kind)
    assert stays_finite(torch.empty(0), kind)


@pytest.mark.usefixtures("either")
def test_tensors_that_nobody_else_holds_are_read_before_they_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_PIECE", 1000)
    results = [torch.empty(5000) for _ in range(50)]
    sums = (Sum((1.0,), (torch.full((5000,), float(i)),), r) for i, r in enumerate(results))
    assert combine(sums) == []
    assert [set(r.tolist()) for r in results] == [{float(i)} for i in range(50)]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, *FP8], ids=str)
def test_values_are_rounded_to_the_precision_and_stored_in_a_wider_type(
    precision: torch.dtype,
) -> None:
    a, b = normal(10_007, torch.float16), normal(10_007, torch.float16, 1)
    narrow, wide = torch.empty(10_007, dtype=precision), torch.empty(10_007)
    both = [Sum((0.3, 0.7), (a, b), narrow), Sum((0.3, 0.7), (a, b), wide, precision)]
    assert combine(both) == []
    assert torch.equal(narrow.float(), wide)
    large = torch.full((40,), 60000.0)
    assert combine([Sum((1e36,), (large,), torch.empty(40), precision)]) == [0]


@pytest.mark.usefixtures("either")
def test_tensor_that_is_not_its_memory_is_read_right() -> None:
    negative = torch._neg_view(torch.ones(100, dtype=torch.float16))
    zeros = torch._efficientzerotensor(100, dtype=torch.float16)
    assert set(summed((1.0, 1.0), (negative, zeros), torch.float16).tolist()) == {-1.0}


def test_sum_may_be_written_over_one_of_its_inputs() -> None:
    a, b = normal(100_000, torch.float16), normal(100_000, torch.float16, 1)
    expected = summed((0.3, 0.7), (a, b), torch.float16)
    assert combine([Sum((0.3, 0.7), (a, b), a)]) == []
    assert torch.equal(a, expected)
