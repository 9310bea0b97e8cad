"""MiniCPM as pure functions over one tree of stacked weights, and its Flax NNX module.

    x = scale_emb * embed[tokens]
    x = x + residual_scale * attention(rms_norm(x))        for each layer, residual_scale = scale_depth / sqrt(L)
    x = x + residual_scale * down(silu(gate(rms_norm(x))) * up(rms_norm(x)))
    logits = head(rms_norm(x) / (D / dim_model_base))

(Hu et al. 2024, "MiniCPM"; the released modelling code.) One block serves training and cached decoding: what differs is
the `attend` that it is given. Letters: B rows, T tokens, D hidden, N query heads, K key heads, H head width, F SwiGLU
width, L layers, V padded vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from duplex_jax import native
from duplex_jax.errors import UserError
from duplex_jax.model import attention, matrix, rope
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.matrix import Matrix
from duplex_jax.native import training

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Shard = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One declaration of a weight: its shape, its logical axes, and how a fresh one is drawn.

    Attributes:
        shape: with the layer axis in front where weights are stacked.
        axes: the logical name of each axis; `parallel` says which mesh axis carries it.
        init: `normal` or `ones`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"


def declare(config: ModelConfig) -> dict[str, Any]:
    """Every weight of the model, once; initial values, shardings and abstract trees all come from here."""
    D, F, L, V = config.hidden_size, config.intermediate_size, config.num_layers, config.padded_vocab_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tree: dict[str, Any] = {
        "embed": Weight((V, D), ("vocab", "embed")),
        "layers": {
            "attn_norm": Weight((L, D), ("layers", "norm"), "ones"),
            "q": Weight((L, D, q), ("layers", "embed", "heads")),
            "k": Weight((L, D, kv), ("layers", "embed", "kv_heads")),
            "v": Weight((L, D, kv), ("layers", "embed", "kv_heads")),
            "o": Weight((L, q, D), ("layers", "heads", "embed")),
            "mlp_norm": Weight((L, D), ("layers", "norm"), "ones"),
            "gate": Weight((L, D, F), ("layers", "embed", "mlp")),
            "up": Weight((L, D, F), ("layers", "embed", "mlp")),
            "down": Weight((L, F, D), ("layers", "mlp", "embed")),
        },
        "final_norm": Weight((D,), ("norm",), "ones"),
    }
    if not config.tie_word_embeddings:
        tree["head"] = Weight((V, D), ("vocab", "embed"))
    return tree


def _is_weight(x: Any) -> bool:
    return isinstance(x, Weight)


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Fresh weights: normal with `initializer_range`, norms at one."""
    weights, treedef = jax.tree.flatten(declare(config), is_leaf=_is_weight)
    keys = jax.random.split(key, len(weights))

    def draw(weight: Weight, key: jax.Array) -> jax.Array:
        if weight.init == "ones":
            return jnp.ones(weight.shape, dtype)
        return (jax.random.normal(key, weight.shape, jnp.float32) * config.initializer_range).astype(dtype)

    return jax.tree.unflatten(treedef, [draw(w, k) for w, k in zip(weights, keys, strict=True)])


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The tree as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), declare(config), is_leaf=_is_weight)


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The tree of each weight's logical axes."""
    return jax.tree.map(lambda w: w.axes, declare(config), is_leaf=_is_weight)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight).astype(x.dtype)


@jax.custom_vjp
def _matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Written out, for JAX's own rule makes the weight's gradient transposed: on CPU, XLA then computes whatever made
    # dy a second time in that order, which took a third of a training step.
    x, weight = residuals
    dy = lax.optimization_barrier(dy)
    rows, columns = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ weight.T, lax.dot_general(rows, columns, (((0,), (0,)), ((), ())))


_matmul.defvjp(lambda x, weight: (x @ weight, (x, weight)), _matmul_backward)


