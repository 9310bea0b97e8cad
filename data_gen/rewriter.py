"""The interface through which categories rewrite text, with two implementations: templates and a language model.

A rewriter does no input or output. The one for a language model looks up answers and raises `Pending` if one is
missing; the caller tries again once it has them. Categories therefore stay pure functions.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from data_gen import spoken
from data_gen.topic import topic
from data_gen.transitions import FUSE_PROMPT, Transitions
from duplex_jax.llm.cache import Answer

Rounds = Sequence[tuple[str, str]]


class LeftOut(Exception):
    """A dialogue is unsuitable for a category; the message is the reason, under which it is counted."""


class Interruption(NamedTuple):
    """An answer interrupted by a question: earlier rounds, the query, what was said, and what was left to say.

    `statement` is the finished sentence that the question is about; `rest` starts with the unfinished sentence.
    """

    history: Rounds
    query: str
    said: str
    statement: str
    rest: str


class Rewriter(Protocol):
    """Provides words that no source dialogue has; `transitions` are the sentences that users interrupt with."""

    transitions: Transitions

    def can_announce(self, sentence: str) -> bool:
        """Whether the topic of the user's next words can be inserted into a transition sentence."""
        ...

    def fuse(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """One user input for each (transition sentence, the user's next words)."""
        ...

    def regenerate(self, history: Rounds, query: str, said: str, repetition: str, again: str | None) -> str:
        """The answer to a repeated query, of which `said` was heard before.

        Args:
            history: the earlier rounds.
            query: the original query.
            said: the part of the first answer that was heard.
            repetition: the repeated query.
            again: a second answer from the dialogue, or None.
        """
        ...

    def back_on_topic(self, moment: Interruption, rng: random.Random) -> tuple[str, str, str]:
        """The user's question about a statement, its answer, and the continuation of the interrupted message."""
        ...

    def opening(self, query: str, rng: random.Random) -> str:
        """What the assistant says to break a silence before the user asks `query`."""
        ...


# Back on topic without a model: the listener asks for a repetition, so the message itself contains the answer.
_QUESTIONS = (
    "Wait, what did you say?",
    "Sorry, could you repeat that?",
    "Hold on, what was that?",
    "Hang on, can you say that again?",
    "Sorry, I missed that.",
    "One second, what did you just say?",
)
_QUESTIONS_ABOUT = (
    "Wait, what did you say about {topic}?",
    "Sorry, could you repeat the part about {topic}?",
    "Hold on, what was that about {topic}?",
    "One second, what was your point about {topic}?",
    "Hang on, what did you just say about {topic}?",
    "Quick question, what did you mean about {topic}?",
)
_REPLIES = (
    "What I said was this: {statement}",
    "My point was this: {statement}",
    "Sure. {statement}",
    "Of course. {statement}",
    "I said the following: {statement}",
)
_BRIDGES = (
    "Now, back to where I was.",
    "Going back to what I was saying:",
    "To go on:",
    "Let me continue.",
    "Let me pick up where I left off.",
)
_OPENINGS_ABOUT = (
    "Hello! Is there something you would like to talk about, maybe {topic}?",
    "Hi there! Would you like to talk about {topic}?",
    "Hello, are you there? We could talk about {topic}.",
    "Hello! I am here if you have a question about {topic}.",
)
_OPENINGS = (
    "Hi! What is on your mind today?",
    "Hello! How can I help you today?",
    "Hello! Is there anything I can do for you?",
    "Hi there! What would you like to talk about?",
    "Good to have you here. What can I help you with?",
)


class TemplateRewriter:
    """Rewrites without a model: inserts topics into transition sentences and takes words from the dialogue itself.

    Raises `LeftOut` if a sentence needs a topic and none is found, or if the dialogue does not contain a needed answer.
    """

    def __init__(self, transitions: Transitions = Transitions()):
        self.transitions = transitions

    def can_announce(self, sentence: str) -> bool:
        return topic(sentence) is not None

    def fuse(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        return [self._fuse(*pair) for pair in pairs]

    def _fuse(self, transition: str, sentence: str) -> str:
        # A.3's open sentence, "have you ever...?", is completed by the query that follows it.
        filled = transition.replace(", have you ever...?", ".")
        if "[topic]" in filled:
            about = topic(sentence)
            if about is None:
                raise LeftOut("no plain topic to announce")
            filled = filled.replace("[topic]", about)
        if filled and filled[-1] not in ".?!":
            filled += "."
        return f"{filled} {sentence}".strip()

    def regenerate(self, history: Rounds, query: str, said: str, repetition: str, again: str | None) -> str:
        if again is None:
            raise LeftOut("no second answer to a query")
        return again

    def back_on_topic(self, moment: Interruption, rng: random.Random) -> tuple[str, str, str]:
        about = topic(moment.statement)
        question = rng.choice(_QUESTIONS_ABOUT if about else _QUESTIONS).format(topic=about)
        return (
            question,
            rng.choice(_REPLIES).format(statement=moment.statement),
            f"{rng.choice(_BRIDGES)} {moment.rest}",
        )

    def opening(self, query: str, rng: random.Random) -> str:
        about = topic(query)
        return rng.choice(_OPENINGS_ABOUT if about else _OPENINGS).format(topic=about)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of a model, part of every request's key."""

    model: str
    temperature: float = 0.7
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One request to a model.

    Attributes:
        kind: fuse, answer, question, resume, opening or spoken; selects the checks of the answer.
        messages: (role, text) as the chat completions API takes them.
        max_tokens: most tokens of the answer; a longer one is refused.
        sampling: model, temperature and seed.
        source: the words that the answer is about, which it may repeat.
    """

    kind: str
    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    sampling: Sampling
    source: str = ""

    @property
    def key(self) -> str:
        """A hash of everything that is sent; equal requests share one answer."""
        return hashlib.sha256(json.dumps(self.body(0), sort_keys=True).encode()).hexdigest()[:32]

    def body(self, attempt: int) -> dict:
        """The JSON of a chat completions request; every attempt has its own seed."""
        return {
            "model": self.sampling.model,
            "messages": [{"role": role, "content": text} for role, text in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed + attempt,
        }

    def read(self, text: str, finish_reason: str | None) -> tuple[str, str | None]:
        """The usable text of an answer, and why it is unusable; see `read_answer`."""
        return read_answer(self, text, finish_reason)


class Pending(Exception):
    """Answers are missing; the caller should obtain them and try again."""

    def __init__(self, requests: list[Request]):
        super().__init__(f"{len(requests)} requests")
        self.requests = requests


_QUESTION_PROMPT = (
    "An assistant is speaking and has just said this.\n"
    'Statement "{statement}"\n'
    "Write the one short question about the statement with which the listener breaks in. "
    "Give me the question only, no other words."
)
_REPLY_PROMPT = "You were interrupted by a question. Answer it in one or two short sentences and say nothing else."
_RESUME_PROMPT = (
    "Now take up your interrupted message again where it broke off and finish it. It was going to go on like this.\n"
    'Rest "{rest}"\n'
    "Link it smoothly to the question that I asked. Give me the rest of the message only, no other words."
)
_OPENING_PROMPT = (
    "You are a friendly voice assistant and nobody has spoken for a while. You speak first.\n"
    'Topic "{topic}"\n'
    "Write the one short sentence with which you open a conversation about the topic. "
    "Give me the sentence only, no other words."
)


class ModelRewriter:
    """Rewrites with a language model's answers, obtained beforehand.

    Args:
        sampling: sampling settings of the model.
        answers: answers by request key.
        transitions: the sentences that users interrupt with.
    """

    def __init__(self, sampling: Sampling, answers: Mapping[str, Answer], transitions: Transitions = Transitions()):
        self.transitions = transitions
        self.sampling = sampling
        self.answers = answers

    def can_announce(self, sentence: str) -> bool:
        return True

    def _ask(self, requests: Sequence[Request]) -> list[str]:
        missing = [r for r in requests if r.key not in self.answers]
        if missing:
            raise Pending(missing)
        texts = []
        for request in requests:
            answer = self.answers[request.key]
            if answer.text is None:
                raise LeftOut(f"rewriter: {answer.reason}")
            texts.append(answer.text)
        return texts

    def _request(self, kind: str, messages: Sequence[tuple[str, str]], max_tokens: int, source: str) -> Request:
        return Request(kind, tuple(messages), max_tokens, self.sampling, source)

    def fuse(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        # An empty sentence leaves nothing to fuse (the paper does not rewrite A.3's empty sentence either).
        requests = {
            i: self._request(
                "fuse", [("user", FUSE_PROMPT.format(sentence_a=a, sentence_b=b))], 128 + _tokens(b), source=b
            )
            for i, (a, b) in enumerate(pairs)
            if a
        }
        fused = dict(zip(requests, self._ask(list(requests.values())), strict=True))
        return [fused.get(i, b) for i, (_, b) in enumerate(pairs)]

    def regenerate(self, history: Rounds, query: str, said: str, repetition: str, again: str | None) -> str:
        messages = [*_chat(history), ("user", query), ("assistant", said), ("user", repetition)]
        return again or self._ask([self._request("answer", messages, 512, said)])[0]

    def back_on_topic(self, moment: Interruption, rng: random.Random) -> tuple[str, str, str]:
        prompt = _QUESTION_PROMPT.format(statement=moment.statement)
        [question] = self._ask([self._request("question", [("user", prompt)], 64, moment.statement)])
        heard = [*_chat(moment.history), ("user", moment.query), ("assistant", moment.said)]
        asked = [*heard, ("user", f"{question}\n({_REPLY_PROMPT})")]
        [reply] = self._ask([self._request("answer", asked, 128, moment.said)])
        go_on = [*heard, ("user", question), ("assistant", reply), ("user", _RESUME_PROMPT.format(rest=moment.rest))]
        [rest] = self._ask([self._request("resume", go_on, 128 + 2 * _tokens(moment.rest), moment.rest)])
        return question, reply, rest

    def opening(self, query: str, rng: random.Random) -> str:
        prompt = _OPENING_PROMPT.format(topic=topic(query) or query)
        return self._ask([self._request("opening", [("user", prompt)], 64, query)])[0]


def _chat(rounds: Rounds) -> list[tuple[str, str]]:
    return [message for query, answer in rounds for message in (("user", query), ("assistant", answer))]


def _tokens(text: str) -> int:
    """A generous estimate of a text's tokens, for limits only."""
    return len(text.encode()) // 3


_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»"}
_REFUSAL = re.compile(
    r"(?:i'?m |i am )?(?:very |so )?(?:sorry|apologi[sz]e)?(?: for any confusion)?[,.]?\s*(?:but )?(?:"
    r"as an? (?:ai|chatbot|language model)\b|i(?:'m| am) (?:just |only )?an? (?:ai|language model)\b"
    r"|i (?:do not|don't) have the (?:ability|capability|capacity)\b"
    r"|i(?:'m| am) (?:unable|not able) to\b"
    r"|i (?:can(?:'t|not)|won't) (?:help|assist|fulfill|comply|provide|rewrite|fuse|answer|do|create|generate|continue)"
    r")"
)
_BRACKET = re.compile(r"\[[^\[\]\n]{1,40}\]|\{[a-z_]{1,20}\}|<(?:topic|empty string)>", re.IGNORECASE)
_WORD = re.compile(r"\w+")
# Length of word runs that are compared between our prompts and answers.
_ECHO = 5
_LABELS = ("sentence one", "sentence two", "no other words", "answer only", 'statement "', 'topic "', 'rest "')


def clean(text: str) -> str:
    """An answer without outer white space and without quotation marks around all of it."""
    text = text.strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def read_answer(request: Request, text: str, finish_reason: str | None) -> tuple[str, str | None]:
    """A model's usable words, and why they are unusable (None if they are usable)."""
    text = clean(text)
    if request.kind != "spoken":
        return text, fault(request, text, finish_reason)
    if finish_reason == "content_filter":
        return text, "refusal"
    text = spoken.trim(text)
    return text, spoken.fault(text, spoken.conversation(request.messages))


def fault(request: Request, text: str, finish_reason: str | None) -> str | None:
    """Why a (clean) answer is unusable, in a few words; None if it is usable."""
    if not text:
        return "empty answer"
    if finish_reason == "length":
        return "answer cut short"
    if finish_reason == "content_filter":
        return "refusal"
    lowered = text.lower().replace("’", "'")
    source = request.source.lower().replace("’", "'")
    if _REFUSAL.match(lowered) and not _REFUSAL.match(source):
        return "refusal"
    if any(m.group().lower() not in source for m in _BRACKET.finditer(text)):
        return "template bracket left"
    if _echoes(request, lowered, source):
        return "instruction echoed"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "half of a surrogate pair"
    if request.kind == "fuse":
        if len(text) > 400 + 2 * len(request.source):
            return "runs on"
        content = {w for w in _WORD.findall(source) if len(w) > 3}
        if content and len(content & set(_WORD.findall(lowered))) < 0.3 * len(content):
            return "sentence two lost"
    return None


def _echoes(request: Request, text: str, source: str) -> bool:
    if any(label in text and label not in source for label in _LABELS):
        return True
    if request.kind == "answer":  # its prompt is the conversation, which an answer may repeat
        return False
    instruction = "\n".join(line for line in request.messages[-1][1].lower().split("\n") if '"' not in line)
    # Lines of the source may be in the prompt without quotation marks, and an answer may repeat them.
    return bool(_runs(text) & (_runs(instruction) - _runs(source)))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text)
    return {tuple(words[i : i + _ECHO]) for i in range(len(words) - _ECHO + 1)}
