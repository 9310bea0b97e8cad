"""`duplex-jax generate`: makes Duplex-UltraChat timelines from turn-based dialogues, and checks data sets.

Without dialogues, it can have a model write some.
"""

import contextlib
import json
import os
from pathlib import Path

from absl import flags

from data_gen.batch import BatchWriter, collect, submit
from data_gen.categories import CATEGORIES
from data_gen.check import check_dataset
from data_gen.converse import converse
from data_gen.converse import make_recipe as make_converse_recipe
from data_gen.dialogues import Selection, count_dialogues
from data_gen.engines import make_engine
from data_gen.pipeline import Summary, generate, make_recipe, parse_shares
from data_gen.progress import Progress
from data_gen.rewriter import Sampling
from data_gen.stats import read_stats, table, write_histograms
from data_gen.transitions import Transitions
from data_gen.unit import Context, make_unit
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, check_writable
from duplex_jax.llm.cache import ReplyCache
from duplex_jax.llm.client import Client
from duplex_jax.tokenizer import resolve_tokenizer
from launch import app
from launch.requests import RequestFlags

EXIT_PROBLEMS = 1
EXIT_UNFINISHED = 3

_INPUT = app.path_flag(
    "input", None, "Source dialogues: a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a folder."
)
_OUT = app.path_flag("out", None, "Output folder of the data set; an interrupted run resumes from it.")
_CHECK = app.path_flag("check", None, "Data set to check against every rule of the format and of its categories.")
_STATS = app.path_flag("stats", None, "Data set to describe: Table 1 next to the paper's, with histograms in --out.")
_CONVERSE = flags.DEFINE_integer(
    "converse", None, "Number of dialogues in which --rewriter_model answers everyday questions, to --out=FILE.jsonl.",
    lower_bound=1,
)  # fmt: skip
_WRITE = flags.DEFINE_integer(
    "write", None, "Number of dialogues that --model writes itself, both sides, to OUT/spoken and OUT/plain.",
    lower_bound=1,
)  # fmt: skip
_WRITER = app.path_flag(
    "model", None, "With --write: the chat model; a folder, a file, hf:owner/name, or a known name."
)
_ROWS = flags.DEFINE_integer(
    "rows", 32, "With --write: number of dialogues written at once (batch size).", lower_bound=1
)

_CATEGORIES = flags.DEFINE_list(
    "categories", ["paper"], "Category names, 'paper' for the six of the paper, or 'all' to add the extra ones."
)
_SHARES = flags.DEFINE_list(
    "shares", [], "NAME=NUMBER,...: timelines per source dialogue; by default the paper's Table 1."
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed; the same seed gives the same data set.")
_TOKENIZER = app.path_flag(
    "tokenizer",
    "smollm2-135m-instruct",
    "Tokenizer that cuts assistant messages: a model folder, a .gguf file or a known name.",
)
_IDLE = flags.DEFINE_integer(
    "max_idle_pairs", 3, "Maximum number of silent pairs between turns; the paper has 0.", lower_bound=0
)
_BLOCK = flags.DEFINE_integer("block", 500, "Number of source dialogues per shard.", lower_bound=5)
_LIMIT = flags.DEFINE_integer("limit", 0, "Maximum number of source dialogues; 0 for all.", lower_bound=0)
_ZSTD = flags.DEFINE_boolean("zstd", False, "Compress the shards (.jsonl.zst).")
_BAD = flags.DEFINE_float(
    "max_bad_fraction", 0.05, "Stop if more than this share of the input rows is invalid.", 0.0, 1.0
)
_SPOKEN_WORDS = flags.DEFINE_integer(
    "spoken_words", 0, "End a dialogue before its first message that is longer than this many words, has several "
    "lines, or is not ASCII; 0 keeps all.", lower_bound=0,
)  # fmt: skip
_SPOKEN = flags.DEFINE_float(
    "spoken", 0.0, "Share of timelines whose user text looks like speech recognition or chat: lower case, little "
    "punctuation, fillers, restarts, typos.", 0.0, 1.0,
)  # fmt: skip
_FOLD = flags.DEFINE_string(
    "fold",
    "",
    "K/N keeps only dialogues whose id falls in part K of N; -K/N keeps all others. Splits by source dialogue.",
)
_WORKERS = flags.DEFINE_integer(
    "workers", os.cpu_count() or 1, "Number of local processes; by default one per core.", lower_bound=1
)
_ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "ray"], "local: processes on this machine. ray: a Ray cluster."
)

