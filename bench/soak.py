"""Whether memory grows while servers make images for hours: python bench/soak.py [--minutes 120]

Stand-ins for a webui (merges as files, and by our extension) and for ComfyUI (by its nodes, and by
ours) run in a process of their own, lose connections and fail now and then. Prints how much memory this
process has every tenth of the time, and by how much that grows in an hour, from the second tenth on.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import toy_plugin
from comfyui_fake import FakeComfyUI
from webui_fake import A1111, FakeWebUI

from bayesian_merger import config, setup
from bayesian_merger.errors import TrialError

PAUSE_S, FAULT_S, N_IMAGES = 0.1, 20.0, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    options = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        urls = stack.enter_context(serving(folder))
        chosen = [ready(folder, backend, url, *more) for backend, url, more in urls]
        for one in chosen:
            stack.callback(one.backend.close)
        soak(chosen, options.minutes * 60)


def soak(chosen: list[setup.Setup], seconds: float) -> None:
    """Merge and make images by each in turn, and print what memory it takes."""
    begun, made, failed = time.monotonic(), 0, 0
    measured: list[tuple[float, float]] = []
    for turn in count():
        now = time.monotonic() - begun
        if now >= seconds * (len(measured) + 1) / 10:
            measured.append((now / 3600, resident_mib()))
            print(
                f"{now / 60:.0f} min: {made} images, {failed} failures told, "
                f"{measured[-1][1]:.1f} MiB",
                flush=True,
            )
            if len(measured) == 10:
                break
        one = chosen[turn % len(chosen)]
        params = {name: random.random() for name in one.space.names}
        recipe = one.recipe(params)
        try:
            one.backend.load(recipe, one.merger.merge(recipe))
            wanted = [replace(one.panel[0], seed=turn * N_IMAGES + i) for i in range(N_IMAGES)]
            made += len(list(one.backend.generate(wanted)))
        except TrialError:
            failed += 1
        time.sleep(PAUSE_S)
    hours, mib = np.array(measured[1:]).T
    print(f"grows by {np.polyfit(hours, mib, 1)[0]:+.2f} MiB an hour")


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


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
        """
    )
    return setup.prepare(config.load(folder / "config.toml", more), folder, "soak")


if __name__ == "__main__":
    main()
