"""`duplex-jax convert` as a program: what it prints, its exit codes, and that nothing half-written stays."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from safetensors.numpy import load_file, save_file

from duplex_jax.checkpoint.registry import load_model

REPOSITORY = Path(__file__).parents[2]


def convert(*flags: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the job, behind another command where `prefix` gives one."""
    command = [*prefix, sys.executable, "-m", "launch.convert", *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(reference: Path, tmp_path: Path) -> Path:
    """A golden checkpoint with the released tokenizer's place left empty."""
    source = tmp_path / "model"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(reference / "minicpm-tiny-mha" / name, source / name)
    return source


def truncate(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return folder


def transpose(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].reshape(96, 240)
    save_file(tensors, folder / "model.safetensors")
    return folder


def other_architecture(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


def missing(folder: Path) -> Path:
    return folder / "nowhere"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ("cut off in tensor model.", "float32", "fetch it again")),
        (transpose, ("model.layers.0.mlp.up_proj.weight has shape [96, 240]; the config makes it [240, 96]",)),
        (other_architecture, ("m.gguf: architecture 'gemma3' is not supported; llama and minicpm are",)),
        (missing, ("nowhere': no such file or folder; give a folder",)),
    ],
)
def test_bad_model(
    folder: Path, reference: Path, tmp_path: Path, damage: Callable[[Path], Path], words: tuple[str, ...]
):
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copyfile(reference / "minicpm-tokenizer" / name, folder / name)
    done = convert(f"--model={damage(folder)}", f"--out={tmp_path}/out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("duplex-jax: ")
    assert all(w in done.stderr for w in words)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model=x", "--out=/proc/none/out"), "/proc/none/out: cannot write there"),
        (("--model=x", "--out=y", "--fromat=hf"), "Unknown command line flag 'fromat'"),
        (
            ("--model=x", "--out=y", "--format=onnx"),
            "--format=onnx: value should be one of <hf|orbax|gguf|adapter|peft>",
        ),
        (("--model=x", "--out=y", "--format=gguf"), "--out=y: --format=gguf writes a file; give a name that ends in"),
        (("--model=x", "--out=y.gguf", "--format=gguf", "--dtype=q4_0"), "one of float32, float16, bfloat16, q8_0"),
        (("--model=x", "--out=y", "--format=adapter", "--template=compact"), "keeps its training template"),
        (("--model=x@3", "--out=y", "--format=adapter"), "model 'x@3': no such file or folder"),
        (
            ("--model=tests", "--out=y", "--format=adapter"),
            "tests: is neither an adapter nor the workdir of a LoRA run",
        ),
        (("--model=x",), "convert needs --model=M and --out=DIR"),
    ],
)
def test_bad_flags(flags: tuple[str, ...], words: str):
    done = convert(*flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_full_disk(smollm2, tmp_path: Path):
    """A limit on file size stands in for a full disk: the write fails in the middle."""
    limit = ("sh", "-c", 'ulimit -f 100000; exec "$0" "$@"')
    done = convert("--model=smollm2-135m-instruct", f"--out={tmp_path}/out", prefix=limit)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "out: cannot write (" in done.stderr
    assert "nothing was left behind" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # a signal that arrives inside a garbage collection is swallowed: several tries
def test_interrupted(smollm2, tmp_path: Path):
    for attempt in range(10):
        out = tmp_path / str(attempt) / "out"
        out.parent.mkdir()
        command = [sys.executable, "-m", "launch.convert", "--model=smollm2-135m-instruct", f"--out={out}"]
        job = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while job.poll() is None and not list(out.parent.iterdir()):  # until it writes
            time.sleep(0.01)
        job.send_signal(signal.SIGINT)
        _, stderr = job.communicate(timeout=60)
        if job.returncode != 0:  # else it was done before the signal came
            break
    assert (job.returncode, stderr) == (130, "duplex-jax: interrupted\n")
    assert not list(out.parent.iterdir())


def test_converts(smollm2, tmp_path: Path):
    done = convert("--model=smollm2-135m-instruct", f"--out={tmp_path}/out", "--dtype=bfloat16", "--template=compact")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/out: 134,515,008 weights, bfloat16, vocabulary 49152, template compact\n"
    model = load_model(tmp_path / "out")
    assert model.template.name == "compact"
    assert model.params["embed"].dtype.name == "bfloat16"
    adapted = convert("--model=smollm2-135m-duplex", f"--out={tmp_path}/a", "--format=adapter", "--idle_bias=1.5")
    assert adapted.returncode == 0, adapted.stderr
    assert load_model(tmp_path / "a").template.idle_bias == 1.5
    again = convert("--model=x", f"--out={tmp_path}/out")
    assert again.returncode == 2
    assert "already exists and is not empty; give a new folder, or --overwrite" in again.stderr
