"""FLOPs of a step by formula, the basis of MFU and of predicted step times."""

import jax

from duplex_jax import parallel
from duplex_jax.decode.floor import measured_peak
from duplex_jax.model.config import ModelConfig
from duplex_jax.train.config import Config


def forward_flops(model: ModelConfig, length: int) -> float:
    """FLOPs of one token's forward pass in a row of `length` tokens.

    `2 * (matrix weights, including the head but not the embedding) + 4 * L * N * H * length / 2`: one multiply and one
    add per weight, and two products with T x T scores, of which causality masks half (Chowdhery et al. 2022, "PaLM",
    appendix B, halved for causality). Segments make real rows cheaper; this is not accounted for.
    """
    embedding = model.hidden_size * model.vocab_size
    head = embedding if model.tie_word_embeddings else 2 * embedding
    matrices = model.num_params - head + embedding
    return 2.0 * matrices + 2.0 * model.num_layers * model.num_heads * model.head_dim * length


def train_flops(model: ModelConfig, length: int, lora: bool) -> float:
    """FLOPs of training on one token: three times a forward pass, or twice if most weights are frozen.

    Recomputation (remat) is not counted, so it does not inflate MFU.
    """
    return (2.0 if lora else 3.0) * forward_flops(model, length)


def step_flops(config: Config, model: ModelConfig) -> float:
    """FLOPs of one step over all devices."""
    tokens = config.data.batch * config.data.length
    return tokens * train_flops(model, config.data.length, config.lora.rank > 0)


def mfu(tokens_per_second: float, model: ModelConfig, length: int, lora: bool, peak: float) -> float:
    """Model FLOPs utilisation: tokens/s x FLOPs per token / peak FLOP/s of all devices (PaLM, section 4.1)."""
    return tokens_per_second * train_flops(model, length, lora) / peak


def peak(spec: parallel.MeshSpec) -> float:
    """Peak FLOP/s of all devices of a mesh: data-sheet figures, or each process's CPU rate in float32, measured now."""
    if spec.chip is parallel.CPU:
        return measured_peak() * jax.process_count()
    return spec.chip.flops * spec.size
