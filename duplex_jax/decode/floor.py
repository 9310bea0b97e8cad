"""Lower bounds on the time of a slice from bytes and FLOPs, and a machine's measured ceilings for both.

A slice of M tokens takes M passes: one over the T incoming tokens, which yields the first token, and one for each
further token. With R rows of n tokens each, a pass over t tokens per row takes at least

    bytes  = weights + R n * 2 L K * (H * bytes per entry, plus 4 for its scale if int8)
    flops  = 2 (R t * matrices + R * head) + 4 R t n L N H
    floor  = max(bytes / bandwidth, flops / rate)

(`bytes / bandwidth` is the memory time of Pope et al. 2022, "Efficiently Scaling Transformer Inference"). The embedding
is not counted, because only a few rows are read; a tied head is read once.
"""

import concurrent.futures
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def token_bytes(config: ModelConfig, entries: str) -> int:
    """Bytes of one token in the cache: 2 L K * (H * bytes per entry, plus 4 for its scale if int8)."""
    scale = BYTES["float32"] if entries == "int8" else 0
    return 2 * config.num_layers * config.num_kv_heads * (config.head_dim * BYTES[entries] + scale)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured ceilings of a machine.

    Attributes:
        read: memory read bandwidth of all cores together, bytes/s.
        copy: memory copy bandwidth, bytes read plus bytes written per second.
        flops: float32 FLOP/s of a large matrix product.
    """

    read: float
    copy: float
    flops: float


def _fastest(run: Callable[[], Any], tries: int = 5) -> float:
    run()
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def measured_peak(n: int = 2048, tries: int = 4) -> float:
    """FLOP/s of the fastest of `tries` float32 products `[n, n] @ [n, n]` on this machine's device."""
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    return 2.0 * n**3 / _fastest(lambda: product(x).block_until_ready(), tries)


def measure(megabytes: int = 256) -> Ceilings:
    """Measures this machine's ceilings in a few seconds; on an accelerator, those of its own memory.

    Args:
        megabytes: size of the array that is read and copied; must be much larger than the caches.
    """
    n = megabytes * 2**20 // 4
    if jax.default_backend() != "cpu":
        x = jnp.ones(n, jnp.float32)
        total, more = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)  # jitted here, so that compilation is not timed
        read = x.nbytes / _fastest(lambda: total(x).block_until_ready())
        copy = 2 * x.nbytes / _fastest(lambda: more(x).block_until_ready())
        return Ceilings(read, copy, measured_peak())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts, into = (np.split(np.ones(n // cores * cores, np.float32), cores) for _ in range(2))
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        # NumPy releases the GIL in these calls; a maximum is vectorised, so it is limited by memory alone.
        read = n * 4 / _fastest(lambda: list(pool.map(np.max, parts)))
        copy = 2 * n * 4 / _fastest(lambda: list(pool.map(np.copyto, into, parts)))
    return Ceilings(read, copy, measured_peak())


def slice_floor(
    config: ModelConfig, ceilings: Ceilings, history: int, fed: int, said: int, rows: int = 1,
    weights: str = "float32", entries: str = "float32",
) -> float:  # fmt: skip
    """Minimum seconds of a slice, by the formulas above.

    Args:
        config: the model.
        ceilings: the machine's ceilings.
        history: n, tokens that each row holds.
        fed: T, incoming tokens.
        said: M, tokens sampled.
        rows: R.
        weights, entries: storage types.
    """
    c = config
    head = c.hidden_size * c.padded_vocab_size
    tables = c.hidden_size * c.vocab_size * (1 if c.tie_word_embeddings else 2)
    matrices = c.num_params - tables
    read = (matrices + head) * BYTES[weights]
    read += rows * history * token_bytes(c, entries)

    def one(tokens: int) -> float:
        flops = 2 * rows * (tokens * matrices + head)
        flops += 4 * rows * tokens * history * c.num_layers * c.num_heads * c.head_dim
        return max(read / ceilings.read, flops / ceilings.flops)

    return one(fed) + (said - 1) * one(1)


def bench_ceilings(megabytes: int = 256) -> dict[str, Any]:
    """Measures memory bandwidth and float32 FLOP/s of this machine.

    Args:
        megabytes: size of the array that is read and copied.

    Raises:
        UserError: `megabytes` is below 1.
    """
    if megabytes < 1:
        raise UserError("megabytes must be 1 or more")
    return dataclasses.asdict(measure(megabytes)) | {
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "backend": jax.default_backend(),
                    "device": jax.devices()[0].device_kind},
    }  # fmt: skip


def table(report: Mapping[str, Any]) -> list[str]:
    """Formats the report as lines of text."""
    return [
        f"read      {report['read'] / 1e9:8.1f} GB/s",
        f"copy      {report['copy'] / 1e9:8.1f} GB/s, read and written",
        f"products  {report['flops'] / 1e9:8.0f} GFLOP/s in float32",
    ]
