"""Three prompting modes: convert a query and its choices to token ids, and mark the choice's word tokens."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from duplex_jax.evaluate.benchmarks.questions import Item
from duplex_jax.slicing import slice_tokens, slice_words
from duplex_jax.template import Template
from duplex_jax.timeline import SlicePair


class Continuation(NamedTuple):
    """A query followed by one of its choices.

    Attributes:
        ids: ids up to the choice's last word token.
        scored: indices in `ids` of the choice's word tokens, without idle, ends of slices and markers.
    """

    ids: list[int]
    scored: list[int]


def _behind(context: Sequence[int], words: Sequence[int]) -> Continuation:
    return Continuation([*context, *words], list(range(len(context), len(context) + len(words))))


def plain(template: Template, item: Item, seed: str) -> list[Continuation]:
    """Plain text: the choice follows the query and a space."""
    context = template.start() + template.tokenizer.encode(item.query)
    return [_behind(context, template.tokenizer.encode(f" {choice}")) for choice in item.choices]


def turn_based(template: Template, item: Item, seed: str) -> list[Continuation]:
    """The family's chat template: the query is the user's message, the choice the assistant's."""
    context = template.turn_prompt([("user", item.query)])
    return [_behind(context, template.tokenizer.encode(choice)) for choice in item.choices]


def duplex(template: Template, item: Item, seed: str) -> list[Continuation]:
    """Slices of both sides in the form of the generated data; see `duplex_pairs`."""
    return [_sliced(template, duplex_pairs(template, item.query, choice, seed)) for choice in item.choices]


def duplex_pairs(template: Template, query: str, answer: str, seed: str) -> list[SlicePair]:
    """A query in slices of 4-6 words, with a silent assistant, and its answer, which begins in the query's last pair.

    Args:
        template: its tokenizer cuts the answer.
        query: the user's words.
        answer: the assistant's words.
        seed: seed of the slices' lengths.
    """
    users = slice_words(query, random.Random(seed))
    first, *more = slice_tokens(answer, template.tokenizer)
    listening = [SlicePair(user, None) for user in users[:-1]]
    return [*listening, SlicePair(users[-1], first), *(SlicePair(None, part) for part in more)]


def _sliced(template: Template, pairs: Sequence[SlicePair]) -> Continuation:
    encoded = template.encode(pairs)
    first = next(i for i, pair in enumerate(pairs) if pair.assistant is not None)
    parts = template.assistant_ids([pair.assistant or "" for pair in pairs[first:]])
    scored = [
        int(start) + i
        for start, part in zip(encoded.decisions[first:], parts, strict=True)
        for i in range(len(part))
    ]  # fmt: skip
    return Continuation(encoded.ids[: scored[-1] + 1].tolist(), scored)


WAYS: dict[str, Callable[[Template, Item, str], list[Continuation]]] = {
    "plain": plain, "turn_based": turn_based, "duplex": duplex,
}  # fmt: skip
