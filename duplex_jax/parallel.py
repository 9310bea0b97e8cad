"""Sharding: one table from logical axes to mesh axes, the meshes, and checks that they fit a model.

To try another layout, change `RULES` and nothing else. Every weight and activation names its logical axes once (the
parameters' `out_sharding` in `model.layers`, the `shard=` calls).
"""

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig

AXES = ("slice", "data", "fsdp", "tensor")
"""`slice` crosses the data-centre network between TPU slices; `data` replicates weights; `fsdp` shards them, and the
batch's rows; `tensor` shards heads, MLP width and vocabulary."""

BATCH_AXES = ("slice", "data", "fsdp")

REPLICA_AXES = ("slice", "data")
"""Axes along which weights are replicated and gradients are reduced, once per step."""

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_AXES,
    "rows": REPLICA_AXES,  # rows of the batch where `fsdp` shards the width
    "length": None,
    "activation": None,
    # weights
    "layers": None,
    "norm": None,
    "rank": None,
    "embed": "fsdp",
    "vocab": "tensor",
    # both
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data-sheet figures of an accelerator, used for predictions.

    Attributes:
        name: name in reports.
        flops: dense bf16 peak, FLOP/s.
        memory: usable bytes.
        bandwidth: memory bandwidth, bytes/s.
        link: bytes/s from a chip to others in its slice or host.
        network: bytes/s from a chip to other slices or hosts.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float


GB = 1e9
GIB = 2.0**30

# Peak figures from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and NVIDIA's A100 and H100 data sheets.
CPU = Chip("CPU", 1e11, 8 * GIB, 20 * GB, 10 * GB, 1 * GB)
A100 = Chip("A100-80GB", 312e12, 79 * GIB, 2039 * GB, 300 * GB, 25 * GB)
H100 = Chip("H100-SXM", 989e12, 79 * GIB, 3350 * GB, 450 * GB, 50 * GB)
V4 = Chip("TPU v4", 275e12, 31.2 * GIB, 1228 * GB, 270 * GB, 6.25 * GB)
V5E = Chip("TPU v5e", 197e12, 15.75 * GIB, 819 * GB, 180 * GB, 3.1 * GB)
V5P = Chip("TPU v5p", 459e12, 95 * GIB, 2765 * GB, 540 * GB, 6.25 * GB)
V6E = Chip("TPU v6e", 918e12, 31.25 * GIB, 1640 * GB, 320 * GB, 6.25 * GB)

# Slices of less than 16 x 16 have no links that wrap around, so a ring goes there and back over the same ones.
V5E_PART = dataclasses.replace(V5E, link=V5E.link / 2)
V6E_PART = dataclasses.replace(V6E, link=V6E.link / 2)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """A named mesh: the hardware, and the number of devices along each axis.

    Attributes:
        name: its name for `--mesh`.
        chip: the accelerator.
        platform: `cpu`, `gpu` or `tpu`.
        slice, data, fsdp, tensor: devices along each axis.
        hosts: number of machines; each runs one process.
        topology: name by which libtpu (`v5e:4x4`) or the CUDA plugin (`1x1x8`) describes absent hardware.
        target: for GPUs, the target of `compile`: `a100` or `h100`.
        attention: the backend that `auto` selects.
    """

    name: str
    chip: Chip
    platform: str
    slice: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    hosts: int = 1
    topology: str = ""
    target: str = ""
    attention: str = "xla"

    @property
    def shape(self) -> tuple[int, ...]:
        """Devices along `AXES`."""
        return (self.slice, self.data, self.fsdp, self.tensor)

    @property
    def size(self) -> int:
        """Total number of devices."""
        return math.prod(self.shape)

    @property
    def batch_shards(self) -> int:
        """Number of parts into which the rows of a micro-batch are split."""
        return self.slice * self.data * self.fsdp


