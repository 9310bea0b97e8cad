"""Cross-entropy over packed rows, a chunk of tokens at a time: `[B, T, V]` never exists.

The loss of a step is sum(weight * nll) / sum(weight) over all its rows, so functions here give sums. The gradient is
made in the same pass as the loss, so each chunk's logits are made once; tokens that count for nothing are sorted to
the end and their chunks never run.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.parallel import BATCH_AXES


def targets_and_weights(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """What each position predicts, and the weight of it.

    Args:
        batch: `tokens`, `segment_ids` and `loss_weights` `[B, T]`; the weight of predicting that very token.

    Returns:
        int32 and float32 `[B, T]`: the next token, with weight 0 where it belongs to another document.
    """
    tokens, segments, weights = batch["tokens"], batch["segment_ids"], batch["loss_weights"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return targets, jnp.pad(jnp.where(same, weights[:, 1:], 0.0), ((0, 0), (0, 1)))


def cross_entropy(
    model: MiniCPM, hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = 512, *, frozen: bool = False
) -> jax.Array:
    """sum(weights * nll), differentiable in `hidden` and in the head, or in its trained rows where it is frozen.

    Args:
        model: the model.
        hidden: `[B, T, D]` from `MiniCPM.hidden`.
        targets: int32 `[B, T]`.
        weights: float32 `[B, T]`.
        chunk: tokens whose logits exist at once, on each device.
        frozen: whether the head gets no gradient, but for the rows that are trained beside it.
    """
    head = model.output
    rows = None if head.rows is None else (jnp.asarray(head.row_ids, jnp.int32), head.rows[...])
    return _sharded_loss(model.config.vocab_size, chunk, frozen, hidden, head.weight[...], rows, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sharded_loss(vocab, chunk, frozen, hidden, head, rows, targets, weights):
    return _loss_and_grads(vocab, chunk, frozen, hidden, head, rows, targets, weights, grads=False)[0]


def _forward(vocab, chunk, frozen, hidden, head, rows, targets, weights):
    loss, *grads = _loss_and_grads(vocab, chunk, frozen, hidden, head, rows, targets, weights, grads=True)
    return loss, (tuple(grads), hidden[:0, :0, :0], head[:0, :0], None if rows is None else rows[1][:0])


def _backward(vocab, chunk, frozen, residuals, g):
    (d_hidden, d_head, d_rows), hidden_like, head_like, rows_like = residuals

    def scaled(x, like):
        return None if x is None else (x * g).astype(like.dtype)

    rows_cotangent = None if d_rows is None else (None, scaled(d_rows, rows_like))
    return scaled(d_hidden, hidden_like), scaled(d_head, head_like), rows_cotangent, None, None


_sharded_loss.defvjp(_forward, _backward)


def _loss_and_grads(vocab, chunk, frozen, hidden, head, rows, targets, weights, *, grads):
    """(loss, d hidden, d head, d rows), the last three None where they are not asked for."""
    local = functools.partial(_local, vocab, chunk, grads, frozen)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(1, None, hidden, head, rows, targets, weights)
    # Every device takes its own rows of the batch and its own part of the vocabulary; what it lacks of the head comes
    # once before the loop, and what it knows of the head's gradient goes out once behind it.
    batch, table = P(BATCH_AXES), P("tensor", "fsdp")

    def on_device(hidden, head, rows, targets, weights):
        head = lax.all_gather(head, "fsdp", axis=1, tiled=True)
        if rows is not None:
            rows = (rows[0], lax.all_gather(rows[1], "fsdp", axis=1, tiled=True))
        loss, d_hidden, d_head, d_rows = local(mesh.shape["tensor"], "tensor", hidden, head, rows, targets, weights)
        loss = lax.psum(loss, BATCH_AXES)

        def summed(x):
            x = lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)
            return lax.psum(x, ("slice", "data"))

        if d_head is not None:
            d_head = summed(d_head)
        if d_rows is not None:
            d_rows = summed(lax.psum(d_rows, "tensor"))
        return loss, d_hidden, d_head, d_rows

    row_spec = None if rows is None else (P(), P(None, "fsdp"))
    return jax.shard_map(
        on_device, in_specs=(batch, table, row_spec, batch, batch),
        out_specs=(P(), batch if grads else None, table if grads and not frozen else None,
                   P(None, "fsdp") if grads and rows is not None else None),
        check_vma=False,
    )(hidden, head, rows, targets, weights)  # fmt: skip


def _local(vocab, chunk, grads, frozen, parts, axis, hidden, head, rows, targets, weights):
    """The loss of one device's tokens over its part of the vocabulary, in a loop over chunks."""
    B, T, D = hidden.shape
    width = head.shape[0]
    first = lax.axis_index(axis) * width if axis else 0
    dtype = hidden.dtype
    head = head.astype(dtype)
    if rows is not None:
        ids = rows[0] - first
        ids = jnp.where((ids >= 0) & (ids < width), ids, width)  # of another part: nothing is set or read
        head = head.at[ids].set(rows[1].astype(dtype), mode="drop")
    n = B * T
    size = min(chunk, n)
    padded = -(-n // size) * size
    # Tokens that count, first; the loop ends where they do.
    order = jnp.argsort(weights.reshape(n) == 0, stable=True)
    order = jnp.pad(order, (0, padded - n), constant_values=n)
    flat_hidden = hidden.reshape(n, D)
    flat_targets, flat_weights = targets.reshape(n), weights.reshape(n)
    chunks = padded // size if parts > 1 else (jnp.sum(flat_weights != 0) + size - 1) // size
    columns = jnp.arange(width) + first

    def body(i, carry):
        loss, d_hidden, d_head, d_rows = carry
        places = lax.dynamic_slice_in_dim(order, i * size, size)
        h = flat_hidden.at[places].get(mode="fill", fill_value=0)
        target = flat_targets.at[places].get(mode="fill", fill_value=0)
        weight = flat_weights.at[places].get(mode="fill", fill_value=0)
        logits = _logits(h, head)
        if vocab < width * parts:
            logits = jnp.where(columns < vocab, logits, -1e30)
        top = jnp.max(logits, axis=-1)
        top = lax.pmax(top, axis) if parts > 1 else top
        total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        own = target - first
        rows_said = head[jnp.clip(own, 0, width - 1)].astype(jnp.float32)
        said = jnp.sum(h.astype(jnp.float32) * rows_said, axis=-1)  # reads far less than picking it out of the logits
        said = jnp.where((own >= 0) & (own < width), said, 0.0)
        if parts > 1:
            total, said = lax.psum((total, said), axis)
        normaliser = top + jnp.log(total)
        loss = loss + jnp.sum(weight * (normaliser - said))
        if grads:
            hit = columns == target[:, None]
            error = (jnp.exp(logits - normaliser[:, None]) - hit) * weight[:, None]
            error = error.astype(dtype)
            back = error @ head
            back = lax.psum(back, axis) if parts > 1 else back
            d_hidden = d_hidden.at[places].set(back, mode="drop")
            if not frozen:
                d_head = d_head + lax.dot_general(
                    error, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
                )
            if rows is not None:
                taken = error.at[:, ids].get(mode="fill", fill_value=0)
                d_rows = d_rows + lax.dot_general(
                    taken, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
                )
        return loss, d_hidden, d_head, d_rows

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((n, D), dtype) if grads else None,
        jnp.zeros((width, D), jnp.float32) if grads and not frozen else None,
        jnp.zeros((rows[0].shape[0], D), jnp.float32) if grads and rows is not None else None,
    )
    loss, d_hidden, d_head, d_rows = lax.fori_loop(0, chunks, body, start)
    return loss, None if d_hidden is None else d_hidden.reshape(B, T, D), d_head, d_rows


def _logits(h: jax.Array, head: jax.Array) -> jax.Array:
    return lax.dot_general(h, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def token_statistics(
    model: MiniCPM, hidden: jax.Array, targets: jax.Array, chunk: int = 512
) -> tuple[jax.Array, jax.Array]:
    """For evaluation: float32 negative log-likelihoods and int32 likeliest tokens, both `[B, T]`."""
    losses, best = [], []
    for i in range(0, hidden.shape[1], chunk):
        logits = model.logits(hidden[:, i : i + chunk])
        said = jnp.take_along_axis(logits, targets[:, i : i + chunk, None], axis=-1)[..., 0]
        losses.append(jax.nn.logsumexp(logits, axis=-1) - said)
        best.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return jnp.concatenate(losses, axis=1), jnp.concatenate(best, axis=1)
