"""Packed datasets, shards of rows in ArrayRecord files plus a manifest: their writer and their reader."""

import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from duplex_jax.checkpoint.resolve import load_template
from duplex_jax.data import encode, rows
from duplex_jax.data.packing import pack
from duplex_jax.data.rows import Document, Row
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_folder
from duplex_jax.processes import end_with_parent
from duplex_jax.schema import Schema, checked, read_json
from duplex_jax.template import Code, Template
from duplex_jax.tokenizer import fingerprint

MANIFEST = "manifest.json"
FORMAT = 1
ROWS_PER_SHARD = 16384
_CHUNK = 256


class Shard(Schema):
    """One file of rows: name, number of rows and bytes, and the SHA-256 of its contents."""

    file: str
    rows: int
    bytes: int
    sha256: str


class Manifest(Schema):
    """Description of a packed dataset.

    Attributes:
        format: version of the record format.
        length: T, tokens per row.
        rows: number of rows.
        tokens: tokens without padding; `tokens / (rows * length)` is the packing efficiency.
        documents: number of conversations, or parts of long ones.
        conversations: number of input conversations.
        split: conversations longer than a row, split between pairs.
        left_out: tokens of single pairs longer than a row.
        decisions: pairs in which the assistant speaks or stays idle.
        template: template of the timelines.
        tokenizer: fingerprint of the vocabulary.
        vocab_size: vocabulary size of the tokenizer.
        model: the model whose tokenizer was used, as given by the user.
        categories: category names; a category's number is its index.
        category_tokens: tokens of each category.
        hash: combined hash of the shards.
        shards: the files.
        late: fraction of a timeline's answers that begin late.
    """

    format: int
    length: Annotated[int, Field(ge=16, le=rows.MAX_LENGTH)]
    rows: Annotated[int, Field(ge=0)]
    tokens: int
    documents: int
    conversations: int
    split: int
    left_out: int
    decisions: int
    template: str
    tokenizer: str
    vocab_size: Annotated[int, Field(ge=1, lt=2**24)]
    model: str
    categories: list[str]
    category_tokens: list[int]
    hash: str
    shards: list[Shard]
    late: float = 0.0

    @property
    def efficiency(self) -> float:
        """Fraction of the rows' capacity that is used."""
        return self.tokens / max(1, self.rows * self.length)


class RowSource(Protocol):
    """Rows by index, with the properties that training checks."""

    name: str
    length: int
    template: str
    tokenizer: str
    categories: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Row: ...

    def row_id(self, i: int) -> str:
        """Location of row i: file and record."""
        ...


@dataclasses.dataclass
class Tally:
    """Counts collected while a dataset is encoded and packed."""

    rows: int = 0
    tokens: int = 0
    documents: int = 0
    conversations: int = 0
    split: int = 0
    left_out: int = 0
    decisions: int = 0
    category_tokens: dict[int, int] = dataclasses.field(default_factory=dict)

    def add(self, row: Sequence[Document]) -> None:
        """Counts a finished row."""
        self.rows += 1
        for document in row:
            self.documents += 1
            self.tokens += len(document.ids)
            self.decisions += int((document.codes & Code.DECISION != 0).sum())
            tokens = self.category_tokens.get(document.category, 0)
            self.category_tokens[document.category] = tokens + len(document.ids)


_worker_template: Template | None = None


def _start_worker(model: str, template: str) -> None:
    global _worker_template
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_template = load_template(model, template)


def _encode_chunk(lines: list[tuple[str, bytes]], length: int, late: float) -> list[tuple[list[encode.Part], int, str]]:
    assert _worker_template is not None
    return [encode.encode_line(_worker_template, line, where, length, late) for where, line in lines]


def encode_files(
    path: str | Path,
    template: Template,
    model: str,
    length: int,
    workers: int,
    tally: Tally,
    categories: dict[str, int],
    late: float = 0.0,
) -> Iterable[Document]:
    """The documents of every conversation in `path`, in input order for any number of workers.

    Args:
        path: a JSONL file or a folder of them, with timelines or chats.
        template: template of this process.
        model: model from which workers load the same tokenizer.
        length: most tokens of a document.
        workers: processes that encode; 0 or 1 for this process alone.
        tally: counts conversations, splits and omitted tokens.
        categories: maps names to numbers; extended in place.
        late: fraction of a timeline's answers to delay (`encode.answer_late`).
    """

    def documents(encoded: list[tuple[list[encode.Part], int, str]]) -> Iterable[Document]:
        for parts, lost, name in encoded:
            category = categories.setdefault(name, len(categories))
            if category > 255:
                raise UserError(f"{path}: more than 256 categories; `category` must name a kind, not a conversation")
            tally.conversations += 1
            tally.split += len(parts) > 1 or lost > 0
            tally.left_out += lost
            for ids, codes in parts:
                yield Document(ids, codes, category, tally.conversations - 1)

    lines = encode.input_lines(encode.input_files(path))
    if workers <= 1:
        for where, line in lines:
            yield from documents([encode.encode_line(template, line, where, length, late)])
        return
    # A spawned worker imports no JAX and inherits no threads.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(model, template.name)
    ) as pool:
        waiting: list[Future[list[tuple[list[encode.Part], int, str]]]] = []
        try:
            while True:
                chunk = list(islice(lines, _CHUNK))
                if chunk:
                    waiting.append(pool.submit(_encode_chunk, chunk, length, late))
                if waiting and (not chunk or len(waiting) > 2 * workers):
                    yield from documents(waiting.pop(0).result())
                if not chunk and not waiting:
                    return
        finally:
            pool.shutdown(cancel_futures=True)


