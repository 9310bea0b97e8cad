"""Two v5e-16 slices joined by the data-centre network: FSDP 16 in each, gradients summed between them."""

from duplex_jax.parallel import V5E_PART, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v5e-16x2` means."""
    return MeshSpec("v5e-16x2", V5E_PART, "tpu", slice=2, fsdp=16, hosts=8, topology="v5e:4x4", attention="splash")
