"""The whole program: killed and started again, told to stop, over processes, with damage, with bad input."""

import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests import made_timelines
from tests.train import programs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made_timelines.write(tmp_path_factory.mktemp("inputs"), n=120)


@pytest.fixture(scope="module")
def unbroken(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps that nothing happened to."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    programs.run(workdir, *inputs)
    return workdir


def test_killed_and_told_to_stop_it_goes_on_bit_by_bit(inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    process = programs.start(workdir, *inputs)
    programs.wait_for_step(process, workdir, 8)
    process.kill()
    process.wait()
    process = programs.start(workdir, *inputs)
    programs.wait_for_step(process, workdir, 17)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, programs.log_of(workdir)
    assert "start the same command again" in programs.log_of(workdir)
    log = programs.run(workdir, *inputs)
    assert "goes on from step" in log
    assert programs.losses(workdir) == programs.losses(unbroken)


@pytest.mark.slow
def test_checkpoints_by_the_clock(inputs: tuple[Path, Path], tmp_path: Path):
    flags = ("--config.optim.steps=7", "--config.optim.decay_steps=1", "--config.checkpoint.every=0")
    programs.run(tmp_path / "run", *inputs, *flags, "--config.checkpoint.every_minutes=1e-6")
    saved = (tmp_path / "run" / "checkpoints").iterdir()
    assert sorted(int(p.name) for p in saved) == [5, 6, 7]  # the newest three of one a step


def test_damaged_checkpoints_are_passed_over(inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    steps = sorted((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    assert [p.name for p in steps] == ["20", "25", "30"]
    cut = max((p for p in steps[2].rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    cut.write_bytes(cut.read_bytes()[:-100])
    next(p for p in steps[1].rglob("d/*") if p.is_file()).unlink()
    (workdir / "checkpoints" / "40").mkdir()
    log = programs.run(workdir, *inputs)
    assert f"checkpoints/30: passed over: {cut.relative_to(steps[2])} has" in log
    assert "checkpoints/25: passed over" in log
    assert "is missing" in log
    assert "checkpoints/40: passed over: it has no sums.json" in log
    assert "goes on from step 20" in log
    assert programs.losses(workdir) == programs.losses(unbroken)


def test_another_mesh_goes_on_within_rounding(inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    for step in ("20", "25", "30"):
        if step != "20":
            shutil.rmtree(workdir / "checkpoints" / step)
    log = programs.run(workdir, *inputs, mesh="cpu8")
    assert "goes on from step 20" in log
    assert "mesh was cpu1 and is now cpu8" in log
    ours, theirs = programs.losses(workdir), programs.losses(unbroken)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-4)


@pytest.mark.slow
def test_four_processes_are_one(inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    port = programs.free_port()
    flags = [f"--coordinator=localhost:{port}", "--num_processes=4"]
    processes = [
        programs.start(workdir, *inputs, *flags, f"--process_id={i}", "--config.checkpoint.every=10", mesh="cpu8")
        for i in range(4)
    ]
    for process in processes:
        assert process.wait(timeout=500) == 0, programs.log_of(workdir)
    ours, theirs = programs.losses(workdir), programs.losses(unbroken)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-4)
    # What four processes wrote, one goes on with.
    shutil.rmtree(workdir / "checkpoints" / "30")
    log = programs.run(workdir, *inputs)
    assert "goes on from step 20" in log
    np.testing.assert_allclose(list(programs.losses(workdir).values()), list(theirs.values()), rtol=2e-4)


def of_two(workdirs: list[Path], inputs: tuple[Path, Path], *flags: str) -> list[int]:
    """Exit codes of a run of two processes."""
    port = programs.free_port()
    common = [f"--coordinator=localhost:{port}", "--num_processes=2", *flags]
    processes = [
        programs.start(workdir, *inputs, *common, f"--process_id={i}", mesh="cpu8")
        for i, workdir in enumerate(workdirs)
    ]
    return [process.wait(timeout=500) for process in processes]


def test_a_workdir_that_processes_do_not_share_is_refused_at_the_start(inputs: tuple[Path, Path], tmp_path: Path):
    workdirs = [tmp_path / "a", tmp_path / "b"]
    assert of_two(workdirs, inputs) == [2, 2], "\n".join(map(programs.log_of, workdirs))
    for workdir in workdirs:
        last = programs.log_of(workdir).splitlines()[-1]
        assert last.startswith(f"duplex-jax: --workdir={workdir}: is not shared: process 1 of 2 does not see")
    assert not (tmp_path / "a" / "checkpoints").exists()
    assert not list(tmp_path.glob("*/.shared-*"))


@pytest.mark.slow
def test_two_processes_go_on_from_the_step_that_the_first_one_chose(
    inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    assert of_two([workdir] * 2, inputs, "--config.optim.steps=15") == [0, 0], programs.log_of(workdir)
    (workdir / "checkpoints" / "15" / "_CHECKPOINT_METADATA").write_text("{}")
    assert of_two([workdir] * 2, inputs) == [0, 0], programs.log_of(workdir)
    assert "goes on from step 10, row 80" in programs.log_of(workdir)
    ours, theirs = programs.losses(workdir), programs.losses(unbroken)
    assert list(ours) == list(theirs)


def test_a_run_that_goes_on_amid_the_profile_traces_the_rest(inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path):
    for window, told in (("10:26", "trace of steps 25 to 26"), ("3:9", ""), ("26:40", "")):
        workdir = tmp_path / window.replace(":", "-")
        shutil.copytree(unbroken, workdir)
        shutil.rmtree(workdir / "checkpoints" / "30")
        log = programs.run(workdir, *inputs, f"--profile={window}")
        assert told in log
        assert ("trace of steps" in log) == bool(told)
        assert any((workdir / "profile").rglob("*.xplane.pb")) == (window != "3:9")
        assert programs.losses(workdir) == programs.losses(unbroken)


def test_a_decay_leaves_a_stable_checkpoint(inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path):
    long = ["--config.optim.steps=60"]
    stable = tmp_path / "stable"
    process = programs.start(stable, *inputs, *long, "--config.checkpoint.keep=9")
    programs.wait_for_step(process, stable, 31)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    branch = tmp_path / "branch"
    log = programs.run(branch, *inputs, f"--config.optim.decay_from={stable}@20")
    assert "decay starts from" in log
    # A run of 30 steps decays from step 20 on, too: the branch is that run from there.
    ours, wanted = programs.losses(branch), {s: x for s, x in programs.losses(unbroken).items() if s > 20}
    assert list(ours) == list(wanted)
    np.testing.assert_allclose(list(ours.values()), list(wanted.values()), rtol=1e-5)
    log = programs.run(tmp_path / "no", *inputs, f"--config.optim.decay_from={unbroken}@25", code=2)
    assert "step 25 is in the decay phase; give a stable one" in log


def test_trouble_names_its_rows(inputs: tuple[Path, Path], tmp_path: Path):
    flags = ["--config.optim.lr=1e38", "--config.optim.clip=0", "--config.optim.warmup=0"]
    log = programs.run(tmp_path / "stop", *inputs, *flags, code=3)
    assert "not finite; rows" in log
    assert "row " in log.split("not finite; rows")[1]
    log = programs.run(
        tmp_path / "skip", *inputs, *flags, "--config.trouble.action=skip", "--config.trouble.most=4", code=3
    )
    assert log.count("; skipped") == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.optim.stpes=3"], "did you mean --config.optim.steps?"),
        (["--mesh=v5e-17"], "is unknown; one of a100x1"),
        (["--mesh=cpu8", "--fsdp=2", "--tensor=4"], "2 key heads are not divisible by tensor=4; tensor may be 1, 2"),
        (["--mesh=cpu8", "--fsdp=3"], "makes 6 devices, but it has 8"),
        (["--mesh=a100x8"], "needs 8 devices of a GPU, and its plugin is not installed"),
        (["--mesh=cpu8", "--config.data.batch=6"], "use a multiple of 4, such as 8"),
        (["--config.data.length=70000"], "must be 16 to 65535"),
        (["--config.data.train=/nowhere"], "/nowhere: no such file or folder"),
        (["--config.model.tokenizer=/nowhere"], "no such file or folder"),
        (["--config.lora.rank=4", "--config.lora.targets=query"], "no weight 'query' in a layer"),
        (["--config=configs/tiyn.py"], "did you mean configs/tiny.py"),
        (["--profile=3"], "must be FIRST:LAST"),
        (["--config.compute.attention=cudnn"], "does not support float32; give --config.compute.dtype=bfloat16"),
        (["--workdir=/proc/x"], "cannot write there"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(inputs: tuple[Path, Path], tmp_path: Path, flags: list[str], message: str):
    log = programs.run(tmp_path / "run", *inputs, *flags, code=2)
    assert message in log
    assert "Traceback" not in log
    assert "duplex-jax: " in log.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "other"), [("cpu1", "cpu8"), ("cpu8", "cpu1")])
def test_killed_at_random_again_and_again(inputs: tuple[Path, Path], tmp_path: Path, mesh: str, other: str):
    """Ten ends at random moments, in steps and in saves, two of them orderly; then 50 steps and more on either mesh."""
    flags = ["--config.optim.steps=120", "--config.checkpoint.every=3"]
    programs.run(tmp_path / "unbroken", *inputs, *flags, mesh=mesh)
    rng, workdir, at = random.Random(0), tmp_path / "run", 0
    for i in range(10):
        at = min(65, at + rng.randint(1, 11))
        process = programs.start(workdir, *inputs, *flags, mesh=mesh)
        programs.wait_for_step(process, workdir, at)
        process.send_signal(signal.SIGTERM if i in (3, 7) else signal.SIGKILL)
        assert process.wait(timeout=120) == (75 if i in (3, 7) else -signal.SIGKILL)
    shutil.copytree(workdir, tmp_path / "elsewhere")
    programs.run(workdir, *inputs, *flags, mesh=mesh)
    unbroken = programs.losses(tmp_path / "unbroken")
    assert programs.losses(workdir) == unbroken
    programs.run(tmp_path / "elsewhere", *inputs, *flags, mesh=other)
    elsewhere = programs.losses(tmp_path / "elsewhere")
    assert list(elsewhere) == list(unbroken)
    np.testing.assert_allclose(list(elsewhere.values()), list(unbroken.values()), rtol=2e-3)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    # No file may grow beyond what the first checkpoint's largest one needs less a bit: as on a full disk, writes fail.
    process = programs.start(workdir, *inputs, largest_file=100_000)
    assert process.wait(timeout=200) == 2, programs.log_of(workdir)
    log = programs.log_of(workdir)
    assert "the checkpoint could not be written" in log.splitlines()[-1]
    assert "Traceback" not in log
    programs.run(workdir, *inputs)
    assert programs.losses(workdir) == programs.losses(unbroken)


def test_the_config_is_in_every_checkpoint(unbroken: Path):
    for step in (unbroken / "checkpoints").iterdir():
        record = json.loads((step / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        assert record["config"]["optim"]["steps"] == 30
        assert record["position"] == 8 * record["step"]
