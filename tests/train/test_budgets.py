"""What compiled programs may take and send on hardware that is not here; needs its compilers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'duplex-jax[tpu]'"
)
needs_cuda = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
    reason="needs JAX's CUDA plugin: pip install 'duplex-jax[cuda]'",
)


def measured(*arguments: str) -> Any:
    result = subprocess.run(
        [sys.executable, "-m", "tests.train.budgets", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "entries"),
    [
        pytest.param("v5e-1", "bfloat16", marks=needs_libtpu),
        pytest.param("v6e-1", "int8", marks=needs_libtpu),
        pytest.param("a100x1", "bfloat16", marks=needs_cuda),
        pytest.param("h100x1", "int8", marks=needs_cuda),
    ],
)
def test_decoding_leaves_the_cache_where_it_is(mesh: str, entries: str):
    """Four layers of MiniCPM-2.4B, eight rows of 4,096. On GPUs a layer's scores exist, and are the same for 40."""
    for kind, bytes_ in measured("decode", mesh, "8", "4096", entries, "4").items():
        assert bytes_["copy"] < bytes_["keys"] / 2, kind
        scores = bytes_["scores"] if "100x" in mesh else 0
        assert bytes_["temporaries"] < 0.1 * bytes_["cache"] + scores, kind
        assert bytes_["declared"] < bytes_["arguments"] < 1.03 * bytes_["declared"], kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "most"),
    [
        pytest.param("a100x40", 1.5e9, marks=needs_cuda),
        pytest.param("v5e-16x2", 0.5e9, marks=needs_libtpu),
    ],
)
def test_gradients_leave_a_host_once_a_step(mesh: str, most: float):
    """The paper's run: bytes that a device sends beyond its host or slice, none of them in the micro-batches' loop."""
    far = measured("train", mesh)
    assert far
    assert all(times == 1 for _, times, _ in far)
    assert sum(sent for *_, sent in far) < most
