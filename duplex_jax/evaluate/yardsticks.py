"""Turn-taking on other people's sentences: FLEXI's text scenarios and TurnSense's prompts, as written and bare.

Every sentence is asked twice: as written, and bare, which is how most recognisers write speech (`bare`). Each becomes
the user's side of a timeline with events; it is replayed as `behaviour_run` does, and `behaviour.count` counts.

Sources:
    FLEXI      arXiv 2509.22243; `flexi/{turn_taking,pause_handling,user_backchannel,user_interruption}.jsonl`
    TurnSense  github.com/latishab/turnsense; `turnsense.jsonl`
    situations of ours, which come with the package: corrections, statements, and requests such as "Once more, slowly."
"""

import collections
import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour import Counts, count, output_of
from duplex_jax.evaluate.behaviour_run import HeldOut, Records
from duplex_jax.evaluate.reports import Row, Section, Table, share
from duplex_jax.evaluate.statistics import add, rate
from duplex_jax.slicing import slice_words
from duplex_jax.timeline import BACKCHANNEL, BARGE_IN, HESITATION, QUERY_END, Event, SlicePair, Timeline, from_row

WRITINGS = ("as_written", "bare")
_OMITTED = re.compile(r"(?<!\d)[.,:]|[.,:](?!\d)|[^\w\s'.,:$%€£+-]")


def bare(text: str) -> str:
    """A text in lower case without punctuation; apostrophes and marks inside numbers stay, hyphens become spaces."""
    text = re.sub(r"[-\u2010-\u2015_]", " ", text.lower().replace("\u2019", "'"))
    return " ".join(_OMITTED.sub("", text).split())


@dataclasses.dataclass(frozen=True)
class Item:
    """One sentence in one writing.

    Attributes:
        scenario: a key of `SCENARIOS`.
        writing: one of `WRITINGS`.
        timeline: the user's side, with events.
        pause: number of pairs up to the end of the pause, or in front of what a situation is about; 0 where there are
            none.
        over: whether a TurnSense prompt is said to be over; None for the other scenarios.
        kind: one of `SITUATIONS`; empty for the other scenarios.
    """

    scenario: str
    writing: str
    timeline: Timeline
    pause: int = 0
    over: bool | None = None
    kind: str = ""


Cut = Callable[[str], list[str]]
Scenario = tuple[Timeline, int]
_ANSWER = 8
"""Silent user slices in which a first question is answered before the user speaks again."""


def _timeline(users: Sequence[str | None], **events: int) -> Timeline:
    return Timeline([SlicePair(u, None) for u in users], events=[Event(kind, at) for kind, at in events.items()])


def _turn(row: Mapping[str, str], cut: Cut) -> Scenario:
    said = cut(row["text"])
    return _timeline(said, **{QUERY_END: len(said) - 1}), 0


def _prompt(row: Mapping[str, str], cut: Cut) -> Scenario:
    return _turn({"text": row["prompt"]}, cut)


def _pause(row: Mapping[str, str], cut: Cut) -> Scenario:
    before, after = cut(row["Pause1"]), cut(row["Pause2"])
    return _timeline([*before, *after], **{QUERY_END: len(before) + len(after) - 1}), len(before)


def _silent_pause(row: Mapping[str, str], cut: Cut) -> Scenario:
    before, after = cut(row["Pause1"]), cut(row["Pause2"])
    events = {HESITATION: len(before), QUERY_END: len(before) + len(after)}
    return _timeline([*before, None, *after], **events), len(before) + 1


def _backchannel(row: Mapping[str, str], cut: Cut) -> Scenario:
    query = cut(row["text"])
    users = [*query, None, " ".join(cut(row["Pause1"]))]
    return _timeline(users, **{QUERY_END: len(query) - 1, BACKCHANNEL: len(query) + 1}), 0


def _interruption(row: Mapping[str, str], cut: Cut) -> Scenario:
    query, interruption = cut(row["context"]), cut(row["interrupt"])
    users = [*query, None, *interruption]
    timeline = _timeline([*users, None], **{BARGE_IN: len(query) + 1, QUERY_END: len(users) - 1})
    timeline.events.append(Event(QUERY_END, len(query) - 1))
    return timeline, 0


