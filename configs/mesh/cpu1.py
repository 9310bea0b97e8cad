"""One CPU, for laptops, tests and SmolLM2-135M."""

from duplex_jax.parallel import CPU, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=cpu1` means."""
    return MeshSpec("cpu1", CPU, "cpu")
