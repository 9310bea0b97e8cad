"""`duplex-jax bench evaluate`: benchmark items per second, compared with transformers + torch in the same run.

    likelihood    items of ARC-e and HellaSwag, each choice scored after its query as plain text
    generation    questions of GSM8K in the family's chat template, answered greedily

Both sides start from the items' text. Likelihoods are batched up to as many tokens as `evaluate benchmark` uses,
answers up to the requested batch size. transformers gets one row per choice, sorted by length, and computes logits only
where they are scored, which is more favourable than lm-evaluation-harness; its answers come from `generate` with its
own cache and left-padded prompts. Accuracies and the number of equal answers show that both sides did the same work.
"""

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import torch_model
from benchmarks.train import process
from duplex_jax.checkpoint.registry import LoadedModel, load_model
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.turns import TurnSession, step_turns
from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks.harness_tasks import answer
from duplex_jax.evaluate.benchmarks.likelihood import log_likelihoods, make_row, token_budget
from duplex_jax.evaluate.benchmarks.questions import Item, is_right, read_benchmark
from duplex_jax.evaluate.benchmarks.ways import plain
from duplex_jax.tokenizer import decode

LIKELIHOOD = ("arc_easy", "hellaswag")
GENERATION = "gsm8k"
OURS, THEIRS = "duplex_jax", "torch"


class Side(Protocol):
    """One of the two sides that are measured."""

    def choose(self, items: Sequence[Item]) -> list[int]:
        """The choice with the highest log-likelihood for each item."""

    def answer(self, queries: Sequence[str]) -> list[str]:
        """The greedy answer to each query."""


class _Ours:
    def __init__(self, model: LoadedModel, batch: int, tokens: int, capacity: int):
        self._model, self._batch, self._tokens, self._capacity = model, batch, tokens, capacity
        self._on_device = jax.tree.map(jnp.asarray, model.model)
        self._engine: Engine | None = None

    def choose(self, items: Sequence[Item]) -> list[int]:
        model = self._model
        rows = [make_row(plain(model.template, item, "")) for item in items]
        found = dict(log_likelihoods(self._on_device, rows, model.template.stop_ids, self._capacity))
        return [answer(found[n].all) for n in range(len(items))]

    def answer(self, queries: Sequence[str]) -> list[str]:
        model = self._model
        self._engine = self._engine or Engine(
            model.model, model.template, rows=self._batch, capacity=self._capacity, dtype="float32"
        )
        waiting = list(enumerate(queries))[::-1]
        live: dict[TurnSession, tuple[int, list[int]]] = {}
        said: dict[int, list[int]] = {}
        while waiting or live:
            while waiting and len(live) < self._batch:
                number, query = waiting.pop()
                session = TurnSession(self._engine, sampling=Sampling(temperature=0))
                session.ask(query, self._tokens)
                live[session] = number, []
            for session, ids in step_turns(live).items():
                number, words = live[session]
                words += ids
                if not session.answering:
                    said[number] = words
                    session.close()
                    del live[session]
        return [decode(model.tokenizer, said[n]) for n in range(len(queries))]


