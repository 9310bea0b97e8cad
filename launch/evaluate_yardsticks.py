"""`duplex-jax evaluate yardsticks`: turn-taking on FLEXI's and TurnSense's sentences, as written and bare."""

import functools
from pathlib import Path
from typing import Any

from absl import flags

from data_gen.progress import Progress
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.replay import Replay
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.evaluate import behaviour_run as runs
from duplex_jax.evaluate import yardsticks
from duplex_jax.evaluate.reports import made_with, publish
from launch import app

_MODEL = app.path_flag("model", None, "Model: a folder, a file, hf:owner/name, or a known name.")
_DATA = app.path_flag("data", None, "Folder with flexi/*.jsonl and turnsense.jsonl.")
_OUT = app.path_flag("out", None, "Output folder; an interrupted run resumes from it.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Random seeds; every conversation is replayed once per seed.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Maximum number of sentences per scenario; 0 for all.", 0)
_ROWS = flags.DEFINE_integer("rows", 16, "Number of conversations run at once (batch size).", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Sampling temperature; 0 is greedy.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float(
    "top_p", 0.8, "Nucleus sampling: keep the most probable tokens up to this total probability.", 0.0, 1.0
)
_IDLE_BIAS = flags.DEFINE_float("idle_bias", 0.0, "Added to the logit of <idle>, on top of the model's own bias.")


def main(argv: list[str]) -> None:
    """Reads the data, runs the missing replays, scores, and writes the report."""
    app.no_arguments(argv)
    if not (_MODEL.value and _DATA.value and _OUT.value):
        raise UserError("evaluate yardsticks needs --model=M, --data=FOLDER and --out=DIR")
    seeds = app.numbers("seeds", _SEEDS.value, int)
    sampling = Sampling(_TEMPERATURE.value, _TOP_P.value, idle_bias=_IDLE_BIAS.value)
    out = Path(_OUT.value)
    items, data = yardsticks.read_yardsticks(_DATA.value, _LIMIT.value)
    app.claim(out)
    replays, about = _ask(data, out, sampling, seeds)
    report: dict[str, Any] = {
        "what": "yardsticks",
        "model": _MODEL.value,
        "weights": about["weights"],
        **made_with("yardsticks", "jax"),
        "settings": {
            "seeds": seeds,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "idle_bias": sampling.idle_bias,
            "model_idle_bias": about["model_idle_bias"],
        },
        "data": {"path": _DATA.value, "sha256": data.sha256, "sentences": len(data.chosen)},
        "measures": yardsticks.describe(items, data.chosen, replays),
    }
    publish(report, yardsticks.section(report), out)


def _ask(
    data: runs.HeldOut, out: Path, sampling: Sampling, seeds: list[int]
) -> tuple[list[runs.Records], dict[str, Any]]:
    """Runs the missing replays; returns those of each seed, and the model's settings."""
    from duplex_jax.checkpoint.registry import load_model

    app.use_compilation_cache()
    model = load_model(_MODEL.value, dtype="auto")
    about = runs.model_settings(_MODEL.value, model)
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "idle_bias": sampling.idle_bias}
    runs.check_settings(out, about | sampled | {"data": data.sha256})

    @functools.cache
    def engine() -> Engine:
        rows = min(_ROWS.value, len(data.chosen))
        return Engine(model.model, model.template, rows=rows, capacity=1024)

    replays = []
    for seed in seeds:
        records = runs.Records(out / "replays" / f"seed{seed}.jsonl")
        missing = sum(len(data.timelines[n].pairs) + runs.TAIL for n in data.chosen if n not in records.rows)
        with Progress(f"slices, seed {seed}", missing) as progress:
            runs.ask_replays(engine, data, Replay(sampling), seed, records, progress.add)
        replays.append(records)
    return replays, about


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
