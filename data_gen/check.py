"""Checks a data set against the rules of the timeline format and of its categories.

`meta.messages` of a row says which pairs hold which message, with a digest of the source text; a row without it (as in
the published files) is checked as far as its slices allow.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from data_gen import events
from data_gen.categories import CATEGORIES, generation_termination, opening, silence
from data_gen.compose import PATIENCE, Message, digest
from data_gen.engines import make_engine
from data_gen.pipeline import manifest_path, tokenizer_fingerprint
from data_gen.progress import Progress
from data_gen.shards import shard_files
from duplex_jax.errors import UserError
from duplex_jax.slicing import USER_WORDS, count_words, slice_tokens
from duplex_jax.timeline import Timeline, TimelineError, read_timelines
from duplex_jax.tokenizer import Tokenizer, resolve_tokenizer

MOST_SHOWN = 50


@dataclasses.dataclass
class Report:
    """The result of a check.

    Attributes:
        problems: the first problems, each with file and line or id.
        number: total number of problems.
        timelines: number of rows read.
        shards: number of files.
        notes: what could not be checked, and why.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    number: int = 0
    timelines: int = 0
    shards: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, problem: str) -> None:
        self.number += 1
        if len(self.problems) < MOST_SHOWN:
            self.problems.append(problem)

    def merge(self, other: "Report") -> None:
        self.number += other.number
        self.timelines += other.timelines
        self.shards += other.shards
        self.problems += other.problems[: MOST_SHOWN - len(self.problems)]


def check_dataset(folder: str | Path, tokenizer_name: str | None = None, workers: int = 1) -> Report:
    """Checks all shards of a folder.

    Args:
        folder: the data set.
        tokenizer_name: the tokenizer that cut the slices; by default the recipe's.
        workers: local processes.

    Raises:
        UserError: there is no data set.
    """
    folder = Path(folder)
    files = shard_files(folder)
    report = Report()
    tokenizer = _tokenizer(folder, tokenizer_name, report)
    _check_sums(folder, report)
    engine = make_engine("local", check_shard, tokenizer, workers)
    try:
        with Progress("files", len(files)) as progress:
            flying: set[Future] = set()
            for file in files:
                flying.add(engine.submit(file))
                if len(flying) > 2 * workers:
                    flying = _take(flying, report, progress)
            while flying:
                flying = _take(flying, report, progress)
    finally:
        engine.close()
    report.problems.sort()
    return report


def _take(flying: set[Future], report: Report, progress: Progress) -> set[Future]:
    ready, left = wait(flying, return_when=FIRST_COMPLETED)
    for future in ready:
        report.merge(future.result())
        progress.add()
    return left


def _tokenizer(folder: Path, name: str | None, report: Report) -> Tokenizer | None:
    """The tokenizer that cut the slices, if it is available."""
    recipe = _read_json(folder / "recipe.json")
    if name is None and recipe is None:
        report.notes.append("not checked: ten tokens a slice (no recipe.json says which tokenizer; give --tokenizer)")
        return None
    try:
        tokenizer = resolve_tokenizer(name or (recipe or {}).get("tokenizer_name", ""))
    except UserError as e:
        if name is not None:
            raise
        report.notes.append(f"not checked: ten tokens a slice ({e})")
        return None
    if name is None and recipe and tokenizer_fingerprint(tokenizer) != recipe.get("tokenizer"):
        report.notes.append(f"not checked: ten tokens a slice ({recipe['tokenizer_name']} is another tokenizer now)")
        return None
    return tokenizer


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_sums(folder: Path, report: Report) -> None:
    """Checks that a finished data set has the recorded number of rows, and every shard named in a manifest."""
    dataset = _read_json(folder / "dataset.json")
    if dataset is None:
        if (folder / "recipe.json").exists():
            report.notes.append("dataset.json is missing: the data set is not finished")
        return
    rows = dict.fromkeys(dataset["categories"], 0)
    for path in sorted(folder.rglob("*.manifest.json")):
        manifest = _read_json(path) or {}
        if path.parent.name in rows:
            rows[path.parent.name] += manifest.get("rows", 0)
        if manifest.get("rows") and not (path.parent / manifest["shard"]).exists():
            report.add(f"{path.parent / manifest['shard']}: is missing")
    for name, number in rows.items():
        said = dataset["categories"][name]["timelines"]
        if number != said:
            report.add(f"{folder / 'dataset.json'}: says {said} timelines of {name}; the manifests hold {number}")


