"""The benchmarks' rows: from a folder's files, or from the Hugging Face hub as the lines of such files."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from duplex_jax.data.encode import input_lines
from duplex_jax.errors import UNREADABLE, UserError, reason
from duplex_jax.files import atomic_write, check_writable

Row = Mapping[str, Any]
Parsed = TypeVar("Parsed")


@dataclasses.dataclass(frozen=True)
class Hub:
    """Where a file comes from.

    Attributes:
        name: of the data set, owner and all.
        configs: which of its configurations; none: all, in the order of their names.
        splits: which of their splits, in this order.
        line: the line of a row and its configuration.
    """

    name: str
    configs: tuple[str, ...]
    splits: tuple[str, ...]
    line: Callable[[str, Row], Row] = lambda config, row: row

    def __str__(self) -> str:
        return f"{self.name} on Hugging Face ({', '.join(self.configs) or 'all of it'}; {', '.join(self.splits)})"


def _chinese(config: str, row: Row) -> Row:
    """C-Eval's and CMMLU's rows have one field an option, and the subject is their configuration."""
    question, answer = (row.get(name, row.get(name.capitalize())) for name in ("question", "answer"))
    return {"subject": config, "question": question, "choices": [row[c] for c in "ABCD"], "answer": answer}


FILES: dict[str, Hub] = {
    "arc_easy_test": Hub("allenai/ai2_arc", ("ARC-Easy",), ("test",)),
    "arc_challenge_test": Hub("allenai/ai2_arc", ("ARC-Challenge",), ("test",)),
    "bbh": Hub("SaylorTwift/bbh", (), ("test",), lambda config, row: {"task": config, **row}),
    "ceval_val": Hub("ceval/ceval-exam", (), ("val",), _chinese),
    "cmmlu_test": Hub("haonan-li/cmmlu", (), ("test",), _chinese),
    "gsm8k_test": Hub("openai/gsm8k", ("main",), ("test",)),
    "hellaswag_val": Hub("Rowan/hellaswag", ("default",), ("validation",)),
    "humaneval": Hub("openai/openai_humaneval", ("openai_humaneval",), ("test",)),
    "math_test": Hub("EleutherAI/hendrycks_math", (), ("test",)),
    "mbpp": Hub("google-research-datasets/mbpp", ("full",), ("prompt", "test", "validation", "train")),
    "mmlu_test": Hub("cais/mmlu", ("all",), ("test",)),
}  # fmt: skip
"""By how the file's name begins."""


def source(file: str) -> str:
    """Where a file comes from, for messages."""
    return f"{FILES[file]}; `duplex-jax evaluate fetch` gets it"


def chosen(number: int, limit: int = 0) -> list[int]:
    """The first `limit` of a shuffle of `range(number)` that is always the same; all of it for 0.

    More items begin with those that fewer ones are.
    """
    numbers = list(range(number))
    random.Random("items").shuffle(numbers)
    return numbers[: limit or None]


def text(value: Any) -> str:
    """The value, if it is text.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def sha256_of(items: Iterable[Any]) -> str:
    """A hash of questions, whatever their file spells around them."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def files_of(folder: Path, file: str) -> list[Path]:
    """The files of a folder whose name begins with `file` and ends in `.jsonl`, `.jsonl.gz` or `.jsonl.zst`."""
    return sorted(p for end in ("", ".gz", ".zst") for p in folder.glob(f"{file}*.jsonl{end}"))


def find_file(folder: str | Path, file: str, reader: str, source: str) -> Path:
    """The one file of a folder that a task reads.

    Args:
        folder: where the files of all tasks are.
        file: its name; without an ending it is how the name begins, and `.jsonl`, `.jsonl.gz` or `.jsonl.zst` ends it.
        reader: who reads it, for the message.
        source: where it comes from, for the message.

    Raises:
        UserError: no such folder or file, or several of them.
    """
    folder, whole = Path(folder), file if "." in file else f"{file}.jsonl"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data is a folder of files such as {whole}")
    paths = files_of(folder, file) if whole != file else [folder / file] if (folder / file).is_file() else []
    if not paths:
        raise UserError(f"{folder / whole}: is missing, and {reader} reads it; it is {source}")
    if len(paths) > 1:
        raise UserError(f"{folder}: holds {' and '.join(p.name for p in paths)}, and {reader} reads one of them; "
                        "leave one there")  # fmt: skip
    return paths[0]


