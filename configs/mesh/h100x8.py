"""One host with eight H100s over NVLink, FSDP 8."""

from duplex_jax.parallel import H100, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=h100x8` means."""
    return MeshSpec("h100x8", H100, "gpu", fsdp=8, topology="1x1x8", target="h100", attention="cudnn")
