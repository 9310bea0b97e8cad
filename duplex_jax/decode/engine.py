"""The batched engine: rows of one cache, each a conversation's ids, stepped together by a handful of programs.

A row says which ids it holds; the engine sees to it that the cache agrees. The invariant: whatever was appended, cut
back, copied or moved, the next logits of a row are those of a fresh forward pass over its ids.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax import native
from duplex_jax.decode import cache as kv
from duplex_jax.decode import step as programs
from duplex_jax.decode.cache import KVCache
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.model import minicpm
from duplex_jax.model.config import STORES, ModelConfig
from duplex_jax.model.matrix import Matrix
from duplex_jax.model.minicpm import Params
from duplex_jax.slicing import MAX_SLICE_TOKENS
from duplex_jax.template import Template

CHUNK = 64
"""Tokens that are encoded at once, by default."""


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


class Engine:
    """Rows of a fixed-shape KV cache and the compiled programs over them. Not thread-safe.

    Args:
        config: the model.
        params: its weights, as numpy or jax arrays.
        template: gives idle, end and the tokens that are never sampled.
        rows: B, conversations at once.
        capacity: most tokens of a context.
        dtype: of the computation; float32 on CPU and bfloat16 elsewhere by default.
        weights: how weights are stored, one of `STORES`; as `dtype` by default.
        entries: how cached keys and values are stored, one of the same; as `dtype` by default.
        kernels: whether the CPU's own kernels compute (in float32); by default where they can be had.
        max_feed_tokens: T, most tokens of a row that a step is fed.
        row_buckets: R, the numbers of rows that a step computes: it takes the least that holds those that take part,
            and again for those that are not silent. On CPU 1, 4, 16, 32, 64, ... by default; elsewhere all rows, in one
            program and without a look at the first token in the middle.
        chunk: tokens that are encoded at once where there are more of them, ahead of the step.
        max_slice_tokens: M, most tokens of an assistant slice.

    Raises:
        UserError: a size that makes no sense, more capacity than the model has positions, or kernels that are not here.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        template: Template,
        *,
        rows: int = 1,
        capacity: int | None = None,
        dtype: Any = None,
        weights: str | None = None,
        entries: str | None = None,
        kernels: bool | None = None,
        max_feed_tokens: int = 16,
        row_buckets: Sequence[int] | None = None,
        chunk: int = CHUNK,
        max_slice_tokens: int = MAX_SLICE_TOKENS,
    ):
        capacity = capacity or min(4096, config.max_position_embeddings)
        if rows < 1:
            raise UserError(f"rows {rows}: an engine needs at least one")
        if capacity > config.max_position_embeddings and config.rope_scaling.type == "default":
            raise UserError(f"capacity {capacity} is more than the {config.max_position_embeddings} positions that "
                            "the model was trained for")  # fmt: skip
        if capacity < 2 * (chunk + max_slice_tokens):
            raise UserError(f"capacity {capacity} is too small; slices of {chunk} + {max_slice_tokens} "
                            f"tokens need at least {2 * (chunk + max_slice_tokens)}")  # fmt: skip
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.config, self.template, self.capacity = config, template, capacity
        self.max_slice_tokens = max_slice_tokens
        self.dtype = jnp.dtype(dtype)
        for name, how in (("weights", weights), ("entries", entries)):
            if how is not None and how not in STORES:
                raise UserError(f"{name} {how!r} cannot be stored; one of {', '.join(STORES)}")
        self._entries_dtype = jnp.dtype(entries or dtype)
        if kernels and not native.available():
            raise UserError("kernels=True: the CPU's own kernels cannot be had here")
        kernels = native.available() if kernels is None else kernels
        self.params = self._stored(params, weights or self.dtype.name, kernels)
        self._by_kernels = programs.by_native_kernels(self.params)
        self._max_feed = max_feed_tokens
        if row_buckets is None:
            # On two cores eight rows take nearly as long as sixteen, and each program takes seconds to compile.
            row_buckets = [1, 4, *(16 * 2**i for i in range(10))] if jax.default_backend() == "cpu" else []
        self._few_rows = bool(row_buckets)
        self._row_buckets = (*sorted(b for b in row_buckets if b < rows), rows)
        self.chunk = max(chunk, max_feed_tokens)
        size, (self._n_shadows, self._shadow_slots) = cache_sizes(rows, capacity, self.chunk + max_slice_tokens)
        self.cache = kv.zeros(config, *size, self._entries_dtype)
        powers = itertools.takewhile(lambda n: n * 4 < self.cache.slots * 3, (2**p for p in itertools.count(8)))
        self._slot_buckets = (*powers, self.cache.slots)
        self._shadow_cache: KVCache | None = None
        self._free = list(range(rows))[::-1]
        self._free_shadows = list(range(self._n_shadows))[::-1]
        self.rows: set[Row] = set()
        self.compilations: collections.Counter[str] = collections.Counter()
        ends = (template.stop_ids, template.turn_ends)
        self._suppress = jnp.asarray(np.stack([never_sampled(config, template, kind) for kind in ends]))
        self._ends = jnp.asarray([np.isin(np.arange(config.padded_vocab_size), list(kind)) for kind in ends])
        self._programs: dict[Any, Callable[..., Any]] = {}

    def _stored(self, params: Params, weights: str, kernels: bool) -> Params:
        """The weights as the programs take them."""
        if any(isinstance(w, Matrix) for w in jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, Matrix))):
            return params  # another engine's
        if kernels:
            return minicpm.store(self.config, params, weights, in_panels=True, dtype=jnp.float32)
        if weights != self.dtype:
            return minicpm.store(self.config, params, weights, in_panels=False, dtype=self.dtype)
        return jax.tree.map(lambda w: jnp.asarray(w, self.dtype), minicpm.unstack(params))

    # Rows come and go.

    def open(self, ids: Sequence[int] = (), sampling: Sampling | None = None, seed: int = 0) -> Row:
        """Takes a free row for a context that begins with `ids`.

        Raises:
            EngineFull: no row is free.
            UserError: the beginning leaves too little room.
        """
        if not self._free:
            raise EngineFull(f"all {self.cache.rows} rows are taken; close a session first")
        self.check_beginning(ids)
        row = Row(self._free[-1], list(ids), 0, sampling or Sampling(), seed % 2**32)
        self._free.pop()  # only now that the arguments have proved good
        self.rows.add(row)
        return row

    @contextlib.contextmanager
    def opening(self, ids: Sequence[int] = (), sampling: Sampling | None = None, seed: int = 0) -> Iterator[Row]:
        """`open` for a block that makes something of the row; where the block fails, the row is closed.

        Raises:
            EngineFull, UserError: as `open`.
        """
        row = self.open(ids, sampling, seed)
        try:
            yield row
        except BaseException:
            self.close(row)
            raise

    def check_beginning(self, ids: Sequence[int]) -> None:
        """Whether a context may begin with `ids`, which stay for good.

        Raises:
            UserError: they leave too little room.
        """
        if len(ids) > self.capacity // 4:
            raise UserError(
                f"the beginning of the context takes {len(ids)} tokens; at most a quarter of the capacity "
                f"of {self.capacity} may stay for good"
            )

    def close(self, row: Row) -> None:
        """Gives a row back. Closing it twice does no harm."""
        if row in self.rows:
            self.rows.remove(row)
            self.drop_shadow(row)
            self._free.append(row.index)

    def fork(self, row: Row, seed: int | None = None) -> Row:
        """A second row with the same context, cached entries copied.

        Raises:
            EngineFull: no row is free.
        """
        self._check_open(row)
        with self.opening(sampling=row.sampling, seed=row.seed if seed is None else seed) as new:
            new.ids, new.cached, new.steps = list(row.ids), row.cached, row.steps
            new.shadow = row.shadow and dataclasses.replace(row.shadow, index=None)
            if row.cached:
                copy = self._program("copy", self._slots(row.cached), self.cache)
                self.cache = copy(self.cache, row.index, new.index)
        return new

    def _check_open(self, row: Row) -> None:
        if row not in self.rows:
            raise UserError("the session was closed, or is another engine's")

    # Their ids change.

    def truncate(self, row: Row, length: int, then: Sequence[int] = ()) -> None:
        """Cuts a row's ids back to `length` and appends `then`, pending: O(1) in the cache."""
        row.ids[length:] = then
        row.cached = min(row.cached, length)
        shadow = row.shadow
        if shadow is not None:
            if length < shadow.began:
                self.drop_shadow(row)
            else:
                shadow.cached = min(shadow.cached, shadow.prefix + length - shadow.base)

    def append(self, row: Row, ids: Sequence[int]) -> None:
        """Appends ids, pending."""
        row.ids += ids

    def advance(self, requests: Mapping[Row, Request]) -> dict[Row, list[int]]:
        """One step of several rows at once: appends each row's ids and samples up to M tokens behind them.

        Returns:
            For each row the sampled ids, stop token included; they are part of its ids now.

        Raises:
            UserError: a row's context would outgrow the capacity, or it was closed; no row was changed.
        """
        for row, request in requests.items():
            self._check_open(row)
            if len(row.ids) + len(request.ids) + self.max_slice_tokens > self.capacity:
                raise UserError(
                    f"the context holds {len(row.ids)} tokens and the slice brings {len(request.ids)}; "
                    f"with an answer they exceed the capacity of {self.capacity}"
                )
        if not requests:
            return {}
        for row, request in requests.items():
            pending = len(row.ids) - row.cached + len(request.ids)
            self.encode(row, pending - self._max_feed, request.ids)
        feeds = {row: [*row.ids, *request.ids][row.cached :] for row, request in requests.items()}
        lengths = {row: row.cached + len(feed) for row, feed in feeds.items()}
        in_turns = {row for row, request in requests.items() if not request.allow_idle}
        rows, places = self._rows_input(feeds, {}, in_turns)
        R, fed = len(rows.lengths), sum(map(len, feeds.values()))
        shape = next(s for s in self._feed_shapes(R) if len(s) == 2 or s[0] >= fed)
        inputs = programs.StepInput(
            rows, np.zeros(shape, np.int32), np.zeros_like(rows.lengths), np.zeros_like(rows.temperature),
        )  # fmt: skip
        if len(shape) == 1:
            inputs.tokens[:fed] = [i for row in sorted(feeds, key=places.__getitem__) for i in feeds[row]]
        for row, feed in feeds.items():
            i = places[row]
            if len(shape) == 2:
                inputs.tokens[i, : len(feed)] = feed
            inputs.counts[i] = len(feed)
            inputs.idle_bias[i] = row.sampling.idle_bias + self.template.idle_bias
        if self._few_rows:
            slots = self._read(max(row.cached for row in feeds))
            program = self._program("feed", slots, self.cache, R, int(np.prod(shape)))
            self.cache, token = program(self.params, self.cache, inputs)
            token = np.asarray(token)
            result = {row: [int(token[places[row]])] for row in feeds}
            ends = self.template.stop_ids, self.template.turn_ends
            going = {row: first for row, (first,) in result.items() if first not in ends[row in in_turns]}
            if going and self.max_slice_tokens > 1:
                result |= self._say(going, lengths, in_turns)
        else:
            slots = self._read(max(lengths.values()))
            program = self._program("step", slots, self.cache, R, int(np.prod(shape)))
            self.cache, sampled, number = program(self.params, self.cache, inputs)
            sampled, number = jax.device_get((sampled, number))
            result = {row: sampled[places[row], : number[places[row]]].tolist() for row in feeds}
        for row, said in result.items():
            row.cached = lengths[row] + len(said) - 1
            row.ids += [*requests[row].ids, *said]
            row.steps += 1
        return result

    def _say(
        self, first: Mapping[Row, int], lengths: Mapping[Row, int], in_turns: Collection[Row]
    ) -> dict[Row, list[int]]:
        """The slices that begin with these tokens, in rows that have grown to these lengths."""
        rows, places = self._rows_input(first, lengths, in_turns)
        token = np.zeros_like(rows.lengths)
        for row, place in places.items():
            token[place] = first[row]
        program = self._program("say", self._read(max(lengths[row] for row in first)), self.cache, len(token))
        self.cache, sampled, number = program(self.params, self.cache, token, rows)
        sampled, number = jax.device_get((sampled, number))
        return {row: sampled[place, : number[place]].tolist() for row, place in places.items()}

    def _rows_input(
        self, active: Collection[Row], lengths: Mapping[Row, int], in_turns: Collection[Row]
    ) -> tuple[programs.RowsInput, dict[Row, int]]:
        """Rows that take part, filled up to a number that programs are compiled for, and each one's place there.

        Args:
            active: the rows.
            lengths: of rows that have more in the cache by now than they say.
            in_turns: the rows that answer a turn.
        """
        B = self.cache.rows
        if self._few_rows:
            R = next(b for b in self._row_buckets if b >= len(active))
            taken = [row.index for row in active]
            index = np.array((taken + sorted(set(range(B)).difference(taken)))[:R], np.int32)
        else:
            R, index = B, None
        place = {int(row): i for i, row in enumerate(range(B) if index is None else index)}
        rows = programs.RowsInput(
            index, np.zeros(R, np.int32), np.zeros(R, bool), np.zeros(R, np.int32), np.zeros(R, np.uint32),
            np.zeros(R, np.uint32), np.zeros(R, np.float32), np.ones(R, np.float32), np.zeros(R, np.int32),
            self._suppress, self._ends,
        )  # fmt: skip
        for row in self.rows:
            if row.index in place:  # at rest, it gets a block of padding behind its length
                rows.lengths[place[row.index]] = lengths.get(row, row.cached)
        places = {row: place[row.index] for row in active}
        for row, i in places.items():
            rows.active[i], rows.in_turns[i] = True, row in in_turns
            rows.seeds[i], rows.steps[i] = row.seed, row.steps
            s = row.sampling
            rows.temperature[i], rows.top_p[i], rows.top_k[i] = s.temperature, s.top_p, s.top_k
        return rows, places

    def encode(self, row: Row, count: int, then: Sequence[int] = ()) -> None:
        """Encodes at least `count` of the row's pending ids (followed by `then`) ahead of the step, in chunks."""
        if count <= 0:
            return
        ids = [*row.ids, *then]
        stop = min(row.cached + count, len(ids) - 1)  # the last id is fed with the step that needs its logits
        while row.cached < stop:
            chunk = ids[row.cached : min(row.cached + self.chunk, len(ids) - 1)]
            self.cache = self._extend(self.cache, row.index, chunk, row.cached)
            row.cached += len(chunk)

    def logits(self, row: Row) -> np.ndarray:
        """float32 `[V]`: the logits that the row's next token is drawn from. The row must hold an id."""
        self.encode(row, len(row.ids) - row.cached - self.chunk)
        cached = min(row.cached, len(row.ids) - 1)
        tokens = self._padded(row.ids[cached:])
        program = self._program("logits", self._read(cached), self.cache)
        self.cache, logits = program(self.params, self.cache, row.index, tokens, len(row.ids) - cached, cached)
        return np.asarray(logits)

    def score(self, row: Row, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Appends ids and encodes them in chunks; for each chunk float32 `[n, V]`, the logits behind its ids.

        Raises:
            UserError: they do not fit the capacity.
        """
        if len(row.ids) + len(ids) > self.capacity:
            raise UserError(f"the context of {len(row.ids) + len(ids)} tokens exceeds the capacity of {self.capacity}")
        begin = len(row.ids)
        self.encode(row, begin - row.cached)
        row.ids += ids
        while row.cached < len(row.ids):
            chunk = row.ids[row.cached : row.cached + self.chunk]
            program = self._program("score", self._read(row.cached), self.cache)
            self.cache, logits = program(
                self.params, self.cache, row.index, self._padded(chunk), len(chunk), row.cached
            )  # fmt: skip
            yield np.asarray(logits)[max(0, begin - row.cached) : len(chunk)]
            row.cached += len(chunk)

    # Old pairs are dropped: what stays is encoded afresh ahead of the switch.

    def begin_shadow(self, row: Row, prefix: int, base: int) -> None:
        """Begins to encode the row's context without `ids[prefix:base]`."""
        if self._shadow_cache is None:
            self._shadow_cache = kv.zeros(self.config, self._n_shadows, self._shadow_slots, self._entries_dtype)
        index = self._free_shadows.pop() if self._free_shadows else None
        row.shadow = Shadow(index, prefix, base, len(row.ids))

    def advance_shadow(self, row: Row, count: int) -> bool:
        """Encodes about `count` more ids of the shadow; switches when it has caught up. True if it switched.

        A shadow that outgrows its cache is given up.
        """
        shadow = row.shadow
        assert shadow is not None
        ids = shadow.ids(row)
        if len(ids) > self._shadow_slots - self.chunk:
            self.drop_shadow(row)
            return False
        end = max(0, shadow.prefix + row.cached - shadow.base)  # what the row itself has cached; the rest stays pending
        for _ in range(-(-count // self.chunk)):
            chunk = ids[shadow.cached : min(shadow.cached + self.chunk, end)]
            if not chunk:
                break
            if shadow.index is not None:
                assert self._shadow_cache is not None
                self._shadow_cache = self._extend(self._shadow_cache, shadow.index, chunk, shadow.cached)
            shadow.cached += len(chunk)
        if shadow.cached < end:
            return False
        if shadow.index is None:
            row.ids, row.cached = ids, min(row.cached, shadow.prefix)
        else:
            program = self._program("switch", self._slots(shadow.cached), self.cache)
            self.cache = program(self.cache, row.index, self._shadow_cache, shadow.index)
            row.ids, row.cached = ids, shadow.cached
        self.drop_shadow(row)
        return True

    def drop_shadow(self, row: Row) -> None:
        """Gives up what the shadow has encoded."""
        if row.shadow is not None:
            if row.shadow.index is not None:
                self._free_shadows.append(row.shadow.index)
            row.shadow = None

    # Their entries leave the device and come back.

    def read(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """A row's cached entries on the host: keys `[L, K, H, cached]`, values `[L, K, cached, H]`; int8 as float32."""
        part = self._program("read", self._slots(row.cached), self.cache)(self.cache, row.index)
        k, v = (np.concatenate(x) for x in jax.device_get((part.k, part.v)))
        if part.k_scales:
            k_scales, v_scales = (np.concatenate(x) for x in jax.device_get((part.k_scales, part.v_scales)))
            k, v = k * k_scales[:, :, None], v * v_scales[..., None]
        return k[..., : row.cached], v[:, :, : row.cached]

    def write(self, row: Row, ids: Sequence[int], entries: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Gives a fresh row its ids and, where there are any, cached entries as `read` made them.

        Raises:
            UserError: entries of another model, or more than the capacity.
        """
        if len(ids) > self.capacity:
            raise UserError(f"a context of {len(ids)} tokens does not fit a capacity of {self.capacity}")
        row.ids, row.cached = list(ids), 0
        if entries is None:
            return
        k, v = entries
        c = self.config
        n = k.shape[-1]
        want = (c.num_layers, c.num_kv_heads, c.head_dim, n)
        if k.shape != want or v.shape != (*want[:2], n, c.head_dim) or n > len(ids):
            raise UserError(f"cached keys have shape {k.shape}; this model's are {want} for at most {len(ids)} tokens")
        slots = self._slots(n)
        k = np.pad(k, [(0, 0)] * 3 + [(0, slots - n)])
        v = np.pad(v, [(0, 0)] * 2 + [(0, slots - n), (0, 0)])
        part = KVCache(*(tuple(jnp.asarray(layer[None]) for layer in x) for x in (k, v)))
        self.cache = self._program("write", slots, self.cache)(self.cache, row.index, part)
        row.cached = n

    # Programs: one compilation for each kind, slot bucket and cache.

    def _feed_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """Shapes of the tokens that so many rows are fed, see `StepInput`, the cheapest first.

        Of many rows most are silent or say a few words: room for six tokens each, one row's behind the other's, mostly
        does. A single row takes much the same whatever it is fed.
        """
        whole = (rows, self._max_feed)
        return [(6 * rows,), whole] if rows > 1 and self._few_rows else [whole]

    def _slots(self, length: int) -> int:
        """The bucket of slots to read for a length: powers of two from 256; everything, where that is little more."""
        return next(n for n in self._slot_buckets if n >= length)

    def _slots_up_to(self, length: int) -> list[int]:
        """The buckets of all lengths up to this one."""
        return [n for n in self._slot_buckets if n <= self._slots(length)]

    def _read(self, length: int) -> int:
        """How many slots a program reads of rows that hold as many as `length`. The kernels go by each row's own."""
        return self.cache.slots if self._by_kernels else self._slots(length)

    def _reads_up_to(self, length: int) -> list[int]:
        """What `_read` gives for all lengths up to this one."""
        return sorted({self._read(n) for n in self._slots_up_to(length)})

    def _padded(self, tokens: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, self.chunk), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded

    def _extend(
        self, cache: KVCache, index: int, tokens: Sequence[int], length: int, slots: int | None = None
    ) -> KVCache:
        """Encodes a chunk of a row; reads so many slots of it, by default as many as its length needs."""
        program = self._program("extend", min(slots or self._read(length), cache.slots), cache)
        return program(self.params, cache, index, self._padded(tokens), len(tokens), length)

    def _program(
        self, kind: str, slots: int, cache: KVCache, rows: int = 1, tokens: int | None = None
    ) -> Callable[..., Any]:
        """A compiled program over so many of a cache's rows that reads so many of its slots."""
        tokens = self.chunk if tokens is None else tokens
        name = f"{kind} of {tokens} tokens and {rows} rows over {slots} slots of {cache.rows} x {cache.slots}"
        if name in self._programs:
            return self._programs[name]
        sizes: dict[str, Any] = {"slots": slots, "capacity": self.capacity}
        # By keyword, closed over: what is static in each program.
        idle: dict[str, Any] = {"idle_id": self.template.idle_id}
        stops: dict[str, Any] = {**idle, "max_slice_tokens": self.max_slice_tokens}
        bodies: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
            "feed": (
                functools.partial(programs.feed, self.config, **sizes, **idle, max_feed_tokens=self._max_feed), (1,)
            ),
            "say": (functools.partial(programs.say, self.config, **sizes, **stops), (1,)),
            "step": (functools.partial(programs.tdm_step, self.config, **sizes, **stops), (1,)),
            "extend": (lambda *args: programs.extend_row(self.config, *args, **sizes)[0], (1,)),
            "logits": (functools.partial(programs.logits_of_row, self.config, **sizes, every=False), (1,)),
            "score": (functools.partial(programs.logits_of_row, self.config, **sizes, every=True), (1,)),
            "copy": (lambda cache, row, to: kv.put_row(cache, to, kv.take_row(cache, row, slots)), (0,)),
            "switch": (
                lambda cache, to, other, row: kv.put_row(
                    cache, to, kv.take_row(other, row, min(slots, other.slots))),
                (0,),
            ),
            "read": (lambda cache, row: kv.take_row(cache, row, slots), ()),
            "write": (lambda cache, row, part: kv.put_row(cache, row, part), (0,)),
        }  # fmt: skip
        body, donated = bodies[kind]

        def counted(*args: Any) -> Any:
            self.compilations[name] += 1
            return body(*args)

        self._programs[name] = jax.jit(counted, donate_argnums=donated)
        return self._programs[name]

    def warm_up(self, length: int | None = None, everything: bool = False) -> float:
        """Compiles the step for every bucket up to a context `length` (the capacity by default); seconds taken.

        Args:
            length: of the longest context.
            everything: what restoring a session and dropping old pairs take, too, for a server that may never stall.

        Raises:
            UserError: `everything` was asked for with sessions open.
        """
        if everything and self.rows:
            raise UserError("an engine is warmed up before it has sessions")
        began = time.perf_counter()
        read = self._reads_up_to(min(length or self.capacity, self.capacity))
        for slots, R in itertools.product(read, self._row_buckets):
            index = np.arange(R, dtype=np.int32)
            rows = programs.RowsInput(
                index if self._few_rows else None, self._lengths()[:R], np.zeros(R, bool), np.zeros(R, np.int32),
                np.zeros(R, np.uint32), np.zeros(R, np.uint32), np.zeros(R, np.float32), np.ones(R, np.float32),
                np.zeros(R, np.int32), self._suppress, self._ends,
            )  # fmt: skip
            for shape in self._feed_shapes(R):
                inputs = programs.StepInput(
                    rows, np.zeros(shape, np.int32), np.zeros(R, np.int32), np.zeros(R, np.float32)
                )
                kind = "feed" if self._few_rows else "step"
                program = self._program(kind, slots, self.cache, R, int(np.prod(shape)))
                self.cache, *_ = program(self.params, self.cache, inputs)
            if self._few_rows and self.max_slice_tokens > 1:
                token = np.zeros(R, np.int32)
                self.cache, *_ = self._program("say", slots, self.cache, R)(self.params, self.cache, token, rows)
        if everything:
            if self._shadow_cache is None:
                self._shadow_cache = kv.zeros(self.config, self._n_shadows, self._shadow_slots, self._entries_dtype)
            # Nothing is lost: what lies behind a row's length is nobody's, and row 0 of both has length 0 here.
            longest = self._shadow_slots - self.chunk
            for n in read:
                self.cache = self._extend(self.cache, 0, [0], 0, n)
            for n in self._reads_up_to(longest):
                self._shadow_cache = self._extend(self._shadow_cache, 0, [0], 0, n)
            for n in self._slots_up_to(longest):
                self.cache = self._program("switch", n, self.cache)(self.cache, 0, self._shadow_cache, 0)
        return time.perf_counter() - began

    def _lengths(self) -> np.ndarray:
        lengths = np.zeros(self.cache.rows, np.int32)
        for row in self.rows:
            lengths[row.index] = row.cached
        return lengths
