"""Splits text into sentences, and recognises statements."""

import re
from typing import NamedTuple

_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」）]*|\n+")


class Sentence(NamedTuple):
    """`text[start:end]`; white space after it is not part of any sentence."""

    start: int
    end: int


def sentences(text: str) -> list[Sentence]:
    """The sentences of a text in order; a line break also ends one."""
    found, start = [], 0
    for end in [*(m.end() for m in _END.finditer(text)), len(text)]:
        part = text[start:end]
        if part.strip():
            left = start + len(part) - len(part.lstrip())
            found.append(Sentence(left, left + len(part.strip())))
        start = end
    return found


def is_statement(text: str) -> bool:
    """Whether it is a plain sentence of 4-40 words with a full stop: no heading, list number, question or code."""
    words = text.split()
    if text[-1:] == "。":
        return 8 <= len(text) <= 80
    return (
        4 <= len(words) <= 40
        and text[-1:] == "."
        and text[0].isalpha()
        and words[-1][:-1].isalpha()
        and not any(c in text for c in "`{}[]|=<>#*")
    )
