"""How a run goes with 1 to many workers: python bench/scale.py regret|throughput|asks [...]

regret: simulated workers, whose images take a time that varies, on instances of bench/landscapes.py:
    the normalised regret (0: the best merge; 1: the mean of random ones) of what is recommended after so
    many images, and the simulated hours until then, for each number of workers. Proposals are made one
    after another, and each takes in the simulation what it took this machine's processor.
throughput: a run of the toy models of the tests by --workers 1 and 4, real processes whose images
    sleep: images a second of the search, and how many times that of one worker it is.
asks: workers that only sleep, all in one thread, at the board of a run in a storage (--storage URL):
    seconds from the question for a trial to its answer, and images a second.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import optuna
import toy_plugin
from landscapes import N_PAYLOADS, Landscape

from bayesian_merger import Search, config, run, setup
from bayesian_merger.judging import Silence
from bayesian_merger.outcome import open_study
from bayesian_merger.study.board import Board, Task
from bayesian_merger.study.search import SearchTrial
from bayesian_merger.study.storage import storage_errors

PANEL, IMAGE_S, MERGE_S = 50, 5.0, 4.0


class Found(NamedTuple):
    """What a search has come to: the regret, the simulated hours, and how long a proposal took since."""

    regret: float
    hours: float
    ask_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["regret", "throughput", "asks"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--images", nargs="+", type=int, default=[100, 200])
    parser.add_argument("--families", nargs="+", default=["smooth26", "corner26"])
    parser.add_argument("--instances", type=int, default=6)
    parser.add_argument("--image-s", type=float, default=2.0, help="of throughput: an image takes")
    parser.add_argument("--storage", metavar="URL", help="of asks; without it an SQLite file")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.what == "regret":
        print_regrets(options)
    elif options.what == "throughput":
        print_throughput(options.workers, options.image_s)
    else:
        for n in options.workers:
            print_asks(n, options.storage)


def searched(family: str, seed: int, n_workers: int, marks: Sequence[int]) -> dict[int, Found]:
    """Images -> what is found by then."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    landscape = Landscape(family, seed)
    names = [f"w{i:02}" for i in range(landscape.d)]
    payloads = [str(i % N_PAYLOADS) for i in range(PANEL)]
    search = Search(dict.fromkeys(names, (0.0, 1.0)), images=max(marks), panel=payloads, seed=seed)
    chance = np.random.default_rng([seed, 2])
    study, proposer = search._study, search._proposer
    flight: list[tuple[float, int, SearchTrial]] = []
    now = free = 0.0  # when who proposes is free again
    asks: list[float] = []
    found: dict[int, Found] = {}
    while True:
        free = max(free, now)
        is_idle = len(flight) < n_workers and (not flight or free <= flight[0][0])
        if is_idle and not proposer.is_promised():
            taken = {number for _, number, _ in flight}
            start = time.process_time()
            trial = SearchTrial(study, proposer.begin(taken=taken))
            ask_s = time.process_time() - start
            free += ask_s
            if trial.number >= proposer.plan.n_first:
                asks.append(ask_s)
            took = (IMAGE_S * len(trial._items) + MERGE_S) * chance.uniform(0.8, 1.25)
            heapq.heappush(flight, (free + took, trial.number, trial))
            continue
        if not flight:
            return found
        now, _, trial = heapq.heappop(flight)
        point = np.array([trial.weights[name] for name in names])
        for item in trial:
            trial.report(float(landscape.scores(point, [item], "fixed", chance)[0]))
        assert trial.mean is not None
        study.tell(trial.number, trial.mean)
        for mark in marks:
            if mark not in found and search.spent >= mark:
                best = search.best().weights
                point = np.array([best[name] for name in names])
                hours = now / 3600
                ask_s = statistics.median(asks) if asks else 0.0
                found[mark] = Found(landscape.regret(point), hours, ask_s)
                asks.clear()


