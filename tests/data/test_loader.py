"""The order of rows is the same however many processes read it, and wherever a run goes on."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from duplex_jax.data import dataset, loader
from duplex_jax.errors import UserError
from tests import made_timelines


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dataset.RowSource:
    folder = tmp_path_factory.mktemp("rows")
    data, model = made_timelines.write(folder, n=200)
    dataset.write_packed(data, folder / "out", str(model), 128, "compact")
    return dataset.PackedRows(folder / "out")


def order(sources: list[dataset.RowSource], n: int, **options: object) -> list[tuple[int, int]]:
    batches = loader.training_batches(sources, **options)  # type: ignore[arg-type]
    return list(itertools.islice(itertools.chain.from_iterable(b.rows for b in batches), n))


def test_every_row_once_an_epoch_in_a_new_order(source: dataset.RowSource):
    n = len(source)
    rows = [r for _, r in order([source], 2 * n, size=1, seed=3)]
    assert sorted(rows[:n]) == sorted(rows[n:]) == list(range(n))
    assert rows[:n] != rows[n:]
    assert rows[:n] != [r for _, r in order([source], n, size=1, seed=4)]


def test_any_number_of_processes_reads_the_same_rows(source: dataset.RowSource):
    whole = order([source], 48, size=12, seed=1)
    for processes in (1, 2, 3, 4):
        share = 12 // processes
        parts = [
            order([source], 4 * share, size=12, places=range(p * share, (p + 1) * share), seed=1)
            for p in range(processes)
        ]
        joined = [row for step in range(4) for part in parts for row in part[step * share : (step + 1) * share]]
        assert joined == whole


@pytest.mark.parametrize(("first", "second"), [(12, 12), (12, 8), (6, 12)])
def test_going_on_neither_repeats_nor_skips(source: dataset.RowSource, first: int, second: int):
    whole = order([source], 72, size=12, seed=1)
    begun = order([source], 24, size=first, seed=1)
    assert begun + order([source], 48, size=second, start=24, seed=1) == whole


def test_mixing_by_weight(source: dataset.RowSource):
    rows = order([source, source], 400, size=8, weights=(3.0, 1.0), seed=0)
    assert sum(s == 0 for s, _ in rows) == 300
    with pytest.raises(UserError, match="a positive number for each"):
        order([source, source], 1, size=1, weights=(1.0,))


def test_worker_processes_read_the_same(source: dataset.RowSource):
    alone = loader.training_batches([source], size=4, seed=2)
    several = loader.training_batches([source], size=4, seed=2, workers=2)
    for a, b in itertools.islice(zip(alone, several, strict=False), 6):
        assert a.rows == b.rows
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_idle_weighs_what_it_is_told(source: dataset.RowSource):
    one, half = (next(loader.training_batches([source], size=4, idle_weight=w)).arrays for w in (1.0, 0.5))
    assert set(np.unique(half["loss_weights"])) == {0.0, 0.5, 1.0}
    np.testing.assert_array_equal(one["loss_weights"] > 0, half["loss_weights"] > 0)


def test_evaluation_sees_every_row_once(source: dataset.RowSource, tmp_path: Path):
    chats = made_timelines.write_chats(tmp_path / "chats.jsonl")
    other = dataset.MemoryRows(chats, made_timelines.template(), 128)
    parts = [list(loader.evaluation_batches([source, other], 8, places)) for places in (range(4), range(4, 8))]
    seen = [row for part in parts for batch in part for row in batch.rows if row[0] >= 0]
    assert sorted(seen) == [(0, i) for i in range(len(source))] + [(1, i) for i in range(len(other))]
    names = loader.categories([source, other])
    found = {names[c] for part in parts for b in part for c in np.unique(b.arrays["categories"]) if c >= 0}
    assert found == {"basic", "regeneration", "back_on_topic", "turn_based"}
    for b in (b for part in parts for b in part):
        empty = [i for i, (s, _) in enumerate(b.rows) if s < 0]
        assert not b.arrays["loss_weights"][empty].any()
