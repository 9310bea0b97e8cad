"""A packed dataset holds what was packed, whoever packed it, and says so when it does not."""

import json
from pathlib import Path

import numpy as np
import pytest

from duplex_jax.checkpoint.resolve import load_template
from duplex_jax.data import dataset, encode
from duplex_jax.errors import UserError
from tests import made_timelines


def rows_equal(a: dataset.RowSource, b: dataset.RowSource) -> None:
    assert len(a) == len(b)
    for i in range(len(a)):
        x, y = a[i], b[i]
        for field in ("tokens", "segment_ids", "positions", "codes", "categories"):
            np.testing.assert_array_equal(getattr(x, field), getattr(y, field))
        assert x.sources == y.sources


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("packed")
    data, model = made_timelines.write(folder)
    dataset.write_packed(data, folder / "out", str(model), 256, "compact")
    return data, model, folder / "out"


def test_packed_once_or_on_the_spot_is_the_same(packed: tuple[Path, Path, Path]):
    data, model, out = packed
    template = load_template(str(model), "compact")
    source = dataset.open_rows(out, template, 256)
    rows_equal(source, dataset.open_rows(data, template, 256))
    manifest = dataset.read_manifest(out)
    tokens = [len(encode.encode_timeline(template, t).ids) for t in made_timelines.timelines(60)]
    assert manifest.tokens == sum(tokens)
    assert manifest.decisions == sum(len(t.pairs) for t in made_timelines.timelines(60))
    assert sum(manifest.category_tokens) == manifest.tokens
    assert manifest.conversations == 60
    names = [manifest.categories[i] for i in source[0].categories if i >= 0]
    assert set(names) <= {"basic", "regeneration", "back_on_topic"}


def test_several_workers_make_the_same_bytes(packed: tuple[Path, Path, Path], tmp_path: Path):
    data, model, out = packed
    again = dataset.write_packed(data, tmp_path / "two", str(model), 256, "compact", workers=2)
    assert again.hash == dataset.read_manifest(out).hash


def test_timelines_and_chats_together(tmp_path: Path):
    data, model = made_timelines.write(tmp_path)
    made_timelines.write_chats(data / "chats.jsonl")
    manifest = dataset.write_packed(data, tmp_path / "out", str(model), 256, "compact")
    assert encode.TURN_BASED in manifest.categories


def copy(out: Path, to: Path) -> Path:
    to.mkdir()
    for f in out.iterdir():
        (to / f.name).write_bytes(f.read_bytes())
    return to


def test_a_damaged_shard_is_named(packed: tuple[Path, Path, Path], tmp_path: Path):
    broken = copy(packed[2], tmp_path / "broken")
    shard = broken / dataset.read_manifest(broken).shards[0].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"rows-00000\.arrayrecord: has \d+ bytes instead of"):
        dataset.PackedRows(broken)
    # A file has runs of zeros between its blocks; a run without any lies inside a record.
    at = next(i for i in range(1000, len(whole)) if 0 not in whole[i : i + 32])
    shard.write_bytes(whole[:at] + bytes(32) + whole[at + 32 :])
    with pytest.raises(UserError, match="have changed since packing"):
        dataset.PackedRows(broken, verify=True)
    source = dataset.PackedRows(broken)
    with pytest.raises(UserError, match=r"rows-00000\.arrayrecord"):
        [source[i] for i in range(len(source))]
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        dataset.PackedRows(broken)


def test_what_does_not_fit_is_refused(packed: tuple[Path, Path, Path]):
    _, model, out = packed
    compact, chatml = (load_template(str(model), name) for name in ("compact", "chatml"))
    with pytest.raises(UserError, match="rows of 256 tokens but the config has 128"):
        dataset.open_rows(out, compact, 128)
    with pytest.raises(UserError, match="packed with template 'compact' but the model has 'chatml'"):
        dataset.open_rows(out, chatml, 256)
    other = made_timelines.template()
    other.tokenizer = other.tokenizer.with_tokens(["<new>"])
    with pytest.raises(UserError, match="which is not the model's"):
        dataset.open_rows(out, other, 256)


def test_nothing_half_written(packed: tuple[Path, Path, Path], tmp_path: Path):
    data, model = made_timelines.write(tmp_path)
    (data / "c.jsonl").write_text('{"output": []}\n')
    with pytest.raises(UserError, match=r"c\.jsonl:1"):
        dataset.write_packed(data, tmp_path / "out", str(model), 256, "compact")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["timelines", "tokenizer"]
    with pytest.raises(UserError, match="already exists"):
        dataset.write_packed(data, packed[2], str(model), 256)
    with pytest.raises(UserError, match="must be 16 to"):
        dataset.write_packed(data, tmp_path / "x", str(model), 70000)
    with pytest.raises(UserError, match="no such file"):
        dataset.write_packed(tmp_path / "none", tmp_path / "x", str(model), 256)


def test_another_format_says_so(packed: tuple[Path, Path, Path], tmp_path: Path):
    broken = copy(packed[2], tmp_path / "broken")
    manifest = json.loads((broken / dataset.MANIFEST).read_text())
    (broken / dataset.MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="pack again"):
        dataset.PackedRows(broken)
