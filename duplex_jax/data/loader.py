"""Batches for training: a global order over all rows by seed, of which every process reads its own part.

The order is a pure function of the seed: place g of the run holds one row, whatever the number of processes, and batch
i is made of the places `start + i * size ... start + (i + 1) * size`. So the position of a run is one integer, the
places behind it, and a run that goes on with other hosts, workers or batch sizes neither repeats nor skips a row.
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
    """Rows of one step that belong to this process.

    Attributes:
        arrays: `tokens`, `segment_ids`, `positions` int32 and `loss_weights` float32, each `[n, T]`; the weight of
            predicting that token. For evaluation also `decisions` (bool) and `categories` (int32, -1 in padding).
        rows: (source, row) of each.
    """

    arrays: dict[str, np.ndarray]
    rows: list[tuple[int, int]]


class _Numbered(grain.MapDataset):
    """A source's rows with their numbers, over and over again in a new order each time."""

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
    """Element i is batch i of this process."""

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
    """Rows stacked to `[n, T]`, what each token counts for turned into its weight."""
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
    """(source, row number, row) for every place of a run, mixed by weight; without weights by size.

    Raises:
        UserError: the weights do not fit the sources, or a source has no rows.
    """
    if weights and (len(weights) != len(sources) or min(weights) <= 0):
        raise UserError(f"data.weights: {list(weights)} for {len(sources)} source(s); one positive number each")
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
    """Batches without end.

    Args:
        sources: where rows come from.
        weights: the share of each source in the rows; by size where there are none.
        seed: of the order.
        size: rows of a batch over all processes.
        places: which of them this process reads; all by default.
        start: the run's position: rows that came before.
        idle_weight: the loss weight of idle decisions.
        workers: processes that read; 0 for a thread of this one.
        prefetch: batches read ahead.
    """
    ordered = global_order(sources, weights, seed)
    batches = _Batches(ordered, start, size, range(size) if places is None else places, idle_weight)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain hands flags on to its workers, and insists that there are some
            flags.FLAGS.mark_as_parsed()
        read = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        return iter(read.mp_prefetch(options))
    read = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, prefetch)))
    return iter(read)


def evaluation_batches(
    sources: Sequence[RowSource], size: int, places: Sequence[int], idle_weight: float = 1.0, most: int = 0
) -> Iterator[Batch]:
    """Every row once and in order, the last batch filled up with empty rows; `most` batches, 0 for all."""
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
                # Sources number their categories apart; evaluation has one list.
                mapping = np.array([*(names.index(c) for c in sources[s].categories), -1], np.int32)
                taken.append(dataclasses.replace(row, categories=mapping[row.categories]))
                numbers.append((s, r))
            else:
                taken.append(_empty(sources[0].length))
                numbers.append((-1, -1))
        yield Batch(to_arrays(taken, idle_weight, evaluation=True), numbers)


def categories(sources: Sequence[RowSource]) -> list[str]:
    """The category names of all sources, each once."""
    return list(dict.fromkeys(name for source in sources for name in source.categories))


def _empty(length: int) -> rows.Row:
    zero = np.zeros(length, np.int32)
    return rows.Row(zero, zero, zero, np.zeros(length, np.uint8), zero - 1, ())