def check_shard(tokenizer: Tokenizer | None, path: Path) -> Report:
    """Checks one file: its manifest, if there is one, and every row."""
    report = Report(shards=1)
    manifest = _read_json(manifest_path(path))
    if manifest is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != manifest.get("sha256"):
            report.add(f"{path}: its SHA-256 is not its manifest's")

    def on_error(e: TimelineError) -> None:
        report.add(str(e))

    last = ""
    for timeline in read_timelines(path, on_error):
        report.timelines += 1
        where = f"{path}: {timeline.id or f'timeline {report.timelines}'}"
        for problem in check_timeline(timeline, tokenizer):
            report.add(f"{where}: {problem}")
        if manifest is not None:
            if (timeline.id or "") <= last:
                report.add(f"{where}: its id does not come after {last!r}")
            last = timeline.id or ""
            if timeline.category != path.parent.name:
                report.add(f"{where}: category {timeline.category!r} in the folder of {path.parent.name!r}")
    if manifest is not None and report.timelines != manifest.get("rows"):
        report.add(f"{path}: {report.timelines} rows; its manifest says {manifest.get('rows')}")
    return report


def check_timeline(timeline: Timeline, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """The problems of one timeline, one line each.

    Args:
        timeline: a timeline that was read from a file, so its form is valid.
        tokenizer: the tokenizer that cut the assistant's messages; None skips the check of the cuts.
    """
    unknown = sorted({e.kind for e in timeline.events} - set(events.KINDS))
    if unknown:
        yield f"events of unknown kinds: {', '.join(unknown)}"
    if "messages" not in timeline.meta:
        return
    try:
        messages = [Message(**m) for m in timeline.meta["messages"]]
        if any(not 0 <= m.first <= m.last < len(timeline.pairs) for m in messages):
            raise ValueError
    except (TypeError, ValueError):
        yield "meta.messages: no list of messages within the timeline"
        return
    said = _Said(timeline, messages)
    yield from _messages(said, tokenizer)
    yield from _turns(said)
    yield from _barge_ins(said)
    yield from _RULES.get(timeline.category or "", _no_rule)(said)


class _Said:
    """A timeline with its messages by side and its events by kind."""

    def __init__(self, timeline: Timeline, messages: list[Message]):
        self.timeline = timeline
        self.pairs = timeline.pairs
        self.users = [m for m in messages if m.role == "user"]
        self.assistants = [m for m in messages if m.role == "assistant"]
        self.events = {kind: [e.pair for e in timeline.events if e.kind == kind] for kind in events.KINDS}


def _messages(said: _Said, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Checks that joined slices equal the messages, with nothing in between."""
    covered: set[int] = set()
    for m in said.assistants:
        slices = [said.pairs[i].assistant for i in range(m.first, m.last + 1)]
        if covered & set(range(m.first, m.last + 1)):
            yield f"pair {m.first}: two assistant messages at once"
        covered |= set(range(m.first, m.last + 1))
        spoken = [s for s in slices if s is not None]
        if len(spoken) < len(slices):
            yield f"pairs {m.first}-{m.last}: the assistant is silent inside a message"
        text = "".join(spoken)
        if digest("assistant", text) != m.digest:
            yield f"pairs {m.first}-{m.last}: the slices joined are not the assistant's message"
        elif tokenizer is not None and slice_tokens(text, tokenizer) != spoken:
            yield f"pairs {m.first}-{m.last}: the message is not cut every 10 tokens"
    for i, pair in enumerate(said.pairs):
        if pair.assistant is not None and i not in covered:
            yield f"pair {i}: the assistant says something that is in no message"
    covered = set(said.events[events.BACKCHANNEL])
    for m in said.users:
        covered |= set(range(m.first, m.last + 1))
        parts = [said.pairs[i].user for i in range(m.first, m.last + 1)]
        if digest("user", "".join(p for p in parts if p)) != m.digest:
            yield f"pairs {m.first}-{m.last}: the slices joined are not the user's message"
        for i, part in enumerate(parts, m.first):
            if part is None:
                if said.pairs[i - 1].user is not None and i not in said.events[events.HESITATION]:
                    yield f"pair {i}: the user pauses, and no event says so"
                continue
            least = 1 if i == m.last or i + 1 in said.events[events.HESITATION] else USER_WORDS[0]
            if not least <= count_words(part) <= USER_WORDS[1]:
                yield f"pair {i}: {count_words(part)} words in the user's slice"
    for i, pair in enumerate(said.pairs):
        if pair.user is not None and i not in covered:
            yield f"pair {i}: the user says something that is in no message"


def _turns(said: _Said) -> Iterator[str]:
    """Checks that nobody speaks over the other except at an event that says so, and the assistant never interrupts."""
    starts = {m.first for m in said.assistants}
    for i, pair in enumerate(said.pairs):
        both = pair.user is not None and pair.assistant is not None
        begins = i in said.events[events.QUERY_END] and i in starts
        if both and not begins and i not in said.events[events.BACKCHANNEL]:
            yield f"pair {i}: both speak"
    for m in said.users:
        for i in range(m.first, m.last):
            if said.pairs[i].assistant is not None:
                yield f"pair {i}: the assistant interrupts the user"
    for i in said.events[events.QUERY_END]:
        # After a barge-in of one slice the assistant falls silent for a pair before it answers.
        answered = i + 1 if i in said.events[events.BARGE_IN] else i
        patient = (said.pairs[i].user or "")[-1:] not in ".?!"  # without a mark, silence may have to tell the end
        while patient and answered < min(i + PATIENCE, len(said.pairs) - 1) and said.pairs[answered].assistant is None:
            answered += 1
        if answered not in starts or any(p.user is not None for p in said.pairs[i + 1 : answered + 1]):
            yield f"pair {i}: the query that ends here is not answered at once"
    for i in said.events[events.BACKCHANNEL]:
        if said.pairs[i].user is None or said.pairs[i].assistant is None:
            yield f"pair {i}: a backchannel while one of them is silent"
        elif i + 1 >= len(said.pairs) or said.pairs[i + 1].assistant is None or i + 1 in starts:
            yield f"pair {i}: the assistant does not go on after a backchannel"


def _barge_ins(said: _Said) -> Iterator[str]:
    """Checks that exactly the messages before a barge-in are cut, and that the assistant is idle from that pair on."""
    cut = {m.last + 1 for m in said.assistants if m.cut}
    barge_ins = set(said.events[events.BARGE_IN])
    for i in sorted(cut - barge_ins):
        yield f"pair {i}: a message is cut and no barge-in follows"
    for i in sorted(barge_ins - cut):
        yield f"pair {i}: a barge-in where no message is cut"
    if barge_ins != set(said.events[events.YIELD]):
        yield "barge-ins and yields are not at the same pairs"
    for i in sorted(barge_ins):
        if said.pairs[i].user is None or said.pairs[i].assistant is not None:
            yield f"pair {i}: the assistant does not yield to a barge-in"
        if i not in {m.first for m in said.users}:
            yield f"pair {i}: a barge-in inside the user's message"
    for i in said.events[events.BE_QUIET]:
        until = next((q for q in said.events[events.QUERY_END] if q > i), len(said.pairs))
        spoken = [j for j in range(i, until) if said.pairs[j].assistant is not None]
        if spoken:
            yield f"pair {spoken[0]}: the assistant speaks after it was told to be quiet"
        if until - i - 1 < generation_termination.QUIET_PAIRS[0]:
            yield f"pair {i}: only {until - i - 1} pairs of quiet"


def _count(said: _Said, **numbers: int) -> Iterator[str]:
    """Checks the number of events of each kind, except ends of queries; kinds not given must be absent."""
    for kind, pairs in said.events.items():
        if kind != events.QUERY_END and len(pairs) != numbers.get(kind, 0):
            yield f"{len(pairs)} events {kind}, not {numbers.get(kind, 0)}"


def _no_rule(said: _Said) -> Iterator[str]:
    yield from ()


def _basic(said: _Said) -> Iterator[str]:
    yield from _count(said)


def _sources(said: _Said) -> Iterator[str]:
    least, most = CATEGORIES[said.timeline.category or ""].dialogues
    if not least <= len(set(said.timeline.source_ids)) <= most:
        yield f"made from {len(set(said.timeline.source_ids))} dialogues, not {least}-{most}"


def _topic_interweaving(said: _Said) -> Iterator[str]:
    yield from _count(said)
    yield from _sources(said)
    order = said.timeline.meta.get("order", [])
    if len(order) != len(said.users) or set(order) != set(range(len(said.timeline.source_ids))):
        yield "meta.order does not name a dialogue for each query"


def _generation_termination(said: _Said) -> Iterator[str]:
    yield from _count(said, barge_in=1, **{"yield": 1}, be_quiet=len(said.events[events.BE_QUIET][:1]))
    asked = [q for q in said.events[events.QUERY_END] if q >= min(said.events[events.BARGE_IN], default=0)]
    if not said.events[events.BE_QUIET] and not asked:
        yield "the new input neither asks for silence nor is it a query"


def _regeneration(said: _Said) -> Iterator[str]:
    yield from _count(said, barge_in=1, **{"yield": 1})


def _dialogue_reset(said: _Said) -> Iterator[str]:
    yield from _count(said, barge_in=4, **{"yield": 4})
    yield from _sources(said)


def _back_on_topic(said: _Said) -> Iterator[str]:
    yield from _count(said, barge_in=1, resume=1, **{"yield": 1})
    for start in said.events[events.BARGE_IN]:
        answer = next((m for m in said.assistants if m.first >= start), None)
        if answer is None or not all(answer.first <= i <= answer.last for i in said.events[events.RESUME]):
            yield "the interrupted message is not taken up in the answer to the question"


def _backchannel(said: _Said) -> Iterator[str]:
    yield from _count(said, backchannel=max(1, len(said.events[events.BACKCHANNEL])))


def _hesitation(said: _Said) -> Iterator[str]:
    yield from _count(said, hesitation=max(1, len(said.events[events.HESITATION])))


def _silence(said: _Said) -> Iterator[str]:
    yield from _count(said, silence=1)
    for start in said.events[events.SILENCE]:
        run = said.pairs[start : start + silence.PAIRS[0]]
        if len(run) < silence.PAIRS[0] or any(u is not None or a is not None for u, a in run):
            yield f"pair {start}: no long silence"


def _opening(said: _Said) -> Iterator[str]:
    yield from _count(said, opening=1)
    for start in said.events[events.OPENING]:
        if start < opening.PAIRS[0] or any(u is not None or a is not None for u, a in said.pairs[:start]):
            yield f"pair {start}: no silence before the assistant opens"
        if start not in {m.first for m in said.assistants}:
            yield f"pair {start}: the opening is inside a message"


_RULES = {
    "basic": _basic,
    "topic_interweaving": _topic_interweaving,
    "generation_termination": _generation_termination,
    "regeneration": _regeneration,
    "dialogue_reset": _dialogue_reset,
    "back_on_topic": _back_on_topic,
    "backchannel": _backchannel,
    "hesitation": _hesitation,
    "silence": _silence,
    "opening": _opening,
}
