"""One merge by sd-meh or sd-mecha, in their own environment; bench/merge.py runs it.

Prints JSON: seconds from closed files to a merge in memory or on the disk (`s`), and the peak of
anonymous memory in GB above what the imports took (`gb`).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path


def anonymous_gb() -> float:
    """The process's memory that is not a file's, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e6


class Peak:
    """The peak of anonymous memory while it is open, in GB."""

    def __enter__(self) -> Peak:
        self.gb = anonymous_gb()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.gb = max(self.gb, anonymous_gb())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    tool, method, target, *models = sys.argv[1:]
    out = None if target == "memory" else Path(target)
    letters = "abc"[: len(models)]
    import torch

    torch.set_num_threads(2)
    if tool == "sd-meh":
        from sd_meh.merge import merge_models, save_model

        def run() -> None:
            merged = merge_models(
                {f"model_{k}": path for k, path in zip(letters, models, strict=True)},
                {"alpha": [0.3] * 26, "beta": [0.2] * 26},
                {"alpha": 0.3, "beta": 0.2},
                method,
                precision=16,
                threads=2,
            )
            if out:
                save_model(merged, out.with_suffix(""), "safetensors")
    else:
        import sd_mecha

        opened = [sd_mecha.model(path) for path in models]
        recipe = getattr(sd_mecha, method)(*opened, alpha=0.3)

        def run() -> None:
            sd_mecha.merge(
                recipe,
                merge_device="cpu",
                merge_dtype=torch.float32,
                output_dtype=torch.float16,
                threads=2,
                output=str(out) if out else {},
                tqdm=quiet,
            )

    before = anonymous_gb()
    with Peak() as peak:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    print(json.dumps({"s": seconds, "gb": peak.gb - before}))


class quiet:
    """A progress bar that shows nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __enter__(self) -> quiet:
        return self

    def __exit__(self, *_: object) -> None: ...
    def update(self, *_: object) -> None: ...
    def set_postfix(self, *_: object, **__: object) -> None: ...
    def close(self) -> None: ...


if __name__ == "__main__":
    main()
