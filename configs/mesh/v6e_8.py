"""A v6e-8 slice: eight chips on one host, FSDP 8."""

from duplex_jax.parallel import V6E_PART, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v6e-8` means."""
    return MeshSpec("v6e-8", V6E_PART, "tpu", fsdp=8, topology="v6e:2x4", attention="splash")
