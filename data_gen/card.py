"""The data set card: Markdown with Hugging Face's front matter, written next to the shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_gen.events import KINDS
from duplex_jax.files import atomic_write


def write_card(out: Path, dataset: Mapping[str, Any]) -> None:
    """Writes OUT/README.md from the contents of dataset.json; deterministic."""
    recipe = dataset["recipe"]
    made = {name: c for name, c in dataset["categories"].items() if c["timelines"]}
    total = sum(c["timelines"] for c in made.values())
    ending = ".jsonl.zst" if recipe["compress"] else ".jsonl"
    lines = [
        "---",
        "pretty_name: Duplex dialogues",
        "license: other",
        "license_name: that-of-the-source-dialogues",
        "task_categories:",
        "- text-generation",
        "tags:",
        "- duplex",
        "- dialogue",
        "size_categories:",
        f"- {_size(total)}",
        "configs:",
    ]
    for name in made:
        lines += [f"- config_name: {name}", f'  data_files: "{name}/*{ending}"']
    lines += [
        "---",
        "",
        "# Duplex dialogues",
        "",
        f"{total:,} conversations as slice pairs (2 seconds of both sides each), made from {dataset['dialogues']:,} "
        "turn-based dialogues after Duplex-UltraChat (Zhang et al., *Beyond the Turn-Based Game*). Silence is "
        "`<idle>`. User messages are cut into 4-6 words, assistant messages into 10 tokens.",
        "",
        "| category | conversations | average slice pairs | left out |",
        "|---|---:|---:|---:|",
    ]
    for name, c in dataset["categories"].items():
        average = f"{c['pairs'] / c['timelines']:.1f}" if c["timelines"] else "-"
        lines.append(f"| {name} | {c['timelines']:,} | {average} | {sum(c['left_out'].values()):,} |")
    rewriter = recipe["rewriter"]
    by = (
        "fixed templates" if rewriter == "template" else f"{rewriter['model']} at temperature {rewriter['temperature']}"
    )
    lines += [
        "",
        "## How it was made",
        "",
        f"`duplex-jax generate` {recipe['versions']['duplex-jax']}, seed {recipe['seed']}; interruptions written by "
        f"{by}; assistant messages cut by the tokenizer {Path(recipe['tokenizer_name']).name}; at most "
        f"{recipe['max_idle_pairs']} silent pairs between turns. {dataset['bad_rows']:,} rows of the input were no "
        "dialogues (`bad_rows.tsv`). The whole recipe is in `recipe.json`, each shard's rows and hash in its manifest.",
        "",
        "## A row",
        "",
        '`{"output": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...], "id", "category", '
        '"source_ids", "events", "meta"}`. `source_ids` are the dialogues it was made from. `meta.messages` says which '
        "pairs hold which message. `events` name pairs:",
        "",
        *(f"- `{kind}`: {text}" for kind, text in KINDS.items()),
        "",
        "## Limits",
        "",
        "The words are those of the source dialogues, written or generated, not transcribed speech; the time of each "
        "slice is its place, not a measurement. The licence is that of the source dialogues"
        + ("." if rewriter == "template" else " and of the model that wrote the interruptions."),
        "",
    ]
    with atomic_write(out / "README.md") as f:
        f.write("\n".join(lines))


def _size(rows: int) -> str:
    """Hugging Face's name for a number of rows."""
    limits = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for limit, name in limits if rows < limit), "1M<n<10M" if rows < 10_000_000 else "10M<n<100M")
