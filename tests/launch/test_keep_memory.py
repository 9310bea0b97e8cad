"""The allocator that jobs begin with."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux preloads an allocator")

PROGRAM = """
import os, sys
from launch import app
app.keep_memory()
print(sys.argv[1:], "libmimalloc" in open("/proc/self/maps").read(), os.environ.get("GLIBC_TUNABLES"))
"""


def begin(**settings: str) -> str:
    free = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "MIMALLOC_PURGE_DELAY", "LD_PRELOAD")}
    command = [sys.executable, "-c", PROGRAM, "a b", "--c=d"]
    return subprocess.run(command, env=free | settings, capture_output=True, text=True, check=True).stdout


def test_a_job_begins_with_mimalloc_and_its_arguments():
    if not any(d.metadata["Name"] == "cmeel-mimalloc" for d in importlib.metadata.distributions()):
        pytest.skip("no mimalloc for this machine")
    assert begin().startswith("['a b', '--c=d'] True ")


def test_settings_of_the_user_stay():
    given = "glibc.malloc.arena_max=2"
    assert begin(GLIBC_TUNABLES=given) == f"['a b', '--c=d'] False {given}\n"
