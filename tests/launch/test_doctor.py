"""`duplex-jax doctor` on pretended devices: each check says what it found, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_doctor(tmp_path: Path):
    command = [sys.executable, "-m", "launch.main", "doctor", "--mesh=cpu8", f"--workdir={tmp_path}", "--model="]
    env = os.environ | {"GLIBC_TUNABLES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    versions, devices, rates, step, save = done.stdout.splitlines()
    assert "jax " in versions
    assert devices.split(maxsplit=1)[1].startswith("8 x cpu")
    assert "TFLOP/s" in rates
    assert step.endswith("a gradient over 8 devices matches the host")
    assert f"8 MiB to {tmp_path} and back" in save
    assert list(tmp_path.iterdir()) == []
