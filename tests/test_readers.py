"""Every reader of untrusted data keeps its promise, see readers.py, whatever a few bytes are."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from readers import READERS, require_held
from test_fuzz import few_and_many, mutated


@few_and_many(40)
@pytest.mark.parametrize("name", READERS)
def test_reader_reads_or_tells_why_not(tmp_path: Path, name: str, n_examples: int) -> None:
    reader = READERS[name](tmp_path)
    for seed in reader.seeds:
        reader.read(seed)
    chance = random.Random(name)
    for _ in range(n_examples):
        data = mutated(chance.choice(reader.seeds), chance)
        start = time.process_time()
        require_held(reader, data)
        assert time.process_time() - start < 2, data


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")
def test_fuzzer_goes_on_from_inputs_that_have_reached_new_code(tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "tools" / "fuzz.py"
    told = subprocess.run(
        [sys.executable, str(program), "wildcards", "--inputs", "2000"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert "Done 2000 runs" in told.stderr
    assert "\tNEW " in told.stderr
    assert not list(tmp_path.iterdir())  # of a finding its bytes are left there
