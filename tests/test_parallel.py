"""Eight pretended devices, however they are arranged, compute what one computes; and the table of axes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from duplex_jax import parallel
from duplex_jax.errors import UserError
from duplex_jax.model import minicpm
from tests.train import plans

REPOSITORY = Path(__file__).parents[1]

EIGHT = """
import json, sys
from duplex_jax import parallel
from tests.train import plans

rank = int(sys.argv[1])
one, weights = plans.run(plans.plan(lora__rank=rank, trouble__spike=9))
out = {}
for axes in json.loads(sys.argv[2]):
    spec = parallel.MeshSpec("test", parallel.CPU, "cpu", **axes)
    parallel.load_mesh_spec = lambda name: spec
    losses, trained = plans.run(plans.plan("test", lora__rank=rank, data__micro_batches=0))
    loss = max(abs(a - b) / b for a, b in zip(losses, one))
    out[json.dumps(axes)] = [loss, plans.largest_difference(trained, weights)]
print(json.dumps(out))
"""


LAYOUTS = [{"fsdp": 4, "tensor": 2}, {"slice": 2, "data": 2, "fsdp": 2}, {"fsdp": 8}, {"data": 4, "tensor": 2}]


@pytest.mark.parametrize(
    ("rank", "layouts"),
    [
        (0, LAYOUTS[:2]),
        pytest.param(0, LAYOUTS[2:], marks=pytest.mark.slow),
        pytest.param(4, LAYOUTS, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_are_one(rank: int, layouts: list[dict[str, int]]):
    result = subprocess.run(
        [sys.executable, "-c", EIGHT, str(rank), json.dumps(layouts)], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    differences = json.loads(result.stdout.splitlines()[-1])
    assert len(differences) == len(layouts)
    for layout, (loss, weights) in differences.items():
        assert loss < 1e-5, layout
        assert weights < 2e-2, layout  # Adam's first steps divide by tiny second moments


def test_nothing_whole_on_one_device():
    """Every weight but norms is cut along both fsdp and tensor."""
    mesh = jax.sharding.AbstractMesh((1, 1, 8, 2), parallel.AXES)
    for path, weight in nnx.to_flat_state(nnx.state(minicpm.abstract(plans.SHAPE))):
        names = weight.out_sharding
        spec = jax.sharding.NamedSharding(mesh, parallel.partition(names)).spec
        assert {a for a in spec if a} == (set() if names[-1] == "norm" else {"fsdp", "tensor"}), path


def test_meshes_that_do_not_divide():
    spec = parallel.load_mesh_spec("cpu8")
    heads36 = plans.with_shape(num_heads=36, num_kv_heads=36)
    with pytest.raises(UserError, match="36 heads are not divisible by tensor=8; tensor may be 1, 2, 3, 4, 6, 12"):
        parallel.check_model(dataclasses.replace(spec, fsdp=1, tensor=8), heads36)
    with pytest.raises(UserError, match="hidden size 32 is not divisible by fsdp=5"):
        parallel.check_model(dataclasses.replace(spec, fsdp=5, tensor=1), plans.SHAPE)
    with pytest.raises(UserError, match="vocab_multiple=2 pads them"):
        parallel.check_model(dataclasses.replace(spec, tensor=2), plans.with_shape(vocab_multiple=1))
    with pytest.raises(UserError, match="needs 8 devices, but there are 1"):
        parallel.make_mesh(spec, jax.devices()[:1])
    with pytest.raises(UserError, match="are not divisible by 3 micro-batch"):
        parallel.check_batch(spec, 8, 3)


def test_a_mesh_from_a_file(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from duplex_jax.parallel import *\n\ndef get_mesh():\n    return MeshSpec('x', CPU, 'cpu', data=2)\n"
    )
    assert parallel.load_mesh_spec(str(file)).data == 2
    with pytest.raises(UserError, match="no such file"):
        parallel.load_mesh_spec(str(tmp_path / "other.py"))


def test_places_of_a_process():
    spec = parallel.load_mesh_spec("cpu1")
    sharding = parallel.sharding(parallel.make_mesh(spec), ("batch", "length"))
    assert parallel.local_places(sharding, (6, 4)) == list(range(6))
