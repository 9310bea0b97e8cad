"""A v4-32 slice: 16 chips on 4 hosts, FSDP 16."""

from duplex_jax.parallel import V4, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v4-32` means."""
    return MeshSpec("v4-32", V4, "tpu", fsdp=16, hosts=4, topology="v4:2x2x4", attention="splash")
