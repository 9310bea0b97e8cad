"""`duplex-jax bench quality`: loss of quality from weights and cache entries in fewer bits.

The same conversations go through the engine chunk by chunk, so each token attends to stored entries. Compared with
float32 at the tokens that training counts:

    perplexity    exp of the mean -log p of the assistant's words, including ends of slices but not idle
    decisions     probability of silence (idle or end) at the first token of each assistant slice: how often it moves
                  across 0.5, and its maximum and mean change
"""

import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from duplex_jax.checkpoint.registry import LoadedModel, load_model
from duplex_jax.decode.engine import Engine
from duplex_jax.errors import UserError
from duplex_jax.template import WEIGHED
from duplex_jax.timeline import read_timelines

_WAYS = [("float32", "float32"), ("float32", "bfloat16"), ("float32", "int8"), ("bfloat16", "bfloat16"),
         ("int8", "float32"), ("int8", "int8")]  # fmt: skip


def bench_quality(
    model: str = "smollm2-135m-duplex", data: str = "", conversations: int = 40, capacity: int = 2048
) -> dict[str, Any]:
    """Perplexity and decisions with weights and entries in fewer bits, compared with float32.

    Args:
        model: as `load_model` takes it.
        data: a file of timelines.
        conversations: how many of its first conversations to use.
        capacity: most tokens of a context; longer conversations are truncated.

    Returns:
        `rows`, one for each pair of storage types: perplexity; how many decisions move across 0.5 relative to float32,
        and their maximum and mean change of probability; and the numbers of tokens and decisions.

    Raises:
        UserError: there is no data, or an argument is invalid.
    """
    if not data:
        raise UserError("bench quality needs data=FILE.jsonl, timelines as `duplex-jax generate` writes them")
    if conversations < 1:
        raise UserError("conversations must be 1 or more")
    loaded = load_model(model, dtype="float32")
    encoded = []
    for timeline in read_timelines(data):
        encoded.append(loaded.template.encode(timeline))
        if len(encoded) == conversations:
            break
    rows: list[dict[str, Any]] = []
    base: np.ndarray | None = None
    for weights, entries in _WAYS:
        losses, silent = _measure(loaded, encoded, weights, entries, capacity)
        base = silent if base is None else base
        apart = np.abs(silent - base)
        rows.append({
            "weights": weights, "entries": entries, "perplexity": float(np.exp(losses.mean())),
            "other_side": int(((silent > 0.5) != (base > 0.5)).sum()),
            "most_apart": float(apart.max()), "mean_apart": float(apart.mean()),
        })  # fmt: skip
        print(f"{weights}, entries {entries}: done", file=sys.stderr, flush=True)
    return {
        "model": model, "data": data, "conversations": len(encoded), "tokens": len(losses), "decisions": len(silent),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "backend": jax.default_backend()},
        "rows": rows,
    }  # fmt: skip


def _measure(
    model: LoadedModel, encoded: list[Any], weights: str, entries: str, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """-log p of the counted tokens except silences, and the probability of silence at each decision."""
    engine = Engine(
        model.model, model.template, capacity=capacity, dtype="float32", weights=weights,
        entries=entries,
    )  # fmt: skip
    idle = model.template.idle_id
    losses, silent = [], []
    for one in encoded:
        ids = one.ids[:capacity].tolist()
        row = engine.open()
        at = 0
        quiet = {d + i for d in one.decisions.tolist() if d < len(ids) and ids[d] == idle for i in range(2)}
        decisions = set(one.decisions.tolist())
        for logits in engine.score(row, ids):
            top = logits.max(-1, keepdims=True)
            log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            for i in range(len(logits)):
                place = at + i + 1  # the token that these logits predict
                if place in decisions:
                    silent.append(float(np.exp(log_p[i, list(model.template.stop_ids)]).sum()))
                if place < len(ids) and one.codes[place] & WEIGHED and place not in quiet:
                    losses.append(-float(log_p[i, ids[place]]))
            at += len(logits)
        engine.close(row)
    if not losses or not silent:
        raise UserError("the conversations hold nothing that an assistant says within the capacity")
    return np.array(losses), np.array(silent)


def table(report: Mapping[str, Any]) -> list[str]:
    """Formats the report as lines of text."""
    lines = [
        f"{report['conversations']} conversations: {report['tokens']} tokens, {report['decisions']} decisions", "",
        f"{'weights':10}{'entries':10}{'perplexity':>12}{'other side':>12}{'most apart':>12}{'mean apart':>12}",
    ]  # fmt: skip
    for row in report["rows"]:
        lines.append(
            f"{row['weights']:10}{row['entries']:10}{row['perplexity']:>12.3f}{row['other_side']:>12}"
            f"{row['most_apart']:>12.4f}{row['mean_apart']:>12.5f}"
        )
    return lines
