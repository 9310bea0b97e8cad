"""Compiling for absent hardware: reports on pretended devices always, on a TPU topology where libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from duplex_jax import parallel
from duplex_jax.train import compile as compiling
from duplex_jax.train import step as steps
from duplex_jax.train.config import load_config

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
    result = run(*TINY, "--mesh=cpu8", "--config.optim.steps=90", "--price=2", f"--json={tmp_path / 'r.json'}")
    assert result.returncode == 0, result.stderr
    train, decode = json.loads((tmp_path / "r.json").read_text())
    assert "train on cpu8" in result.stdout
    assert train["fits"]
    assert train["argument_bytes"] > 3 * 4 * 49152 * 64 / 8  # a device's share of masters and moments
    assert train["argument_bytes"] < 3 * 4 * 49152 * 64
    assert {"all-gather", "all-reduce"} <= set(train["collectives"])
    assert decode["fits"]
    whole = train["run"]
    assert whole["hours"] == pytest.approx(90 * train["step_seconds"] / 3600)
    assert whole["dollars"] == pytest.approx(2 * 8 * whole["hours"])
    assert decode["run"] is None


def test_sessions_of_an_accelerator(tmp_path: Path):
    """MiniCPM-2.4B on a v5e: a token takes 368,640 bytes (40 layers, 36 heads of 64, keys and values, bfloat16), a
    session 74 slots more than it holds, and an eighth of a row of 3/4."""
    result = run(
        "--config=configs/minicpm_2b_duplex.py", "--mesh=v5e-16", "--programs=sessions", "--contexts=100,4000",
        f"--json={tmp_path / 'r.json'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (report,) = json.loads((tmp_path / "r.json").read_text())
    short, long, *_ = report["plans"]
    assert report["fits"]
    assert short["session_bytes"] == (8 * 174 + 149) * 368_640 // 8
    weights = 2 * 2_725_080_000
    room = (0.85 * 15.75 * 2**30 - weights) // 368_640
    assert long["by_memory"] == int((room - 3074) // 4074) == long["sessions"]  # one shadow row for all of them
    assert long["by_clock"] > long["by_memory"]
    scaled = report["plans"][2]
    assert scaled["session_bytes"] == short["session_bytes"] * (64 + 4) // (2 * 64)
    eager = run(
        "--config=configs/minicpm_2b_duplex.py", "--mesh=v5e-16", "--programs=sessions", "--slice_seconds=0.05",
        f"--json={tmp_path / 'r.json'}",
    )  # fmt: skip
    assert " 0  " in eager.stdout  # ten passes over 5.45 GB of weights alone take 95 ms at 0.7 of 819 GB/s
    assert "NONE FITS" in eager.stdout
    assert not json.loads((tmp_path / "r.json").read_text())[0]["fits"]
    assert eager.returncode == 1


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
        (["--mesh=v5e-16", "--tensor=8", "--fsdp=2"], "36 heads are not divisible by tensor=8"),
        (["--mesh=v5e-256"], "use a multiple of 256, such as 768"),
        (["--programs=all"], "must be any of train, decode and sessions"),
        (["--programs=sessions", "--contexts=256,x"], "must be token counts"),
    ],
)
def test_bad_input(flags: list[str], message: str):
    result = run("--config=configs/minicpm_2b_duplex.py", *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


GPUS = ("a100x1", "a100x8", "a100x40", "h100x8", "h100x64")


@pytest.mark.parametrize("mesh", GPUS)
def test_float32_on_gpus_takes_attention_that_knows_it(mesh: str):
    """cuDNN's takes 16 bits alone."""
    config, spec = load_config("configs/tiny.py"), parallel.load_mesh_spec(mesh)
    assert config.compute.dtype == "float32"
    cpu = parallel.make_mesh(parallel.load_mesh_spec("cpu1"))
    plan = steps.Plan(config, compiling.model_shape(config), cpu, spec)
    assert plan.backend == "xla"
    half = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="bfloat16"))
    assert dataclasses.replace(plan, config=half).backend == "cudnn"


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
    reason="needs JAX's CUDA plugin: pip install 'duplex-jax[cuda]'",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--programs=train", "--config.compute.dtype=bfloat16", "--data=2", "--fsdp=2", "--tensor=2")]
)
def test_a_gpu_host(tmp_path: Path, flags: tuple[str, ...]):
    """float32 by XLA's attention, bfloat16 by cuDNN's, there among copies that meet once a step."""
    result = run(*TINY, "--mesh=a100x8", "--config.data.batch=16", *flags, f"--json={tmp_path / 'r.json'}")
    assert result.returncode == 0, result.stderr
    assert all(r["fits"] for r in json.loads((tmp_path / "r.json").read_text()))
