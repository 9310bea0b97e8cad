"""A v5e-4 slice: four chips on one host, FSDP 4."""

from duplex_jax.parallel import V5E_PART, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v5e-4` means."""
    return MeshSpec("v5e-4", V5E_PART, "tpu", fsdp=4, topology="v5e:2x2", attention="splash")
