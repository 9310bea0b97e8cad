"""Where the sentences of a message begin and end, and which of them are statements."""

import re
from typing import NamedTuple

_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」）]*|\n+")


class Sentence(NamedTuple):
    """`text[start:end]`; white space after it belongs to no sentence."""

    start: int
    end: int


def sentences(text: str) -> list[Sentence]:
    """The sentences of a text in order; a line break ends one too."""
    found, start = [], 0
    for end in [*(m.end() for m in _END.finditer(text)), len(text)]:
        part = text[start:end]
        if part.strip():
            left = start + len(part) - len(part.lstrip())
            found.append(Sentence(left, left + len(part.strip())))
        start = end
    return found


def is_statement(text: str) -> bool:
    """A plain sentence of 4-40 words that ends with a full stop: no heading, list number, question or code."""
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
