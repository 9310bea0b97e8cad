"""The CPU's own kernels against XLA's products and attention, and entries and weights in fewer bits."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax import native
from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.decode.backends import cpu, xla
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.model.config import STORES
from duplex_jax.model.tree import from_tree
from tests.tiny import CONFIG, FreshForward, tiny_model

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C++ compiler for the CPU's own kernels")
BOTH = [pytest.param(True, marks=needs_kernels, id="kernels"), pytest.param(False, id="xla")]


def shaped(heads: int, kv_heads: int, head_dim: int, mlp: int, hidden: int = 40, tied: bool = False) -> LoadedModel:
    """A tiny model of other sizes."""
    config = dataclasses.replace(
        CONFIG, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=hidden, intermediate_size=mlp,
        initializer_range=0.2,
    )  # fmt: skip
    model = tiny_model(config=config)
    if not tied:
        return model
    params = {name: w for name, w in model.params.items() if name != "head"}
    config = dataclasses.replace(config, tie_word_embeddings=True)
    return dataclasses.replace(model, model=from_tree(config, params))


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "mlp", "tied"),
    [(3, 1, 64, 100, True), (4, 4, 16, 33, False), (6, 2, 40, 64, False), (2, 2, 128, 96, True)],
)
def test_logits_are_those_of_a_fresh_forward_pass(heads: int, kv_heads: int, head_dim: int, mlp: int, tied: bool):
    """Contexts of many lengths, encoded at once, in chunks, token by token, and after a cut."""
    of = shaped(heads, kv_heads, head_dim, mlp, tied=tied)
    engine = Engine(of.model, of.template, rows=2, capacity=700, kernels=True)
    fresh = FreshForward(of)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, 620).tolist()
    row = engine.open()
    engine.open(ids[:5])
    for length in (1, 65, 300, 301, 620, 256):
        engine.truncate(row, min(length, len(row.ids)), ids[len(row.ids) : length])
        want = fresh(row.ids)
        np.testing.assert_allclose(engine.logits(row)[:262], want[:262], atol=3e-4 * np.abs(want[:262]).max())


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize(("weights", "entries"), [("bfloat16", "bfloat16"), ("int8", "int8")])
def test_fewer_bits_are_near(kernels: bool, weights: str, entries: str):
    """Rows of several lengths step together; logits stay within what the bits allow of the float32 forward pass."""
    of = shaped(3, 1, 64, 100, hidden=64)
    engine = Engine(of.model, of.template, rows=3, capacity=400, weights=weights, entries=entries, kernels=kernels)
    rng = np.random.default_rng(1)
    rows = [engine.open(sampling=Sampling(0)) for _ in range(3)]
    for row, n in zip(rows, (3, 150, 300), strict=True):
        engine.append(row, rng.integers(0, 256, n).tolist())
    engine.advance({row: Request([7] * (1 + 5 * i), allow_idle=False) for i, row in enumerate(rows)})
    fresh = FreshForward(of)
    for row in rows:
        want, got = fresh(row.ids)[:256], engine.logits(row)[:256]
        apart = np.abs(got - want).max() / np.abs(want - want.mean()).max()
        assert 0 < apart < 0.06, (len(row.ids), apart)
    k, v = engine.read(rows[1])
    engine.close(rows[0])
    row = engine.open()  # what left and came back is the same
    engine.write(row, rows[1].ids, (k, v))
    np.testing.assert_allclose(engine.logits(row), engine.logits(rows[1]), atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 8, 3), (5, 33, 64), (7, 64, 100), (40, 70, 129)])
def test_panels_multiply_and_give_columns(store: str, rows: int, depth: int, width: int):
    rng = np.random.default_rng(rows)
    weight, x = rng.standard_normal((depth, width), np.float32), rng.standard_normal((rows, depth), np.float32)
    plain, table = xla.StoredLinear(weight, store), xla.StoredEmbedding(weight.T, store)
    panels = cpu.panels([weight[:, :2], weight[:, 2:]], store)
    index = jnp.array([0, width - 1, 2])
    stored = np.asarray(table(jnp.arange(width), jnp.float32)).T
    bound = {"float32": 0, "bfloat16": np.abs(weight) * 2**-8, "int8": np.abs(weight).max(0) / 253}[store]
    assert (np.abs(stored - weight) <= bound).all()
    np.testing.assert_array_equal(cpu.columns(panels, index), stored[:, np.asarray(index)].T)
    for product in (plain, table.scores, lambda x: jax.jit(cpu.matmul, static_argnums=2)(x, panels, width)):
        np.testing.assert_allclose(product(x), x @ stored, atol=1e-5 * depth)


@needs_kernels
@pytest.mark.parametrize("held", [2, 900, 2100])
def test_a_row_gives_the_same_beside_others(held: int):
    """Bit for bit, whoever is computed in the same call, however much it holds."""
    of = shaped(3, 1, 64, 100)
    engine = Engine(of.model, of.template, rows=16, capacity=held + 400, kernels=True)
    rng = np.random.default_rng(2)
    begin = rng.integers(0, 256, held).tolist()
    slices = [rng.integers(0, 256, rng.integers(1, 16)).tolist() for _ in range(12)]

    def lead(beside: int) -> list[list[int]]:
        others = [engine.open([1, 2, 3], seed=i) for i in range(beside)]
        row = engine.open([5, 6], Sampling(1.5, 1.0), seed=3)
        engine.append(row, begin)
        said = []
        for n, user in enumerate(slices):
            live = rng.permutation(len(others))[: rng.integers(0, len(others) + 1)]
            requests = {others[i]: Request([9] * (1 + (n + i) % 9)) for i in live}
            said.append(engine.advance(requests | {row: Request(user, allow_idle=False)})[row])
        logits.append(engine.logits(row))
        for other in [row, *others]:
            engine.close(other)
        return said

    logits: list[np.ndarray] = []
    assert lead(0) == lead(15)
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("kernels", BOTH)
def test_scores_are_the_logits_behind_each_id(kernels: bool):
    of = tiny_model()
    engine = Engine(of.model, of.template, rows=2, capacity=256, kernels=kernels)
    ids = np.random.default_rng(3).integers(0, 256, 150).tolist()
    row, fresh = engine.open(ids[:20]), FreshForward(of)
    found = np.concatenate(list(engine.score(row, ids[20:])))
    assert (row.ids, row.cached, len(found)) == (ids, 150, 130)
    for i in (0, 63, 64, 129):
        np.testing.assert_allclose(found[i][:262], fresh(ids[: 21 + i])[:262], atol=2e-3)
    with pytest.raises(UserError, match="exceeds the capacity of 256"):
        next(engine.score(row, [1] * 107))


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"DUPLEX_JAX_CACHE": str(tmp_path / "cache")}


def build(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = "from duplex_jax import native; print(native.available())"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@needs_kernels
def test_compiled_once_and_kept(shell: dict[str, str]):
    # As `CXX` is written for make: a command, which may have several words.
    shell |= {"CXX": f"env {shutil.which('g++') or shutil.which('clang++')}"}
    assert build(shell).stdout == "True\n"
    (library,) = Path(shell["DUPLEX_JAX_CACHE"]).glob("native-*.so")
    made = library.stat().st_mtime_ns
    assert build(shell).stdout == "True\n"
    assert library.stat().st_mtime_ns == made
    assert sorted(library.parent.iterdir()) == [library.with_suffix(".sha256"), library]


def test_without_a_compiler_there_are_none(shell: dict[str, str]):
    found = build(shell | {"CXX": "/nowhere/c++"})
    assert found.stdout == "False\n"
    assert found.stderr.count("no native kernels") == 1
    assert build(shell | {"DUPLEX_JAX_NATIVE": "off"}).stderr == ""
    assert "must be on or off" in build(shell | {"DUPLEX_JAX_NATIVE": "perhaps"}).stderr
    assert "UserError: DUPLEX_JAX_NATIVE=on" in build(shell | {"CXX": "/nowhere/c++", "DUPLEX_JAX_NATIVE": "on"}).stderr


def test_what_cannot_be_stored_is_refused():
    of = tiny_model()
    with pytest.raises(UserError, match="weights 'int4' cannot be stored"):
        Engine(of.model, of.template, capacity=256, weights="int4")
    with pytest.raises(UserError, match="entries 'float8' cannot be stored"):
        Engine(of.model, of.template, capacity=256, entries="float8")
