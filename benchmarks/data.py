"""`duplex-jax bench data`: rates of packing rows and of reading packed rows."""

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from duplex_jax.data import dataset, loader

TEXT = (
    "the river by our old house was wide and slow in summer but after rain it carried branches stones leaves and even "
    "small boats down to the mill where people waited for news about bridges weather markets music and each other"
)


def bench_data(
    input: str = "", model: str = "smollm2-135m-instruct", template: str = "", length: int = 4096,
    conversations: int = 3000, batch: int = 8, seconds: float = 10.0, workers: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Packs conversations and reads the rows back as training does: decoded, stacked and shuffled.

    Rates count tokens without padding. Reading is timed in this process alone (a thread prefetches) and with worker
    processes; 8 A100s of the paper's run consume 50,000 tokens/s.

    Args:
        input: timelines to pack; synthetic ones if empty.
        model, template: tokenizer and template of the rows.
        length: tokens per row.
        conversations: number of synthetic conversations.
        batch: rows per batch.
        seconds: how long each way of reading is timed.
        workers: processes for encoding and for reading.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = input or str(_made_up(Path(folder) / "made_up.jsonl", conversations))
        began = time.perf_counter()
        made = dataset.write_packed(source, Path(folder) / "packed", model, length, template, workers)
        packing = time.perf_counter() - began
        rows = dataset.PackedRows(Path(folder) / "packed")
        size = sum(s.bytes for s in made.shards)
        result: dict[str, Any] = {
            "rows": made.rows, "tokens": made.tokens, "packing_efficiency": made.efficiency,
            "bytes_per_token": size / made.tokens, "pack_tokens_per_second": made.tokens / packing,
        }  # fmt: skip
        for name, processes in (("read_one_process", 0), (f"read_{workers}_workers", workers)):
            batches = loader.training_batches([rows], size=batch, workers=processes)
            for _ in range(3):
                next(batches)
            tokens, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                tokens += int((next(batches).arrays["segment_ids"] > 0).sum())
            result[f"{name}_tokens_per_second"] = tokens / (time.perf_counter() - began)
        return result


def _made_up(path: Path, n: int) -> Path:
    rng, vocabulary = random.Random(0), TEXT.split()
    with open(path, "w") as f:
        for _ in range(n):
            output: list[dict[str, str]] = []
            for _ in range(rng.randint(2, 8)):
                talk = [(rng.randint(1, 4), "user"), (rng.randint(2, 20), "assistant"), (rng.randint(0, 3), "")]
                for slices, speaker in talk:
                    for _ in range(slices):
                        words = " " + " ".join(rng.choices(vocabulary, k=8))
                        for role in ("user", "assistant"):
                            output.append({"role": role, "content": words if role == speaker else "<idle>"})
            f.write(json.dumps({"output": output, "category": "basic"}) + "\n")
    return path
