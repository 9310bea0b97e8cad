"""One H100: LoRA on the 2.4B model, and serving."""

from duplex_jax.parallel import H100, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=h100x1` means."""
    return MeshSpec("h100x1", H100, "gpu", topology="1x1x1", target="h100", attention="cudnn")
