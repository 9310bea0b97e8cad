"""A random model that runs at once, over a tokenizer with a token for each byte."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.model.tree import Params, from_tree, shapes, to_tree
from duplex_jax.template import make_template
from duplex_jax.tokenizer import _UNICODE_TO_BYTE, HFTokenizer

CONTROL = ("<s>", "<|im_end|>", "<idle>", "<|im_start|>", "<|user|>", "<|assistant|>")
CONFIG = ModelConfig(
    vocab_size=262, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_position_embeddings=4096, scale_emb=6.0, scale_depth=1.4, dim_model_base=16.0, tie_word_embeddings=False,
    initializer_range=0.4, vocab_multiple=8,
)  # fmt: skip
END = 257


def byte_tokenizer() -> HFTokenizer:
    """One token a byte, then `CONTROL`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": 256 + i, "content": t, **flags, "special": True} for i, t in enumerate(CONTROL)],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(_UNICODE_TO_BYTE), "merges": [],
        },
    }  # fmt: skip
    return HFTokenizer(spec, config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})


@functools.cache
def tiny_model(template: str = "compact", config: ModelConfig = CONFIG, seed: int = 0) -> LoadedModel:
    """A model that tells contexts apart: its logits spread widely, and it ends slices of all lengths.

    All three templates stop on the same two tokens, so one engine's programs serve them all.
    """
    model = fresh_model(config, seed)
    if model.head is not None:
        head = np.array(model.head.weight[...])
        head[END] *= 2.5
        model = with_params(model, head=head)
    tokenizer = byte_tokenizer()
    tokenizer.special["</s>"] = END
    return LoadedModel("tiny", model, tokenizer, make_template(template, tokenizer))


def fresh_tree(config: ModelConfig, seed: int = 0) -> Params:
    """Random weights on the host."""
    leaves, structure = jax.tree.flatten_with_path(shapes(config))

    def draw(path: Any, like: Any, key: jax.Array) -> np.ndarray:
        if "norm" in jax.tree_util.keystr(path):
            return np.ones(like.shape, np.float32)
        return np.asarray(jax.random.normal(key, like.shape) * config.initializer_range)

    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [draw(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def fresh_model(config: ModelConfig, seed: int = 0) -> MiniCPM:
    """A model with such weights."""
    return from_tree(config, fresh_tree(config, seed))


def with_params(model: MiniCPM, **changes: np.ndarray) -> MiniCPM:
    """A model with some weights of its tree, such as `head`, replaced."""
    return from_tree(model.config, to_tree(model) | changes)


def logits_of(config: ModelConfig, params: Params, tokens: Any) -> np.ndarray:
    """float32 `[B, T, V]` by a plain forward pass in float32."""
    model = from_tree(config, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
    return np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)))


class FreshForward:
    """Logits behind a context by one plain forward pass, without any cache."""

    def __init__(self, model: LoadedModel):
        self.config = model.config
        self._model = jax.tree.map(jnp.asarray, model.model)
        self._compute = jax.jit(lambda model, tokens, last: model.logits(model.hidden(tokens)[0, last]))

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """float32 `[V]`; lengths are padded to a few, which causal attention does not notice."""
        padded = next(n for n in (64, 128, 256, 512, 1024, 2048, 4096) if n >= len(ids))
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(self._compute(self._model, tokens, len(ids) - 1))


def with_config(**changes: object) -> ModelConfig:
    """`CONFIG` with some fields changed."""
    return dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
