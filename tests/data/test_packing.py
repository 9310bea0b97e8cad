"""Packing loses nothing, cuts nothing, and leaves next to nothing empty."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex_jax.data.packing import best_fit, pack
from duplex_jax.data.rows import Document, from_bytes, to_bytes, token_bytes
from duplex_jax.errors import UserError
from duplex_jax.template import Code


def document(n: int, source: int = 0, category: int = 0, vocab: int = 60000) -> Document:
    rng = np.random.default_rng(source)
    return Document(
        rng.integers(0, vocab, n).astype(np.int32), rng.integers(0, 7, n).astype(np.uint8), category, source
    )


@given(st.lists(st.integers(1, 100), max_size=80))
def test_every_document_lies_whole_in_one_bin(lengths: list[int]):
    bins = best_fit(lengths, 100)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 100 for b in bins)
    # Never worse than the next-fit bound: two bins together are always over one bin's room.
    assert len(bins) <= 2 * sum(lengths) / 100 + 1


@settings(max_examples=30)
@given(st.lists(st.integers(1, 64), max_size=120), st.integers(1, 40))
def test_windows_lose_nothing(lengths: list[int], window: int):
    documents = [document(n, i) for i, n in enumerate(lengths)]
    rows = list(pack(documents, 64, window))
    assert sorted(d.source for row in rows for d in row) == list(range(len(lengths)))
    assert all(sum(len(d.ids) for d in row) <= 64 for row in rows)


def test_conversations_fill_rows_to_99_percent():
    rng = random.Random(0)
    lengths = [min(4096, int(rng.lognormvariate(6.4, 0.6))) for _ in range(6000)]
    documents = [Document(np.zeros(n, np.int32), np.zeros(n, np.uint8), 0, i) for i, n in enumerate(lengths)]
    rows = list(pack(documents, 4096, window=2000))
    assert sum(lengths) / (len(rows) * 4096) > 0.99


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(UserError, match="split it first"):
        best_fit([101], 100)


@pytest.mark.parametrize("vocab", [300, 60000, 122753])
def test_a_row_comes_back(vocab: int):
    documents = [document(5, 1, 2, vocab), document(1, 2, 0, vocab), document(6, 3, 1, vocab)]
    row = from_bytes(to_bytes(documents, token_bytes(vocab)), 16, token_bytes(vocab))
    np.testing.assert_array_equal(row.tokens[:12], np.concatenate([d.ids for d in documents]))
    np.testing.assert_array_equal(row.codes[:12], np.concatenate([d.codes for d in documents]))
    np.testing.assert_array_equal(row.segment_ids, [1] * 5 + [2] + [3] * 6 + [0] * 4)
    np.testing.assert_array_equal(row.positions[:12], [*range(5), 0, *range(6)])
    np.testing.assert_array_equal(row.categories, [2] * 5 + [0] + [1] * 6 + [-1] * 4)
    assert row.sources == (1, 2, 3)
    assert not (row.codes[12:] & Code.DECISION).any()


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_a_cut_record_is_an_error_and_no_row(cut: int):
    record = to_bytes([document(9, 1)], 2)
    with pytest.raises(UserError, match="pack again"):
        from_bytes(record[:cut], 16, 2)
    with pytest.raises(UserError, match="pack again"):
        from_bytes(record, 8, 2)
