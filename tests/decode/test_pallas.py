"""The Pallas kernel against XLA's attention, interpreted; compiled by Mosaic where libtpu is installed."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax.decode import cache as kv
from duplex_jax.decode.backends import Settings, pallas
from duplex_jax.decode.backends.xla import Xla
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.session import DuplexSession, step_sessions
from tests.tiny import FreshForward, tiny_model

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("entries", "queries", "heads", "slots"), [("float32", 12, 2, 300), ("bfloat16", 1, 4, 256), ("int8", 3, 2, 300)]
)
def test_ragged_rows(entries: str, queries: int, heads: int, slots: int):
    """Rows that hold nothing, part of a block, exactly one, and all slots; nothing behind a row's length is read."""
    lengths = jnp.asarray([0, 1, 128, 129, slots])
    keys = jax.random.split(jax.random.key(slots), 3)
    dtype = jnp.float32 if entries == "float32" else jnp.bfloat16
    q = jax.random.normal(keys[0], (5, heads, queries, 64), dtype)
    k = jax.random.normal(keys[1], (5, heads, 64, slots), jnp.float32)
    v = jax.random.normal(keys[2], (5, heads, slots, 64), jnp.float32)
    live = jnp.arange(slots) < lengths[:, None]
    cache = kv.KVCache((k,), (v,))
    cache = kv.quantized(cache) if entries == "int8" else kv._like(kv.KVCache((q,), (q,)), cache)
    (past,) = cache.layers()
    wanted = kv.over_past(q, past, lengths)
    if entries != "int8":
        past = (jnp.where(live[:, None, None], past[0], jnp.nan), jnp.where(live[:, None, :, None], past[1], jnp.nan))
    out, top, total = jax.jit(pallas.over_past)(q, past, lengths)
    tolerance = 1e-5 if entries == "float32" else 2e-2
    held = lengths > 0  # of no entries, only the maximum counts: it says that there are none
    np.testing.assert_allclose(
        out[held] / total[held][..., None], wanted[0][held] / wanted[2][held][..., None], rtol=tolerance, atol=tolerance
    )
    log_sum, wanted_log_sum = (t + jnp.log(n) for t, n in ((top, total), wanted[1:]))
    np.testing.assert_allclose(log_sum[held], wanted_log_sum[held], rtol=tolerance, atol=tolerance)
    assert np.all(np.asarray(top[~held]) == kv.MASKED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pallas", "slot-major keys"])
def test_a_session_outlives_its_row(kind: str):
    """Slices, evictions, a fork and a move: the next logits are those of a fresh forward pass over what a row holds."""
    model = tiny_model()
    settings = Settings(256, jnp.dtype(jnp.float32), "float32", "float32")
    backend = pallas.Pallas(model.model, settings) if kind == "pallas" else Xla(model.model, settings, True)
    engine = Engine(backend, model.template, rows=3, capacity=256)
    session, other = (DuplexSession(engine, system="Be brief.", seed=seed) for seed in (3, 4))
    held = []
    for i in range(40):
        step_sessions({session: f"word {i}", other: None if i % 3 else "go on"})
        held.append(len(session.ids))
    assert any(b < a - 20 for a, b in itertools.pairwise(held))  # old pairs were dropped
    fresh, V = FreshForward(model), model.config.vocab_size
    forked = engine.fork(session._row)
    entries = engine.read(session._row)
    for row in (session._row, other._row, forked):
        np.testing.assert_allclose(engine.logits(row)[:V], fresh(row.ids)[:V], atol=2e-4, rtol=2e-4)
    engine.write(forked, session.ids, entries)
    np.testing.assert_allclose(engine.logits(forked)[:V], fresh(session.ids)[:V], atol=2e-4, rtol=2e-4)


MOSAIC = """
import sys
from duplex_jax.train import compile as compiling
compiling.prepare_environment(None)
import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from duplex_jax.decode.backends import pallas

for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    where = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0])
    for entries in ("bfloat16", "int8"):
        for queries in (1, 16, 64):
            def of(*shape, dtype=entries):
                return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
            past = [of(2, 36, 64, 1098), of(2, 36, 1098, 64)]
            past += [of(2, 36, 1098, dtype="float32")] * 2 if entries == "int8" else []
            q, lengths = of(2, 36, queries, 64, dtype="bfloat16"), of(2, dtype="int32")
            program = jax.jit(pallas.over_past).lower(q, past, lengths).compile().as_text()
            assert "tpu_custom_call" in program and "ragged_attention" in program
            copied = [x for x in program.splitlines() if " copy(" in x and ",1098,64]" in x.split(" copy(")[0]]
            assert not copied, copied
            print(name, entries, queries)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'duplex-jax[tpu]'")
def test_mosaic_compiles_it_for_every_tpu():
    """For MiniCPM-2.4B's 36 heads of 64, a token, a user's slice and a chunk at a time; entries stay where they are."""
    result = subprocess.run(
        [sys.executable, "-c", MOSAIC],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == 18
