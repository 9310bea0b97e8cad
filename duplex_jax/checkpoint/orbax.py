"""Orbax checkpoints of weights with the model's exact config; used by the trainer and by `convert`."""

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from duplex_jax.checkpoint.names import check_finite, pad_vocabulary
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig, RopeScaling
from duplex_jax.model.tree import Params, shapes

CONFIG_FILE = "model_config.json"
PARAMS_FOLDER = "params"


@functools.cache
def _drop_late_reports() -> None:
    """Suppresses Python's traceback for each read or write that ends after another one failed.

    Orbax raises the first failure and closes its event loop; TensorStore's other operations later find it closed, when
    no caller is waiting.
    """
    hook = sys.unraisablehook

    def drop(report: Any) -> None:
        late = isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == "Event loop is closed"
        if not (late and report.object is None):
            hook(report)

    sys.unraisablehook = drop


@contextlib.contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Keeps Orbax's messages up to `level`, forty lines per call, out of a job's log."""
    _drop_late_reports()
    before = logging.get_verbosity()
    logging.set_verbosity(min(before, level))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def config_to_json(config: ModelConfig) -> str:
    """All fields of a config as JSON; inverse of `config_from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json(text: str, where: str) -> ModelConfig:
    """Inverse of `config_to_json`.

    Raises:
        UserError: invalid JSON, or a field is unknown or missing.
    """
    try:
        row = json.loads(text)
        rope = row.pop("rope_scaling")
        lists = {k: tuple(v) for k, v in rope.items() if isinstance(v, list)}
        return ModelConfig(**row, rope_scaling=RopeScaling(**rope | lists))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, UserError) as e:
        raise UserError(f"{where}: is not a model config of duplex_jax ({e}); write the store again") from e


def is_store(path: Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return (path / CONFIG_FILE).is_file() and (path / PARAMS_FOLDER).is_dir()


def save(folder: Path, config: ModelConfig, params: Params, dtype: np.dtype | None = None) -> None:
    """Writes weights (numpy, or jax with any sharding) and config into an existing folder.

    Args:
        folder: the existing folder.
        config: the model; restored exactly, vocabulary padding included.
        params: its weights.
        dtype: dtype of the stored weights; None keeps their own.

    Raises:
        OSError: the folder cannot be written; no partial `params` is left.
    """
    from orbax.checkpoint import v1 as ocp

    (folder / CONFIG_FILE).write_text(config_to_json(config), encoding="utf-8")
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    try:
        with quiet(logging.FATAL):  # Orbax would also log the failure once per thread
            ocp.save((folder / PARAMS_FOLDER).absolute(), params)
    except Exception as e:  # TensorStore raises many types, such as for a full disk
        _remove_partial(folder)
        raise OSError(str(e).rsplit(": ", 1)[-1]) from e


def _remove_partial(folder: Path) -> None:
    """Removes a failed save, whose threads run for some more seconds and recreate their folders."""
    gone = 0
    for _ in range(300):
        parts = list(folder.glob(f"{PARAMS_FOLDER}*"))
        gone = 0 if parts else gone + 1
        if gone > 20:
            return
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)
        time.sleep(0.1)


def read_config(folder: Path) -> ModelConfig:
    """The config of a store.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        return config_from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as e:
        raise UserError(f"{path}: cannot read ({e.strerror}); write the store again") from e


def read_metadata(folder: Path) -> Any:
    """Shape and dtype of each stored weight, as a tree of `jax.ShapeDtypeStruct`s.

    Raises:
        UserError: the store cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    path = (folder / PARAMS_FOLDER).absolute()
    try:
        with quiet():
            stored = ocp.metadata(path).metadata
        if stored is None:
            raise ValueError("its metadata is damaged")
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored, is_leaf=_has_shape)
    except Exception as e:  # missing and truncated files raise many types
        raise UserError(f"{path}: cannot be read ({str(e)[:200]}); write the store again") from e


def restore(folder: Path, abstract: Any) -> Any:
    """Reads a store's weights onto devices.

    Args:
        folder: a folder written by `save`.
        abstract: `jax.ShapeDtypeStruct`s with the sharding and dtype wanted for each leaf; or numpy arrays, to restore
            numpy arrays on the host.

    Raises:
        UserError: a part is missing or cannot be read, or shapes differ.
    """
    from orbax.checkpoint import v1 as ocp

    path = (folder / PARAMS_FOLDER).absolute()
    stored = read_metadata(folder)
    if not _same_structure(stored, abstract):
        raise UserError(f"{path}: does not hold the expected weights; write the store again")
    for (where, want), found in zip(jax.tree.leaves_with_path(abstract), jax.tree.leaves(stored), strict=True):
        if tuple(found.shape) != tuple(want.shape):
            name = jax.tree_util.keystr(where, simple=True, separator=".")
            raise UserError(
                f"{path}: tensor {name} has shape {list(found.shape)}; the config makes it {list(want.shape)}"
            )
    try:
        with quiet():
            return ocp.load(path, abstract)
    except Exception as e:  # missing and truncated files raise many types
        raise UserError(f"{path}: cannot be restored ({str(e)[:200]}); write the store again") from e


def _same_structure(a: Any, b: Any) -> bool:
    return [path for path, _ in jax.tree.leaves_with_path(a)] == [path for path, _ in jax.tree.leaves_with_path(b)]


def _has_shape(x: Any) -> bool:
    return hasattr(x, "shape")


def load(folder: Path, dtype: np.dtype | None = None, vocab_multiple: int = 1) -> tuple[ModelConfig, Params]:
    """Config and numpy weights of a checkpoint, on the host.

    Args:
        folder: a folder written by `save`.
        dtype: dtype of the result; None keeps each weight's own.
        vocab_multiple: the vocabulary is padded to a multiple of this, whatever the stored padding.

    Raises:
        UserError: it cannot be read.
    """
    config = read_config(folder)
    stored = read_metadata(folder)
    template = shapes(config)
    if not _same_structure(stored, template):
        raise UserError(f"{folder}: its weights do not match {CONFIG_FILE}; write the store again")
    # A numpy array with strides of 0 has a shape and a dtype but takes no memory.
    abstract = jax.tree.map(
        lambda want, found: np.broadcast_to(np.zeros((), dtype or found.dtype), want.shape), template, stored
    )
    params = restore(folder, abstract)
    for where, value in jax.tree.leaves_with_path(params):
        check_finite(value, jax.tree_util.keystr(where, simple=True, separator="."), str(folder))
    return pad_vocabulary(config, params, vocab_multiple)
