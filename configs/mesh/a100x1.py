"""One A100 with 80 GB: LoRA on the 2.4B model."""

from duplex_jax.parallel import A100, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=a100x1` means."""
    return MeshSpec("a100x1", A100, "gpu", topology="1x1x1", target="a100", attention="cudnn")
