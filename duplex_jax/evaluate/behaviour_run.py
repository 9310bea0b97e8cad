"""Asking a model for its behaviour on a held-out data set: replays and forced decisions, kept as they come."""

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

# Silent pairs behind a conversation, so that an answer that begins a slice late is heard.
TAIL = 1
UNCATEGORISED = "uncategorised"
Ask = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A data set to score on.

    Attributes:
        timelines: all of them; a conversation's number is its place here.
        sha256: of its lines.
        chosen: numbers of those that are scored.
    """

    timelines: list[Timeline]
    sha256: str
    chosen: list[int]

    def category(self, number: int) -> str:
        return self.timelines[number].category or UNCATEGORISED


def read_held_out(path: str | Path, limit: int = 0) -> HeldOut:
    """Reads timelines from a file, or from all JSONL files below a folder.

    Args:
        path: the file or folder.
        limit: take so many: the first of each category, then the second of each, and so on; 0 for all.

    Raises:
        UserError: nothing there, a line that is no timeline, or no timeline with events.
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
    """Whether free-running figures can be had: something says where queries end."""
    return any(event.kind in (QUERY_END, BE_QUIET) for event in timeline.events)


def conversation_seed(seed: int, number: int) -> int:
    """Of a conversation's random draws: the same whichever others are asked for, in whatever order."""
    return zlib.crc32(f"{seed}/{number}".encode())


def weights_hash(params: Any) -> str:
    """A short hash of a tree of weights, from a sample of each: another training run gives another."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        flat = np.asarray(leaf).reshape(-1)
        step = max(1, len(flat) // 1024)
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(flat[::step]).tobytes())
    return digest.hexdigest()[:16]


def model_settings(name: str, model: LoadedModel) -> dict[str, Any]:
    """What results depend on in a model, for `check_settings`."""
    template = model.template
    return {
        "model": name, "weights": weights_hash(model.params), "template": template.name,
        "model_idle_bias": template.idle_bias or None,
    }  # fmt: skip


class Records:
    """A JSONL file that grows by a line for each conversation that is done: what is there is never asked again.

    A last line that was cut off is forgotten. The folder is made where there is none. Without a path they are in
    memory alone.

    Raises:
        UserError: the place cannot be written, or a line is not what was written there.
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
    """Keeps the settings that results depend on in `settings.json`, and refuses a folder of other ones.

    Raises:
        UserError: names what differs.
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
        engine: gives the engine, where it is needed.
        data: what to replay.
        options: how; its seed is not used.
        seed: with a conversation's number it makes that conversation's seed.
        records: gets a timeline a conversation, `meta.tokens` the tokens of each slice, `meta.seconds` their time.
        done: called with how many slices were asked for.
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
    """Asks for the forced decisions of every chosen conversation that `records` lacks.

    Args:
        engine: gives the engine, where it is needed.
        data: what to ask about.
        samplings: which differ in their `idle_bias` alone.
        system: a system prompt.
        records: gets `silent`, by `idle_bias` the probability of silence at each pair.
        done: called with how many conversations are done.
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
    """Counts of each chosen conversation, by number: one for each output, the forced ones in the first.

    Args:
        data: the references.
        outputs: of a conversation, one for each seed.
        silent: its forced decisions.
        slice_seconds: of the clock.
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
    """Counts from what was asked.

    Raises:
        UserError: a record is no replay of its conversation.
    """
    replays = list(replays)

    def outputs(number: int) -> list[Output]:
        return [output_of(data.timelines[number], from_row(r.rows[number])) for r in replays]

    return counts_of(
        data, outputs, lambda n: forced.rows[n]["silent"][str(idle_bias)], slice_seconds
    )  # fmt: skip
