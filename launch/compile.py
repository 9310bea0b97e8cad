"""`duplex-jax compile`: compiles training and TDM step for absent hardware, and estimates the sessions it serves."""

import dataclasses
import json
import sys
from typing import Any

from absl import flags, logging

from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, check_writable
from duplex_jax.model.config import STORES
from launch import app
from launch.dotted import take_dotted

_CONFIG = app.path_flag("config", None, "Python config file, as in configs/; --config.a.b=value overrides a field.")
_MESH = app.MeshFlags(__name__, "v5e-16")
_PROGRAMS = flags.DEFINE_list(
    "programs", ["train", "decode"], "Programs to compile: any of train, decode and sessions."
)
_PRICE = flags.DEFINE_float("price", 0.0, "train: price of one device in dollars per hour.", lower_bound=0.0)
_CONTEXTS = flags.DEFINE_list("contexts", ["256", "1024", "4096"], "sessions: context lengths in tokens to report.")
_SLICE_SECONDS = flags.DEFINE_float(
    "slice_seconds", 2.0, "sessions: length of a time slice in seconds.", lower_bound=0.01
)
_SESSIONS = flags.DEFINE_integer(
    "sessions", 0, "decode: total number of rows on all devices; 0 means as many as fit.", lower_bound=0
)
_CAPACITY = flags.DEFINE_integer("capacity", 4096, "decode: maximum context length of a row in tokens.", lower_bound=1)
_ENTRIES = flags.DEFINE_enum("entries", "bfloat16", STORES, "decode: storage type of cached keys and values.")
_JSON = app.path_flag("json", None, "Also write the reports to this JSON file.")

_DOTTED: list[tuple[str, str]] = []


def main(argv: list[str]) -> int:
    """Compiles and reports; the exit code is 1 if something does not fit."""
    app.no_arguments(argv)
    from duplex_jax.decode import capacity
    from duplex_jax.train import compile as compiling
    from duplex_jax.train import config as configs

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if not _CONFIG.value:
        raise UserError("compile needs --config=FILE (--help lists the flags)")
    for program in _PROGRAMS.value:
        if program not in ("train", "decode", "sessions"):
            raise UserError(f"--programs={program}: must be any of train, decode and sessions, separated by commas")
    if not all(context.isdecimal() and int(context) for context in _CONTEXTS.value):
        raise UserError(f"--contexts={','.join(_CONTEXTS.value)}: must be token counts separated by commas")
    if _JSON.value:
        check_writable(_JSON.value)
    config = configs.check(configs.override(configs.load_config(_CONFIG.value), _DOTTED))
    spec = _MESH.spec()
    if set(_PROGRAMS.value) != {"sessions"}:  # `sessions` compiles nothing
        compiling.prepare_environment(spec)
    reports: list[dict[str, Any]] = []
    for program in _PROGRAMS.value:
        if program == "sessions":
            model = compiling.model_shape(config)
            plans = capacity.plan_sessions(model, spec.chip, [int(n) for n in _CONTEXTS.value], _SLICE_SECONDS.value,
                                           efficiency=compiling.EFFICIENCY)  # fmt: skip
            fits = any(plan.sessions for plan in plans)
            print(f"sessions on one {spec.chip.name}, by formula, a slice each {_SLICE_SECONDS.value:g} s"
                  + ("" if fits else ": NONE FITS"))  # fmt: skip
            print("\n".join(capacity.sessions_table(plans)), flush=True)
            rows = [dataclasses.asdict(plan) | {"sessions": plan.sessions} for plan in plans]
            reports.append({"program": program, "chip": spec.chip.name, "plans": rows, "fits": fits})
            continue
        if program == "train":
            report = compiling.compile_train(config, spec, _PRICE.value)
        else:
            report = compiling.compile_decode(config, spec, _SESSIONS.value, _CAPACITY.value, _ENTRIES.value)
        print("\n".join(compiling.to_lines(report)), flush=True)
        reports.append(dataclasses.asdict(report))
    if _JSON.value:
        with atomic_write(_JSON.value) as f:
            json.dump(reports, f, indent=1)
    return 0 if all(report["fits"] for report in reports) else 1


def start() -> None:
    """Runs the job."""
    sys.argv[1:], dotted = take_dotted(sys.argv[1:])
    _DOTTED.extend(dotted)
    app.run(main)


if __name__ == "__main__":
    start()
