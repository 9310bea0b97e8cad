"""The least time that a slice can take, from bytes and FLOPs, and what this machine reaches of either.

A slice of M tokens takes M passes: one over the T tokens that come in, which gives the first, and one for each other
token. With R rows, each holding n tokens, a pass over t tokens a row takes at least

    bytes  = weights + R n * 2 L K H * (bytes of an entry)
    flops  = 2 (R t * matrices + R * head) + 4 R t n L N H
    floor  = max(bytes / bandwidth, flops / rate)

(`bytes / bandwidth` is Pope et al.'s memory time, 2022, "Efficiently Scaling Transformer Inference"). The embedding is
looked up and not read; a tied head is read once. What an accelerator can serve (`plan_sessions`) is made from the same
formulas and its maker's figures.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax import native
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig
from duplex_jax.parallel import Chip

_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a machine reaches.

    Attributes:
        read: bytes a second, read from memory by all cores.
        copy: bytes a second, those read and those written.
        flops: float32 multiplications and additions a second in a large product.
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
    """FLOP/s of the fastest of a few float32 products `[n, n] @ [n, n]` on this machine's device."""
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    return 2.0 * n**3 / _fastest(lambda: product(x).block_until_ready(), tries)


def measure(megabytes: int = 256) -> Ceilings:
    """Measures this machine's ceilings, in a few seconds; on an accelerator those of its own memory.

    Args:
        megabytes: of the array that is read and copied; much more than any cache holds.
    """
    n = megabytes * 2**20 // 4
    if jax.default_backend() != "cpu":
        x = jnp.ones(n, jnp.float32)
        read = x.nbytes / _fastest(lambda: jax.jit(jnp.sum)(x).block_until_ready())
        copy = 2 * x.nbytes / _fastest(lambda: jax.jit(lambda x: x + 1)(x).block_until_ready())
        return Ceilings(read, copy, measured_peak())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts, into = (np.split(np.ones(n // cores * cores, np.float32), cores) for _ in range(2))
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        # NumPy sums and copies without the interpreter's lock; a maximum is vectorised, and waits for memory alone.
        read = n * 4 / _fastest(lambda: list(pool.map(np.max, parts)))
        copy = 2 * n * 4 / _fastest(lambda: list(pool.map(np.copyto, into, parts)))
    return Ceilings(read, copy, measured_peak())


def slice_floor(
    config: ModelConfig, ceilings: Ceilings, history: int, fed: int, said: int, rows: int = 1,
    weights: str = "float32", entries: str = "float32",
) -> float:  # fmt: skip
    """Least seconds of a slice, by the formulas above.

    Args:
        config: the model.
        ceilings: of the machine.
        history: n, tokens that each row holds.
        fed: T, tokens that come in.
        said: M, tokens that are said.
        rows: R.
        weights, entries: how they are stored.
    """
    c = config
    head = c.hidden_size * c.padded_vocab_size
    tables = c.hidden_size * c.vocab_size * (1 if c.tie_word_embeddings else 2)
    matrices = c.num_params - tables
    read = (matrices + head) * _BYTES[weights]
    read += rows * history * 2 * c.num_layers * c.num_kv_heads * c.head_dim * _BYTES[entries]

    def one(tokens: int) -> float:
        flops = 2 * rows * (tokens * matrices + head)
        flops += 4 * rows * tokens * history * c.num_layers * c.num_heads * c.head_dim
        return max(read / ceilings.read, flops / ceilings.flops)

    return one(fed) + (said - 1) * one(1)


class Profile:
    """Where the seconds of several slices went, by the kernels' own clock (`native.spent`)."""

    def __init__(self) -> None:
        self._slices, self._seconds, self._parts = 0, 0.0, collections.Counter[str]()

    @contextlib.contextmanager
    def slice(self) -> Iterator[None]:
        """Counts what is done inside as one slice."""
        before, began = native.spent(), time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began
        self._slices += 1
        self._parts.update({part: total - before.get(part, 0.0) for part, total in native.spent().items()})

    @property
    def parts(self) -> dict[str, float]:
        """Mean seconds of a slice by part, the `rest` outside of the kernels; empty without kernels."""
        if not self._parts:
            return {}
        parts = {part: total / self._slices for part, total in self._parts.items()}
        return parts | {"rest": self._seconds / self._slices - sum(parts.values())}


def parts_line(parts: Mapping[str, float]) -> str:
    """Parts of a slice as text."""
    total = sum(parts.values())
    return ", ".join(f"{part} {seconds:.3f} s ({seconds / total:.0%})" for part, seconds in parts.items())


# What of its maker's bandwidth a chip is taken to reach: our kernels for CPUs reach 69 to 80% of what memory gives.
MEMORY_SHARE = 0.7
# What of its memory weights and caches may take; a step's temporaries need the rest.
_ROOM = 0.85


@dataclasses.dataclass(frozen=True)
class Live:
    """Sessions that one accelerator serves, every one of which says a full slice on every tick.

    Attributes:
        context: tokens that each session holds.
        entries: how they are stored.
        session_bytes: of a session's cache.
        by_memory: sessions whose caches fit beside the weights.
        by_clock: sessions whose slices are ready within a tick, if memory were no matter; 0 where one alone is late.
        seconds: of a slice with as many sessions as both allow.
    """

    context: int
    entries: str
    session_bytes: int
    by_memory: int
    by_clock: int
    seconds: float

    @property
    def sessions(self) -> int:
        """As many as memory and clock allow."""
        return min(self.by_memory, self.by_clock)


def plan_sessions(
    config: ModelConfig, chip: Chip, contexts: Sequence[int], slice_seconds: float = 2.0, fed: int = 16,
    said: int = 10, efficiency: float = 0.55, most: int = 100_000,
) -> list[Live]:  # fmt: skip
    """Live sessions on one accelerator against the tokens that each holds, bfloat16 weights, bfloat16 and int8 entries.

        by memory  (0.85 memory - weights) / (context * 2 L K H * bytes of an entry)
        by clock   the most rows whose `slice_floor` is within a tick, at 0.7 of the bandwidth and `efficiency` of the
                   peak rate

    Args:
        config: the model, whole on each accelerator.
        chip: its maker's figures.
        contexts: tokens held.
        slice_seconds: a tick of the clock.
        fed: tokens of a user's slice, markers included.
        said: tokens of an answer's.
        efficiency: what products reach of the peak rate.
        most: sessions at which the search for the clock's bound ends.
    """
    ceilings = Ceilings(MEMORY_SHARE * chip.bandwidth, MEMORY_SHARE * chip.bandwidth, efficiency * chip.flops)
    room = _ROOM * chip.memory - config.num_params * _BYTES["bfloat16"]
    plans = []
    for entries in ("bfloat16", "int8"):
        for context in contexts:

            def seconds(rows: int, context: int = context, entries: str = entries) -> float:
                return slice_floor(config, ceilings, context, fed, said, rows, "bfloat16", entries)

            size = context * 2 * config.num_layers * config.num_kv_heads * config.head_dim * _BYTES[entries]
            by_clock = bisect.bisect_right(range(1, most + 1), slice_seconds, key=seconds)
            by_memory = max(0, int(room // size))
            plans.append(Live(context, entries, size, by_memory, by_clock, seconds(max(1, min(by_memory, by_clock)))))
    return plans


def sessions_table(plans: Sequence[Live]) -> list[str]:
    """Plans as lines of text."""
    lines = ["  context  entries   MB a session  by memory  by clock  sessions  seconds"]
    for p in plans:
        lines.append(
            f"  {p.context:7,}  {p.entries:8}  {p.session_bytes / 1e6:12,.1f}  {p.by_memory:9,}  {p.by_clock:8,}  "
            f"{p.sessions:8,}  {p.seconds:7.3f}"
        )
    return lines


def bench_ceilings(megabytes: int = 256) -> dict[str, Any]:
    """What this machine reaches: memory read and copied, and float32 products.

    Args:
        megabytes: of the array that is read and copied.

    Raises:
        UserError: no megabytes.
    """
    if megabytes < 1:
        raise UserError("megabytes must be 1 or more")
    return dataclasses.asdict(measure(megabytes)) | {
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "backend": jax.default_backend(),
                    "device": jax.devices()[0].device_kind},
    }  # fmt: skip


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text."""
    return [
        f"read      {report['read'] / 1e9:8.1f} GB/s",
        f"copy      {report['copy'] / 1e9:8.1f} GB/s, read and written",
        f"products  {report['flops'] / 1e9:8.0f} GFLOP/s in float32",
    ]
