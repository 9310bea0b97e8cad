"""Compiling for absent hardware: reports on pretended devices always, on a TPU topology where libtpu is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from duplex_jax import parallel
from duplex_jax.train import compile as compiling

REPOSITORY = Path(__file__).parents[2]


def run(*flags: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.compile", *flags], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=timeout, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


TINY = (
    "--config=configs/tiny.py", "--config.data.length=128", "--config.model.shape.head_dim=64", "--sessions=16",
    "--capacity=128",
)  # fmt: skip


def test_pretended_devices(tmp_path: Path):
    result = run(*TINY, "--mesh=cpu8", f"--json={tmp_path / 'r.json'}")
    assert result.returncode == 0, result.stderr
    train, decode = json.loads((tmp_path / "r.json").read_text())
    assert "train on cpu8" in result.stdout
    assert train["fits"]
    assert train["argument_bytes"] > 3 * 4 * 49152 * 64 / 8  # a device's share of masters and moments
    assert train["argument_bytes"] < 3 * 4 * 49152 * 64
    assert {"all-gather", "all-reduce"} <= set(train["collectives"])
    assert decode["fits"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'duplex-jax[tpu]'")
def test_a_tpu_slice(tmp_path: Path):
    result = run(*TINY, "--mesh=v5e-16", "--config.data.batch=16", f"--json={tmp_path / 'r.json'}")
    assert result.returncode == 0, result.stderr
    assert [r["fits"] for r in json.loads((tmp_path / "r.json").read_text())] == [True, True]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'duplex-jax[tpu]'")
def test_the_paper_s_run_on_v5e_16(tmp_path: Path):
    """Full size: 800 rows of 4,096, one on a chip at a time, float32 masters, full remat, splash attention."""
    result = run(
        "--config=configs/minicpm_2b_duplex.py",
        "--mesh=v5e-16",
        "--programs=train",
        f"--json={tmp_path / 'r.json'}",
        timeout=3000,
    )
    assert result.returncode == 0, result.stderr
    (report,) = json.loads((tmp_path / "r.json").read_text())
    assert report["fits"]
    assert report["peak_bytes"] < 10 * 2**30


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=v5e-16", "--tensor=8", "--fsdp=2"], "36 heads do not divide by tensor=8"),
        (["--mesh=v5e-256"], "a multiple of 256, such as 768, does"),
        (["--programs=all"], "must be train or decode, or both with a comma"),
    ],
)
def test_bad_input(flags: list[str], message: str):
    result = run("--config=configs/minicpm_2b_duplex.py", *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


HLO = """HloModule m
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %limit = s32[]{:T(128)} constant(40)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[16,64]{1,0} all-gather(%x), replica_groups=[4,4]<=[16], dimensions={0}
  %r = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%inner
  %d = f32[2,4]{1,0} reduce-scatter(%y), replica_groups=mesh['a'=1,'b'=16] {'b'}, to_apply=%add
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w2 = (s32[], f32[8]) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]
  %e = f32[32]{0} all-gather-done(%s)
}
"""


def test_collectives_are_counted_through_loops():
    counts, seconds = compiling.count_collectives(HLO, parallel.load_mesh_spec("v5e-16"))
    assert counts["all-gather"] == (5 * 40 + 1, pytest.approx(5 * 40 * 16 * 64 * 2 * 3 / 4 + 32 * 4 * 3 / 4))
    assert counts["all-reduce"] == (5 * 40, pytest.approx(5 * 40 * 2 * (4 + 4) * 4 * 3 / 4))
    assert counts["reduce-scatter"] == (5, pytest.approx(5 * 8 * 4 * 15))
    assert seconds == pytest.approx(sum(size for _, size in counts.values()) / parallel.V5E.link)
