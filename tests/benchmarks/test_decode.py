"""`bench decode`: its report has every figure, peers agree on the tokens, and what is missing is named."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import batch as bench_batch
from benchmarks import decode as bench
from benchmarks import llama
from benchmarks.peers import conversation
from duplex_jax import native
from duplex_jax.checkpoint.registry import LoadedModel, load_model
from duplex_jax.decode import floor
from duplex_jax.decode.engine import Engine
from duplex_jax.errors import UserError
from tests.tiny import tiny_model, with_params


@pytest.fixture(scope="module")
def talkative() -> LoadedModel:
    """A model that hardly ever ends a slice early."""
    model = tiny_model()
    head = model.params["head"].copy()
    head[256:] = 0  # nor control tokens, which only we never say
    return dataclasses.replace(model, model=with_params(model.model, head=head))


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def test_report_without_torch(talkative: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "torch", "llama_cpp")
    said: list[str] = []
    report = bench.run(talkative, [32, 128], repeats=2, slow_repeats=1, say=said.append)
    assert set(report["left_out"]) == {"re-encoding (torch)", "cached (torch)", "llama.cpp"}
    assert any("torch not installed" in line for line in said)
    rows = {(row["history"], row["peer"]): row for row in json.loads(json.dumps(report))["rows"]}
    assert len(rows) == 4
    for history in (32, 128):
        ours, again = rows[history, "ours"], rows[history, "re-encoding (JAX)"]
        assert ours["tokens"] == 16  # one pending, 6 in, 10 out of which the last is not fed
        assert again["tokens"] == history + 15
        assert again["same_tokens"] == 10
        assert (ours["repeats"], again["repeats"]) == (2, 1)
        assert 0 < ours["min_seconds"] <= ours["median_seconds"]
        assert ours["ratio"] == 1
    assert report["flatness"]["ours"] > 0
    assert 0 < rows[32, "ours"]["floor_seconds"] < rows[128, "ours"]["floor_seconds"]
    for history in (32, 128) if native.available() else ():
        parts = rows[history, "ours"]["parts"]
        assert list(parts) == ["products", "attention", "small", "head", "rest"]
        assert min(parts.values()) > 0
    text = "\n".join(bench.table(report))
    assert "left out: cached (torch)" in text
    assert "re-encoding (JAX)" in text
    if importlib.util.find_spec("matplotlib"):
        bench.plot(report, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_torch_peers_say_the_same(talkative: LoadedModel) -> None:
    pytest.importorskip("torch")
    report = bench.run(talkative, [40], repeats=1, slow_repeats=1)
    assert set(report["left_out"]) == {"llama.cpp"}  # which has no name for this tokenizer
    rows = {row["peer"]: row for row in report["rows"]}
    assert {name: row["tokens"] for name, row in rows.items()} == {
        "ours": 16, "re-encoding (JAX)": 55, "re-encoding (torch)": 55, "cached (torch)": 16,
    }  # fmt: skip
    assert all(row["same_tokens"] == 10 for row in rows.values())


@pytest.mark.slow
def test_compiled_torch_says_the_same(talkative: LoadedModel) -> None:
    """Behind a long history and behind a beginning of it, in either order."""
    pytest.importorskip("torch")
    report = bench.run(talkative, [24, 60], repeats=2, slow_repeats=1, compiled=True)
    rows = [row for row in report["rows"] if row["peer"] == "compiled (torch)"]
    assert [(row["tokens"], row["same_tokens"], row["repeats"]) for row in rows] == [(16, 10, 2)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_llama_cpp_does_the_same_work(precision: str) -> None:
    """Its logits behind a cut and copied sequence are ours, but for a constant that changes no probability, within what
    its float16 entries and Q8_0 allow."""
    pytest.importorskip("llama_cpp")
    model = load_model("smollm2-135m-instruct", dtype="float32")
    ids = conversation(model.template, 120)
    peer = llama.Llama(model, precision, 2, 200)
    peer.encode(0, ids)
    peer.copy(0, 1)
    peer.cut(1, 100)
    engine = Engine(model.model, model.template, capacity=256, dtype="float32", weights=precision)
    row = engine.open()
    engine.append(row, [*ids[:100], *ids[10:13]])
    theirs = peer.decode([(1, 100, ids[10:13]), (0, 120, ids[20:22])])
    ours = engine.logits(row)[: model.config.vocab_size]
    peer.close()
    apart = theirs[0] - ours
    assert np.abs(apart - apart.mean()).mean() < {"float32": 0.01, "int8": 0.5}[precision]
    assert theirs[0].argmax() == ours.argmax()


def test_a_file_for_llama_cpp_must_be_there() -> None:
    with pytest.raises(UserError, match=r"gguf=/nowhere.gguf: no such file"):
        bench.bench_decode(gguf="/nowhere.gguf")


def test_the_floor_of_a_slice() -> None:
    """Counted from the arrays of a model, for memory that is slow and for arithmetic that is."""
    model = tiny_model()
    sizes = [w.size for w in jax.tree.leaves(model.params) if w.ndim > 1]
    weights = sum(sizes) - model.params["embed"].size
    c = model.config
    entries = 2 * 50 * c.num_layers * c.num_kv_heads * c.head_dim
    slow_memory = floor.Ceilings(read=1e6, copy=1e6, flops=1e18)
    found = floor.slice_floor(c, slow_memory, 50, 7, 10, rows=3, weights="int8", entries="bfloat16")
    assert found == pytest.approx(10 * (weights + 3 * entries * 2) / 1e6, rel=0.01)  # norms are read, too
    scales = entries // c.head_dim * 4
    with_scales = floor.slice_floor(c, slow_memory, 50, 7, 10, rows=3, weights="int8", entries="int8")
    assert found - with_scales == pytest.approx(10 * 3 * (entries - scales) / 1e6)
    slow_sums = floor.Ceilings(read=1e18, copy=1e18, flops=1e6)
    head = model.params["head"].size
    scores = 4 * 50 * c.num_layers * c.num_heads * c.head_dim
    wanted = 3 * ((7 + 9) * (2 * (weights - head) + scores) + 10 * 2 * head) / 1e6
    assert floor.slice_floor(c, slow_sums, 50, 7, 10, rows=3) == pytest.approx(wanted, rel=0.01)


def test_ceilings_are_measured() -> None:
    report = floor.bench_ceilings(megabytes=8)
    assert min(report["read"], report["copy"], report["flops"]) > 1e8
    assert len(floor.table(report)) == 3
    with pytest.raises(UserError, match="1 or more"):
        floor.bench_ceilings(megabytes=0)


def test_refusals(talkative: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="256,4096"):
        bench.bench_decode(histories="many")
    with pytest.raises(UserError, match="needs 9016 positions"):
        bench.run(talkative, [9000])
    with pytest.raises(UserError, match="at least 2"):
        bench.run(talkative, [1])
    with pytest.raises(UserError, match="precision 'int4' is unknown; one of float32"):
        bench.run(talkative, [32], precision="int4")
    with pytest.raises(UserError, match="precision 'int4' is unknown; one of float32"):
        bench_batch.bench_batch(precision="int4")
    with pytest.raises(UserError, match="1 or more"):
        bench_batch.bench_batch(sessions=0)
    hide(monkeypatch, "matplotlib")
    with pytest.raises(UserError, match="pip install"):
        bench.bench_decode(png="a.png")
