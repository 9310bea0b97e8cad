"""A model's shape and scales, read from its `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from duplex_jax.errors import UserError

STORES = ("float32", "bfloat16", "int8")
"""Storage types of weights and cache entries for decoding."""

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling; the fields are those of Hugging Face configs.

    Attributes:
        type: one of `ROPE_TYPES`.
        factor: the ratio of the stretched to the original length.
        original_length: positions that the unscaled model was trained for.
        low_freq_factor, high_freq_factor: `llama3`: bounds of the band of wavelengths that is interpolated.
        beta_fast, beta_slow: `yarn`: the numbers of rotations between which the ramp runs.
        attention_factor: `yarn`, `longrope`: factor on cosines and sines; None for the formula's default.
        short_factor, long_factor: `longrope`: one divisor per frequency, `[H / 2]`.
    """

    type: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def check(self, head_dim: int) -> None:
        """Checks the fields for heads of width `head_dim`.

        Raises:
            UserError: a field is out of range; the message names it.
        """
        numbers = {"factor": self.factor, "attention_factor": self.attention_factor}
        numbers |= {n: getattr(self, n) for n in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")}
        for name, value in numbers.items():
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < 1e9):
                raise UserError(f"RoPE scaling with {name}={value!r:.40}; must be a finite number above 0")
        if self.type == "longrope":
            for name in ("short_factor", "long_factor"):
                row = getattr(self, name)
                whole = all(isinstance(x, (int, float)) and 0 < x < 1e9 for x in row)
                if len(row) != head_dim // 2 or not whole:
                    raise UserError(f"RoPE scaling with {name}: must hold {head_dim // 2} finite numbers above 0")


