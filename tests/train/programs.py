"""Starting `duplex-jax train` as a process of its own, and reading what it wrote."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def start(
    workdir: Path, data: Path, model: Path, *flags: str, mesh: str = "cpu1", largest_file: int = 0
) -> subprocess.Popen[str]:
    """The program, with its output in `workdir.log`; files over `largest_file` bytes cannot be written."""
    command = [
        sys.executable, "-m", "launch.train", "--config=tests/train/small_run.py", f"--workdir={workdir}",
        f"--mesh={mesh}", f"--config.data.train={data}", f"--config.model.tokenizer={model}", *flags,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    if largest_file:  # by the shell: a function of our own before exec would fork this process, threads and all
        command = ["bash", "-c", f'ulimit -f {largest_file // 1024}; exec "$@"', "limited", *command]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )


def run(workdir: Path, data: Path, model: Path, *flags: str, mesh: str = "cpu1", code: int = 0) -> str:
    """Runs to the end and gives everything it said."""
    process = start(workdir, data, model, *flags, mesh=mesh)
    assert process.wait(timeout=400) == code, log_of(workdir)
    return log_of(workdir)


def log_of(workdir: Path) -> str:
    """What the runs in `workdir` said so far."""
    return Path(f"{workdir}.log").read_text()


def losses(workdir: Path) -> dict[int, float]:
    """Loss by step, exactly."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["step"] for r in rows if "loss" in r] == sorted({r["step"] for r in rows if "loss" in r})
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """Returns once a running program has written that step."""
    path = workdir / "metrics.jsonl"
    for _ in range(4000):
        done = [json.loads(line)["step"] for line in path.read_text().splitlines()[-1:]] if path.exists() else []
        if done and done[0] >= step:
            return
        assert process.poll() is None, log_of(workdir)
        time.sleep(0.05)
    raise AssertionError("the program did not get on: " + log_of(workdir))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