_TRANSITIONS = flags.DEFINE_enum(
    "transitions",
    "paper",
    Transitions.NAMES,
    "Sentences with which users interrupt. paper: those of the paper. spoken: short ones. both: a mix.",
)
_REWRITER = flags.DEFINE_enum(
    "rewriter",
    "template",
    ["template", "openai"],
    "Writes the text that the source dialogues lack: templates, or a model behind an OpenAI-compatible API.",
)
_MODEL = flags.DEFINE_string("rewriter_model", None, "Name of the model at --base_url.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Sampling temperature of the rewriter; 0.7 by default, 0.2 with --converse.", lower_bound=0.0
)
_REQUESTS = RequestFlags(
    __name__, "base_url", "Number of times to ask for a text until a reply is usable.",
    "OUT/replies.sqlite, with --converse OUT.replies.sqlite,",
)  # fmt: skip
_BATCH = flags.DEFINE_enum(
    "batch",
    None,
    ["write", "submit", "collect"],
    "Use OpenAI batch files in OUT/batch instead of live requests: write, submit or collect them.",
)


def main(argv: list[str]) -> int:
    app.no_arguments(argv)
    if _CHECK.value:
        return _check(Path(_CHECK.value))
    if _STATS.value:
        return _stats(Path(_STATS.value))
    if _CONVERSE.value:
        return _converse(_CONVERSE.value)
    if _WRITE.value:
        return _write(_WRITE.value)
    if not _OUT.value or (not _INPUT.value and _BATCH.value not in ("submit", "collect")):
        raise UserError("generate needs --input=DIALOGUES and --out=FOLDER (or --check=FOLDER, or --stats=FOLDER)")
    out = Path(_OUT.value)
    if _BATCH.value in ("submit", "collect"):
        app.claim(out)
    if _BATCH.value == "submit":
        for name in submit(out / "batch", _REQUESTS.url.value):
            print(f"batch {name} started; --batch=collect fetches its replies")
        return 0
    if _BATCH.value == "collect":
        return _collect(out)
    return _generate(Path(_INPUT.value or ""), out)


def _cache(out: Path) -> ReplyCache:
    return ReplyCache(_REQUESTS.cache.value or out / "replies.sqlite")


def _sampling(why: str, temperature: float) -> Sampling:
    """The model's sampling settings, from the flags.

    Raises:
        UserError: no model is named, or a budget is given without prices.
    """
    if not _MODEL.value:
        raise UserError(f"{why} needs --rewriter_model=NAME")
    _REQUESTS.check()
    return Sampling(_MODEL.value, temperature if _TEMPERATURE.value is None else _TEMPERATURE.value, _SEED.value)


def _converse(number: int) -> int:
    if not _OUT.value:
        raise UserError("--converse needs --out=FILE.jsonl, and --base_url and --rewriter_model of a chat model")
    if _INPUT.value or _BATCH.value:
        raise UserError("--converse queries a model live and reads no dialogues; leave out --input and --batch")
    out = Path(_OUT.value)
    if out.suffix != ".jsonl":
        raise UserError(f"--out={out}: --converse writes one file of dialogues; give a name that ends in .jsonl")
    recipe = make_converse_recipe(number, _SEED.value, _sampling("--converse", 0.2), _REQUESTS.attempts.value)
    check_writable(out)
    with contextlib.ExitStack() as stack:
        cache = ReplyCache(_REQUESTS.cache.value or out.with_suffix(".replies.sqlite"))
        stack.callback(cache.close)
        client = _REQUESTS.client(cache, stack)
        summary = converse(out, recipe, client, _REQUESTS.concurrency.value)
    for line in client.report.lines():
        print(line)
    if summary.stopped or summary.unfinished:
        why = f": {summary.stopped}" if summary.stopped else ""
        print(
            f"unfinished{why}; {summary.unfinished} dialogues wait. Replies are kept; run the command again to resume."
        )
        return EXIT_UNFINISHED
    print(
        f"{out}: {summary.dialogues:,} dialogues of {summary.rounds:,} rounds from {summary.openings:,} openings; "
        f"ended by a refused answer: {_listed(summary.refused)}; {summary.empty:,} of them at once, and not kept"
    )
    return 0


def _write(count: int) -> int:
    if not _OUT.value or not _WRITER.value:
        raise UserError("--write needs --out=FOLDER and --model=MODEL, the chat model that writes")
    from duplex_jax.checkpoint.registry import load_model
    from duplex_jax.decode.engine import Engine
    from launch.self_write import self_write

    out = Path(_OUT.value)
    app.claim(out)
    app.use_compilation_cache()
    model = load_model(_WRITER.value)
    # A few more rows for the prompts that all dialogues of a kind begin with.
    rows, capacity = _ROWS.value + 4, min(2048, model.config.max_position_embeddings)
    engine = Engine(model.model, model.template, rows=rows, capacity=capacity, max_slice_tokens=12)
    done = 0
    with Progress("dialogues", count) as progress:
        for tried in self_write(engine, out, count, _SEED.value, _ROWS.value):
            progress.add(tried - done)
            done = tried
    blocks = [json.loads(path.read_text()) for path in sorted((out / "blocks").glob("*.json"))]
    refused: dict[str, int] = {}
    for block in blocks:
        for reason, number in block["refused"].items():
            refused[reason] = refused.get(reason, 0) + number
    print(f"{out}: {sum(b['kept'] for b in blocks):,} dialogues; refused: {_listed(refused)}")
    return 0


