"""`duplex-jax evaluate fetch --data=FOLDER`: the benchmarks' files from the Hugging Face hub, for `evaluate benchmark`.

Existing files are not changed.
"""

from pathlib import Path

from absl import flags

from data_gen.progress import Progress
from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks.files import fetch, files_of
from duplex_jax.evaluate.benchmarks.questions import CONFIGS, CONFIGS_SOURCE, TASKS
from launch import app

_DATA = app.path_flag("data", None, "Folder for the benchmark files; created if it is missing.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS["generation"]), f"Tasks: any of {', '.join(TASKS['generation'])}.")


def main(argv: list[str]) -> None:
    """Fetches the missing files."""
    app.no_arguments(argv)
    if not _DATA.value:
        raise UserError("evaluate fetch needs --data=FOLDER, the folder for the benchmarks' files")
    chosen = [TASKS["generation"][name] for name in app.names("tasks", _TASKS.value, TASKS["generation"])]
    folder = Path(_DATA.value)
    for task in chosen:
        if there := files_of(folder, task.file):
            print(f"{there[0]}: is there already")
            continue
        with Progress(f"questions of {task.name}") as shown:
            path = fetch(task.file, folder, task.parse, shown.add)
        print(f"wrote {path}")
    if any(task.configs for task in chosen) and not files_of(folder, CONFIGS):
        print(f"ceval and cmmlu read {folder / CONFIGS}.jsonl, too; it is {CONFIGS_SOURCE}")


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
