"""Rows of an engine: which conversation holds which row of the cache, and which ids each of them has."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig
from duplex_jax.template import Template


class EngineFull(UserError):
    """Every row is taken."""


@dataclasses.dataclass(eq=False)
class Row:
    """One conversation's place in the engine.

    Attributes:
        index: the row of the cache.
        ids: every id of the context, whether cached or not. Read only; `Engine` changes it.
        cached: how many of `ids` have their keys and values in the cache. The rest is pending: it is fed in front of
            what comes next.
        sampling: how the row draws tokens.
        seed: makes the row's random keys, with `steps`.
        steps: how many steps the row has taken; never goes back.
        shadow: its context encoded afresh elsewhere, while that goes on.
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
    """A row's context without its oldest pairs, encoded in a row of the shadow cache ahead of the switch.

    When a row switches follows from its own ids alone. Where no shadow row was free the count goes on without one,
    and the step after the switch encodes what stays.

    Attributes:
        index: the row of the shadow cache, if it has one.
        prefix: how many ids in front stay.
        base: where in the row's ids the rest that stays begins.
        began: how long the row's ids were when it began; cut back to less, the row needs no dropping yet.
        cached: how many ids of the shadow's context are encoded.
    """

    index: int | None
    prefix: int
    base: int
    began: int
    cached: int = 0

    def ids(self, row: Row) -> list[int]:
        """The context that the row will have."""
        return row.ids[: self.prefix] + row.ids[self.base :]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a row does in a step: ids to append, and whether it may answer with idle."""

    ids: Sequence[int]
    allow_idle: bool = True


class Rows:
    """The rows of a cache and of a shadow cache, taken and free.

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

    def take(self, ids: Sequence[int], sampling: Sampling | None, seed: int) -> Row:
        """A free row for a context that begins with `ids`.

        Raises:
            EngineFull: no row is free.
            UserError: the beginning leaves too little room.
        """
        if not self._free:
            raise EngineFull(f"all {self._number} rows are taken; close a session first")
        self.check_beginning(ids)
        row = Row(self._free[-1], list(ids), 0, sampling or Sampling(), seed % 2**32)
        self._free.pop()  # only now that the arguments have proved good
        self.open.add(row)
        return row

    def check_beginning(self, ids: Sequence[int]) -> None:
        """Whether a context may begin with `ids`, which stay for good.

        Raises:
            UserError: they leave too little room.
        """
        if len(ids) > self._capacity // 4:
            raise UserError(
                f"the beginning of the context takes {len(ids)} tokens; at most a quarter of the capacity "
                f"of {self._capacity} may stay for good"
            )

    def give_back(self, row: Row) -> None:
        """Frees a row and its shadow. Doing so twice does no harm."""
        if row in self.open:
            self.open.remove(row)
            self.drop_shadow(row)
            self._free.append(row.index)

    def check_open(self, row: Row) -> None:
        """Refuses a row that is not open here."""
        if row not in self.open:
            raise UserError("the session was closed, or is another engine's")

    def truncate(self, row: Row, length: int, then: Sequence[int] = ()) -> None:
        """Cuts a row's ids back to `length` and appends `then`, pending."""
        row.ids[length:] = then
        row.cached = min(row.cached, length)
        shadow = row.shadow
        if shadow is not None:
            if length < shadow.began:
                self.drop_shadow(row)
            else:
                shadow.cached = min(shadow.cached, shadow.prefix + length - shadow.base)

    def begin_shadow(self, row: Row, prefix: int, base: int) -> None:
        """Takes a shadow row, where one is free, for the row's context without `ids[prefix:base]`."""
        row.shadow = Shadow(self._free_shadows.pop() if self._free_shadows else None, prefix, base, len(row.ids))

    def drop_shadow(self, row: Row) -> None:
        """Gives up what the shadow has encoded."""
        if row.shadow is not None:
            if row.shadow.index is not None:
                self._free_shadows.append(row.shadow.index)
            row.shadow = None


def never_sampled(config: ModelConfig, template: Template, ends: Collection[int] | None = None) -> np.ndarray:
    """bool `[V]`: padding and control tokens, but for those that `ends` a slice (by default) or a turn."""
    suppress = np.ones(config.padded_vocab_size, bool)
    suppress[: config.vocab_size] = False
    suppress[[i for i in template.tokenizer.special.values() if i < config.vocab_size]] = True
    suppress[[i for i in ends or template.stop_ids if i < config.vocab_size]] = False
    return suppress


def cache_sizes(rows: int, capacity: int, slack: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and slots of an engine's cache, and of the shadow cache in which contexts are encoded afresh.

    Args:
        rows: B.
        capacity: most tokens of a context.
        slack: slots behind it, for one chunk and one slice.
    """
    # A system prompt takes a quarter of the capacity at most, the pairs that stay a quarter of the rest, and as
    # much may come in while they are encoded.
    return (rows, capacity + slack), (max(1, rows // 8), capacity * 3 // 4 + slack)
