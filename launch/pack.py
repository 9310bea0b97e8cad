"""`duplex-jax pack`: conversations to fixed-length rows, once, before training."""

import time

from absl import flags

from data_gen.progress import Progress
from launch import app

_INPUT = app.path_flag("input", None, "Timelines or chats: a .jsonl file, or a folder of them.", required=True)
_OUT = app.path_flag("out", None, "Folder to make.", required=True)
_MODEL = app.path_flag(
    "model", None, "Whose tokenizer: a folder, a .gguf file, hf:owner/name or a name.", required=True
)
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens a row.")
_TEMPLATE = flags.DEFINE_string("template", "", "minicpm, chatml or compact; the tokenizer's own by default.")
_LATE = flags.DEFINE_float(
    "late", 0.0, "Share of a timeline's answers that begin one to four pairs late, behind silence that is no target.",
    0.0, 1.0,
)  # fmt: skip
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that encode.", lower_bound=1)


def main(argv: list[str]) -> int | None:
    """Packs, and prints what came of it."""
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
