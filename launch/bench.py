"""`duplex-jax bench NAME [key=value ...] [--json=FILE]`: runs one benchmark and prints a table.

A benchmark is a function whose arguments all have defaults and that returns JSON-compatible values; `key=value` sets an
argument. Arguments that many benchmarks share are also flags (`--model=M` is `model=M`). Its docstring says what it
measures. If its module has a `table` function, that formats the output.
"""

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, check_writable, local_path
from launch import app

MEASUREMENTS = {
    "ceilings": "duplex_jax.decode.floor:bench_ceilings",
    "decode": "benchmarks.decode:bench_decode",
    "batch": "benchmarks.batch:bench_batch",
    "quality": "benchmarks.quality:bench_quality",
    "evaluate": "benchmarks.evaluate:bench_evaluate",
    "generate": "benchmarks.generate:bench_generate",
    "train": "benchmarks.train:bench_train",
    "data": "benchmarks.data:bench_data",
    "serve": "benchmarks.serve:bench_serve",
    "speech": "benchmarks.speech:bench_speech",
}

_JSON = app.path_flag("json", None, "Also write the figures to this JSON file.")
_ARGUMENTS = [
    app.path_flag("model", None, "Model: a folder, a file, hf:owner/name, or a known name."),
    flags.DEFINE_string("histories", None, "decode: history lengths in tokens, for example 256,4096."),
    flags.DEFINE_integer("repeats", None, "decode: number of measurements for each cached method.", lower_bound=1),
    flags.DEFINE_integer(
        "slow_repeats", None, "decode: number of measurements for each method that re-encodes the history.", 1
    ),
    app.path_flag("png", None, "decode: write a plot to this PNG file."),
]


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in MEASUREMENTS:
        raise UserError(f"bench needs the name of a measurement: {', '.join(MEASUREMENTS)}")
    module, _, name = MEASUREMENTS[argv[0]].partition(":")
    code = _module(module)
    measure = getattr(code, name)
    flagged = [f"{flag.name}={flag.value}" for flag in _ARGUMENTS if flag.value is not None]
    arguments = parse_arguments(argv[1:] + flagged, inspect.signature(measure))
    if _JSON.value:
        check_writable(_JSON.value)
    result = measure(**arguments)
    for row in getattr(code, "table", table)(result):
        print(row)
    if _JSON.value:
        with atomic_write(_JSON.value) as f:
            json.dump({"measurement": argv[0], "arguments": arguments} | result, f, indent=1)


def _module(name: str) -> Any:
    """The module of a benchmark: `benchmarks/` is next to this package in a checkout and is not installed.

    Raises:
        UserError: there is no checkout.
    """
    checkout = Path(__file__).resolve().parents[1]
    if name.startswith("benchmarks.") and not (checkout / "benchmarks" / "__init__.py").is_file():
        raise UserError("bench needs a checkout of the project: benchmarks/ is not installed with the package")
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))


_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def parse_arguments(items: list[str], signature: inspect.Signature) -> dict[str, Any]:
    """Converts `key=value` items to arguments of the types of their defaults.

    Raises:
        UserError: there is no such argument, or the value has the wrong type.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key not in signature.parameters:
            raise UserError(f"{item!r}: must be key=value, with one of {', '.join(signature.parameters)} as key")
        kind = type(signature.parameters[key].default)
        try:
            found[key] = _BOOLEANS[value.lower()] if kind is bool else local_path(value) if kind is str else kind(value)
        except (ValueError, KeyError) as e:
            raise UserError(f"{item!r}: must be {kind.__name__}") from e
    return found


def table(result: Any, name: str = "") -> list[str]:
    """Formats nested figures as lines, each with its path and one figure."""
    if isinstance(result, dict):
        items = [(f"{name}.{key}" if name else str(key), value) for key, value in result.items()]
    elif isinstance(result, list):
        items = [(f"{name}[{i}]", value) for i, value in enumerate(result)]
    else:
        return [f"{name:60}{result:>16,}" if isinstance(result, int | float) else f"{name:60}{result!s:>16}"]
    return [line for key, value in items for line in table(value, key)]


def start() -> None:
    """Runs the job."""
    app.run(main)


if __name__ == "__main__":
    start()
