"""What every merge method promises; a new file in methods/ is covered on arrival."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesian_merger import methods
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.methods import Domain, Method, mecha, method
from bayesian_merger.methods.differences import (
    multiply_difference,
    similarity_add_difference,
    train_difference,
)
from bayesian_merger.methods.exchange import (
    distribution_crossover,
    tensor_sum,
    top_k_tensor_sum,
)
from bayesian_merger.methods.geometry import (
    cosine_add_difference_a,
    cosine_add_difference_b,
    euclidean_add_difference,
    model_stock,
    perpendicular_component,
    slerp,
)
from bayesian_merger.methods.sparse import dare_add_difference, della, ties, ties_add_difference
from bayesian_merger.methods.sums import (
    add_difference,
    n_average,
    sum_twice,
    triple_sum,
    weighted_subtraction,
    weighted_sum,
)
from bayesian_merger.registry import import_file

NAMES = [n for n in method.names() if method.get(n).__module__.startswith("bayesian_merger.")]
every_method = pytest.mark.parametrize("name", NAMES)
SHAPES = [(), (1,), (5,), (2, 3), (4, 3, 3, 3), (0,), (2, 0)]
OF_SD_MEH = {
    "weighted_sum",
    "weighted_subtraction",
    "tensor_sum",
    "add_difference",
    "sum_twice",
    "triple_sum",
    "euclidean_add_difference",
    "multiply_difference",
    "top_k_tensor_sum",
    "similarity_add_difference",
    "distribution_crossover",
    "ties_add_difference",
}
LINEAR = {
    "weighted_sum",
    "weighted_subtraction",
    "add_difference",
    "sum_twice",
    "triple_sum",
    "n_average",
}
ELEMENTWISE = LINEAR | {
    "multiply_difference",
    "similarity_add_difference",
    "train_difference",
}


def counts(name: str) -> list[int]:
    """The numbers of models that the method is tried with."""
    function = method.get(name)
    least = methods.n_models(function)
    return [least, least + 2] if methods.takes_more(function) else [least]


def inputs(name: str, shape: tuple[int, ...] = (4, 3), *, n: int | None = None) -> list[Tensor]:
    chance = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=chance) for _ in range(n or counts(name)[0])]


def at(name: str, value: float) -> dict[str, float]:
    return dict.fromkeys(methods.weights(method.get(name)), value)


def merge(
    name: str, models: list[Tensor], weights: dict[str, float] | None = None, seed: int = 0
) -> Tensor:
    function = method.get(name)
    chance: dict[str, Any] = {}
    if methods.is_random(function):
        chance["generator"] = torch.Generator().manual_seed(seed)
    return function(*models, **(weights or {}), **chance)


def test_methods_of_sd_meh_are_there() -> None:
    assert set(NAMES) >= OF_SD_MEH


@every_method
def test_docstring_starts_with_a_formula_and_names_a_source(name: str) -> None:
    text = inspect.getdoc(method.get(name)) or ""
    told, _, formula = text.splitlines()[0].partition(": ")
    assert told
    assert re.search(r"[-+\[(]", formula), formula
    assert re.search(r"arXiv:\d{4}\.\d{5}|doi:|sd-meh|sd-mecha|supermerger|webuis", text)
    for weight in methods.weights(method.get(name)):
        assert weight in text


@every_method
def test_signature_is_models_and_then_weights_with_defaults(name: str) -> None:
    function = method.get(name)
    assert methods.n_models(function) in (2, 3)
    parameters = inspect.signature(function).parameters.values()
    kinds = [p.kind for p in parameters]
    assert set(kinds) <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
    }
    assert all(isinstance(default, float) for default in methods.weights(function).values())
    assert "generator" not in methods.weights(function)
    for weight, domain in methods.domains(function).items():
        assert domain.low <= methods.weights(function)[weight] <= domain.high


@every_method
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_method_keeps_shape_and_type_and_stays_finite(
    name: str, shape: tuple[int, ...], weight: float
) -> None:
    for n in counts(name):
        merged = merge(name, inputs(name, shape, n=n), at(name, weight))
        assert merged.shape == shape
        assert merged.dtype == torch.float32
        assert bool(torch.isfinite(merged).all())


@every_method
@pytest.mark.parametrize("number", [0.0, 1.0, -1e-30, 1e30])
def test_method_stays_finite_on_models_of_one_number(name: str, number: float) -> None:
    models = [torch.full((3, 2), number) for _ in inputs(name)]
    assert bool(torch.isfinite(merge(name, models, at(name, 0.5))).all())


@every_method
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_method_stays_finite_on_zero_equal_parallel_and_opposite_models(
    name: str, weight: float
) -> None:
    for n in counts(name):
        one = inputs(name)[0]
        kinds = [torch.zeros_like(one), one, 2 * one, -one]
        for models in itertools.product(kinds, repeat=min(n, 3)):
            more = [one] * (n - 3)
            merged = merge(name, [*models, *more], at(name, weight))
            assert bool(torch.isfinite(merged).all())


numbers = st.floats(-65504, 65504, width=16)


@every_method
@settings(deadline=None, derandomize=True, max_examples=50)
@given(data=st.data())
def test_method_stays_finite_on_all_that_half_precision_can_hold(
    name: str, data: st.DataObject
) -> None:
    function = method.get(name)
    n, size = data.draw(st.sampled_from(counts(name))), data.draw(st.integers(1, 5))
    models = [
        torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size))) for _ in range(n)
    ]
    ends = {weight: Domain(-2.0, 3.0) for weight in methods.weights(function)}
    weights = {
        weight: data.draw(st.floats(domain.low, domain.high))
        for weight, domain in {**ends, **methods.domains(function)}.items()
    }
    assert bool(torch.isfinite(merge(name, models, weights)).all())


@every_method
def test_method_gives_the_same_twice_and_leaves_its_inputs_alone(name: str) -> None:
    for weight in (0.0, 0.3, 1.0):
        models = inputs(name)
        before = [tensor.clone() for tensor in models]
        first = merge(name, models, at(name, weight))
        second = merge(name, models, at(name, weight))
        assert torch.equal(first, second)
        first += 1
        assert all(torch.equal(tensor, kept) for tensor, kept in zip(models, before, strict=True))


@every_method
@pytest.mark.parametrize("shape", [(), (6,), (4, 3), (2, 2, 3, 3)])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_equal_models_merge_to_themselves(
    name: str, weight: float, shape: tuple[int, ...]
) -> None:
    for n in counts(name):
        models = [inputs(name, shape)[0].clone() for _ in range(n)]
        torch.testing.assert_close(merge(name, models, at(name, weight)), models[0])


@every_method
def test_strided_models_merge_like_others(name: str) -> None:
    models = inputs(name, (6, 4))
    plain = merge(name, models, at(name, 0.3))
    strided = merge(name, [m.T.contiguous().T for m in models], at(name, 0.3))
    torch.testing.assert_close(strided, plain)


@every_method
def test_method_lets_gradients_through_to_its_models(name: str) -> None:
    models = [tensor.requires_grad_() for tensor in inputs(name)]
    merge(name, models, at(name, 0.3)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [tensor.grad for tensor in models]
    if name == "top_k_tensor_sum":  # b gives the order only
        assert gradients.pop() is None
    if name == "distribution_crossover":  # as does c
        assert gradients.pop() is None
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.gpu
@every_method
def test_method_gives_on_the_gpu_what_it_gives_on_the_cpu(name: str) -> None:
    models = inputs(name, (64, 48))
    merged = merge(name, [tensor.cuda() for tensor in models])
    assert merged.is_cuda
    torch.testing.assert_close(merged.cpu(), merge(name, models), rtol=1e-5, atol=1e-5)


@every_method
def test_random_method_follows_its_generator_and_no_other_chance(name: str) -> None:
    models, weights = inputs(name, (20, 10)), at(name, 0.5)
    before = torch.random.get_rng_state()
    first, second = merge(name, models, weights), merge(name, models, weights, seed=1)
    assert torch.equal(first, second) != methods.is_random(method.get(name))
    assert torch.equal(torch.random.get_rng_state(), before)


@every_method
def test_elementwise_method_may_be_run_in_pieces(name: str) -> None:
    assert methods.is_elementwise(method.get(name)) == (name in ELEMENTWISE)
    if name in ELEMENTWISE:
        models, weights = inputs(name, (100,)), at(name, 0.3)
        pieces = [
            merge(name, [model[start : start + 7] for model in models], weights)
            for start in range(0, 100, 7)
        ]
        torch.testing.assert_close(torch.cat(pieces), merge(name, models, weights))


@every_method
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_linear_method_is_its_coefficients(name: str, weight: float) -> None:
    function = method.get(name)
    assert methods.is_linear(function) == (name in LINEAR)
    if name in LINEAR:
        for n in counts(name):
            models, weights = inputs(name, n=n), at(name, weight)
            factors = methods.coefficients(function, weights, n)
            assert sum(factors) == pytest.approx(1)
            by_hand = sum(f * m.double() for f, m in zip(factors, models, strict=True))
            assert isinstance(by_hand, Tensor)
            torch.testing.assert_close(merge(name, models, weights).double(), by_hand)


@every_method
def test_page_of_the_methods_names_it_with_its_weights(name: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    section = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert section, name
    for weight in methods.weights(method.get(name)):
        assert f"`{weight}`" in section[1]


def test_coefficients_of_the_ends_are_exact() -> None:
    assert methods.coefficients(weighted_sum, {"alpha": 0.25}, 2) == (0.75, 0.25)
    assert methods.coefficients(add_difference, {"alpha": 1.0}, 3) == (1.0, 1.0, -1.0)
    assert methods.coefficients(n_average, {}, 4) == (0.25, 0.25, 0.25, 0.25)


@pytest.mark.parametrize("head", ["", "from __future__ import annotations\n"])
def test_contract_is_read_from_a_users_file(head: str, tmp_path: Path) -> None:
    code = """
        from typing import TYPE_CHECKING, Annotated
        import torch
        from bayesian_merger.methods import Domain, Share, Weight, elementwise, method
        if TYPE_CHECKING:
            from torch import Tensor

        @method
        @elementwise
        def users_own(a: "Tensor", b: "Tensor", *more: "Tensor", alpha: Weight = 0.5, part: Share = 1.0,
                      angle: Annotated[float, Domain(-90.0, 90.0)] = 0.0, untyped=2.0, generator):
            return a
    """
    (tmp_path / f"own{len(head)}.py").write_text(head + textwrap.dedent(code))
    import_file(tmp_path / f"own{len(head)}.py")
    function = method._found.pop("users_own")
    assert methods.n_models(function) == 2
    assert methods.takes_more(function)
    assert methods.is_random(function)
    assert methods.weights(function) == {"alpha": 0.5, "part": 1.0, "angle": 0.0, "untyped": 2.0}
    assert methods.domains(function) == {"part": Domain(0.0, 1.0), "angle": Domain(-90.0, 90.0)}
    assert methods.is_elementwise(function)
    assert not methods.is_linear(function)


def test_annotation_that_cannot_be_read_is_told_in_one_line() -> None:
    def lost(a: Tensor, *, alpha: Lost = 0.5) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        return a

    with pytest.raises(ConfigError, match=r"merge method lost: the annotation of alpha .*'Lost'"):
        methods.domains(lost)


def test_unknown_name_suggests_the_nearest() -> None:
    assert methods.get("slerp") is slerp
    with pytest.raises(ConfigError, match="unknown merge method 'slurp'; did you mean 'slerp'"):
        methods.get("slurp")


def tensor(*rows: list[float] | float) -> Tensor:
    return torch.tensor(rows)


def close(merged: Tensor, expected: Any) -> None:
    torch.testing.assert_close(merged, torch.as_tensor(expected, dtype=torch.float32))


A = tensor([0.0, 4.0], [-8.0, 1.0])
B = tensor([4.0, 0.0], [8.0, 1.0])
C = tensor([2.0, 4.0], [0.0, -1.0])
ZERO = torch.zeros(2)


def test_weighted_sum_by_hand() -> None:
    assert weighted_sum(A, B, alpha=0.25).tolist() == [[1.0, 3.0], [-4.0, 1.0]]
    assert weighted_sum(A, B).tolist() == [[2.0, 2.0], [0.0, 1.0]]
    assert weighted_sum(A, B, alpha=2.0).tolist() == [[8.0, -4.0], [24.0, 1.0]]
    assert weighted_sum(A, B, alpha=-1.0).tolist() == [[-4.0, 8.0], [-24.0, 1.0]]


def test_weighted_subtraction_by_hand() -> None:
    assert weighted_subtraction(A, B, alpha=0.5, beta=1.0).tolist() == [[-4.0, 8.0], [-24.0, 1.0]]
    assert torch.equal(weighted_subtraction(A, B, alpha=0.0, beta=1.0), A)
    assert torch.equal(weighted_subtraction(A, B, alpha=1.0, beta=0.0), A)


def test_weighted_subtraction_undoes_the_weighted_sum() -> None:
    mixed = weighted_sum(A, B, alpha=0.3 * 0.8)
    close(weighted_subtraction(mixed, B, alpha=0.3, beta=0.8), A)


def test_weighted_subtraction_of_all_keeps_a_factor_that_half_precision_can_hold() -> None:
    assert weighted_subtraction(tensor(1.5), tensor(1.0), alpha=1.0, beta=1.0).item() == 513.0


def test_add_difference_by_hand() -> None:
    assert add_difference(A, B, C).tolist() == [[2.0, 0.0], [0.0, 3.0]]
    assert add_difference(A, B, C, alpha=0.5).tolist() == [[1.0, 2.0], [-4.0, 2.0]]


def test_add_difference_with_equal_b_and_c_returns_a() -> None:
    assert torch.equal(add_difference(A, C, C, alpha=0.7), A)


def test_add_difference_at_0_returns_a_and_from_a_itself_returns_b_at_1() -> None:
    assert torch.equal(add_difference(A, B, C, alpha=0.0), A)
    assert torch.equal(add_difference(A, B, A, alpha=1.0), B)


def test_sum_twice_by_hand() -> None:
    assert sum_twice(A, B, C, alpha=0.5, beta=0.5).tolist() == [[2.0, 3.0], [0.0, 0.0]]
    assert torch.equal(sum_twice(A, B, C, alpha=0.0, beta=0.0), A)
    assert torch.equal(sum_twice(A, B, C, alpha=1.0, beta=0.0), B)
    assert torch.equal(sum_twice(A, B, C, alpha=0.3, beta=1.0), C)


def test_triple_sum_by_hand() -> None:
    assert triple_sum(A, B, C, alpha=0.25, beta=0.25).tolist() == [[1.5, 3.0], [-2.0, 0.5]]
    assert triple_sum(A, B, C, alpha=1.0, beta=1.0).tolist() == [[6.0, 0.0], [16.0, -1.0]]
    assert torch.equal(triple_sum(A, B, C, alpha=0.0, beta=0.0), A)
    assert torch.equal(triple_sum(A, B, C, alpha=1.0, beta=0.0), B)
    assert torch.equal(triple_sum(A, B, C, alpha=0.0, beta=1.0), C)


def test_n_average_by_hand() -> None:
    assert n_average(A, B).tolist() == [[2.0, 2.0], [0.0, 1.0]]
    close(n_average(A, B, C), [[2.0, 8 / 3], [0.0, 1 / 3]])


def test_multiply_difference_by_hand() -> None:
    a, b, c = tensor(5.0, -3.0, 1.0), tensor(10.0, -8.0, 9.0), tensor(1.0, 1.0, 1.0)
    assert multiply_difference(a, b, c).tolist() == [7.0, -5.0, 1.0]
    close(multiply_difference(a, b, c, alpha=0.0, beta=0.0), a)
    close(multiply_difference(a, b, c, alpha=1.0, beta=1.0), b)


def test_multiply_difference_takes_the_sign_from_the_weighted_sum() -> None:
    a, b, c = tensor(4.0), tensor(-9.0), tensor(0.0)
    assert multiply_difference(a, b, c, beta=0.0).item() == 6.0
    assert multiply_difference(a, b, c, beta=1.0).item() == -6.0


def test_multiply_difference_without_a_sign_returns_c() -> None:
    untouched = tensor(1.0, 2.0)
    other = tensor(3.0, -4.0)
    assert torch.equal(
        multiply_difference(untouched, other, untouched, alpha=1.0, beta=0.0), untouched
    )
    assert multiply_difference(tensor(4.0), tensor(-4.0), tensor(0.0)).item() == 0.0


def test_similarity_add_difference_by_hand() -> None:
    # Ratios a b / max^2 of 1, -1, 1/2, and of two zeros; c is 0.
    a, b = tensor(2.0, 2.0, 2.0, 0.0), tensor(2.0, -2.0, 4.0, 0.0)
    c = torch.zeros(4)
    merged = similarity_add_difference(a, b, c, alpha=1.0, beta=1.0)
    # s = 1: a + (b - a) / 2;  s = 0: a + b;  s = 3/4: a + b/4 + 3/8 (b - a).
    assert merged.tolist() == [2.0, 0.0, 3.75, 0.0]
    assert torch.equal(
        similarity_add_difference(A, B, C, alpha=0.7, beta=0.0), add_difference(A, B, C, alpha=0.7)
    )
    assert torch.equal(similarity_add_difference(A, B, C, alpha=0.0, beta=0.4), A)


def test_train_difference_by_hand() -> None:
    a, b, c = tensor(1.0, 3.0, 2.0, 5.0), tensor(3.0, 3.0, 2.0, 1.0), tensor(2.0, 1.0, 2.0, 3.0)
    merged = train_difference(a, b, c)
    # Far from b: 1.8 * 2/3 * 1;  at b already: 0;  all equal: 0;  beyond: 1.8 * 4/6 * -2.
    close(merged, [2.2, 3.0, 2.0, 2.6])
    assert torch.equal(train_difference(A, B, C, alpha=0.0), A)


def test_slerp_by_hand() -> None:
    a, b = tensor(1.0, 0.0), tensor(0.0, 2.0)
    close(slerp(a, b), [1.5 * math.sqrt(0.5), 1.5 * math.sqrt(0.5)])
    third = slerp(a, b, alpha=1 / 3)
    close(third, [4 / 3 * math.cos(math.pi / 6), 4 / 3 * math.sin(math.pi / 6)])
    assert torch.equal(slerp(a, b, alpha=0.0), a)
    assert torch.equal(slerp(a, b, alpha=1.0), b)


def test_slerp_keeps_the_length_where_the_weighted_sum_shrinks() -> None:
    a, b = inputs("slerp", (30, 20))
    b *= a.norm() / b.norm()
    torch.testing.assert_close(slerp(a, b).norm(), a.norm())
    assert weighted_sum(a, b).norm() < 0.8 * a.norm()


@pytest.mark.parametrize("other", [2.0, -1.0, 0.0])
def test_slerp_of_parallel_opposite_or_zero_vectors_is_the_weighted_sum(other: float) -> None:
    assert torch.equal(slerp(A, other * A, alpha=0.3), weighted_sum(A, other * A, alpha=0.3))


def test_slerp_goes_over_smoothly_into_the_weighted_sum() -> None:
    a, b = tensor(1.0, 0.0), tensor(1.0, 2e-6)
    torch.testing.assert_close(slerp(a, b, alpha=0.3), weighted_sum(a, b, alpha=0.3))


def test_cosine_add_difference_a_by_hand() -> None:
    # Columns: the same direction (cos 1), perpendicular (cos 0).
    a, b = tensor([1.0, 0.0], [0.0, 1.0]), tensor([2.0, 1.0], [0.0, 0.0])
    close(cosine_add_difference_a(a, b, alpha=0.0), [[1.0, 1.0], [0.0, 0.0]])
    close(cosine_add_difference_a(a, b, alpha=0.25), [[1.25, 1.0], [0.0, 0.0]])
    assert torch.equal(cosine_add_difference_a(a, b, alpha=1.0), b)


def test_cosine_add_difference_b_by_hand() -> None:
    a, b = tensor([1.0, 0.0], [0.0, 1.0]), tensor([2.0, 1.0], [0.0, 0.0])
    whole = 2 / math.sqrt(2 * 5)
    first, second = (1 + whole) / 2, whole / 2
    expected = [[1 + (1 - first), 1 - second], [0.0, second]]
    close(cosine_add_difference_b(a, b, alpha=0.0), expected)
    assert torch.equal(cosine_add_difference_b(a, b, alpha=1.0), b)


@pytest.mark.parametrize("function", [cosine_add_difference_a, cosine_add_difference_b])
def test_cosine_add_difference_takes_b_where_a_is_zero_or_opposite(function: Method) -> None:
    assert torch.equal(function(ZERO, tensor(1.0, 2.0), alpha=0.0), tensor(1.0, 2.0))
    assert torch.equal(function(tensor(-1.0, -2.0), tensor(1.0, 2.0)), tensor(1.0, 2.0))


def test_euclidean_add_difference_by_hand() -> None:
    merged = euclidean_add_difference(tensor(3.0, 4.0), tensor(0.0, 5.0), ZERO)
    # e = (.6, .8), f = (0, 1), m = (1.5, 4.5); d = sqrt of (.18, .82) has length 1.
    length = math.sqrt(1.5**2 + 4.5**2)
    close(merged, [length * math.sqrt(0.18), length * math.sqrt(0.82)])
    close(euclidean_add_difference(A, B, C, alpha=0.0), A)
    close(euclidean_add_difference(A, B, C, alpha=1.0), B)


def test_euclidean_add_difference_without_any_difference_returns_c() -> None:
    assert torch.equal(euclidean_add_difference(C, C, C), C)


def test_perpendicular_component_by_hand() -> None:
    a, b = tensor(1.0, 0.0), tensor(2.0, 3.0)
    assert perpendicular_component(a, b, ZERO).tolist() == [1.0, 3.0]
    assert perpendicular_component(a, b, ZERO, alpha=0.5).tolist() == [1.0, 1.5]
    assert torch.equal(perpendicular_component(a, b, ZERO, alpha=0.0), a)


def test_perpendicular_component_adds_nothing_twice() -> None:
    a, _, c = inputs("add_difference", (7, 5))
    torch.testing.assert_close(perpendicular_component(a, c + 3 * (a - c), c), a)


def test_perpendicular_component_to_no_difference_is_the_whole_difference() -> None:
    close(perpendicular_component(C, B, C), B)


def test_model_stock_by_hand() -> None:
    b, c, d = tensor(1.0, 0.0), tensor(1.0, 1.0), tensor(0.0, 1.0)
    two = 2 * math.sqrt(0.5) / (1 + math.sqrt(0.5))
    close(model_stock(ZERO, b, c), [two, two / 2])
    cosine = (math.sqrt(0.5) + 0 + math.sqrt(0.5)) / 3
    three = 3 * cosine / (1 + 2 * cosine)
    close(model_stock(ZERO, b, c, d), [three * 2 / 3, three * 2 / 3])
    close(model_stock(ZERO, b, c, alpha=0.5), [two / 2, two / 4])


def test_model_stock_of_models_that_agree_is_their_mean_and_of_others_the_ancestor() -> None:
    close(model_stock(C, C + A, C + 3 * A), C + 2 * A)
    assert torch.equal(model_stock(C, C + A, C - A), C)
    assert torch.equal(model_stock(C, C, C + A), C)
    assert torch.equal(model_stock(C, C + A, C + 2 * A, alpha=0.0), C)


def test_lengths_of_large_tensors_are_exact() -> None:
    # In float32, torch's norm of so many numbers is off by a percent.
    a = torch.full((2**25,), 0.1)
    b = a.clone()
    b[: 2**24] = 0
    # The angle is that between a square's diagonal and its side.
    length, angle = (1 + math.sqrt(0.5)) / 2, math.pi / 4
    directions = 1 + math.sqrt(2)
    close(slerp(a, b)[-1], 0.1 * length * math.sin(angle / 2) / math.sin(angle) * directions)


ROWS_A, ROWS_B = torch.zeros(4, 2), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("alpha", "beta", "of_b"),
    [
        (0.0, 0.7, []),
        (0.5, 0.0, [0, 1]),
        (0.5, 0.25, [1, 2]),
        (0.5, 0.75, [0, 3]),
        (0.25, 1.0, [0]),
        (0.6, 0.0, [0, 1]),
        (1.0, 0.3, [0, 1, 2, 3]),
    ],
)
def test_tensor_sum_by_hand(alpha: float, beta: float, of_b: list[int]) -> None:
    merged = tensor_sum(ROWS_A, ROWS_B, alpha=alpha, beta=beta)
    assert [i for i in range(4) if merged[i].all()] == of_b
    assert not merged[[i for i in range(4) if i not in of_b]].any()


def test_tensor_sum_of_a_number_is_the_larger_share() -> None:
    assert tensor_sum(torch.tensor(1.0), torch.tensor(2.0), alpha=0.4).item() == 1.0
    assert tensor_sum(torch.tensor(1.0), torch.tensor(2.0), alpha=0.6).item() == 2.0


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (1.0, 0.0, [-2.0, 4.0, 1.0, 3.0]),
        (1.0, 0.5, [-2.0, 4.0, 1.0, 3.0]),
        (0.5, 0.0, [-2.0, 1.0, 1.0, 4.0]),
        (0.5, 0.5, [3.0, 4.0, -2.0, 3.0]),
        (0.5, 0.75, [3.0, 4.0, 1.0, 4.0]),
        (0.0, 0.4, [3.0, 1.0, -2.0, 4.0]),
    ],
)
def test_top_k_tensor_sum_by_hand(alpha: float, beta: float, expected: list[float]) -> None:
    # Sorted a is -2, 1, 3, 4, and b has the ranks 0, 3, 1, 2.
    a, b = tensor(3.0, 1.0, -2.0, 4.0), tensor(10.0, 40.0, 20.0, 30.0)
    assert top_k_tensor_sum(a, b, alpha=alpha, beta=beta).tolist() == expected


def test_top_k_tensor_sum_of_all_has_the_values_of_a_and_the_order_of_b() -> None:
    a, b = inputs("top_k_tensor_sum", (9, 8))
    merged = top_k_tensor_sum(a, b, alpha=1.0)
    assert torch.equal(merged.flatten().sort().values, a.flatten().sort().values)
    assert torch.equal(merged.flatten().argsort(), b.flatten().argsort())


def test_distribution_crossover_by_hand() -> None:
    # Two frequencies: 0 is the mean, which a gives, and 1/2 the difference, which b gives.
    a, b, c = tensor(1.0, 1.0), tensor(4.0, 2.0), tensor(0.0, 1.0)
    close(distribution_crossover(a, b, c, alpha=0.5, beta=0.0), [2.0, 0.0])
    # A ramp of width 1 about 1/2: f is 0 at 0 and 1/2 at 1/2.
    close(distribution_crossover(a, b, c, alpha=0.5, beta=1.0), [1.5, 0.5])


def test_distribution_crossover_without_softness_is_a_at_1_and_b_at_0() -> None:
    a, b, c = inputs("distribution_crossover", (5, 5))
    assert torch.equal(distribution_crossover(a, b, c, alpha=1.0, beta=0.0), a)
    close(distribution_crossover(a, b, c, alpha=0.0, beta=0.0), b)
    number = [torch.tensor(1.0), torch.tensor(3.0), torch.tensor(0.0)]
    assert distribution_crossover(*number, alpha=0.25).item() == 2.5


def test_distribution_crossover_depends_on_the_order_of_c_and_not_on_the_positions() -> None:
    a, b, c = inputs("distribution_crossover", (40,))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    merged = distribution_crossover(a, b, c, alpha=0.4, beta=0.3)
    moved = distribution_crossover(a[order], b[order], c[order], alpha=0.4, beta=0.3)
    torch.testing.assert_close(moved, merged[order])


TIES_A = tensor(4.0, 1.0, -3.0, 5.0, 0.0)
TIES_B = tensor(2.0, 6.0, 5.0, -1.0, 0.0)


def test_ties_add_difference_by_hand() -> None:
    c = torch.zeros(5)
    everything = ties_add_difference(TIES_A, TIES_B, c, beta=1.0)
    # Both up; both up; in conflict; in conflict; untouched.
    assert everything.tolist() == [3.0, 3.5, 0.0, 0.0, 0.0]
    # The three largest: a's 1 goes, and so does b's -1.
    trimmed = ties_add_difference(TIES_A, TIES_B, c, beta=0.6)
    assert trimmed.tolist() == [3.0, 6.0, 0.0, 5.0, 0.0]
    half = ties_add_difference(TIES_A, TIES_B, c, alpha=0.5, beta=0.6)
    assert half.tolist() == [1.5, 3.0, 0.0, 2.5, 0.0]
    assert torch.equal(ties_add_difference(A, B, C, beta=0.0), C)
    assert torch.equal(ties_add_difference(A, B, C, alpha=0.0), C)


def test_ties_by_hand() -> None:
    ancestor = torch.zeros(5)
    # In a conflict the larger difference wins.
    assert ties(ancestor, TIES_A, TIES_B, density=1.0).tolist() == [3.0, 3.5, 5.0, 5.0, 0.0]
    third = tensor(-5.0, 2.0, -4.0, 1.0, 0.0)
    merged = ties(ancestor, TIES_A, TIES_B, third, density=1.0)
    assert merged.tolist() == [3.0, 3.0, -3.5, 3.0, 0.0]
    assert ties(ancestor, TIES_A, density=0.4).tolist() == [4.0, 0.0, 0.0, 5.0, 0.0]
    assert torch.equal(ties(A, B, C, density=0.0), A)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dare_keeps_the_density_and_scales_by_it() -> None:
    a, c = torch.zeros(100_000), torch.zeros(100_000)
    merged = dare_add_difference(a, c + 2, c, alpha=0.5, density=0.25, generator=chance())
    assert set(merged.tolist()) == {0.0, 4.0}
    # Four standard deviations of the share that is kept.
    assert float((merged > 0).float().mean()) == pytest.approx(0.25, abs=0.0055)


def test_dare_at_the_ends() -> None:
    a, b, c = inputs("dare_add_difference")
    kept = dare_add_difference(a, b, c, alpha=0.7, density=1.0, generator=chance())
    assert torch.equal(kept, add_difference(a, b, c, alpha=0.7))
    assert torch.equal(dare_add_difference(a, b, c, density=0.0, generator=chance()), a)
    assert torch.equal(dare_add_difference(a, b, c, alpha=0.0, generator=chance()), a)


def test_della_keeps_the_larger_more_often_and_the_mean_as_it_is() -> None:
    sizes = torch.arange(1.0, 101.0)
    rows = sizes.expand(4_000, 100).clone()
    merged = della(torch.zeros_like(rows), rows, density=0.4, epsilon=0.5, generator=chance())
    kept = (merged > 0).float().mean(0)
    expected = 0.4 + 0.5 * ((sizes - 0.5) / 100 - 0.5)
    assert float((kept - expected).abs().max()) < 0.04  # five standard deviations
    torch.testing.assert_close(merged.mean(0), sizes, rtol=0.15, atol=0)
    torch.testing.assert_close(merged[merged > 0], (rows / expected)[merged > 0])


def test_della_narrows_the_window_at_the_ends() -> None:
    a, b, c = inputs("della", (50, 20), n=3)
    everything = della(a, b, c, density=1.0, epsilon=0.3, generator=chance())
    assert torch.equal(everything, ties(a, b, c, density=1.0))
    assert torch.equal(della(a, b, c, density=0.0, epsilon=0.3, generator=chance()), a)
    low = della(torch.zeros_like(b), b, density=0.1, epsilon=1.0, generator=chance())
    assert float((low != 0).float().mean()) == pytest.approx(0.1, abs=0.04)


def test_della_without_a_window_drops_like_dare() -> None:
    a, b, _ = inputs("dare_add_difference", (40, 30))
    merged = della(a, b, density=0.3, epsilon=0.0, generator=chance())
    close(merged, dare_add_difference(a, b, a, density=0.3, generator=chance()))


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


@pytest.fixture
def sd_mecha() -> Any:
    return pytest.importorskip("sd_mecha", reason="the extra [mecha] is not installed")


def of_mecha(name: str, *models: Tensor, **weights: float) -> Tensor:
    function: Callable[..., Tensor] = methods.get(f"mecha:{name}")
    return function(*models, **weights)


@pytest.mark.usefixtures("sd_mecha")
def test_mecha_methods_follow_the_contract() -> None:
    assert {"mecha:weighted_sum", "mecha:rotate", "mecha:ties_sum_extended"} <= set(mecha.names())
    function = methods.get("mecha:crossover")
    assert methods.n_models(function) == 2
    assert methods.weights(function) == {"alpha": 0.5, "tilt": 0.0}
    assert methods.domains(function) == {}
    assert not methods.takes_more(function)
    assert not methods.is_random(function)
    assert not methods.is_elementwise(function)
    dropout = methods.get("mecha:dropout")
    assert (methods.n_models(dropout), methods.takes_more(dropout)) == (2, True)
    assert methods.is_random(dropout)


@pytest.mark.usefixtures("sd_mecha")
def test_mecha_methods_merge_and_leave_their_models_alone() -> None:
    for name in set(mecha.names()) - {"mecha:stack"}:  # which changes the shape
        function = methods.get(name)
        models = inputs("add_difference", (6, 4))[: max(2, methods.n_models(function))]
        models += [models[0] + 1] if methods.takes_more(function) else []
        before = [tensor.clone() for tensor in models]
        given = {"generator": chance()} if methods.is_random(function) else {}
        merged = function(*models, **methods.weights(function), **given)
        assert merged.shape == (6, 4), name
        assert merged.dtype == torch.float32, name
        assert all(map(torch.equal, models, before)), name


@pytest.mark.usefixtures("sd_mecha")
def test_mecha_method_on_models_and_numbers() -> None:
    close(of_mecha("weighted_sum", A, B, alpha=0.25), weighted_sum(A, B, alpha=0.25))
    close(of_mecha("slerp", A, B, alpha=0.25), slerp(A, B, alpha=0.25))
    close(of_mecha("n_average", A, B, C), n_average(A, B, C))


@pytest.mark.usefixtures("sd_mecha")
def test_mecha_method_on_differences_has_its_ancestor_first() -> None:
    close(of_mecha("add_difference", C, A, B, alpha=0.5), add_difference(A, B, C, alpha=0.5))
    close(of_mecha("scale", A, B, alpha=0.25), weighted_sum(A, B, alpha=0.25))
    assert torch.equal(of_mecha("scale", A, B, alpha=0.0), A)  # for which it returns a number
    close(of_mecha("ties_sum", C, A, B, k=1.0), ties_add_difference(A, B, C, beta=1.0))


@pytest.mark.usefixtures("sd_mecha")
def test_mecha_method_with_a_seed_draws_it() -> None:
    a, b = inputs("weighted_sum", (20, 10))
    drop = methods.get("mecha:dropout")
    first, again, other = (drop(a, b, probability=0.5, generator=chance(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.usefixtures("sd_mecha")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("subtract", "returns a difference"),
        ("train_difference_mask", "does not return a tensor of a model"),
        ("pick_component", "has an option without a default, 'component'"),
        ("rebasin", "works on whole models"),
        ("cast", "takes one model only"),
        ("exchange_ema_'sd1-ldm'", "is for sd1-ldm only"),
    ],
)
def test_mecha_method_that_is_no_function_of_tensors_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be used: it {reason}"):
        methods.get(f"mecha:{name}")
    assert f"mecha:{name}" not in mecha.names()


@pytest.mark.usefixtures("sd_mecha")
def test_mecha_method_that_does_not_exist_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown merge method .* did you mean 'mecha:rotate'"):
        methods.get("mecha:rotat")


@pytest.mark.usefixtures("sd_mecha")
def test_mecha_method_that_fails_has_no_value() -> None:
    with pytest.raises(TrialError, match="mecha:crossover: ValueError: alpha must be between 0"):
        of_mecha("crossover", A, B, alpha=2.0, tilt=0.5)


def test_missing_sd_mecha_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sd_mecha", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[mecha\]'"):
        methods.get("mecha:rotate")


def test_crossover_over_a_width_that_float32_cannot_hold_is_a_step() -> None:
    a, b, c = (torch.tensor([x, 2 * x]) for x in (1.0, 2.0, 3.0))
    crossover = methods.get("distribution_crossover")
    step = crossover(a, b, c, alpha=0.0, beta=0.0)
    assert torch.equal(crossover(a, b, c, alpha=0.0, beta=5e-206), step)
