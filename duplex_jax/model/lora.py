"""Low-rank updates beside frozen weights, and embedding rows of new tokens trained fully.

    y = x W + (alpha / rank) (x A) B        (Hu et al. 2021, "LoRA"; A normal, B zero at the start)

A trainable tree is `{"layers": {name: {"a": [L, in, r], "b": [L, r, out]}}, "rows": {"embed": [n, D]}}`; `combine`
puts it beside the frozen weights, where `model.minicpm` finds it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.model import minicpm
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import Params, Weight

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def declare(config: ModelConfig, rank: int, targets: Sequence[str], num_rows: int) -> dict[str, Any]:
    """Every weight that is trained, with its logical axes.

    Args:
        config: the model.
        rank: of the updates.
        targets: which weights of a layer get one.
        num_rows: n, tokens whose rows are trained.

    Raises:
        UserError: a target that no layer has, or a rank over the width of one.
    """
    layers = minicpm.declare(config)["layers"]
    tree: dict[str, Any] = {"layers": {}}
    for name in targets:
        if name not in TARGETS:
            raise UserError(f"lora.targets: no weight {name!r} in a layer; one of {', '.join(TARGETS)}")
        (L, fan_in, fan_out), (_, axis_in, axis_out) = layers[name].shape, layers[name].axes
        if rank > min(fan_in, fan_out):
            raise UserError(f"lora.rank={rank}: {name} is only {min(fan_in, fan_out)} wide; train it whole (rank 0)")
        tree["layers"][name] = {
            "a": Weight((L, fan_in, rank), ("layers", axis_in, "rank")),
            "b": Weight((L, rank, fan_out), ("layers", "rank", axis_out)),
        }
    if num_rows:
        tables = ["embed"] if config.tie_word_embeddings else ["embed", "head"]
        tree["rows"] = {table: Weight((num_rows, config.hidden_size), ("rank", "embed")) for table in tables}
    return tree


def init(
    config: ModelConfig, rank: int, targets: Sequence[str], params: Params, ids: Sequence[int], key: jax.Array
) -> Params:
    """The trainable tree at the start: it changes nothing yet."""
    tree: dict[str, Any] = {"layers": {}}
    for name, k in zip(targets, jax.random.split(key, len(targets)), strict=True):
        L, fan_in, fan_out = params["layers"][name].shape
        a = jax.random.normal(k, (L, fan_in, rank), jnp.float32) * fan_in**-0.5
        tree["layers"][name] = {"a": a, "b": jnp.zeros((L, rank, fan_out), jnp.float32)}
    if len(ids):
        tables = ["embed"] if config.tie_word_embeddings else ["embed", "head"]
        where = jnp.asarray(ids, jnp.int32)
        tree["rows"] = {table: params[table][where].astype(jnp.float32) for table in tables}
    return tree


def combine(frozen: Params, trainable: Params, scale: float, ids: Sequence[int]) -> Params:
    """The tree that `forward` takes: frozen weights with the updates beside them.

    Args:
        frozen: a whole model.
        trainable: from `init`.
        scale: `alpha / rank`.
        ids: tokens whose rows are in `trainable`.
    """
    updates = {n: {"a": w["a"], "b": w["b"] * scale} for n, w in trainable["layers"].items()}
    params = frozen | {"layers": frozen["layers"] | {"lora": updates}}
    if "rows" in trainable:
        params["rows"] = trainable["rows"] | {"ids": jnp.asarray(ids, jnp.int32)}
    return params


def merge(frozen: Params, trainable: Params, scale: float, ids: Sequence[int]) -> Params:
    """Plain weights that compute the same, as numpy arrays in the dtype of the frozen ones."""
    layers = dict(frozen["layers"])
    for name, w in trainable["layers"].items():
        a, b = np.asarray(w["a"], np.float32), np.asarray(w["b"], np.float32)
        merged = np.asarray(layers[name], np.float32) + scale * np.matmul(a, b)
        layers[name] = merged.astype(layers[name].dtype)
    params = frozen | {"layers": layers}
    for table, rows in trainable.get("rows", {}).items():
        whole = np.array(params[table])
        whole[np.asarray(ids)] = np.asarray(rows)
        params[table] = whole
    return params
