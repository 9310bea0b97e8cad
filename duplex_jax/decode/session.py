"""Sessions: a live duplex conversation over one row of an engine."""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request, Row, Shadow
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.snapshot import Pair, Snapshot, text_of
from duplex_jax.errors import UserError
from duplex_jax.slicing import slice_ids, user_slices
from duplex_jax.timeline import SlicePair


@dataclasses.dataclass(frozen=True)
class Slice:
    """One answer of a session.

    Attributes:
        index: which interval of the session it belongs to, from 0.
        text: the assistant's words, with their leading space; None is silence.
        ids: the sampled ids, stop token included.
        seconds: how long the step took.
        context: tokens that the session holds after it.
    """

    index: int
    text: str | None
    ids: list[int]
    seconds: float
    context: int


class DuplexSession:
    """A conversation in time slices: each step takes the user's slice and gives the assistant's.

    Args:
        engine: where it takes a row.
        system: a system prompt, which stays when old pairs are dropped.
        seed: of its random draws.
        sampling: how it draws.
        keep_idle: of a run of pairs in which nobody speaks, how many the context keeps; the rest is forgotten at no
            cost. None keeps all.
        dormant: an idle user slice is answered with idle without asking the model, as the paper's server does.

    Raises:
        EngineFull: no row is free.
        UserError: the system prompt takes more than a quarter of the capacity.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        keep_idle: int | None = 1,
        dormant: bool = False,
    ):
        self.engine, self.template = engine, engine.template
        self.keep_idle, self.dormant = keep_idle, dormant
        start = engine.template.start(system)
        self._row = engine.open(start, sampling, seed)
        self._prefix = len(start)
        self._pairs: list[Pair] = []
        self._oldest = 0  # slices before this one were dropped from the context
        self._carry = b""  # the beginning of a character whose rest is still to come
        self.first = 0
        """Index of the first slice in `timeline`: not 0 where a snapshot came without its past."""
        self.timeline: list[SlicePair] = []
        """Every slice pair since then, forgotten and dropped ones too."""

    @property
    def ids(self) -> list[int]:
        """The ids of the context: what a fresh forward pass would see."""
        return list(self._row.ids)

    @property
    def slices(self) -> int:
        """How many slices the session has had."""
        return self.first + len(self.timeline)

    @property
    def dropped(self) -> int:
        """How many of the oldest slices were dropped from the context for want of room."""
        return self._oldest

    @property
    def sampling(self) -> Sampling:
        """How the session draws; may be changed between steps."""
        return self._row.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._row.sampling = sampling

    def step(self, user: str | None) -> Slice:
        """Takes the user's slice of one interval (None: silence) and gives the assistant's.

        Raises:
            UserError: the slice is empty, or does not fit the cache.
        """
        return step_sessions({self: user})[self]

    def fits(self, user: str) -> bool:
        """Whether the cache has room for the user's slice; a longer one is refused."""
        return len(self.template.user_part(user)) <= self._longest_part

    def say(self, user: str | None, words: Sequence[int]) -> None:
        """Books an interval in which the assistant says `words`, token ids, or nothing; the model is not asked.

        Raises:
            UserError: the user's slice is empty, or does not fit the cache.
        """
        part, said = self._part(user), list(words) or [self.template.idle_id]
        self.engine.append(self._row, [*part, *said])
        self._take(user, part, said)
        self._make_room(len(part) + len(said))

    def instead(self, words: Sequence[int]) -> None:
        """Says `words`, or nothing, in the newest slice in place of what was said in it.

        Raises:
            UserError: there is no slice.
        """
        self._check(self.slices - 1)
        user = self.timeline[-1].user
        if self._pairs and self._pairs[-1].index == self.slices - 1:
            self.engine.truncate(self._row, self._pairs.pop().start)
        del self.timeline[-1]
        self._oldest = min(self._oldest, self.slices)
        self._carry = self._left_over()
        self.say(user, words)

    def prefill(self, turns: Iterable[tuple[str, str]]) -> None:
        """Puts past turns into the context as slice pairs, as training data writes them; the model is not asked.

        A user's turn is cut into slices to which the assistant is silent. An assistant's turn begins beside the last
        slice of the user's turn before it, goes on while the user is silent, and ends with a silent pair.

        Args:
            turns: (role, text), the oldest first; the role is `user` or `assistant`, in any order.

        Raises:
            UserError: a user's slice does not fit the cache; nothing was changed.
        """
        pairs: list[tuple[str | None, Sequence[int]]] = []
        for role, text in turns:
            if role == "user":
                pairs += [(part, ()) for part in user_slices(text)]
                continue
            for ids in slice_ids(self.template.tokenizer.encode(text), self.template.tokenizer, self._longest_slice):
                user = pairs.pop()[0] if pairs and pairs[-1][0] is not None and not pairs[-1][1] else None
                pairs.append((user, ids))
            pairs.append((None, ()))
        sizes = [len(self.check_fits(user)) + len(said) + self._answer_room for user, said in pairs]
        # Pairs that others behind them would push out at once are in the timeline alone.
        behind = itertools.accumulate(reversed(sizes))
        stay = sum(1 for _ in itertools.takewhile(lambda n: n <= self._longest_part, behind))
        gone, pairs = pairs[: len(pairs) - stay], pairs[len(pairs) - stay :]
        if gone:
            decode = self.template.assistant_text
            self.timeline += [SlicePair(user, decode(said)) for user, said in gone]
            self.engine.drop_shadow(self._row)
            self.engine.truncate(self._row, self._prefix)
            self._pairs, self._oldest, self._carry = [], self.slices, b""
        for user, said in pairs:
            self.say(user, said)

    def instruct(self, system: str | None) -> None:
        """Replaces the system prompt; the conversation behind it is encoded again with the next step.

        Raises:
            UserError: the prompt takes more than a quarter of the capacity.
        """
        start = self.template.start(system)
        self.engine.check_beginning(start)
        rest, shift = self._row.ids[self._prefix :], len(start) - self._prefix
        old = self._row.ids[: self._prefix]
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, old, strict=False)))
        self.engine.drop_shadow(self._row)
        self.engine.truncate(self._row, same, [*start[same:], *rest])
        self._prefix = len(start)
        for pair in self._pairs:
            pair.start += shift
            pair.decision += shift
        self._drop_now(self._answer_room)

    def encode_ahead(self) -> Iterator[int]:
        """Encodes what waits for the next step, a chunk each time; yields how many tokens still wait."""
        row = self._row
        while (waiting := len(row.ids) - row.cached) > self.engine.chunk:
            self.engine.encode(row, self.engine.chunk)
            yield waiting

    def logits(self) -> np.ndarray:
        """float32 `[V]`: the logits behind the context as it stands."""
        return self.engine.logits(self._row)

    def cancel(self, tokens: int = 0) -> None:
        """Cuts the newest assistant slice after its first `tokens` tokens; with 0 it becomes idle."""
        if self.slices:
            self._cut(self.slices - 1, tokens)

    def heard(self, index: int, characters: int) -> None:
        """Takes unheard words out: slice `index` was heard up to `characters`, later slices not at all.

        The user's slices stay; what follows a cut is encoded again with the next step.

        Raises:
            UserError: no such slice.
        """
        self._check(index)
        pair = next((p for p in self._pairs if p.index == index), None)
        words = self._words(pair.said) if pair else []
        lengths = [len(self._text(pair.carry, words[:n])[0]) if pair else 0 for n in range(len(words) + 1)]
        heard = max((length for length in lengths if length <= characters), default=0)
        # Where something is cut, no first half of the next character stays.
        self._cut(index, lengths.index(heard) if heard < lengths[-1] else len(words))

    def rewind(self, index: int) -> None:
        """Forgets slice `index` and all after it, on both sides.

        Raises:
            UserError: no such slice, or its pair was dropped from the context.
        """
        self._check(index)
        if index < self._oldest:
            raise UserError(f"slice {index} was dropped from the context; the oldest there is {self._oldest}")
        while self._pairs and self._pairs[-1].index >= index:
            pair = self._pairs.pop()
            self.engine.truncate(self._row, pair.start)
        del self.timeline[index - self.first :]
        self._carry = self._left_over()

    def fork(self, seed: int | None = None) -> "DuplexSession":
        """A second session with the same past.

        Raises:
            EngineFull: no row is free.
        """
        return self._with_row(self.engine, self.engine.fork(self._row, seed), self.snapshot(entries=False))

    def snapshot(self, entries: bool = True) -> Snapshot:
        """The session on the host; without `entries` it is small, and its context is encoded again on restoring."""
        row, past = self._row, self.timeline[: self._oldest - self.first]
        return Snapshot(self._state(), self.engine.read(row) if entries and row.cached else None, past)

    @classmethod
    def restore(cls, engine: Engine, snapshot: Snapshot) -> "DuplexSession":
        """The session of a snapshot in a row of `engine`, which must run the same model.

        Raises:
            EngineFull: no row is free.
            UserError: the snapshot is of another model or template, or does not fit.
        """
        state = snapshot.state
        try:
            if state["template"] != engine.template.name:
                raise UserError(f"the snapshot is of template {state['template']!r}; "
                                f"this engine runs {engine.template.name!r}")  # fmt: skip
            if state["model"] != _shape(engine):
                raise UserError(f"the snapshot is of a model of shape {state['model']} (layers, heads of keys, their "
                                f"width, vocabulary); this engine's is {_shape(engine)}")  # fmt: skip
            snapshot.check(engine.config.vocab_size)
            # The row begins with what stays for good, so that the same limit holds for it.
            start, sampling = state["ids"][: state["prefix"]], Sampling(**state["sampling"])
            with engine.opening(start, sampling, state["seed"]) as row:
                engine.write(row, state["ids"], snapshot.entries)
                row.steps = state["steps"]
                row.shadow = state["shadow"] and Shadow(None, *state["shadow"])
                return cls._with_row(engine, row, snapshot)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"the snapshot lacks or misspells a field ({e})") from e

    def close(self) -> None:
        """Gives the row back."""
        self.engine.close(self._row)

    @classmethod
    def _with_row(cls, engine: Engine, row: Row, snapshot: Snapshot) -> "DuplexSession":
        state, new = snapshot.state, cls.__new__(cls)
        new.engine, new.template, new._row = engine, engine.template, row
        new.keep_idle, new.dormant, new._prefix = state["keep_idle"], state["dormant"], state["prefix"]
        new._pairs, new._oldest, new._carry = snapshot.pairs(), state["oldest"], bytes.fromhex(state["carry"])
        new.timeline = snapshot.timeline(engine.template)
        new.first = new._oldest - len(snapshot.past)
        return new

    def _state(self) -> dict[str, Any]:
        return {
            "template": self.template.name,
            "model": _shape(self.engine),
            "ids": list(self._row.ids),
            "prefix": self._prefix,
            "pairs": [[p.index, p.start, p.decision, p.user, len(p.said), p.carry.hex()] for p in self._pairs],
            "oldest": self._oldest,
            "slices": self.slices,
            "carry": self._carry.hex(),
            "sampling": dataclasses.asdict(self._row.sampling),
            "seed": self._row.seed,
            "steps": self._row.steps,
            "shadow": self._row.shadow and list(dataclasses.astuple(self._row.shadow))[1:],
            "keep_idle": self.keep_idle,
            "dormant": self.dormant,
        }

    def _check(self, index: int) -> None:
        if not 0 <= index < self.slices:
            raise UserError(f"slice {index} is not in 0..{self.slices - 1}")

    def _words(self, said: Sequence[int]) -> list[int]:
        return [i for i in said if i not in self.template.stop_ids]

    # What a step does to the context.

    def _part(self, user: str | None) -> list[int]:
        """The ids of a user slice; makes room for them where that was not done ahead."""
        if user == "":
            raise UserError(f"the user's slice {self.slices} is empty; silence is None (in a file, <idle>)")
        part = self.check_fits(user)
        self._drop_now(len(part) + self._answer_room)
        return part

    def check_fits(self, user: str | None) -> list[int]:
        """The ids of a user slice.

        Raises:
            UserError: it is longer than the cache has room for at once.
        """
        part = self.template.user_part(user)
        if len(part) > self._longest_part:
            raise UserError(
                f"the user's slice {self.slices} takes {len(part)} tokens; a context of {self.engine.capacity} "
                f"has room for {self._longest_part} at once; cut it into slices"
            )
        return part

    @property
    def _longest_slice(self) -> int:
        """Tokens of an assistant's slice that is given to the session."""
        return max(4, self.engine.max_slice_tokens)

    @property
    def _longest_part(self) -> int:
        return self.engine.capacity // 2 - self._prefix

    @property
    def _answer_room(self) -> int:
        return self.engine.max_slice_tokens + len(self.template.closing([]))

    def _take(self, user: str | None, part: Sequence[int], said: list[int]) -> str | None:
        """Books what a step appended, `part` and then `said`; the assistant's words, or None."""
        start = len(self._row.ids) - len(said) - len(part)
        pair = Pair(self.slices, start, start + len(part), user, said, self._carry)
        words, self._carry = self._text(pair.carry, self._words(said))
        self.timeline.append(SlicePair(user, words or None))
        self._book(pair)
        return words or None

    def _text(self, carry: bytes, words: Sequence[int]) -> tuple[str, bytes]:
        return text_of(self.template, carry, words)

    def _left_over(self) -> bytes:
        """What the newest slice leaves of a character."""
        pair = self._pairs[-1] if self._pairs else None
        if pair is None or pair.index + 1 != self.slices:
            return b""
        return self._text(pair.carry, self._words(pair.said))[1]

    def _book(self, pair: Pair) -> None:
        """Closes the pair at the end of the context, and forgets it if it is one silence too many."""
        self.engine.append(self._row, self.template.closing(pair.said))
        self._pairs.append(pair)
        run = itertools.takewhile(lambda p: p.user is None and not self._words(p.said), reversed(self._pairs))
        if self.keep_idle is not None and sum(1 for _ in run) > self.keep_idle:
            self._pairs.pop()
            self.engine.truncate(self._row, pair.start)

    def _cut(self, index: int, tokens: int) -> None:
        """Cuts slice `index` after `tokens` tokens and silences the assistant in all later ones."""

        def kept(pair: Pair) -> list[int]:
            return self._words(pair.said)[: tokens if pair.index == index else 0]

        later = [p for p in self._pairs if p.index >= index]
        changed = [p for p in later if kept(p) != self._words(p.said)]
        if not changed:
            return
        for pair in changed:
            text = self._text(pair.carry, kept(pair))[0] or None
            self.timeline[pair.index - self.first] = SlicePair(pair.user, text)
        first = self._pairs.index(changed[0])
        pair, *rest = self._pairs[first:]
        del self._pairs[first:]
        words = kept(pair)
        self.engine.truncate(self._row, pair.decision + len(words), [] if words else [self.template.idle_id])
        self._book(dataclasses.replace(pair, said=words or [self.template.idle_id]))
        for pair in rest:
            said = [self.template.idle_id] if self._words(pair.said) else pair.said
            part = self.template.user_part(pair.user)
            start = len(self._row.ids)
            self.engine.append(self._row, [*part, *said])
            self._book(Pair(pair.index, start, start + len(part), pair.user, said, b""))
        self._carry = self._left_over()

    # How a session goes on without end: whole old pairs are dropped before the cache is full.

    def _make_room(self, added: int) -> None:
        """Works ahead towards dropping old pairs: `added` tokens came with this step."""
        row, engine = self._row, self.engine
        if row.shadow is None:
            base = self._first_kept()
            kept = self._prefix + len(row.ids) - base
            # While the shadow catches up the context grows by no more than what is kept: twice as many tokens are
            # encoded as come in.
            if base == self._prefix or len(row.ids) + kept < engine.capacity - 2 * (engine.chunk + self._answer_room):
                return
            engine.begin_shadow(row, self._prefix, base)
        assert row.shadow is not None
        base = row.shadow.base
        if engine.advance_shadow(row, 2 * added):
            self._dropped(base)

    def _drop_now(self, needed: int) -> None:
        """Drops old pairs at once where `needed` tokens do not fit: this slice pays, because it is too long for what
        was done ahead."""
        row, room = self._row, self.engine.capacity - needed
        if len(row.ids) > room and row.shadow is not None:
            base = row.shadow.base
            if self.engine.advance_shadow(row, len(row.ids)):
                self._dropped(base)
        if len(row.ids) > room:
            base = self._first_kept(room - self._prefix)
            self.engine.truncate(row, self._prefix, row.ids[base:])
            self._dropped(base)

    def _first_kept(self, room: int | None = None) -> int:
        """Where the oldest pair that stays begins: the newest pairs that take a quarter of the capacity stay, at
        least the newest one, and none that `room` is too small for."""
        n = len(self._row.ids)
        keep = (self.engine.capacity - self._prefix) // 4
        if self._pairs:
            keep = max(keep, n - self._pairs[-1].start)
        keep = keep if room is None else min(keep, room)
        return next((p.start for p in self._pairs if n - p.start <= keep), n)

    def _dropped(self, base: int) -> None:
        """Books that `ids[prefix:base]` are gone."""
        shift = base - self._prefix
        self._pairs = [p for p in self._pairs if p.start >= base]
        for pair in self._pairs:
            pair.start -= shift
            pair.decision -= shift
        self._oldest = self._pairs[0].index if self._pairs else self.slices


def _shape(engine: Engine) -> list[int]:
    """What two engines must share so that one can take up the other's snapshots."""
    c = engine.config
    return [c.num_layers, c.num_kv_heads, c.head_dim, c.vocab_size]


def step_sessions(slices: Mapping[DuplexSession, str | None]) -> dict[DuplexSession, Slice]:
    """One interval of several sessions of one engine in one batch; see `DuplexSession.step`."""
    began = time.perf_counter()
    asked = {s: s._part(user) for s, user in slices.items() if not (s.dormant and user is None)}
    texts: dict[DuplexSession, tuple[str | None, list[int]]] = {}
    if asked:
        engine = next(iter(asked)).engine
        answers = engine.advance({s._row: Request(part) for s, part in asked.items()})
        for session, part in asked.items():
            said = answers[session._row]
            texts[session] = session._take(slices[session], part, said), said
            session._make_room(len(part) + len(said))
    for session in slices.keys() - asked.keys():
        session.timeline.append(SlicePair(None, None))
        texts[session] = None, []
    seconds = time.perf_counter() - began
    return {s: Slice(s.slices - 1, text, said, seconds, len(s._row.ids)) for s, (text, said) in texts.items()}
