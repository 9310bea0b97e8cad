"""A v5e-16 slice: 16 chips on 4 hosts, FSDP 16."""

from duplex_jax.parallel import V5E_PART, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v5e-16` means."""
    return MeshSpec("v5e-16", V5E_PART, "tpu", fsdp=16, hosts=4, topology="v5e:4x4", attention="splash")
