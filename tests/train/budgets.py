"""Compiles decode programs of a few layers for hardware that is not here, and prints what a budget is about, as JSON.

python -m tests.train.budgets MESH ROWS CAPACITY ENTRIES LAYERS
"""

import dataclasses
import json
import re
import sys
from typing import Any

from configs.minicpm_2b_duplex import SHAPE, get_config
from duplex_jax import parallel
from duplex_jax.train import collectives
from duplex_jax.train import compile as compiling


def largest(hlo: str, kinds: str) -> float:
    """Bytes of the largest result of instructions of these kinds."""
    found = re.findall(rf"= \(?(\w+)\[([\d,]*)\][^=]*? (?:{kinds})\(", hlo)
    return max((collectives._bytes(*shape) for shape in found if shape[0] in collectives._DTYPE_BYTES), default=0.0)


def decode(mesh: str, rows: str, capacity: str, entries: str, layers: str) -> dict[str, Any]:
    """Bytes of each program: its arguments, its temporaries, its largest copy; of the cache, and one layer's keys."""
    spec = parallel.load_mesh_spec(mesh)
    compiling.prepare_environment(spec)
    model = dataclasses.replace(SHAPE, num_layers=int(layers), vocab_multiple=128)
    devices = parallel.make_mesh(spec, compiling.described_devices(spec))
    out = {}
    for lowered in compiling.lower_decode(model, spec, devices, int(rows), int(capacity), entries):
        compiled = lowered.program.compile()
        memory, hlo = compiled.memory_analysis(), compiled.as_text()
        out[lowered.kind] = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "declared": compiling._bytes_a_device((lowered.weights, lowered.cache)),
            "cache": compiling._bytes_a_device(lowered.cache),
            "keys": compiling._bytes_a_device(lowered.cache.k[0]),
            "scores": 6 * int(rows) * SHAPE.num_heads * lowered.tokens * lowered.cache.slots,
            "copy": largest(hlo, "copy|copy-start|transpose"),
        }
    return out


def train(mesh: str) -> list[tuple[str, int, float]]:
    """Kind, times and bytes of every collective that leaves a host or slice in a step of the paper's run."""
    spec = parallel.load_mesh_spec(mesh)
    compiling.prepare_environment(spec)
    found: list[collectives.Collective] = []
    read = collectives.read

    def kept(*args: Any) -> list[collectives.Collective]:
        found.extend(read(*args))
        return found

    collectives.read = kept
    compiling.compile_train(get_config(), spec)
    return [(c.kind, c.times, c.sent) for c in found if not c.near]


if __name__ == "__main__":
    print(json.dumps({"decode": decode, "train": train}[sys.argv[1]](*sys.argv[2:])))
