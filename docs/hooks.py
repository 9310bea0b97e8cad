"""Writes docs/reference/flags.md before the site is built: the `--help` of every job."""

import subprocess
import sys
from pathlib import Path

from launch.evaluate import PARTS
from launch.main import JOBS

PAGE = Path(__file__).parent / "reference" / "flags.md"


def on_pre_build(config: object) -> None:
    """Called by MkDocs."""
    lines = ["# Flags", "", "The `--help` of every job."]
    for job in JOBS:
        for argv in [[job], *([job, part] for part in PARTS if job == "evaluate")]:
            said = subprocess.run(
                [sys.executable, "-m", "launch.main", *argv, "--help"],
                cwd=PAGE.parents[2], capture_output=True, text=True, check=False,
            ).stdout  # fmt: skip
            lines += ["", f"## {' '.join(argv)}", "", "```text", said.strip(), "```"]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
