"""A whole v5e-256 pod: 256 chips on 64 hosts, FSDP 64 x data 4."""

from duplex_jax.parallel import V5E, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v5e-256` means."""
    return MeshSpec("v5e-256", V5E, "tpu", data=4, fsdp=64, hosts=64, topology="v5e:16x16", attention="splash")