def check_length(length: int) -> None:
    """Raises UserError for row lengths that records cannot represent."""
    if not 16 <= length <= rows.MAX_LENGTH:
        raise UserError(f"--length={length}: must be 16 to {rows.MAX_LENGTH} tokens")


def write_packed(
    path: str | Path,
    out: str | Path,
    model: str,
    length: int,
    template: str = "",
    workers: int = 1,
    progress: Any = None,
    late: float = 0.0,
) -> Manifest:
    """Encodes and packs a dataset into `out`, which appears only once complete.

    Args:
        path: a JSONL file or a folder of them, with timelines or chats.
        out: the folder to create.
        model: model whose tokenizer is used.
        length: T, tokens per row.
        template: name of the template; by default the tokenizer's own.
        workers: processes that encode.
        progress: called with the `Tally` after each row.
        late: fraction of a timeline's answers to delay (`encode.answer_late`).

    Raises:
        UserError: the input is invalid, or `out` exists or cannot be written.
    """
    check_length(length)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; give a new folder, or remove it")
    files = encode.input_files(path)
    made = load_template(model, template)
    tokenizer = made.tokenizer
    tally = Tally()
    categories: dict[str, int] = {}
    width = rows.token_bytes(tokenizer.vocab_size)
    with atomic_folder(out) as partial:
        documents = encode_files(path, made, model, length, workers, tally, categories, late)
        shards = _write_shards(partial, pack(documents, length), width, tally, progress)
        if not shards:
            raise UserError(f"{path}: no conversation in {len(files)} file(s); nothing to pack")
        manifest = Manifest(
            format=FORMAT,
            length=length,
            rows=tally.rows,
            tokens=tally.tokens,
            documents=tally.documents,
            conversations=tally.conversations,
            split=tally.split,
            left_out=tally.left_out,
            decisions=tally.decisions,
            template=made.name,
            tokenizer=fingerprint(tokenizer),
            vocab_size=tokenizer.vocab_size,
            model=model,
            categories=list(categories),
            category_tokens=[tally.category_tokens.get(i, 0) for i in categories.values()],
            hash=hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest()[:16],
            shards=shards,
            late=late,
        )
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return manifest


