"""The memory and the arithmetic that an image with its gradient needs on a GPU, counted without one.

The modules of Stable Diffusion 1.5 and SDXL compute on tensors that have a size and no numbers, and
every storage counts from its first tensor to its last. A GPU's attention never holds the scores of all
pairs of positions, so the operation of such a device stands in for the CPU's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from test_names import known_layout
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bayesian_merger.backends.diffusers import (
    _CALL,
    _GRAPH,
    _SPARE_GRAPH,
    Diffusers,
    _Texts,
)

GB = 10**9


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that are in use at once, beside those of `known` tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, inputs: Any = (), options: Any = None
    ) -> Any:
        found = function(*inputs, **(options or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, address: int, n_bytes: int) -> None:
        self.now -= n_bytes
        self._known.remove(address)


@pytest.fixture
def back_end(monkeypatch: pytest.MonkeyPatch) -> Diffusers:
    return back_end_of("sd1", "sd1-ldm", monkeypatch)


@pytest.fixture
def xl(monkeypatch: pytest.MonkeyPatch) -> Diffusers:
    return back_end_of("sdxl", "sdxl-sgm", monkeypatch)


def back_end_of(architecture: str, file: str, monkeypatch: pytest.MonkeyPatch) -> Diffusers:
    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return found

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    found = Diffusers(device="cpu")
    found._device, found._dtype = torch.device("meta"), torch.float16
    found._makes_calls_again = True
    shapes = {n: s for n, s in known_layout(file).items() if not n.startswith("edm_")}
    found._build(
        architecture, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )
    return found


def weights(back_end: Diffusers) -> list[Tensor]:
    parts = [getattr(back_end._pipe, part) for part in back_end._tables]
    return [tensor for part in parts for tensor in part.state_dict().values()]


def works(back_end: Diffusers, size: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A step of the U-Net with guidance, by all its weights, and then the VAE."""
    pipe = back_end._pipe

    def folded(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in pipe.unet.parameters():
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(folded)
    side = size // 8
    latents, one = (
        torch.empty(n, 4, side, side, dtype=dtype, device="meta", requires_grad=True)
        for n, dtype in ((2, torch.float16), (1, torch.float32))
    )
    width, summary = pipe.unet.config.cross_attention_dim, 1280
    states, summaries = (
        torch.empty(2, *shape, dtype=torch.float16, device="meta")
        for shape in ((77, width), (summary,))
    )
    texts = _Texts(states, summaries)
    time = torch.empty((), dtype=torch.long, device="meta")
    return lambda: back_end._noise(latents, time, texts), lambda: pipe.vae.decode(one).sample


def followed(work: Callable[[], Tensor]) -> None:
    torch.autograd.backward(work().sum())


def most(back_end: Diffusers, size: int) -> int:
    """Bytes beside the weights."""
    found = 0
    for work in works(back_end, size):
        with Counting(weights(back_end)) as counting:
            followed(work)
        found = max(found, counting.most)
    return found


def operations(work: Callable[[], object]) -> int:
    """Of floating-point numbers."""
    with FlopCounterMode(display=False) as counting:
        work()
    return int(counting.get_total_flops())


@pytest.mark.parametrize(
    ("size", "spares", "limit"),
    [
        (512, False, 8.5),
        pytest.param(512, True, 4.5, marks=pytest.mark.slow),
        pytest.param(768, True, 7, marks=pytest.mark.slow),
        (1024, True, 10.5),
    ],
)
def test_image_with_its_gradient_fits_into_a_small_gpu(
    back_end: Diffusers, size: int, spares: bool, limit: float
) -> None:
    if spares:
        back_end._make_parts_again()
    held = sum(tensor.nbytes for tensor in weights(back_end))
    assert 2.1 * GB < held < 2.5 * GB
    whole = held + most(back_end, size)
    assert 0.9 * limit * GB < whole < limit * GB


@pytest.mark.slow
def test_image_of_sdxl_with_its_gradient_fits_into_a_gpu_of_16_gb(xl: Diffusers) -> None:
    held = sum(tensor.nbytes for tensor in weights(xl))
    assert 7.0 * GB < held < 7.2 * GB
    assert held + most(xl, 1024) == pytest.approx(31.5 * GB, rel=0.01)
    xl._make_parts_again()
    assert held + most(xl, 1024) < 15 * GB
    assert most(xl, 1024) == pytest.approx(_SPARE_GRAPH * 1024**2, rel=0.05)


@pytest.mark.slow
def test_arithmetic_of_an_image_of_sdxl_where_parts_are_made_again(xl: Diffusers) -> None:
    xl._make_parts_again()
    step, decode = works(xl, 1024)
    with torch.no_grad():
        plain_step, plain_decode = operations(step), operations(decode)
    with_step, with_decode = (operations(partial(followed, work)) for work in (step, decode))
    prices = [
        ((20 - last) * plain_step + last * with_step + with_decode)
        / (20 * plain_step + plain_decode)
        for last in (1, 4, 20)
    ]
    assert prices == pytest.approx([1.3, 1.8, 4.8], abs=0.05)


def test_what_a_graph_needs_is_known_beforehand(back_end: Diffusers) -> None:
    assert most(back_end, 512) == pytest.approx(_GRAPH * 512**2, rel=0.05)
    back_end._make_parts_again()
    assert most(back_end, 512) == pytest.approx(_SPARE_GRAPH * 512**2, rel=0.05)


def test_what_the_graph_of_a_call_needs_on_a_cpu_is_known_beforehand(back_end: Diffusers) -> None:
    back_end._makes_calls_again = False
    call, _ = works(back_end, 512)
    with Counting(weights(back_end)) as counting:
        noise = call()
        kept = counting.now
    assert noise.requires_grad
    # In half precision here, so half of it.
    assert kept == pytest.approx(_CALL * 320 * 512**2 / 2, rel=0.1)


@pytest.mark.parametrize(
    ("last", "spares", "price"),
    [
        (1, False, 1.2),
        pytest.param(1, True, 1.3, marks=pytest.mark.slow),
        pytest.param(4, False, 1.6, marks=pytest.mark.slow),
        (4, True, 1.9),
        (20, False, 3.9),
    ],
)
def test_arithmetic_of_an_image_with_its_gradient_is_so_many_times_that_of_an_image(
    back_end: Diffusers, last: int, spares: bool, price: float
) -> None:
    if spares:
        back_end._make_parts_again()
    step, decode = works(back_end, 512)
    with torch.no_grad():
        plain_step, plain_decode = operations(step), operations(decode)
    whole = (20 - last) * plain_step + last * operations(partial(followed, step))
    whole += operations(partial(followed, decode))
    assert whole / (20 * plain_step + plain_decode) == pytest.approx(price, abs=0.05)
