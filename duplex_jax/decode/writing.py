"""Continuous batching of text that a model writes by itself: many writers, each a generator, share an engine's rows."""

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TypeVar

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request, Row
from duplex_jax.decode.sampling import Sampling

T = TypeVar("T")
# A prefix at least this long is encoded once and copied into the rows that begin with it.
_SHARED = 24


@dataclasses.dataclass(frozen=True)
class Draw:
    """One continuation that a writer asks for.

    Attributes:
        prompt: ids of everything in front of it.
        max_tokens: most tokens of the continuation.
        sampling: how its tokens are drawn.
        shared: how many of the first ids other writers begin with, too.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A continuation: its ids without the stop token, and whether the model ended it itself."""

    ids: list[int]
    ended: bool


Writer = Generator[Draw, Drawn, T]


class _Desk:
    """A writer at work: its row, and what it has been given of the continuation it waits for."""

    def __init__(self, writer: Writer, seed: int, draw: Draw):
        self.writer, self.seed, self.draw = writer, seed, draw
        self.row: Row | None = None
        self.ids: list[int] = []
        self.feed: list[int] = []

    def begin(self, engine: Engine, roots: dict[tuple[int, ...], Row]) -> None:
        """Prepares the row for the draw: what it already holds of the prompt stays, the rest is fed."""
        prompt = list(self.draw.prompt)
        if self.row is None:
            root = tuple(prompt[: self.draw.shared])
            if len(root) >= _SHARED:
                if root not in roots:
                    roots[root] = engine.open(root)
                    engine.encode(roots[root], len(root))
                self.row = engine.fork(roots[root], self.seed)
            else:
                self.row = engine.open((), seed=self.seed)
        self.row.sampling = self.draw.sampling
        held = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(self.row.ids, prompt, strict=False)))
        # The last id is always fed: the first sampled token needs its logits.
        held = min(held, len(prompt) - 1)
        engine.truncate(self.row, held)
        self.ids, self.feed = [], prompt[held:]

    def room(self, engine: Engine) -> int:
        """How many tokens the continuation may take in this engine."""
        return min(self.draw.max_tokens, engine.capacity - len(self.draw.prompt) - engine.max_slice_tokens)


def write(engine: Engine, writers: Iterable[tuple[int, Writer[T]]], rows: int) -> Iterator[tuple[int, T]]:
    """Runs writers, `rows` of them at a time, and yields (number, result) of each as it returns.

    A writer's words depend on its number (the seed of its row) and its own prompts, not on who writes beside it.

    Args:
        engine: where the rows are; it needs a few more than `rows` for prefixes that writers share.
        writers: numbers and generators that yield a `Draw` and are sent what was `Drawn`. A prompt that leaves no
            room for a continuation is answered with an empty one.
        rows: writers at once.
    """
    waiting = iter(writers)
    desks: dict[int, _Desk] = {}
    roots: dict[tuple[int, ...], Row] = {}
    try:
        while True:
            while len(desks) < rows and (arrived := next(waiting, None)):
                number, writer = arrived
                try:
                    desks[number] = _Desk(writer, number, next(writer))
                except StopIteration as stop:  # it needed nothing of the model
                    yield number, stop.value
                    continue
                desks[number].begin(engine, roots)
            if not desks:
                return
            active = {n: d for n, d in desks.items() if d.room(engine) > 0}
            asked = {d.row: Request(d.feed, allow_idle=False) for d in active.values() if d.row is not None}
            answers = engine.advance(asked)
            for number, desk in list(desks.items()):
                assert desk.row is not None
                said = answers.get(desk.row, [])
                desk.feed = []
                ended = bool(said) and said[-1] in engine.template.turn_ends
                desk.ids += said[:-1] if ended else said
                room = desk.room(engine)
                if not ended and len(desk.ids) < room:
                    continue
                drawn = Drawn(desk.ids[: max(0, room)], ended and len(desk.ids) <= room)
                try:
                    desk.draw = desk.writer.send(drawn)
                    desk.begin(engine, roots)
                except StopIteration as stop:
                    engine.close(desk.row)
                    del desks[number]
                    yield number, stop.value
    finally:
        for row in [*(d.row for d in desks.values()), *roots.values()]:
            if row is not None:
                engine.close(row)
