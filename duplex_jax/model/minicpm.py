"""MiniCPM as a Flax NNX module (Hu et al. 2024, "MiniCPM"; the released modelling code).

    x = scale_emb * embed[tokens]
    x = x + residual_scale * attention(rms_norm(x))        for each layer, residual_scale = scale_depth / sqrt(L)
    x = x + residual_scale * down(silu(gate(rms_norm(x))) * up(rms_norm(x)))
    logits = head(rms_norm(x) / (D / dim_model_base))

The parameters of `MiniCPM` are the single declaration of the model's weights. Initial values, abstract shapes
(`nnx.eval_shape`), shardings (`out_sharding`), names in files (`model.tree`), low-rank updates (`model.lora`) and
decoding's storage formats all derive from them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from duplex_jax.errors import UserError
from duplex_jax.model import attention, rope
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.layers import Attend, Block, Embedding, RMSNorm, parameter

Shard = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

_ATTENTION = jax.checkpoint_policies.save_only_these_names(attention.SAVED)

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
}
"""What the forward pass keeps, by remat policy: everything; each layer's input; attention's results too; those and the
results of products with weights."""


class MiniCPM(nnx.Module):
    """The language model.

    Attributes:
        config: shape and scales.
        embed: token embeddings.
        layers: a `Block` with stacked weights, `[L, ...]`, for training; after `unstack`, a list of L blocks, for
            decoding.
        final_norm: the norm before the head.
        head: the head's table, or None if it shares the embedding's.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.config = config
        self.embed = Embedding(config, rngs=rngs)
        self.layers: Block | nnx.List[Block] = blocks(rngs)
        self.final_norm = RMSNorm(config)
        self.head: Embedding | None = None if config.tie_word_embeddings else Embedding(config, rngs=rngs)

    @property
    def output(self) -> Embedding:
        """The table that scores the last hidden states: the head's, or the embedding's where they are tied."""
        return self.embed if self.head is None else self.head

    @property
    def blocks(self) -> list[Block]:
        """The layers as a list; the model must come from `unstack`."""
        assert not isinstance(self.layers, Block)
        return list(self.layers)

    @property
    def dtype(self) -> Any:
        """The embedding's dtype."""
        return self.embed.weight.dtype

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """float32 logits `[B, T, V]` of tokens `[B, T]`; for the arguments see `hidden`."""
        return self.logits(self.hidden(tokens, positions, segment_ids))

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        dtype: Any = None,
        attend: Attend | None = None,
        remat: str = "none",
        shard: Shard = lambda x, axes: x,
        capacity: int | None = None,
    ) -> jax.Array:
        """Hidden states of packed rows, as `logits` takes them.

        Args:
            tokens: int32 `[B, T]`.
            positions: int32 `[B, T]`, restarting in each segment; None for 0, 1, 2, ...
            segment_ids: int32 `[B, T]`; a token attends only within its own segment. None for one segment per row.
            dtype: dtype of the computation; that of the norms by default.
            attend: attention used in every layer; causal attention within segments by default.
            remat: rematerialisation policy of the backward pass, one of `REMAT`.
            shard: adds a sharding constraint to an activation, given its logical axes.
            capacity: context length that rotary scaling is computed for; T by default.

        Returns:
            `[B, T, D]`, after the final norm and divided by `logit_divisor`.

        Raises:
            UserError: unknown remat policy.
        """
        if remat not in REMAT:
            raise UserError(f"remat {remat!r} is unknown; one of {', '.join(REMAT)}")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        tables = rope.rotary_tables(self.config, positions, capacity or tokens.shape[1])
        see = attend or (lambda q, k, v: attention.attend(q, k, v, segment_ids))

        def run(block: Block, x: jax.Array) -> jax.Array:
            return shard(block(x, tables, see), ("batch", "length", "activation"))

        # Each device looks up its slice of the width for all rows, so rows are exchanged and the table is not gathered.
        x = self.embedded(shard(tokens, ("rows", "length")), dtype or self.final_norm.weight.dtype)
        x = shard(shard(x, ("rows", "length", "embed")), ("batch", "length", "activation"))
        if not isinstance(self.layers, Block):
            for block in self.blocks:
                x = run(block, x)
            return self.normalised(x)
        graphdef, stacked = nnx.split(self.layers)

        def body(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            return run(nnx.merge(graphdef, weights), x), None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
        return self.normalised(lax.scan(body, x, stacked)[0])

    def embedded(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Scaled embeddings `[B, T, D]` of tokens `[B, T]`."""
        return self.embed(tokens, dtype) * self.config.scale_emb

    def normalised(self, x: jax.Array) -> jax.Array:
        """The last layer's output `[..., D]`, normalised and scaled for the head."""
        return self.final_norm(x) / self.config.logit_divisor

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits `[..., V]` of hidden states `[..., D]`; columns that pad the vocabulary are -1e30."""
        return mask_padding(self.config, self.output.scores(hidden))


def mask_padding(config: ModelConfig, scores: jax.Array) -> jax.Array:
    """Logits `[..., V]` with the columns that pad the vocabulary set to -1e30."""
    if config.padded_vocab_size == config.vocab_size:
        return scores
    return jnp.where(jnp.arange(scores.shape[-1]) < config.vocab_size, scores, -1e30)


def abstract(config: ModelConfig) -> MiniCPM:
    """The model with `jax.ShapeDtypeStruct`s as weights; allocates nothing."""
    return nnx.eval_shape(lambda: MiniCPM(config, rngs=nnx.Rngs(0)), graph=False)


def unstack(model: MiniCPM) -> MiniCPM:
    """The same model with its layers as a list of L blocks instead of one stacked block."""
    if not isinstance(model.layers, Block):
        return model
    graphdef, stacked = nnx.split(model.layers)
    apart = nnx.merge(*nnx.split(model))
    apart.layers = nnx.List(nnx.merge(graphdef, _layer(stacked, i)) for i in range(model.config.num_layers))
    return apart


def _layer(stacked: nnx.State, i: int) -> nnx.State:
    def one(weight: nnx.Variable) -> nnx.Variable:
        value = weight.get_raw_value()
        cut = (
            jax.ShapeDtypeStruct(value.shape[1:], value.dtype) if isinstance(value, jax.ShapeDtypeStruct) else value[i]
        )
        return parameter(cut, *weight.out_sharding[1:], kind=type(weight))

    return jax.tree.map(one, stacked, is_leaf=lambda x: isinstance(x, nnx.Variable))