_SIZES = (
    ("vocab_size", 1, 2**24),
    ("hidden_size", 1, 2**20),
    ("intermediate_size", 1, 2**22),
    ("num_layers", 1, 2**12),
    ("num_heads", 1, 2**12),
    ("num_kv_heads", 1, 2**12),
    ("head_dim", 1, 2**14),
    ("max_position_embeddings", 1, 2**31),
    ("vocab_multiple", 1, 2**20),
)
"""Allowed ranges of the sizes, so that a damaged file cannot ask for absurd amounts of memory."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A MiniCPM. With `scale_emb` 1 and neither `scale_depth` nor `dim_model_base` it is a Llama.

    Attributes:
        vocab_size: V, vocabulary entries without padding.
        hidden_size: D.
        intermediate_size: F, the width of SwiGLU.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N.
        head_dim: H.
        max_position_embeddings: positions that the model was trained for.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the frequencies are scaled to longer contexts.
        scale_emb: factor on the embeddings.
        scale_depth: residual branches are scaled by `scale_depth / sqrt(L)`; None for 1.
        dim_model_base: logits are divided by `D / dim_model_base`; None for 1.
        tie_word_embeddings: whether the head shares the embedding's weights.
        vocab_multiple: the stored vocabulary is padded to a multiple of this, so that it can be sharded.
        initializer_range: standard deviation of initial weights.
        bos_token_id, eos_token_id: kept for export.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    scale_emb: float = 1.0
    scale_depth: float | None = None
    dim_model_base: float | None = None
    tie_word_embeddings: bool = True
    vocab_multiple: int = 1
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self):
        for name, least, most in _SIZES:
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or not least <= size < most:
                raise UserError(f"{name} is {size!r:.40}; must be a whole number from {least} to {most - 1}")
        for name in ("rms_norm_eps", "rope_theta", "scale_emb", "scale_depth", "dim_model_base", "initializer_range"):
            value = getattr(self, name)
            optional = value is None and name in ("scale_depth", "dim_model_base")
            if not optional and not (isinstance(value, (int, float)) and 0 <= value < 1e12):
                raise UserError(f"{name} is {value!r:.40}; must be a finite number that is not negative")
        if not self.rope_theta or self.dim_model_base == 0:
            raise UserError("rope_theta and dim_model_base must be above 0")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_attention_heads {self.num_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_kv_heads}")  # fmt: skip
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        self.rope_scaling.check(self.head_dim)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the stored embedding and columns of the logits."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def residual_scale(self) -> float:
        """Factor on each residual branch."""
        return 1.0 if self.scale_depth is None else self.scale_depth / math.sqrt(self.num_layers)

    @property
    def logit_divisor(self) -> float:
        """Divisor of the last hidden state before the head."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base

    @property
    def num_params(self) -> int:
        """Number of weights, vocabulary padding excluded."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        vocabularies = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + self.hidden_size * (1 + vocabularies * self.vocab_size)


# If one of these fields is set, the checkpoint needs arithmetic that this model does not have.
_UNSUPPORTED_IF_SET = (
    "attention_bias", "mlp_bias", "qkv_bias", "use_qk_norm", "qk_norm", "num_experts", "num_local_experts",
    "kv_lora_rank", "q_lora_rank", "quantization_config", "use_sliding_window", "attn_logit_softcapping",
    "final_logit_softcapping", "sparse_config",
)  # fmt: skip
_MODEL_TYPES = ("minicpm", "llama", "mistral", "granite")


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Reads a Hugging Face `config.json` of MiniCPM or of a Llama-like model.

    Raises:
        UserError: a field is missing or not supported; the message names it.
    """
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise UserError(f"{where}: model_type {kind!r} is not supported; one of {', '.join(_MODEL_TYPES)}")
    for name in _UNSUPPORTED_IF_SET:
        if config.get(name):
            raise UserError(f"{where}: {name}={config[name]!r} is not supported; plain MiniCPM and Llama blocks are")
    try:
        window, longest = config.get("sliding_window"), config.get("max_position_embeddings", 4096)
        if window and window < longest:
            raise UserError(f"{where}: sliding_window={window} is not supported; only full attention is")
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UserError(f"{where}: hidden_act={activation!r} is not supported; 'silu' is")
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        if not config.get("head_dim") and hidden % heads:
            raise UserError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = int(config.get("head_dim") or hidden // heads)
        scales: dict[str, Any] = {}
        if kind == "minicpm":
            # Files may leave these out: they are the defaults of the released configuration class.
            scales = {
                "scale_emb": float(config.get("scale_emb", 1)),
                "scale_depth": config.get("scale_depth", 1),
                "dim_model_base": config.get("dim_model_base", 1),
            }
        elif kind == "granite":
            scales = _granite_scales(config, hidden, head_dim, where)
        return ModelConfig(
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            max_position_embeddings=int(longest),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            **_rope(config, where),
            **scales,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", kind == "minicpm")),
            initializer_range=float(config.get("initializer_range", 0.02)),
            bos_token_id=_first(config.get("bos_token_id")),
            eos_token_id=_first(config.get("eos_token_id")),
        )
    except KeyError as e:
        raise UserError(f"{where}: {e.args[0]} is missing; it gives the model's shape") from None
    except (TypeError, ValueError, ArithmeticError) as e:
        raise UserError(f"{where}: a field has the wrong type or value ({e})") from e
    except UserError as e:
        raise UserError(f"{where}: {str(e).removeprefix(f'{where}: ')}") from None


def _first(token: Any) -> int | None:
    """A token id; the first one of a list, such as Llama 3.1's end-of-text ids."""
    return int(token[0] if isinstance(token, list) else token) if token not in (None, []) else None


def _granite_scales(config: Mapping[str, Any], hidden: int, head_dim: int, where: str) -> dict[str, Any]:
    attention = float(config.get("attention_multiplier", 1.0))
    if not math.isclose(attention, head_dim**-0.5, rel_tol=1e-6):
        raise UserError(f"{where}: attention_multiplier={attention} is not supported; 1/sqrt(head_dim) is")
    return {
        "scale_emb": float(config.get("embedding_multiplier", 1.0)),
        "scale_depth": float(config.get("residual_multiplier", 1.0)) * math.sqrt(config["num_hidden_layers"]),
        "dim_model_base": hidden / float(config.get("logits_scaling", 1.0)),
    }


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    # transformers 5 moved both into rope_parameters; older files have rope_theta and rope_scaling.
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UserError(f"{where}: RoPE scaling {kind!r} is not supported; one of {', '.join(ROPE_TYPES)}")
    if float(scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported; every dimension is rotated")
    for name, plain in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if scaling.get(name, plain) != plain:
            raise UserError(f"{where}: RoPE scaling with {name}={scaling[name]!r} is not supported; plain {kind} is")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": RopeScaling()}
    longest = int(config.get("max_position_embeddings", 4096))
    original = int(
        scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or longest
    )
    factor = float(scaling.get("factor") or (longest / original if kind in ("yarn", "longrope") else 1.0))
    return {
        "rope_theta": theta,
        "rope_scaling": RopeScaling(
            type=kind,
            factor=factor,
            original_length=original,
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
            beta_fast=float(scaling.get("beta_fast") or 32.0),
            beta_slow=float(scaling.get("beta_slow") or 1.0),
            attention_factor=scaling.get("attention_factor"),
            short_factor=tuple(scaling.get("short_factor", ())),
            long_factor=tuple(scaling.get("long_factor", ())),
        ),
    }


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers loads: as Llama if every scale is 1, else as Granite, which has all scales.

    Reading it back with `from_hf` gives the same arithmetic.
    """
    scaled = (config.scale_emb, config.residual_scale, config.logit_divisor) != (1.0, 1.0, 1.0)
    row: dict[str, Any] = {
        "architectures": ["GraniteForCausalLM" if scaled else "LlamaForCausalLM"],
        "model_type": "granite" if scaled else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    if scaled:
        row |= {
            "embedding_multiplier": config.scale_emb,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": config.logit_divisor,
            "attention_multiplier": config.head_dim**-0.5,
        }
    rope = config.rope_scaling
    if rope.type != "default":
        scaling: dict[str, Any] = {"rope_type": rope.type, "factor": rope.factor}
        if rope.type in ("llama3", "yarn", "longrope"):
            scaling["original_max_position_embeddings"] = rope.original_length
        if rope.type == "llama3":
            scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        if rope.type == "yarn":
            scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.type == "longrope":
            scaling |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
        row["rope_scaling"] = scaling
    return row
