"""How many live sessions an accelerator can serve: on paper, by the formulas of `floor` and its maker's figures."""

import bisect
import dataclasses
from collections.abc import Sequence

from duplex_jax.decode.engine import CHUNK
from duplex_jax.decode.floor import BYTES, Ceilings, slice_floor, token_bytes
from duplex_jax.decode.rows import cache_sizes
from duplex_jax.model.config import ModelConfig
from duplex_jax.parallel import Chip
from duplex_jax.slicing import MAX_SLICE_TOKENS

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
        session_bytes: of a session's cache, its share of the rows in which contexts are encoded afresh included.
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


def cache_bytes(config: ModelConfig, rows: int, context: int, entries: str, said: int = MAX_SLICE_TOKENS) -> int:
    """Bytes of an engine's caches: of its rows, and of those in which contexts are encoded afresh.

        (R (n + s) + max(1, R // 8) (3/4 n + s)) * 2 L K (H * bytes of an entry, and 4 where it is int8: its scale)

    Args:
        config: the model.
        rows: R.
        context: n, the engine's capacity.
        entries: how they are stored.
        said: most tokens of a slice; with a chunk of 64 tokens they make s, the slots behind the capacity.
    """
    return sum(r * n for r, n in cache_sizes(rows, context, CHUNK + said)) * token_bytes(config, entries)


def plan_sessions(
    config: ModelConfig, chip: Chip, contexts: Sequence[int], slice_seconds: float = 2.0, fed: int = 16,
    said: int = MAX_SLICE_TOKENS, efficiency: float = 0.55, most: int = 100_000,
) -> list[Live]:  # fmt: skip
    """Live sessions on one accelerator against the tokens that each holds, bfloat16 weights, bfloat16 and int8 entries.

        a session  `cache_bytes` of eight, over eight
        by memory  the most rows whose `cache_bytes` are within 0.85 memory - weights
        by clock   the most rows whose `slice_floor` is within a tick, at 0.7 of the bandwidth and `efficiency` of the
                   peak rate

    Args:
        config: the model, whole on each accelerator.
        chip: its maker's figures.
        contexts: tokens held, and capacities.
        slice_seconds: a tick of the clock.
        fed: tokens of a user's slice, markers included.
        said: tokens of an answer's.
        efficiency: what products reach of the peak rate.
        most: sessions at which the search for both bounds ends.
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
    """Plans as lines of text."""
    lines = ["  context  entries   MB a session  by memory  by clock  sessions  seconds"]
    for p in plans:
        lines.append(
            f"  {p.context:7,}  {p.entries:8}  {p.session_bytes / 1e6:12,.1f}  {p.by_memory:9,}  {p.by_clock:8,}  "
            f"{p.sessions:8,}  {p.seconds:7.3f}"
        )
    return lines
