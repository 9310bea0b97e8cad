"""Each attention backend that runs here against attention written out in numpy; cuDNN's calls against JAX's own."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax import parallel
from duplex_jax.errors import UserError
from duplex_jax.model import attention


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray) -> np.ndarray:
    B, T, N, H = q.shape
    k, v = (np.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    out = np.zeros((B, T, N, H))
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            for n in range(N):
                scores = k[b, seen, n] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, n]
    return out


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_backends_are_attention(backend: str, kv_heads: int):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 128, 4, 16))
    k, v = (jax.random.normal(key, (2, 128, kv_heads, 16)) for key in keys[1:])
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 32, axis=1).astype(np.int32)
    segments[0, 40:50] = 3
    got = jax.jit(lambda *x: attention.attend(*x, jnp.asarray(segments), backend))(q, k, v)
    np.testing.assert_allclose(got, plain(*map(np.asarray, (q, k, v)), segments), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["splash"])
def test_gradients_are_those_of_xla(backend: str):
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (1, 128, 4, 16))
    k, v = (jax.random.normal(key, (1, 128, 2, 16)) for key in keys[1:])
    segments = jnp.repeat(jnp.array([[1, 2]]), 64, axis=1)

    def loss(backend, *x):
        return jnp.sum(jnp.sin(attention.attend(*x, segments, backend)))

    got, wanted = (jax.grad(loss, (1, 2, 3))(b, q, k, v) for b in (backend, "xla"))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("length", [1, 511, 700, 1024])
def test_blocks_of_queries(length: int):
    """Longer than a block or not, a row's attention is that of its documents on their own."""
    keys = jax.random.split(jax.random.key(2), 3)
    q, k, v = (jax.random.normal(key, (1, length, 2, 8)) for key in keys)
    cut = length // 3
    segments = jnp.where(jnp.arange(length)[None] < cut, 1, 2)
    whole = attention.attend(q, k, v, segments)
    parts = [
        attention.attend(q[:, s], k[:, s], v[:, s], None)
        for s in (slice(0, cut), slice(cut, None))
        if cut or s.stop is None
    ]
    np.testing.assert_allclose(whole, jnp.concatenate(parts, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["packed", "padded", "in any order", "none"])
def test_gradients_over_many_blocks(kind: str):
    """Blocks that are left out, and blocks that are not: as attention over the whole square, differentiated by JAX."""
    B, T, N, K, H = 2, 419, 4, 2, 8
    keys = jax.random.split(jax.random.key(3), 5)
    q, k, v, d_out = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K, N), strict=False))
    segments = {
        "packed": jnp.stack([jnp.arange(T) // 150 + 1, jnp.arange(T) // 20 + 1]),
        "padded": jnp.stack([jnp.where(jnp.arange(T) < n, jnp.arange(T) // 90 + 1, 0) for n in (200, 400)]),
        "in any order": jax.random.randint(keys[4], (B, T), 0, 4),
        "none": None,
    }[kind]

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = jnp.tril(jnp.ones((T, T), bool))[None]
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None])
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf)), v)

    got, got_back = jax.vjp(lambda *x: attention.attend(*x, segments), q, k, v)
    wanted, wanted_back = jax.vjp(whole, q, k, v)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(got_back(d_out), wanted_back(d_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_a_backend_cannot_do():
    x = jnp.zeros((1, 100, 1, 8))
    with pytest.raises(UserError, match="takes multiples of 128"):
        attention.attend(x, x, x, None, "splash")
    with pytest.raises(UserError, match="is unknown; one of xla, splash, cudnn"):
        attention.attend(x, x, x, None, "flash")


def lowered_for_cuda(function: Any, *operands: Any) -> list[str]:
    """The calls of cuDNN in a program for GPUs, as StableHLO."""
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "CustomSPMDPartitioning" not in text
    return [line.strip() for line in text.splitlines() if "__cudnn" in line]


def gradients_of(backend: Any) -> Any:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
        return jnp.sum(backend(q, k, v, *segments).astype(jnp.float32))

    return lambda *x: jax.grad(loss, (0, 1, 2))(*x)


HEADS = jax.ShapeDtypeStruct((4, 128, 4, 16), jnp.bfloat16)
KV_HEADS = jax.ShapeDtypeStruct((4, 128, 2, 16), jnp.bfloat16)
SEGMENTS = jax.ShapeDtypeStruct((4, 128), jnp.int32)


@pytest.mark.parametrize("segments", [(), (SEGMENTS,)])
def test_cudnn_is_called_as_jax_calls_it(segments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch):
    """cuDNN's calls need no GPU to be written down: JAX's own, without the gradient of the mask."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def of_jax(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any = None) -> jax.Array:
        mask = None if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")

    def parts(line: str) -> tuple[list[Any], list[Any]]:
        config = json.loads(re.search(r'backend_config = "(.*?)", ', line)[1].replace("\\22", '"'))
        config["cudnn_fmha_backend_config"]["intermediate_tensor_shape"]["layout"] = None
        takes, gives = (re.findall(r"tensor<(\S*)>", types) for types in line.rsplit(" : ", 1)[1].split(" -> "))
        layouts = (part for part in line.split("operand_layouts = ")[1].split("result_layouts = "))
        takes_in, gives_in = (re.findall(r"dense<(.*?)> :", part) for part in layouts)
        name = re.search(r"@(\S+)\(", line)[1]
        return [name, config, takes, takes_in], list(zip(gives, gives_in, strict=True))

    backends = (lambda *x: attention.attend(*x, *([None] * (4 - len(x))), "cudnn"), of_jax)
    operands = (HEADS, KV_HEADS, KV_HEADS, *segments)
    ours, theirs = ([parts(x) for x in lowered_for_cuda(gradients_of(b), *operands)] for b in backends)
    assert len(ours) == 2
    for (call, gives), (call_of_jax, gives_of_jax) in zip(ours, theirs, strict=True):
        assert call == call_of_jax
        assert gives == [x for x in gives_of_jax if x[0] != "4x1x128x128xbf16"]


def test_cudnn_gets_each_device_its_rows_and_heads():
    """Also where the axes between hosts are taken by the training step's own `shard_map`."""
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), parallel.AXES, (jax.sharding.AxisType.Auto,) * 4)

    def attend(*x: jax.Array) -> jax.Array:
        return attention.attend(*x, "cudnn", parallel.partition)

    def copies(*x: jax.Array) -> Any:
        rows = jax.P(parallel.REPLICA_AXES)
        return jax.shard_map(
            gradients_of(attend),
            in_specs=(rows,) * 4,
            out_specs=rows,
            axis_names=set(parallel.REPLICA_AXES),
            check_vma=False,
        )(*x)

    with jax.sharding.use_abstract_mesh(mesh):
        for program in (gradients_of(attend), copies):
            forward, backward = lowered_for_cuda(program, HEADS, KV_HEADS, KV_HEADS, SEGMENTS)
            assert "(tensor<1x128x2x16xbf16>, tensor<1x128x1x16xbf16>, " in forward
            assert "-> (tensor<1x2x128x16xbf16>, tensor<1x1x128x16xbf16>, tensor<1x1x128x16xbf16>" in backward
