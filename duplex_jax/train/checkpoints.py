"""A run's checkpoints: written asynchronously, pruned by policy, and used only if complete.

A checkpoint holds the train state (Orbax, every leaf with its sharding) and a record: the resolved config, the data
position as one integer, and the run's origin. `sums.json`, written last, lists the size and the SHA-256 digest of each
file: a checkpoint without it, or with a missing or changed file, is ignored.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import secrets
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from duplex_jax.checkpoint.orbax import quiet
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, check_space

FOLDER = "checkpoints"
SUMS = "sums.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """A checkpoint's metadata.

    Attributes:
        step: number of updates done.
        position: number of rows consumed, i.e. where the next batch begins.
        config: the resolved config as plain values.
        facts: what the run was trained on and from, for information only.
    """

    step: int
    position: int
    config: dict[str, Any]
    facts: dict[str, Any]


def needed_bytes(abstract: Any) -> int:
    """Size of one checkpoint of a state in bytes."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def check_shared(workdir: Path) -> None:
    """Checks that all processes share the folder; otherwise each would wait for the others' part of a save.

    Raises:
        UserError: a process does not see what the first one writes; raised in every process.
    """
    if jax.process_count() == 1:
        return
    name = int(multihost_utils.broadcast_one_to_all(np.array(secrets.randbits(31), np.int32)))
    mark = workdir / f".shared-{name:08x}"
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            workdir.mkdir(parents=True, exist_ok=True)
            mark.touch()
    multihost_utils.sync_global_devices("workdir")
    deadline = time.monotonic() + 5  # network file systems cache directory listings
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = np.atleast_1d(multihost_utils.process_allgather(np.array(mark.exists())))
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    if not seen.all():
        blind = ", ".join(str(i) for i in np.flatnonzero(~seen))
        raise UserError(
            f"--workdir={workdir}: is not shared: process {blind} of {len(seen)} does not see what process 0 writes "
            "there; give a folder that all hosts mount"
        )


class Store:
    """Saves, prunes and restores the checkpoints of one run.

    Args:
        workdir: the run's folder.
        keep: how many of the newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are kept for good; 0 for none.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, keep_every: int = 0):
        from orbax.checkpoint import v1 as ocp

        self._ocp = ocp
        self.folder = Path(workdir).absolute() / FOLDER
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--workdir={workdir}: cannot write there ({e.strerror}); give another") from e
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=_Always(),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=jax.process_index() == 0,
        )
        self._pending: Any = None
        self._pending_step = -1
        self._sealer = ThreadPoolExecutor(1, "sums")  # digests of large files take a while
        self._sealing: Future[None] | None = None
        self._broken = False
        _hush_orbax()

    def save(self, state: Any, record: Record, wait: bool = False) -> None:
        """Starts to write a checkpoint; training can continue meanwhile.

        Raises:
            UserError: this checkpoint or the previous one could not be written.
        """
        self.finish()
        check_space(self.folder, needed_bytes(state) // jax.process_count())
        try:
            self._pending = self._checkpointer.save_async(
                record.step, state, force=True, overwrite=True, custom_metadata=dataclasses.asdict(record)
            )
            self._pending_step = record.step
        except Exception as e:
            raise self._failed(e, record.step) from e
        if wait:
            self.finish()

    def finish(self) -> None:
        """Waits for the write in progress and marks the checkpoint as complete.

        Raises:
            UserError: the write failed, for instance because the disk is full.
        """
        self._commit()
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            try:
                sealing.result()
            except Exception as e:
                raise self._failed(e, self._pending_step) from e

    def poll(self) -> None:
        """Marks a finished write as complete without waiting for an unfinished one; called at every step."""
        if self._pending is not None and not self._checkpointer.is_saving_in_progress():
            self._commit()
        elif self._sealing is not None and self._sealing.done():
            self.finish()

    def _commit(self) -> None:
        """Waits for the files in progress and begins to mark the checkpoint as complete."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._checkpointer.wait()
        except Exception as e:
            raise self._failed(e, self._pending_step) from e
        if jax.process_index() == 0:
            self._sealing = self._sealer.submit(_seal, self.folder / str(self._pending_step))

    def _failed(self, e: Exception, step: int) -> UserError:
        free = shutil.disk_usage(self.folder).free / 2**20
        reason = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
        if told := re.search(r"(\w[\w ]+) \[os_error", str(e)):  # such as "No space left on device"
            reason = told.group(1)
        self._broken = True
        return UserError(
            f"{self.folder / str(step)}: the checkpoint could not be written ({reason}; {free:.0f} MiB free); "
            "free some space and start again: the run resumes from the previous checkpoint"
        )

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, newest first; a warning names incomplete ones."""
        found = []
        for path in sorted(self.folder.iterdir(), key=lambda p: p.name) if self.folder.is_dir() else []:
            if path.is_dir() and path.name.isdigit():
                problem = damage(path)
                if problem:
                    logging.warning("%s: passed over: %s", path, problem)
                else:
                    found.append(int(path.name))
        return sorted(found, reverse=True)

    def _intact(self) -> list[int]:
        """`steps`, beginning with the newest checkpoint whose files have the contents that were written."""
        steps = self.steps()
        while steps and (problem := damage(path := self.folder / str(steps[0]), contents=True)):
            logging.warning("%s: passed over: %s", path, problem)
            del steps[0]
        return steps

    def record(self, step: int) -> Record:
        """Metadata of the checkpoint at `step`."""
        return read_record(self.folder / str(step))

    def restore(self, abstract: Any) -> tuple[Any, Record] | None:
        """The newest readable checkpoint, restored onto the shardings of `abstract`; None if there is none.

        Raises:
            UserError: a checkpoint is complete, but its state is of another model or optimiser.
        """
        for step in _of_first_process(self._intact() if jax.process_index() == 0 else []):
            path = self.folder / str(step)
            state, error = None, ""
            try:
                record = read_record(path)
                with quiet():
                    state = self._ocp.load(path, abstract)
            except Exception as e:
                error = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
            if jax.process_count() > 1:  # all processes must restore the same step
                good = multihost_utils.process_allgather(np.array(state is not None))
                state = state if bool(np.all(good)) else None
            if state is not None:
                _check_shapes(path, state, abstract)
                return state, record
            logging.warning("%s: passed over: cannot be read (%s)", path, error or "by another process")
        return None

    def close(self) -> None:
        """Finishes the write in progress."""
        if not self._broken:
            self.finish()
        self._sealer.shutdown()
        try:
            self._checkpointer.close()
        except Exception:  # a failed write was already reported by `finish`
            if not self._broken:
                raise


def _of_first_process(steps: list[int]) -> list[int]:
    """The first process's list, in all processes."""
    if jax.process_count() == 1:
        return steps
    number = int(multihost_utils.broadcast_one_to_all(np.array(len(steps), np.int32)))
    if not number:
        return []
    mine = np.array(steps if jax.process_index() == 0 else [0] * number, np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(mine)]


