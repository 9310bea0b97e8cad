"""`duplex-jax pack`: packs conversations into fixed-length rows, once, before training."""

import time

from absl import flags

from data_gen.progress import Progress
from launch import app

_INPUT = app.path_flag("input", None, "Timelines or chats: a .jsonl file, or a folder of .jsonl files.", required=True)
_OUT = app.path_flag("out", None, "Output folder.", required=True)
_MODEL = app.path_flag(
    "model", None, "Model whose tokenizer to use: a folder, a .gguf file, hf:owner/name or a known name.", required=True
)
_LENGTH = flags.DEFINE_integer("length", 4096, "Length of a packed row in tokens.")
_TEMPLATE = flags.DEFINE_string("template", "", "minicpm, chatml or compact; by default the tokenizer's own.")
_LATE = flags.DEFINE_float(
    "late", 0.0, "Share of answers delayed by one to four silent pairs; that silence carries no loss.",
    0.0, 1.0,
)  # fmt: skip
_WORKERS = flags.DEFINE_integer("workers", 2, "Number of encoding processes.", lower_bound=1)


def main(argv: list[str]) -> int | None:
    """Packs, and prints a summary."""
    app.no_arguments(argv)
    from duplex_jax.data.dataset import Tally, write_packed

    app.claim(_OUT.value, beside=True)
    began = time.monotonic()
    with Progress("tokens") as shown:

        def progress(tally: Tally) -> None:
            shown.add(tally.tokens - shown.done, f"{tally.rows:,} rows")

        made = write_packed(
            _INPUT.value, _OUT.value, _MODEL.value, _LENGTH.value, _TEMPLATE.value, _WORKERS.value, progress,
            late=_LATE.value,
        )  # fmt: skip
    seconds = time.monotonic() - began
    print(
        f"{_OUT.value}: {made.rows:,} rows of {made.length}, {made.tokens:,} tokens in {made.documents:,} documents "
        f"({made.split:,} of {made.conversations:,} conversations split, {made.left_out:,} tokens left out)\n"
        f"efficiency {made.efficiency:.4f}, template {made.template}, hash {made.hash}, "
        f"{made.tokens / seconds:,.0f} tokens/s"
    )
    for name, tokens in zip(made.categories, made.category_tokens, strict=True):
        print(f"  {name:24}{tokens:>14,} tokens")
    return 0


def start() -> None:
    """Runs the job."""
    app.run(main)


if __name__ == "__main__":
    start()
