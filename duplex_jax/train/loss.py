"""Cross-entropy over packed rows, one chunk of tokens at a time, without materialising `[B, T, V]`.

The loss of a step is sum(weight * nll) / sum(weight) over all its rows, so the functions here return sums. Loss and
gradient are computed in the same pass, so each chunk's logits are computed once; tokens of weight 0 are sorted to the
end, and their chunks are skipped.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import MiniCPM


def targets_and_weights(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The target of each position, and its weight.

    Args:
        batch: `tokens`, `segment_ids` and `loss_weights` `[B, T]`; a weight applies to the prediction of its own token.

    Returns:
        int32 and float32 `[B, T]`: the next token, with weight 0 if it belongs to another document.
    """
    tokens, segments, weights = batch["tokens"], batch["segment_ids"], batch["loss_weights"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return targets, jnp.pad(jnp.where(same, weights[:, 1:], 0.0), ((0, 0), (0, 1)))


class Sums(NamedTuple):
    """Sums over micro-batches, kept per device (the leading axis) so that nothing is communicated.

    Attributes:
        loss: float32 `[fsdp]`, sum(weights * nll).
        head: float32 `[fsdp, V, D]`, gradient of the head; None if it is frozen.
        rows: float32 `[fsdp * tensor, n, D]`, gradient of the n rows trained in place of the head's; None if there are
            none.
    """

    loss: Any
    head: Any
    rows: Any


def zero_sums(fsdp: int, tensor: int, vocab: int, width: int, rows: int | None, frozen: bool) -> Sums:
    """Sums of zero, for the first micro-batch.

    Args:
        fsdp, tensor: number of devices along these axes.
        vocab: V, rows of the head.
        width: D.
        rows: n, number of rows trained in place of the head's; None for none.
        frozen: whether the head gets no gradient.
    """
    zeros = Sums(
        jnp.zeros(fsdp),
        None if frozen else jnp.zeros((fsdp, vocab, width)),
        None if rows is None else jnp.zeros((fsdp * tensor, rows, width)),
    )
    if jax.sharding.get_abstract_mesh().empty:
        return zeros
    return jax.tree.map(lax.with_sharding_constraint, zeros, _sharded(zeros))


def _sharded(sums: Sums) -> Sums:
    """Partition specs of the sums."""
    specs = Sums(P("fsdp"), P("fsdp", "tensor"), P(("fsdp", "tensor")))
    return Sums(*(None if x is None else spec for x, spec in zip(sums, specs, strict=True)))


def cross_entropy(
    config: ModelConfig,
    head: jax.Array,
    row_ids: tuple[int, ...],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    sums: Sums,
    chunk: int = 512,
) -> tuple[jax.Array, Sums]:
    """Adds a micro-batch's sum(weights * nll) and its gradients to `sums`.

    Args:
        config: shape of the model.
        head: `[V, D]` in the dtype of the computation, sharded along `tensor` alone.
        row_ids: rows of the head that are trained separately; their gradients go to `sums.rows`.
        hidden: `[B, T, D]` from `MiniCPM.hidden`.
        targets: int32 `[B, T]`.
        weights: float32 `[B, T]`.
        sums: the sums so far.
        chunk: tokens whose logits are materialised at once on each device.

    Returns:
        The gradient with respect to `hidden`, and the updated sums.
    """
    local = functools.partial(_local, config.vocab_size, chunk, np.asarray(row_ids, np.int32))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(1, None, head, hidden, targets, weights, sums)
    # Each device handles its own rows of the batch and its own part of the vocabulary.
    batch, added = P("fsdp"), _sharded(sums)
    return jax.shard_map(
        functools.partial(local, mesh.shape["tensor"], "tensor"),
        in_specs=(P("tensor"), batch, batch, batch, added),
        out_specs=(batch, added),
        axis_names={"fsdp", "tensor"},
        check_vma=False,
    )(head, hidden, targets, weights, sums)


def totals(sums: Sums) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Loss, gradient of the head `[V, D]` and of its replaced rows `[n, D]`, summed over `fsdp` and `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = None if sums.rows is None else jnp.sum(sums.rows, axis=0)
    head = sums.head
    if head is not None and not mesh.empty and mesh.size > 1:
        head = jax.shard_map(
            functools.partial(_scattered, parts=mesh.shape["fsdp"]), in_specs=P("fsdp", "tensor"),
            out_specs=P("tensor", "fsdp"), axis_names={"fsdp", "tensor"}, check_vma=False,
        )(head)  # fmt: skip
    elif head is not None:
        head = head[0]
    return jnp.sum(sums.loss), head, rows


def _scattered(x: jax.Array, parts: int) -> jax.Array:
    """Sums each device's `[1, V, D]` over `fsdp` and shards the result along the width: `[V, D / parts]`.

    The scatter runs along the vocabulary, the major axis: TPUs implement one along the minor axis by a full all-reduce.
    """
    vocab = x.shape[1]
    x = jnp.pad(x[0], ((0, -vocab % parts), (0, 0)))
    x = lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
    return lax.all_to_all(x, "fsdp", split_axis=1, concat_axis=0, tiled=True)[:vocab]


def _local(
    vocab: int,
    chunk: int,
    row_ids: np.ndarray,
    parts: int,
    axis: str | None,
    head: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    sums: Sums,
) -> tuple[jax.Array, Sums]:
    """The loss of one device's tokens over its part of the vocabulary, one chunk at a time."""
    B, T, D = hidden.shape
    width = head.shape[0]
    first = lax.axis_index(axis) * width if axis else 0
    dtype = hidden.dtype
    own = jnp.asarray(row_ids) - first
    ids = jnp.where((own >= 0) & (own < width), own, width)  # not in this part: out of range
    n = B * T
    size = min(chunk, n)
    padded = -(-n // size) * size
    # Tokens with a weight come first; the loop stops after them.
    order = jnp.argsort(weights.reshape(n) == 0, stable=True)
    order = jnp.pad(order, (0, padded - n), constant_values=n)
    flat_hidden = hidden.reshape(n, D)
    flat_targets, flat_weights = targets.reshape(n), weights.reshape(n)
    chunks = padded // size if parts > 1 else (jnp.sum(flat_weights != 0) + size - 1) // size
    columns = jnp.arange(width) + first

    def body(i: jax.Array, carry: tuple[jax.Array, Sums]) -> tuple[jax.Array, Sums]:
        d_hidden, (loss, d_head, d_rows) = carry
        places = lax.dynamic_slice_in_dim(order, i * size, size)
        h = flat_hidden.at[places].get(mode="fill", fill_value=0)
        target = flat_targets.at[places].get(mode="fill", fill_value=0)
        weight = flat_weights.at[places].get(mode="fill", fill_value=0)
        logits = lax.dot_general(h, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if vocab < width * parts:
            logits = jnp.where(columns < vocab, logits, -1e30)
        top = jnp.max(logits, axis=-1)
        top = lax.pmax(top, axis) if parts > 1 else top
        total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        own = target - first
        rows_said = head[jnp.clip(own, 0, width - 1)].astype(jnp.float32)
        said = jnp.sum(h.astype(jnp.float32) * rows_said, axis=-1)  # reads far less memory than indexing the logits
        said = jnp.where((own >= 0) & (own < width), said, 0.0)
        if parts > 1:
            total, said = lax.psum((total, said), axis)
        normaliser = top + jnp.log(total)
        loss = loss + jnp.sum(weight * (normaliser - said))
        hit = columns == target[:, None]
        error = (jnp.exp(logits - normaliser[:, None]) - hit) * weight[:, None]
        error = error.astype(dtype)
        back = error @ head
        back = lax.psum(back, axis) if parts > 1 else back
        d_hidden = d_hidden.at[places].set(back, mode="drop")
        if d_head is not None:
            d_head = d_head + _over_tokens(error, h)
        if d_rows is not None:
            d_rows = d_rows + _over_tokens(error.at[:, ids].get(mode="fill", fill_value=0), h)
        return d_hidden, Sums(loss, d_head, d_rows)

    here = jax.tree.map(lambda x: x[0], sums)
    d_hidden, here = lax.fori_loop(0, chunks, body, (jnp.zeros((n, D), dtype), here))
    return d_hidden.reshape(B, T, D), jax.tree.map(lambda x: x[None], here)


def _over_tokens(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def token_statistics(
    model: MiniCPM, hidden: jax.Array, targets: jax.Array, chunk: int = 512
) -> tuple[jax.Array, jax.Array]:
    """For evaluation: float32 negative log-likelihoods and int32 argmax tokens, both `[B, T]`."""
    losses, best = [], []
    for i in range(0, hidden.shape[1], chunk):
        logits = model.logits(hidden[:, i : i + chunk])
        said = jnp.take_along_axis(logits, targets[:, i : i + chunk, None], axis=-1)[..., 0]
        losses.append(jax.nn.logsumexp(logits, axis=-1) - said)
        best.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return jnp.concatenate(losses, axis=1), jnp.concatenate(best, axis=1)
