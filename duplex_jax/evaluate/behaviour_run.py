"""Obtains a model's behaviour on a held-out data set, replays and forced decisions, and stores it as it comes."""

import collections
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.data.encode import input_files, input_lines
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.replay import Replay, Replayed, replay
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour import (
    DEGENERATE,
    Counts,
    Output,
    count,
    count_forced,
    forced_of,
    output_of,
)
from duplex_jax.evaluate.forced import forced_decisions
from duplex_jax.files import atomic_write, check_writable
from duplex_jax.timeline import BE_QUIET, QUERY_END, SlicePair, Timeline, from_row, parse_line, to_row

# Silent pairs added after a conversation, so that an answer that begins one slice late is captured.
TAIL = 1
UNCATEGORISED = "uncategorised"
Ask = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A data set to evaluate on.

    Attributes:
        timelines: all timelines; a conversation's number is its index here.
        sha256: hash of its lines.
        chosen: numbers of those that are evaluated.
    """

    timelines: list[Timeline]
    sha256: str
    chosen: list[int]

    def category(self, number: int) -> str:
        return self.timelines[number].category or UNCATEGORISED


def read_held_out(path: str | Path, limit: int = 0) -> HeldOut:
    """Reads timelines from a file, or from all JSONL files in a folder.

    Args:
        path: the file or folder.
        limit: most timelines used: the first of each category, then the second of each, and so on; 0 for all.

    Raises:
        UserError: there is no data, a line is not a timeline, or no timeline has events.
    """
    digest = hashlib.sha256()
    timelines = []
    for where, line in input_lines(input_files(path)):
        digest.update(line.strip() + b"\n")
        timelines.append(parse_line(line, where))
    if not timelines:
        raise UserError(f"{path}: holds no timeline; one JSON object a line")
    if not any(has_events(t) for t in timelines):
        raise UserError(f"{path}: no timeline has events of kind {QUERY_END} or {BE_QUIET}, and scoring reads them; "
                        "`duplex-jax generate` writes them")  # fmt: skip
    by_category: dict[str | None, list[int]] = collections.defaultdict(list)
    for number, timeline in enumerate(timelines):
        by_category[timeline.category].append(number)
    ranks = {number: rank for numbers in by_category.values() for rank, number in enumerate(numbers)}
    chosen = sorted(range(len(timelines)), key=lambda n: (ranks[n], n))[: limit or None]
    return HeldOut(timelines, digest.hexdigest(), sorted(chosen))


def has_events(timeline: Timeline) -> bool:
    """Whether free-running metrics are possible, which need labelled ends of queries."""
    return any(event.kind in (QUERY_END, BE_QUIET) for event in timeline.events)


def conversation_seed(seed: int, number: int) -> int:
    """Seed of a conversation, independent of which others are run and in what order."""
    return zlib.crc32(f"{seed}/{number}".encode())


def weights_hash(params: Any) -> str:
    """A short hash of a tree of weights, from a sample of each, to tell training runs apart."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        flat = np.asarray(leaf).reshape(-1)
        step = max(1, len(flat) // 1024)
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(flat[::step]).tobytes())
    return digest.hexdigest()[:16]


def model_settings(name: str, model: LoadedModel) -> dict[str, Any]:
    """The properties of a model that results depend on, for `check_settings`."""
    template = model.template
    return {
        "model": name, "weights": weights_hash(model.params), "template": template.name,
        "model_idle_bias": template.idle_bias or None,
    }  # fmt: skip


class Records:
    """A JSONL file that grows by one line per finished conversation, so that none is run twice.

    A truncated last line is dropped. The folder is created if missing. Without a path the records are only in memory.

    Raises:
        UserError: the file cannot be written, or a line is invalid.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        if path is None:
            return
        check_writable(path)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for n, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[row["number"]] = row
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{n}: is no record of this job; give a new --out") from None
        if len(whole) < len(data):
            with atomic_write(path, "wb") as f:
                f.write(whole)

    def add(self, number: int, row: dict[str, Any]) -> None:
        row = {"number": number, **row}
        try:
            if self.path is not None:
                with open(self.path, "ab") as f:
                    f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        except OSError as e:
            raise UserError(f"{self.path}: cannot write ({e.strerror}); what is there stays") from e
        self.rows[number] = row


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Stores the settings that results depend on in `settings.json`; rejects a folder with different ones.

    Raises:
        UserError: settings differ; the message names them.
    """
    path = folder / "settings.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise UserError(f"{path}: is no JSON ({e}); give a new --out") from e
        settings = json.loads(json.dumps(settings))
        for name in sorted(settings.keys() | before.keys()):
            if settings.get(name) != before.get(name):
                raise UserError(f"{folder}: holds results with {name}={before.get(name)}, and now it is "
                                f"{settings.get(name)}; give a new --out")  # fmt: skip
        return
    with atomic_write(path) as f:
        json.dump(settings, f, indent=1)


