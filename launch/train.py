"""`duplex-jax train`: trains a model on the mesh that `--mesh` names, from a laptop to a pod."""

import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

from duplex_jax.errors import UserError
from launch import app, machine
from launch.dotted import take_dotted

if TYPE_CHECKING:
    from duplex_jax.train.config import Config

_CONFIG = app.path_flag("config", None, "Python config file, as in configs/; --config.a.b=value overrides a field.")
_MESH = app.MeshFlags(__name__, "cpu1")
_WORKDIR = app.path_flag(
    "workdir", None, "Folder for checkpoints, metrics and the exported model; an interrupted run resumes from it."
)
_PROFILE = flags.DEFINE_string(
    "profile", "", "FIRST:LAST: steps to profile; traces go to WORKDIR/profile. Off by default."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of the first process; not needed under Slurm, TPU pods or Open MPI."
)
_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Number of processes in the run; 0 asks the cluster.")
_PROCESS = flags.DEFINE_integer("process_id", -1, "Index of this process; -1 asks the cluster.")

_DOTTED: list[tuple[str, str]] = []


def parse_profile(text: str):
    """Parses `FIRST:LAST` as a profile window."""
    from duplex_jax.train.loop import Profile

    if not text:
        return None
    try:
        first, last = map(int, text.split(":"))
        if not 0 <= first < last:
            raise ValueError
    except ValueError:
        raise UserError(f"--profile={text}: must be FIRST:LAST, two step numbers, as in 10:13") from None
    return Profile(first, last)


def as_packed(config: "Config", given: Collection[str]) -> "Config":
    """The config with the row length and template of its packed training data.

    Args:
        config: the run's settings.
        given: names of fields that flags have set; these are not changed.

    Raises:
        UserError: packed data contradict a flag, or each other.
    """
    from duplex_jax.data.dataset import MANIFEST, read_manifest

    paths = [path for path in (*config.data.train, *config.data.eval) if (Path(path) / MANIFEST).is_file()]
    for path, manifest in ((path, read_manifest(path)) for path in paths):
        for group, field, packed in (("data", "length", manifest.length), ("model", "template", manifest.template)):
            node, name = getattr(config, group), f"{group}.{field}"
            wanted = getattr(node, field)
            if packed == wanted or not wanted:  # a model's own template is checked when its tokenizer is loaded
                continue
            if name in given or path != paths[0]:
                where = f"--config.{name}" if name in given else f"{name} of {paths[0]}"
                raise UserError(
                    f"{path}: was packed with {field} {packed}, and {where} is {wanted}; pack again with "
                    f"--{field}={wanted}" + (f", or leave --config.{name} out" if name in given else "")
                )
            print(f"{path}: was packed with {field} {packed}; the run takes that in place of the config's {wanted}")
            config = dataclasses.replace(config, **{group: dataclasses.replace(node, **{field: packed})})
    return config


def main(argv: list[str]) -> int | None:
    """Builds config and mesh, joins the other processes, and trains."""
    app.no_arguments(argv)
    if not flags.FLAGS["verbosity"].present:  # Orbax logs every stage of a save
        logging.set_verbosity(logging.WARNING)
    from duplex_jax import parallel
    from duplex_jax.train import config as configs

    if not _CONFIG.value or not _WORKDIR.value:
        raise UserError("train needs --config=FILE and --workdir=DIR (--help lists the flags)")
    config = configs.check(configs.override(configs.load_config(_CONFIG.value), _DOTTED))
    spec = _MESH.spec()
    config = configs.fit_batch(config, spec)
    if config.model.shape is not None:
        parallel.check_heads(spec, config.model.shape)
    profile = parse_profile(_PROFILE.value)
    config = as_packed(config, {name for name, _ in _DOTTED})
    machine.start(spec, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    app.use_compilation_cache()  # so that a resumed run need not compile again
    import jax

    from duplex_jax.train.loop import train

    if jax.process_index() == 0:
        app.claim(_WORKDIR.value)
    return train(config, spec, Path(_WORKDIR.value), profile)


def start() -> None:
    """Runs the job."""
    sys.argv[1:], dotted = take_dotted(sys.argv[1:])
    _DOTTED.extend(dotted)
    app.run(main)


if __name__ == "__main__":
    start()
