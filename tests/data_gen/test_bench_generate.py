"""The generator's measurement measures what it says."""

import json
from pathlib import Path

import pytest

from benchmarks.generate import bench_generate
from data_gen.categories import CATEGORIES


def test_a_small_measurement(tokenizer_folder: Path):
    found = bench_generate(dialogues=12, small=10, large=20, workers=1, tokenizer=str(tokenizer_folder))
    json.dumps(found)
    assert set(found["categories"]) == set(CATEGORIES)
    assert all(rate > 0 for c in found["categories"].values() for rate in c.values())
    assert [m["dialogues"] for m in found["memory"]] == [10, 20]
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory needs Linux's /proc")
    assert 0.8 < found["memory_growth"] < 1.2
