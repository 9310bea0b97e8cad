"""A v6e-64 slice: 64 chips on 16 hosts, FSDP 64."""

from duplex_jax.parallel import V6E_PART, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v6e-64` means."""
    return MeshSpec("v6e-64", V6E_PART, "tpu", fsdp=64, hosts=16, topology="v6e:8x8", attention="splash")
