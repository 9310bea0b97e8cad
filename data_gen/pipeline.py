"""Generates a data set from dialogues, read in blocks; each block gives one shard per category, written atomically.

    OUT/recipe.json                        what determines the data set; written first
    OUT/<category>/<category>-00000.jsonl  the shards (.jsonl.zst if compressed)
    OUT/<category>/<category>-00000.manifest.json  a shard's rows, hash, recipe and omissions
    OUT/bad_rows.tsv                       invalid input rows, and why they are invalid
    OUT/dataset.json                       the totals; written last
    OUT/README.md                          the data set card

A shard is complete if its manifest exists. A killed run leaves complete shards behind, and the next run makes the
others: each is a pure function of its block, the seed and the recipe.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from data_gen.card import write_card
from data_gen.categories import CATEGORIES
from data_gen.dialogues import EVERYTHING, Dialogue, Selection, fingerprint, read_dialogues
from data_gen.engines import Engine
from data_gen.progress import Progress
from data_gen.rewriter import Request, Sampling
from data_gen.unit import Made, Unit
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, locked
from duplex_jax.llm.cache import Answer
from duplex_jax.llm.client import Stopped
from duplex_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines a data set, byte for byte.

    Attributes:
        input: fingerprint of the input's files.
        shares: timelines per source dialogue, by category.
        seed: random seed.
        tokenizer: fingerprint of the tokenizer that cuts assistant messages.
        tokenizer_name: the tokenizer's name as given by the user.
        rewriter: "template", or the model's settings.
        max_idle_pairs: most silent pairs between turns.
        block: dialogues per block.
        limit: most dialogues used; 0 for all.
        compress: whether shards are zstd-compressed.
        versions: versions of the programs that influence the result.
        transitions: which sentences users interrupt with.
        selection: which dialogues are used.
        spoken: fraction of the timelines whose user's words are as spoken or typed.
    """

    input: str
    shares: Mapping[str, float]
    seed: int
    tokenizer: str
    tokenizer_name: str
    rewriter: str | Mapping[str, Any]
    max_idle_pairs: int
    block: int
    limit: int
    compress: bool
    versions: Mapping[str, str]
    transitions: str = "paper"
    selection: Selection = EVERYTHING
    spoken: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The contents of recipe.json. Fields at their defaults are omitted, so old recipe hashes stay valid."""
        return {k: v for k, v in dataclasses.asdict(self).items() if _USUAL.get(k) != v}

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits, stored in every manifest."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:16]


_USUAL: Mapping[str, Any] = {"transitions": "paper", "selection": dataclasses.asdict(EVERYTHING), "spoken": 0.0}


def make_recipe(
    path: str | Path,
    shares: Mapping[str, float],
    tokenizer: Tokenizer,
    tokenizer_name: str,
    seed: int = 0,
    sampling: Sampling | None = None,
    attempts: int = 3,
    max_idle_pairs: int = 0,
    block: int = 500,
    limit: int = 0,
    compress: bool = False,
    transitions: str = "paper",
    selection: Selection = EVERYTHING,
    spoken: float = 0.0,
) -> Recipe:
    """The recipe of a data set from the dialogues at `path`."""
    packages = ("duplex-jax", "tokenizers", "sentencepiece", *(["zstandard"] if compress else []))
    return Recipe(
        input=fingerprint(path),
        shares=dict(shares),
        seed=seed,
        tokenizer=tokenizer_fingerprint(tokenizer),
        tokenizer_name=tokenizer_name,
        rewriter=dataclasses.asdict(sampling) | {"attempts": attempts} if sampling else "template",
        max_idle_pairs=max_idle_pairs,
        block=block,
        limit=limit,
        compress=compress,
        versions={
            "python": ".".join(platform.python_version_tuple()[:2]),
            **{name: metadata.version(name) for name in packages},
        },
        transitions=transitions,
        selection=selection,
        spoken=spoken,
    )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A short hash of a tokenizer's vocabulary, to tell tokenizers apart."""
    digest = hashlib.sha256()
    for i in range(tokenizer.vocab_size):
        digest.update(tokenizer.token_bytes(i) + b"\0")
    return digest.hexdigest()[:16]


