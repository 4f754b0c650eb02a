"""Feed the readers of untrusted data with bytes that nobody would write: python tools/fuzz.py READER ...

Each READER of tests/readers.py, where it is told what they promise, gets `--inputs` inputs (default: all
readers, one after the other); what comes next is chosen by the code that was reached. A finding stops it
with a trace, and its bytes are left here as fuzz-READER-... . `--corpus` is a folder that keeps what has
reached new code, for the next time. Needs Linux, and Python 3.11 to 3.13, which atheris has.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

_GUIDED_BY = [
    "bayesian_merger",
    "yaml",
    "tomllib",
    "configparser",
    "PIL",
    "pickletools",
    "zipfile",
]
# Of an input; of the time that it may take and the memory that the process may have.
_LONGEST, _SLOWEST_S, _MOST_MB = 4096, 10, 2048


def main() -> None:
    """Feed each reader in a process of its own, which libFuzzer ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("readers", nargs="*", metavar="READER")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        fuzz(options.readers[0], options.folder, options.inputs, options.corpus)
    from readers import READERS

    for name in options.readers or READERS:
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            corpus = (options.corpus or Path(folder)) / name
            told = [name, f"--inputs={options.inputs}", f"--corpus={corpus}", f"--folder={folder}"]
            if code := subprocess.run([sys.executable, __file__, *told]).returncode:
                sys.exit(code)


def fuzz(name: str, folder: Path, inputs: int, corpus: Path) -> None:
    """Feed a reader that may write into `folder`; does not return."""
    import atheris

    with atheris.instrument_imports(include=_GUIDED_BY):
        from readers import READERS, require_held
    import torch

    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("error")  # nor do they say anything past us
    place, seeds = folder / "place", folder / "seeds"
    for made in (place, seeds, corpus):
        made.mkdir(parents=True, exist_ok=True)
    reader = READERS[name](place)
    for number, seed in enumerate(reader.seeds):
        (seeds / str(number)).write_bytes(seed)
    limits = [f"-max_len={_LONGEST}", f"-timeout={_SLOWEST_S}", f"-rss_limit_mb={_MOST_MB}"]
    # Shorter inputs are tried more often by themselves, and lead back to nothing that is read.
    whole = ["-keep_seed=1", "-reduce_inputs=0", "-len_control=0"]
    told = [f"-runs={inputs}", *limits, *whole, f"-artifact_prefix=fuzz-{name}-"]
    atheris.Setup(
        [sys.argv[0], *told, "-print_final_stats=1", str(corpus), str(seeds)],
        lambda data: require_held(reader, data),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
