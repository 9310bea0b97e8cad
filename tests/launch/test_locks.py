"""Two runs never write to one place: the second is told so in one line, and nothing of the first is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from duplex_jax.errors import UserError
from duplex_jax.files import locked
from duplex_jax.timeline import Event, SlicePair, Timeline, write_timelines

REPOSITORY = Path(__file__).parents[2]


def jax_job(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.main", *words]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("words", "beside"),
    [
        (["pack", "--input={data}", "--out={out}", "--model=smollm2-135m-instruct"], True),
        (["train", "--config=configs/tiny.py", "--config.data.train={data}", "--workdir={out}"], False),
        (["generate", "--input={data}", "--out={out}"], False),
        (["generate", "--write=5", "--model=smollm2-135m-instruct", "--out={out}"], False),
        (["adapt", "--model=smollm2-135m-instruct", "--out={out}"], False),
        (["convert", "--model=smollm2-135m-instruct", "--out={out}"], True),
        (["convert", "--model=smollm2-135m-instruct", "--format=gguf", "--out={out}"], True),
        (["evaluate", "behaviour", "--model=smollm2-135m-duplex", "--data={data}", "--out={out}"], False),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_a_second_run_is_refused(tmp_path: Path, words: list[str], beside: bool):
    data, out = tmp_path / "in.jsonl", tmp_path / ("out.gguf" if "--format=gguf" in words else "out")
    write_timelines(data, [Timeline([SlicePair("hi", "hello")], events=[Event("query_end", 0)])])
    with locked(out, beside):
        before = sorted(tmp_path.rglob("*"))
        done = jax_job(*(w.format(data=data, out=out) for w in words))
        assert sorted(tmp_path.rglob("*")) == before
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"duplex-jax: {out}: another run is writing there (process {os.getpid()} on {os.uname().nodename}); "
        "wait for it, or give another place\n"
    )
    assert not list(tmp_path.rglob("*.lock"))


def test_a_lock_ends_with_its_holder(tmp_path: Path):
    """A process that was killed leaves the file, and the next run takes it."""
    lock = tmp_path / ".lock"
    code = f"from duplex_jax.files import locked; c = locked({str(tmp_path)!r}); c.__enter__(); import os; os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 9
    assert lock.exists()
    with locked(tmp_path):
        with pytest.raises(UserError, match="another run is writing there"), locked(tmp_path):
            pass
        assert lock.exists()
    assert not lock.exists()
