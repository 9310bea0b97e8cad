"""The batched engine: rows of one cache, one conversation each, stepped together by a few compiled programs.

A row holds the ids of its context; the engine keeps the cache in agreement with them. Invariant: after any sequence of
appending, truncating, copying and moving, a row's next logits are those of a fresh forward pass over its ids.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.decode import backends
from duplex_jax.decode.backends import Backend
from duplex_jax.decode.cache import KVCache
from duplex_jax.decode.programs import Program, Programs
from duplex_jax.decode.rows import Request, Row, Rows, cache_sizes, never_sampled
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.step import RowsInput, StepInput, Stops, empty_rows, empty_step
from duplex_jax.errors import UserError
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.slicing import MAX_SLICE_TOKENS
from duplex_jax.template import Template

CHUNK = 64
"""Default number of tokens encoded at once."""


class Engine:
    """Rows of a fixed-shape KV cache and the compiled programs over them. Not thread-safe.

    Args:
        model: the model with stacked weights, as numpy or jax arrays; or another engine's backend.
        template: defines the idle and end tokens, and those that are never sampled.
        rows: B, the most conversations at once.
        capacity: most tokens of a context.
        dtype: dtype of the computation; by default float32 on CPU and bfloat16 elsewhere.
        weights: storage type of the weights, one of `STORES`; `dtype` by default.
        entries: storage type of cached keys and values, one of `STORES`; `dtype` by default.
        kernels: whether to use the native CPU kernels (float32); by default if they are available.
        max_feed_tokens: T, most tokens of a row that one step is fed.
        row_buckets: values of R, the number of rows that a program computes. A step uses the smallest that holds its
            rows, and chooses again for those that are not silent. By default 1, 4, 16, 32, 64, ... on CPU; elsewhere
            always all rows, and the host does not inspect the first token in between.
        chunk: tokens encoded at once when more than a step's worth are pending.
        max_slice_tokens: M, most tokens of an assistant slice.

    Raises:
        UserError: a size is invalid, the capacity exceeds the model's positions, or the kernels are not available.
    """

    def __init__(
        self,
        model: MiniCPM | Backend,
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
        config = self.config = model.config
        capacity = capacity or min(4096, config.max_position_embeddings)
        if rows < 1:
            raise UserError(f"rows {rows}: an engine needs at least one")
        if capacity > config.max_position_embeddings and config.rope_scaling.type == "default":
            raise UserError(f"capacity {capacity} is more than the {config.max_position_embeddings} positions that "
                            "the model was trained for")  # fmt: skip
        if capacity < 2 * (chunk + max_slice_tokens):
            raise UserError(f"capacity {capacity} is too small; slices of {chunk} + {max_slice_tokens} "
                            f"tokens need at least {2 * (chunk + max_slice_tokens)}")  # fmt: skip
        if isinstance(model, MiniCPM):
            model = backends.prepare(model, capacity, dtype=dtype, weights=weights, entries=entries, kernels=kernels)
        self.backend = model
        self.template, self.capacity, self.max_slice_tokens = template, capacity, max_slice_tokens
        self._max_feed = max_feed_tokens
        if row_buckets is None:
            # On two cores eight rows take nearly as long as sixteen, and each program takes seconds to compile.
            row_buckets = [1, 4, *(16 * 2**i for i in range(10))] if jax.default_backend() == "cpu" else []
        self._few_rows = bool(row_buckets)
        self._row_buckets = (*sorted(b for b in row_buckets if b < rows), rows)
        self.chunk = max(chunk, max_feed_tokens)
        size, self._shadow_size = cache_sizes(rows, capacity, self.chunk + max_slice_tokens)
        self.cache = self.backend.new_cache(*size)
        powers = itertools.takewhile(lambda n: n * 4 < self.cache.slots * 3, (2**p for p in itertools.count(8)))
        self._slot_buckets = (*powers, self.cache.slots)
        self._shadow_cache: KVCache | None = None
        self._rows = Rows(rows, self._shadow_size[0], capacity)
        ends = (template.stop_ids, template.turn_ends)
        self._suppress = jnp.asarray(np.stack([never_sampled(config, template, kind) for kind in ends]))
        self._ends = jnp.asarray([np.isin(np.arange(config.padded_vocab_size), list(kind)) for kind in ends])
        self._programs = Programs(self.backend, Stops(template.idle_id, max_slice_tokens), max_feed_tokens)

    @property
    def rows(self) -> set[Row]:
        """The open rows."""
        return self._rows.open

    @property
    def free(self) -> int:
        """How many rows are free."""
        return self._rows.free

    @property
    def compilations(self) -> Mapping[Program, int]:
        """Number of compilations of each program."""
        return self._programs.compilations

    # Opening and closing rows.

    def open(self, ids: Sequence[int] = (), sampling: Sampling | None = None, seed: int = 0) -> Row:
        """Opens a free row for a context that begins with `ids`.

        Raises:
            EngineFull: no row is free.
            UserError: `ids` leave too little room for a conversation.
        """
        return self._rows.allocate(ids, sampling, seed)

    @contextlib.contextmanager
    def opening(self, ids: Sequence[int] = (), sampling: Sampling | None = None, seed: int = 0) -> Iterator[Row]:
        """`open` as a context manager that closes the row if its block raises.

        Raises:
            EngineFull, UserError: as for `open`.
        """
        row = self.open(ids, sampling, seed)
        try:
            yield row
        except BaseException:
            self.close(row)
            raise

    def check_beginning(self, ids: Sequence[int]) -> None:
        """Checks that permanent ids at the front of a context leave enough room.

        Raises:
            UserError: they do not.
        """
        self._rows.check_beginning(ids)

    def close(self, row: Row) -> None:
        """Frees a row. Closing it twice is harmless."""
        self._rows.release(row)

    def fork(self, row: Row, seed: int | None = None) -> Row:
        """Opens a second row with the same context by copying the cached entries.

        Raises:
            EngineFull: no row is free.
        """
        self._rows.check_open(row)
        with self.opening(sampling=row.sampling, seed=row.seed if seed is None else seed) as new:
            new.ids, new.cached, new.steps = list(row.ids), row.cached, row.steps
            new.shadow = row.shadow and dataclasses.replace(row.shadow, index=None)
            if row.cached:
                copy = self._program("copy", self._slots(row.cached), self.cache)
                self.cache = copy(self.cache, new.index, row.index)
        return new

    # Changing a row's ids.

    def truncate(self, row: Row, length: int, then: Sequence[int] = ()) -> None:
        """Truncates a row's ids to `length` and appends `then` as pending ids; O(1) in the cache."""
        self._rows.truncate(row, length, then)

    def append(self, row: Row, ids: Sequence[int]) -> None:
        """Appends ids as pending."""
        row.ids += ids

    def advance(self, requests: Mapping[Row, Request]) -> dict[Row, list[int]]:
        """One step of several rows: appends each row's ids and samples up to M tokens after them.

        Returns:
            The sampled ids of each row, including the stop token; they are now part of its ids.

        Raises:
            UserError: a context would exceed the capacity, or a row is closed; no row has changed.
        """
        for row, request in requests.items():
            self._rows.check_open(row)
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
        inputs, places = self._step_input(feeds, in_turns)
        slots = self._read(max(row.cached for row in feeds))
        program = self._program("feed", slots, self.cache, len(inputs.counts), inputs.tokens.size)
        self.cache, token = program(self.backend.weights, self.cache, inputs)
        if self._few_rows:
            token = np.asarray(token)
            result = {row: [int(token[places[row]])] for row in feeds}
            ends = self.template.stop_ids, self.template.turn_ends
            going = {row: first for row, (first,) in result.items() if first not in ends[row in in_turns]}
            if going and self.max_slice_tokens > 1:
                rows, places = self._rows_input(going, lengths, in_turns)
                token = np.zeros_like(rows.lengths)
                for row, place in places.items():
                    token[place] = going[row]
                result |= self._say(token, rows, places, max(lengths[row] for row in going))
        else:  # `say` itself leaves out silent slices, so the host does not wait for the tokens
            rows = dataclasses.replace(inputs.rows, lengths=inputs.rows.lengths + inputs.counts)
            result = self._say(token, rows, places, max(lengths.values()))
        for row, said in result.items():
            row.cached = lengths[row] + len(said) - 1
            row.ids += [*requests[row].ids, *said]
            row.steps += 1
        return result

    def _say(self, token: Any, rows: RowsInput, places: Mapping[Row, int], longest: int) -> dict[Row, list[int]]:
        """Samples the rest of the slices that begin with `token` `[R]`, in rows of at most `longest` tokens."""
        program = self._program("say", self._read(longest), self.cache, len(rows.lengths))
        self.cache, sampled, number = program(self.backend.weights, self.cache, token, rows)
        sampled, number = jax.device_get((sampled, number))
        return {row: sampled[place, : number[place]].tolist() for row, place in places.items()}

    def _step_input(
        self, feeds: Mapping[Row, Sequence[int]], in_turns: Collection[Row]
    ) -> tuple[StepInput, dict[Row, int]]:
        """The step's input, and the index of each row in it."""
        rows, places = self._rows_input(feeds, {}, in_turns)
        fed = sum(map(len, feeds.values()))
        shapes = self._feed_shapes(len(rows.lengths))
        inputs = empty_step(rows, next(s for s in shapes if len(s) == 2 or s[0] >= fed))
        if inputs.tokens.ndim == 1:
            inputs.tokens[:fed] = [i for row in sorted(feeds, key=places.__getitem__) for i in feeds[row]]
        for row, feed in feeds.items():
            i = places[row]
            if inputs.tokens.ndim == 2:
                inputs.tokens[i, : len(feed)] = feed
            inputs.counts[i] = len(feed)
            inputs.idle_bias[i] = row.sampling.idle_bias + self.template.idle_bias
        return inputs, places

    def _rows_input(
        self, active: Collection[Row], lengths: Mapping[Row, int], in_turns: Collection[Row]
    ) -> tuple[RowsInput, dict[Row, int]]:
        """The active rows, filled up to a compiled batch size, and the index of each in the batch.

        Args:
            active: the rows.
            lengths: cached lengths of rows whose `cached` is not up to date.
            in_turns: the rows that answer a turn instead of a slice.
        """
        B = self.cache.rows
        if self._few_rows:
            R = next(b for b in self._row_buckets if b >= len(active))
            taken = [row.index for row in active]
            index = np.array((taken + sorted(set(range(B)).difference(taken)))[:R], np.int32)
        else:
            R, index = B, None
        place = {int(row): i for i, row in enumerate(range(B) if index is None else index)}
        rows = empty_rows(np.zeros(R, np.int32), self._suppress, self._ends, index)
        for row in self.rows:
            if row.index in place:  # an inactive row gets padding written behind its length
                rows.lengths[place[row.index]] = lengths.get(row, row.cached)
        places = {row: place[row.index] for row in active}
        for row, i in places.items():
            rows.active[i], rows.in_turns[i] = True, row in in_turns
            rows.seeds[i], rows.steps[i] = row.seed, row.steps
            s = row.sampling
            rows.temperature[i], rows.top_p[i], rows.top_k[i] = s.temperature, s.top_p, s.top_k
        return rows, places

    def encode(self, row: Row, count: int, then: Sequence[int] = ()) -> None:
        """Encodes at least `count` of the row's pending ids (and of `then` after them) in chunks, ahead of the step."""
        if count <= 0:
            return
        ids = [*row.ids, *then]
        stop = min(row.cached + count, len(ids) - 1)  # the step that needs the last id's logits feeds it
        while row.cached < stop:
            chunk = ids[row.cached : min(row.cached + self.chunk, len(ids) - 1)]
            self.cache = self._extend(self.cache, row.index, chunk, row.cached)
            row.cached += len(chunk)

    def logits(self, row: Row) -> np.ndarray:
        """float32 `[V]`: logits of the row's next token. The row must hold at least one id."""
        self.encode(row, len(row.ids) - row.cached - self.chunk)
        cached = min(row.cached, len(row.ids) - 1)
        tokens = self._padded(row.ids[cached:])
        program = self._program("logits", self._read(cached), self.cache)
        self.cache, logits = program(self.backend.weights, self.cache, row.index, tokens, len(row.ids) - cached, cached)
        return np.asarray(logits)

    def score(self, row: Row, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Appends ids and encodes them in chunks; yields for each chunk the logits after its ids, float32 `[n, V]`.

        Raises:
            UserError: they exceed the capacity.
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
                self.backend.weights, self.cache, row.index, self._padded(chunk), len(chunk), row.cached
            )
            yield np.asarray(logits)[max(0, begin - row.cached) : len(chunk)]
            row.cached += len(chunk)

    # Dropping old pairs: the shortened context is encoded in a shadow row before the switch.

    def begin_shadow(self, row: Row, prefix: int, base: int) -> None:
        """Starts encoding the row's context without `ids[prefix:base]`."""
        if self._shadow_cache is None:
            self._shadow_cache = self.backend.new_cache(*self._shadow_size)
        self._rows.begin_shadow(row, prefix, base)

    def advance_shadow(self, row: Row, count: int) -> bool:
        """Encodes about `count` more ids of the shadow, and switches once it has caught up; True if it switched.

        A shadow that outgrows its cache is dropped.
        """
        shadow = row.shadow
        assert shadow is not None
        ids = shadow.ids(row)
        if len(ids) > self._shadow_size[1] - self.chunk:
            self.drop_shadow(row)
            return False
        end = max(0, shadow.prefix + row.cached - shadow.base)  # no further than the row's own cached ids
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
        """Abandons the row's shadow, if it has one."""
        self._rows.drop_shadow(row)

    # Moving cached entries between the device and the host.

    def read(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """A row's cached keys `[L, K, H, cached]` and values `[L, K, cached, H]` on the host; int8 as float32."""
        part = self._program("read", self._slots(row.cached), self.cache)(self.cache, row.index)
        k, v = (np.concatenate(x) for x in jax.device_get((part.k, part.v)))
        if part.k_scales:
            k_scales, v_scales = (np.concatenate(x) for x in jax.device_get((part.k_scales, part.v_scales)))
            k, v = k * k_scales[:, :, None], v * v_scales[..., None]
        return k[..., : row.cached], v[:, :, : row.cached]

    def write(self, row: Row, ids: Sequence[int], entries: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Gives a new row its ids and, optionally, cached entries as returned by `read`.

        Raises:
            UserError: the entries belong to another model or exceed the capacity.
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

    # Programs: one compilation per kind, slot bucket and cache.

    def _feed_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """Shapes of the token arrays for this many rows (see `StepInput`), the cheapest first.

        In a large batch most rows are silent or say a few words, so six tokens per row, laid end to end, are usually
        enough. For a single row the shape hardly matters.
        """
        whole = (rows, self._max_feed)
        return [(6 * rows,), whole] if rows > 1 and self._few_rows else [whole]

    def _slots(self, length: int) -> int:
        """The smallest bucket of slots that holds a length: powers of two from 256, and at the end all slots."""
        return next(n for n in self._slot_buckets if n >= length)

    def _slots_up_to(self, length: int) -> list[int]:
        """The buckets of all lengths up to this one."""
        return [n for n in self._slot_buckets if n <= self._slots(length)]

    def _read(self, length: int) -> int:
        """How many slots of each row a program reads when the longest row has `length`."""
        return self._slots(length) if self.backend.reads_buckets else self.cache.slots

    def _reads_up_to(self, length: int) -> list[int]:
        """The values of `_read` for all lengths up to this one."""
        return sorted({self._read(n) for n in self._slots_up_to(length)})

    def _padded(self, tokens: Sequence[int]) -> np.ndarray:
        padded = np.zeros(self.chunk, np.int32)
        padded[: len(tokens)] = tokens
        return padded

    def _extend(
        self, cache: KVCache, index: int, tokens: Sequence[int], length: int, slots: int | None = None
    ) -> KVCache:
        """Encodes a chunk of a row, reading `slots` of its slots; by default as many as its length needs."""
        program = self._program("extend", min(slots or self._read(length), cache.slots), cache)
        return program(self.backend.weights, cache, index, self._padded(tokens), len(tokens), length)

    def _program(
        self, kind: str, slots: int, cache: KVCache, rows: int = 1, tokens: int | None = None
    ) -> Callable[..., Any]:
        """The compiled program for this many rows and slots."""
        size = (cache.rows, cache.slots)
        return self._programs[Program(kind, slots, size, rows, self.chunk if tokens is None else tokens)]

    def warm_up(self, length: int | None = None, everything: bool = False) -> float:
        """Compiles the step for all buckets up to a context of `length` (default: capacity); returns the seconds.

        Args:
            length: the longest context expected.
            everything: also compile restoring sessions and dropping old pairs, for a server that must never stall.

        Raises:
            UserError: `everything` is set while sessions are open.
        """
        if everything and self.rows:
            raise UserError("an engine is warmed up before it has sessions")
        began = time.perf_counter()
        read = self._reads_up_to(min(length or self.capacity, self.capacity))
        for slots, R in itertools.product(read, self._row_buckets):
            index = np.arange(R, dtype=np.int32) if self._few_rows else None
            rows = empty_rows(self._lengths()[:R], self._suppress, self._ends, index)
            for shape in self._feed_shapes(R):
                program = self._program("feed", slots, self.cache, R, int(np.prod(shape)))
                self.cache, _ = program(self.backend.weights, self.cache, empty_step(rows, shape))
            if self.max_slice_tokens > 1 or not self._few_rows:
                say = self._program("say", slots, self.cache, R)
                self.cache, *_ = say(self.backend.weights, self.cache, np.zeros(R, np.int32), rows)
        if everything:
            if self._shadow_cache is None:
                self._shadow_cache = self.backend.new_cache(*self._shadow_size)
            # This overwrites nothing: entries behind a row's length are unused, and row 0 of both caches has length 0
            # here.
            longest = self._shadow_size[1] - self.chunk
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
