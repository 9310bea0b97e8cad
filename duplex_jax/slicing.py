"""Cuts messages into time slices: 4-6 words for the user, 10 tokens for the assistant (paper, section 3)."""

import random
import re
from collections.abc import Iterator

from duplex_jax.tokenizer import Tokenizer, complete_utf8, decode_bytes

USER_WORDS = (4, 6)
MAX_SLICE_TOKENS = 10

# Scripts without spaces are spoken at about two characters per word, so two characters count as one word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"\s*(?:[{_UNSPACED}]{{1,2}}[^\w\s]*|(?:(?![{_UNSPACED}])\S)+)")


def words_of(text: str) -> list[str]:
    """Words of a text with the white space before them; scripts without spaces are cut every two characters."""
    return [m.group() for m in _WORD.finditer(text) if m.group().strip()]


def slice_words(text: str, rng: random.Random, words: tuple[int, int] = USER_WORDS) -> list[str]:
    """Cuts a user message into slices of a random number of words; white space at the cuts is dropped.

    Args:
        text: the message.
        rng: random generator for the slice lengths.
        words: minimum and maximum number of words per slice.

    Returns:
        Slices without outer white space; none for a blank message. Joined with the dropped white space they give the
        message.
    """
    found = [m.span() for m in _WORD.finditer(text)]
    slices, i = [], 0
    while i < len(found):
        n = rng.randint(*words)
        chunk = found[i : i + n]
        slices.append(text[chunk[0][0] : chunk[-1][1]].strip())
        i += n
    return [s for s in slices if s]


def user_slices(text: str, words: int = USER_WORDS[1]) -> list[str]:
    """Cuts a complete user message into slices of the maximum length; none for a blank message."""
    return slice_words(text, random.Random(0), (words, words))


def count_words(text: str) -> int:
    """Number of words in a user slice, as `slice_words` counts them."""
    return len(words_of(text))


def slice_ids(ids: list[int], tokenizer: Tokenizer, size: int = MAX_SLICE_TOKENS) -> Iterator[list[int]]:
    """Cuts a message's ids into runs of at most `size`, never inside a character.

    Args:
        ids: the whole message, tokenised at once.
        tokenizer: the tokenizer that produced them.
        size: most tokens in a slice; at least 4, the most tokens of one character.
    """
    start = 0
    while start < len(ids):
        end = min(start + size, len(ids))
        if end < len(ids):
            while end > start + 1 and not _whole(tokenizer, ids[start:end]):
                end -= 1
        yield ids[start:end]
        start = end


def _whole(tokenizer: Tokenizer, ids: list[int]) -> bool:
    data = decode_bytes(tokenizer, ids)
    return bool(data) and complete_utf8(data) == len(data)


def slice_tokens(text: str, tokenizer: Tokenizer, size: int = MAX_SLICE_TOKENS) -> list[str]:
    """Cuts an assistant message every `size` tokens; the joined slices equal the message, byte for byte."""
    return [decode_bytes(tokenizer, run).decode() for run in slice_ids(tokenizer.encode(text), tokenizer, size)]
