"""A v5e-8 slice: eight chips, FSDP 8."""

from duplex_jax.parallel import V5E_PART, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v5e-8` means."""
    return MeshSpec("v5e-8", V5E_PART, "tpu", fsdp=8, topology="v5e:2x4", attention="splash")
