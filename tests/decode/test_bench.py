"""`bench decode`: its report has every figure, peers agree on the tokens, and what is missing is named."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.decode import bench
from duplex_jax.errors import UserError
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def talkative() -> LoadedModel:
    """A model that hardly ever ends a slice early."""
    model = tiny_model()
    head = model.params["head"].copy()
    head[256:] = 0  # nor control tokens, which only we never say
    return dataclasses.replace(model, params=model.params | {"head": head})


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def test_report_without_torch(talkative: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "torch")
    said: list[str] = []
    report = bench.run(talkative, [32, 128], repeats=2, slow_repeats=1, say=said.append)
    assert set(report["left_out"]) == {"re-encoding (torch)", "cached (torch)"}
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
    text = "\n".join(bench.table(report))
    assert "left out: cached (torch)" in text
    assert "re-encoding (JAX)" in text
    if importlib.util.find_spec("matplotlib"):
        bench.plot(report, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_torch_peers_say_the_same(talkative: LoadedModel) -> None:
    pytest.importorskip("torch")
    report = bench.run(talkative, [40], repeats=1, slow_repeats=1)
    assert not report["left_out"]
    rows = {row["peer"]: row for row in report["rows"]}
    assert {name: row["tokens"] for name, row in rows.items()} == {
        "ours": 16, "re-encoding (JAX)": 55, "re-encoding (torch)": 55, "cached (torch)": 16,
    }  # fmt: skip
    assert all(row["same_tokens"] == 10 for row in rows.values())


def test_refusals(talkative: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="256,4096"):
        bench.bench_decode(histories="many")
    with pytest.raises(UserError, match="needs 9016 positions"):
        bench.run(talkative, [9000])
    with pytest.raises(UserError, match="at least 2"):
        bench.run(talkative, [1])
    hide(monkeypatch, "matplotlib")
    with pytest.raises(UserError, match="pip install"):
        bench.bench_decode(png="a.png")
