"""`duplex-jax evaluate benchmark`: standard benchmarks by log-likelihood or by generation, turn-based and in slices."""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from duplex_jax.errors import UserError
from duplex_jax.evaluate import conversations, sandbox
from duplex_jax.evaluate.behaviour_run import check_settings, model_settings
from duplex_jax.evaluate.benchmarks import report as reports
from duplex_jax.evaluate.benchmarks.questions import TASKS, read_benchmark
from duplex_jax.evaluate.benchmarks.ways import WAYS
from duplex_jax.evaluate.reports import made_with, publish, read_beside
from launch import app

if TYPE_CHECKING:
    from duplex_jax.checkpoint.registry import LoadedModel

_LIKELY, _WRITTEN = TASKS["likelihood"], TASKS["generation"]
_ASKED = {"likelihood": tuple(WAYS), "generation": tuple(conversations.WAYS)}
_MODEL = app.path_flag("model", None, "Model: a folder, a file, hf:owner/name, or a known name.")
_FORM = flags.DEFINE_enum(
    "form", "likelihood", ["likelihood", "generation"],
    "likelihood: score the given choices. generation: score what the model writes.",
)  # fmt: skip
_TASKS = flags.DEFINE_list(
    "tasks", ["arc_easy", "arc_challenge", "hellaswag", "mmlu"],
    f"Tasks. likelihood: any of {', '.join(_LIKELY)}; generation: any of {', '.join(_WRITTEN)}.",
)  # fmt: skip
_WAYS = flags.DEFINE_list(
    "ways", ["turn_based", "duplex"],
    f"Prompting modes. likelihood: any of {', '.join(WAYS)}; generation: any of {', '.join(conversations.WAYS)}.",
)  # fmt: skip
_DATA = app.path_flag("data", "", "Folder with the benchmark files; by default they come from the Hugging Face hub.")
_OUT = app.path_flag("out", None, "Output folder; an interrupted run resumes from it.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Maximum number of items per task, the same for every model; 0 for all.", 0)
_BESIDE = app.paths_flag("beside", "Folders with other models' results on the same items, for comparison.")
_TEMPLATE = app.template_flag()
_CAPACITY = flags.DEFINE_integer("capacity", None, "Maximum context length in tokens; 4096 by default.", lower_bound=1)


_ROWS = flags.DEFINE_integer("rows", 8, "generation: number of questions run at once (batch size).", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "generation: random seed for the shots and the answers.")
_ALLOW_CODE = flags.DEFINE_bool("allow_code", False, "generation: run programs that the model wrote, in a sandbox.")


def main(argv: list[str]) -> None:
    """Reads the items, runs the missing ones in the harness, and writes its figures."""
    app.no_arguments(argv)
    if not (_MODEL.value and _OUT.value):
        raise UserError("evaluate benchmark needs --model=M and --out=FOLDER, and --data=FOLDER where there is no hub")
    form, out = _FORM.value, Path(_OUT.value)
    tasks = app.names("tasks", _TASKS.value, TASKS[form])
    ways = app.names("ways", _WAYS.value, _ASKED[form])
    _check_code([task for task in tasks if TASKS[form][task].runs_code])
    benchmarks = {task: read_benchmark(form, task, _DATA.value) for task in tasks}
    hashes = {task: benchmark.sha256 for task, benchmark in benchmarks.items()}
    beside = [(folder, read_beside(folder, reports.FILES[form], hashes)) for folder in _BESIDE.value]
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluate benchmark runs EleutherAI's lm-evaluation-harness: pip install 'duplex-jax[harness]'")
    model, settings = _load(_MODEL.value, out, form)
    for task, benchmark in benchmarks.items():
        check_settings(out / task, {"items": len(benchmark.items), "sha256": benchmark.sha256})
    described: dict[str, Any] = {}
    for task, benchmark in benchmarks.items():
        described[task] = {"sha256": benchmark.sha256, "items": len(benchmark.items)}
        described[task] |= {"chosen": len(benchmark.chosen(_LIMIT.value)), "ways": {}}
        if form == "likelihood":
            described[task]["chance"] = reports.chance(benchmark, _LIMIT.value)
    for way, task, samples in _samples(model, form, tasks, ways, settings["capacity"], out):
        described[task]["ways"][way] = reports.describe(form, benchmarks[task], samples)
    report = settings | {
        **made_with("benchmark", "jax", "lm-eval"),
        "tasks": described,
        "beside": [
            {"folder": folder, "model": of["model"], "weights": of["weights"],
             "differences": reports.compare(form, described, of["tasks"])}
            for folder, of in beside
        ],
    }  # fmt: skip
    publish(report, reports.section(report), out)


def _check_code(tasks: list[str]) -> None:
    """Checks that programs may and can be run here, for tasks whose answers are programs."""
    if tasks and not _ALLOW_CODE.value:
        raise UserError(f"--tasks={','.join(tasks)}: runs programs that the model wrote; allow that with --allow_code")
    if tasks:
        sandbox.check_sandbox()


def _samples(
    model: "LoadedModel", form: str, tasks: list[str], ways: list[str], capacity: int, out: Path
) -> Iterator[tuple[str, str, list[Any]]]:
    """Way, task, and what the harness logged for its items, each answer with its scores."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from duplex_jax.evaluate.harness import TASKS as FOLDER
    from duplex_jax.evaluate.harness import DuplexLM

    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data = {"data": _DATA.value, "seed": _SEED.value}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=data)
    names = {f"{'likelihood' if form == 'likelihood' else 'ultraeval'}_{task}": task for task in tasks}
    lm = DuplexLM(model, rows=_ROWS.value, capacity=capacity, seed=_SEED.value, log=out)
    for way in ways:
        lm.way = way
        found: Any = lm_eval.simple_evaluate(
            lm, tasks=list(names), task_manager=manager, limit=_LIMIT.value or None, bootstrap_iters=0,
            confirm_run_unsafe_code=_ALLOW_CODE.value,
        )  # fmt: skip
        for name, task in names.items():
            yield way, task, found["samples"][name]


def _load(name: str, out: Path, form: str) -> "tuple[LoadedModel, dict[str, Any]]":
    """The model, and the settings that its results depend on, which are stored in `out`."""
    from duplex_jax.checkpoint.registry import load_model

    app.claim(out)
    app.use_compilation_cache()
    model = load_model(name, dtype="auto", template=_TEMPLATE.value)
    settings = {
        "what": reports.FILES[form], "capacity": _CAPACITY.value or min(4096, model.config.max_position_embeddings),
    } | model_settings(name, model)  # fmt: skip
    settings |= {"seed": _SEED.value} if form == "generation" else {}
    check_settings(out, settings)
    return model, settings


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
