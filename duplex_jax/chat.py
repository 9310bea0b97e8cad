"""Turn-based conversations as token ids, rendered by the chat template (Jinja) that comes with a model.

The template is rendered as transformers does it; then the control tokens in it become ids, and everything else is
tokenised as plain text. User text is escaped first, so that none of it becomes a control token or one of the template's
own markers.
"""

import datetime
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from duplex_jax.errors import UserError
from duplex_jax.tokenizer import Tokenizer, encode_markup, token_names

Message = tuple[str, str | Sequence[int]]
"""A role and its text; an assistant's words may be given as the sampled ids, which are kept."""

# Unicode noncharacters, reserved for internal use, so they do not occur in interchanged text.
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
# Markers made of ordinary tokens: `<|user|>`, `[INST]`, `<<SYS>>`.
_MARKERS = re.compile(r"<<?/?[^<>\s{}'\"]{1,40}>?>|\[/?[A-Z_]{2,40}\]")


class Turns(NamedTuple):
    """A turn-based conversation as ids; `answers` are the spans of the assistant's words."""

    ids: list[int]
    answers: list[tuple[int, int]]


class ChatTemplate:
    """A model's own chat template over its tokenizer.

    Args:
        source: the Jinja template.
        tokenizer: tokenises, and provides the names of bos, eos and other tokens.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self._source, self._tokenizer = source, tokenizer
        self._template: Any = None
        names = [n for n in tokenizer.special if len(n) > 1]
        typed = sorted({*names, *_MARKERS.findall(source)}, key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, typed)) or r"(?!)")

    def render(self, messages: Sequence[tuple[str, str]], open_answer: bool = True) -> str:
        """The conversation as text, with control tokens spelled out.

        Args:
            messages: (role, text).
            open_answer: end with the beginning of an assistant message.

        Raises:
            UserError: the template is invalid, or it rejects these messages.
        """
        try:
            self._template = self._template or _compile(self._source)
            return self._template.render(
                messages=[{"role": role, "content": text} for role, text in messages],
                tools=None,
                documents=None,
                add_generation_prompt=open_answer,
                **token_names(self._tokenizer),
            )
        except UserError:
            raise
        except Exception as e:  # a template is a program and can raise anything
            raise UserError(f"the model's chat template refuses these messages ({e})") from e

    def encode(self, messages: Sequence[Message], open_answer: bool = True) -> Turns:
        """The conversation as ids.

        Consecutive messages of one role are first passed unchanged; if the template rejects them, they are joined with
        an empty line.

        Args:
            messages: a role and its text, or the ids of an assistant's words.
            open_answer: end with the beginning of an assistant message.

        Raises:
            UserError: see `render`.
        """
        try:
            return self._encode(messages, open_answer)
        except UserError:
            joined = join_turns(messages, self._tokenizer)
            if len(joined) == len(messages):
                raise
            return self._encode(joined, open_answer)

    def _encode(self, messages: Sequence[Message], open_answer: bool) -> Turns:
        text = "".join(m[1] for m in messages if isinstance(m[1], str))
        fence, place = itertools.islice((c for c in _NONCHARACTERS if c not in text), 2)
        given = [ids for _, ids in messages if not isinstance(ids, str)]
        number = itertools.count()
        rows = [
            (role, self._fenced(words, fence) if isinstance(words, str) else f"{place}{next(number)}{place}")
            for role, words in messages
        ]
        ids: list[int] = []
        answers = []
        parts = re.split(f"{place}(\\d+){place}", self.render(rows, open_answer))
        for i, part in enumerate(parts):
            if i % 2:
                answers.append((len(ids), len(ids) + len(given[int(part)])))
                ids += given[int(part)]
            else:
                ids += encode_markup(self._tokenizer, part, fence, first=not i)
        return Turns(ids, answers)

    def _fenced(self, text: str, fence: str) -> str:
        """The text with a fence character inside every control token and template marker that it contains."""

        def fenced(found: re.Match[str]) -> str:
            word = found[0]
            return word[: len(word) // 2] + fence + word[len(word) // 2 :]

        while True:  # breaking one marker can reveal another that overlapped it
            text, changes = self._typed.subn(fenced, text)
            if not changes:
                return text


def join_turns(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Message]:
    """Joins consecutive messages of one role, with an empty line between their texts."""
    joined: list[Message] = []
    for role, words in messages:
        if joined and joined[-1][0] == role:
            before = joined.pop()[1]
            if isinstance(before, str) and isinstance(words, str):
                words = f"{before}\n\n{words}"
            else:
                runs = (tokenizer.encode(w) if isinstance(w, str) else list(w) for w in (before, "\n\n", words))
                words = [i for run in runs for i in run]
        joined.append((role, words))
    return joined


def _compile(source: str) -> Any:
    """Compiles a template in Jinja's sandbox, with the functions and filters that transformers provides."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation()]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as e:
        raise UserError(f"the model's chat template is not valid Jinja (line {e.lineno}: {e.message}); fetch it") from e


def _generation() -> Any:
    """The tag `{% generation %}`, which marks an answer for training; here it renders its content."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - declared like this by Jinja

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation
