"""Encodes conversations as documents: timelines through the template, turn-based chats as ordinary SFT data."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from duplex_jax import timeline
from duplex_jax.chat import Message
from duplex_jax.checkpoint.resolve import load_template as load_template
from duplex_jax.conversations import parse_conversation
from duplex_jax.errors import UserError
from duplex_jax.records import load_json, read_lines
from duplex_jax.template import Code, Template

TURN_BASED, UNCATEGORISED = "turn_based", "uncategorised"
CATEGORIES = (*timeline.CATEGORIES, TURN_BASED, UNCATEGORISED)
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Ids and codes of a whole conversation, and where it may be split.

    Attributes:
        ids: int32 `[n]`.
        codes: uint8 `[n]`.
        cuts: ascending indices at which a pair or a turn begins; the first is the length of the opening.
        category: name of the category.
    """

    ids: np.ndarray
    codes: np.ndarray
    cuts: np.ndarray
    category: str


def answer_late(row: timeline.Timeline, share: float) -> tuple[list[timeline.SlicePair], list[int]]:
    """Delays a fraction of the answers that begin with the query's last words by one to four pairs.

    A model that never saw a late answer treats a missed turn as the end of the exchange and stays silent. The inserted
    silence has no loss: it teaches that silence after a request is a cue to answer, not that the assistant waits.

    Returns:
        The pairs, and the indices of the inserted ones. The random choices depend on the timeline alone.
    """
    if not share:
        return row.pairs, []
    random_source = random.Random(f"{row.id} {row.pairs}")
    pairs: list[timeline.SlicePair] = []
    silent: list[int] = []
    speaking = False
    for pair in row.pairs:
        if pair.user is not None and pair.assistant is not None and not speaking and random_source.random() < share:
            missed = random_source.choices((1, 2, 3, 4), (8, 4, 2, 1))[0]
            silent += range(len(pairs), len(pairs) + missed)
            pairs += [timeline.SlicePair(pair.user, None), *[timeline.SlicePair(None, None)] * (missed - 1)]
            pairs.append(timeline.SlicePair(None, pair.assistant))
        else:
            pairs.append(pair)
        speaking = pair.assistant is not None
    return pairs, silent


def encode_timeline(template: Template, row: timeline.Timeline, late: float = 0.0) -> Encoding:
    """Ids, codes and pair boundaries of a timeline; for `late` see `answer_late`."""
    pairs, silent = answer_late(row, late)
    encoded = template.encode(pairs)
    for i in silent:
        encoded.codes[encoded.decisions[i] : encoded.starts[i + 1]] = Code.IGNORED
    return Encoding(encoded.ids, encoded.codes, encoded.starts, row.category or UNCATEGORISED)