def _situation(row: Mapping[str, str], cut: Cut) -> Scenario:
    before = [*cut(row["context"]), *[None] * _ANSWER] if row["context"] else []
    said = cut(row["text"])
    return _timeline([*before, *said], **{QUERY_END: len(before) + len(said) - 1}), len(before)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A scenario's file, the fields with its texts, and how a row becomes a timeline.

    The file lies in the folder of the data; None is the one that comes with the package.
    """

    file: str | None
    fields: tuple[str, ...]
    make: Callable[[Mapping[str, str], Cut], Scenario]


# A replay adds one silent pair behind each timeline, the last in which an answer counts as prompt.
SCENARIOS = {
    "turn": _Source("flexi/turn_taking.jsonl", ("text",), _turn),
    "pause": _Source("flexi/pause_handling.jsonl", ("Pause1", "Pause2"), _pause),
    "silent_pause": _Source("flexi/pause_handling.jsonl", ("Pause1", "Pause2"), _silent_pause),
    "backchannel": _Source("flexi/user_backchannel.jsonl", ("text", "Pause1"), _backchannel),
    "interruption": _Source("flexi/user_interruption.jsonl", ("context", "interrupt"), _interruption),
    "turnsense": _Source("turnsense.jsonl", ("prompt",), _prompt),
    "situation": _Source(None, ("context", "text"), _situation),
}
_OURS = Path(str(resources.files("duplex_jax") / "assets" / "situations.jsonl"))
SITUATIONS = ("correction", "statement", "request")

# (name, scenario, counts of successes and of trials, what it says)
MEASURES = (
    ("turns_clean", "turn", "clean", "queries", "answered within one slice after the user's last words, not early"),
    ("turns_early", "turn", "early", "queries", "spoke before the user's last slice"),
    ("turns_answered", "turn", "answered_within_1", "queries", "spoke in the last slice's pair or the next"),
    ("pauses_kept", "pause", "pauses_kept", "pauses", "silent up to a pause of under a second (no silent slice)"),
    ("silent_pauses_kept", "silent_pause", "pauses_kept", "pauses", "silent up to the end of a whole silent slice"),
    ("backchannels_met", "backchannel", "backchannels", "conversations", "speaking when the backchannel came"),
    ("gone_on", "backchannel", "gone_on", "backchannels", "of those met: goes on speaking"),
    ("barge_ins_met", "interruption", "barge_ins", "barge_ins_meant", "speaking when the interruption came"),
    ("yielded", "interruption", "yielded_within_1", "barge_ins", "of those met: silent within one slice"),
    (
        "barge_ins_answered",
        "interruption",
        "yielded_and_answered",
        "barge_ins",
        "of those met: yielded, and spoke within two slices after the interruption",
    ),
    ("turnsense_accuracy", "turnsense", "right", "prompts", "spoke within one slice if and only if the prompt is over"),
    ("turnsense_over", "turnsense", "spoken_over", "over", "spoke after prompts that are over (probability above 0.5)"),
    ("turnsense_open", "turnsense", "spoken_open", "open", "spoke after prompts that are not over; low is good"),
    *(
        (
            f"{kind}s_replied",
            "situation",
            f"{kind}s_replied",
            f"{kind}s",
            f"silent after a {kind} began, or before it, and spoke within one slice after it",
        )
        for kind in SITUATIONS
    ),
)
LOW = ("turns_early", "turnsense_open")
"""The measures of which less is better."""


def read_yardsticks(folder: str | Path, limit: int = 0) -> tuple[list[Item], HeldOut]:
    """Reads a folder with `flexi/` and `turnsense.jsonl`.

    Args:
        folder: where they are.
        limit: take the first so many of each scenario in each writing; 0 for all.

    Returns:
        All items, and the same as what `ask_replays` takes.

    Raises:
        UserError: a file is missing, or a line lacks a field.
    """
    items: list[Item] = []
    chosen: list[int] = []
    digest = hashlib.sha256()
    for name, source in SCENARIOS.items():
        path = Path(folder) / source.file if source.file else _OURS
        rank = 0
        for where, row in _rows(path, digest):
            texts = {field: _text(where, row, field, field == "context" and not source.file) for field in source.fields}
            over = _over(where, row) if name == "turnsense" else None
            if name == "turnsense" and over is None:
                continue
            for writing in WRITINGS:
                if not limit or rank < limit:
                    chosen.append(len(items))
                items.append(_item(name, writing, texts, rank, over, row["kind"] if path == _OURS else ""))
            rank += 1
    return items, HeldOut([item.timeline for item in items], digest.hexdigest(), chosen)


def _item(scenario: str, writing: str, texts: Mapping[str, str], rank: int, over: bool | None, kind: str) -> Item:
    rng = random.Random(f"{scenario}/{rank}")

    def cut(text: str) -> list[str]:
        return slice_words(bare(text) if writing == "bare" else text, rng)

    timeline, pause = SCENARIOS[scenario].make(texts, cut)
    timeline.id = f"{scenario}/{writing}/{rank}"
    return Item(scenario, writing, timeline, pause, over, kind)


def _rows(path: Path, digest: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); --data is a folder with flexi/ and turnsense.jsonl"
        ) from e
    for number, line in enumerate(lines, 1):
        digest.update(line + b"\n")
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UserError(f"{path}:{number}: not JSON ({e}); one object a line") from e
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; one object a line")
        yield f"{path}:{number}", row


def _text(where: str, row: Mapping[str, Any], field: str, may_be_empty: bool) -> str:
    text = row.get(field)
    if not isinstance(text, str) or not (may_be_empty or bare(text)):
        raise UserError(f"{where}: {field!r} is missing or has no words; it is a text")
    return text


def _over(where: str, row: Mapping[str, Any]) -> bool | None:
    """Whether a prompt is said to be over; None where that is undecided."""
    response = row.get("response")
    value = response.get("eou_probability") if isinstance(response, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{where}: response.eou_probability is {value!r}; it is a number from 0 to 1")
    return None if value == 0.5 else value > 0.5


def count_item(item: Item, said: Timeline) -> Counts:
    """The counts of one replay: those of `behaviour.count`, and those of pauses and prompts.

    Raises:
        UserError: it is no replay of the item.
    """
    output = output_of(item.timeline, said)
    counts = count(item.timeline, output)
    if item.kind:
        # Speaking on behind a first answer, all the way through the user's words, is no reply to them.
        silent = any(words is None for words in output.said[max(item.pause - 1, 0) : len(item.timeline.pairs)])
        counts[f"{item.kind}s"] = 1
        counts[f"{item.kind}s_replied"] = int(counts["answered_within_1"] and silent)
    elif item.pause:
        counts["pauses"] = 1
        counts["pauses_kept"] = int(all(words is None for words in output.said[: item.pause]))
    if item.over is not None:
        spoke = counts["answered"]
        counts["prompts"] = 1
        counts["over" if item.over else "open"] = 1
        counts["spoken_over" if item.over else "spoken_open"] = spoke
        counts["right"] = int(bool(spoke) == item.over)
    return counts


def describe(items: Sequence[Item], chosen: Sequence[int], replays: Sequence[Records]) -> dict[str, dict[str, Any]]:
    """Every measure by writing, with Wilson's 95% interval; seeds repeat the same sentences, so n is trials / seeds.

    Args:
        items: all of them.
        chosen: numbers of those that are counted.
        replays: one for each seed.
    """
    found: dict[tuple[str, str], list[Counts]] = collections.defaultdict(list)
    for number in chosen:
        item = items[number]
        found[item.writing, item.scenario] += [count_item(item, from_row(r.rows[number])) for r in replays]
    result: dict[str, dict[str, Any]] = {}
    for writing in WRITINGS:
        result[writing] = {}
        for name, scenario, successes, trials, _ in MEASURES:
            counts = add(found[writing, scenario])
            hits, n = counts[successes], counts[trials]
            result[writing][name] = rate(hits, n, len(replays)) | {"successes": hits, "trials": n}
    return result


def section(report: Mapping[str, Any]) -> Section:
    """Every measure by writing."""
    writings = {f"{report['model']}, {name.replace('_', ' ')}": of for name, of in report["measures"].items()}
    rows = [
        Row(
            f"{name}: {text}",
            {column: share(of[name], of[name]["trials"]) for column, of in writings.items() if name in of},
            "low" if name in LOW else "high",
        )
        for name, _, _, _, text in MEASURES
    ]
    title = "FLEXI and TurnSense: shares in %, 95% intervals; bare is lower case without punctuation."
    notes = [f"{report['data']['sentences']} sentences, {len(report['settings']['seeds'])} seeds"]
    return Section("Yardsticks", [Table(title, "Figure", rows)], notes)
