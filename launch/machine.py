"""The machine that a job runs on: JAX's backend, the devices of a mesh, and the run's other processes."""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from duplex_jax.errors import UserError

if TYPE_CHECKING:
    from duplex_jax.parallel import MeshSpec

_PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
_PLUGINS = {"cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}
_EXTRAS = {
    "cuda": "pip install 'duplex-jax[cuda]' for a driver with CUDA 13 (580 or newer), 'duplex-jax[cuda12]' for CUDA 12",
    "tpu": "pip install 'duplex-jax[tpu]' on a TPU VM",
}


def has_accelerator(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether JAX will use an accelerator here, determined without importing it."""
    if wanted := environment.get("JAX_PLATFORMS"):
        return not wanted.startswith("cpu")
    devices = {"cuda": ("/dev/nvidiactl", "/dev/dxg"), "tpu": ("/dev/accel0", "/dev/vfio/0")}
    return any(
        any(map(os.path.exists, devices[name])) and any(map(importlib.util.find_spec, plugins))
        for name, plugins in _PLUGINS.items()
    )


def backend_trouble() -> str | None:
    """Why JAX cannot start its backend, in one line; None if it can, or was not imported."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except Exception as e:  # a plugin can raise anything
        wanted = str(jax.config.values["jax_platforms"] or "")
        told = re.sub(r"^Unable to initialize backend '\w+': |\(set JAX_PLATFORMS=.*", "", str(e)).strip()
        why = _missing(wanted.split(",")[0]) or told or "no such device is to be seen"
        return f"JAX cannot start on {wanted or 'this machine'}: {why}; JAX_PLATFORMS=cpu runs on the CPU"
    return None


def _missing(platform: str) -> str:
    """The missing packages for a JAX platform, as text; empty if there are none."""
    name = platform.replace("gpu", "cuda")
    if name not in _EXTRAS or any(map(importlib.util.find_spec, _PLUGINS[name])):
        return ""
    return f"its plugin is not installed: {_EXTRAS[name]}"


def start(spec: "MeshSpec", coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Starts JAX on a mesh's platform, and joins the run's other processes, if any.

    Args:
        spec: the mesh; several CPU devices are emulated.
        coordinator: HOST:PORT of the first process; empty to ask the cluster environment.
        num_processes, process_id: number of processes and index of this one; 0 and -1 to ask the cluster environment.

    Raises:
        UserError: the platform is not available, the devices do not divide by the processes, or the mesh has several
            hosts and the others cannot be found.
    """
    import jax

    if spec.platform == "cpu":
        processes = max(1, num_processes)
        if spec.size % processes:
            raise UserError(f"mesh {spec.name}: {spec.size} devices do not divide by {processes} processes")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", spec.size // processes)
    elif not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", f"{_PLATFORMS[spec.platform]},cpu")
    if coordinator or spec.hosts > 1:
        _join(spec, coordinator, num_processes, process_id)
    if (there := jax.default_backend()) != spec.platform:  # JAX has fallen back to another platform
        why = _missing(_PLATFORMS[spec.platform]) or f"JAX runs on {there}; see JAX_PLATFORMS and the driver"
        raise UserError(f"mesh {spec.name}: needs {spec.size} devices of a {spec.platform.upper()}, and {why}")


def _join(spec: "MeshSpec", coordinator: str, num_processes: int, process_id: int) -> None:
    import jax

    mine = local_devices(spec, os.environ)
    try:
        if coordinator:
            jax.distributed.initialize(coordinator, num_processes or None, max(0, process_id), mine)
        else:
            jax.distributed.initialize(local_device_ids=mine)
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"mesh {spec.name}: has {spec.hosts} hosts and the others cannot be found ({e}); start one process a "
            "host under Slurm or on a TPU pod, or give --coordinator, --num_processes and --process_id"
        ) from e


def local_devices(spec: "MeshSpec", environment: Mapping[str, str]) -> list[int] | None:
    """The devices of this process: on GPUs all of its host's, unless there is one process per device.

    By default JAX gives a process under Slurm or Open MPI only the GPU of its local rank.

    Returns:
        Their indices; None for JAX's default.

    Raises:
        UserError: the number of processes matches neither hosts nor devices.
    """
    if spec.platform != "gpu" or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    started = environment.get("SLURM_NTASKS") or environment.get("OMPI_COMM_WORLD_SIZE")
    if started and int(started) == spec.size > spec.hosts:
        return None
    if started and int(started) != spec.hosts:
        raise UserError(
            f"mesh {spec.name}: {started} processes were started; it takes {spec.hosts}, one a host, or {spec.size}, "
            "one a device (--nodes and --ntasks-per-node of Slurm)"
        )
    return list(range(spec.size // spec.hosts))


def reserved(resources: Mapping[str, float], replicas: int) -> dict[str, Any]:
    """Resources that Ray Serve reserves for each replica: an accelerator, if the cluster has any.

    Args:
        resources: the cluster's, as returned by `ray.cluster_resources()`.
        replicas: number of replicas.

    Raises:
        UserError: there are fewer accelerators than replicas.
    """
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return {}
    for name, options in (("GPU", {"num_gpus": 1}), ("TPU", {"resources": {"TPU": 1}})):
        if there := int(resources.get(name, 0)):
            if there < replicas:
                raise UserError(
                    f"--replicas={replicas}: each takes a {name}, and the cluster has {there}; lower --replicas, or "
                    "raise --sessions of each"
                )
            return {"ray_actor_options": options}
    return {}