def read_lines(path: Path, parse: Callable[[Row], Parsed], file: str, source: str) -> Iterator[tuple[str, Parsed]]:
    """(where, what `parse` makes of it) of each line of a file.

    Raises:
        UserError: a line is no JSON object with the fields that `parse` wants; names it, its file and its source.
    """
    for where, line in input_lines([path]):
        try:
            parsed = parse(json.loads(line))
        except UNREADABLE as e:
            raise UserError(f"{where}: is no line of {file} ({reason(e)}); it is {source}") from e
        yield where, parsed


def read_rows(
    folder: str | Path, file: str, reader: str, parse: Callable[[Row], Parsed]
) -> Iterator[tuple[str, Parsed]]:
    """(where, what `parse` makes of it) of each row of a file; from the hub where `folder` is empty.

    Raises:
        UserError: as `find_file` and `read_lines`, or the hub cannot be read.
    """
    if folder:
        yield from read_lines(find_file(folder, file, reader, source(file)), parse, file, source(file))
    else:
        yield from ((where, parsed) for where, _, parsed in _hub_rows(file, parse))


def fetch(file: str, folder: str | Path, parse: Callable[[Row], Any], count: Callable[[int], None]) -> Path:
    """Writes a file from the hub.

    Args:
        file: in `FILES`.
        folder: where to; it is made if it is not there.
        parse: what a task makes of a line; raises one of `UNREADABLE` for one that it cannot read.
        count: called with 1 for each line.

    Returns:
        The file.

    Raises:
        UserError: `datasets` is not installed, the hub or the data set cannot be reached or has changed, or the file
            cannot be written; nothing is left of it then.
    """
    path = check_writable(Path(folder) / f"{file}.jsonl")
    with atomic_write(path) as out:
        for _, line, _ in _hub_rows(file, parse):
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            count(1)
    return path


def _hub_rows(file: str, parse: Callable[[Row], Parsed]) -> Iterator[tuple[str, Row, Parsed]]:
    """Where each row of the hub stands, the line that it makes, and what `parse` makes of that."""
    hub = FILES[file]
    for number, (config, row) in enumerate(_rows(hub), 1):
        try:
            parsed = parse(line := hub.line(config, row))
        except UNREADABLE as e:
            raise UserError(f"{hub}: row {number} is no line of {file}.jsonl ({reason(e)}); the data set is not what "
                            "it was, and --data takes files got elsewhere, too") from e  # fmt: skip
        yield f"{hub}: row {number}", line, parsed


def _rows(hub: Hub) -> Iterator[tuple[str, Row]]:
    """Each row with the name of its configuration."""
    # It tells which frameworks it found.
    logging.getLogger("datasets").setLevel(logging.WARNING)
    try:
        import datasets
    except ImportError as e:
        raise UserError("reading the Hugging Face hub needs `datasets`: pip install 'duplex-jax[hub]'") from e
    datasets.disable_progress_bars()
    # It prints by itself that it tries again.
    logging.getLogger("huggingface_hub").propagate = False
    with _told(hub):
        configs = hub.configs or tuple(sorted(datasets.get_dataset_config_names(hub.name)))
    for config in configs:
        for split in hub.splits:
            with _told(hub):
                found = datasets.load_dataset(hub.name, config, split=split)
            yield from ((config, row) for row in found)


@contextlib.contextmanager
def _told(hub: Hub) -> Iterator[None]:
    """Whatever goes wrong with a data set, said in one line that names it."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, RuntimeError, ValueError, DatasetsError) as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{hub}: cannot be read ({first}); --data takes files got elsewhere, too") from e
