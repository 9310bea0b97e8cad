"""`duplex-jax evaluate benchmark`: standard benchmarks by log-likelihood or by generation, turn-based and in slices."""

import contextlib
import functools
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from absl import flags

from data_gen.progress import Progress
from duplex_jax.decode.engine import Engine
from duplex_jax.errors import UserError
from duplex_jax.evaluate import conversations
from duplex_jax.evaluate.behaviour_run import check_settings, model_settings
from duplex_jax.evaluate.benchmarks import generation
from duplex_jax.evaluate.benchmarks import report as reports
from duplex_jax.evaluate.benchmarks import run as runs
from duplex_jax.evaluate.benchmarks.tasks import TASKS, read_benchmark
from duplex_jax.evaluate.benchmarks.ways import WAYS
from launch import app

if TYPE_CHECKING:
    from duplex_jax.checkpoint.registry import LoadedModel

_MODEL = app.path_flag("model", None, "Model: a folder, a file, hf:owner/name, or a known name.")
_FORM = flags.DEFINE_enum(
    "form", "likelihood", ["likelihood", "generation"],
    "likelihood: score the given choices. generation: score what the model writes.",
)  # fmt: skip
_TASKS = flags.DEFINE_list(
    "tasks", ["arc_easy", "arc_challenge", "hellaswag", "mmlu"],
    f"Tasks. likelihood: any of {', '.join(TASKS)}; generation: any of {', '.join(generation.TASKS)}.",
)  # fmt: skip
_WAYS = flags.DEFINE_list(
    "ways", ["turn_based", "duplex"],
    f"Prompting modes. likelihood: any of {', '.join(WAYS)}; generation: any of {', '.join(conversations.WAYS)}.",
)  # fmt: skip
_DATA = app.path_flag("data", None, "Folder with the benchmark files.")
_OUT = app.path_flag("out", None, "Output folder; an interrupted run resumes from it.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Maximum number of items per task, the same for every model; 0 for all.", 0)
_BESIDE = app.paths_flag("beside", "Folders with other models' results on the same items, for comparison.")
_TEMPLATE = flags.DEFINE_enum(
    "template",
    None,
    ["minicpm", "chatml", "compact"],
    "Template that turns slices into tokens; by default the model's own.",
)
_CAPACITY = flags.DEFINE_integer("capacity", None, "Maximum context length in tokens; 4096 by default.", lower_bound=1)


_ROWS = flags.DEFINE_integer("rows", 8, "generation: number of questions run at once (batch size).", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "generation: random seed for the shots and the answers.")
_ALLOW_CODE = flags.DEFINE_bool("allow_code", False, "generation: run programs that the model wrote, in a sandbox.")


def main(argv: list[str]) -> None:
    """Reads the items, asks what was not asked before, scores, writes."""
    app.no_arguments(argv)
    if not (_MODEL.value and _DATA.value and _OUT.value):
        raise UserError("evaluate benchmark needs --model=M, --data=FOLDER and --out=FOLDER")
    by = _by_likelihood if _FORM.value == "likelihood" else _by_generation
    by(_MODEL.value, _DATA.value, Path(_OUT.value))


def _by_likelihood(name: str, data: str, out: Path) -> None:
    tasks = app.names("tasks", _TASKS.value, TASKS)
    ways = app.names("ways", _WAYS.value, WAYS)
    benchmarks = {task: read_benchmark(task, data) for task in tasks}
    beside = [runs.read_beside(folder, benchmarks) for folder in _BESIDE.value]
    model, settings = _load(name, out, "benchmark")
    with contextlib.ExitStack() as stack:

        def progress(tokens: int) -> Callable[[int], None]:
            return stack.enter_context(Progress("tokens", tokens)).add

        found = runs.ask(model, benchmarks, ways, _LIMIT.value, settings["capacity"], out, progress)
    _write(reports, out, settings, {
        "tasks": reports.describe(benchmarks, found, _LIMIT.value),
        "beside": [about | {"differences": reports.compare(benchmarks, found, theirs)} for about, theirs in beside],
    })  # fmt: skip


def _by_generation(name: str, data: str, out: Path) -> None:
    tasks = app.names("tasks", _TASKS.value, generation.TASKS)
    ways = app.names("ways", _WAYS.value, conversations.WAYS)
    generation.check_code(tasks, _ALLOW_CODE.value)
    benchmarks = {task: generation.read_benchmark(task, data) for task in tasks}
    beside = [generation.read_beside(folder, benchmarks) for folder in _BESIDE.value]
    model, settings = _load(name, out, "generation", seed=_SEED.value)

    @functools.cache
    def engine() -> Engine:
        return conversations.make_engine(model, _ROWS.value, settings["capacity"])

    @contextlib.contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with Progress(what, total) as shown:
            yield lambda tokens: shown.add(1)

    found = generation.ask(engine, benchmarks, ways, _LIMIT.value, _SEED.value, out, progress)
    _write(generation, out, settings, {
        "tasks": generation.describe(benchmarks, found),
        "beside": [about | {"differences": generation.compare(benchmarks, found, theirs)} for about, theirs in beside],
    })  # fmt: skip


def _load(name: str, out: Path, what: str, **settings: Any) -> "tuple[LoadedModel, dict[str, Any]]":
    """The model, and the settings that its results depend on, kept in `out`."""
    from duplex_jax.checkpoint.registry import load_model

    app.claim(out)
    app.use_compilation_cache()
    model = load_model(name, dtype="auto", template=_TEMPLATE.value)
    settings = {
        "what": what, "capacity": _CAPACITY.value or min(4096, model.config.max_position_embeddings),
    } | model_settings(name, model) | settings  # fmt: skip
    check_settings(out, settings)
    return model, settings


def _write(form: ModuleType, out: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    report = settings | {
        "command": shlex.join(["duplex-jax", "evaluate", "benchmark", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("duplex-jax", "jax", "numpy")},
    } | found  # fmt: skip
    written = form.write_report(report, out)
    print("\n".join(form.table(report)))
    print(f"\nwrote {', '.join(written)} in {out}")


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
