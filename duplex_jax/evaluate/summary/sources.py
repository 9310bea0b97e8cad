"""The reports that a page is made of: where they lie, and what was measured under which circumstances."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError

KINDS = {
    "benchmark": "benchmarks by likelihood", "generation": "benchmarks by generation", "judge": "judged dialogue",
    "behaviour": "behaviour", "yardsticks": "yardsticks", "study": "user study",
}  # fmt: skip
"""By the `what` of a report, which is also the name of its file, what it is about."""

# What a kind of report must hold to be one.
_NEEDED = {
    "benchmark": ("model", "tasks"), "generation": ("model", "tasks"), "judge": ("model", "tasks"),
    "behaviour": ("model", "assistants", "data"), "yardsticks": ("model", "measures", "data"), "study": (),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """One report.

    Attributes:
        number: by which tables refer to it, from 1.
        folder: where it lies.
        what: in `KINDS`.
        report: as it was written.
    """

    number: int
    folder: Path
    what: str
    report: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.what}.json"

    @property
    def model(self) -> str:
        """Whom it is about; of a study both."""
        models = self.report.get("models")
        if self.what == "study" and isinstance(models, Mapping):
            return ", ".join(f"{name}: {of.get('model')}" for name, of in models.items())
        return str(self.report.get("model", ""))

    @property
    def seed(self) -> str:
        """The seed or the seeds; a dash where nothing is drawn."""
        settings = self.report.get("settings") or {}
        found = self.report.get("seed", settings.get("seeds", settings.get("seed")))
        return "-" if found is None else ", ".join(map(str, found)) if isinstance(found, list) else str(found)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the data, by task where there are tasks."""
        tasks = self.report.get("tasks")
        if isinstance(tasks, Mapping):
            return {task: str(of["sha256"]) for task, of in tasks.items()}
        sha256 = (self.report.get("data") or {}).get("sha256")
        return {} if sha256 is None else {"": str(sha256)}


def read_sources(folders: Sequence[str]) -> list[Source]:
    """The reports in these folders, or, where a folder itself has none, in the folders inside it.

    Raises:
        UserError: a folder without any, or a file that is no report; names it.
    """
    found: list[Source] = []
    seen: set[Path] = set()
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the --out of an evaluation")
        places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
        paths = [[p / f"{what}.json" for what in KINDS if (p / f"{what}.json").is_file()] for p in places]
        inside = paths[:1] if paths[0] else paths[1:]
        if not any(inside):
            raise UserError(f"{folder}: holds no report ({', '.join(f'{what}.json' for what in KINDS)}), nor does a "
                            "folder in it; give the --out of an evaluation that has finished")  # fmt: skip
        for path in (path for some in inside for path in some):
            if path.resolve() in seen:
                raise UserError(f"{path}: is given twice; give each folder once")
            seen.add(path.resolve())
            found.append(_read(path, len(found) + 1))
    return found


def _read(path: Path, number: int) -> Source:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: is not JSON ({e}); run the evaluation again") from e
    what = path.stem
    if not isinstance(report, Mapping) or report.get("what") != what:
        raise UserError(f"{path}: is not a report of {KINDS[what]} (`what` is not {what!r}); run the evaluation again")
    missing = [name for name in _NEEDED[what] if name not in report]
    if missing:
        raise UserError(f"{path}: has no field {missing[0]!r}; run the evaluation again")
    return Source(number, path.parent, what, report)
