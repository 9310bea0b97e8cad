"""One v6e chip: serving, LoRA on the 2.4B model."""

from duplex_jax.parallel import V6E, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v6e-1` means."""
    return MeshSpec("v6e-1", V6E, "tpu", topology="v6e:1x1", attention="splash")