@jax.custom_vjp
def _updated_matmul(x: jax.Array, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`x` times the weight with its update added to it: one wide product in place of a wide one and two thin ones."""
    return x @ (weight + a @ b)


def _updated_matmul_backward(residuals: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, weight, a, b = residuals
    dy = lax.optimization_barrier(dy)
    rows, columns = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    thin = (((0,), (0,)), ((), ()))
    return (
        dy @ (weight + a @ b).T, jnp.zeros_like(weight),
        lax.dot_general(rows, columns @ b.T, thin), lax.dot_general(rows @ a, columns, thin),
    )  # fmt: skip


_updated_matmul.defvjp(lambda x, weight, a, b: (_updated_matmul(x, weight, a, b), (x, weight, a, b)),
                       _updated_matmul_backward)  # fmt: skip


def dense(x: jax.Array, layer: Params, name: str) -> jax.Array:
    """`x` `[..., in]` times the layer's weight `[in, out]`, plus its low-rank update where there is one."""
    if isinstance(layer[name], Matrix):
        return matrix.matmul(x, layer[name])
    weight = layer[name].astype(x.dtype)
    lora = layer.get("lora", {}).get(name)
    if lora is None:
        return _matmul(x, weight)
    a, b = lora["a"].astype(x.dtype), lora["b"].astype(x.dtype)
    if x.dtype == jnp.float32:
        return _updated_matmul(x, weight, a, b)
    return _matmul(x, weight) + _matmul(_matmul(x, a), b)  # a small update would be rounded away in the sum


def _dense_each(x: jax.Array, layer: Params, *names: str) -> list[jax.Array]:
    """`dense` with several weights, which decoding may have stored side by side."""
    joint = layer.get(_joint(names))
    if joint is None:
        return [dense(x, layer, name) for name in names]
    return matrix.split(matrix.matmul(x, joint), joint)


def _joint(names: Sequence[str]) -> str:
    return "+".join(names)


def block(
    config: ModelConfig,
    layer: Params,
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    attend: Attend,
    kv: Any = None,
) -> tuple[jax.Array, Any]:
    """One layer.

    Args:
        config: the model.
        layer: its weights, without the layer axis.
        x: `[B, T, D]`.
        tables: rotary cosines and sines of the tokens' positions.
        attend: from rotated q `[B, T, N, H]`, k and v `[B, T, K, H]`, and `kv`, to `[B, T, N, H]` and whatever the
            caller wants kept of this layer.
        kv: what this layer has cached, handed through.

    Returns:
        `[B, T, D]`, and what `attend` gave to keep.
    """
    B, T, _ = x.shape
    y = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
    q, k, v = _dense_each(y, layer, *_QKV)
    q = q.reshape(B, T, config.num_heads, config.head_dim)
    k = k.reshape(B, T, config.num_kv_heads, config.head_dim)
    v = v.reshape(B, T, config.num_kv_heads, config.head_dim)
    y, kept = attend(rope.rotate(q, tables), rope.rotate(k, tables), v, kv)
    x = x + dense(y.reshape(B, T, -1), layer, "o") * config.residual_scale
    y = rms_norm(x, layer["mlp_norm"], config.rms_norm_eps)
    gate, up = _dense_each(y, layer, *_GATE_UP)
    y = dense(jax.nn.silu(gate) * up, layer, "down")
    return x + y * config.residual_scale, kept


def cached_block(
    config: ModelConfig, layer: Params, x: jax.Array, tables: tuple[jax.Array, jax.Array],
    rows: Sequence[jax.Array], entries: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:  # fmt: skip
    """`block` over a cache by the native kernels, for weights in panels; see `native.block`."""
    joint = {name: (layer[name].data, layer[name].scales) for name in (_joint(_QKV), "o", _joint(_GATE_UP), "down")}
    weights = [
        layer["attn_norm"], *joint[_joint(_QKV)], *joint["o"],
        layer["mlp_norm"], *joint[_joint(_GATE_UP)], *joint["down"],
    ]  # fmt: skip
    return native.block(
        x, tables, rows, weights, entries, num_heads=config.num_heads, eps=config.rms_norm_eps,
        residual_scale=config.residual_scale,
    )  # fmt: skip


def embed(config: ModelConfig, params: Params, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Scaled embeddings `[B, T, D]` of tokens `[B, T]`."""
    if isinstance(params["embed"], Matrix):
        return matrix.columns(params["embed"], tokens).astype(dtype) * config.scale_emb
    x = params["embed"][tokens].astype(dtype)
    if "rows" in params:  # rows that are trained beside a frozen table
        hit = tokens[..., None] == params["rows"]["ids"]
        x = jnp.where(hit.any(-1, keepdims=True), hit.astype(dtype) @ params["rows"]["embed"].astype(dtype), x)
    return x * config.scale_emb


def head_input(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """The last hidden states normalised and divided, ready for the head."""
    return rms_norm(x, params["final_norm"], config.rms_norm_eps) / config.logit_divisor


def head_weight(config: ModelConfig, params: Params) -> Any:
    """The head's matrix `[V, D]`, or `[D, V]` as a `Matrix`."""
    table = "embed" if config.tie_word_embeddings else "head"
    if "rows" in params:
        return params[table].at[params["rows"]["ids"]].set(params["rows"][table].astype(params[table].dtype))
    return params[table]


def logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """float32 `[..., V]` from hidden states `[..., D]` as `forward` returns them; padded columns are -1e30."""
    head = head_weight(config, params)
    if isinstance(head, Matrix):
        out = matrix.matmul(hidden.astype(jnp.float32), head)
    else:
        out = jax.lax.dot_general(
            hidden, head.astype(hidden.dtype), (((hidden.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
    if config.padded_vocab_size == config.vocab_size:
        return out
    return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, out, -1e30)


def unstack(params: Params) -> Params:
    """The tree with its layers apart, as decoding takes it: `layers` is a tuple of L trees without the layer axis."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    number = len(jax.tree.leaves(layers)[0])
    return params | {"layers": tuple(jax.tree.map(lambda w: w[i], layers) for i in range(number))}  # noqa: B023


_QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")


def store(config: ModelConfig, params: Params, how: str, in_panels: bool, dtype: Any) -> Params:
    """The tree of `unstack` with its matrices as `Matrix`, those that meet the same input side by side.

    Args:
        config: the model.
        params: weights without updates beside them.
        how: one of `matrix.STORES`.
        in_panels: for the native kernels, which compute in float32.
        dtype: of everything else, and so of the computation.
    """

    def layer(weights: Params) -> Params:
        joint = {_joint(names): [weights[name] for name in names] for names in (_QKV, _GATE_UP, ("o",), ("down",))}
        norms = {name: jnp.asarray(weights[name], dtype) for name in ("attn_norm", "mlp_norm")}
        return norms | {name: matrix.store(parts, how, in_panels) for name, parts in joint.items()}

    head = "embed" if config.tie_word_embeddings else "head"
    # The head first: its temporaries are the largest, and nothing else is there yet.
    tree: Params = {head: matrix.store([params[head].T], how, in_panels)}
    tree |= {name: jnp.asarray(w, dtype) for name, w in params.items() if name not in ("layers", head)}
    return tree | {"layers": tuple(layer(weights) for weights in unstack(params)["layers"])}


def _unsharded(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return x


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    dtype: Any = None,
    remat: str = "none",
    backend: str = "xla",
    shard: Shard = _unsharded,
    partition: attention.Partition | None = None,
    kernels: bool = False,
) -> jax.Array:
    """Hidden states for packed rows; `logits` makes logits of them.

    Args:
        config: the model.
        params: the tree that `declare` describes, or `unstack` of it.
        tokens: int32 `[B, T]`.
        positions: int32 `[B, T]`, restarting in each segment; None for 0, 1, 2, ...
        segment_ids: int32 `[B, T]`; None for one segment a row.
        dtype: of the computation; the weights' own by default.
        remat: what the backward pass computes again, one of `REMAT`.
        backend: of attention.
        shard: puts a sharding constraint on activations by logical axes.
        partition: mesh axes from logical ones, for attention kernels that run on each device's part.
        kernels: whether the CPU's own kernels run the layers (`native.training`): stacked weights on one device, in
            float32; `remat` and `backend` are not theirs.

    Returns:
        `[B, T, D]`, normalised, ready for `logits`.

    Raises:
        UserError: unknown remat policy or attention backend.
    """
    if remat not in REMAT:
        raise UserError(f"remat {remat!r} is unknown; one of {', '.join(REMAT)}")
    dtype = dtype or params["final_norm"].dtype
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    tables = rope.rotary_tables(config, positions, tokens.shape[1])
    if kernels:
        x = training.layers(
            embed(config, params, tokens, jnp.float32), tables,
            jnp.zeros(tokens.shape, jnp.int32) if segment_ids is None else segment_ids, params["layers"],
            num_kv_heads=config.num_kv_heads, eps=config.rms_norm_eps, residual_scale=config.residual_scale,
        )  # fmt: skip
        return head_input(config, params, x)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> tuple[jax.Array, None]:
        q = shard(q, ("batch", "length", "heads", None))
        k, v = (shard(a, ("batch", "length", "kv_heads", None)) for a in (k, v))
        return attention.attend(q, k, v, segment_ids, backend, partition), None

    def body(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        x, _ = block(config, layer, x, tables, attend)
        return shard(x, ("batch", "length", "activation")), None

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    x = shard(embed(config, params, tokens, dtype), ("batch", "length", "activation"))
    if isinstance(params["layers"], tuple):
        for layer in params["layers"]:
            x, _ = body(x, layer)
    else:
        x, _ = jax.lax.scan(body, x, params["layers"])
    return head_input(config, params, x)


class MiniCPM(nnx.Module):
    """The model as a Flax NNX module: its weights as `nnx.Param`s with their logical axes as metadata.

    The computation is `forward`'s; `nnx.split` and `pure` give the plain tree back for jitted functions.

    Args:
        config: the model's shape and scales.
        rngs: draws fresh weights from its `params` stream.
        params: given weights instead.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None = None, params: Params | None = None):
        if params is None:
            if rngs is None:
                raise UserError("MiniCPM needs rngs to draw weights from, or params")
            params = init_params(config, rngs.params())
        self.config = config
        axes = logical_axes(config)
        self.embed = nnx.Param(params["embed"], axes=axes["embed"])
        self.layers = nnx.Dict(
            {name: nnx.Param(value, axes=axes["layers"][name]) for name, value in params["layers"].items()}
        )
        self.final_norm = nnx.Param(params["final_norm"], axes=axes["final_norm"])
        if not config.tie_word_embeddings:
            self.head = nnx.Param(params["head"], axes=axes["head"])

    def pure(self) -> Params:
        """The weights as the plain tree that `forward` takes."""
        tree: Params = {
            "embed": self.embed[...],
            "layers": {name: p[...] for name, p in self.layers.items()},
            "final_norm": self.final_norm[...],
        }
        if not self.config.tie_word_embeddings:
            tree["head"] = self.head[...]
        return tree

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """float32 logits `[B, T, V]`; options are `forward`'s."""
        params = self.pure()
        return logits(self.config, params, forward(self.config, params, tokens, positions, segment_ids, **options))
