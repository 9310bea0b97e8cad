"""A v5p-64 slice: 32 chips on 8 hosts (a v5p name counts cores, two per chip), FSDP 32."""

from duplex_jax.parallel import V5P, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v5p-64` means."""
    return MeshSpec("v5p-64", V5P, "tpu", fsdp=32, hosts=8, topology="v5p:2x4x4", attention="splash")
