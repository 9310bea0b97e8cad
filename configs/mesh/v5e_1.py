"""One v5e chip: serving, and the small models."""

from duplex_jax.parallel import V5E, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=v5e-1` means."""
    return MeshSpec("v5e-1", V5E, "tpu", topology="v5e:1x1", attention="splash")
