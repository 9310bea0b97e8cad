"""`duplex-jax evaluate benchmark`: standard benchmarks by log-likelihood, turn-based and in slices."""

import contextlib
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from data_gen.progress import Progress
from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour_run import check_settings, weights_hash
from duplex_jax.evaluate.benchmarks import report as reports
from duplex_jax.evaluate.benchmarks import run as runs
from duplex_jax.evaluate.benchmarks.tasks import TASKS, read_benchmark
from duplex_jax.evaluate.benchmarks.ways import WAYS
from duplex_jax.files import check_writable
from launch import app

_MODEL = flags.DEFINE_string("model", None, "A folder, a file, hf:owner/name, or a known name.")
_TASKS = flags.DEFINE_list(
    "tasks", ["arc_easy", "arc_challenge", "hellaswag", "mmlu"], f"Some of {', '.join(TASKS)}."
)  # fmt: skip
_WAYS = flags.DEFINE_list("ways", ["turn_based", "duplex"], f"How to ask: some of {', '.join(WAYS)}.")
_DATA = flags.DEFINE_string("data", None, "Folder of the benchmarks' files.")
_OUT = flags.DEFINE_string("out", None, "Folder of the results; a run that was stopped goes on there.")
_LIMIT = flags.DEFINE_integer("limit", 0, "So many items of each task, the same for every model; 0 for all.", 0)
_BESIDE = flags.DEFINE_list("beside", [], "Folders of other models' results on the same items, to compare with.")
_TEMPLATE = flags.DEFINE_enum("template", None, ["minicpm", "chatml", "compact"], "How slices become tokens.")
_CAPACITY = flags.DEFINE_integer("capacity", None, "Most tokens of a context; 4096 by default.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Reads the items, asks what was not asked before, scores, writes."""
    app.no_arguments(argv)
    if not (_MODEL.value and _DATA.value and _OUT.value):
        raise UserError("evaluate benchmark needs --model=M, --data=FOLDER and --out=FOLDER")
    tasks = app.names("tasks", _TASKS.value, TASKS)
    ways = app.names("ways", _WAYS.value, WAYS)
    out = Path(_OUT.value)
    benchmarks = {task: read_benchmark(task, _DATA.value) for task in tasks}
    beside = [runs.read_beside(folder, benchmarks) for folder in _BESIDE.value]
    check_writable(out / "settings.json")

    from duplex_jax.checkpoint.registry import load_model

    app.use_compilation_cache()
    model = load_model(_MODEL.value, dtype="auto", template=_TEMPLATE.value)
    capacity = _CAPACITY.value or min(4096, model.config.max_position_embeddings)
    settings = {
        "what": "benchmark", "model": _MODEL.value, "weights": weights_hash(model.params),
        "template": model.template.name, "capacity": capacity,
    }  # fmt: skip
    check_settings(out, settings)
    with contextlib.ExitStack() as stack:

        def progress(tokens: int) -> Callable[[int], None]:
            return stack.enter_context(Progress("tokens", tokens)).add

        found = runs.ask(model, benchmarks, ways, _LIMIT.value, capacity, out, progress)
    report: dict[str, Any] = settings | {
        "command": shlex.join(["duplex-jax", "evaluate", "benchmark", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("duplex-jax", "jax", "numpy")},
        "tasks": reports.describe(benchmarks, found, _LIMIT.value),
        "beside": [
            settings | {"differences": reports.compare(benchmarks, found, theirs)} for settings, theirs in beside
        ],
    }
    written = reports.write_report(report, out)
    print("\n".join(reports.table(report)))
    print(f"\nwrote {', '.join(written)} in {out}")


def start() -> None:
    """Entry point."""
    app.keep_memory()
    app.run(main)


if __name__ == "__main__":
    start()
