"""Continuous batching of independent writers: generators that ask for continuations and share an engine's rows."""

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TypeVar

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request, Row
from duplex_jax.decode.sampling import Sampling

T = TypeVar("T")
# A shared prefix of at least this many tokens is encoded once and copied into the rows that begin with it.
_SHARED = 24


@dataclasses.dataclass(frozen=True)
class Draw:
    """A continuation that a writer asks for.

    Attributes:
        prompt: all ids before it.
        max_tokens: most tokens of the continuation.
        sampling: sampling settings.
        shared: length of the prompt's prefix that other writers share.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A continuation: its ids without the stop token, and whether it ended with one."""

    ids: list[int]
    ended: bool


Writer = Generator[Draw, Drawn, T]


class _Desk:
    """A writer's state: its row, and the part received of the pending continuation."""

    def __init__(self, writer: Writer, seed: int, draw: Draw):
        self.writer, self.seed, self.draw = writer, seed, draw
        self.row: Row | None = None
        self.ids: list[int] = []
        self.feed: list[int] = []

    def begin(self, engine: Engine, roots: dict[tuple[int, ...], Row]) -> None:
        """Prepares the row for the draw: keeps the prefix of the prompt that it already holds, and feeds the rest."""
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
        # The last id is always fed, because the first sampled token needs its logits.
        held = min(held, len(prompt) - 1)
        engine.truncate(self.row, held)
        self.ids, self.feed = [], prompt[held:]

    def room(self, engine: Engine) -> int:
        """Most tokens that the continuation may take in this engine."""
        return min(self.draw.max_tokens, engine.capacity - len(self.draw.prompt) - engine.max_slice_tokens)


def write(engine: Engine, writers: Iterable[tuple[int, Writer[T]]], rows: int) -> Iterator[tuple[int, T]]:
    """Runs writers, `rows` of them at a time, and yields each one's (number, result) as it returns.

    A writer's output depends only on its number (the seed of its row) and its own prompts, not on the other writers.

    Args:
        engine: the engine; it needs a few more rows than `rows` for shared prefixes.
        writers: numbers, and generators that yield a `Draw` and are sent a `Drawn`. A prompt that leaves no room for a
            continuation gets an empty one.
        rows: most writers at once.
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
                except StopIteration as stop:  # it asked for no continuation
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
