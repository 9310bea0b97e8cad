"""Best-fit packing of whole documents into rows of one length."""

import bisect
from collections.abc import Iterable, Iterator, Sequence

from duplex_jax.data.rows import Document
from duplex_jax.errors import UserError

WINDOW = 100_000


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: puts documents, longest first, each into the fullest bin that still has room for it.

    Args:
        lengths: lengths of the documents; none exceeds `capacity`.
        capacity: capacity of a bin.

    Returns:
        The document indices in each bin.

    Raises:
        UserError: a document is longer than a bin.
    """
    bins: list[list[int]] = []
    free: list[int] = []  # distinct free capacities of open bins, ascending
    by_free: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        if n > capacity:
            raise UserError(f"a document of {n} tokens does not fit a row of {capacity}; split it first")
        k = bisect.bisect_left(free, n)
        if k == len(free):
            bins.append([i])
            room, b = capacity - n, len(bins) - 1
        else:
            room = free[k]
            b = by_free[room].pop()
            if not by_free[room]:
                del by_free[room], free[k]
            bins[b].append(i)
            room -= n
        if room not in by_free:
            by_free[room] = []
            bisect.insort(free, room)
        by_free[room].append(b)
    return bins


def pack(documents: Iterable[Document], length: int, window: int = WINDOW) -> Iterator[list[Document]]:
    """Packs whole documents into rows, `window` documents at a time.

    Poorly filled rows are packed again with the next window, so only the last window leaves gaps.
    """
    pending: list[Document] = []
    for document in documents:
        pending.append(document)
        if len(pending) >= window:
            rows = _rows(pending, length)
            pending = []
            for row in rows:
                if sum(len(d.ids) for d in row) >= 0.998 * length:
                    yield row
                else:
                    pending += row
            if len(pending) > window // 2:  # avoids accumulating documents that never pack well
                yield from _rows(pending, length)
                pending = []
    yield from _rows(pending, length)


def _rows(documents: list[Document], length: int) -> list[list[Document]]:
    return [[documents[i] for i in row] for row in best_fit([len(d.ids) for d in documents], length)]
