"""Checkpoints on disk: what is not as it was written is not used."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from duplex_jax.errors import UserError
from duplex_jax.train.checkpoints import SUMS, Record, Store, damage, find


def saved(workdir: Path, steps: tuple[int, ...]) -> None:
    with contextlib.closing(Store(workdir)) as store:
        for step in steps:
            store.save({"w": jax.numpy.full((64, 64), float(step))}, Record(step, step, {}, {}), wait=True)


def restored(workdir: Path) -> float | None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with contextlib.closing(Store(workdir)) as store:
        found = store.restore({"w": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=place)})
        return None if found is None else float(found[0]["w"][0, 0])


def test_a_flipped_bit_is_seen(tmp_path: Path):
    """A file of the right size may hold other weights, and Orbax reads them without a word."""
    saved(tmp_path, (1, 2))
    newest = tmp_path / "checkpoints" / "2"
    sizes = {name: size for name, (size, _) in json.loads((newest / SUMS).read_text()).items() if size}
    largest = max(sizes, key=lambda name: sizes[name])
    for name, size in sizes.items():
        good = (newest / name).read_bytes()
        assert damage(newest, contents=True) == ""
        changed = bytearray(good)
        changed[size // 2] ^= 1
        (newest / name).write_bytes(changed)
        assert damage(newest, contents=True) == f"{name} is not as it was written"
        if name == largest:
            assert restored(tmp_path) == 1
            with pytest.raises(UserError, match=r"is not as it was written; give another of \[1, 2\]"):
                find(f"{tmp_path}@2", "config.optim.decay_from")
        (newest / name).write_bytes(good)
    assert restored(tmp_path) == 2


def test_sums_of_sizes_alone_are_read(tmp_path: Path):
    """As they were written before there were digests."""
    saved(tmp_path, (1,))
    sums = tmp_path / "checkpoints" / "1" / SUMS
    sums.write_text(json.dumps({name: size for name, (size, _) in json.loads(sums.read_text()).items()}))
    assert restored(tmp_path) == 1
