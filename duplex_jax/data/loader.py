"""Training batches from a seeded global order over all rows, of which each process reads its own part.

The order is a pure function of the seed: position g of the run always holds the same row, and batch i consists of the
positions `start + i * size ... start + (i + 1) * size - 1`. A run's data position is therefore one integer, and a run
resumed with other hosts, workers or batch sizes neither repeats nor skips a row.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from duplex_jax.data import rows
from duplex_jax.data.dataset import RowSource
from duplex_jax.errors import UserError
from duplex_jax.template import WEIGHED, Code


@dataclasses.dataclass
class Batch:
    """This process's rows of one step.

    Attributes:
        arrays: `tokens`, `segment_ids`, `positions` int32 and `loss_weights` float32, each `[n, T]`; a weight applies
            to the prediction of its own token. For evaluation also `decisions` (bool) and `categories` (int32, -1 in
            padding).
        rows: (source, row number) of each row.
    """

    arrays: dict[str, np.ndarray]
    rows: list[tuple[int, int]]


class _Numbered(grain.MapDataset):
    """A source's rows with their numbers, repeated endlessly in a new order each time."""

    def __init__(self, number: int, source: RowSource, seed: int):
        super().__init__()
        self._order = grain.MapDataset.range(len(source)).shuffle(seed=seed % 2**32).repeat()
        self._number, self._source = number, source

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: Any) -> Any:
        row = int(self._order[i])
        return self._number, row, self._source[row]


class _Batches(grain.MapDataset):
    """Batches of this process by index."""

    def __init__(self, ordered: grain.MapDataset, start: int, size: int, places: Sequence[int], idle_weight: float):
        super().__init__([ordered])
        self._ordered, self._start, self._size = ordered, start, size
        self._places, self._idle_weight = list(places), idle_weight

    def __len__(self) -> int:
        return (len(self._ordered) - self._start) // self._size

    def __getitem__(self, i: Any) -> Batch:
        first = self._start + i * self._size
        taken = [self._ordered[first + place] for place in self._places]
        return Batch(to_arrays([row for _, _, row in taken], self._idle_weight), [(s, r) for s, r, _ in taken])


def to_arrays(batch: Sequence[rows.Row], idle_weight: float, evaluation: bool = False) -> dict[str, np.ndarray]:
    """Stacks rows to `[n, T]` and converts codes to loss weights."""
    weights = np.zeros(WEIGHED + 1, np.float32)
    weights[[Code.SPOKEN, Code.IDLE]] = 1.0, idle_weight
    arrays = {
        "tokens": np.stack([row.tokens for row in batch]),
        "segment_ids": np.stack([row.segment_ids for row in batch]),
        "positions": np.stack([row.positions for row in batch]),
        "loss_weights": weights[np.stack([row.codes for row in batch]) & WEIGHED],
    }
    if evaluation:
        arrays["decisions"] = np.stack([row.codes for row in batch]) & Code.DECISION != 0
        arrays["categories"] = np.stack([row.categories for row in batch])
    return arrays


def global_order(sources: Sequence[RowSource], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """(source, row number, row) at every position of a run, mixed by `weights`, or by size if there are none.

    Raises:
        UserError: the weights do not match the sources, or a source has no rows.
    """
    if weights and (len(weights) != len(sources) or min(weights) <= 0):
        raise UserError(f"data.weights: {list(weights)} for {len(sources)} source(s); give a positive number for each")
    for source in sources:
        if not len(source):
            raise UserError(f"{source.name}: has no rows; pack more conversations")
    ordered = [_Numbered(i, source, seed + 7919 * i) for i, source in enumerate(sources)]
    if len(ordered) == 1:
        return ordered[0]
    return grain.MapDataset.mix(ordered, weights or [float(len(s)) for s in sources])


def training_batches(
    sources: Sequence[RowSource],
    weights: Sequence[float] = (),
    *,
    seed: int = 0,
    size: int,
    places: Sequence[int] | None = None,
    start: int = 0,
    idle_weight: float = 1.0,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """An endless iterator of batches.

    Args:
        sources: datasets.
        weights: each source's share of the rows; proportional to size if empty.
        seed: seed of the order.
        size: rows of a batch over all processes.
        places: indices of the batch's rows that this process reads; all by default.
        start: the run's position: number of rows already consumed.
        idle_weight: loss weight of idle decisions.
        workers: processes that read; 0 for a thread of this one.
        prefetch: number of batches to read ahead.
    """
    ordered = global_order(sources, weights, seed)
    batches = _Batches(ordered, start, size, range(size) if places is None else places, idle_weight)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain passes flags to its workers, so they must be parsed
            flags.FLAGS.mark_as_parsed()
        read = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        return iter(read.mp_prefetch(options))
    read = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, prefetch)))
    return iter(read)


def evaluation_batches(
    sources: Sequence[RowSource], size: int, places: Sequence[int], idle_weight: float = 1.0, most: int = 0
) -> Iterator[Batch]:
    """Every row once and in order, the last batch padded with empty rows; at most `most` batches, 0 for all."""
    everything = [(s, r) for s, source in enumerate(sources) for r in range(len(source))]
    names = categories(sources)
    total = -(-len(everything) // size)
    for b in range(min(total, most) if most else total):
        taken, numbers = [], []
        for place in places:
            k = b * size + place
            if k < len(everything):
                s, r = everything[k]
                row = sources[s][r]
                # Each source numbers its own categories; evaluation uses one common list.
                mapping = np.array([*(names.index(c) for c in sources[s].categories), -1], np.int32)
                taken.append(dataclasses.replace(row, categories=mapping[row.categories]))
                numbers.append((s, r))
            else:
                taken.append(_empty(sources[0].length))
                numbers.append((-1, -1))
        yield Batch(to_arrays(taken, idle_weight, evaluation=True), numbers)


def categories(sources: Sequence[RowSource]) -> list[str]:
    """The category names of all sources, without duplicates."""
    return list(dict.fromkeys(name for source in sources for name in source.categories))


def _empty(length: int) -> rows.Row:
    zero = np.zeros(length, np.int32)
    return rows.Row(zero, zero, zero, np.zeros(length, np.uint8), zero - 1, ())