def encode_chat(template: Template, messages: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Encodes a turn-based chat; only assistant messages and the tokens that end them are trained on.

    Args:
        template: renders the prompt before each answer.
        messages: (role, text); a last message without an answer is omitted.

    Returns:
        Ids and codes.

    Raises:
        UserError: there is no assistant message, or the chat template cannot render this order of roles.
    """
    asked = next((n for n in range(len(messages), 0, -1) if messages[n - 1][0] == "assistant"), 0)
    if not asked:
        raise UserError("a chat without an assistant message cannot be trained on; leave it out")
    encode = template.tokenizer.encode
    given: list[Message] = [(role, encode(text) if role == "assistant" else text) for role, text in messages[:asked]]
    ids, answers = template.turns(given, open_answer=False)
    codes: list[int] = [Code.IGNORED] * len(ids)
    for begin, end in answers:
        ended = end < len(ids) and ids[end] in template.turn_ends
        codes[begin : end + ended] = [Code.SPOKEN] * (end + ended - begin)
    if answers and answers[-1][1] == len(ids):  # some chat templates end only the last answer
        ids, codes = [*ids, template.end_id], [*codes, Code.SPOKEN]
    return ids, codes


Part = tuple[np.ndarray, np.ndarray]


def chat_parts(template: Template, messages: Sequence[tuple[str, str]], length: int) -> tuple[list[Part], int]:
    """Splits a chat between turns into parts of at most `length` tokens, each beginning with the system message.

    Returns:
        (ids, codes) of each part, and how many tokens were cut off the ends of turns longer than a row.
    """
    ids, codes = encode_chat(template, messages)
    if len(ids) <= length:
        return [(np.asarray(ids, np.int32), np.asarray(codes, np.uint8))], 0
    first = next((i for i, m in enumerate(messages) if m[0] != "system"), len(messages))
    system = list(messages[:first])
    turns: list[list[tuple[str, str]]] = [[]]
    for m in messages[first:]:
        # A part begins with a user turn, and with any instructions before it.
        if turns[-1] and turns[-1][-1][0] == "assistant" and m[0] != "assistant":
            turns.append([])
        turns[-1].append(m)
    parts: list[Part] = []
    lost = 0
    group: list[tuple[str, str]] = []

    def close() -> None:
        if group:
            ids, codes = encode_chat(template, [*system, *group])
            parts.append((np.asarray(ids, np.int32), np.asarray(codes, np.uint8)))
            group.clear()

    for turn in turns:
        if not any(role == "assistant" for role, _ in turn):
            continue
        alone, alone_codes = encode_chat(template, [*system, *turn])
        if len(alone) > length:  # an answer longer than a row is truncated
            close()
            parts.append((np.asarray(alone[:length], np.int32), np.asarray(alone_codes[:length], np.uint8)))
            lost += len(alone) - length
            continue
        if len(encode_chat(template, [*system, *group, *turn])[0]) > length:
            close()
        group += turn
    close()
    return parts, lost


def timeline_parts(encoding: Encoding, length: int) -> tuple[list[Part], int]:
    """Splits a timeline between pairs into parts of at most `length` tokens, each with the conversation's opening.

    Returns:
        (ids, codes) of each part, and how many tokens of pairs longer than a row were omitted.
    """
    if len(encoding.ids) <= length:
        return [(encoding.ids, encoding.codes)], 0
    opening = int(encoding.cuts[0])
    room = length - opening
    ends = [*encoding.cuts[1:].tolist(), len(encoding.ids)]
    spans: list[tuple[int, int]] = []
    lost = 0
    start = stop = opening
    for begin, end in zip(encoding.cuts.tolist(), ends, strict=True):
        if end - begin > room:  # a pair longer than a row is omitted
            lost += end - begin
            spans.append((start, stop))
            start = stop = end
        elif end - start > room:
            spans.append((start, stop))
            start, stop = begin, end
        else:
            stop = end
    spans.append((start, stop))

    def part(values: np.ndarray, a: int, b: int) -> np.ndarray:
        return np.concatenate([values[:opening], values[a:b]])

    return [(part(encoding.ids, a, b), part(encoding.codes, a, b)) for a, b in spans if b > a], lost


def encode_line(
    template: Template, line: bytes, where: str, length: int, late: float = 0.0
) -> tuple[list[Part], int, str]:
    """Encodes one JSONL line, a timeline (with a fraction of `late` answers) or a chat, as parts that fit a row.

    Returns:
        (ids, codes) of each part, the number of omitted tokens, and the category's name.

    Raises:
        UserError: the line is neither, or invalid; the message names file, line and field.
    """
    try:
        row = parse_conversation(load_json(line))
        if isinstance(row, timeline.Timeline):
            encoding = encode_timeline(template, row, late)
            return *timeline_parts(encoding, length), encoding.category
        messages = [(role, text) for _, role, text in row.messages]
        return *chat_parts(template, messages, length), row.category or TURN_BASED
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def input_files(path: str | Path) -> list[Path]:
    """The JSONL files of a dataset: the file itself, or all files in a folder, sorted by name.

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give timelines or chats as .jsonl")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    files = [p for p in files if not any(n.startswith((".", "_")) for n in p.relative_to(path).parts)]
    if not files:
        raise UserError(f"{path}: no {', '.join(SUFFIXES)} file below it; give timelines or chats as JSON lines")
    return files


def input_lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """(location, line) of every nonblank line; see `records.read_lines`."""
    for file in files:
        yield from read_lines(file)
