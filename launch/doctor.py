"""`duplex-jax doctor`: checks that this machine can do a run: devices, rates, a sharded step, a save, one slice."""

import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from duplex_jax.errors import UserError
from duplex_jax.files import temporary
from launch import app, machine

if TYPE_CHECKING:
    from jax.sharding import Mesh

_MESH = app.path_flag("mesh", None, "Check the devices of this mesh; by default those that JAX finds.")
_WORKDIR = app.path_flag("workdir", None, "Save and restore there; by default in a temporary folder.")
_MODEL = app.path_flag("model", "smollm2-135m-duplex", "Model whose slice is timed; empty to skip.")

_PACKAGES = ("duplex-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "libtpu", "jax-cuda13-plugin",
             "jax-cuda12-plugin")  # fmt: skip


def _best_seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The fastest of several calls of `work`, in seconds; the first call, which compiles, is not counted."""
    import jax

    jax.block_until_ready(work())
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - began)
    return min(taken)


def _versions() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"


def _rates() -> str:
    """Matrix product rate and memory bandwidth of one device."""
    import jax
    import jax.numpy as jnp

    cpu = jax.default_backend() == "cpu"
    n, dtype = (1024, jnp.float32) if cpu else (8192, jnp.bfloat16)
    a = jnp.ones((n, n), dtype)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda x: x + 1)
    rate = 2 * n**3 / _best_seconds(lambda: product(a))
    x = jnp.ones((16 if cpu else 256) << 20, jnp.float32)
    return (f"{rate / 1e12:.2f} TFLOP/s in {dtype.__name__}, {2 * x.nbytes / _best_seconds(lambda: copy(x)) / 1e9:.0f} "
            "GB/s read and written")  # fmt: skip


def _sharded_step(mesh: "Mesh") -> str:
    """Compares a gradient over all devices with the same on the host."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    rows, width = 8 * mesh.size, 16
    x = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    w = np.ones((width, width), np.float32)
    batch = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(jax.grad(lambda w, x: jnp.mean((x @ w) ** 2)), out_shardings=everywhere)
    found = step(jax.device_put(w, everywhere), jax.make_array_from_callback(x.shape, batch, lambda at: x[at]))
    wanted = 2 * x.T @ (x @ w) / x.size
    if not np.allclose(np.asarray(found), wanted, rtol=0.05, atol=0.05):
        raise UserError("the gradient over all devices differs from the host's result; check the links between devices")
    return f"a gradient over {mesh.size} devices matches the host"


def _save(folder: Path, mesh: "Mesh") -> str:
    """Saves an array with Orbax and reads it back."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from orbax.checkpoint import v1 as ocp

    size = mesh.size << 18
    state = {
        "x": jax.device_put(np.arange(size, dtype=np.float32), NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    }
    with temporary(folder / "doctor", folder=True) as place:
        began = time.perf_counter()
        ocp.save(place.absolute() / "state", state)
        back = ocp.load(place.absolute() / "state", state)
        seconds = time.perf_counter() - began
    if not np.array_equal(np.asarray(back["x"]), np.asarray(state["x"])):
        raise UserError(f"{folder}: data saved there reads back differently; give another --workdir")
    return f"{state['x'].nbytes >> 20} MiB to {folder} and back in {seconds:.2f} s"


def _slice(name: str) -> str:
    from duplex_jax.checkpoint.registry import load_model
    from duplex_jax.decode.engine import Engine
    from duplex_jax.decode.session import DuplexSession

    model = load_model(name, dtype="auto")
    session = DuplexSession(Engine(model.model, model.template, rows=1, capacity=512))
    for words in ("Hello there, how are you?", None, "And you?", None):  # the last steps compile nothing
        session.step(words)
    return f"{name}: {session.step(None).seconds:.2f} s"


def main(argv: list[str]) -> None:
    """Runs the checks in order and prints what each found; stops at the first that fails."""
    app.no_arguments(argv)
    if not flags.FLAGS["verbosity"].present:  # Orbax logs every stage of a save
        logging.set_verbosity(logging.WARNING)
    from duplex_jax import parallel

    print(f"versions     {_versions()}", flush=True)
    spec = parallel.load_mesh_spec(_MESH.value) if _MESH.value else None
    if spec is not None:
        machine.start(spec)
    import jax
    from jax.sharding import Mesh

    app.use_compilation_cache()
    devices = jax.devices()
    mesh = parallel.make_mesh(spec) if spec is not None else Mesh(np.array(devices), ("all",))
    print(f"devices      {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})", flush=True)
    print(f"rates        {_rates()}", flush=True)
    print(f"sharded step {_sharded_step(mesh)}", flush=True)
    folder = Path(_WORKDIR.value or tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"save         {_save(folder, mesh)}", flush=True)
    except OSError as e:
        raise UserError(f"--workdir={folder}: cannot write there ({e.strerror or e})") from e
    if _MODEL.value:
        print(f"slice        {_slice(_MODEL.value)}", flush=True)


def start() -> None:
    """Runs the job."""

    app.run(main)


if __name__ == "__main__":
    start()
