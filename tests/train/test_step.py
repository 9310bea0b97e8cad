"""A step against plain references: unpacked documents, one batch, whole logits, optax on its own."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duplex_jax.data import dataset, loader
from duplex_jax.model import lora
from duplex_jax.model.layers import lookup
from duplex_jax.model.tree import from_tree
from duplex_jax.train import loss as losses
from duplex_jax.train import step as steps
from tests import made_timelines
from tests.tiny import fresh_tree
from tests.train import plans


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_packed_is_unpacked(tied: bool, remat: str):
    shape = plans.with_shape(tie_word_embeddings=tied)
    plan = plans.plan(shape=shape, data__batch=2, compute__remat=remat)
    params = fresh_tree(shape, 1)
    batch = plans.rows(plan)
    loss, _, grads = jax.jit(functools.partial(steps.gradients, plan))(params, {}, batch)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(lambda p: plans.unpacked_loss(shape, p, batch)))(params)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert plans.largest_difference(grads, wanted_grads) < 2e-4


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_attention_is_computed_again_in_full_remat_alone(backend: str, remat: str, times: int):
    """Counted in the program of a step for TPUs or GPUs: Mosaic's kernels, cuDNN's calls."""
    plan = plans.plan(
        data__length=128, compute__remat=remat, compute__attention=backend, compute__dtype="bfloat16",
        data__micro_batches=1,
    )  # fmt: skip
    operands = steps.abstract_state(plan), {}, steps.abstract_batch(plan)
    platform, forward = {"splash": ("tpu", "splash_mha_fwd"), "cudnn": ("cuda", "ScaleBiasSoftmax(")}[backend]
    text = steps.jitted_step(plan).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(forward) == times


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_are_one_batch(rank: int):
    whole = plans.plan(lora__rank=rank)
    batch = plans.rows(whole)
    state, frozen = steps.init_state(whole, None)
    weights = [float(losses.targets_and_weights({k: v[0, i : i + 2] for k, v in batch.items()})[1].sum())
               for i in range(0, 8, 2)]  # fmt: skip
    assert max(weights) > 2 * min(weights)
    results = []
    for parts in (1, 2, 4, 8):
        plan = plans.plan(lora__rank=rank, data__micro_batches=parts)
        cut = {k: v.reshape(plan.batch_shape) for k, v in batch.items()}
        results.append(jax.jit(functools.partial(steps.gradients, plan))(state["params"], frozen, cut))
    for loss, total, grads in results[1:]:
        assert float(loss) == pytest.approx(float(results[0][0]), rel=1e-6)
        assert float(total) == pytest.approx(float(results[0][1]))
        assert plans.largest_difference(grads, results[0][2]) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("weighted", ["some", "none", "all"])
def test_chunks_of_the_loss(chunk: int, weighted: str):
    config = plans.SHAPE
    params = jax.tree.map(jnp.asarray, fresh_tree(config, 0))
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (2, 19, config.hidden_size))
    targets = jax.random.randint(keys[1], (2, 19), 0, config.vocab_size)
    weights = {"some": jax.random.bernoulli(keys[2], 0.4, (2, 19)) * 0.7, "none": jnp.zeros((2, 19)),
               "all": jnp.ones((2, 19))}[weighted]  # fmt: skip

    def plain(hidden, table):
        logits = (hidden @ table.T)[..., : config.vocab_size]
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum(nll * weights)

    def ours(hidden, table):
        zero = losses.zero_sums(1, 1, *table.shape, rows=None, frozen=False)
        d_hidden, sums = losses.cross_entropy(config, table, (), hidden, targets, weights, zero, chunk)
        return sums.loss[0], (d_hidden, sums.head[0])

    got, wanted = ours(hidden, params["embed"]), jax.value_and_grad(plain, (0, 1))(hidden, params["embed"])
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    for a, b in zip(got[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(ours)(hidden, params["embed"])[0], wanted[0], rtol=1e-5)


def test_the_target_at_a_boundary_counts_for_nothing():
    batch = {
        "tokens": np.array([[1, 2, 3, 4, 5, 6]]), "segment_ids": np.array([[1, 1, 2, 2, 0, 0]]),
        "loss_weights": np.ones((1, 6), np.float32),
    }  # fmt: skip
    targets, weights = losses.targets_and_weights(batch)
    assert targets[0].tolist() == [2, 3, 4, 5, 6, 0]
    assert weights[0].tolist() == [1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lora_beside_the_weights_is_lora_merged(tied: bool):
    shape = plans.with_shape(tie_word_embeddings=tied)
    plan = plans.plan(shape=shape, lora__rank=4, lora__alpha=6)
    state, frozen = steps.init_state(plan, None)
    # Away from the start, where the updates are zero.
    trained = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), state["params"])
    batch = plans.rows(plan)
    loss, total, grads = jax.jit(functools.partial(steps.gradients, plan))(trained, frozen, batch)
    merged = lora.merge(jax.device_get(frozen), jax.device_get(trained), plan.scale, plans.ROW_IDS)
    full = plans.plan(shape=shape)
    wanted, _, whole = jax.jit(functools.partial(steps.gradients, full))(merged, {}, batch)
    grads, whole = jax.tree.map(lambda x: x * total, (grads, whole))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    # The chain rule by hand: d loss / dB = scale * A^T dW, and a trained row's gradient is its row of the table's.
    a, scale = trained["layers"]["gate"]["a"], plan.scale
    np.testing.assert_allclose(
        grads["layers"]["gate"]["b"], scale * jnp.einsum("lir,lio->lro", a, whole["layers"]["gate"]), rtol=1e-3,
        atol=1e-3,
    )  # fmt: skip
    for table, rows in grads["rows"].items():
        np.testing.assert_allclose(rows, whole[table][np.array(plans.ROW_IDS)], rtol=1e-3, atol=1e-3)


def test_lora_starts_where_the_model_is():
    plan = plans.plan(lora__rank=4)
    state, frozen = steps.init_state(plan, None)
    merged = lora.merge(jax.device_get(frozen), jax.device_get(state["params"]), plan.scale, plans.ROW_IDS)
    assert plans.largest_difference(merged, jax.device_get(frozen)) == 0


def test_a_step_is_optax_adamw():
    plan = plans.plan(optim__weight_decay=0.3, optim__clip=0.5)
    o = plan.config.optim
    state, _ = steps.init_state(plan, None)
    params = state["params"]
    decays = {
        "embed": True, "final_norm": False,
        "layers": {k: "norm" not in k for k in params["layers"]},
    }  # fmt: skip
    tx = optax.chain(
        optax.clip_by_global_norm(o.clip),
        optax.adamw(lambda t: o.lr * (t + 1) / 2, o.beta1, o.beta2, o.eps, weight_decay=o.weight_decay, mask=decays),
    )
    opt, wanted = tx.init(params), params
    params = jax.tree.map(jnp.copy, params)
    step, gradients = steps.jitted_step(plan), jax.jit(functools.partial(steps.gradients, plan))
    with jax.set_mesh(plan.mesh):
        for i in range(2):
            batch = plans.rows(plan, i)
            _, _, grads = gradients(wanted, {}, batch)
            updates, opt = tx.update(grads, opt, wanted)
            wanted = optax.apply_updates(wanted, updates)
            state, out = step(state | {"params": params} if i == 0 else state, {}, plans.put(plan, batch))
    assert plans.largest_difference(state["params"], wanted) < 1e-4
    assert int(state["step"]) == 2
    assert float(out["lr"]) == pytest.approx(o.lr)


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_a_bad_step_leaves_the_weights(kind: str):
    plan = plans.plan(trouble__spike=3.0)
    state, _ = steps.init_state(plan, None)
    with jax.set_mesh(plan.mesh):
        step = steps.jitted_step(plan)
        state, out = step(state, {}, plans.put(plan, plans.rows(plan)))
        assert bool(out["finite"])
        assert not bool(out["spike"])
        before = jax.device_get(state)
        batch = plans.rows(plan)
        if kind == "nan":
            batch["loss_weights"][0, 5, 30] = np.nan
        else:
            state["mean_loss"] = state["mean_loss"] / 100
        state, out = step(state, {}, plans.put(plan, batch))
    assert bool(out["finite"]) == (kind == "spike")
    assert bool(out["spike"]) == (kind == "spike")
    after = jax.device_get(state)
    for name in ("params", "opt"):
        assert plans.largest_difference(after[name], before[name]) == 0
    assert after["step"] == before["step"] + 1


def test_bfloat16_keeps_float32_masters():
    plan = plans.plan(compute__dtype="bfloat16", data__micro_batches=2)
    exact, _ = plans.run(plans.plan(), 4)
    rough, params = plans.run(plan, 4)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    np.testing.assert_allclose(rough, exact, rtol=2e-2)
    assert rough[0] != exact[0]


def test_bfloat16_gradients_of_packed_rows(tmp_path: Path):
    """Half of all tokens are a few control tokens, whose rows sum thousands of terms: within 1% of float32."""
    data, _ = made_timelines.write(tmp_path, n=120)
    source = dataset.open_rows(data, made_timelines.template(), 1024)
    read = loader.training_batches(
        [source], (1.0,), seed=0, size=4, places=range(4), start=0, idle_weight=1.0, workers=0
    )
    rows = next(read).arrays
    shape = plans.with_shape(vocab_size=made_timelines.template().tokenizer.vocab_size, hidden_size=64, head_dim=16)
    results = {}
    for dtype in ("float32", "bfloat16"):
        plan = plans.plan(shape=shape, compute__dtype=dtype, data__length=1024, data__batch=4)
        batch = {k: np.reshape(rows[k], plan.batch_shape) for k in plans.rows(plan)}
        results[dtype] = jax.jit(functools.partial(steps.gradients, plan))(fresh_tree(shape, 1), {}, batch)[2]

    def error(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    exact, rough = results["float32"], results["bfloat16"]
    assert max(jax.tree.leaves(jax.tree.map(error, rough, exact))) < 0.015
    ids, counts = np.unique(rows["tokens"], return_counts=True)
    common = ids[np.argsort(-counts)[:6]]
    assert counts.max() > 400
    assert max(error(rough["embed"][i], exact["embed"][i]) for i in common) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lookup_s_gradient_is_a_sum_in_float32(dtype: str):
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((4, 500)) < 0.5, rng.integers(0, 3, (4, 500)), rng.integers(0, 40, (4, 500)))
    dy = jnp.asarray(rng.normal(1.0, 1.0, (4, 500, 8)), dtype)
    rows, back = jax.vjp(lambda table: lookup(table, tokens, jnp.dtype(dtype)), jnp.asarray(rng.normal(size=(41, 8))))
    assert rows.dtype == dtype
    wanted = np.zeros((41, 8))
    np.add.at(wanted, tokens, np.asarray(dy, np.float64))
    np.testing.assert_allclose(back(dy)[0], wanted, rtol=1e-5, atol=1e-4)


def test_evaluation_counts_by_category():
    plan = plans.plan(data__batch=4)
    batch = {k: v[0] for k, v in plans.rows(plan).items()}
    batch["categories"] = np.where(batch["segment_ids"] > 0, batch["segment_ids"] % 2, -1).astype(np.int32)
    batch["decisions"] = (batch["segment_ids"] > 0) & (batch["positions"] % 5 == 2)
    batch["tokens"][batch["decisions"] & (batch["positions"] % 2 == 0)] = plan.idle_id
    params = fresh_tree(plan.model, 2)
    out = jax.device_get(jax.jit(functools.partial(steps.eval_step, plan, 2))(params, {}, batch))
    targets, weights = losses.targets_and_weights(batch)

    @jax.jit
    def log_probabilities(params):
        model = from_tree(plan.model, params)
        return jax.nn.log_softmax(model(batch["tokens"], batch["positions"], batch["segment_ids"]))

    logp, targets, weights = (np.asarray(x) for x in (log_probabilities(params), targets, weights))
    for category in (0, 1):
        nll = right = said = wanted = decisions = weight = 0.0
        for b, t in zip(*np.nonzero(batch["categories"] == category), strict=True):
            nll -= float(weights[b, t] * logp[b, t, targets[b, t]])
            weight += float(weights[b, t])
            if t + 1 < 64 and batch["decisions"][b, t + 1]:
                is_idle = batch["tokens"][b, t + 1] == plan.idle_id
                says = int(logp[b, t].argmax()) == plan.idle_id
                decisions, wanted, said, right = (
                    decisions + 1,
                    wanted + is_idle,
                    said + says,
                    right + (says and is_idle),
                )
        got = {k: float(v[category]) for k, v in out.items()}
        assert got["loss"] == pytest.approx(nll, rel=1e-4)
        assert got["weight"] == pytest.approx(weight, rel=1e-5)
        assert (got["decisions"], got["idle_wanted"], got["idle_said"], got["idle_right"]) == (
            decisions, wanted, said, right,
        )  # fmt: skip
        assert decisions > 0
