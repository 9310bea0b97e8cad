"""Teacher-forced decisions: how likely a model is to be silent at each pair of a reference, by plain forward passes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.decode.backends import Backend
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import never_sampled
from duplex_jax.decode.sampling import Sampling, nucleus_mask
from duplex_jax.template import Template
from duplex_jax.timeline import SlicePair

# Tokens of one forward pass, padding included, and decisions whose logits are made at once.
_TOKENS = 4096
_DECISIONS = 32


class Window(NamedTuple):
    """A part of a conversation that fits the context: `ids`, and where in them the decisions lie that it answers.

    Attributes:
        conversation: whose.
        ids: int32 `[T]`.
        places: int32 `[P]`, the index of the token before each decision.
        pairs: `[P]`, the pairs that they are the decisions of.
    """

    conversation: int
    ids: np.ndarray
    places: np.ndarray
    pairs: list[int]


def windows(
    template: Template, pairs: Sequence[SlicePair], length: int, conversation: int = 0, system: str | None = None
) -> list[Window]:
    """Cuts a conversation between pairs into parts of at most `length` tokens, each with the opening in front.

    A conversation that fits is one window. In a longer one each decision is made once, in a window that reaches back
    over about half of `length`, or to the beginning. A pair that takes more than the other half is left out.
    """
    encoded = template.encode(pairs, system=system)
    opening = encoded.ids[: encoded.starts[0]]
    bounds = [*encoded.starts.tolist(), len(encoded.ids)]
    room = length - len(opening)
    found: list[Window] = []
    done = 0  # pairs whose decision has a window
    while done < len(pairs):
        fits = len(encoded.ids) - len(opening) <= room
        first = 0 if fits else next(i for i in range(done + 1) if bounds[done] - bounds[i] <= room // 2)
        stop = done
        while stop < len(pairs) and bounds[stop + 1] - bounds[first] <= room:
            stop += 1
        if stop == done:
            done += 1
            continue
        ids = np.concatenate([opening, encoded.ids[bounds[first] : bounds[stop]]])
        places = encoded.decisions[done:stop] - 1 - bounds[first] + len(opening)
        found.append(Window(conversation, ids, places, list(range(done, stop))))
        done = stop
    return found


def silent_probability(
    logits: jax.Array, stop_ids: Sequence[int], idle_id: int, suppress: jax.Array, sampling: Sampling
) -> jax.Array:
    """The probability that a slice is silent: that its first token is idle, or ends it.

    Sampled as the engine samples: control tokens out, `idle_bias` on idle, temperature, top-k, top-p; greedy gives 0
    or 1.

    Args:
        logits: float32 `[N, V]`.
        stop_ids: idle and end.
        idle_id: gets the bias.
        suppress: bool `[V]`, tokens that are never drawn.
        sampling: how.

    Returns:
        float32 `[N]`.
    """
    logits = jnp.where(suppress, -1e30, logits).at[:, idle_id].add(sampling.idle_bias)
    stops = jnp.asarray(stop_ids)
    if sampling.temperature == 0:
        return jnp.isin(jnp.argmax(logits, -1), stops).astype(jnp.float32)
    scaled = logits / sampling.temperature
    n = logits.shape[0]
    kept = nucleus_mask(scaled, jnp.full(n, sampling.top_p), jnp.full(n, sampling.top_k, jnp.int32))
    weights = jnp.where(kept, jnp.exp(scaled - jnp.max(scaled, -1, keepdims=True)), 0)
    return weights[:, stops].sum(-1) / weights.sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _encode(backend: Backend, weights: Any, tokens: jax.Array) -> jax.Array:
    return backend.forward(weights, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decide(
    backend: Backend, samplings: tuple[Sampling, ...], stop_ids: tuple[int, int], idle_id: int, weights: Any,
    suppress: jax.Array, hidden: jax.Array, rows: jax.Array, places: jax.Array,
) -> jax.Array:  # fmt: skip
    """float32 `[samplings, N]` from hidden states `[B, T, D]` and the N places in them."""
    logits = backend.logits(weights, hidden[rows, places])
    return jnp.stack([silent_probability(logits, stop_ids, idle_id, suppress, s) for s in samplings])


def forced_decisions(
    engine: Engine, conversations: Sequence[Sequence[SlicePair]], samplings: Sequence[Sampling],
    system: str | None = None,
) -> Iterator[tuple[int, list[list[float | None]]]]:  # fmt: skip
    """Teacher-forced decisions of a model over whole conversations, several in one forward pass.

    Silent pairs all stay in the context, as in training; a live session forgets all but one of a run.

    Args:
        engine: its model, weights, template and capacity are used; its rows are not.
        conversations: reference pairs.
        samplings: how the first token is drawn; they may differ in `idle_bias`, say.
        system: a system prompt.

    Yields:
        (index of the conversation, for each sampling the probability of silence at each pair) as conversations are
        done, in an order of their own. None for a pair that is longer than the context.
    """
    backend, template = engine.backend, engine.template
    samplings = [dataclasses.replace(s, idle_bias=s.idle_bias + template.idle_bias) for s in samplings]
    suppress = jnp.asarray(never_sampled(engine.config, template))

    results: dict[int, list[list[float | None]]] = {}
    parts: dict[int, int] = {}
    waiting: list[Window] = []
    for number, pairs in enumerate(conversations):
        cut = windows(template, pairs, engine.capacity, number, system)
        results[number] = [[None] * len(pairs) for _ in samplings]
        parts[number] = len(cut)
        waiting += cut
        if not cut:
            yield number, results.pop(number)
    # Windows of like length go together, so that little is padding.
    waiting.sort(key=lambda w: len(w.ids))
    while waiting:
        batch, waiting = _next_batch(waiting, engine.capacity)
        tokens = np.zeros(_batch_shape(len(batch[-1].ids), engine.capacity), np.int32)
        for row, window in enumerate(batch):
            tokens[row, : len(window.ids)] = window.ids
        hidden = _encode(backend, backend.weights, tokens)
        rows = np.concatenate([np.full(len(w.places), r) for r, w in enumerate(batch)]).astype(np.int32)
        places = np.concatenate([w.places for w in batch]).astype(np.int32)
        decide = functools.partial(
            _decide, backend, tuple(samplings), template.stop_ids, template.idle_id, backend.weights, suppress, hidden
        )
        silent = _in_chunks(decide, rows, places)
        start = 0
        for window in batch:
            for of, values in zip(results[window.conversation], silent, strict=True):
                for pair, value in zip(window.pairs, values[start:], strict=False):
                    of[pair] = float(value)
            start += len(window.pairs)
            parts[window.conversation] -= 1
            if not parts[window.conversation]:
                yield window.conversation, results.pop(window.conversation)


def _batch_shape(longest: int, capacity: int) -> tuple[int, int]:
    """Rows and columns of a batch: few shapes, so few compilations."""
    columns = 64
    while columns < longest:
        columns *= 2
    columns = min(columns, max(capacity, longest))
    return max(1, _TOKENS // columns), columns


def _next_batch(waiting: list[Window], capacity: int) -> tuple[list[Window], list[Window]]:
    """The windows of the next forward pass, and the rest; they are sorted by length."""
    _, columns = _batch_shape(len(waiting[0].ids), capacity)
    rows = max(1, _TOKENS // columns)
    taken = 0
    while taken < min(rows, len(waiting)) and len(waiting[taken].ids) <= columns:
        taken += 1
    return waiting[:taken], waiting[taken:]


def _in_chunks(decide: Callable[..., jax.Array], rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """float32 `[samplings, N]`, a fixed number of decisions at a time: the logits of all would take too much room."""
    found = []
    for start in range(0, len(rows), _DECISIONS):
        part = [np.zeros(_DECISIONS, np.int32), np.zeros(_DECISIONS, np.int32)]
        n = len(rows[start : start + _DECISIONS])
        part[0][:n], part[1][:n] = rows[start : start + n], places[start : start + n]
        found.append(np.asarray(decide(*part))[:, :n])
    return np.concatenate(found, axis=1)
