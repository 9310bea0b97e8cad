"""The paper's machines: five hosts with eight A100s, FSDP 8 inside a host, data-parallel between hosts."""

from duplex_jax.parallel import A100, MeshSpec


def get_mesh() -> MeshSpec:
    """The mesh that `--mesh=a100x40` means."""
    return MeshSpec("a100x40", A100, "gpu", data=5, fsdp=8, hosts=5, topology="1x5x8", target="a100", attention="cudnn")
