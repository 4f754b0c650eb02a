"""What every merge method promises; a new file in methods/ is covered on arrival."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesian_merger.methods import method, n_models, weights
from bayesian_merger.methods.linear import add_difference, weighted_sum

every_method = pytest.mark.parametrize("name", method.names())
SHAPES = [(), (1,), (5,), (2, 3), (4, 3, 3, 3), (0,), (2, 0)]


def inputs(name: str, shape: tuple[int, ...] = (4, 3), seed: int = 0) -> list[Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=chance) for _ in range(n_models(method.get(name)))]


def at(name: str, value: float) -> dict[str, float]:
    return dict.fromkeys(weights(method.get(name)), value)


def test_the_methods_are_those_of_the_original() -> None:
    assert {"weighted_sum", "add_difference"} <= set(method.names())


@every_method
def test_method_says_in_its_docstring_what_it_does(name: str) -> None:
    assert (inspect.getdoc(method.get(name)) or "").splitlines()[0].strip()


@every_method
def test_signature_is_models_and_then_weights_with_defaults(name: str) -> None:
    function = method.get(name)
    assert n_models(function) in (2, 3)
    assert weights(function)
    assert all(isinstance(default, float) for default in weights(function).values())
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@every_method
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_method_keeps_shape_and_type_and_stays_finite(
    name: str, shape: tuple[int, ...], weight: float
) -> None:
    merged = method.get(name)(*inputs(name, shape), **at(name, weight))
    assert merged.shape == shape
    assert merged.dtype == torch.float32
    assert bool(torch.isfinite(merged).all())


@every_method
@pytest.mark.parametrize("number", [0.0, 1.0, -1e-30, 1e30])
def test_method_stays_finite_on_models_of_one_number(name: str, number: float) -> None:
    models = [torch.full((3, 2), number) for _ in inputs(name)]
    merged = method.get(name)(*models, **at(name, 0.5))
    assert bool(torch.isfinite(merged).all())


@every_method
def test_method_gives_the_same_twice_and_leaves_its_inputs_alone(name: str) -> None:
    models = inputs(name)
    before = [tensor.clone() for tensor in models]
    first = method.get(name)(*models, **at(name, 0.3))
    second = method.get(name)(*models, **at(name, 0.3))
    assert torch.equal(first, second)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(models, before, strict=True))
    first += 1
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(models, before, strict=True))


@every_method
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_equal_models_merge_to_themselves(name: str, weight: float) -> None:
    model = inputs(name)[0]
    merged = method.get(name)(*[model.clone() for _ in inputs(name)], **at(name, weight))
    torch.testing.assert_close(merged, model)


@every_method
def test_strided_models_merge_like_others(name: str) -> None:
    models = inputs(name, (6, 4))
    plain = method.get(name)(*models, **at(name, 0.3))
    strided = method.get(name)(*[m.T.contiguous().T for m in models], **at(name, 0.3))
    torch.testing.assert_close(strided, plain)


@every_method
def test_method_lets_gradients_through_to_its_models(name: str) -> None:
    models = [tensor.requires_grad_() for tensor in inputs(name)]
    method.get(name)(*models, **at(name, 0.3)).sum().backward()  # type: ignore[no-untyped-call]
    assert all(tensor.grad is not None for tensor in models)


A = torch.tensor([[0.0, 4.0], [-8.0, 1.0]])
B = torch.tensor([[4.0, 0.0], [8.0, 1.0]])
C = torch.tensor([[2.0, 4.0], [0.0, -1.0]])


def test_weighted_sum_by_hand() -> None:
    assert weighted_sum(A, B, alpha=0.25).tolist() == [[1.0, 3.0], [-4.0, 1.0]]
    assert weighted_sum(A, B).tolist() == [[2.0, 2.0], [0.0, 1.0]]
    assert weighted_sum(A, B, alpha=2.0).tolist() == [[8.0, -4.0], [24.0, 1.0]]
    assert weighted_sum(A, B, alpha=-1.0).tolist() == [[-4.0, 8.0], [-24.0, 1.0]]


def test_add_difference_by_hand() -> None:
    assert add_difference(A, B, C).tolist() == [[2.0, 0.0], [0.0, 3.0]]
    assert add_difference(A, B, C, alpha=0.5).tolist() == [[1.0, 2.0], [-4.0, 2.0]]


def test_add_difference_with_equal_b_and_c_returns_a() -> None:
    assert torch.equal(add_difference(A, C, C, alpha=0.7), A)


def test_add_difference_at_0_returns_a_and_from_a_itself_returns_b_at_1() -> None:
    assert torch.equal(add_difference(A, B, C, alpha=0.0), A)
    assert torch.equal(add_difference(A, B, A, alpha=1.0), B)


numbers = st.floats(-65504, 65504, width=16)


@settings(deadline=None, derandomize=True)
@given(a=numbers, b=numbers, alpha=st.floats(0, 1))
def test_weighted_sum_lies_between_its_models_and_meets_them_at_the_ends(
    a: float, b: float, alpha: float
) -> None:
    one, other = torch.tensor([a]), torch.tensor([b])
    assert weighted_sum(one, other, alpha=0.0).item() == a
    assert weighted_sum(one, other, alpha=1.0).item() == b
    merged = weighted_sum(one, other, alpha=alpha).item()
    room = 1e-6 * (abs(a) + abs(b))
    assert min(a, b) - room <= merged <= max(a, b) + room
    assert merged == pytest.approx((1 - alpha) * a + alpha * b, abs=room + 1e-12)


@settings(deadline=None, derandomize=True)
@given(a=numbers, b=numbers, alpha=st.sampled_from([i / 16 for i in range(17)]))
def test_weighted_sum_is_the_same_from_the_other_side(a: float, b: float, alpha: float) -> None:
    forth = weighted_sum(torch.tensor([a]), torch.tensor([b]), alpha=alpha)
    back = weighted_sum(torch.tensor([b]), torch.tensor([a]), alpha=1 - alpha)
    assert forth.item() == pytest.approx(back.item(), abs=1e-6 * (abs(a) + abs(b)) + 1e-12)
