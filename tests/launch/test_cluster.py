"""The scripts that start runs: driven with pretended `gcloud`, `srun` and `scontrol`, and what they set is read."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "launch/cluster"

# One action a call: the next line of `replies`, which says for which word of the command it is, and what happens.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/calls"
case "$*" in
  *describe*) word=describe ;;
  *scp*) word=scp ;;
  *duplex-jax\\ train*) word=train ;;
  *" ssh "*) word=ssh ;;
  *create*) word=create ;;
  *delete*) word=delete ;;
esac
file=$FAKE/$word
line=$(head -n 1 "$file" 2>/dev/null)
sed -i 1d "$file" 2>/dev/null
case $word in
  describe) echo "$line" ;;
  *) exit "${line:-0}" ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    programs = {
        "gcloud": GCLOUD, "python3": "#!/bin/sh\nmkdir -p dist\n", "sleep": "#!/bin/sh\n",
        "srun": '#!/bin/sh\necho "$*" >>"$FAKE/calls"\nexit "$(cat "$FAKE/code")"\n',
        "scontrol": '#!/bin/sh\necho "scontrol $*" >>"$FAKE/calls"\n',
        "duplex-jax": '#!/bin/sh\necho "$*" >>"$FAKE/calls"\ncode=$(head -n 1 "$FAKE/codes")\n'
        'sed -i 1d "$FAKE/codes"\nexit "${code:-0}"\n',
    }  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def script(fake: Path, name: str, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX"))}
    env |= {"FAKE": str(fake), "PATH": f"{fake / 'bin'}:{os.environ['PATH']}", **settings}
    command = ["bash", str(CLUSTER / name), *words]
    return subprocess.run(command, cwd=fake, env=env, capture_output=True, text=True, timeout=60, check=False)


def calls(fake: Path) -> list[str]:
    """What was asked of the machines, a word each."""
    words = ("describe", "create", "delete", "scp", "duplex-jax train", "ssh")
    lines = re.split(r"\n(?=compute )", (fake / "calls").read_text())
    return [next(word for word in words if word in line).split()[-1] for line in lines]


def tpu(fake: Path, mesh: str = "v5e-16", **replies: str) -> subprocess.CompletedProcess[str]:
    for word, lines in replies.items():
        (fake / word).write_text("".join(f"{line}\n" for line in lines.split(",")))
    return script(fake, "tpu_vm.sh", "configs/tiny.py", mesh, "bucket/run", PROJECT="p", ZONE="z", BUCKET="b")


def test_a_slice_that_is_taken_away_is_asked_for_again(fake: Path):
    done = tpu(fake, describe=",WAITING,ACTIVE,SUSPENDED,SUSPENDED,,ACTIVE", train="255,0")
    assert done.returncode == 0, done.stderr
    assert calls(fake) == [
        "describe", "create", "describe", "describe", "scp", "ssh", "train",  # and the connection is lost
        "describe", "describe", "delete", "describe", "create", "describe", "scp", "ssh", "train",
    ]  # fmt: skip
    assert "--accelerator-type=v5litepod-16" in (fake / "calls").read_text()


def test_an_installation_that_fails_gives_the_slice_back(fake: Path):
    """It is paid for by the second: five tries, and no more."""
    done = tpu(fake, describe=",".join(["ACTIVE"] * 9), ssh=",".join(["1"] * 9))
    assert done.returncode == 1
    assert "setting up the hosts failed (5 of 5)" in done.stderr
    assert calls(fake) == [*["describe", "scp", "ssh"] * 5, "delete"]


def test_a_run_that_crashes_on_a_slice_that_is_there_ends(fake: Path):
    done = tpu(fake, describe=",".join(["ACTIVE"] * 20), train=",".join(["1"] * 9))
    assert done.returncode == 1
    assert calls(fake).count("train") == 5
    assert calls(fake)[-1] == "delete"


@pytest.mark.parametrize(("mesh", "words"), [("v5e-16x2", "several slices"), ("a100x8", "is of no TPU")])
def test_meshes_that_tpu_vms_do_not_have(fake: Path, mesh: str, words: str):
    done = tpu(fake, mesh=mesh)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (fake / "calls").exists()


def slurm(fake: Path, code: int) -> subprocess.CompletedProcess[str]:
    (fake / "code").write_text(str(code))
    return script(fake, "slurm.sbatch", "c.py", "a100x40", str(fake), SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="64")


def test_slurm_requeues_as_often_as_it_takes_but_not_crashes(fake: Path):
    for code, requeued in ((0, 0), (2, 0), (3, 0), (75, 1), (75, 1), *[(1, 1)] * 5, (1, 0)):
        (fake / "calls").unlink(missing_ok=True)
        done = slurm(fake, code)
        text = (fake / "calls").read_text()
        assert text.count("scontrol requeue 7") == requeued
        assert "--cpus-per-task=64" in text
        assert done.returncode == (0 if requeued else code)


def test_one_host_starts_again_after_a_stop(fake: Path):
    (fake / "codes").write_text("75\n1\n0\n")
    assert script(fake, "gpu_host.sh", "c.py", "a100x8", str(fake)).returncode == 0
    assert (fake / "calls").read_text().count("train --config=c.py") == 3


def assignments() -> set[str]:
    """Environment variables that the scripts and manifests set for the program."""
    found = set()
    for path in CLUSTER.iterdir():
        text = path.read_text()
        found |= {
            name for line in re.findall(r"^export (.*)", text, re.M) for name in re.findall(r"\b([A-Z_]+)=", line)
        }
        found |= set(
            re.findall(r"- name: ([A-Z_]+)|\{name: ([A-Z_]+)", text) and re.findall(r"name: ([A-Z_]{4,})", text)
        )
        if path.name == "tpu_vm.sh":
            found |= set(re.findall(r"^\s+(?:everywhere \")?(LIBTPU_INIT_ARGS|JAX_[A-Z_]+)=", text, re.M))
    return found - {"IMAGE_WITH_DUPLEX_JAX"}


def test_every_variable_that_is_set_is_read_by_somebody():
    """By us, or by the one who documents it: XLA, libtpu, NCCL, JAX."""
    theirs = {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "NCCL_IB_TIMEOUT", "JAX_COMPILATION_CACHE_DIR"}
    sources = "".join(p.read_text() for folder in ("duplex_jax", "launch") for p in (REPOSITORY / folder).rglob("*.py"))
    found = assignments()
    assert {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR", "DUPLEX_JAX_CACHE"} <= found
    assert {name for name in found if name not in theirs and name not in sources} == set()


@functools.cache
def flags_of(job: str) -> set[str]:
    """Those that its `--help` lists."""
    command = [sys.executable, "-m", "launch.main", job, "--help"]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"^ +--(?:\[no\])?(\w+):", said, re.M))


def test_every_flag_that_is_given_is_one_of_the_job():
    for path in CLUSTER.iterdir():
        text = path.read_text()
        known = flags_of("serve" if path.name == "serve.yaml" else "train")
        if path.suffix == ".yaml":
            given = re.findall(r"^\s+- --([a-z_.]+)=", text, re.M)
        else:
            given = [
                f for line in re.findall(r"duplex-jax train (.*)", text) for f in re.findall(r"--([a-z_.]+)=", line)
            ]
        for flag in given:
            assert flag.startswith("config.") or flag in known, (path.name, flag)


def test_the_manifests_are_yaml_and_mount_the_bucket():
    for path in CLUSTER.glob("*.yaml"):
        assert list(yaml.safe_load_all(path.read_text()))
    (job,) = yaml.safe_load_all((CLUSTER / "jobset.yaml").read_text())
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["spec"]["serviceAccountName"]


def test_the_cache_of_jax_itself_comes_first(tmp_path: Path):
    program = (
        "import jax\nfrom launch.app import use_compilation_cache\nuse_compilation_cache()\n"
        "print(jax.config.jax_compilation_cache_dir)\n"
    )
    for settings, wanted in (
        ({"JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/theirs"}, f"{tmp_path}/theirs"), ({}, f"{tmp_path}/ours"),
    ):  # fmt: skip
        env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        env |= {"DUPLEX_JAX_CACHE": f"{tmp_path}/ours"} | settings
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == wanted
