"""Templates: how a timeline becomes token ids for one model family, and back.

A pair is `open + user + middle + assistant + close`. The user part, markers included, is tokenised as one string. The
assistant's whole message is tokenised separately and then cut at its slices, so sampled ids are never tokenised again.
Control tokens are inserted by id: text that a user types never becomes one.
"""

import abc
import dataclasses
import enum
import functools
import itertools
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from duplex_jax.chat import ChatTemplate, Message, Turns, join_turns
from duplex_jax.errors import UserError
from duplex_jax.timeline import SlicePair, Timeline
from duplex_jax.tokenizer import Tokenizer, decode, decode_bytes, token_names


class Code(enum.IntFlag):
    """What a token counts for in training; `data.loader` converts codes to loss weights."""

    IGNORED = 0
    """No target: the user's part, markers, the opening."""
    SPOKEN = 1
    """The assistant's words, and the end of a slice in which it speaks."""
    IDLE = 2
    """A silent assistant's idle token, and the end of that slice."""
    DECISION = 4
    """Set in addition at the first assistant token of a pair, where it decides to speak or stay idle."""


WEIGHED = Code.SPOKEN | Code.IDLE


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A timeline as a model sees it.

    Attributes:
        ids: int32 `[N]`, the whole timeline.
        codes: uint8 `[N]`, the `Code` of predicting `ids[i]` from `ids[:i]`.
        starts: int32 `[P]`, where each pair begins; `starts[0]` is also the length of the opening.
        decisions: int32 `[P]`, the index of each pair's first assistant token: speak or stay idle.
    """

    ids: np.ndarray
    codes: np.ndarray
    starts: np.ndarray
    decisions: np.ndarray


class Template(abc.ABC):
    """A model family's format for slice pairs.

    Attributes:
        name: its name in configs and flags.
        tokens: the control tokens that it needs. Each is a tuple of names that the vocabulary may use for it, best
            first; a vocabulary with none of them gets the first one (`missing_tokens`).
        idle_id: the token that an idle assistant samples.
        end_id: the token that ends an assistant slice.
        tells_typed_markers: whether a marker that a user types differs from a real one.
        idle_bias: the model's own bias, calibrated after training: added to the logit of idle at the beginning of every
            slice, on top of the session's own.
        in_slices: whether the model was trained on slices: it answers a turn slice by slice until it is silent.
        chat: the model's own chat template for turn-based conversations; None to use the family's format.
        turn_ends: the tokens that end a turn-based answer: the model's own, and `end_id`.
    """

    name: str
    tells_typed_markers: bool = True
    tokens: ClassVar[dict[str, tuple[str, ...]]]
    idle_id: int
    end_id: int
    idle_bias: float = 0.0
    in_slices: bool = False
    chat: ChatTemplate | None = None
    turn_ends: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        source = tokenizer.config.get("chat_template")
        if isinstance(source, str):
            self.chat = ChatTemplate(source, tokenizer)

    def _id(self, token: str) -> int:
        names = self.tokens[token]
        for name in names:
            if name in self.tokenizer.special:
                return self.tokenizer.special[name]
        raise UserError(
            f"template {self.name!r} needs the token {names[0]}, which the tokenizer lacks; add it, or --template"
        )

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Tokens that end a slice."""
        return (self.idle_id, self.end_id)

    @abc.abstractmethod
    def start(self, system: str | None = None) -> list[int]:
        """Ids before the first pair, including an optional system prompt."""

    @abc.abstractmethod
    def user_part(self, user: str | None) -> list[int]:
        """Ids of the user's slice (None: idle) with its markers, up to the assistant's first token."""

    @abc.abstractmethod
    def closing(self, assistant: Sequence[int]) -> list[int]:
        """Ids that close a pair after the assistant's ids (which may end with a stop token, or be cut anywhere)."""

    @abc.abstractmethod
    def split_pair(self, ids: Sequence[int]) -> tuple[str | None, list[int]]:
        """Inverse for one pair: the user's slice, and the assistant's ids without the closing.

        Raises:
            UserError: the ids are not a pair of this template.
        """

    def turns(self, messages: Sequence[Message], open_answer: bool = True) -> Turns:
        """A turn-based conversation as ids, in the model's own chat template, or else in the family's format.

        Args:
            messages: a role (`system`, `user`, `assistant`) and its text, or the ids of an assistant's words.
            open_answer: end with the beginning of an assistant message.

        Raises:
            UserError: the format cannot express this order of roles.
        """
        if self.chat is not None:
            return self.chat.encode(messages, open_answer)
        return self._family_turns(messages, open_answer)

    def turn_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a turn-based conversation up to the assistant's next token; see `turns`."""
        return self.turns(messages).ids

    @abc.abstractmethod
    def _turn_closing(self) -> list[int]:
        """Ids after the words of a turn-based answer."""

    def _words(self, text: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode(text) if isinstance(text, str) else list(text)

    def _family_turns(self, messages: Sequence[Message], open_answer: bool) -> Turns:
        """Turns for a format without roles: an optional system prompt, then user and assistant alternating."""
        messages = join_turns(messages, self.tokenizer)
        system: str | None = None
        if messages and messages[0][0] == "system":
            system, messages = str(messages[0][1]), messages[1:]
        ids, answers = self.start(system), []
        for i, (role, text) in enumerate(messages):
            if role != ("assistant" if i % 2 else "user"):
                what = "a system message comes first" if role == "system" else "the user speaks first"
                raise UserError(f"template {self.name!r} has no place for message {i} of role {role}: {what}")
            if role == "user":
                ids += self.user_part(str(text))
            else:
                words = self._words(text)
                answers.append((len(ids), len(ids) + len(words)))
                ids += [*words, *self._turn_closing()]
        return Turns(ids, answers)

    def assistant_ids(self, message: Sequence[str]) -> list[list[int]]:
        """Ids of each slice of an assistant message, without stop tokens.

        The message is tokenised whole and cut at its slices. If a cut falls inside a token, because another tokenizer
        made the slices, every slice is tokenised separately.
        """
        ids = self.tokenizer.encode("".join(message))
        ends = list(itertools.accumulate(len(s.encode()) for s in message))
        offsets = [0, *itertools.accumulate(len(self.tokenizer.token_bytes(i)) for i in ids)]
        places = {offset: i for i, offset in enumerate(offsets)}
        if offsets[-1] != ends[-1] or any(e not in places for e in ends):
            return [self.tokenizer.encode(s) for s in message]
        cuts = [0, *(places[e] for e in ends)]
        return [ids[a:b] for a, b in itertools.pairwise(cuts)]

    def assistant_text(self, ids: Sequence[int]) -> str | None:
        """The assistant's slice as text: None for idle; stop tokens are omitted, partial characters replaced."""
        words = [i for i in ids if i not in self.stop_ids]
        return decode(self.tokenizer, words) or None

    def encode(self, timeline: Timeline | Sequence[SlicePair], system: str | None = None) -> Encoded:
        """Ids, codes and pair boundaries of a whole timeline, for training and scoring."""
        pairs = timeline.pairs if isinstance(timeline, Timeline) else timeline
        ids = self.start(system)
        codes = [Code.IGNORED] * len(ids)
        starts, decisions = [], []
        for (user, _), assistant in zip(pairs, self._assistant_parts(pairs), strict=True):
            starts.append(len(ids))
            part = self.user_part(user)
            decisions.append(len(ids) + len(part))
            said = [self.idle_id] if assistant is None else assistant
            closing = self.closing(said)
            ids += part + said + closing
            code = Code.IDLE if assistant is None else Code.SPOKEN
            codes += [Code.IGNORED] * len(part) + [code] * len(said)
            codes += [code if i == self.end_id else Code.IGNORED for i in closing]
            codes[decisions[-1]] |= Code.DECISION
        int32 = functools.partial(np.asarray, dtype=np.int32)
        return Encoded(int32(ids), np.asarray(codes, np.uint8), int32(starts), int32(decisions))

    def _assistant_parts(self, pairs: Sequence[SlicePair]) -> list[list[int] | None]:
        """The assistant's ids of each pair; None where it is idle."""
        parts: list[list[int] | None] = []
        message: list[str] = []

        def flush() -> None:
            if message:
                parts.extend(self.assistant_ids(message))
                message.clear()

        for user, assistant in pairs:
            # A message continues across a user's "mm-hm"; text without a leading space after new words is another.
            if assistant is None or (user is not None and not assistant[:1].isspace()):
                flush()
            if assistant is None:
                parts.append(None)
            else:
                message.append(assistant)
        flush()
        return parts

    def decode(self, ids: Sequence[int]) -> list[SlicePair]:
        """Inverse of `encode`: the pairs of a whole timeline's ids.

        Raises:
            UserError: the ids were not produced by this template.
        """
        rest = list(ids)[len(self.start()) :]
        pairs = []
        while rest:
            n = self._pair_length(rest)
            user, assistant = self.split_pair(rest[:n])
            pairs.append(SlicePair(user, self.assistant_text(assistant)))
            rest = rest[n:]
        return pairs

    @abc.abstractmethod
    def _pair_length(self, ids: Sequence[int]) -> int:
        """Number of ids in the first pair."""

    def _bad_pair(self, ids: Sequence[int]) -> UserError:
        return UserError(f"{list(ids)[:12]}...: is not a slice pair of template {self.name!r}")


def _after(ids: Sequence[int], token: int) -> int:
    """The index after the first `token`, or the length."""
    ids = list(ids)
    return ids.index(token) + 1 if token in ids else len(ids)


_INSIDE_MARKER = re.compile("(?<=<用)(?=户>)|(?<=<A)(?=I>)")


class MiniCPMTemplate(Template):
    """MiniCPM-duplex as released: `<用户>{user}<AI>{assistant}</s>`, after one `<s>`.

    The released tokenizer treats both markers as plain text. In text that a user types, the marker's middle token is
    split in two to tell it apart; a vocabulary in which the middle is not a single token cannot do that.
    """

    name = "minicpm"
    tokens: ClassVar = {"start": ("<s>",), "end": ("</s>",), "idle": ("<idle>",)}

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self.bos_id, self.end_id, self.idle_id = (self._id(token) for token in ("start", "end", "idle"))
        self._user, self._assistant = "<用户>", "<AI>"
        if self._user in str(tokenizer.config.get("chat_template")):
            self.chat = None  # the family's own format: the same markers after `<s>`, as in the released code
        self._assistant_ids = tokenizer.encode(self._assistant)
        broken = self._encode_text("", self._user + self._assistant, "")
        self.tells_typed_markers = broken != tokenizer.encode(self._user) + self._assistant_ids

    def start(self, system: str | None = None) -> list[int]:
        # The released model has no system role; its users put instructions before everything else.
        return [self.bos_id] + (self._encode_text("", system, "") if system else [])

    def _encode_text(self, before: str, text: str, after: str) -> list[int]:
        """Ids of `before + text + after` as one string, with markers inside `text` broken up into words."""
        pieces = _INSIDE_MARKER.split(text)
        pieces[0] = before + pieces[0]
        pieces[-1] += after
        return [t for piece in pieces for t in self.tokenizer.encode(piece)]

    def user_part(self, user: str | None) -> list[int]:
        if user is None:
            return [*self.tokenizer.encode(self._user), self.idle_id, *self._assistant_ids]
        return self._encode_text(self._user, user, self._assistant)

    def closing(self, assistant: Sequence[int]) -> list[int]:
        return [] if assistant and assistant[-1] == self.end_id else [self.end_id]

    def _pair_length(self, ids: Sequence[int]) -> int:
        return _after(ids, self.end_id)

    def split_pair(self, ids: Sequence[int]) -> tuple[str | None, list[int]]:
        ids = list(ids)
        middle, last = self._assistant_ids[1:-1], self._assistant_ids[-1:]
        pattern = middle + last
        for i in range(len(ids) - len(pattern) + 1):
            # The marker's opening bracket may have merged with the word before it, as in ")<".
            if ids[i : i + len(pattern)] == pattern and decode_bytes(self.tokenizer, ids[i - 1 : i]).endswith(b"<"):
                head, tail = ids[: i + len(pattern)], ids[i + len(pattern) :]
                if tail and tail[-1] == self.end_id:
                    tail = tail[:-1]
                if self.idle_id in head:
                    return None, tail
                text = decode(self.tokenizer, head)
                if text.startswith(self._user):
                    return text[len(self._user) : -len(self._assistant)], tail
                break
        raise self._bad_pair(ids)

    def _turn_closing(self) -> list[int]:
        return []  # as in the released chat template


class ChatMLTemplate(Template):
    """ChatML: `<|im_start|>user\\n{user}<|im_end|>\\n<|im_start|>assistant\\n{assistant}<|im_end|>\\n`.

    Idle is a single token: `<idle>` if the vocabulary has it, otherwise SmolLM2's reserved `<file_sep>`.
    """

    name = "chatml"
    tokens: ClassVar = {"open": ("<|im_start|>",), "end": ("<|im_end|>",), "idle": ("<idle>", "<file_sep>")}

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self._open, self.end_id, self.idle_id = (self._id(token) for token in ("open", "end", "idle"))
        self._newline = tokenizer.encode("\n")
        self._prompt = [self._open, *tokenizer.encode("assistant\n")]

    def _message(self, role: str, text: str) -> list[int]:
        return [self._open, *self.tokenizer.encode(f"{role}\n{text}"), self.end_id, *self._newline]

    def start(self, system: str | None = None) -> list[int]:
        return self._message("system", system) if system else []

    def user_part(self, user: str | None) -> list[int]:
        if user is not None:
            return self._message("user", user) + self._prompt
        head = [self._open, *self.tokenizer.encode("user\n"), self.idle_id, self.end_id, *self._newline]
        return head + self._prompt

    def closing(self, assistant: Sequence[int]) -> list[int]:
        ended = bool(assistant) and assistant[-1] == self.end_id
        return ([] if ended else [self.end_id]) + self._newline

    def _pair_length(self, ids: Sequence[int]) -> int:
        first = _after(ids, self.end_id)
        return first + _after(ids[first:], self.end_id) + len(self._newline)

    def split_pair(self, ids: Sequence[int]) -> tuple[str | None, list[int]]:
        ids = list(ids)
        n = _after(ids, self.end_id)
        head, tail = ids[: n - 1], ids[n + len(self._newline) :]
        if head[:1] != [self._open] or tail[: len(self._prompt)] != self._prompt:
            raise self._bad_pair(ids)
        tail = tail[len(self._prompt) :]
        tail = tail[: _after(tail, self.end_id)]
        if tail and tail[-1] == self.end_id:
            tail = tail[:-1]
        if self.idle_id in head:
            return None, tail
        text = decode(self.tokenizer, head[1:])
        if not text.startswith("user\n"):
            raise self._bad_pair(ids)
        return text[len("user\n") :], tail

    def _turn_closing(self) -> list[int]:
        return [self.end_id, *self._newline]

    def _family_turns(self, messages: Sequence[Message], open_answer: bool) -> Turns:
        """Messages of any roles in any order."""
        ids: list[int] = []
        answers = []
        for role, text in messages:
            if role != "assistant":
                ids += self._message(role, str(text))
                continue
            words = self._words(text)
            ids += self._prompt
            answers.append((len(ids), len(ids) + len(words)))
            ids += [*words, *self._turn_closing()]
        return Turns(ids + (self._prompt if open_answer else []), answers)


class CompactTemplate(Template):
    """One token per marker: `[user] text [assistant] text [end]`; a silent slice is just the idle token.

    A silent pair costs 3 tokens, compared with 9 in MiniCPM-duplex. Markers are tokens that text cannot produce:
    `<s0>`, `<s1>` and `<idle>` of MiniCPM-duplex, three reserved ones of SmolLM2, or added ones.
    """

    name = "compact"
    tokens: ClassVar = {
        "user": ("<|user|>", "<s0>", "<repo_name>"),
        "assistant": ("<|assistant|>", "<s1>", "<reponame>"),
        "idle": ("<idle>", "<file_sep>"),
        "end": ("<|im_end|>", "</s>", "<|eot_id|>", "<|endoftext|>"),
    }

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self._user, self._assistant = self._id("user"), self._id("assistant")
        self.idle_id, self.end_id = self._id("idle"), self._id("end")
        self._bos = [tokenizer.special[n] for n in ("<s>", "<|begin_of_text|>") if n in tokenizer.special][:1]

    def start(self, system: str | None = None) -> list[int]:
        return self._bos + ([*self.tokenizer.encode(system), self.end_id] if system else [])

    def user_part(self, user: str | None) -> list[int]:
        words = [self.idle_id] if user is None else [self._user, *self.tokenizer.encode(user)]
        return [*words, self._assistant]

    def closing(self, assistant: Sequence[int]) -> list[int]:
        return [] if assistant and assistant[-1] in self.stop_ids else [self.end_id]

    def _pair_length(self, ids: Sequence[int]) -> int:
        n = _after(ids, self._assistant)
        return next((i for i, token in enumerate(ids[n:], n + 1) if token in self.stop_ids), len(ids))

    def split_pair(self, ids: Sequence[int]) -> tuple[str | None, list[int]]:
        ids = list(ids)
        n = _after(ids, self._assistant)
        head, tail = ids[: n - 1], ids[n:]
        if self._assistant not in ids or not head or head[0] not in (self.idle_id, self._user):
            raise self._bad_pair(ids)
        if tail and tail[-1] == self.end_id:
            tail = tail[:-1]
        return (None if head[0] == self.idle_id else decode(self.tokenizer, head[1:])), tail

    def _turn_closing(self) -> list[int]:
        return [self.end_id]


TEMPLATES: dict[str, type[Template]] = {t.name: t for t in (MiniCPMTemplate, ChatMLTemplate, CompactTemplate)}


def make_template(
    name: str, tokenizer: Tokenizer, idle_bias: float = 0.0, in_slices: bool = False, ends: Sequence[int] = ()
) -> Template:
    """The named template for a tokenizer.

    Args:
        name: one of `TEMPLATES`.
        tokenizer: the model's tokenizer, with every token that the template needs.
        idle_bias: the model's own bias on idle.
        in_slices: whether the model was trained on slices.
        ends: ids that end an answer by the model's own settings, besides the tokenizer's end of text.

    Raises:
        UserError: unknown name, or the vocabulary lacks a token that the template needs.
    """
    template = _template(name)(tokenizer)
    template.idle_bias, template.in_slices = idle_bias, in_slices
    eos = tokenizer.special.get(token_names(tokenizer).get("eos_token", ""))
    known = {template.end_id, *ends} | ({eos} if eos is not None else set())
    template.turn_ends = frozenset(known - {template.idle_id})
    return template


def refuse_typed_markers(template: Template) -> None:
    """Raises UserError for a template that cannot tell a marker typed by a live user from a real one."""
    if not template.tells_typed_markers:
        raise UserError(f"template {template.name!r} would treat its markers as control tokens where users type them: "
                        "in this vocabulary they are not single tokens; --template=compact is safe")  # fmt: skip


def missing_tokens(name: str, tokenizer: Tokenizer) -> list[str]:
    """The tokens that a vocabulary needs in addition for the named template.

    Raises:
        UserError: unknown name.
    """
    wanted = _template(name).tokens.values()
    return [names[0] for names in wanted if not any(name in tokenizer.special for name in names)]


def _template(name: str) -> type[Template]:
    if name not in TEMPLATES:
        raise UserError(f"template {name!r} is unknown; one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def default_template(tokenizer: Tokenizer) -> str:
    """The name of the template that suits a vocabulary; `compact` works with any."""
    if "<|im_start|>" in tokenizer.special:
        return "chatml"
    is_minicpm = "<s>" in tokenizer.special and len(tokenizer.encode("用户")) == 1
    return "minicpm" if is_minicpm else "compact"
