"""`duplex-jax bench batch`: many sessions in one batch, compared with llama.cpp's parallel sequences.

In every session a slice of 6 tokens comes in after the same history and 10 tokens are sampled greedily, repeatedly from
the same point. Our side is one engine step over all rows; llama.cpp gets one batch with all sequences' tokens, then one
token of each at a time. Both keep their caches, and they alternate.
"""

import dataclasses
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks import llama
from benchmarks.decode import check_stores
from benchmarks.peers import QUESTION, USER_TOKENS, conversation, without_end
from benchmarks.profile import Profile, parts_line
from duplex_jax.checkpoint.registry import LoadedModel, load_model
from duplex_jax.decode import floor
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.slicing import MAX_SLICE_TOKENS

OURS, THEIRS = "ours", "llama.cpp"

Side = Callable[[], list[list[int]]]
"""Runs one slice of all sessions; returns the sampled tokens of each."""


def bench_batch(
    model: str = "smollm2-135m-instruct", sessions: int = 32, history: int = 256, precision: str = "float32",
    entries: str = "float32", repeats: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Tokens sampled per second by many sessions at once, compared with llama.cpp.

    Args:
        model: as `load_model` takes it.
        sessions: sessions in the batch.
        history: tokens that each session holds.
        precision: storage type of the weights: float32, bfloat16 or int8 (Q8_0 in llama.cpp).
        entries: storage type of our cache, one of the same; llama.cpp's is float16, its default.
        repeats: measured slices per side.

    Returns:
        `rows`, one per side: seconds of each slice, tokens sampled per second (median), and how many of the tokens
        equal ours; `ratio` of the two rates; `floor_seconds` per slice and our `parts`, see `floor` and `profile`; and
        the machine.

    Raises:
        UserError: an argument is invalid.
    """
    if min(sessions, repeats) < 1 or history < 2:
        raise UserError("sessions and repeats must be 1 or more, history 2 or more")
    check_stores(precision, entries)
    loaded = load_model(model, dtype="float32")
    ids = conversation(loaded.template, history)
    user = loaded.tokenizer.encode(QUESTION)[:USER_TOKENS]

    sides = {OURS: _our_side(loaded, ids, user, sessions, precision, entries)}
    left_out = {}
    if llama.missing():
        left_out[THEIRS] = "llama_cpp not installed: pip install llama-cpp-python"
    else:
        sides[THEIRS] = _llama_side(loaded, ids, user, sessions, precision)
    seconds, said, profiles = _timed(sides, repeats)
    words = {name: list(itertools.chain(*rows)) for name, rows in said.items()}
    found: list[dict[str, Any]] = [
        {
            "side": name,
            "seconds": taken,
            "tokens_per_second": sessions * MAX_SLICE_TOKENS / statistics.median(taken),
            "as_ours": sum(a == b for a, b in zip(words[name], words[OURS], strict=True)),
        }
        for name, taken in seconds.items()
    ]
    ceilings = floor.measure()
    least = floor.slice_floor(
        loaded.config, ceilings, history, USER_TOKENS + 1, MAX_SLICE_TOKENS, sessions, precision, entries
    )
    rates = {row["side"]: row["tokens_per_second"] for row in found}
    return {
        "model": model, "sessions": sessions, "history": history, "precision": precision, "entries": entries,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "backend": jax.default_backend()},
        "rows": found, "ratio": rates[OURS] / rates[THEIRS] if THEIRS in rates else None, "left_out": left_out,
        "floor_seconds": least, "parts": profiles[OURS].parts, "ceilings": dataclasses.asdict(ceilings),
    }  # fmt: skip


def _our_side(model: LoadedModel, ids: list[int], user: list[int], sessions: int, precision: str, entries: str) -> Side:
    """One engine step over all sessions after the history `ids`."""
    engine = Engine(
        model.model, without_end(model.template), rows=sessions, capacity=max(_slots(ids), 256),
        dtype="float32", weights=precision, entries=entries,
    )  # fmt: skip
    first = engine.open(sampling=Sampling(temperature=0))
    engine.append(first, ids)
    engine.encode(first, len(ids) - 1)
    rows = [first, *(engine.fork(first) for _ in range(sessions - 1))]

    def step() -> list[list[int]]:
        for row in rows:
            engine.truncate(row, len(ids) - 1, ids[-1:])
        return list(engine.advance({row: Request(user, allow_idle=False) for row in rows}).values())

    return step


def _llama_side(model: LoadedModel, ids: list[int], user: list[int], sessions: int, precision: str) -> Side:
    """The same with llama.cpp: one batch of all users' tokens, then one token of each session at a time."""
    peer = llama.Llama(model, precision, sessions, _slots(ids))
    peer.encode(0, ids[:-1])
    for sequence in range(1, sessions):
        peer.copy(0, sequence)

    def step() -> list[list[int]]:
        for sequence in range(sessions):
            peer.cut(sequence, len(ids) - 1)
        found = peer.decode([(s, len(ids) - 1, [ids[-1], *user]) for s in range(sessions)]).argmax(-1)
        said = [found.tolist()]
        for i in range(MAX_SLICE_TOKENS - 1):
            place = len(ids) + len(user) + i
            said.append(peer.decode([(s, place, [said[-1][s]]) for s in range(sessions)]).argmax(-1).tolist())
        return [list(words) for words in zip(*said, strict=True)]

    return step


def _slots(ids: list[int]) -> int:
    return len(ids) + USER_TOKENS + MAX_SLICE_TOKENS


def _timed(
    sides: Mapping[str, Side], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]], dict[str, Profile]]:
    """For each side the seconds of its slices, the last sampled tokens, and where the time went."""
    said = {name: side() for name, side in sides.items()}
    print("warmed up", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    profiles = {name: Profile() for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            time.sleep(0.05)  # lets the other side's threads go idle
            began = time.perf_counter()
            with profiles[name].one():
                said[name] = side()
            seconds[name].append(time.perf_counter() - began)
        print(f"slice {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
    return seconds, said, profiles


def table(report: Mapping[str, Any]) -> list[str]:
    """Formats the report as lines of text."""
    stored = f"{report['precision']}, entries {report['entries']}"
    lines = [f"{report['sessions']} sessions of {report['history']} tokens, {stored}"]
    lines.append(f"{'':12}{'tokens/s':>10}{'slice s':>10}{'as ours':>10}{'x llama.cpp':>13}")
    for row in report["rows"]:
        ratio = f"{report['ratio']:.2f}" if row["side"] == OURS and report["ratio"] else ""
        lines.append(
            f"{row['side']:12}{row['tokens_per_second']:>10.0f}{statistics.median(row['seconds']):>10.2f}"
            f"{row['as_ours']:>10}{ratio:>13}"
        )
    ours = next(row for row in report["rows"] if row["side"] == OURS)
    share = report["floor_seconds"] / statistics.median(ours["seconds"])
    lines.append(f"floor: {report['floor_seconds']:.2f} s a slice, {share:.0%} of ours")
    if report["parts"]:
        lines.append(f"ours: {parts_line(report['parts'])}")
    return lines + [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
