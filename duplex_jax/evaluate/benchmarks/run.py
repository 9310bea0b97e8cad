"""Asking a model: what is missing is asked, and kept item by item; what is there is never asked again."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour_run import Records, check_settings
from duplex_jax.evaluate.benchmarks.likelihood import Likelihoods, Row, log_likelihoods, make_row
from duplex_jax.evaluate.benchmarks.tasks import Benchmark
from duplex_jax.evaluate.benchmarks.ways import WAYS

Answers = dict[int, Likelihoods | None]
"""By number of the item; None for one that is longer than the context."""


def records_path(folder: Path, task: str, way: str) -> Path:
    """Where a folder of results keeps those of a task asked in one way."""
    return folder / task / f"{way}.jsonl"


def ask(
    model: LoadedModel,
    benchmarks: Mapping[str, Benchmark],
    ways: Sequence[str],
    limit: int,
    capacity: int,
    folder: Path,
    progress: Callable[[int], Callable[[int], None]],
) -> dict[tuple[str, str], Answers]:
    """Asks the chosen items that `folder` lacks.

    Args:
        model: whom.
        benchmarks: by task.
        ways: names in `WAYS`.
        limit: items of each task; 0 for all.
        capacity: most tokens of a query with a choice.
        folder: of the results, made for this model and these settings.
        progress: given the number of tokens to feed, gives what is told of those that are fed.

    Returns:
        By task and way, the answers to the chosen items.

    Raises:
        UserError: the folder holds results on other items, or cannot be written.
    """
    records: dict[tuple[str, str], Records] = {}
    rows: list[Row] = []
    places: list[tuple[Records, int]] = []
    for task, benchmark in benchmarks.items():
        check_settings(folder / task, {"items": len(benchmark.items), "sha256": benchmark.sha256})
        for way in ways:
            of = records[task, way] = Records(records_path(folder, task, way))
            for number in benchmark.chosen(limit):
                if number in of.rows:
                    continue
                continuations = WAYS[way](model.template, benchmark.items[number], f"{task}/{number}")
                longest = max(len(c.ids) for c in continuations)
                if longest > capacity:
                    of.add(number, {"too_long": longest})
                else:
                    rows.append(make_row(continuations))
                    places.append((of, number))
    if rows:
        done = progress(sum(len(row.ids) for row in rows))
        on_device = jax.tree.map(jnp.asarray, model.model)
        for i, found in log_likelihoods(on_device, rows, model.template.stop_ids, capacity):
            of, number = places[i]
            of.add(number, {name: [round(x, 6) for x in getattr(found, name)] for name in ("all", "words")})
            done(len(rows[i].ids))
    return {
        (task, way): {number: _answer(of, number) for number in benchmarks[task].chosen(limit)}
        for (task, way), of in records.items()
    }


def _answer(records: Records, number: int) -> Likelihoods | None:
    row = records.rows[number]
    if "too_long" in row:
        return None
    try:
        return Likelihoods(row["all"], row["words"])
    except KeyError as e:
        raise UserError(f"{records.path}: item {number} has no field {e}; give a new --out") from None


def read_beside(
    folder: str | Path, benchmarks: Mapping[str, Benchmark]
) -> tuple[dict[str, Any], dict[tuple[str, str], Answers]]:
    """The settings and the answers of another run, as far as they are on these benchmarks.

    Raises:
        UserError: no results there, or on other items.
    """
    folder = Path(folder)
    settings = _read_settings(folder / "settings.json", ("model", "weights"))
    found: dict[tuple[str, str], Answers] = {}
    for task, benchmark in benchmarks.items():
        if not (folder / task / "settings.json").exists():
            continue
        if _read_settings(folder / task / "settings.json", ("sha256",))["sha256"] != benchmark.sha256:
            raise UserError(f"{folder / task}: was measured on other items; run it on the same --data")
        for way in WAYS:
            if records_path(folder, task, way).exists():
                records = Records(records_path(folder, task, way))
                found[task, way] = {number: _answer(records, number) for number in records.rows}
    if not found:
        raise UserError(f"{folder}: holds no results of {', '.join(benchmarks)}; run these tasks there first")
    return settings, found


def _read_settings(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {"folder": str(path.parent)} | {name: settings[name] for name in fields}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: no results of benchmarks there ({e}); give the --out of another run") from e
