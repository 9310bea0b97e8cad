"""Replays the user's side of timelines on a virtual clock, many at once and faster than real time."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession, Slice, step_sessions
from duplex_jax.decode.turns import open_turns
from duplex_jax.timeline import SlicePair, Timeline
from duplex_jax.tokenizer import decode


@dataclasses.dataclass(frozen=True)
class Replay:
    """How conversations are replayed.

    Attributes:
        sampling: sampling settings.
        seed: seed of the first conversation; each further one adds 1.
        system: a system prompt.
        keep_idle: see `DuplexSession`.
        dormant: see `DuplexSession`.
        max_tokens: most tokens of a turn-based answer.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    system: str | None = None
    keep_idle: int | None = 1
    dormant: bool = False
    max_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One replayed interval: the conversation's number, the user's slice and the model's."""

    conversation: int
    user: str | None
    slice: Slice


def replay(
    engine: Engine, timelines: Iterable[Timeline], options: Replay, seeds: Sequence[int] | None = None
) -> Iterator[Replayed | tuple[int, Timeline]]:
    """Feeds the user's slices of each timeline to its own session, as many at once as the engine has rows.

    Args:
        engine: the engine whose rows are used.
        timelines: conversations; only their user sides are used.
        options: how to replay them.
        seeds: one seed per conversation, instead of `options.seed` and the numbers that follow it.

    Yields:
        Each interval as it is done, and at the end of a conversation `(its number, the resulting timeline)`, whose
        `meta` holds the seconds of each slice. A conversation's result does not depend on what runs beside it.
    """
    waiting = enumerate(timelines)
    live: dict[int, tuple[Timeline, DuplexSession, list[float]]] = {}
    try:
        while True:
            for number, timeline in itertools.islice(waiting, engine.cache.rows - len(live)):
                seed = options.seed + number if seeds is None else seeds[number]
                live[number] = (timeline, _open(engine, options, seed), [])
            if not live:
                return
            users = {n: t.pairs[len(s.timeline)].user for n, (t, s, _) in live.items()}
            slices = step_sessions({live[n][1]: user for n, user in users.items()})
            for number, (timeline, session, seconds) in list(live.items()):
                result = slices[session]
                seconds.append(round(result.seconds, 4))
                yield Replayed(number, users[number], result)
                if len(session.timeline) == len(timeline.pairs):
                    session.close()
                    del live[number]
                    yield number, _result(timeline, session.timeline, {"seconds": seconds})
    finally:
        for _, session, _ in live.values():
            session.close()


def _open(engine: Engine, options: Replay, seed: int) -> DuplexSession:
    return DuplexSession(
        engine,
        system=options.system,
        seed=seed,
        sampling=options.sampling,
        keep_idle=options.keep_idle,
        dormant=options.dormant,
    )


def _result(timeline: Timeline, pairs: list[SlicePair], meta: dict[str, object]) -> Timeline:
    return dataclasses.replace(timeline, pairs=pairs, events=[], meta=timeline.meta | meta)


def replay_turns(engine: Engine, timelines: Iterable[Timeline], options: Replay) -> Iterator[tuple[int, Timeline]]:
    """Runs the turn-based baseline on the same timelines: a pause ends a query, and its answer comes whole.

    The baseline does not listen while it answers. The answer is placed in the pair that carries the query's last words.
    The oldest rounds are dropped before the context is full.

    Raises:
        UserError: a query does not fit the context.
    """
    for number, timeline in enumerate(timelines):
        session = open_turns(engine, system=options.system, seed=options.seed + number, sampling=options.sampling)
        pairs: list[SlicePair] = []
        query: list[str] = []
        try:
            for i, (user, _) in enumerate(timeline.pairs):
                answer = None
                if user is not None:
                    query.append(user)
                    ends = i + 1 == len(timeline.pairs) or timeline.pairs[i + 1].user is None
                    if ends:
                        asked = " ".join(query)
                        limit = session.make_room(asked, options.max_tokens)
                        ids = [t for part in session.reply(asked, limit) for t in part]
                        answer = decode(engine.template.tokenizer, ids) or None
                        query.clear()
                pairs.append(SlicePair(user, answer))
        finally:
            session.close()
        yield number, _result(timeline, pairs, {})
