"""One host with eight A100s over NVLink, FSDP 8: full fine-tuning of the 2.4B model."""

from duplex_jax.parallel import A100, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=a100x8` means."""
    return MeshSpec("a100x8", A100, "gpu", fsdp=8, topology="1x1x8", target="a100", attention="cudnn")
