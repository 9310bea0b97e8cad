"""How many live sessions an accelerator can serve: on paper, by the formulas of `floor` and its maker's figures."""

import bisect
import dataclasses
from collections.abc import Sequence

from duplex_jax.decode.floor import BYTES, Ceilings, slice_floor
from duplex_jax.model.config import ModelConfig
from duplex_jax.parallel import Chip

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
    room = _ROOM * chip.memory - config.num_params * BYTES["bfloat16"]
    plans = []
    for entries in ("bfloat16", "int8"):
        for context in contexts:

            def seconds(rows: int, context: int = context, entries: str = entries) -> float:
                return slice_floor(config, ceilings, context, fed, said, rows, "bfloat16", entries)

            size = context * 2 * config.num_layers * config.num_kv_heads * config.head_dim * BYTES[entries]
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
