"""Plans, rows and plain reference losses for the training tests."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax import parallel
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.tree import from_tree
from duplex_jax.train import config as configs
from duplex_jax.train import step as steps

SHAPE = ModelConfig(
    vocab_size=301, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    scale_emb=4.0, scale_depth=1.4, dim_model_base=16.0, vocab_multiple=8, initializer_range=0.1,
)  # fmt: skip
ROW_IDS = (3, 7)


def plan(
    mesh: str = "cpu1", shape: ModelConfig = SHAPE, axes: dict[str, int] | None = None, **settings: Any
) -> steps.Plan:
    """A plan over `mesh`, with dotted settings as `data__batch=4`."""
    config = configs.Config(
        "test", model=configs.Model(shape=shape, vocab_multiple=8), data=configs.Data(length=64, batch=8),
        optim=configs.Optim(steps=50, lr=1e-2, warmup=2, decay_steps=10),
        compute=configs.Compute(loss_chunk=48),
    )  # fmt: skip
    config = configs.override(config, [(k.replace("__", "."), str(v)) for k, v in settings.items()])
    spec = parallel.resize(parallel.load_mesh_spec(mesh), **(axes or {}))
    config = configs.fit_batch(configs.check(config), spec)
    rows = ROW_IDS if config.lora.rank else ()
    return steps.Plan(config, shape, parallel.make_mesh(spec), spec, rows, idle_id=5)


def rows(plan: steps.Plan, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows of several documents with uneven weights and some padding, `[A, B, T]`."""
    rng = np.random.default_rng(seed)
    A, B, T = plan.batch_shape
    n = A * B
    segments, positions = np.zeros((n, T), np.int32), np.zeros((n, T), np.int32)
    for row in range(n):
        cuts = np.sort(rng.choice(np.arange(4, T - 2), 3, replace=False))
        for i, (a, b) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), 1):
            segments[row, a:b], positions[row, a:b] = i, np.arange(b - a)
    weights = rng.choice([0.0, 1.0, 0.3], (n, T)).astype(np.float32) * (segments > 0)
    weights[: n // 2, : T // 2] = 0  # micro-batches of very different weight
    tokens = rng.integers(0, plan.model.vocab_size, (n, T)).astype(np.int32)
    tokens[rng.random((n, T)) < 0.1] = ROW_IDS[0]
    flat = {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_weights": weights}
    return {k: v.reshape(A, B, T) for k, v in flat.items()}


def put(plan: steps.Plan, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the plan's mesh."""
    return {k: jax.device_put(v.reshape(plan.batch_shape), plan.batch_sharding) for k, v in batch.items()}


def unpacked_loss(config: ModelConfig, params: Any, batch: dict[str, np.ndarray]) -> jax.Array:
    """The same loss with every document in a row of its own, plain causal attention, and whole logits."""
    flat = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()}
    tokens, weights = [], []
    for row, segments in enumerate(flat["segment_ids"]):
        for segment in range(1, int(segments.max()) + 1):
            inside = np.flatnonzero(segments == segment)
            pad = (0, segments.shape[0] - len(inside))
            tokens.append(np.pad(flat["tokens"][row][inside], pad))
            weights.append(np.pad(flat["loss_weights"][row][inside], pad))
    tokens, weights = np.stack(tokens), np.stack(weights)
    logits = from_tree(config, params)(jnp.asarray(tokens))
    logp = jax.nn.log_softmax(logits[:, :-1, : config.vocab_size])
    nll = -jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(nll * weights[:, 1:]) / weights[:, 1:].sum()


def run(plan: steps.Plan, n: int = 3) -> tuple[list[float], Any]:
    """Losses of n steps from fresh weights, and what was trained."""
    state, frozen = steps.init_state(plan, None)
    losses = []
    with jax.set_mesh(plan.mesh):
        step = steps.jitted_step(plan)
        for i in range(n):
            state, out = step(state, frozen, put(plan, rows(plan, i)))
            losses.append(float(out["loss"]))
    return losses, jax.device_get(state["params"])


def largest_difference(a: Any, b: Any) -> float:
    """Over all leaves, relative to the largest value of each leaf."""
    return max(
        float(np.abs(x - y).max() / (np.abs(y).max() + 1e-9))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def with_shape(**changes: Any) -> ModelConfig:
    """`SHAPE` with some fields changed."""
    return dataclasses.replace(SHAPE, **changes)
