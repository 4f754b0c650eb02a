"""What an image by a server costs beside the server's own time: python bench/servers.py [--images 200]

Prints the milliseconds of an image that are ours (requests, waiting, decoding, reading back), for images
of 512 x 512 and 1024 x 1024 by stand-ins for a webui and for ComfyUI, which takes 0.2 s for each and is
heard by its websocket, or asked where it has none; and the growth of memory over them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import toy_plugin
from comfyui_fake import FakeComfyUI
from webui_fake import A1111, FakeWebUI

from bayesian_merger import config, setup

Fake = FakeWebUI | FakeComfyUI


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    for title, served in {
        "webui": partial(serving, "webui", FakeWebUI, A1111),
        "ComfyUI": partial(serving, "comfyui", told_of),
        "ComfyUI without websocket": partial(serving, "comfyui", FakeComfyUI),
    }.items():
        with tempfile.TemporaryDirectory() as place, served(folder=Path(place)) as (fake, chosen):
            for side in (512, 1024):
                measure(title, side, fake, chosen, options.images)


def measure(title: str, side: int, fake: Fake, chosen: setup.Setup, n_images: int) -> None:
    """Make images of this size, and print what each costs."""
    wanted, engine = replace(chosen.panel[0], width=side, height=side), chosen.backend
    # Each of them takes so long, without being busy.
    own_s = 0.0
    if isinstance(fake, FakeComfyUI):
        own_s = fake.takes_s = 0.2
    list(engine.generate([wanted] * 5))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = []
    for i in range(n_images):
        start, busy = time.perf_counter(), fake.busy_s
        list(engine.generate([replace(wanted, seed=i)]))
        ours.append(time.perf_counter() - start - (fake.busy_s - busy) - own_s)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ms = statistics.median(ours) * 1000
    print(
        f"{title}, {side} x {side}: {ms:.1f} ms (median of {n_images}), {grown / 1024:.0f} MiB",
        flush=True,
    )


def told_of(folder: Path) -> FakeComfyUI:
    """A ComfyUI that tells of its jobs."""
    fake = FakeComfyUI(folder)
    fake.listeners = {}
    return fake


@contextmanager
def serving(
    backend: str, kind: Callable[..., Fake], *options: str, folder: Path
) -> Iterator[tuple[Fake, setup.Setup]]:
    """A server and a merge in it."""
    for name, value in {"own": 0.3, "zero": 0.0, "one": 1.0}.items():
        toy_plugin.write_model(folder / f"{name}.safetensors", value, vae=True)
    (folder / "p.txt").write_text("a portrait\n")
    fake = kind(*options, folder)
    (folder / "config.toml").write_text(
        f"""
        models = {{ a = "zero.safetensors", b = "one.safetensors" }}
        panel = {{ payloads = ["p.txt"] }}
        backend = {{ name = "{backend}", url = "{fake.url}" }}
        scorers = {{ exposure = {{}} }}
        """
    )
    chosen = setup.prepare(config.load(folder / "config.toml"), folder, "bench")
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    try:
        yield fake, chosen
    finally:
        chosen.backend.close()
        fake.stop()


if __name__ == "__main__":
    main()
