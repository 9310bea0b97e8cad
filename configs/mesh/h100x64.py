"""Eight hosts with eight H100s each, FSDP 8 inside a host, data-parallel between hosts."""

from duplex_jax.parallel import H100, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=h100x64` means."""
    return MeshSpec("h100x64", H100, "gpu", data=8, fsdp=8, hosts=8, topology="1x8x8", target="h100", attention="cudnn")
