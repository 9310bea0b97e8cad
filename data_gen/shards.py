"""Finds the timeline files of a data set."""

from pathlib import Path

from data_gen.categories import CATEGORIES
from duplex_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def shard_files(path: str | Path) -> list[Path]:
    """The timeline files of a folder, sorted, or the one file.

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give a data set")
    files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and not p.name.startswith("."))
    if not files:
        raise UserError(f"{path}: holds no {', '.join(SUFFIXES)} file")
    return files


def guess_category(path: Path) -> str:
    """The category that the name of a file or of its folder implies; published files have it nowhere else."""
    for name in (path.name, path.parent.name):
        plain = name.lower().replace("-", "_").replace(" ", "_")
        for category in CATEGORIES:
            if category in plain or category.replace("_", "") in plain:
                return category
    return "unknown"