@functools.cache
def _hush_orbax() -> None:
    """Keeps Orbax's threads from printing exceptions: `finish` raises them again and reports them in one line."""
    before = threading.excepthook

    def hush(args: threading.ExceptHookArgs) -> None:
        thread = args.thread
        if thread is None or not (type(thread).__module__.startswith("orbax") or thread.name in _ORBAX_THREADS):
            before(args)

    threading.excepthook = hush
    logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


_ORBAX_THREADS = ("async_save", "save_finalize")


class _Always:
    """A save policy that never vetoes a save: the loop decides."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


def _check_shapes(path: Path, state: Any, abstract: Any) -> None:
    for (where, have), want in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(abstract), strict=True):
        if have.shape != want.shape:
            name = jax.tree_util.keystr(where, simple=True, separator=".")
            raise UserError(
                f"{path}: {name} has shape {list(have.shape)} but the config makes it {list(want.shape)}; "
                "continue with the config that it was trained with, or give another --workdir"
            )


def read_record(path: Path) -> Record:
    """Metadata of a checkpoint folder.

    Raises:
        UserError: it is missing or unreadable.
    """
    try:
        metadata = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        return Record(**metadata)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: is not a checkpoint of duplex-jax train ({e})") from e


def _files(path: Path) -> dict[str, int]:
    return {
        str(f.relative_to(path)): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file() and f.name != SUMS
    }


def _digest(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _seal(path: Path) -> None:
    sums = {name: [size, _digest(path / name)] for name, size in _files(path).items()}
    with atomic_write(path / SUMS) as f:
        json.dump(sums, f)


def damage(path: Path, contents: bool = False) -> str:
    """Why a checkpoint folder is incomplete or damaged, or an empty string.

    Args:
        path: the folder.
        contents: compare digests too, which reads every file. Checkpoints written before there were digests have none.
    """
    try:
        wanted = json.loads((path / SUMS).read_text())
    except (OSError, ValueError):
        return f"it has no {SUMS}, so its writing was not finished"
    have = _files(path)
    for name, sums in wanted.items():
        size, digest = sums if isinstance(sums, list) else (sums, None)
        if name not in have:
            return f"{name} is missing"
        if have[name] != size:
            return f"{name} has {have[name]} bytes and not {size}"
        if contents and digest is not None and _digest(path / name) != digest:
            return f"{name} is not as it was written"
    return ""


def stable_checkpoint(where: str) -> tuple[Path, int]:
    """The checkpoint that `config.optim.decay_from` names; see `find`."""
    return find(where, "config.optim.decay_from")


def find(where: str, flag: str) -> tuple[Path, int]:
    """Folder and step of `WORKDIR@STEP`, or of the newest complete checkpoint in `WORKDIR`.

    Args:
        where: a run's folder, with an optional `@STEP`.
        flag: name of the flag, for error messages.

    Raises:
        UserError: there is no such checkpoint.
    """
    workdir, _, at = where.rpartition("@") if re.search(r"@\d+$", where) else (where, "", "")
    folder = Path(workdir).absolute() / FOLDER
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and not damage(p)] if folder.is_dir() else []
    if not steps:
        raise UserError(f"{flag}={where}: no complete checkpoint in {folder}")
    step = int(at) if at else max(steps)
    if step not in steps:
        raise UserError(f"{flag}={where}: no complete checkpoint of step {step}; the complete ones are {sorted(steps)}")
    if problem := damage(folder / str(step), contents=True):
        raise UserError(f"{flag}={where}: {folder / str(step)}: {problem}; give another of {sorted(steps)}")
    return folder / str(step), step


def load_state(path: Path, abstract: Any) -> tuple[Any, Record]:
    """Loads one checkpoint from its folder.

    Raises:
        UserError: it cannot be read or is of another model.
    """
    from orbax.checkpoint import v1 as ocp

    record = read_record(path)
    try:
        with quiet():
            state = ocp.load(path, abstract)
    except Exception as e:
        raise UserError(f"{path}: cannot be read ({str(e)[:200]}); give another checkpoint") from e
    _check_shapes(path, state, abstract)
    return state, record