def ask_replays(
    engine: Callable[[], Engine], data: HeldOut, options: Replay, seed: int, records: Records, done: Ask
) -> None:
    """Replays the user's side of every chosen conversation that `records` lacks.

    Args:
        engine: returns the engine; called only if needed.
        data: what to replay.
        options: how to replay it; its seed is not used.
        seed: with a conversation's number, determines that conversation's seed.
        records: receives one timeline per conversation; `meta.tokens` has each slice's tokens, `meta.seconds` its time.
        done: called with the number of slices done.
    """
    missing = [n for n in data.chosen if n not in records.rows]
    if not missing:
        return
    model = engine()
    users = [_with_tail(data.timelines[n]) for n in missing]
    tokens: dict[int, list[int]] = collections.defaultdict(list)
    for item in replay(model, users, options, [conversation_seed(seed, n) for n in missing]):
        if isinstance(item, Replayed):
            words = [i for i in item.slice.ids if i not in model.template.stop_ids]
            tokens[item.conversation].append(len(words))
            done(1)
        else:
            place, timeline = item
            meta = {"tokens": tokens.pop(place), "seconds": timeline.meta["seconds"]}
            records.add(missing[place], to_row(dataclasses.replace(timeline, meta=meta)))


def _with_tail(timeline: Timeline) -> Timeline:
    return dataclasses.replace(timeline, pairs=[*timeline.pairs, *[SlicePair(None, None)] * TAIL])


def ask_forced(
    engine: Callable[[], Engine], data: HeldOut, samplings: Sequence[Sampling], system: str | None,
    records: Records, done: Ask,
) -> None:  # fmt: skip
    """Computes the forced decisions of every chosen conversation that `records` lacks.

    Args:
        engine: returns the engine; called only if needed.
        data: the conversations.
        samplings: settings that differ only in `idle_bias`.
        system: a system prompt.
        records: receives `silent`: by `idle_bias`, the probability of silence at each pair.
        done: called with the number of conversations done.
    """
    biases = [str(s.idle_bias) for s in samplings]
    missing = [n for n in data.chosen if not set(biases) <= records.rows.get(n, {}).get("silent", {}).keys()]
    if not missing:
        return
    conversations = [data.timelines[n].pairs for n in missing]
    for place, silent in forced_decisions(engine(), conversations, samplings, system):
        known = records.rows.get(missing[place], {}).get("silent", {})
        rounded = [[None if p is None else round(p, 6) for p in row] for row in silent]
        records.add(missing[place], {"silent": known | dict(zip(biases, rounded, strict=True))})
        done(1)


def counts_of(
    data: HeldOut,
    outputs: Callable[[int], Sequence[Output]],
    silent: Callable[[int], Sequence[float | None]],
    slice_seconds: float,
) -> dict[int, list[Counts]]:
    """Counts of each chosen conversation, by number: one for each output, with forced decisions in the first.

    Args:
        data: the references.
        outputs: returns a conversation's outputs, one per seed.
        silent: returns its forced decisions.
        slice_seconds: seconds per slice.
    """
    result = {}
    for number in data.chosen:
        reference = data.timelines[number]
        found = outputs(number)
        free = [count(reference, o, slice_seconds) if has_events(reference) else Counts() for o in found]
        free[0] += count_forced(reference, silent(number))
        result[number] = free
    return result


def degenerate_counts(data: HeldOut, name: str, slice_seconds: float) -> dict[int, list[Counts]]:
    """Counts of the oracle, or of an assistant that is always idle or always talking."""
    assistant = DEGENERATE[name]

    def output(number: int) -> Output:
        return assistant(data.timelines[number])

    return counts_of(
        data, lambda n: [output(n)], lambda n: forced_of(data.timelines[n], output(n)), slice_seconds
    )  # fmt: skip


def recorded_counts(
    data: HeldOut, replays: Iterable[Records], forced: Records, idle_bias: float, slice_seconds: float
) -> dict[int, list[Counts]]:
    """Counts from recorded replays and forced decisions.

    Raises:
        UserError: a record does not match its conversation.
    """
    replays = list(replays)

    def outputs(number: int) -> list[Output]:
        return [output_of(data.timelines[number], from_row(r.rows[number])) for r in replays]

    return counts_of(
        data, outputs, lambda n: forced.rows[n]["silent"][str(idle_bias)], slice_seconds
    )  # fmt: skip
