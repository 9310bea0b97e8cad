"""Table 1 for any data set, compared with the paper's, and histograms of lengths."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from data_gen.engines import make_engine
from data_gen.progress import Progress
from data_gen.shards import guess_category, shard_files
from data_gen.table1 import PAPER, TOTAL
from duplex_jax.errors import UserError
from duplex_jax.files import check_writable
from duplex_jax.template import default_template, make_template, missing_tokens
from duplex_jax.timeline import read_timelines
from duplex_jax.tokenizer import Tokenizer, resolve_tokenizer

FAR_OFF = 2.0
_TOKEN_BIN = 64


@dataclasses.dataclass
class Lengths:
    """Number and length of one category's timelines.

    Attributes:
        dialogues: number of timelines.
        tokens: their total number of tokens, markers included.
        by_pairs: timelines by number of slice pairs.
        by_tokens: timelines by number of tokens, in bins of 64.
    """

    dialogues: int = 0
    tokens: int = 0
    by_pairs: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    by_tokens: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, pairs: int, tokens: int) -> None:
        self.dialogues += 1
        self.tokens += tokens
        self.by_pairs[pairs] += 1
        self.by_tokens[tokens // _TOKEN_BIN * _TOKEN_BIN] += 1

    def merge(self, other: "Lengths") -> None:
        self.dialogues += other.dialogues
        self.tokens += other.tokens
        self.by_pairs.update(other.by_pairs)
        self.by_tokens.update(other.by_tokens)

    @property
    def average_pairs(self) -> float:
        return sum(n * count for n, count in self.by_pairs.items()) / max(self.dialogues, 1)

    @property
    def average_tokens(self) -> float:
        return self.tokens / max(self.dialogues, 1)


@dataclasses.dataclass
class Stats:
    """A data set's lengths by category, and how its tokens were counted."""

    tokenizer: str
    template: str
    categories: dict[str, Lengths] = dataclasses.field(default_factory=dict)
    bad_lines: int = 0

    @property
    def total(self) -> Lengths:
        total = Lengths()
        for lengths in self.categories.values():
            total.merge(lengths)
        return total

    def as_json(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer,
            "template": self.template,
            "bad_lines": self.bad_lines,
            "categories": {
                name: {
                    "dialogues": lengths.dialogues,
                    "average_pairs": round(lengths.average_pairs, 2),
                    "average_tokens": round(lengths.average_tokens, 2),
                    "by_pairs": dict(sorted(lengths.by_pairs.items())),
                    "by_tokens": dict(sorted(lengths.by_tokens.items())),
                }
                for name, lengths in self.categories.items()
            },
        }


def measure(tokenizer: Tokenizer, path: Path) -> tuple[dict[str, Lengths], int]:
    """One file's lengths by category, and how many of its lines are invalid."""
    name = default_template(tokenizer)
    if missing := missing_tokens(name, tokenizer):
        tokenizer = tokenizer.with_tokens(missing)
    template = make_template(name, tokenizer)
    found: dict[str, Lengths] = {}
    bad: list[object] = []
    for timeline in read_timelines(path, bad.append):
        category = timeline.category or guess_category(path)
        found.setdefault(category, Lengths()).add(len(timeline.pairs), len(template.encode(timeline).ids))
    return found, len(bad)


def read_stats(folder: str | Path, tokenizer_name: str, workers: int = 1) -> Stats:
    """Measures every timeline of a data set, including published files.

    Raises:
        UserError: there is no data set, or no such tokenizer.
    """
    files = shard_files(folder)
    tokenizer = resolve_tokenizer(tokenizer_name)
    stats = Stats(tokenizer_name, default_template(tokenizer))
    engine = make_engine("local", measure, tokenizer, workers)
    found: dict[str, Lengths] = {}
    try:
        with Progress("files", len(files)) as progress:
            flying: set[Future] = set()
            todo = iter(files)
            while True:
                flying |= {engine.submit(f) for f in itertools.islice(todo, 2 * workers - len(flying))}
                if not flying:
                    break
                ready, flying = wait(flying, return_when=FIRST_COMPLETED)
                for future in ready:
                    lengths, bad = future.result()
                    stats.bad_lines += bad
                    for name, more in lengths.items():
                        found.setdefault(name, Lengths()).merge(more)
                    progress.add()
    finally:
        engine.close()
    stats.categories = {name: found[name] for name in [*PAPER, *sorted(set(found) - set(PAPER))] if name in found}
    if not stats.categories:
        raise UserError(f"{folder}: holds no timeline ({stats.bad_lines} lines are not timelines)")
    return stats


def table(stats: Stats) -> Iterator[str]:
    """A data set's Table 1 next to the paper's, followed by large deviations."""
    yield f"tokens: tokenizer {stats.tokenizer}, template {stats.template} (the paper's: MiniCPM-duplex)"
    columns = ("dialogues", 11), ("slice pairs", 10), ("over basic", 7), ("tokens", 10)
    yield " " * 24 + "".join(f"{name:>{2 * width}}" for name, width in columns)
    yield f"{'category':24}" + "".join(f"{'here':>{width}}{'paper':>{width}}" for _, width in columns)
    basic = stats.categories.get("basic")
    for name, here in [*stats.categories.items(), ("total", stats.total)]:
        paper = TOTAL if name == "total" else PAPER.get(name)
        cells = [
            f"{here.dialogues:,}", f"{paper.dialogues:,}" if paper else "-",
            f"{here.average_pairs:,.1f}", f"{paper.pairs:,.1f}" if paper else "-",
            f"{here.average_pairs / basic.average_pairs:.2f}" if basic else "-",
            f"{paper.pairs / PAPER['basic'].pairs:.2f}" if paper else "-",
            f"{here.average_tokens:,.1f}", f"{paper.tokens:,.1f}" if paper else "-",
        ]  # fmt: skip
        widths = [width for _, width in columns for _ in range(2)]
        yield f"{name:24}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    if stats.bad_lines:
        yield f"warning: {stats.bad_lines:,} lines are no timelines"
    for name, lengths in stats.categories.items():
        if name not in PAPER:
            continue
        for what, here_average, paper_average in (
            ("slice pairs", lengths.average_pairs, PAPER[name].pairs),
            ("tokens", lengths.average_tokens, PAPER[name].tokens),
        ):
            ratio = here_average / paper_average
            if not 1 / FAR_OFF <= ratio <= FAR_OFF:
                yield f"warning: {name}: {here_average:,.1f} {what} on average, {ratio:.2f} of the paper's"


def write_histograms(stats: Stats, path: Path) -> str:
    """Draws histograms of pairs and tokens by category; returns a message for the user."""
    try:
        import matplotlib
    except ImportError:
        return "; histograms need matplotlib: pip install 'duplex-jax[plot]'"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(stats.categories), 2, figsize=(9, 1.8 * len(stats.categories)), squeeze=False, layout="constrained"
    )
    for row, (name, lengths) in zip(axes, stats.categories.items(), strict=True):
        for axis, counts, what in zip(
            row, (lengths.by_pairs, lengths.by_tokens), ("slice pairs", "tokens"), strict=True
        ):
            axis.hist(list(counts), weights=list(counts.values()), bins=40)
            axis.set_title(f"{name}: {what}", fontsize=9)
            axis.tick_params(labelsize=7)
            if name in PAPER:
                axis.axvline(
                    getattr(PAPER[name], what.split()[-1]), color="tab:red", linewidth=1, label="paper's average"
                )
                axis.legend(fontsize=7)
    check_writable(path)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f" and {path}"
