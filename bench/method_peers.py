"""The merge methods of sd-meh and sd-mecha, measured in their own Python; bench/methods.py runs it.

    python bench/method_peers.py MODELS.safetensors

answers lines of JSON, {"tool", "method", "weights", "shape", "measure"}, with a number or, where the
tool has no such method, null. The measures are "ms" and "room", as below.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from merge_peers import Peak, anonymous_gb
from torch import Tensor

ORACLE = Path(__file__).parents[1] / "tests" / "peers"
TURN_S = 0.1
PEAK_S = 0.3
LIBC = ctypes.CDLL(None)  # glibc, or nothing is measured
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# What is freed goes back to the system and does not hide what is taken again: for `room`.
LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 16)


def room(run: Callable[[], Tensor]) -> float:
    """The peak of further memory during a call, in sizes of its result, which is part of it.

    To be measured before any time is.
    """
    size = run().nbytes  # the first call also loads what stays
    before, start = anonymous_gb(), time.perf_counter()
    with Peak() as peak:
        while time.perf_counter() - start < PEAK_S:  # a short call ends between two looks
            run()
    return 1.024e9 * (peak.gb - before) / size  # what the system calls kB is 1024 bytes


def milliseconds(run: Callable[[], object]) -> float:
    """The time of one call: the median of as many as fit in a turn, at least one."""
    # Where glibc itself arrives in a program that frees tensors of all sizes. To get memory anew each
    # time takes longer than a weighted sum.
    LIBC.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    LIBC.mallopt(M_TRIM_THRESHOLD, 64 << 20)
    spent: list[float] = []
    end = time.perf_counter() + TURN_S
    while not spent or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return 1e3 * median(spent)


MEASURES: dict[str, Callable[[Callable[[], Tensor]], float]] = {"ms": milliseconds, "room": room}


def theirs() -> dict[str, dict[str, Callable[..., Tensor]]]:
    """By tool and our name, what merges the models a, b and c, of which it may leave out some.

    sd-mecha's own take differences and return them or masks; here they go from models to a model,
    as its recipes do.
    """
    sys.path.insert(0, str(ORACLE))
    from oracle import of_sd_mecha, of_sd_meh
    from sd_meh import merge_methods

    def meh(name: str) -> Callable[..., Tensor]:
        return lambda *models, **weights: of_sd_meh(name, list(models), weights)

    def mecha(name: str, *tensors: Tensor, **weights: float) -> Tensor:
        return of_sd_mecha(name, list(tensors), weights)

    def add(a: Tensor, difference: Tensor, alpha: float = 1.0) -> Tensor:
        return mecha("add_difference", a, difference, alpha=alpha)

    return {
        "sd-meh": {name: meh(name) for name in merge_methods.__all__},
        "sd-mecha": {
            "weighted_sum": lambda a, b, c, alpha: mecha("weighted_sum", a, b, alpha=alpha),
            # A copy, since theirs writes into it and ours leaves its models as they are.
            "tensor_sum": lambda a, b, c, alpha, beta: mecha(
                "tensor_sum", a.clone(), b, width=alpha, offset=beta
            ),
            "top_k_tensor_sum": lambda a, b, c, alpha, beta: mecha(
                "top_k_tensor_sum", a, b, width=alpha, offset=beta
            ),
            "add_difference": lambda a, b, c, alpha: add(a, b - c, alpha),
            "n_average": lambda a, b, c: mecha("n_average", a, b, c),
            "slerp": lambda a, b, c, alpha: mecha("slerp", a, b, alpha=alpha),
            "cosine_add_difference_a": lambda a, b, c, alpha: mecha(
                "add_cosine_a", a, b, alpha=alpha
            ),
            "cosine_add_difference_b": lambda a, b, c, alpha: mecha(
                "add_cosine_b", a, b, alpha=alpha
            ),
            "train_difference": lambda a, b, c, alpha: a.addcmul(
                b - c, mecha("train_difference_mask", a, b, c, alpha=alpha)
            ),
            "perpendicular_component": lambda a, b, c, alpha: add(
                a, mecha("perpendicular_component", a - c, b - c), alpha
            ),
            "model_stock": lambda a, b, c: add(c, mecha("model_stock", a - c, b - c)),
            "ties_add_difference": lambda a, b, c, alpha, beta: add(
                c, mecha("ties_sum", a - c, b - c, k=beta), alpha
            ),
            "ties": lambda a, b, c, alpha, density: add(
                c, mecha("ties_sum", a - c, b - c, k=density, vote_sgn=True), alpha
            ),
            "dare_add_difference": lambda a, b, c, alpha, density: add(
                a, mecha("dropout", b - c, probability=1 - density), alpha
            ),
            "della": lambda a, b, c, alpha, density, epsilon: add(
                c,
                mecha(
                    "ties_sum_with_dropout",
                    *(a - c, b - c),
                    probability=1 - density,
                    della_eps=epsilon,
                    k=1.0,
                    vote_sgn=True,
                    apply_stock=True,  # in theirs this leaves out the scaling of model stock
                ),
                alpha,
            ),
        },
    }


def main(file: Path) -> None:
    """Answer what standard input asks."""
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    known = theirs()
    for line in sys.stdin:
        asked = json.loads(line)
        method = known[asked["tool"]].get(asked["method"])
        models = [tensors[f"{asked['shape']} {letter}"] for letter in "abc"]
        run = method and partial(method, *models, **asked["weights"])
        print(json.dumps(run and MEASURES[asked["measure"]](run)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
