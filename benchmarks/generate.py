"""`duplex-jax bench generate`: speed and memory of data generation."""
# ruff: noqa: SIM905 - word lists read best as text

import json
import multiprocessing
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from data_gen.categories import CATEGORIES, PAPER
from data_gen.dialogues import read_dialogues
from data_gen.engines import Processes, make_engine
from data_gen.pipeline import generate, make_recipe
from data_gen.stats import measure
from data_gen.table1 import TOTAL
from data_gen.unit import Context, make_unit
from duplex_jax.tokenizer import Tokenizer, resolve_tokenizer

PAPER_CORES = 64
_WORDS = (
    "the a of and to in is that it was for on are as with they be at this have from or one had by but not what all "
    "were we when your can said there use an each which she how their if will up other about out many then them these "
    "so some her would make like him into time has look two more write go see number way could people my than first "
    "water been call who oil its now find long down day did get come made may part over sound place year live back "
    "give most very after thing our just name good sentence man think say great where help through much before line "
    "right too mean old any same tell boy follow came want show also around form three small set put end does another"
).split()


def bench_generate(
    input: str = "",
    dialogues: int = 400,
    small: int = 1620,
    large: int = 16200,
    memory_share: float = 0.1,
    workers: int = 2,
    tokenizer: str = "smollm2-135m-instruct",
) -> dict[str, Any]:
    """Measures timelines and tokens per second of CPU time on one core, and peak memory for two input sizes.

    Rates are per second of CPU time, so that other programs do not count, and cover whole runs: reading, making,
    hashing and writing. Tokens are those of the training template, including silence and markers.

    Args:
        input: dialogues, repeated as often as needed; by default synthetic ones of UltraChat's length.
        dialogues: number of dialogues for the rates.
        small: number of dialogues for the first measurement of memory.
        large: number of dialogues for the second.
        memory_share: fraction of Table 1's timelines made in those two.
        workers: local processes in those two.
        tokenizer: cuts the assistant's messages.

    Returns:
        `categories` and `table_1` with rates, `hours_for_table_1_on_64_cores`, `memory`, `memory_growth` (peak of the
        large input divided by that of the small one), and the machine.
    """
    cutter = resolve_tokenizer(tokenizer)
    result: dict[str, Any] = {"machine": f"{platform.machine()}, Python {platform.python_version()}"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = _write_dialogues(folder / "d.jsonl", input, dialogues)
        result["categories"] = {
            category: _rates(path, folder / category, {category: CATEGORIES[category].share}, cutter)
            for category in CATEGORIES
        }
        mixed = _rates(path, folder / "mixed", {c: CATEGORIES[c].share for c in PAPER}, cutter)
        result["table_1"] = mixed
        # Their dialogues may be longer than ours, so the hours are estimated from tokens.
        tokens = TOTAL.dialogues * TOTAL.tokens
        result["hours_for_table_1_on_64_cores"] = round(
            tokens / mixed["tokens_per_core_second"] / PAPER_CORES / 3600, 2
        )
        result["memory"] = []
        for number in (small, large):
            many = _write_dialogues(folder / f"{number}.jsonl", input, number)
            context = multiprocessing.get_context("spawn")
            receive, send = context.Pipe(duplex=False)
            args = (many, folder / f"memory-{number}", memory_share, workers, tokenizer, send)
            process = context.Process(target=_measure_memory, args=args)
            process.start()
            result["memory"].append({"dialogues": number, "workers": workers, **receive.recv()})
            process.join()
    peaks = [m["main_mib"] + m["worker_mib"] for m in result["memory"]]
    result["memory_growth"] = round(peaks[1] / peaks[0], 3)
    return result


def _rates(path: Path, out: Path, shares: Mapping[str, float], tokenizer: Tokenizer) -> dict[str, float]:
    recipe = make_recipe(path, shares, tokenizer, "bench", max_idle_pairs=3)
    engine = make_engine("local", make_unit, Context(tokenizer, max_idle_pairs=3), 1)
    start = time.process_time()
    summary = generate(path, out, recipe, engine)
    seconds = time.process_time() - start
    timelines = sum(summary.rows.values())
    tokens = sum(lengths.tokens for p in out.rglob("*.jsonl") for lengths in measure(tokenizer, p)[0].values())
    return {
        "timelines_per_core_second": round(timelines / seconds, 1),
        "pairs_per_core_second": round(sum(summary.pairs.values()) / seconds, 1),
        "tokens_per_core_second": round(tokens / seconds, 1),
        "source_dialogues_per_core_second": round(summary.dialogues / seconds, 1),
    }


def _measure_memory(path: Path, out: Path, share: float, workers: int, tokenizer: str, result: Any) -> None:
    """Runs the generator in its own process and sends its peak memory and its largest worker's, in MiB."""
    cutter = resolve_tokenizer(tokenizer)
    recipe = make_recipe(path, {c: share * CATEGORIES[c].share for c in PAPER}, cutter, "bench", max_idle_pairs=3)
    engine = make_engine("local", make_unit, Context(cutter, max_idle_pairs=3), workers)
    start = time.monotonic()
    summary = generate(path, out, recipe, engine)
    pids = engine.pids() if isinstance(engine, Processes) else []
    result.send(
        {
            "timelines": sum(summary.rows.values()),
            "seconds": round(time.monotonic() - start, 1),
            "main_mib": _peak_mib("self"),
            "worker_mib": max((_peak_mib(str(pid)) for pid in pids), default=0.0),
        }
    )
    engine.close()


def _peak_mib(pid: str) -> float:
    """Peak memory of a process since its start (Linux), in MiB; its parent's does not count."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def _write_dialogues(path: Path, source: str, number: int) -> Path:
    """Writes `number` dialogues in UltraChat's layout, with a second answer to each query for regenerations."""
    with open(path, "w", encoding="utf-8") as f:
        for i, data in enumerate(islice(_repeated(source) if source else _made_up(), number)):
            again = [f"Once more. {answer}" for answer in data[1::2]]
            f.write(json.dumps({"id": str(i), "data": data, "again": again}, ensure_ascii=False) + "\n")
    return path


def _repeated(source: str) -> Iterator[list[str]]:
    return cycle([[text for r in d.rounds for text in r] for d in read_dialogues(source, lambda *_: None)])


def _made_up() -> Iterator[list[str]]:
    """Synthetic dialogues of UltraChat's size: 3-4 rounds, queries of 20 words, answers of 280."""
    rng = random.Random(0)

    def text(sentences: int, end: str) -> str:
        return " ".join(" ".join(rng.choices(_WORDS, k=14)).capitalize() + end for _ in range(sentences))

    while True:
        yield [text(*((2, "?") if i % 2 == 0 else (20, "."))) for i in range(2 * rng.randint(3, 4))]
