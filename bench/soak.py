"""Whether memory grows while servers make images for hours: python bench/soak.py [--minutes 120]

Stand-ins for a webui (merges as files, and by our extension) and for ComfyUI (by its nodes, and by
ours) run in a process of their own, lose connections and fail now and then; short whole runs follow
each other. Prints how much memory this process holds every tenth of the time, and by how much that grows
in an hour, from the second tenth on.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import toy_plugin
from comfyui_fake import FakeComfyUI
from webui_fake import A1111, FakeWebUI

from bayesian_merger import config, run, setup
from bayesian_merger.data import Result
from bayesian_merger.errors import MergerError

FAULT_S = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    options = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with serving(folder) as servers:
            soak(folder, servers, options.minutes * 60)


def soak(folder: Path, servers: list[tuple[str, str, tuple[str, ...]]], seconds: float) -> None:
    """One short run after another, by each server in turn; prints what memory is held."""
    begun, counted = time.monotonic(), Counted()
    measured: list[tuple[float, float]] = []
    for turn in count():
        now = time.monotonic() - begun
        if now >= seconds * (len(measured) + 1) / 10:
            gc.collect()
            measured.append((now / 3600, held_mib()))
            n_files = len(list(Path("/proc/self/fd").iterdir()))
            print(
                f"{now / 60:.0f} min: {turn} runs, {counted.images} images, {counted.failed} trials "
                f"failed; {measured[-1][1]:.1f} MiB, {n_files} files, "
                f"{threading.active_count()} threads",
                flush=True,
            )
            if len(measured) == 10:
                break
        backend, url, more = servers[turn % len(servers)]
        # What a server answers while it is faulty ends a run, or keeps it from beginning.
        with suppress(MergerError):
            one = ready(folder, backend, url, f"search.seed={turn}", *more)
            with closing(one.backend):
                run.run(one, folder / "run", counted)
        shutil.rmtree(folder / "run", ignore_errors=True)
    hours, mib = np.array(measured[1:]).T
    print(f"grows by {np.polyfit(hours, mib, 1)[0]:+.2f} MiB an hour")


class Counted:
    """An observer that counts."""

    images = failed = 0

    def planned(self, images: int) -> None: ...
    def started(self, stage: str, name: str, images: int) -> None: ...
    def noted(self, text: str) -> None: ...

    def judged(self, images: int, made: bool) -> None:
        self.images += images if made else 0

    def finished(self, result: Result, leader: Result | None) -> None:
        self.failed += result.state == "failed"


def held_mib() -> float:
    """Memory that is this process's own: the files that it maps can be read again."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


@contextmanager
def serving(folder: Path) -> Iterator[list[tuple[str, str, tuple[str, ...]]]]:
    """The servers' process: back end, address and further options of each."""
    models = folder / "models"
    models.mkdir()
    for name, value in {"own": 0.3, "zero": 0.0, "one": 1.0}.items():
        toy_plugin.write_model(models / f"{name}.safetensors", value, vae=True)
    (folder / "p.txt").write_text("a portrait\n")
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=serve, args=(folder, there))
    process.start()
    try:
        webui, comfyui = here.recv()
        slerp = ("merge.method=slerp",)
        yield [
            ("webui", webui[0], ()),
            ("webui", webui[1], ()),
            ("comfyui", comfyui, ()),
            ("comfyui", comfyui, slerp),
        ]
    finally:
        here.send("stop")
        process.join()


def serve(folder: Path, there: Connection) -> None:
    webuis = [
        FakeWebUI(A1111, folder / "models"),
        FakeWebUI(A1111, folder / "models", home=folder / "home"),
    ]
    comfyui = FakeComfyUI(folder / "models", home=folder / "nodes")
    comfyui.listeners = {}
    there.send(([webui.url for webui in webuis], comfyui.url))
    for turn in count():
        if there.poll(FAULT_S):
            break
        for webui in webuis:
            webui.bodies.clear()
            webui.cut, webui.errors = turn % 2, (turn + 1) % 2
        comfyui.forgets, comfyui.fails = turn % 2, (turn + 1) % 2
        comfyui.tidy()
    for server in (*webuis, comfyui):
        server.stop()


def ready(folder: Path, backend: str, url: str, *more: str) -> setup.Setup:
    (folder / "config.toml").write_text(
        f"""
        models = {{ a = "models/zero.safetensors", b = "models/one.safetensors" }}
        panel = {{ payloads = ["p.txt"], defaults = {{ width = 512, height = 512 }} }}
        backend = {{ name = "{backend}", url = "{url}" }}
        scorers = {{ exposure = {{}} }}
        search = {{ images = 12, optimiser = "bayes", seed = 0 }}
        heldout = {{ images = 4, select_images = 2 }}
        output = {{ save_best = false }}
        """
    )
    return setup.prepare(config.load(folder / "config.toml", more), folder, "soak")


if __name__ == "__main__":
    main()
