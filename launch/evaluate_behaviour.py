"""`duplex-jax evaluate behaviour`: when a model speaks and when it is silent, measured on held-out timelines."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from absl import flags

from data_gen.progress import Progress
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.replay import Replay
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.evaluate import behaviour_report as reports
from duplex_jax.evaluate import behaviour_run as runs
from duplex_jax.evaluate.behaviour import DEGENERATE
from duplex_jax.evaluate.plots import NEED, can_draw
from duplex_jax.evaluate.reports import made_with, publish, read_beside
from launch import app

_MODEL = app.path_flag(
    "model", None, f"Model: a folder, a file, hf:owner/name, a known name, or one of {', '.join(DEGENERATE)}."
)
_DATA = app.path_flag("data", None, "Held-out timelines with events: a JSONL file, or a folder of JSONL files.")
_OUT = app.path_flag("out", None, "Output folder; an interrupted run resumes from it.")
_TEMPLATE = app.template_flag()
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Random seeds; every conversation is replayed once per seed.")
_IDLE_BIAS = flags.DEFINE_list(
    "idle_bias", ["0"], "Biases on <idle> for the trade-off curve, on top of the model's own. The table shows 0, or "
    "the first if 0 is absent; the others use one seed each.",
)  # fmt: skip
_LIMIT = flags.DEFINE_integer(
    "limit", 0, "Maximum number of conversations, taken in turn from each category; 0 for all.", 0
)
_ROWS = flags.DEFINE_integer("rows", 8, "Number of conversations run at once (batch size).", lower_bound=1)
_CAPACITY = flags.DEFINE_integer("capacity", None, "Maximum context length in tokens; 4096 by default.", lower_bound=1)
_SAMPLING = app.SamplingFlags(__name__)
_SYSTEM = flags.DEFINE_string("system", None, "System prompt; none by default.")
_KEEP_IDLE = flags.DEFINE_integer(
    "keep_idle", 1, "Number of consecutive silent pairs kept in the context; -1 keeps all.", -1
)
_DORMANT = flags.DEFINE_bool("dormant", False, "Never speak unprompted: a silent user slice is answered with silence.")
_SLICE_SECONDS = flags.DEFINE_float("slice_seconds", 2.0, "Length of a time slice in seconds.", lower_bound=0.1)
_BESIDE = app.paths_flag("beside", "Output folders of other runs on the same data, to include in the table.")


def main(argv: list[str]) -> None:
    """Reads the data, runs the missing replays, scores, and writes the report."""
    app.no_arguments(argv)
    if not (_MODEL.value and _DATA.value and _OUT.value):
        raise UserError("evaluate behaviour needs --model=M, --data=TIMELINES and --out=FOLDER")
    seeds = app.numbers("seeds", _SEEDS.value, int)
    biases = app.numbers("idle_bias", _IDLE_BIAS.value, float)
    main_bias = 0.0 if 0.0 in biases else biases[0]
    sampling = _SAMPLING.sampling()
    out = Path(_OUT.value)
    data = runs.read_held_out(_DATA.value, _LIMIT.value)
    beside = [read_beside(folder, "behaviour", {"": data.sha256}) for folder in _BESIDE.value]
    app.claim(out)
    if _MODEL.value in DEGENERATE:
        described = {_MODEL.value: reports.describe(data, _degenerate(data, _MODEL.value), _SLICE_SECONDS.value)}
        curve: list[dict[str, Any]] = []
        about = {"weights": None}
    else:
        described, curve, about = _ask(_MODEL.value, data, out, sampling, seeds, biases, main_bias)
    for other in beside:
        name = other["model"]
        described.setdefault(name if name != _MODEL.value else f"{name} (beside)", other["assistants"][name])
    named = [name for name in described if name != _MODEL.value]
    for name in DEGENERATE:
        if name not in described:
            described[name] = reports.describe(data, _degenerate(data, name), _SLICE_SECONDS.value)
    chosen = [data.timelines[n] for n in data.chosen]
    without = sum(not runs.has_events(t) for t in chosen)
    report: dict[str, Any] = {
        "what": "behaviour",
        "model": _MODEL.value,
        "weights": about["weights"],
        **made_with("behaviour", "jax"),
        "settings": {
            "seeds": seeds, "idle_bias": main_bias, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k, "slice_seconds": _SLICE_SECONDS.value, "system": _SYSTEM.value,
            "keep_idle": _KEEP_IDLE.value, "dormant": _DORMANT.value, "template": _TEMPLATE.value,
            "model_idle_bias": about.get("model_idle_bias"),
        },
        "data": {
            "path": _DATA.value, "sha256": data.sha256, "conversations": len(data.timelines), "scored": len(chosen),
            "slice_pairs": sum(len(t.pairs) for t in chosen),
            "without_events": without,
        },
        "beside": named,
        "assistants": described,
        "curve": curve,
    }  # fmt: skip
    section = dataclasses.replace(reports.section(report), figures=reports.figures(report))
    publish(report, section, out)
    if not can_draw():
        print(NEED)


def _degenerate(data: runs.HeldOut, name: str) -> Any:
    return runs.degenerate_counts(data, name, _SLICE_SECONDS.value)


def _ask(
    name: str,
    data: runs.HeldOut,
    out: Path,
    sampling: Sampling,
    seeds: list[int],
    biases: list[float],
    main_bias: float,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Runs the missing replays; returns the model's description, the curve, and the model's settings."""
    from duplex_jax.checkpoint.registry import load_model

    app.use_compilation_cache()
    model = load_model(name, dtype="auto", template=_TEMPLATE.value)
    settings = runs.model_settings(name, model)
    runs.check_settings(out, settings | {
        "data": data.sha256,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        "system": _SYSTEM.value, "keep_idle": _KEEP_IDLE.value, "dormant": _DORMANT.value,
        "capacity": _CAPACITY.value,
    })  # fmt: skip

    @functools.cache
    def engine() -> Engine:
        rows = min(_ROWS.value, len(data.chosen))
        return Engine(model.model, model.template, rows=rows, capacity=_CAPACITY.value)

    samplings = {bias: Sampling(sampling.temperature, sampling.top_p, sampling.top_k, bias) for bias in biases}
    forced = runs.Records(out / "forced.jsonl")
    with Progress("conversations, forced", len(data.chosen)) as progress:
        runs.ask_forced(engine, data, list(samplings.values()), _SYSTEM.value, forced, progress.add)
    replays: dict[float, list[runs.Records]] = {}
    slices = sum(len(data.timelines[n].pairs) + runs.TAIL for n in data.chosen)
    for bias in [main_bias, *(b for b in biases if b != main_bias)]:
        for seed in seeds if bias == main_bias else seeds[:1]:
            records = runs.Records(out / "replays" / f"idle_bias{bias:+g}_seed{seed}.jsonl")
            replays.setdefault(bias, []).append(records)
            options = Replay(
                sampling=samplings[bias], system=_SYSTEM.value, dormant=_DORMANT.value,
                keep_idle=None if _KEEP_IDLE.value < 0 else _KEEP_IDLE.value,
            )  # fmt: skip
            done = sum(len(data.timelines[n].pairs) + runs.TAIL for n in data.chosen if n in records.rows)
            with Progress(f"slices, idle_bias {bias:+g}, seed {seed}", slices - done) as progress:
                runs.ask_replays(engine, data, options, seed, records, progress.add)
    described = {
        bias: reports.describe(
            data, runs.recorded_counts(data, found, forced, bias, _SLICE_SECONDS.value), _SLICE_SECONDS.value
        )
        for bias, found in replays.items()
    }
    curve = [reports.curve_point(bias, len(replays[bias]), described[bias]) for bias in sorted(biases)]
    return {name: described[main_bias]}, curve, settings


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
