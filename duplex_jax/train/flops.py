"""FLOPs of a step by formula: what MFU and predicted step times are made from."""

import jax

from duplex_jax import parallel
from duplex_jax.decode.floor import measured_peak
from duplex_jax.model.config import ModelConfig
from duplex_jax.train.config import Config


def forward_flops(model: ModelConfig, length: int) -> float:
    """FLOPs of one token's forward pass in a row of `length`.

    `2 * (weights in matrices, head included, embedding not) + 4 * L * N * H * length / 2`: a multiply and an add for
    each weight, and two products of T x T scores, half of them masked (Chowdhery et al. 2022, "PaLM", appendix B, with
    the causal half taken off). Segments make real rows cheaper; nothing is taken off for them.
    """
    embedding = model.hidden_size * model.vocab_size
    head = embedding if model.tie_word_embeddings else 2 * embedding
    matrices = model.num_params - head + embedding
    return 2.0 * matrices + 2.0 * model.num_layers * model.num_heads * model.head_dim * length


def train_flops(model: ModelConfig, length: int, lora: bool) -> float:
    """FLOPs that training on one token takes: 3 forward passes' worth, 2 where most weights are frozen.

    Work that is done again (remat) does not count, so that MFU is not flattered by it.
    """
    return (2.0 if lora else 3.0) * forward_flops(model, length)


def step_flops(config: Config, model: ModelConfig) -> float:
    """FLOPs of one step over all devices."""
    tokens = config.data.batch * config.data.length
    return tokens * train_flops(model, config.data.length, config.lora.rank > 0)


def mfu(tokens_per_second: float, model: ModelConfig, length: int, lora: bool, peak: float) -> float:
    """Model FLOPs utilisation: tokens/s x FLOPs a token / peak FLOP/s of all devices (PaLM, section 4.1)."""
    return tokens_per_second * train_flops(model, length, lora) / peak


def peak(spec: parallel.MeshSpec) -> float:
    """FLOP/s of all devices of a mesh: their makers' figures, or what each process's CPU reaches in float32 now."""
    if spec.chip is parallel.CPU:
        return measured_peak() * jax.process_count()
    return spec.chip.flops * spec.size
