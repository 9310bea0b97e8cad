"""What a session says where others give the words: the duplex model decides when to speak, a mind what is said.

Each slice of the duplex model is a decision. Where it begins to speak the mind is asked with the conversation so far;
its words replace the model's, a slice of at most ten tokens at a time:

    user       what is the | capital of France |            |              | mm-hm    | no, of Spain |
    model      -           | The               | city       | -            | of       | -            | Madrid
    said       -           | (asking)          | The capital | of France is | Paris, a | -            | (asks anew)

A silent decision beside or right behind the user's words ends the answer; with a silent user the mind's words go on.
Commentary, words that an application gives, is said in the next slice that is free and ends in the same way.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from duplex_jax.decode.session import DuplexSession, Slice
from duplex_jax.errors import UserError
from duplex_jax.serve.calls import CALL_OFF, Call, Calls
from duplex_jax.serve.events import Called, CalledOff, Delegated, Event
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.mind import MOST_ANSWERED, Answer, Mind, messages_of
from duplex_jax.slicing import MAX_SLICE_TOKENS
from duplex_jax.timeline import SlicePair, whole_characters


@dataclasses.dataclass(frozen=True)
class Delegation:
    """Who answers for the duplex model.

    Attributes:
        told: the client is told of each answer that begins (`events.Delegated`).
        awaited: the client gives the answers, as commentary; the duplex model's own words are not said.
        filler_after: seconds without an answer after which the duplex model says a slice of its own; None for silence.
        brief: instructions for the mind, in front of the session's.
        max_tokens: of an answer of the mind.
        tools: functions that the mind may call, as chat completions have them.
        tool_choice: which of them it must call, in the same way.
    """

    told: bool = False
    awaited: bool = False
    filler_after: float | None = None
    brief: str | None = None
    max_tokens: int | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None


class Talk:
    """One duplex session's answers.

    Args:
        mind: who is asked; with None the duplex model's words stand.
        hub: steps the session.
        slice_seconds: k; a slice waits for the mind's words for half of it at most.
        system: the system prompt.
        emit: is told of delegations and of what goes wrong.
    """

    def __init__(
        self, mind: Mind | None, hub: Hub, slice_seconds: float, system: str | None, emit: Callable[[Event], None]
    ):
        self.mind, self.system = mind, system
        self.delegation = Delegation(filler_after=mind.filler_after if mind is not None else None)
        """Who answers; may be changed between slices."""
        self.urges = False
        """Whether the duplex model is to speak in the next slice, on its own."""
        self.asks = 0
        """How often the mind or the client was asked."""
        self._hub, self._patience, self._emit = hub, slice_seconds / 2, emit
        self._answer: Answer | None = None
        self._commentary: collections.deque[str] = collections.deque()
        self._filler_due: float | None = None  # when the duplex model is to say something until the client answers
        self._calls = Calls()
        self._resulted = False  # results came that no answer is about
        self._asked_anew = True  # the model has been silent, or the user has spoken, since the last answer
        self._heard = False  # words of the user that no answer is about
        self._own = False  # the duplex model answers in the mind's place

    @property
    def active(self) -> bool:
        """Whether words are awaited or being said that are not the duplex model's."""
        return self._answer is not None or bool(self._commentary) or self._resulted

    def stop(self) -> None:
        """Ends the answer within the slice; its unsaid words are gone."""
        answer, self._answer, self.urges = self._answer, None, False
        if answer is not None:
            answer.stop()

    def comment(self, text: str) -> None:
        """Words for the next slices in which nobody speaks, behind those that wait already.

        Raises:
            UserError: no words, half a character, or too many words wait already.
        """
        if not (text.strip() and whole_characters(text)):
            raise UserError("commentary must be whole characters and not blank")
        waiting = sum(map(len, self._commentary))
        if waiting + len(text) > MOST_ANSWERED:
            raise UserError(f"{waiting} characters of commentary wait already and {len(text)} come; "
                            f"at most {MOST_ANSWERED} may")  # fmt: skip
        self._commentary.append(text)
        self._filler_due = None

    def result(self, id: str, output: str) -> None:
        """What came of a function call; the mind is asked again once no other one runs.

        Raises:
            UserError: see `Calls.result`.
        """
        self._calls.result(id, output)
        self._resulted, self._filler_due = not self._calls.running, None

    def call_off(self, keep: Sequence[Call] = ()) -> None:
        """Ends the function calls that run, except some."""
        for call in self._calls.call_off(keep):
            self._emit(CalledOff(call))

    def _called(self, call: Call, index: int) -> None:
        """The mind calls a function, in the answer that is under way."""
        self._calls.begin(call, index)
        answer = self._answer
        made = [] if answer is None else answer.made
        made.append(call)
        worded = answer is not None and answer.worded
        if call.name == CALL_OFF:
            self.call_off(keep=made)
            self._resulted = not (self._calls.running or worded)
            return
        self._resulted = False
        self._emit(Called(call))
        if self.delegation.filler_after is not None and not worded:
            self._filler_due = time.monotonic() + self.delegation.filler_after

    def instruct(self, system: str | None) -> None:
        """Replaces the system prompt; a client that does so is at work, and needs no filler."""
        self.system, self._filler_due = system, None

    async def take(self, session: DuplexSession, user: str | None, result: Slice, urged: bool) -> Slice:
        """What a slice says, given the duplex model's slice, which is the newest of the session."""
        if self.mind is None and not (self.active or self.delegation.told):
            return result
        self.urges = False
        speaks, answer = result.text is not None, self._answer
        self._heard = self._heard or user is not None
        if answer is not None and user is not None:
            answer.met = result.index
        if answer is not None and user is not None and not answer.said:
            self.stop()  # the user goes on before its first word: what was asked is out of date
            answer, self._asked_anew = None, True
        elif answer is not None and not speaks and answer.met >= result.index - 1:
            self.stop()
            self._asked_anew = True
            return result
        if answer is None:
            return await self._begin(session, user, result, urged)
        return await self._go_on(session, answer, result)

    async def _begin(self, session: DuplexSession, user: str | None, result: Slice, urged: bool) -> Slice:
        """A slice in which no answer is under way: one may begin, and the model's own words may stand."""
        if self._filler_due is not None and user is None and time.monotonic() >= self._filler_due:
            self.urges = result.text is None
            self._filler_due = self._filler_due if self.urges else None
            return result
        if self._resulted and self.mind is not None and user is None:
            return await self._go_on(session, self._ask(self.mind, session, user, result.index), result)
        told, own = self.delegation.told, self.mind is None and not self.delegation.awaited
        if result.text is None:
            self._asked_anew, self._own = True, False
        elif self._own:
            return result
        elif (self._asked_anew or urged or (user is not None and not own)) and (self._heard or urged):
            self._asked_anew = self._heard = False
            if told:
                self._emit(Delegated(result.index))
            if self.delegation.awaited:
                self.asks += 1
                after = self.delegation.filler_after
                self._filler_due = None if after is None else time.monotonic() + after
            elif self.mind is not None:
                return await self._go_on(session, self._ask(self.mind, session, user, result.index), result)
        if own and result.text is not None:
            return result
        silent = len(session.timeline) < 2 or session.timeline[-2].assistant is None
        if self._commentary and user is None and silent:  # a free slice, and no answer ended right before it
            self._answer = answer = Answer.of(self._commentary.popleft(), result.index)
            return await self._go_on(session, answer, result)
        return await self._say(session, result, [])

    def _ask(self, mind: Mind, session: DuplexSession, user: str | None, index: int) -> Answer:
        past, asked = [*session.timeline[:-1], SlicePair(user, None)], self.delegation
        system = "\n\n".join(filter(None, (asked.brief, self.system)))
        options: dict[str, Any] = {} if asked.max_tokens is None else {"max_tokens": asked.max_tokens}
        if asked.tools:
            options["tools"] = self._calls.tools(asked.tools)
            # What must be called is called once: its result is to be spoken of.
            if asked.tool_choice is not None and not self._resulted:
                options["tool_choice"] = asked.tool_choice
        messages = messages_of(past, system or None, self._calls, session.first)
        self._resulted = False
        self.asks += 1
        self._answer = answer = mind.ask(messages, index, lambda call: self._called(call, index), **options)
        return answer

    async def _go_on(self, session: DuplexSession, answer: Answer, result: Slice) -> Slice:
        """The next slice of an answer: its words, a filler, or silence; the model's own where the mind failed."""
        most = min(MAX_SLICE_TOKENS, session.engine.max_slice_tokens)
        ids = await answer.take(session.template.tokenizer, most, self._patience)
        if ids:
            self._calls.move(answer.made, result.index)
        if answer.done and self._answer is answer:
            self._answer, self._own = None, answer.fault is not None
            if answer.fault is not None:
                self._emit(answer.fault.trouble())
                self.urges = not answer.said and result.text is None
        if ids or (self._answer is None and not self._own):
            return await self._say(session, result, ids)
        late = time.monotonic() - answer.since
        due = self.delegation.filler_after is not None and late >= self.delegation.filler_after
        if self._answer is not None and not answer.said and not answer.filled and due:
            answer.filled, self.urges = result.text is not None, result.text is None
            return result
        return result if self._own else await self._say(session, result, [])

    async def _say(self, session: DuplexSession, result: Slice, ids: list[int]) -> Slice:
        """Says `ids` in place of what the model sampled."""
        if result.text is None and not ids:
            return result
        await self._hub.call(session.instead, ids)
        return dataclasses.replace(result, ids=ids, text=session.timeline[-1].assistant, context=len(session.ids))