def print_regrets(options: argparse.Namespace) -> None:
    tasks = [
        (family, seed, n)
        for family in options.families
        for seed in range(options.instances)
        for n in options.workers
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        waiting = [pool.submit(searched, *task, options.images) for task in tasks]
        table = dict(zip(tasks, (one.result() for one in waiting), strict=True))
    print(f"an image takes {IMAGE_S:g} s, a merge {MERGE_S:g} s; {options.instances} instances")
    print("family     images  workers   regret ± se     to the first       hours    a proposal")
    for family in options.families:
        for mark in options.images:
            for n in options.workers:
                of = [table[family, seed, n][mark] for seed in range(options.instances)]
                alone = [
                    table[family, seed, options.workers[0]][mark].regret
                    for seed in range(options.instances)
                ]
                regrets = [one.regret for one in of]
                apart = [one - other for one, other in zip(regrets, alone, strict=True)]
                root = options.instances**0.5
                print(
                    f"{family:10} {mark:6} {n:8}   {statistics.mean(regrets):.3f} ± "
                    f"{statistics.stdev(regrets) / root:.3f}   {statistics.mean(apart):+.3f} ± "
                    f"{statistics.stdev(apart) / root:.3f}   "
                    f"{statistics.mean(one.hours for one in of):8.3f}   "
                    f"{statistics.median(one.ask_s for one in of):6.2f} s"
                )


def write_toy(folder: Path, image_s: float = 0.5, **search: object) -> Path:
    """The configuration of a run of the tests' toy models, whose images sleep."""
    toy_plugin.write_model(folder / "zero.safetensors", 0.0)
    toy_plugin.write_model(folder / "one.safetensors", 1.0)
    (folder / "portrait.toml").write_text('prompt = "a portrait"\n')
    told = "\n".join(f"{key} = {json.dumps(value)}" for key, value in search.items())
    path = folder / "config.toml"
    path.write_text(
        f"""
        plugins = ["{Path(toy_plugin.__file__).as_posix()}"]
        [models]
        a = "zero.safetensors"
        b = "one.safetensors"
        [panel]
        payloads = ["portrait.toml"]
        batch_size = 12
        [heldout]
        images = 8
        select_images = 4
        candidates = 2
        [backend]
        name = "stripes"
        delay_s = {image_s}
        batch = 1
        [scorers.likeness]
        [output]
        save_images = "none"
        [search]
        {told}
        """
    )
    return path


def print_throughput(workers: Sequence[int], image_s: float) -> None:
    rates = {}
    for n in workers:
        with tempfile.TemporaryDirectory() as name:
            path = write_toy(Path(name), image_s, images=120, optimiser="bayes")
            command = [
                sys.executable,
                "-m",
                "bayesian_merger",
                "run",
                str(path),
                "--workers",
                str(n),
            ]
            start = time.monotonic()
            process = subprocess.Popen(
                [*command, "--run-dir", f"{name}/run", "--json"], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout
            ended = []
            for line in process.stdout:
                event = json.loads(line)
                if event.get("event") == "finished" and event.get("stage") in (
                    "explore",
                    "exploit",
                ):
                    ended.append((time.monotonic(), event))
            process.wait()
            whole = time.monotonic() - start
            seconds = ended[-1][0] - ended[0][0]
            rates[n] = (len(ended) - 1) / seconds
            print(
                f"{n} workers, images of {image_s:g} s: {rates[n]:.2f} trials a second of the search, "
                f"{rates[n] / rates[workers[0]]:.2f} times that of {workers[0]}; {whole:.0f} s in all"
            )


class Sleepers:
    """Workers that judge by sleeping, all in one thread: as processes they would need a machine each."""

    def __init__(self, n: int, board_of: Callable[[], Board]) -> None:
        self.n = n
        self.names = [f"sleeper {number}" for number in range(n)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(board_of,), daemon=True)
        self._thread.start()

    def _work(self, board_of: Callable[[], Board]) -> None:
        with storage_errors():
            board = board_of()
        chance = np.random.default_rng(0)
        # When the image is made that a task is at, and the images that it has left.
        busy: list[tuple[float, int, Task, list[int]]] = []
        while not self._over.is_set():
            while len(busy) < self.n:
                with storage_errors():
                    task = board.take(f"sleeper {len(busy)}")
                if task is None:
                    break
                due = time.monotonic() + chance.uniform(0.8, 1.2) * IMAGE_S
                heapq.heappush(busy, (due, id(task), task, list(task.items or ())))
            while busy and busy[0][0] <= time.monotonic():
                due, number, task, items = heapq.heappop(busy)
                weights = np.array(list(task.recipe.weights["alpha"].values()))
                score = -float(np.abs(weights - 0.3).mean()) + chance.normal(0, 0.05)
                with storage_errors():
                    digest = f"{chance.integers(2**60):016x}"
                    task.record(items.pop(0), {"likeness": score}, digest)
                    task.beat()
                    if not items:
                        task.done()
                if items:
                    again = due + chance.uniform(0.8, 1.2) * IMAGE_S
                    heapq.heappush(busy, (again, number, task, items))
            time.sleep(0.1)

    def lost(self) -> Mapping[str, str]:
        return {}

    def leave(self) -> None:
        self._over.set()

    def close(self) -> None:
        self.leave()
        self._thread.join(2 * IMAGE_S)


def print_asks(n: int, storage: str | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = write_toy(Path(name), images=8 * n + 100, optimiser="bayes")
        run_dir = Path(name) / Path(name).name
        overrides = [f"search.storage={storage}"] if storage else []
        ready = setup.prepare(config.load(path, overrides), path.parent, "scale")

        def board() -> Board:
            return open_study(run_dir, storage).board()

        start = time.monotonic()
        outcome = run.run(ready, run_dir, Silence(), hire=lambda: Sleepers(n, board), report=False)
        seconds = time.monotonic() - start
        asks = sorted(
            r.seconds["ask"]
            for r in outcome.results
            if r.stage == "exploit" and "ask" in r.seconds
        )
        ideal = n / IMAGE_S
        whole = f"{outcome.images} images in {seconds:.0f} s"
        kind = "SQLite" if storage is None else storage.partition(":")[0]
        print(
            f"{n:4} workers, {kind}: {len(asks)} questions, median {statistics.median(asks):.2f} s, "
            f"95 % below {asks[int(0.95 * len(asks))]:.2f} s; {whole}, "
            f"{outcome.images / seconds / ideal:.0%} of what the workers could"
        )


if __name__ == "__main__":
    main()
