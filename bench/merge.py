"""How fast and how exact merges are, beside sd-meh, sd-mecha and a plain copy in memory.

    python bench/merge.py [--peers PYTHON] [--folder DIR] [--sdxl]

makes checkpoints of the full shape of SD1.5 (and SDXL: 27 GB of disk) from random numbers, and prints
medians in one run, since the speed of a shared machine drifts from hour to hour. PYTHON is that of an
environment with sd-meh and sd-mecha (`make peers` makes .venv-peers). Where CUDA is found, the
repeated merge is measured there too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program itself does

import torch
import yaml
from merge_peers import Peak, anonymous_gb
from torch import Tensor

from bayesian_merger import checkpoint, kernels, methods
from bayesian_merger.checkpoint import Checkpoint, Layout
from bayesian_merger.data import Recipe, Weights
from bayesian_merger.merge import Merger

LISTS = {"sd1": "sd1-ldm", "sdxl": "sdxl-sgm"}
N_TIMES = 7
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, help="python with sd-meh and sd-mecha")
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoints (default: not)")
    parser.add_argument("--sdxl", action="store_true", help="SDXL as well")
    parser.add_argument("--only-file", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.only_file:
        measure_file(*map(Path, options.only_file))
        return
    compiled = "compiled by LLVM" if kernels._compiler() else "without llvmlite"
    print(f"{platform.machine()}, torch {torch.__version__}, 2 threads, {compiled}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("sd1", "sdxl") if options.sdxl else ("sd1",):
            models = [made(kind, seed, folder) for seed in range(3 if kind == "sd1" else 2)]
            print(f"\n{kind}: {models[0].stat().st_size / 1e9:.3f} GB fp16")
            repeated(models, CPU)
            if torch.cuda.is_available():
                repeated(models, torch.device("cuda"))
            if kind == "sd1":
                exactness(models)
            files(models[:2], options.peers, folder)


def made(kind: str, seed: int, folder: Path) -> Path:
    """A checkpoint of full shape: normal numbers of sd 0.02, from seed 1 on with a tenth of noise."""
    path = folder / f"{kind}-{seed}.safetensors"
    if path.exists():
        return path
    layout = shapes(kind)

    def pieces(name: str) -> Iterator[Tensor]:
        entry = layout[name]
        n = entry.n_bytes // entry.dtype.itemsize
        if not entry.dtype.is_floating_point:
            yield torch.arange(n).to(entry.dtype)
            return
        for first in range(0, n, 1 << 22):
            size = min(1 << 22, n - first)
            chance = torch.Generator().manual_seed(hash_of(f"{name}/{first}"))
            values = torch.randn(size, generator=chance) * 0.02
            if seed:
                noise = torch.Generator().manual_seed(hash_of(f"{name}/{first}/{seed}"))
                values += torch.randn(size, generator=noise) * 0.002
            yield values.half()

    checkpoint.write(path, layout, pieces, {"format": "pt"})
    return path


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def shapes(kind: str) -> dict[str, Layout]:
    """Names and shapes of a whole checkpoint, from the lists that sd-mecha comes with."""
    spec = find_spec("sd_mecha")
    if spec is None or spec.origin is None:
        sys.exit(
            "sd-mecha is not installed; its lists of tensors are needed: pip install -e '.[dev]'"
        )
    folder = Path(spec.origin).parent / "extensions" / "builtin" / "model_configs"
    listed = yaml.safe_load((folder / f"{LISTS[kind]}.yaml").read_text())
    return {
        name: Layout(
            tuple(entry["shape"]),
            torch.int64 if entry["dtype"].startswith("int") else torch.float16,
        )
        for part in listed["components"].values()
        for name, entry in part.items()
        if not name.startswith("model_ema.")
    }


def repeated(models: list[Path], device: torch.device) -> None:
    """The merge that a run makes again and again, into the same live tensors."""
    merger = Merger([Checkpoint(path) for path in models], device)
    layout = merger.merge(recipe(merger, "weighted_sum")).layout
    live = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device=device)
        for name, entry in layout.items()
    }
    merged = [n for n in layout if merger.merge(recipe(merger, "weighted_sum")).weights(n)]
    n_bytes = sum(layout[n].n_bytes for n in merged)
    # Of a model that fills the memory only a part is copied for comparison.
    n_copied = n_bytes if n_bytes < 2e9 else 500_000_000
    source, target = (torch.empty(n_copied // 2, dtype=torch.float16, device=device) for _ in "ab")
    for tensor in (source, target):
        tensor.zero_()
    print(f"repeated merge into live tensors, {device}: {n_bytes / 1e9:.3f} GB are merged")
    names = ["weighted_sum", "add_difference", "sum_twice", "triple_sum"]
    for method in names[: 1 if len(models) < 3 else None]:
        merger.merge(recipe(merger, method)).write(live)

        def once(method: str = method) -> None:
            merger.merge(recipe(merger, method)).write(live)

        ours, part = alternately(once, lambda: target.copy_(source), device)
        copy = part * n_bytes / n_copied
        reads = methods.n_models(methods.get(method))
        speed = n_bytes * (reads + 1) / ours / 1e9
        print(
            f"  {method:15} {1e3 * ours:7.1f} ms, {speed:5.1f} GB/s; copy_ {1e3 * copy:6.1f} ms: "
            f"{ours / copy:.2f} x copy_"
        )
    blocks = merger.blocks
    for n in (1, 3, 13, len(blocks)):
        held = merger.merge(recipe(merger, "weighted_sum"))
        held.write(live)
        times = []
        for _ in range(N_TIMES):
            chosen = random.sample(blocks, n)
            weights = dict(held.recipe.weights["alpha"]) | {b: random.random() for b in chosen}
            start = time.perf_counter()
            new = merger.merge(recipe(merger, "weighted_sum", {"alpha": weights}))
            new.write(live, since=held)
            wait(device)
            times.append(time.perf_counter() - start)
            held = new
        print(f"  {n:2} of {len(blocks)} blocks changed {1e3 * statistics.median(times):7.1f} ms")


def exactness(models: list[Path]) -> None:
    """The error of fp16 results in units of their last place, over tensors of all blocks."""
    merger = Merger([Checkpoint(path) for path in models])
    print("exactness in fp16: share rounded correctly, mean and largest error in ulp")
    for method in ("weighted_sum", "add_difference", "sum_twice", "triple_sum"):
        merged = merger.merge(recipe(merger, method))
        right = total = 0
        error = worst = 0.0
        for name in list(merged.layout)[::20]:
            weights = merged.weights(name)
            if weights is None:
                continue
            tensors = [merger.models[i][name].double() for i in range(3)]
            function = methods.get(method)
            factors = methods.coefficients(function, weights, methods.n_models(function))
            exact = sum(t * f for t, f in zip(tensors, factors, strict=False))
            assert isinstance(exact, Tensor)
            found, nearest = merged[name], exact.half()
            right += int((found == nearest).sum())
            total += found.numel()
            step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2**-14))) - 10)
            errors = (found.double() - exact).abs() / step
            error += float(errors.sum())
            worst = max(worst, float(errors.max()))
        print(f"  {method:15} {100 * right / total:.3f} %, {error / total:.3f}, {worst:.4f}")


def files(models: list[Path], peers: Path | None, folder: Path) -> None:
    """A merge from files to a file: ours and a plain write of as many bytes, then the peers."""
    out = folder / "out.safetensors"
    line = child([sys.executable, __file__, "--only-file", str(out), *map(str, models)])
    print(
        f"to a file, each tool in processes of its own, files cached by the system\n"
        f"  ours {line['s']:.2f} s ({line['s'] / line['write_s']:.2f} x a plain write with fsync, "
        f"{line['write_s']:.2f} s), {1e3 * line['gb']:.0f} MB of memory of its own, "
        f"{1e3 * line['all_gb']:.0f} MB with what the imports took"
    )
    if peers is None:
        return
    script = Path(__file__).with_name("merge_peers.py")
    for tool in ("sd-meh", "sd-mecha"):
        for target in ("memory", str(out)):
            where = "memory" if target == "memory" else "file"
            lines = [
                child([str(peers), str(script), tool, "weighted_sum", target, *map(str, models)])
                for _ in range(3)
            ]
            seconds = statistics.median(line["s"] for line in lines)
            gb = max(line["gb"] for line in lines)
            print(f"  {tool} to {where}: {seconds:.2f} s, {1e3 * gb:.0f} MB of memory of its own")
    out.unlink(missing_ok=True)


def measure_file(out: Path, *models: Path) -> None:
    """Print the figures of merges to `out`, and of plain writes of as many bytes, in turn."""
    block = os.urandom(1 << 24)
    before = anonymous_gb()

    def merge() -> None:
        merger = Merger([Checkpoint(path) for path in models])
        merger.merge(recipe(merger, "weighted_sum")).save(out)

    merge()  # so that the system holds the models
    n_bytes = out.stat().st_size
    out.unlink()

    def write() -> None:
        with out.open("wb") as file:
            for first in range(0, n_bytes, len(block)):
                file.write(block[: n_bytes - first])
            file.flush()
            os.fsync(file.fileno())

    with Peak() as peak:
        seconds, plain = alternately(merge, write, after=out.unlink)
    found = {"s": seconds, "write_s": plain, "gb": peak.gb - before, "all_gb": peak.gb}
    print(json.dumps(found))


def child(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def recipe(merger: Merger, method: str, weights: Weights | None = None) -> Recipe:
    """A recipe with random weights in [0, 1] for each block."""
    names = methods.weights(methods.get(method))
    drawn = {w: {b: random.random() for b in merger.blocks} for w in names}
    return Recipe(method, merger.architecture.name, (), weights or drawn)


def alternately(
    one: Callable[[], object],
    other: Callable[[], object],
    device: torch.device = CPU,
    after: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Medians of both in seconds, one after the other in turn; what is done `after` is not counted."""
    times: Mapping[Callable[[], object], list[float]] = {one: [], other: []}
    for _ in range(N_TIMES):
        for run, spent in times.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            spent.append(time.perf_counter() - start)
            after()
    return statistics.median(times[one]), statistics.median(times[other])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
