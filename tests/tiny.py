"""A random model that runs at once, over a tokenizer with a token for each byte."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.model import minicpm
from duplex_jax.model.config import ModelConfig
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
    params = jax.tree.map(np.asarray, minicpm.init_params(config, jax.random.key(seed)))
    params["head"] = np.array(params["head"])
    params["head"][END] *= 2.5
    tokenizer = byte_tokenizer()
    tokenizer.special["</s>"] = END
    return LoadedModel("tiny", config, params, tokenizer, make_template(template, tokenizer))


class FreshForward:
    """Logits behind a context by one plain forward pass, without any cache."""

    def __init__(self, model: LoadedModel):
        self.config = model.config
        self.params = jax.tree.map(jnp.asarray, model.params)
        self._compute = jax.jit(self._last)

    def _last(self, params: minicpm.Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
        hidden = minicpm.forward(self.config, params, tokens)
        return minicpm.logits(self.config, params, hidden[0, last])

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """float32 `[V]`; lengths are padded to a few, which causal attention does not notice."""
        padded = next(n for n in (64, 128, 256, 512, 1024, 2048, 4096) if n >= len(ids))
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(self._compute(self.params, tokens, len(ids) - 1))


def with_config(**changes: object) -> ModelConfig:
    """`CONFIG` with some fields changed."""
    return dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