def blocks(dialogues: Iterable[Dialogue], size: int) -> Iterator[tuple[Dialogue, ...]]:
    """Groups dialogues into blocks of `size`; a last block of less than half of that is merged with the previous one.

    Timelines are made from one block's dialogues, so duplicate ids within a block are renamed: `x`, `x#2`, `x#3`.
    """
    held: tuple[Dialogue, ...] = ()
    current: list[Dialogue] = []
    for dialogue in dialogues:
        current.append(dialogue)
        if len(current) == size:
            if held:
                yield _told_apart(held)
            held, current = tuple(current), []
    if held and len(current) * 2 >= size:
        yield _told_apart(held)
        held = ()
    if held or current:
        yield _told_apart((*held, *current))


def _told_apart(block: tuple[Dialogue, ...]) -> tuple[Dialogue, ...]:
    given = {d.id for d in block}

    def names(id: str) -> Iterator[str]:
        yield id
        yield from (name for n in itertools.count(2) if (name := f"{id}#{n}") not in given)

    left = {id: names(id) for id in given}
    return tuple(dataclasses.replace(d, id=next(left[d.id])) for d in block)


class Answers(Protocol):
    """Answers requests, in this run or a later one."""

    def answer(self, requests: Sequence[Request]) -> "Future[dict[str, Answer] | None]":
        """Answers by request key, as a future; its result is None if some must wait for another run."""
        ...


@dataclasses.dataclass
class Summary:
    """The result of a run, over all its shards.

    Attributes:
        dialogues: number of source dialogues read.
        not_taken: dialogues outside of the selection.
        bad_rows: invalid rows.
        rows: timelines by category.
        pairs: slice pairs by category.
        left_out: timelines that could not be made, by category and reason.
        unfinished: shards that still wait for answers.
        stopped: why the run ended early; "" if it did not.
    """

    dialogues: int = 0
    not_taken: int = 0
    bad_rows: int = 0
    rows: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pairs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    left_out: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    unfinished: int = 0
    stopped: str = ""

    def count(self, category: str, manifest: Mapping[str, Any]) -> None:
        self.rows[category] += manifest["rows"]
        self.pairs[category] += manifest["pairs"]
        self.left_out.setdefault(category, collections.Counter()).update(manifest["left_out"])


def shard_path(out: Path, category: str, block: int, compress: bool) -> Path:
    return out / category / f"{category}-{block:05d}.jsonl{'.zst' if compress else ''}"


def manifest_path(shard: Path) -> Path:
    return shard.with_name(shard.name.split(".jsonl")[0] + ".manifest.json")