class _Torch:
    def __init__(self, model: LoadedModel, batch: int, tokens: int, capacity: int):
        import torch

        self._torch, self._model, self._batch, self._tokens = torch, model, batch, tokens
        self._peer = torch_model(model)
        self._budget = token_budget()

    def _padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Any, Any]:
        """Padded ids `[B, T]` and their mask."""
        ids, mask = np.full((2, len(rows), max(map(len, rows))), 0)
        ids += self._model.template.end_id
        for b, row in enumerate(rows):
            place = slice(ids.shape[1] - len(row), None) if left else slice(len(row))
            ids[b, place], mask[b, place] = row, 1
        return self._torch.tensor(ids), self._torch.tensor(mask)

    def choose(self, items: Sequence[Item]) -> list[int]:
        torch = self._torch
        asked = [
            (n, c, whole)
            for n, item in enumerate(items) for c, whole in enumerate(plain(self._model.template, item, ""))
        ]  # fmt: skip
        asked.sort(key=lambda a: -len(a[2].ids))
        found = [[0.0] * len(item.choices) for item in items]
        start = 0
        while start < len(asked):
            batch = asked[start : start + max(1, self._budget // len(asked[start][2].ids))]
            start += len(batch)
            ids, mask = self._padded([whole.ids[:-1] for _, _, whole in batch])
            with torch.inference_mode():
                hidden = self._peer.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
                places = [(b, i - 1) for b, (_, _, whole) in enumerate(batch) for i in whole.scored]
                rows, columns = (torch.tensor(x) for x in zip(*places, strict=True))
                # transformers' Granite, which has MiniCPM's arithmetic, scales its logits.
                scale = getattr(self._peer.config, "logits_scaling", 1.0)
                log_p = torch.log_softmax(self._peer.lm_head(hidden[rows, columns]) / scale, -1)
                targets = torch.tensor([whole.ids[i] for _, _, whole in batch for i in whole.scored])
                scores = log_p.gather(-1, targets[:, None])[:, 0].tolist()
            for n, c, whole in batch:
                found[n][c] = sum(scores[: len(whole.scored)])
                del scores[: len(whole.scored)]
        return [answer(values) for values in found]

    def answer(self, queries: Sequence[str]) -> list[str]:
        template = self._model.template
        prompts = [template.turn_prompt([("user", query)]) for query in queries]
        order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
        said: dict[int, str] = {}
        for start in range(0, len(order), self._batch):
            batch = order[start : start + self._batch]
            ids, mask = self._padded([prompts[n] for n in batch], left=True)
            out = self._peer.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=self._tokens, eos_token_id=template.end_id,
                pad_token_id=template.end_id,
            )  # fmt: skip
            for n, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                words = row[: row.index(template.end_id)] if template.end_id in row else row
                said[n] = decode(self._model.tokenizer, words) if words else ""
        return [said[n] for n in range(len(queries))]


# The side measured in this process.
_side: Side


def _make(kind: Callable[..., Side], name: str, *arguments: int) -> None:
    global _side
    _side = kind(load_model(name, dtype="float32"), *arguments)


def _timed(what: str, asked: Sequence[Any]) -> tuple[float, list[Any]]:
    """Seconds taken, and the answers."""
    began = time.perf_counter()
    said: list[Any] = _side.answer(asked) if what == GENERATION else _side.choose(asked)
    return time.perf_counter() - began, said


def bench_evaluate(
    model: str = "smollm2-135m-instruct", data: str = "", items: int = 64, questions: int = 16, tokens: int = 64,
    batch: int = 8, capacity: int = 1024, rounds: int = 3, torch: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Items per second by likelihood and by generation, ours and transformers' alternating, in float32.

    Each side has its own process and one warm-up round; rates are those of the median round.

    Args:
        model: as `load_model` takes it.
        data: the folder that `evaluate benchmark --data` takes, with ARC-e, HellaSwag and GSM8K.
        items: items of each of the first two; the same in every run.
        questions: questions of GSM8K; 0 for none.
        tokens: most tokens of an answer.
        batch: answers generated at once.
        capacity: most tokens of a context.
        rounds: number of timed rounds.
        torch: also measure transformers.

    Returns:
        `rows`, one per task and side: items per second, seconds of each round, accuracy, and how many items
        transformers answered as we did; `ratio`, our items per second divided by theirs for each task; and the machine.

    Raises:
        UserError: an argument is invalid, or a file or torch is missing.
    """
    if not data:
        raise UserError("bench evaluate needs data=FOLDER, as `evaluate benchmark --data` takes it")
    if min(items, tokens, batch, capacity, rounds) < 1 or questions < 0:
        raise UserError("items, tokens, batch, capacity and rounds must be 1 or more, questions 0 or more")
    asked, marks = _read(data, items, questions)
    sides: dict[str, Callable[..., Side]] = {OURS: _Ours}
    if torch:
        _check_torch()
        sides[THEIRS] = _Torch
    seconds: dict[tuple[str, str], list[float]] = {(what, side): [] for what in asked for side in sides}
    said: dict[tuple[str, str], list[Any]] = {}
    with contextlib.ExitStack() as stack:
        runners = {side: stack.enter_context(process()) for side in sides}
        for side, kind in sides.items():
            runners[side].submit(_make, kind, model, batch, tokens, capacity).result()
        for round_ in range(rounds + 1):
            for what, side in seconds:  # alternating, so that other load affects both sides
                taken, said[what, side] = runners[side].submit(_timed, what, asked[what]).result()
                if round_:
                    seconds[what, side].append(taken)
            print(f"round {round_} of {rounds}" if round_ else "warmed up", file=sys.stderr, flush=True)
    rows = []
    for (what, side), taken_ in seconds.items():
        answers = said[what, side]
        rows.append({
            "task": what, "side": side, "items": len(answers),
            "items_per_second": len(answers) / statistics.median(taken_), "seconds": taken_,
            "accuracy": sum(marks[what](n, a) for n, a in enumerate(answers)) / len(answers),
            "as_ours": sum(a == b for a, b in zip(answers, said[what, OURS], strict=True)),
        })  # fmt: skip
    rates = {(row["task"], row["side"]): row["items_per_second"] for row in rows}
    return {
        "model": model, "dtype": "float32", "batch": batch, "tokens": tokens,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "backend": jax.default_backend()},
        "rows": rows, "ratio": {what: rates[what, OURS] / rates[what, THEIRS] for what in asked} if torch else {},
    }  # fmt: skip


def _check_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as e:
        raise UserError("bench evaluate compares with torch; pip install 'duplex-jax[torch]', or torch=false") from e


def _read(data: str, items: int, questions: int) -> tuple[dict[str, list[Any]], dict[str, Callable[[int, Any], bool]]]:
    """For each task its queries, and a function that tells whether the answer to one of them is right."""
    asked: dict[str, list[Any]] = {}
    marks: dict[str, Callable[[int, Any], bool]] = {}
    for task in LIKELIHOOD:
        benchmark = read_benchmark("likelihood", task, data)
        chosen = [benchmark.items[n] for n in benchmark.chosen(items)]
        asked[task] = chosen
        marks[task] = lambda n, choice, chosen=chosen: choice == chosen[n].gold  # type: ignore[misc]
    if questions:
        of = read_benchmark("generation", GENERATION, data)
        some = [of.items[n] for n in of.chosen(questions)]
        asked[GENERATION] = [question.input.strip() for question in some]
        marks[GENERATION] = lambda n, text: is_right(of.task, some[n], text)
    return asked, marks


def table(report: Mapping[str, Any]) -> list[str]:
    """Formats the report as lines of text."""
    lines = [f"{'task':12}{'':12}{'items':>6}{'items/s':>10}{'accuracy':>10}{'as ours':>9}{'x torch':>9}"]
    for row in report["rows"]:
        ratio = f"{report['ratio'][row['task']]:.2f}" if row["side"] == OURS and report["ratio"] else ""
        lines.append(
            f"{row['task']:12}{row['side']:12}{row['items']:>6}{row['items_per_second']:>10.2f}"
            f"{row['accuracy']:>10.1%}{row['as_ours']:>9}{ratio:>9}"
        )
    return lines
