"""Eight emulated CPU devices in one process, FSDP 4 x TP 2, for trying a layout without the hardware."""

from duplex_jax.parallel import CPU, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=cpu8` means."""
    return MeshSpec("cpu8", CPU, "cpu", fsdp=4, tensor=2)