def read_manifest(shard: Path) -> dict[str, Any] | None:
    """A shard's manifest; None if there is none that matches the file."""
    try:
        manifest = json.loads(manifest_path(shard).read_text(encoding="utf-8"))
        data = shard.read_bytes() if manifest["rows"] else b""
        return manifest if manifest["sha256"] == hashlib.sha256(data).hexdigest() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Locks the folder against other runs, and removes temporary files."""
    with locked(out):
        # Left by an earlier run that was killed while writing.
        for path in out.rglob(".*.partial"):
            path.unlink(missing_ok=True)
        yield


def _claim(out: Path, recipe: Recipe) -> None:
    """Writes the recipe, or checks that the folder has the same one.

    Raises:
        UserError: the folder holds a data set with another recipe.
    """
    path = out / "recipe.json"
    mine = json.loads(json.dumps(recipe.as_json()))
    if not path.exists():
        with atomic_write(path) as f:
            json.dump(mine, f, indent=1, ensure_ascii=False)
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        theirs = {}
    for name, value in ({**_USUAL} | mine).items():
        if (found := ({**_USUAL} | theirs).get(name)) != value:
            raise UserError(
                f"{out}: holds a data set made with {name}={found!r}, but this run has {value!r}; "
                "give another folder, or the same flags to resume"
            )


def generate(
    path: str | Path,
    out: str | Path,
    recipe: Recipe,
    engine: Engine,
    answers: Answers | None = None,
    max_bad_fraction: float = 0.05,
    total: int | None = None,
) -> Summary:
    """Makes all shards that do not exist yet.

    Args:
        path: the dialogues; see `dialogues.input_files`.
        out: the data set's folder.
        recipe: the recipe.
        engine: runs `unit.make_unit` with this recipe's context.
        answers: provides a model's answers, if the recipe uses a model.
        max_bad_fraction: the run stops if a larger fraction of the rows read so far is invalid; checked before each
            block.
        total: number of dialogues, for estimating the time left.

    Raises:
        UserError: too many invalid rows; `out` belongs to another data set or run; a worker died.
    """
    out = Path(out)
    summary = Summary()
    with _locked(out), atomic_write(out / "bad_rows.tsv") as bad_file, Progress("dialogues", total) as progress:
        first_bad: list[str] = []

        def on_bad(where: str, reason: str) -> None:
            summary.bad_rows += 1
            if len(first_bad) < 3:
                first_bad.append(f"{where}: {reason}")
            bad_file.write(f"{where}\t{reason}\n")

        def check_bad() -> None:
            read = summary.dialogues + summary.bad_rows
            if summary.bad_rows > max_bad_fraction * read:
                raise UserError(
                    f"{path}: {summary.bad_rows} of {read} rows are not dialogues, more than "
                    f"--max_bad_fraction={max_bad_fraction}; the first: {'; '.join(first_bad)}"
                )

        def counted() -> Iterator[Dialogue]:
            for row in read_dialogues(path, on_bad):
                dialogue = recipe.selection(row)
                if dialogue is None:
                    summary.not_taken += 1
                    continue
                summary.dialogues += 1
                yield dialogue
                if summary.dialogues == recipe.limit:
                    return

        shards = _Shards(out, recipe, engine, answers, summary)
        first = 0
        try:
            for number, block in enumerate(blocks(counted(), recipe.block)):
                check_bad()
                _claim(out, recipe)
                for category, share in recipe.shares.items():
                    shards.make(Unit(category, share, number, first, block))
                first += len(block)
                progress.add(len(block), f"{sum(summary.rows.values()):,} timelines")
            check_bad()
            if not summary.dialogues:
                raise UserError(f"{path}: holds no dialogue" + (" of the selection" if summary.not_taken else ""))
            shards.finish()
        except Stopped as e:
            summary.stopped = str(e)
            shards.abandon()
        except BrokenProcessPool as e:
            raise UserError(
                "a worker died (out of memory?); finished shards are kept; run again with fewer --workers"
            ) from e
    if not summary.stopped and not summary.unfinished:
        _write_summary(out, recipe, summary)
    return summary


class _Shards:
    """Units in progress: being made, waiting for answers, being made again with them, being written."""

    def __init__(self, out: Path, recipe: Recipe, engine: Engine, answers: Answers | None, summary: Summary):
        self.out, self.recipe, self.engine, self.answers, self.summary = out, recipe, engine, answers, summary
        # Enough to keep all workers busy; units that wait for a model use no CPU.
        self.limit = engine.parallel + (4 if answers else 2 if engine.parallel > 1 else 0)
        self.flying: dict[Future, tuple[Unit, dict[str, Answer]]] = {}

    def make(self, unit: Unit) -> None:
        """Starts a unit unless its shard exists; waits while too many are in progress."""
        shard = shard_path(self.out, unit.category, unit.block, self.recipe.compress)
        manifest = read_manifest(shard)
        if manifest is not None and manifest["recipe"] == self.recipe.hash:
            self.summary.count(unit.category, manifest)
            return
        while len(self.flying) >= self.limit:
            self._step()
        self.flying[self.engine.submit(unit, {})] = (unit, {})

    def finish(self) -> None:
        while self.flying:
            self._step()

    def abandon(self) -> None:
        """Writes finished shards and drops the rest."""
        for future in list(self.flying):
            if future.done() and not future.exception() and isinstance(future.result(), Made):
                unit, _ = self.flying[future]
                if not future.result().pending:
                    self._write(unit, future.result())
                    continue
            future.cancel()
            self.summary.unfinished += 1
        self.flying.clear()

    def _step(self) -> None:
        """Waits until a unit can advance, and moves it one stage further."""
        ready, _ = wait(self.flying, return_when=FIRST_COMPLETED)
        for future in ready:
            unit, known = self.flying.pop(future)
            try:
                result = future.result()
            except Stopped:
                self.summary.unfinished += 1
                raise
            if isinstance(result, Made) and not result.pending:
                self._write(unit, result)
            elif isinstance(result, Made):
                assert self.answers is not None
                self.flying[self.answers.answer(result.pending)] = (unit, known)
            elif result is None:
                self.summary.unfinished += 1
            else:
                known |= result
                self.flying[self.engine.submit(unit, known)] = (unit, known)

    def _write(self, unit: Unit, made: Made) -> None:
        shard = shard_path(self.out, unit.category, unit.block, self.recipe.compress)
        manifest = {
            "shard": shard.name,
            "rows": made.rows,
            "pairs": made.pairs,
            "bytes": len(made.data),
            "sha256": made.sha256,
            "left_out": made.left_out,
            "recipe": self.recipe.hash,
            "versions": self.recipe.versions,
        }
        if made.rows:
            with atomic_write(shard, "wb", compress=False) as f:
                f.write(made.data)
        with atomic_write(manifest_path(shard)) as f:
            json.dump(manifest, f, indent=1, ensure_ascii=False)
        self.summary.count(unit.category, manifest)


def _write_summary(out: Path, recipe: Recipe, summary: Summary) -> None:
    dataset = {
        "dialogues": summary.dialogues,
        "bad_rows": summary.bad_rows,
        "categories": {
            name: {
                "timelines": summary.rows[name],
                "pairs": summary.pairs[name],
                "left_out": dict(sorted(summary.left_out.get(name, {}).items())),
            }
            for name in recipe.shares
        },
        "recipe": recipe.as_json(),
    }
    with atomic_write(out / "dataset.json") as f:
        json.dump(dataset, f, indent=1, ensure_ascii=False)
    write_card(out, dataset)


def parse_shares(categories: Sequence[str], shares: Sequence[str]) -> dict[str, float]:
    """Timelines per source dialogue, by category: each category's default, or the value that a flag gives.

    Args:
        categories: names of categories; "paper" and "all" stand for the six and for all ten.
        shares: "name=number" each.

    Raises:
        UserError: a name is unknown, or a number is not positive.
    """
    names: list[str] = []
    for name in categories:
        if name in ("paper", "all"):
            names += [n for n, c in CATEGORIES.items() if name == "all" or not c.extra]
        elif name in CATEGORIES:
            names.append(name)
        else:
            raise UserError(f"--categories: {name!r} must be one of {', '.join(CATEGORIES)}, paper, all")
    if not names:
        raise UserError(f"--categories: names none of {', '.join(CATEGORIES)}, paper, all")
    found = {name: CATEGORIES[name].share for name in CATEGORIES if name in names}
    for item in shares:
        name, _, value = item.partition("=")
        if name not in found:
            raise UserError(f"--shares: {name!r} is not one of the requested categories, {', '.join(found)}")
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1000:
            raise UserError(f"--shares: {item!r} must be {name}=NUMBER, timelines per dialogue, above 0")
        found[name] = share
    return found
