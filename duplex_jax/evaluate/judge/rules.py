"""Scoring without a judge, for MT-Eval's recollection tasks: an answer must name the right label or follow a rule.

The rules are those of MT-Eval's `utils/global_inst.py`, taken from IFEval (Zhou et al. 2023, "Instruction-Following
Evaluation for Large Language Models"). A right answer scores 10, a wrong one 0.
"""

import json
import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.judge.prompts import count_sentences

_SPACED = str.maketrans(dict.fromkeys(string.punctuation, " "))


def names_label(answer: str, label: str) -> bool:
    """Whether the answer contains the label, ignoring case and treating punctuation as spaces."""
    return label.translate(_SPACED).lower() in answer.translate(_SPACED).lower()


def keeps(answer: str, name: str, arguments: Mapping[str, Any]) -> bool | None:
    """Whether an answer follows a rule; None if that needs a language detector, which this project lacks.

    Raises:
        UserError: there is no such rule, or it lacks an argument.
    """
    if name == _LANGUAGE:
        return None
    if name not in _RULES:
        raise UserError(f"recollection rule {name!r} is unknown; the rules are {', '.join([*_RULES, _LANGUAGE])}")
    try:
        return _RULES[name](answer, **arguments)
    except TypeError as e:
        raise UserError(f"recollection rule {name!r}: has arguments {dict(arguments)} ({e})") from e


_LANGUAGE = "language:response_language"


def _starts_with_emoji(answer: str) -> bool:
    first = answer.strip()[:1]
    return bool(first) and (unicodedata.category(first) == "So" or "\U0001f1e6" <= first <= "\U0001faff")


def _ends_with(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip("'").lower().endswith(end_phrase.lower())


def _is_json(answer: str) -> bool:
    text = re.sub(r"\A```(?:json)?|```\Z", "", answer.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _bullets(answer: str, num_bullets: int) -> bool:
    found = len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", answer, re.MULTILINE))
    return found == num_bullets if num_bullets else found > 0


def _sentences(answer: str, num_sentences: int, relation: str = "less than") -> bool:
    number = count_sentences(answer)
    return number < num_sentences if relation == "less than" else number > num_sentences


def _two_answers(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


_RULES: dict[str, Callable[..., bool]] = {
    "startend:start_char": lambda answer, letter: answer.strip().lower().startswith(letter.lower()),
    "startend:start_emoji": _starts_with_emoji,
    "startend:end_phrase": _ends_with,
    "format:json_format": _is_json,
    "format:bullet_list": _bullets,
    "length_constraints:number_sentences": _sentences,
    "keywords:existence": lambda answer, keywords: all(k.lower() in answer.lower() for k in keywords),
    "change_case:capital_letter": lambda answer: answer.isupper(),
    "change_case:lowercase": lambda answer: answer.islower(),
    "punctuation:no_comma": lambda answer: "," not in answer,
    "combination:two_responses": _two_answers,
    "content:placeholder": lambda answer, num_placeholder: len(re.findall(r"\[.*?\]", answer)) >= num_placeholder,
    "format:constrained_response": lambda answer, response_options: any(o in answer for o in response_options),
}