def load_mesh_spec(name: str) -> MeshSpec:
    """The mesh that `--mesh` names: one in `configs/mesh/`, or a Python file with a `get_mesh()`.

    Raises:
        UserError: there is no mesh of that name.
    """
    if name.endswith(".py"):
        path = Path(name)
        spec = importlib.util.spec_from_file_location(f"mesh_{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise UserError(f"--mesh={name}: no such file; give one with a get_mesh(), or a name of configs/mesh/")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module_name = f"configs.mesh.{name.replace('-', '_')}"
        try:
            found = importlib.util.find_spec(module_name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise UserError(f"--mesh={name}: is unknown; one of {', '.join(mesh_names())}, or a Python file")
        module = importlib.import_module(module_name)
    if not hasattr(module, "get_mesh"):
        raise UserError(f"--mesh={name}: has no get_mesh(); see the files in configs/mesh/")
    return module.get_mesh()


def mesh_names() -> list[str]:
    """The names of the meshes in configs/mesh/."""
    spec = importlib.util.find_spec("configs.mesh")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return sorted(p.stem.replace("_", "-") for f in folders for p in Path(f).glob("[!_]*.py"))


def resize(spec: MeshSpec, **axes: int) -> MeshSpec:
    """The same hardware with other axes, for `--data`, `--fsdp` and `--tensor`; 0 keeps an axis as it is.

    Raises:
        UserError: the axes' product is not the number of devices.
    """
    wanted: dict[str, Any] = {k: v for k, v in axes.items() if v}
    changed = dataclasses.replace(spec, **wanted)
    if changed.size != spec.size:
        raise UserError(
            f"mesh {spec.name}: {dict(zip(AXES, changed.shape, strict=True))} makes {changed.size} devices, but it has "
            f"{spec.size}; choose axes whose product is that number"
        )
    return changed


def check_heads(spec: MeshSpec, config: ModelConfig) -> None:
    """Checks that a mesh divides a model's layers, given only the model's shape.

    Raises:
        UserError: it does not; the message names the size, and divisors that would work.
    """
    sizes = {"heads": config.num_heads, "key heads": config.num_kv_heads, "MLP columns": config.intermediate_size}
    common = math.gcd(*sizes.values())
    for what, size in sizes.items():
        if size % spec.tensor:
            raise UserError(
                f"mesh {spec.name}: {size} {what} are not divisible by tensor={spec.tensor}; tensor may be "
                f"{_divisors(common)}"
            )
    if config.hidden_size % spec.fsdp:
        raise UserError(
            f"mesh {spec.name}: hidden size {config.hidden_size} is not divisible by fsdp={spec.fsdp}; "
            f"fsdp may be {_divisors(config.hidden_size, most=1024)}, the rest goes to data"
        )


def check_model(spec: MeshSpec, config: ModelConfig) -> None:
    """Checks that a mesh divides a model, vocabulary included.

    Raises:
        UserError: it does not; the message names the size, and what would work.
    """
    check_heads(spec, config)
    if config.padded_vocab_size % spec.tensor:
        raise UserError(
            f"mesh {spec.name}: {config.padded_vocab_size} vocabulary rows are not divisible by tensor={spec.tensor}; "
            f"--config.model.vocab_multiple={spec.tensor} pads them"
        )


def check_batch(spec: MeshSpec, rows: int, micro_batches: int) -> None:
    """Checks that a batch divides into micro-batches and devices.

    Raises:
        UserError: it does not; the message says which batch sizes would work.
    """
    if rows % micro_batches or (rows // micro_batches) % spec.batch_shards:
        unit = micro_batches * spec.batch_shards
        near = max(unit, round(rows / unit) * unit)
        raise UserError(
            f"batch: {rows} rows are not divisible by {micro_batches} micro-batches x {spec.batch_shards} shards of "
            f"mesh {spec.name}; use a multiple of {unit}, such as {near}"
        )


def _divisors(n: int, most: int = 64) -> str:
    return ", ".join(str(d) for d in range(1, min(n, most) + 1) if n % d == 0)


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over real (or described) devices, with all axes Auto.

    Args:
        spec: number of devices along each axis.
        devices: all devices of this run by default.

    Raises:
        UserError: there are fewer devices than the mesh needs.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < spec.size:
        raise UserError(
            f"mesh {spec.name}: needs {spec.size} devices, but there are {len(devices)} ({devices[0].device_kind}); "
            f"choose a smaller --mesh"
        )
    if len(devices) > spec.size and jax.process_count() > 1:
        raise UserError(f"mesh {spec.name}: has {spec.size} devices, but this run has {len(devices)}; use them all")
    devices = devices[: spec.size]
    return Mesh(_arranged(spec, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(spec: MeshSpec, devices: list[Any]) -> np.ndarray:
    """Devices as `[slice, data, fsdp, tensor]`, with network neighbours adjacent."""
    if spec.platform != "tpu" or spec.size == 1:
        return np.array(devices).reshape(spec.shape)
    from jax.experimental import mesh_utils

    inner = (1, spec.data, spec.fsdp, spec.tensor)
    if spec.slice > 1:
        return mesh_utils.create_hybrid_device_mesh(inner, (spec.slice, 1, 1, 1), devices, process_is_granule=False)
    try:
        return mesh_utils.create_device_mesh(inner, devices, contiguous_submeshes=True)
    except (ValueError, NotImplementedError, AssertionError):
        return np.array(devices).reshape(spec.shape)


def partition(axes: Sequence[str | None]) -> P:
    """Mesh axes for an array's logical axes, except those already bound by an enclosing `shard_map`."""
    taken = jax.sharding.get_abstract_mesh().manual_axes

    def free(axis: str | None) -> str | tuple[str, ...] | None:
        names = RULES[axis] if axis else None
        if names is None or isinstance(names, str):
            return None if names in taken else names
        return tuple(name for name in names if name not in taken)

    return P(*map(free, axes))


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of an array on a mesh, from its logical axes."""
    return NamedSharding(mesh, partition(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrains an activation's sharding by its logical axes; a no-op without a mesh set by `jax.set_mesh`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes))


def local_places(sharding: NamedSharding, shape: tuple[int, ...], axis: int = 0) -> list[int]:
    """Indices along `axis` of which this process holds any part, ascending."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({i for index in indices if index for i in range(*index[axis].indices(shape[axis]))})


def global_array(sharding: NamedSharding, shape: tuple[int, ...], local: np.ndarray, places: Sequence[int]) -> Any:
    """A global array from parts of its first axis that each process holds.

    Args:
        sharding: sharding of the result.
        shape: shape of the result.
        local: this process's part, `[len(places), ...]`.
        places: indices of that part along the first axis, ascending.
    """
    at = {place: i for i, place in enumerate(places)}

    def part(index: Any) -> np.ndarray:
        first = [at[i] for i in range(*index[0].indices(shape[0]))]
        return local[first[0] : first[-1] + 1][(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, part)
