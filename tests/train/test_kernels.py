"""The CPU's own kernels of training against JAX's derivatives of the plain layers and of whole logits."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax import native
from duplex_jax.model import attention, minicpm, rope
from duplex_jax.model.config import ModelConfig
from duplex_jax.native import training
from tests.train import plans

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler for the CPU's own kernels")


def shape(heads: int, kv_heads: int, head_dim: int, hidden: int, mlp: int) -> ModelConfig:
    return dataclasses.replace(
        plans.SHAPE, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=hidden,
        intermediate_size=mlp,
    )  # fmt: skip


def drawn(config: ModelConfig, B: int, T: int, updated: tuple[str, ...]) -> tuple[Any, ...]:
    """Hidden states, stacked layers with updates of some matrices, positions, and segments: documents with padding
    behind them in the first row, ids in any order in the others."""
    rng = np.random.default_rng(T)
    layers = minicpm.init_params(config, jax.random.key(T))["layers"]
    layers = {name: w * rng.uniform(0.5, 1.5, w.shape).astype(np.float32) for name, w in layers.items()}
    if updated:
        layers["lora"] = {
            name: {"a": jnp.asarray(rng.normal(0, 0.1, (*layers[name].shape[:2], 3)), jnp.float32),
                   "b": jnp.asarray(rng.normal(0, 0.1, (layers[name].shape[0], 3, layers[name].shape[2])), jnp.float32)}
            for name in updated
        }  # fmt: skip
    x = jnp.asarray(rng.normal(size=(B, T, config.hidden_size)), jnp.float32)
    segments = rng.integers(0, 3, (B, T)).astype(np.int32)
    segments[0] = np.arange(T) * 4 // T + 1
    segments[0, T * 9 // 10 :] = 0
    return x, layers, jnp.asarray(rng.integers(0, T, (B, T)), jnp.int32), jnp.asarray(segments)


def plain(config: ModelConfig, x: Any, layers: Any, tables: Any, segments: Any) -> jax.Array:
    """`T x T` attention with a mask, layer after layer, differentiated by JAX."""
    T = x.shape[1]
    causal = jnp.arange(T)[:, None] >= jnp.arange(T)
    seen = causal & (segments[:, :, None] == segments[:, None, :])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None]), None

    for i in range(config.num_layers):
        x, _ = minicpm.block(config, jax.tree.map(lambda w: w[i], layers), x, tables, attend)  # noqa: B023
    return x


@pytest.mark.parametrize(
    ("sizes", "B", "T", "updated"),
    [
        ((4, 2, 8, 32, 48), 2, 64, ()),
        ((4, 4, 16, 40, 33), 3, 70, ()),
        ((6, 2, 40, 64, 100), 1, 131, ()),
        ((2, 1, 128, 96, 72), 2, 150, ("o", "gate")),
        ((3, 1, 64, 80, 130), 2, 9, training.MATRICES),
        ((3, 1, 64, 80, 130), 2, 1, ()),
    ],
)
def test_layers_and_their_gradients(sizes: tuple[int, ...], B: int, T: int, updated: tuple[str, ...]):
    config = shape(*sizes)
    x, layers, positions, segments = drawn(config, B, T, updated)
    tables = rope.rotary_tables(config, positions, T)
    d = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def ours(x: Any, layers: Any) -> jax.Array:
        return training.layers(
            x, tables, segments, layers, num_kv_heads=config.num_kv_heads, eps=config.rms_norm_eps,
            residual_scale=config.residual_scale,
        )  # fmt: skip

    np.testing.assert_allclose(
        jax.jit(ours)(x, layers), jax.jit(lambda x, w: plain(config, x, w, tables, segments))(x, layers), atol=1e-4
    )
    got, wanted = (
        jax.jit(jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) * d), (0, 1)))(x, layers)
        for f in (ours, lambda x, w: plain(config, x, w, tables, segments))
    )
    if updated:  # the matrices themselves are frozen
        got, wanted = ((g[0], g[1]["lora"]) for g in (got, wanted))
    largest = max(float(jnp.max(jnp.abs(w))) for w in jax.tree.leaves(wanted))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        # Of one token q and k get no gradient but from rounding.
        bound = 1e-4 * max(float(jnp.max(jnp.abs(b))), 1e-2 * largest)
        assert float(jnp.max(jnp.abs(a - b))) < bound, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("n", "width", "vocab", "padded", "chunk"), [(19, 32, 301, 304, 7), (130, 64, 1100, 1100, 64)])
@pytest.mark.parametrize("weighted", ["some", "none", "all"])
def test_cross_entropy_and_its_gradients(n: int, width: int, vocab: int, padded: int, chunk: int, weighted: str):
    rng = np.random.default_rng(n)
    hidden, head = (jnp.asarray(rng.normal(size=(rows, width)), jnp.float32) for rows in (n, padded))
    targets = jnp.asarray(rng.integers(0, vocab, n), jnp.int32)
    weights = jnp.asarray({"some": rng.choice([0, 0.3, 1], n), "none": np.zeros(n), "all": np.ones(n)}[weighted],
                          jnp.float32)  # fmt: skip
    ids = jnp.array([3, 0, 300], jnp.int32)

    def whole(hidden: Any, head: Any) -> jax.Array:
        logits = (hidden @ head.T)[:, :vocab]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, -1) - logits[jnp.arange(n), targets]))

    loss, (d_hidden, d_head) = jax.value_and_grad(whole, (0, 1))(hidden, head)
    got = training.cross_entropy(
        hidden, head, targets, weights, ids, vocab=vocab, chunk=chunk, d_hidden=True, d_head=True
    )
    for a, b in zip(got, (loss, d_hidden, d_head, d_head[ids]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    alone, *nothing = training.cross_entropy(
        hidden, head, targets, weights, ids[:0], vocab=vocab, chunk=chunk, d_hidden=False, d_head=False
    )
    assert float(alone) == float(got[0])
    assert [a.size for a in nothing] == [0, 0, 0]


def test_a_step_is_what_xla_makes_of_it():
    """Loss and gradients of whole steps, full and LoRA, with the kernels and without."""
    for rank in (0, 4):
        ours = plans.plan(lora__rank=rank)
        assert ours.kernels
        theirs = plans.plan(lora__rank=rank, compute__remat="full")
        assert not theirs.kernels
        (a, _), (b, _) = plans.run(ours), plans.run(theirs)
        np.testing.assert_allclose(a, b, rtol=2e-5)


def digest() -> str:
    """Of every bit of a layer's output and gradients, and of a loss."""
    config = shape(3, 1, 64, 80, 130)
    x, layers, positions, segments = drawn(config, 2, 150, ())
    tables = rope.rotary_tables(config, positions, 150)

    def loss(x: Any, layers: Any) -> jax.Array:
        return jnp.sum(training.layers(
            x, tables, segments, layers, num_kv_heads=1, eps=1e-5, residual_scale=0.7) ** 2)  # fmt: skip

    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, layers)
    more = training.cross_entropy(
        x.reshape(-1, 80), layers["gate"][0].T, jnp.zeros(300, jnp.int32), jnp.ones(300), jnp.zeros(0, jnp.int32),
        vocab=130, chunk=100, d_hidden=True, d_head=True,
    )  # fmt: skip
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((found, more)))).hexdigest()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_sums_do_not_depend_on_the_number_of_cores():
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    code = "import os; os.sched_setaffinity(0, {!r}); from tests.train.test_kernels import digest; print(digest())"
    bits = {
        subprocess.run([sys.executable, "-c", code.format(chosen)], capture_output=True, text=True, check=True).stdout
        for chosen in (cores[:1], cores)
    }
    assert len(bits) == 1


def test_attention_of_the_two_ways_agrees():
    """On a row of many blocks, where most blocks of keys are left out."""
    config = shape(2, 1, 32, 64, 64)
    x, layers, positions, _ = drawn(config, 1, 700, ())
    segments = jnp.asarray(np.arange(700)[None] // 90, jnp.int32)
    tables = rope.rotary_tables(config, positions, 700)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return attention.attend(q, k, v, segments), None

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return minicpm.block(config, layer, x, tables, attend)[0], None

    got = training.layers(
        x, tables, segments, layers, num_kv_heads=1, eps=config.rms_norm_eps, residual_scale=config.residual_scale
    )
    np.testing.assert_allclose(got, jax.lax.scan(block, x, layers)[0], atol=1e-4)
