"""MiniCPM as a Flax NNX module (Hu et al. 2024, "MiniCPM"; the released modelling code).

    x = scale_emb * embed[tokens]
    x = x + residual_scale * attention(rms_norm(x))        for each layer, residual_scale = scale_depth / sqrt(L)
    x = x + residual_scale * down(silu(gate(rms_norm(x))) * up(rms_norm(x)))
    logits = head(rms_norm(x) / (D / dim_model_base))

The parameters of `MiniCPM` are the one declaration of the model's weights: initial values, abstract shapes
(`nnx.eval_shape`), shardings (`out_sharding`), names in files (`model.tree`), low-rank updates (`model.lora`) and what
decoding stores are all read from them.
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

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class MiniCPM(nnx.Module):
    """The model.

    Attributes:
        config: its shape and scales.
        embed: embeddings of tokens.
        layers: a `Block` whose weights are stacked, `[L, ...]`, as training scans them; or, after `unstack`, L blocks,
            as decoding runs them.
        final_norm: the norm in front of the head.
        head: the head's table where it is not the embedding's, else None.
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
        """What the last hidden states are compared with."""
        return self.embed if self.head is None else self.head

    @property
    def blocks(self) -> list[Block]:
        """The layers, one by one, of a model that `unstack` made."""
        assert not isinstance(self.layers, Block)
        return list(self.layers)

    @property
    def dtype(self) -> Any:
        """That of the embedding."""
        return self.embed.weight.dtype

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """float32 logits `[B, T, V]` of tokens `[B, T]`; arguments as for `hidden`."""
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
        """Hidden states of packed rows; `logits` makes logits of them.

        Args:
            tokens: int32 `[B, T]`.
            positions: int32 `[B, T]`, restarting in each segment; None for 0, 1, 2, ...
            segment_ids: int32 `[B, T]`, a token sees only its own segment; None for one segment a row.
            dtype: of the computation; that of the norms by default.
            attend: attention of all layers, in place of causal attention within segments.
            remat: what the backward pass computes again, one of `REMAT`.
            shard: puts a sharding constraint on activations by logical axes.
            capacity: positions that rotary scaling is fixed for; T by default.

        Returns:
            `[B, T, D]`, normalised and divided.

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

        # Each device looks up its part of the width for all rows, and rows travel: the table stays where it is.
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
        """The last layer's `[..., D]`, ready for the head."""
        return self.final_norm(x) / self.config.logit_divisor

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 `[..., V]` from `[..., D]` as `hidden` returns it; padded columns are -1e30."""
        return mask_padding(self.config, self.output.scores(hidden))


def mask_padding(config: ModelConfig, scores: jax.Array) -> jax.Array:
    """Logits `[..., V]` with -1e30 for the rows that pad the vocabulary."""
    if config.padded_vocab_size == config.vocab_size:
        return scores
    return jnp.where(jnp.arange(scores.shape[-1]) < config.vocab_size, scores, -1e30)


def abstract(config: ModelConfig) -> MiniCPM:
    """The model with `jax.ShapeDtypeStruct`s for weights: nothing is allocated."""
    return nnx.eval_shape(lambda: MiniCPM(config, rngs=nnx.Rngs(0)), graph=False)


def unstack(model: MiniCPM) -> MiniCPM:
    """A model of the same weights with its layers apart."""
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
