"""Rotary position embeddings, with the scaling types that released checkpoints use."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig, length: int) -> tuple[np.ndarray, float]:
    """Rotary frequencies, and the factor on cosines and sines.

    Args:
        config: the model.
        length: positions in use: a training row's length or a cache's capacity. `dynamic` and `longrope` change beyond
            the original length; a cache uses its capacity throughout, so that early and late keys agree.

    Returns:
        float64 `[H / 2]` and the factor. Formulas: Hugging Face's `modeling_rope_utils`, after Peng et al. 2023
        (YaRN), Ding et al. 2024 (LongRoPE) and Llama 3.1.
    """
    rope, theta, dim = config.rope_scaling, config.rope_theta, config.head_dim
    exponents = np.arange(0, dim, 2) / dim
    inverse = theta**-exponents
    if rope.type == "linear":
        return inverse / rope.factor, 1.0
    if rope.type == "dynamic":
        if length > config.max_position_embeddings:
            stretch = rope.factor * length / config.max_position_embeddings - (rope.factor - 1)
            inverse = (theta * stretch ** (dim / (dim - 2))) ** -exponents
        return inverse, 1.0
    if rope.type == "llama3":
        wavelength = 2 * math.pi / inverse
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = (rope.original_length / wavelength - low) / (high - low)
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * inverse / rope.factor + smooth * inverse, 1.0
    if rope.type == "yarn":

        def dimension(rotations: float) -> float:
            return dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension(rope.beta_fast)), 0)
        high = min(math.ceil(dimension(rope.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        inverse = inverse / rope.factor * ramp + inverse * (1 - ramp)
        factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        return inverse, rope.attention_factor or factor
    if rope.type == "longrope":
        divisors = rope.long_factor if length > rope.original_length else rope.short_factor
        factor = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length)) if rope.factor > 1 else 1.0
        return inverse / np.asarray(divisors), rope.attention_factor or factor
    return inverse, 1.0


def rotary_tables(config: ModelConfig, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines at `positions` `[B, T]`: two float32 arrays `[B, T, H / 2]`."""
    inverse, factor = inverse_frequencies(config, length)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates `x` `[B, T, heads, H]`, pairing dimension i with i + H / 2 as released checkpoints do."""
    cos, sin = (t[:, :, None, :] for t in tables)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
