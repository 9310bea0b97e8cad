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
    """The assistant's slice of one interval.

    Attributes:
        index: the interval's number in the session, from 0.
        text: the assistant's words with their leading space; None is silence.
        ids: the sampled ids, stop token included.
        seconds: how long the step took.
        context: tokens in the session's context after it.
    """

    index: int
    text: str | None
    ids: list[int]
    seconds: float
    context: int


class DuplexSession:
    """A conversation in time slices: each step takes the user's slice and returns the assistant's.

    Args:
        engine: the engine in which it opens a row.
        system: a system prompt, kept when old pairs are dropped.
        seed: random seed.
        sampling: sampling settings.
        keep_idle: how many pairs of a run of mutual silence stay in the context; the rest are forgotten at no cost.
            None keeps all.
        dormant: answer an idle user slice with idle without running the model, as the paper's server does.

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
        self._oldest = 0  # index of the first slice that was not dropped from the context
        self._carry = b""  # leading bytes of an incomplete character
        self.first = 0
        """Index of the first slice in `timeline`; above 0 if restored from a snapshot without its past."""
        self.timeline: list[SlicePair] = []
        """All slice pairs since then, including forgotten and dropped ones."""

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
        """How many of the oldest slices were dropped from the context to make room."""
        return self._oldest

    @property
    def sampling(self) -> Sampling:
        """Sampling settings; may be changed between steps."""
        return self._row.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._row.sampling = sampling

    def step(self, user: str | None) -> Slice:
        """Takes the user's slice of one interval (None: silence) and returns the assistant's.

        Raises:
            UserError: the slice is empty or does not fit the cache.
        """
        return step_sessions({self: user})[self]

    def fits(self, user: str) -> bool:
        """Whether the cache has room for the user's slice; `step` refuses one that does not fit."""
        return len(self.template.user_part(user)) <= self._longest_part

    def say(self, user: str | None, words: Sequence[int]) -> None:
        """Adds an interval in which the assistant says the ids `words`, or nothing, without running the model.

        Raises:
            UserError: the user's slice is empty or does not fit the cache.
        """
        part, said = self._user_part(user), list(words) or [self.template.idle_id]
        self.engine.append(self._row, [*part, *said])
        self._record_step(user, part, said)
        self._make_room(len(part) + len(said))

    def instead(self, words: Sequence[int]) -> None:
        """Replaces the assistant's words in the newest slice by the ids `words`, or by silence.

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
        """Adds past turns to the context as slice pairs, in the form of the training data, without running the model.

        A user turn is cut into slices that the assistant answers with silence. An assistant turn begins in the same
        pair as the last slice of the preceding user turn, continues while the user is silent, and ends with a silent
        pair.

        Args:
            turns: (role, text), oldest first; the role is `user` or `assistant`, in any order.

        Raises:
            UserError: a user slice does not fit the cache; nothing has changed.
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
        # Pairs that later ones would push out at once go into the timeline only.
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
        """Replaces the system prompt; the conversation after it is encoded again in the next step.

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
        """Encodes the tokens pending for the next step, one chunk per iteration; yields how many are left."""
        row = self._row
        while (waiting := len(row.ids) - row.cached) > self.engine.chunk:
            self.engine.encode(row, self.engine.chunk)
            yield waiting

    def logits(self) -> np.ndarray:
        """Logits after the current context, float32 `[V]`."""
        return self.engine.logits(self._row)

    def cancel(self, tokens: int = 0) -> None:
        """Truncates the newest assistant slice to its first `tokens` tokens; with 0 it becomes idle."""
        if self.slices:
            self._cut(self.slices - 1, tokens)

    def heard(self, index: int, characters: int) -> None:
        """Removes unheard words: slice `index` was heard up to `characters`, later slices not at all.

        The user's slices stay; whatever follows the cut is encoded again in the next step.

        Raises:
            UserError: there is no such slice.
        """
        self._check(index)
        pair = next((p for p in self._pairs if p.index == index), None)
        words = self._words(pair.said) if pair else []
        lengths = [len(self._text(pair.carry, words[:n])[0]) if pair else 0 for n in range(len(words) + 1)]
        heard = max((length for length in lengths if length <= characters), default=0)
        # After a cut, no partial next character may remain.
        self._cut(index, lengths.index(heard) if heard < lengths[-1] else len(words))

    def rewind(self, index: int) -> None:
        """Forgets slice `index` and all later ones, on both sides.

        Raises:
            UserError: there is no such slice, or its pair was dropped from the context.
        """
        self._check(index)
        if index < self._oldest:
            raise UserError(f"slice {index} was dropped from the context; the oldest one left is {self._oldest}")
        while self._pairs and self._pairs[-1].index >= index:
            pair = self._pairs.pop()
            self.engine.truncate(self._row, pair.start)
        del self.timeline[index - self.first :]
        self._carry = self._left_over()

    def fork(self, seed: int | None = None) -> "DuplexSession":
        """Opens a second session with the same past.

        Raises:
            EngineFull: no row is free.
        """
        return self._with_row(self.engine, self.engine.fork(self._row, seed), self.snapshot(entries=False))

    def snapshot(self, entries: bool = True) -> Snapshot:
        """The session's state on the host; without `entries` it is small, and restoring encodes the context again."""
        row, past = self._row, self.timeline[: self._oldest - self.first]
        return Snapshot(self._state(), self.engine.read(row) if entries and row.cached else None, past)

    @classmethod
    def restore(cls, engine: Engine, snapshot: Snapshot) -> "DuplexSession":
        """Restores a snapshot in a row of `engine`, which must run the same model.

        Raises:
            EngineFull: no row is free.
            UserError: the snapshot belongs to another model or template, or does not fit.
        """
        state = snapshot.state
        try:
            if state["template"] != engine.template.name:
                raise UserError(f"the snapshot uses template {state['template']!r}; "
                                f"this engine runs {engine.template.name!r}")  # fmt: skip
            if state["model"] != _shape(engine):
                raise UserError(f"the snapshot was made with a model of shape {state['model']} (layers, KV heads, "
                                f"their width, vocabulary); this engine's model is {_shape(engine)}")  # fmt: skip
            snapshot.check(engine.config.vocab_size)
            # The row begins with the permanent ids, so that the same limit applies to them.
            start, sampling = state["ids"][: state["prefix"]], Sampling(**state["sampling"])
            with engine.opening(start, sampling, state["seed"]) as row:
                engine.write(row, state["ids"], snapshot.entries)
                row.steps = state["steps"]
                row.shadow = state["shadow"] and Shadow(None, *state["shadow"])
                return cls._with_row(engine, row, snapshot)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"a field of the snapshot is missing or misspelt ({e})") from e

    def close(self) -> None:
        """Closes the engine's row."""
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

    # Updating the context in a step.

    def _user_part(self, user: str | None) -> list[int]:
        """The ids of a user slice; drops old pairs if there is no room for them yet."""
        if user == "":
            raise UserError(f"the user's slice {self.slices} is empty; silence is None (in a file, <idle>)")
        part = self.check_fits(user)
        self._drop_now(len(part) + self._answer_room)
        return part

    def check_fits(self, user: str | None) -> list[int]:
        """The ids of a user slice.

        Raises:
            UserError: it needs more room than the cache has at once.
        """
        part = self.template.user_part(user)
        if len(part) > self._longest_part:
            raise UserError(
                f"the user's slice {self.slices} takes {len(part)} tokens; a context of {self.engine.capacity} "
                f"has room for {self._longest_part} at once; split it into slices"
            )
        return part

    @property
    def _longest_slice(self) -> int:
        """Most tokens of an assistant slice that is passed in rather than sampled."""
        return max(4, self.engine.max_slice_tokens)

    @property
    def _longest_part(self) -> int:
        return self.engine.capacity // 2 - self._prefix

    @property
    def _answer_room(self) -> int:
        return self.engine.max_slice_tokens + len(self.template.closing([]))

    def _record_step(self, user: str | None, part: Sequence[int], said: list[int]) -> str | None:
        """Records what a step appended, `part` and then `said`; returns the assistant's words, or None."""
        start = len(self._row.ids) - len(said) - len(part)
        pair = Pair(self.slices, start, start + len(part), user, said, self._carry)
        words, self._carry = self._text(pair.carry, self._words(said))
        self.timeline.append(SlicePair(user, words or None))
        self._close_pair(pair)
        return words or None

    def _text(self, carry: bytes, words: Sequence[int]) -> tuple[str, bytes]:
        return text_of(self.template, carry, words)

    def _left_over(self) -> bytes:
        """The bytes of an incomplete character at the end of the newest slice."""
        pair = self._pairs[-1] if self._pairs else None
        if pair is None or pair.index + 1 != self.slices:
            return b""
        return self._text(pair.carry, self._words(pair.said))[1]

    def _close_pair(self, pair: Pair) -> None:
        """Closes the pair at the end of the context, and forgets it if it exceeds `keep_idle` silent pairs."""
        self.engine.append(self._row, self.template.closing(pair.said))
        self._pairs.append(pair)
        run = itertools.takewhile(lambda p: p.user is None and not self._words(p.said), reversed(self._pairs))
        if self.keep_idle is not None and sum(1 for _ in run) > self.keep_idle:
            self._pairs.pop()
            self.engine.truncate(self._row, pair.start)

    def _cut(self, index: int, tokens: int) -> None:
        """Truncates slice `index` to `tokens` tokens and silences the assistant in all later slices."""

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
        self._close_pair(dataclasses.replace(pair, said=words or [self.template.idle_id]))
        for pair in rest:
            said = [self.template.idle_id] if self._words(pair.said) else pair.said
            part = self.template.user_part(pair.user)
            start = len(self._row.ids)
            self.engine.append(self._row, [*part, *said])
            self._close_pair(Pair(pair.index, start, start + len(part), pair.user, said, b""))
        self._carry = self._left_over()

    # Endless sessions: whole old pairs are dropped before the cache is full.

    def _make_room(self, added: int) -> None:
        """Works ahead towards dropping old pairs; `added` tokens came with this step."""
        row, engine = self._row, self.engine
        if row.shadow is None:
            base = self._first_kept()
            kept = self._prefix + len(row.ids) - base
            # The shadow encodes twice as many tokens as come in, so until it has caught up the context grows by at most
            # as many tokens as are kept.
            if base == self._prefix or len(row.ids) + kept < engine.capacity - 2 * (engine.chunk + self._answer_room):
                return
            engine.begin_shadow(row, self._prefix, base)
        assert row.shadow is not None
        base = row.shadow.base
        if engine.advance_shadow(row, 2 * added):
            self._dropped(base)

    def _drop_now(self, needed: int) -> None:
        """Drops old pairs at once if `needed` tokens do not fit.

        The slice is then too long for what was encoded ahead, and this step takes longer.
        """
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
        """Start of the oldest pair to keep.

        The newest pairs that fit in a quarter of the capacity are kept, at least one, and none that exceeds `room`.
        """
        n = len(self._row.ids)
        keep = (self.engine.capacity - self._prefix) // 4
        if self._pairs:
            keep = max(keep, n - self._pairs[-1].start)
        keep = keep if room is None else min(keep, room)
        return next((p.start for p in self._pairs if n - p.start <= keep), n)

    def _dropped(self, base: int) -> None:
        """Updates the pairs after `ids[prefix:base]` were removed."""
        shift = base - self._prefix
        self._pairs = [p for p in self._pairs if p.start >= base]
        for pair in self._pairs:
            pair.start -= shift
            pair.decision -= shift
        self._oldest = self._pairs[0].index if self._pairs else self.slices


def _shape(engine: Engine) -> list[int]:
    """The model sizes that two engines must share to exchange snapshots."""
    c = engine.config
    return [c.num_layers, c.num_kv_heads, c.head_dim, c.vocab_size]


def step_sessions(slices: Mapping[DuplexSession, str | None]) -> dict[DuplexSession, Slice]:
    """One interval of several sessions of one engine as one batch; see `DuplexSession.step`."""
    began = time.perf_counter()
    asked = {s: s._user_part(user) for s, user in slices.items() if not (s.dormant and user is None)}
    texts: dict[DuplexSession, tuple[str | None, list[int]]] = {}
    if asked:
        engine = next(iter(asked)).engine
        answers = engine.advance({s._row: Request(part) for s, part in asked.items()})
        for session, part in asked.items():
            said = answers[session._row]
            texts[session] = session._record_step(slices[session], part, said), said
            session._make_room(len(part) + len(said))
    for session in slices.keys() - asked.keys():
        session.timeline.append(SlicePair(None, None))
        texts[session] = None, []
    seconds = time.perf_counter() - began
    return {s: Slice(s.slices - 1, text, said, seconds, len(s._row.ids)) for s, (text, said) in texts.items()}
