"""Every reader of untrusted data keeps its promise, see readers.py, whatever a few bytes are."""

from __future__ import annotations

import random
import time
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
