"""A job meets its machine: a backend that cannot start, processes of a cluster, Ctrl-C in a compilation."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from duplex_jax.errors import UserError
from duplex_jax.parallel import load_mesh_spec
from launch import machine

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"GLIBC_TUNABLES": ""}


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        ("cuda", "cuda: its plugin is not installed: pip install 'duplex-jax[cuda]'"),
        ("tpu", "tpu: its plugin is not installed: pip install 'duplex-jax[tpu]'"),
        ("nonsense", "nonsense: Backend 'nonsense' is not in the list of known backends"),
    ],
)
def test_a_backend_that_cannot_start_is_one_line(platform: str, words: str):
    command = [sys.executable, "-m", "launch.main", "chat", "--model=smollm2-135m-instruct", "--json"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ENVIRONMENT | {"JAX_PLATFORMS": platform}, input="hi\n", capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"duplex-jax: JAX cannot start on {words}")
    assert done.stderr.endswith("JAX_PLATFORMS=cpu runs on the CPU\n")
    assert done.stderr.count("\n") == 1


def test_a_mesh_of_gpus_does_not_fall_back_to_the_cpu(tmp_path: Path):
    data = tmp_path / "in.jsonl"
    data.write_text('{"output": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n')
    command = [sys.executable, "-m", "launch.main", "train", "--config=configs/tiny.py", "--mesh=a100x1",
               f"--workdir={tmp_path / 'run'}", f"--config.data.train={data}"]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    words = "mesh a100x1: needs 1 devices of a GPU, and its plugin is not installed: pip install 'duplex-jax[cuda]'"
    assert done.stderr.startswith(f"duplex-jax: {words}")
    assert done.stderr.count("\n") == 1


def slurm(tasks: int, rank: int = 0, local: int = 0) -> dict[str, str]:
    """Variables of one process under `srun`."""
    return {
        "SLURM_JOB_ID": "4242", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip


def test_a_process_of_slurm_takes_all_gpus_of_its_node():
    """JAX itself, told of one task a node, is asked which GPUs it would use."""
    program = (
        "import os, jax\n"
        "from duplex_jax.parallel import load_mesh_spec\n"
        "from launch import machine\n"
        "spec = load_mesh_spec('a100x8')\n"
        "assert spec.hosts == 1\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "jax.distributed.initialize(local_device_ids=machine.local_devices(spec, os.environ))\n"
        "print(jax.config.values['jax_cuda_visible_devices'], jax.process_count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=ENVIRONMENT | slurm(1), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "0,1,2,3,4,5,6,7 1\n", done.stderr


def test_which_devices_a_process_takes():
    spec = load_mesh_spec("a100x40")
    assert (spec.hosts, spec.size) == (5, 40)
    assert machine.local_devices(spec, slurm(5)) == list(range(8))
    assert machine.local_devices(spec, {"OMPI_COMM_WORLD_SIZE": "5"}) == list(range(8))
    assert machine.local_devices(spec, {}) == list(range(8))  # --coordinator
    assert machine.local_devices(spec, slurm(40)) is None  # a process for each GPU: JAX's own choice is right
    assert machine.local_devices(spec, slurm(5) | {"JAX_LOCAL_DEVICE_IDS": "0,1"}) is None
    assert machine.local_devices(load_mesh_spec("v5e-16"), {}) is None
    with pytest.raises(UserError, match="10 processes were started; it takes 5, one a host, or 40, one a device"):
        machine.local_devices(spec, slurm(10))


def test_what_ray_reserves_for_a_replica(monkeypatch: pytest.MonkeyPatch):
    """Each has an accelerator of its own: without, all of them would take the first."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert machine.reserved({"CPU": 8.0}, 2) == {}
    assert machine.reserved({"CPU": 8.0, "GPU": 2.0}, 2) == {"ray_actor_options": {"num_gpus": 1}}
    assert machine.reserved({"CPU": 8.0, "TPU": 4.0}, 2) == {"ray_actor_options": {"resources": {"TPU": 1}}}
    with pytest.raises(UserError, match="--replicas=3: each takes a GPU, and the cluster has 2"):
        machine.reserved({"GPU": 2.0}, 3)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machine.reserved({"GPU": 2.0}, 3) == {}


def test_where_an_accelerator_is_looked_for():
    assert machine.has_accelerator({"JAX_PLATFORMS": "cuda"})
    assert not machine.has_accelerator({"JAX_PLATFORMS": "cpu"})


PROGRAM = """
import sys, time
from absl import flags
from launch import app

def main(argv):
    with app.ends_at_once():
        import jax, jax.numpy as jnp
        print("ready", flush=True)
        for n in range(10_000):  # the compiler is at work nearly always
            jax.jit(lambda x: jnp.linalg.qr(x @ x.T + n)[0])(jnp.ones((n % 7 + 2, 8)))

app.run(main)
"""


@pytest.mark.parametrize("after", [0.0, 0.3, 0.7])
def test_control_c_ends_a_compilation_at_once(after: float):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, env=ENVIRONMENT | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        time.sleep(after)
        job.send_signal(signal.SIGINT)
        _, stderr = job.communicate(timeout=60)
    assert (job.returncode, stderr) == (130, "duplex-jax: interrupted\n")


def test_the_compilation_cache_is_where_jax_was_told(tmp_path: Path):
    """JAX's own variables, which the scripts of launch/cluster set, come before this package's folder."""
    code = (
        "import jax; from launch.app import use_compilation_cache; use_compilation_cache()\n"
        "jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3)).block_until_ready()"
    )
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    env = ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "DUPLEX_JAX_CACHE": str(ours)}
    told = {"JAX_COMPILATION_CACHE_DIR": str(theirs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for more in (told, {k: v for k, v in told.items() if "MIN" in k}):
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=env | more, check=True)
        assert any(theirs.iterdir())
        assert any(ours.iterdir()) == (more is not told)
