"""The compiled programs of an engine, one per kind, slot bucket and cache."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from duplex_jax.decode import cache as kv
from duplex_jax.decode.backends import Backend
from duplex_jax.decode.cache import KVCache
from duplex_jax.decode.step import Stops


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that a compilation depends on.

    Attributes:
        kind: `feed` or `say`; for a single row `extend`, `logits` (after a chunk), `score` (after each token of a
            chunk), `copy` (within a cache), `switch` (from the shadow cache), `read` or `write`.
        slots: slots of a row that are read or copied.
        cache: rows and slots of the cache.
        rows: R, the number of rows in the batch.
        tokens: incoming tokens, padding included.
    """

    kind: str
    slots: int
    cache: tuple[int, int]
    rows: int = 1
    tokens: int = 0


class Programs:
    """Compiles programs on first use.

    Args:
        backend: the arithmetic.
        stops: end conditions of a slice.
        longest: T, most tokens that one row is fed at once.
    """

    def __init__(self, backend: Backend, stops: Stops, longest: int):
        self._backend, self._stops, self._longest = backend, stops, longest
        self._made: dict[Program, Any] = {}
        self.compilations: collections.Counter[Program] = collections.Counter()

    def __getitem__(self, program: Program) -> Any:
        """The jitted function; the cache is donated, and the weights are its first argument where it needs them."""
        if program not in self._made:
            body = self._body(program)

            caches = {"read": (0,), "copy": (0,), "switch": (0, 2), "write": (0,)}.get(program.kind, (1,))

            def counted(*args: Any) -> Any:
                self.compilations[program] += 1
                if not self._backend.slot_major_keys:
                    return body(*args)
                out = body(*(kv.swap_keys(x) if i in caches else x for i, x in enumerate(args)))
                if program.kind == "read":
                    return out
                return kv.swap_keys(out) if isinstance(out, KVCache) else (kv.swap_keys(out[0]), *out[1:])

            donated = () if program.kind == "read" else caches[:1]
            self._made[program] = jax.jit(counted, donate_argnums=donated)
        return self._made[program]

    def _body(self, program: Program) -> Callable[..., Any]:
        backend, stops, slots = self._backend, self._stops, program.slots

        def feed(weights: Any, cache: KVCache, inputs: Any) -> Any:
            return backend.feed(weights, cache, inputs, slots=slots, longest=self._longest, stops=stops)

        def say(weights: Any, cache: KVCache, token: Any, rows: Any) -> Any:
            return backend.say(weights, cache, token, rows, slots=slots, stops=stops)

        def extend(*args: Any) -> Any:
            return backend.extend(*args, slots=slots)[0]

        def score(weights: Any, *args: Any) -> Any:
            cache, hidden = backend.extend(weights, *args, slots=slots)
            return cache, backend.logits(weights, hidden)

        def logits(weights: Any, cache: KVCache, row: Any, tokens: Any, count: Any, length: Any) -> Any:
            cache, hidden = backend.extend(weights, cache, row, tokens, count, length, slots=slots)
            return cache, backend.logits(weights, lax.dynamic_index_in_dim(hidden, count - 1, keepdims=False))

        def switch(cache: KVCache, to: Any, other: KVCache, row: Any) -> KVCache:
            return kv.put_row(cache, to, kv.take_row(other, row, min(slots, other.slots)))

        def copy(cache: KVCache, to: Any, row: Any) -> KVCache:
            return switch(cache, to, cache, row)

        def read(cache: KVCache, row: Any) -> KVCache:
            return kv.take_row(cache, row, slots)

        bodies: dict[str, Callable[..., Any]] = {
            "feed": feed,
            "say": say,
            "extend": extend,
            "logits": logits,
            "score": score,
            "copy": copy,
            "switch": switch,
            "read": read,
            "write": kv.put_row,
        }
        return bodies[program.kind]
