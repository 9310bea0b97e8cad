"""`duplex-jax generate`: Duplex-UltraChat timelines from turn-based dialogues; checks and describes a data set too."""

import os

from absl import flags

from data_gen.dialogues import count_dialogues
from data_gen.engines import make_engine
from data_gen.pipeline import generate, make_recipe, parse_shares
from data_gen.unit import Context, make_unit
from duplex_jax.errors import UserError
from duplex_jax.tokenizer import resolve_tokenizer
from launch import app

EXIT_UNFINISHED = 3

_INPUT = flags.DEFINE_string("input", None, "Dialogues: a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a folder.")
_OUT = flags.DEFINE_string("out", None, "Folder of the data set; a run that was stopped goes on there.")
_CATEGORIES = flags.DEFINE_list("categories", ["paper"], "Categories, or 'paper' (the six) or 'all' (the extras too).")
_SHARES = flags.DEFINE_list("shares", [], "NAME=NUMBER,...: timelines for each source dialogue; Table 1's by default.")
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same data set.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "smollm2-135m-instruct", "Cuts assistant messages: a model's folder, .gguf file or name."
)
_IDLE = flags.DEFINE_integer("max_idle_pairs", 3, "Most silent pairs between turns; 0 as in the paper.", lower_bound=0)
_BLOCK = flags.DEFINE_integer("block", 500, "Source dialogues of a shard.", lower_bound=5)
_LIMIT = flags.DEFINE_integer("limit", 0, "Take only so many dialogues; 0 for all.", lower_bound=0)
_ZSTD = flags.DEFINE_boolean("zstd", False, "Compress the shards (.jsonl.zst).")
_BAD = flags.DEFINE_float("max_bad_fraction", 0.05, "More bad rows than this stop the run.", 0.0, 1.0)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Local processes.", lower_bound=1)
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", "ray"], "Where the work runs.")


def main(argv: list[str]) -> int | None:
    app.no_arguments(argv)
    return _generate()


def _generate() -> int:
    if not _INPUT.value or not _OUT.value:
        raise UserError("generate needs --input=DIALOGUES and --out=FOLDER (or --check=FOLDER, --stats=FOLDER)")
    shares = parse_shares(_CATEGORIES.value, _SHARES.value)
    total = count_dialogues(_INPUT.value, _LIMIT.value)
    tokenizer = resolve_tokenizer(_TOKENIZER.value)
    recipe = make_recipe(
        _INPUT.value, shares, tokenizer, _TOKENIZER.value,
        seed=_SEED.value, max_idle_pairs=_IDLE.value, block=_BLOCK.value, limit=_LIMIT.value, compress=_ZSTD.value,
    )  # fmt: skip
    context = Context(tokenizer, recipe.seed, recipe.max_idle_pairs, None, recipe.compress)
    engine = make_engine(_ENGINE.value, make_unit, context, _WORKERS.value)
    try:
        summary = generate(_INPUT.value, _OUT.value, recipe, engine, None, _BAD.value, total)
    finally:
        engine.close()
    return 0


def start() -> None:
    app.run(main)


if __name__ == "__main__":
    start()
