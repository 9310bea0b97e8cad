"""Attention over packed rows, behind one function whatever computes it."""

import functools

import jax
import jax.numpy as jnp

from duplex_jax.errors import UserError

BACKENDS = ("xla", "splash", "cudnn")
_QUERY_CHUNK = 512


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, backend: str = "xla") -> jax.Array:
    """Causal attention within segments, scaled by `1 / sqrt(H)`.

    Args:
        q: `[B, T, N, H]`.
        k, v: `[B, T, K, H]`; N is a multiple of K.
        segment_ids: int32 `[B, T]`, a token sees only its own segment; 0 is padding. None: one segment a row.
        backend: `xla` runs anywhere.

    Returns:
        `[B, T, N, H]`, in the dtype of `q`.

    Raises:
        UserError: unknown backend.
    """
    if backend == "xla":
        return _attend_xla(q, k, v, segment_ids)
    raise UserError(f"attention backend {backend!r} is unknown; one of {', '.join(BACKENDS)}")


def _attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    B, T, N, H = q.shape
    q = q.reshape(B, T, k.shape[2], N // k.shape[2], H) * H**-0.5
    positions = jnp.arange(T)

    # A chunk of queries at a time, its scores made again on the way back: [T, T] never exists as a whole.
    @functools.partial(jax.checkpoint, static_argnums=1)
    def chunk(operands: tuple[jax.Array, ...], start: int) -> jax.Array:
        q, k, v, segments = operands
        stop = start + q.shape[1]
        mask = positions[start:stop, None] >= positions[None, :stop]  # [t, s]
        mask = mask[None, None, None]
        if segments is not None:
            mask = mask & (segments[:, start:stop, None] == segments[:, None, :stop])[:, None, None]
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k[:, :stop], preferred_element_type=jnp.float32)
        probs = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v.dtype)
        return jnp.einsum("bkgts,bskh->btkgh", probs, v[:, :stop])

    chunks = [chunk((q[:, i : i + _QUERY_CHUNK], k, v, segment_ids), i) for i in range(0, T, _QUERY_CHUNK)]
    return jnp.concatenate(chunks, axis=1).reshape(B, T, N, H)
