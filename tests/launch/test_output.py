"""Every job, and what it prints, into a pipe whose reader has gone."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    ["main --help", "main --version", "main chat --help", "chat --help", "main evaluate behaviour --help",
     "main compile --config=configs/tiny.py --mesh=nowhere"],
)  # fmt: skip
def test_a_reader_that_has_gone(command: str):
    ear, mouth = os.pipe()
    os.close(ear)
    try:
        job = [sys.executable, "-m", *f"launch.{command}".split()]
        done = subprocess.run(job, cwd=REPOSITORY, stdout=mouth, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(mouth)
    if "nowhere" in command:  # a job that fails says so all the same
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    else:
        assert (done.returncode, done.stderr) == (0, "")


def test_version():
    job = [sys.executable, "-m", "launch.main", "--version"]
    done = subprocess.run(job, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == f"duplex-jax {importlib.metadata.version('duplex-jax')}\n"
