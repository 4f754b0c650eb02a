"""What an image by a webui costs beside the server's own time: python bench/webui.py [--images 200]

Prints the milliseconds of an image that are ours (requests, decoding, reading back), for images of
512 x 512 and 1024 x 1024 by a server that makes them in no time, and the growth of memory over them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import toy_plugin
from webui_fake import A1111, FakeWebUI

from bayesian_merger import config, setup


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, served(Path(place)) as (fake, chosen):
        prompt, engine = chosen.panel[0], chosen.backend
        for side in (512, 1024):
            wanted = replace(prompt, width=side, height=side)
            list(engine.generate([wanted] * 5))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            ours = []
            for i in range(options.images):
                start, busy = time.perf_counter(), fake.busy_s
                list(engine.generate([replace(wanted, seed=i)]))
                ours.append(time.perf_counter() - start - (fake.busy_s - busy))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            ms = statistics.median(ours) * 1000
            print(
                f"{side} x {side}: {ms:.1f} ms (median of {options.images}), {grown / 1024:.0f} MiB"
            )


@contextmanager
def served(folder: Path) -> Iterator[tuple[FakeWebUI, setup.Setup]]:
    """A server and a merge in it."""
    for name, value in {"own": 0.3, "zero": 0.0, "one": 1.0}.items():
        toy_plugin.write_model(folder / f"{name}.safetensors", value)
    (folder / "p.txt").write_text("a portrait\n")
    fake = FakeWebUI(A1111, folder)
    (folder / "config.toml").write_text(
        f"""
        models = {{ a = "zero.safetensors", b = "one.safetensors" }}
        panel = {{ payloads = ["p.txt"] }}
        backend = {{ name = "webui", url = "{fake.url}" }}
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
