"""Log-likelihoods of continuations by forward passes in which the choices of a question share what they begin with.

A row is a question: the ids that all its choices begin with, then what is left of each choice, a branch. A token sees
what was shared and its own branch, and its position is the one that it has in its own continuation, so the numbers
are those of one forward pass for each choice. Letters: B rows, T tokens, D hidden, P scored tokens, and attention's.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.evaluate.benchmarks.ways import Continuation
from duplex_jax.model.minicpm import MiniCPM

# Tokens of a forward pass, padding included; queries whose scores, and tokens whose logits, are made at once.
_TOKENS_CPU, _TOKENS = 2048, 16384
_QUERY_CHUNK = 256
_HEAD_CHUNK = 128
_SHARED, _PADDING = 0, -1


class Likelihoods(NamedTuple):
    """Of each choice of a question.

    Attributes:
        all: the sum of log p(token) over the choice's word tokens.
        words: the same, given that each of them is no idle and no end of a slice: what is left is which words.
        greedy: whether each of its tokens is the most probable one; empty where that was not kept.
    """

    all: list[float]
    words: list[float]
    greedy: tuple[bool, ...] = ()


class Row(NamedTuple):
    """A question as a model is fed it.

    Attributes:
        ids, positions, branches: int32 `[T]`; branch 0 is shared by all.
        places: int32 `[P]`, the index of the token before each scored one.
        targets: int32 `[P]`, the scored ones.
        choices: int32 `[P]`, whose they are.
    """

    ids: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    choices: np.ndarray


def make_row(continuations: Sequence[Continuation]) -> Row:
    """Puts the continuations of one question into one row."""
    fed = [c.ids[:-1] for c in continuations]
    shared = 0
    while all(len(ids) > shared for ids in fed) and len({ids[shared] for ids in fed}) == 1:
        shared += 1
    ids, positions, branches = fed[0][:shared], list(range(shared)), [_SHARED] * shared
    places, targets, choices = [], [], []
    for number, (own, whole) in enumerate(zip(fed, continuations, strict=True)):
        offset = len(ids) - shared
        ids, positions = [*ids, *own[shared:]], [*positions, *range(shared, len(own))]
        branches += [number + 1] * (len(own) - shared)
        places += [i - 1 if i <= shared else i - 1 + offset for i in whole.scored]
        targets += [whole.ids[i] for i in whole.scored]
        choices += [number] * len(whole.scored)
    return Row(*(np.asarray(a, np.int32) for a in (ids, positions, branches, places, targets, choices)))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, branches: jax.Array) -> jax.Array:
    """Causal attention to the shared tokens and those of one's own branch: `[B, T, N, H]`."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = (q * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    chunks = []
    for start in range(0, T, _QUERY_CHUNK):
        stop = min(start + _QUERY_CHUNK, T)
        own, seen = branches[:, start:stop, None], branches[:, None, :stop]
        mask = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)) & ((seen == own) | (seen == _SHARED))
        scores = jnp.einsum("bkgth,bksh->bkgts", q[:, :, :, start:stop], k[:, :, :stop],
                            preferred_element_type=jnp.float32)  # fmt: skip
        probs = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1).astype(v.dtype)
        chunks.append(jnp.einsum("bkgts,bksh->bkgth", probs, v[:, :, :stop]))
    return jnp.concatenate(chunks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.jit, static_argnums=1)
def _hidden(model: MiniCPM, capacity: int, tokens: jax.Array, positions: jax.Array, branches: jax.Array) -> jax.Array:
    """`[B, T, D]`, in the dtype of the weights."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _attend(q, k, v, branches)

    return model.hidden(tokens, positions, dtype=model.dtype, attend=attend, capacity=capacity)


@functools.partial(jax.jit, static_argnums=1)
def _score(model: MiniCPM, stop_ids: tuple[int, ...], hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 `[3, P]`: log p of each target, the same given that it is none of `stop_ids`, and 1 for each target that
    is not the most probable token; hidden is `[P, D]`."""
    logits = model.logits(hidden)
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    words = logits.at[:, jnp.asarray(stop_ids)].set(-jnp.inf)
    missed = (own < logits.max(axis=-1)).astype(own.dtype)
    return jnp.stack([*(own - jax.nn.logsumexp(x, axis=-1) for x in (logits, words)), missed])


def log_likelihoods(
    model: MiniCPM, rows: Sequence[Row], stop_ids: Sequence[int], capacity: int
) -> Iterator[tuple[int, Likelihoods]]:
    """Log-likelihoods of all choices of all questions, rows of like length in one forward pass.

    Args:
        model: its weights on the device and in the dtype to compute in.
        rows: the questions.
        stop_ids: idle and end of slice.
        capacity: most tokens of a continuation; some ways to scale rotary embeddings depend on it.

    Yields:
        (index of the question, its log-likelihoods), in an order of their own.
    """
    budget = token_budget()
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    while waiting:
        # The longest first: what does not fit into memory is known at once.
        columns = padded_length(len(rows[waiting[-1]].ids))
        B = max(1, budget // columns)
        batch, waiting = waiting[-B:], waiting[:-B]
        tokens, positions, branches = (np.full((B, columns), fill, np.int32) for fill in (0, 0, _PADDING))
        for b, i in enumerate(batch):
            n = len(rows[i].ids)
            tokens[b, :n], positions[b, :n], branches[b, :n] = rows[i].ids, rows[i].positions, rows[i].branches
        hidden = np.asarray(_hidden(model, capacity, tokens, positions, branches))
        places = np.concatenate([hidden[b, rows[i].places] for b, i in enumerate(batch)])
        scores = _in_chunks(model, tuple(stop_ids), places, np.concatenate([rows[i].targets for i in batch]))
        start = 0
        for i in batch:
            row, n = rows[i], int(rows[i].choices[-1]) + 1
            own = scores[:, start : start + len(row.targets)]
            start += len(row.targets)
            of_all, of_words, missed = (np.bincount(row.choices, kind, n).tolist() for kind in own)
            yield i, Likelihoods(of_all, of_words, tuple(count == 0 for count in missed))


def token_budget() -> int:
    """Tokens of a forward pass, padding included."""
    return _TOKENS_CPU if jax.default_backend() == "cpu" else _TOKENS


def padded_length(longest: int) -> int:
    """64, 96, 128, 192, 256, ...: few shapes, so few compilations, and a quarter of padding at most behind 64."""
    columns = 64
    while columns < longest:
        columns = columns * 3 // 2 if columns & (columns - 1) == 0 else columns // 3 * 4
    return columns


def _in_chunks(model: MiniCPM, stop_ids: tuple[int, ...], hidden: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float32 `[3, P]`, a fixed number of tokens at a time: the logits of all would take too much room."""
    found = []
    for start in range(0, len(targets), _HEAD_CHUNK):
        x, y = hidden[start : start + _HEAD_CHUNK], targets[start : start + _HEAD_CHUNK]
        missing = _HEAD_CHUNK - len(y)
        scores = _score(model, stop_ids, np.pad(x, ((0, missing), (0, 0))), np.pad(y, (0, missing)))
        found.append(np.asarray(scores)[:, : len(y)])
    return np.concatenate(found, axis=1)