def _generate(dialogues: Path, out: Path) -> int:
    shares = parse_shares(_CATEGORIES.value, _SHARES.value)
    check_writable(out / "recipe.json")
    sampling = None
    if _REWRITER.value == "openai":
        sampling = _sampling("--rewriter=openai", 0.7)
    elif _BATCH.value:
        raise UserError("--batch needs --rewriter=openai; the template rewriter sends no requests")
    total = count_dialogues(dialogues, _LIMIT.value)
    tokenizer = resolve_tokenizer(_TOKENIZER.value)
    recipe = make_recipe(
        dialogues, shares, tokenizer, _TOKENIZER.value,
        seed=_SEED.value, sampling=sampling, attempts=_REQUESTS.attempts.value, max_idle_pairs=_IDLE.value,
        block=_BLOCK.value, limit=_LIMIT.value, compress=_ZSTD.value, transitions=_TRANSITIONS.value,
        selection=Selection(_SPOKEN_WORDS.value, _FOLD.value), spoken=_SPOKEN.value,
    )  # fmt: skip
    context = Context(
        tokenizer, recipe.seed, recipe.max_idle_pairs, sampling, recipe.compress, recipe.transitions, recipe.spoken
    )
    answers: Client | BatchWriter | None = None
    with contextlib.ExitStack() as stack:
        engine = make_engine(_ENGINE.value, make_unit, context, _WORKERS.value)
        stack.callback(engine.close)
        if sampling:
            cache = _cache(out)
            stack.callback(cache.close)
            answers = BatchWriter(cache, _REQUESTS.attempts.value) if _BATCH.value else _REQUESTS.client(cache, stack)
        summary = generate(dialogues, out, recipe, engine, answers, _BAD.value, total)
    _print(summary)
    if isinstance(answers, Client):
        for line in answers.report.lines():
            print(line)
        with atomic_write(out / "rewriter.json") as f:
            json.dump(answers.report.as_json(), f, indent=1)
    if isinstance(answers, BatchWriter) and answers.waiting:
        files = answers.write(out / "batch")
        print(f"{len(answers.waiting):,} requests are in {len(files)} files of {out / 'batch'}; --batch=submit next")
        return 0
    if summary.stopped or summary.unfinished:
        why = f": {summary.stopped}" if summary.stopped else ""
        print(f"unfinished{why}; {summary.unfinished} shards wait. Replies are kept; run the command again to resume.")
        return EXIT_UNFINISHED
    return 0


def _collect(out: Path) -> int:
    cache = _cache(out)
    counts = collect(out / "batch", _REQUESTS.url.value, cache)
    cache.close()
    print(f"{counts.pop('replies'):,} replies are in the cache; batches: " + _listed(counts))
    print("--batch=write makes what can be made with them, and writes what is still to be asked")
    return 0


def _print(summary: Summary) -> None:
    print(f"{summary.dialogues:,} dialogues read, {summary.bad_rows:,} bad rows left out (bad_rows.tsv)")
    for name in (name for name in CATEGORIES if name in summary.rows):
        left_out = f"; left out: {_listed(summary.left_out[name])}" if summary.left_out[name] else ""
        print(f"  {name:24}{summary.rows[name]:>10,} timelines{left_out}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x {n:,}" for name, n in counts.items()) or "none"


def _check(folder: Path) -> int:
    report = check_dataset(folder, _TOKENIZER.value if flags.FLAGS["tokenizer"].present else None, _WORKERS.value)
    for problem in report.problems:
        print(problem)
    more = report.number - len(report.problems)
    if more > 0:
        print(f"and {more:,} more")
    print(f"{report.timelines:,} timelines in {report.shards:,} files: {report.number:,} problems")
    for note in report.notes:
        print(note)
    return EXIT_PROBLEMS if report.number else 0


def _stats(folder: Path) -> int:
    stats = read_stats(folder, _TOKENIZER.value, _WORKERS.value)
    print("\n".join(table(stats)))
    target = Path(_OUT.value) if _OUT.value else folder
    with atomic_write(target / "stats.json") as f:
        json.dump(stats.as_json(), f, indent=1)
    print(f"wrote {target / 'stats.json'}" + write_histograms(stats, target / "stats.png"))
    return 0


def start() -> None:
    app.run(main)


if __name__ == "__main__":
    start()
