"""Files and folders are whole or absent, whenever their writer is killed, and the next run leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from duplex_jax import files
from duplex_jax.errors import UserError

REPOSITORY = Path(__file__).parents[1]
KILLED = """
import os, sys
from pathlib import Path
from duplex_jax import files
number, out = int(sys.argv[1]), Path(sys.argv[2])
calls = 0
def counted(call):
    def run(*args, **kwargs):
        global calls
        calls += 1
        if calls == number:
            os._exit(9)
        return call(*args, **kwargs)
    return run
for name in ("replace", "fsync", "open", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
if sys.argv[3] == "two renames":
    files.ctypes.CDLL = lambda *a, **k: object()
with files.atomic_folder(out, overwrite=True) as aside:
    (aside / "a").write_text("new")
    (aside / "b").write_text("new")
"""


@pytest.mark.parametrize(("there", "way"), [(True, "exchange"), (True, "two renames"), (False, "exchange")])
def test_a_folder_that_is_replaced_is_never_missing(tmp_path: Path, there: bool, way: str):
    """Where the system cannot exchange names, the next run that looks at the place finds the old one there again."""
    for number in range(1, 40):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if there:
            out.mkdir()
            (out / "a").write_text("old")
        code = subprocess.run([sys.executable, "-c", KILLED, str(number), str(out), way], cwd=REPOSITORY).returncode
        assert out.exists() or not there or way == "two renames"
        with files.atomic_path(out.parent / "another"):  # which sweeps the place
            pass
        (out.parent / "another").unlink()
        files.check_folder(out, overwrite=True)
        found = {p.name: p.read_text() for p in out.iterdir()} if out.exists() else None
        assert found in ([{"a": "old"}] if there else [None]) + [{"a": "new", "b": "new"}]
        with files.atomic_folder(out, overwrite=True) as aside:
            (aside / "c").write_text("next")
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        assert [p.name for p in out.iterdir()] == ["c"]
        if code == 0:
            return
    raise AssertionError("never ran to its end")


@pytest.mark.parametrize("what", ["file", "folder", "folder that replaces one"])
def test_a_name_comes_behind_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    """A rename may reach the disk before the bytes; after a loss of power the name then stands for an empty file."""
    real_sync, events = os.fsync, list[str]()

    def renamed() -> bool:
        return (out / "a").exists() if what != "file" else out.exists()

    def sync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(f"{'after' if renamed() else 'before'}: {name}")
        real_sync(descriptor)

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", sync)
    if what == "file":
        with files.atomic_path(out) as aside:
            aside.write_text("new")
            name = aside.name
        assert events == [f"before: {name}", f"after: {tmp_path.name}"]
        return
    if what == "folder that replaces one":
        out.mkdir()
        (out / "old").touch()
    with files.atomic_folder(out, overwrite=True) as aside:
        (aside / "a").write_text("new")
        name = aside.name
    assert events == ["before: a", f"before: {name}", f"after: {tmp_path.name}"]


def test_a_second_run_cannot_sweep_what_is_not_locked_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between the making of a temporary file and its lock another run may take it for one that was left."""
    real, swept = files._lock, []

    def sweep_first(descriptor: int, wait: bool = False) -> bool:
        if wait and not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].unlink()
        return real(descriptor, wait)

    monkeypatch.setattr(files, "_lock", sweep_first)
    with files.atomic_write(tmp_path / "a") as f:
        f.write("whole")
    assert swept
    assert [p.read_text() for p in tmp_path.iterdir()] == ["whole"]


def test_what_another_run_is_writing_stays(tmp_path: Path):
    with files.atomic_path(tmp_path / "a") as first:
        first.write_text("first")
        with files.atomic_path(tmp_path / "b") as second:
            second.write_text("second")
        assert first.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_disk_that_is_full_is_one_line(tmp_path: Path):
    code = (
        "import resource, signal, sys; from duplex_jax.data import dataset; from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "import numpy as np; from duplex_jax.data.rows import Document\n"
        "rows = [[Document(np.random.default_rng(i).integers(0, 60000, 500), np.zeros(500, np.uint8), 0, i)] for i in "
        "range(50)]\n"
        "from duplex_jax.files import atomic_folder; from duplex_jax.errors import UserError\n"
        "try:\n"
        "  with atomic_folder(sys.argv[1]) as f: dataset._write_shards(f, rows, 2, dataset.Tally(), None)\n"
        "except UserError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "cannot write (" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_place_is_checked_first(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").touch()
    with pytest.raises(UserError, match="not empty"), files.atomic_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]