def _write_shards(
    folder: Path, packed: Iterable[list[Document]], width: int, tally: Tally, progress: Any
) -> list[Shard]:
    """Writes rows into shards of `ROWS_PER_SHARD`; adds each row to `tally` and calls `progress`.

    Raises:
        OSError: the disk is full.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    shards: list[Shard] = []
    packed = iter(packed)
    while (first := next(packed, None)) is not None:
        path = folder / f"rows-{len(shards):05d}.arrayrecord"
        # One record per chunk, so that any row can be read without its neighbours.
        writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
        count = 0
        try:
            for row in chain([first], islice(packed, ROWS_PER_SHARD - 1)):
                _or_full(path, writer.write, rows.to_bytes(row, width))
                tally.add(row)
                count += 1
                if progress is not None:
                    progress(tally)
        finally:
            _or_full(path, writer.close)
        shards.append(Shard(file=path.name, rows=count, bytes=path.stat().st_size, sha256=_sha256(path)))
    return shards


def _or_full(path: Path, call: Callable[..., Any], *args: Any) -> None:
    """Calls the record writer, which reports a full disk by a RuntimeError, and raises OSError for that."""
    try:
        call(*args)
    except RuntimeError as e:
        raise OSError(errno.ENOSPC, f"{path.name} cannot be written: {e}") from e


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a packed dataset.

    Raises:
        UserError: the folder is not a packed dataset, or its format is another.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no packed dataset (it has no {MANIFEST}); `duplex-jax pack` makes one")
    row = read_json(path, "pack again")
    if row.get("format") != FORMAT:
        raise UserError(f"{path}: format {str(row.get('format'))[:80]}; this version reads {FORMAT}, so pack again")
    manifest = checked(Manifest, row, str(path), "pack again")
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file:
            raise UserError(f"{path}: the shard {shard.file[:80]} must be a file beside it; pack again")
    return manifest


class PackedRows:
    """Rows of a packed dataset, read by index; can be pickled for worker processes.

    Args:
        folder: a folder written by `write_packed`.
        verify: compare the hash of every shard with the manifest, not only sizes and counts.

    Raises:
        UserError: a shard is missing, truncated or damaged; the message names it.
    """

    def __init__(self, folder: str | Path, verify: bool = False):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.name = str(folder)
        self.length = self.manifest.length
        self.template, self.tokenizer = self.manifest.template, self.manifest.tokenizer
        self.categories = self.manifest.categories
        self._width = rows.token_bytes(self.manifest.vocab_size)
        self._data: Any = None
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            if not os.path.isfile(path):
                raise UserError(f"{path}: is missing; the manifest lists it, so copy it or pack again")
            if path.stat().st_size != shard.bytes:
                raise UserError(
                    f"{path}: has {path.stat().st_size} bytes instead of {shard.bytes}; it was cut short or changed: "
                    "copy it or pack again"
                )
            if verify and _sha256(path) != shard.sha256:
                raise UserError(f"{path}: its contents have changed since packing; copy it or pack again")

    def __len__(self) -> int:
        return self.manifest.rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None}

    def __getitem__(self, i: int) -> Row:
        import grain

        if self._data is None:
            self._data = grain.sources.ArrayRecordDataSource([str(self.folder / s.file) for s in self.manifest.shards])
        try:
            record = self._data[i]
            return rows.from_bytes(record, self.length, self._width)
        except (UserError, ValueError, RuntimeError, IndexError) as e:
            raise UserError(f"{self.row_id(i)}: cannot be read ({e}); copy the shard or pack again") from e

    def row_id(self, i: int) -> str:
        for shard in self.manifest.shards:
            if i < shard.rows:
                return f"{self.folder / shard.file}:{i}"
            i -= shard.rows
        return f"{self.folder}:{i}"


class MemoryRows:
    """Rows packed when training starts, for datasets too small to need a file.

    Args:
        path: a JSONL file or a folder of them.
        template: template of the timelines.
        length: T, tokens per row.
    """

    MOST_BYTES = 64 << 20

    def __init__(self, path: str | Path, template: Template, length: int):
        size = sum(f.stat().st_size for f in encode.input_files(path))
        if size > self.MOST_BYTES:
            raise UserError(
                f"{path}: {size >> 20} MiB of conversations; above {self.MOST_BYTES >> 20} MiB pack them first, "
                f"with `duplex-jax pack --input={path} --out=DIR --model=M --length={length}`"
            )
        check_length(length)
        self.name, self.length, self.template = str(path), length, template.name
        self.tokenizer = fingerprint(template.tokenizer)
        self.tally = Tally()
        names: dict[str, int] = {}
        self._width = rows.token_bytes(template.tokenizer.vocab_size)
        self._records = []
        for row in pack(encode_files(path, template, "", length, 0, self.tally, names), length):
            self.tally.add(row)
            self._records.append(rows.to_bytes(row, self._width))
        self.categories = list(names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Row:
        return rows.from_bytes(self._records[i], self.length, self._width)

    def row_id(self, i: int) -> str:
        """The row's number, and the input conversations in it."""
        return f"{self.name}: row {i} (conversations {', '.join(map(str, self[i].sources))})"


def open_rows(path: str | Path, template: Template, length: int) -> RowSource:
    """Opens a packed dataset, or packs conversations, and checks it against the model's template and tokenizer.

    Raises:
        UserError: row length, template or vocabulary differ.
    """
    if not (Path(path) / MANIFEST).is_file():
        return MemoryRows(path, template, length)
    source = PackedRows(path)
    manifest = source.manifest
    if manifest.tokenizer != fingerprint(template.tokenizer):
        raise UserError(
            f"{path}: was packed with the tokenizer of {manifest.model!r}, which is not the model's; "
            "pack again with the model that you train"
        )
    if manifest.template != template.name:
        raise UserError(
            f"{path}: was packed with template {manifest.template!r} but the model has {template.name!r}; "
            f"pack again with --template={template.name}, or train with --config.model.template={manifest.template}"
        )
    if manifest.length != length:
        raise UserError(
            f"{path}: has rows of {manifest.length} tokens but the config has {length}; "
            f"pack again, or --config.data.length={manifest.length}"
        )
    return source
