"""How fast each merge method is and how much memory it takes, beside sd-meh's and sd-mecha's.

    python bench/methods.py --peers PYTHON [--large] [METHOD ...]

merges the same float32 tensors with the same weights by ours and by theirs, in one thread each and
in turn, since the speed of a shared machine drifts. It prints the median time of a call, and the
peak of further memory in sizes of the tensor, the result included. PYTHON is that of an environment
with sd-meh and sd-mecha (`make peers` makes .venv-peers); without METHOD all methods are measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from pathlib import Path
from statistics import median

import torch
from method_peers import MEASURES
from safetensors.torch import save_file
from torch import Tensor

from bayesian_merger import methods

SHAPES = {"1280x1280": (1280, 1280), "3072x768": (3072, 768), "768x49408": (768, 49408)}
LARGE = "768x49408"
TOOLS = ("ours", "sd-meh", "sd-mecha")
# Other than 0, 1/2 and 1, for which some have a shorter way; what is not here has its defaults.
WEIGHTS: dict[str, dict[str, float]] = {
    "add_difference": {"alpha": 0.7},
    "cosine_add_difference_a": {"alpha": 0.3},
    "cosine_add_difference_b": {"alpha": 0.3},
    "dare_add_difference": {"alpha": 0.7, "density": 0.4},
    "della": {"alpha": 0.7, "density": 0.4, "epsilon": 0.14},
    "distribution_crossover": {"alpha": 0.3, "beta": 0.6},
    "euclidean_add_difference": {"alpha": 0.3},
    "multiply_difference": {"alpha": 0.3, "beta": 0.6},
    "perpendicular_component": {"alpha": 0.7},
    "similarity_add_difference": {"alpha": 0.7, "beta": 0.6},
    "slerp": {"alpha": 0.3},
    "sum_twice": {"alpha": 0.3, "beta": 0.6},
    "tensor_sum": {"alpha": 0.4, "beta": 0.25},
    "ties": {"alpha": 0.7, "density": 0.2},
    "ties_add_difference": {"alpha": 0.7, "beta": 0.2},
    "top_k_tensor_sum": {"alpha": 0.4, "beta": 0.25},
    "train_difference": {"alpha": 0.3},
    "triple_sum": {"alpha": 0.3, "beta": 0.6},
    "weighted_subtraction": {"alpha": 0.3, "beta": 0.6},
    "weighted_sum": {"alpha": 0.3},
}
ANCESTOR_FIRST = ("della", "model_stock", "ties")
N_TURNS = 5
N_LONG_TURNS = 3
"""For calls of more than a second."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--peers", type=Path, required=True, help="python with sd-meh, sd-mecha")
    parser.add_argument("--large", action="store_true", help="an embedding of 152 MB as well")
    parser.add_argument("method", nargs="*", help="measure these only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.method or methods.method.names()
    shapes = [shape for shape in SHAPES if options.large or shape != LARGE]
    models = {f"{shape} {k}": m for shape in shapes for k, m in made(SHAPES[shape]).items()}
    print(f"{platform.machine()}, torch {torch.__version__}, 1 thread; ms, and memory in tensors")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "models.safetensors"
        save_file(models, file)
        script = Path(__file__).with_name("method_peers.py")
        with subprocess.Popen(
            [options.peers, script, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as peers:
            measure = partial(measured, models, peers)
            # All of them before the first time, which is taken with other settings of the memory.
            rooms = {
                (shape, name): {tool: measure("room", tool, shape, name) for tool in TOOLS}
                for shape in shapes
                for name in names
            }
            for shape in shapes:
                table(shape, {name: rooms[shape, name] for name in names}, measure)


def made(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """An ancestor c of normal numbers of sd 0.02, and models a and b near it."""
    chance = torch.Generator().manual_seed(0)
    c, d, e = (0.02 * torch.randn(shape, generator=chance) for _ in range(3))
    return {"a": c + 0.1 * d, "b": c + 0.1 * e, "c": c}


def measured(
    models: Mapping[str, Tensor],
    peers: subprocess.Popen[str],
    measure: str,
    tool: str,
    shape: str,
    name: str,
) -> float | None:
    """The measure ("room" or "ms") of a method; None if the tool does not have it."""
    if tool == "ours":
        return MEASURES[measure](ours(name, {k: models[f"{shape} {k}"] for k in "abc"}))
    assert peers.stdin
    assert peers.stdout
    question = {"measure": measure, "tool": tool, "shape": shape, "method": name}
    print(json.dumps(question | {"weights": WEIGHTS.get(name, {})}), file=peers.stdin, flush=True)
    answer = peers.stdout.readline()
    if not answer:
        sys.exit("the process of the peers has ended; its last words stand above")
    found: float | None = json.loads(answer)
    return found


def ours(name: str, models: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Our method with its models and weights."""
    function = methods.get(name)
    n = 3 if methods.takes_more(function) else methods.n_models(function)
    order = "cab" if name in ANCESTOR_FIRST else "abc"
    run = partial(function, *(models[letter] for letter in order[:n]), **WEIGHTS.get(name, {}))
    if methods.is_random(function):
        return partial(run, generator=torch.Generator().manual_seed(0))
    return run


def table(
    shape: str,
    rooms: Mapping[str, Mapping[str, float | None]],
    measure: Callable[..., float | None],
) -> None:
    """Print a row for each method, and which of ours are slower than the faster peer's."""
    print(f"\n{shape}\n{'':26}" + "".join(f"{tool:>20}" for tool in TOOLS))
    slower = []
    for name, room in rooms.items():
        times = turns(
            {t: partial(measure, "ms", t, shape, name) for t in TOOLS if room[t] is not None}
        )
        cells = (f"{times[t]:13.1f} {room[t]:6.1f}" if t in times else f"{'-':>20}" for t in TOOLS)
        print(f"{name:26}" + "".join(cells), flush=True)
        ratio = times.pop("ours") / min(times.values(), default=inf)
        if ratio > 1.1:
            slower.append(f"{name} {ratio:.2f} x")
    print(f"slower than the faster peer by more than 10 %: {', '.join(slower) or 'none'}")


def turns(tools: Mapping[str, Callable[[], float | None]]) -> dict[str, float]:
    """The median time of each tool, after all in turn."""
    times: dict[str, list[float]] = {tool: [] for tool in tools}
    for turn in range(N_TURNS):
        for tool, time_of in tools.items():
            if turn < N_LONG_TURNS or times[tool][0] < 1e3:
                spent = time_of()
                assert spent is not None
                times[tool].append(spent)
    return {tool: median(all_spent) for tool, all_spent in times.items()}


if __name__ == "__main__":
    main()
