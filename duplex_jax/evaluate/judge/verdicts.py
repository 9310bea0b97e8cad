"""Parses a judge's reply: a rating in brackets, a score in JSON, or which of two answers is better."""

import json
import re
from collections.abc import Callable
from typing import Any

LEAST, MOST = 1, 10

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_FALLBACK = re.compile(r"\[(\d+\.?\d*)\]")
_WINNER = re.compile(r"\[\[([ABC])\]\]")
_SCORE = re.compile(r'"score"\s*:\s*("?)(\d+)\1\s*(?=[,}\n]|$)', re.IGNORECASE)


def rating(text: str) -> float | None:
    """The first `[[n]]`, otherwise the first `[n]`, like FastChat; None without one, or if outside 1 to 10."""
    found = _RATING.search(text) or _FALLBACK.search(text)
    value = float(found[1]) if found else 0.0
    return value if LEAST <= value <= MOST else None


def json_score(text: str) -> float | None:
    """The integer from 1 to 10 under "Score" in a JSON object, with any text around it.

    If no object can be parsed, for instance because quotation marks in the rationale are not escaped, the last "Score"
    that looks like a field counts. None without a score, or if several objects differ.
    """
    found = {_whole(value) for value in _scores(text)}
    if not found:
        matches = _SCORE.findall(text)
        found = {_whole(matches[-1][1])} if matches else set()
    return found.pop() if len(found) == 1 else None


def _scores(text: str) -> list[Any]:
    """The values of "Score" in the JSON objects of a text."""
    decoder = json.JSONDecoder(strict=False)  # judges write line breaks into their strings
    values, place = [], text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            values += [v for k, v in value.items() if k.lower() == "score"]
        place = text.find("{", end)
    return values


def _whole(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number.is_integer() and LEAST <= number <= MOST else None


def winner(text: str) -> str | None:
    """ "A", "B" or "C" (a tie) from `[[A]]` and so on; None without one, or if several differ."""
    found = set(_WINNER.findall(text))
    return found.pop() if len(found) == 1 else None


READERS: dict[str, Callable[[str], Any]] = {"rating": rating, "json": json_score, "pair": winner}
"""Parsers by kind of question to the judge; they return None for an unusable reply."""
