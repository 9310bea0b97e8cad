"""Estimates how many live sessions an accelerator can serve, from `floor`'s formulas and the chip's data sheet."""

import bisect
import dataclasses
from collections.abc import Sequence

from duplex_jax.decode.engine import CHUNK
from duplex_jax.decode.floor import BYTES, Ceilings, slice_floor, token_bytes
from duplex_jax.decode.rows import cache_sizes
from duplex_jax.model.config import ModelConfig
from duplex_jax.parallel import Chip
from duplex_jax.slicing import MAX_SLICE_TOKENS

# Fraction of the data-sheet bandwidth that is assumed to be reached; our CPU kernels reach 69 to 80% of it.
MEMORY_SHARE = 0.7
# Fraction of memory for weights and caches; the rest is left for a step's temporaries.
_ROOM = 0.85


@dataclasses.dataclass(frozen=True)
class Live:
    """How many sessions one accelerator serves if each of them says a full slice on every tick.

    Attributes:
        context: tokens that each session holds.
        entries: storage type of the cache entries.
        session_bytes: bytes of one session's cache, including its share of the shadow rows.
        by_memory: most sessions whose caches fit beside the weights.
        by_clock: most sessions whose slices are ready within a tick; 0 if even one session is late.
        seconds: seconds per slice with `sessions` sessions.
    """

    context: int
    entries: str
    session_bytes: int
    by_memory: int
    by_clock: int
    seconds: float

    @property
    def sessions(self) -> int:
        """The smaller of both bounds."""
        return min(self.by_memory, self.by_clock)


def cache_bytes(config: ModelConfig, rows: int, context: int, entries: str, said: int = MAX_SLICE_TOKENS) -> int:
    """Bytes of an engine's cache and of its shadow cache, in which shortened contexts are encoded.

        (R (n + s) + max(1, R // 8) (3/4 n + s)) * 2 L K (H * bytes per entry, plus 4 for its scale if int8)

    Args:
        config: the model.
        rows: R.
        context: n, the engine's capacity.
        entries: storage type of the entries.
        said: most tokens of an assistant slice; this plus a chunk of 64 tokens is s, the slots behind the capacity.
    """
    return sum(r * n for r, n in cache_sizes(rows, context, CHUNK + said)) * token_bytes(config, entries)


def plan_sessions(
    config: ModelConfig, chip: Chip, contexts: Sequence[int], slice_seconds: float = 2.0, fed: int = 16,
    said: int = MAX_SLICE_TOKENS, efficiency: float = 0.55, most: int = 100_000,
) -> list[Live]:  # fmt: skip
    """Live sessions on one accelerator by context length, for bfloat16 weights and bfloat16 or int8 entries.

        bytes per session  `cache_bytes` of eight sessions, divided by eight
        by memory          the most rows whose `cache_bytes` fit in 0.85 memory - weights
        by clock           the most rows whose `slice_floor` fits in a tick, at 0.7 of the bandwidth and `efficiency` of
                           the peak rate

    Args:
        config: the model, held whole by each accelerator.
        chip: its data-sheet figures.
        contexts: context lengths (and capacities) in tokens.
        slice_seconds: length of a tick.
        fed: tokens of a user slice, markers included.
        said: tokens of an assistant slice.
        efficiency: fraction of the peak rate that matrix products reach.
        most: upper end of the search for both bounds.
    """
    ceilings = Ceilings(MEMORY_SHARE * chip.bandwidth, MEMORY_SHARE * chip.bandwidth, efficiency * chip.flops)
    room = _ROOM * chip.memory - config.num_params * BYTES["bfloat16"]
    plans = []
    for entries in ("bfloat16", "int8"):
        for context in contexts:

            def seconds(rows: int, context: int = context, entries: str = entries) -> float:
                return slice_floor(config, ceilings, context, fed, said, rows, "bfloat16", entries)

            def size(rows: int, context: int = context, entries: str = entries) -> int:
                return cache_bytes(config, rows, context, entries, said)

            by_clock = bisect.bisect_right(range(1, most + 1), slice_seconds, key=seconds)
            by_memory = bisect.bisect_right(range(1, most + 1), room, key=size)
            rows = max(1, min(by_memory, by_clock))
            plans.append(Live(context, entries, size(8) // 8, by_memory, by_clock, seconds(rows)))
    return plans


def sessions_table(plans: Sequence[Live]) -> list[str]:
    """Formats plans as lines of text."""
    lines = ["  context  entries   MB a session  by memory  by clock  sessions  seconds"]
    for p in plans:
        lines.append(
            f"  {p.context:7,}  {p.entries:8}  {p.session_bytes / 1e6:12,.1f}  {p.by_memory:9,}  {p.by_clock:8,}  "
            f"{p.sessions:8,}  {p.seconds:7.3f}"
        )
    return lines
