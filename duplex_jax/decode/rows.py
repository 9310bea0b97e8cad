"""Rows of an engine: which conversation holds which cache row, and the ids in its context."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig
from duplex_jax.template import Template


class EngineFull(UserError):
    """All rows are in use."""


@dataclasses.dataclass(eq=False)
class Row:
    """One conversation's place in the engine.

    Attributes:
        index: index of the row in the cache.
        ids: all ids of the context, cached or not. Read only; `Engine` changes it.
        cached: how many of `ids` have their keys and values in the cache. The rest is pending: the next step feeds it
            first.
        sampling: sampling settings of the row.
        seed: with `steps`, determines the row's random keys.
        steps: how many steps the row has taken; never decreases.
        shadow: the row's shortened context while it is being encoded, else None.
    """

    index: int
    ids: list[int]
    cached: int
    sampling: Sampling
    seed: int
    steps: int = 0
    shadow: "Shadow | None" = None


@dataclasses.dataclass
class Shadow:
    """A row's context without its oldest pairs, encoded in a row of the shadow cache before the switch.

    When a row switches depends on its own ids alone. If no shadow row is free, counting goes on without one, and the
    step after the switch encodes the remaining context.

    Attributes:
        index: row of the shadow cache, or None.
        prefix: how many ids at the front are kept.
        base: start of the other kept ids in the row's ids.
        began: length of the row's ids when the shadow began; a row truncated below it needs no dropping yet.
        cached: how many ids of the shortened context are encoded.
    """

    index: int | None
    prefix: int
    base: int
    began: int
    cached: int = 0

    def ids(self, row: Row) -> list[int]:
        """The row's context after the switch."""
        return row.ids[: self.prefix] + row.ids[self.base :]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a row does in a step: the ids to append, and whether it may answer with idle."""

    ids: Sequence[int]
    allow_idle: bool = True


class Rows:
    """Allocates the rows of a cache and of its shadow cache.

    Args:
        number: rows of the cache.
        shadows: rows of the shadow cache.
        capacity: most tokens of a context.
    """

    def __init__(self, number: int, shadows: int, capacity: int):
        self._number, self._capacity = number, capacity
        self._free = list(range(number))[::-1]
        self._free_shadows = list(range(shadows))[::-1]
        self.open: set[Row] = set()

    @property
    def free(self) -> int:
        """How many rows are free."""
        return len(self._free)

    def allocate(self, ids: Sequence[int], sampling: Sampling | None, seed: int) -> Row:
        """Allocates a row for a context that begins with `ids`.

        Raises:
            EngineFull: no row is free.
            UserError: `ids` leave too little room for a conversation.
        """
        if not self._free:
            raise EngineFull(f"all {self._number} rows are taken; close a session first")
        self.check_beginning(ids)
        row = Row(self._free[-1], list(ids), 0, sampling or Sampling(), seed % 2**32)
        self._free.pop()  # not before the arguments are checked
        self.open.add(row)
        return row

    def check_beginning(self, ids: Sequence[int]) -> None:
        """Checks that a context can begin with `ids`, which are never dropped.

        Raises:
            UserError: they leave too little room.
        """
        if len(ids) > self._capacity // 4:
            raise UserError(
                f"the beginning of the context takes {len(ids)} tokens; at most a quarter of the capacity "
                f"of {self._capacity} may be kept permanently"
            )

    def release(self, row: Row) -> None:
        """Frees a row and its shadow. Doing so twice is harmless."""
        if row in self.open:
            self.open.remove(row)
            self.drop_shadow(row)
            self._free.append(row.index)

    def check_open(self, row: Row) -> None:
        """Raises UserError if the row is not open here."""
        if row not in self.open:
            raise UserError("the session is closed, or belongs to another engine")

    def truncate(self, row: Row, length: int, then: Sequence[int] = ()) -> None:
        """Truncates a row's ids to `length` and appends `then` as pending ids."""
        row.ids[length:] = then
        row.cached = min(row.cached, length)
        shadow = row.shadow
        if shadow is not None:
            if length < shadow.began:
                self.drop_shadow(row)
            else:
                shadow.cached = min(shadow.cached, shadow.prefix + length - shadow.base)

    def begin_shadow(self, row: Row, prefix: int, base: int) -> None:
        """Starts a shadow of the row's context without `ids[prefix:base]`, in a shadow row if one is free."""
        row.shadow = Shadow(self._free_shadows.pop() if self._free_shadows else None, prefix, base, len(row.ids))

    def drop_shadow(self, row: Row) -> None:
        """Abandons the row's shadow, if it has one."""
        if row.shadow is not None:
            if row.shadow.index is not None:
                self._free_shadows.append(row.shadow.index)
            row.shadow = None


def never_sampled(config: ModelConfig, template: Template, ends: Collection[int] | None = None) -> np.ndarray:
    """bool `[V]`: padding and control tokens, except those in `ends` (by default the ends of a slice)."""
    suppress = np.ones(config.padded_vocab_size, bool)
    suppress[: config.vocab_size] = False
    suppress[[i for i in template.tokenizer.special.values() if i < config.vocab_size]] = True
    suppress[[i for i in ends or template.stop_ids if i < config.vocab_size]] = False
    return suppress


def cache_sizes(rows: int, capacity: int, slack: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and slots of an engine's cache and of its shadow cache.

    Args:
        rows: B.
        capacity: most tokens of a context.
        slack: slots behind the capacity, for one chunk and one slice.
    """
    # A system prompt takes at most a quarter of the capacity, the pairs that are kept a quarter of the rest, and as
    # much again may come in while they are encoded.
    return (rows, capacity + slack), (max(1, rows // 8), capacity * 3 // 4 + slack)
