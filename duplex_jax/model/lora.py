"""LoRA: low-rank updates of frozen weights, plus fully trained embedding rows of new tokens.

    y = x W + (alpha / rank) (x A) B        (Hu et al. 2021, "LoRA"; A normal, B zero at the start)

Updates are `nnx.LoRAParam`s of the layers that they modify. As a tree of their own they are
`{"layers": {name: {"a": [L, in, r], "b": [L, r, out]}}, "rows": {"embed": [n, D]}}`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from duplex_jax.errors import UserError
from duplex_jax.model.layers import Block, Embedding, parameter
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.model.tree import Params

_PARTS = {"q": "attention", "k": "attention", "v": "attention", "o": "attention",
          "gate": "mlp", "up": "mlp", "down": "mlp"}  # fmt: skip
TARGETS = tuple(_PARTS)


def add(
    model: MiniCPM, rank: int, alpha: float, targets: Sequence[str], row_ids: Sequence[int], key: jax.Array
) -> MiniCPM:
    """Attaches updates to a model with stacked layers; B starts at zero, so the output does not change yet.

    Args:
        model: the model, changed in place.
        rank: r, the rank of the updates.
        alpha: updates are scaled by `alpha / r`.
        targets: names of the weights in a layer that get an update.
        row_ids: tokens whose embedding rows (and head rows) are trained.
        key: random key for the initial A.

    Raises:
        UserError: no layer has one of the targets, or the rank exceeds a target's width.
    """
    assert isinstance(model.layers, Block)
    for name in targets:
        if name not in TARGETS:
            raise UserError(f"lora.targets: no weight {name!r} in a layer; one of {', '.join(TARGETS)}")
    for name, k in zip(targets, jax.random.split(key, len(targets)), strict=True):
        linear = getattr(getattr(model.layers, _PARTS[name]), name)
        (L, fan_in, fan_out), (layers, axis_in, axis_out) = linear.weight.shape, linear.weight.out_sharding
        if rank > min(fan_in, fan_out):
            raise UserError(f"lora.rank={rank}: {name} is only {min(fan_in, fan_out)} wide; train it whole (rank 0)")
        a = jax.random.normal(k, (L, fan_in, rank)) * fan_in**-0.5
        linear.lora_a = parameter(a, layers, axis_in, "rank", kind=nnx.LoRAParam)
        linear.lora_b = parameter(jnp.zeros((L, rank, fan_out)), layers, "rank", axis_out, kind=nnx.LoRAParam)
        linear.lora_scale = alpha / rank
    for table in (model.embed, model.head):
        if len(row_ids) and isinstance(table, Embedding):
            table.row_ids = tuple(row_ids)
            rows = table.weight[jnp.asarray(row_ids, jnp.int32)].astype(jnp.float32)
            table.rows = parameter(rows, "rank", "embed", kind=nnx.LoRAParam)
    return model


def merge(frozen: Params, trained: Params, scale: float, ids: Sequence[int]) -> Params:
    """Plain weights equivalent to frozen ones plus updates, as numpy arrays in the frozen weights' dtype."""
    layers = dict(frozen["layers"])
    for name, w in trained["layers"].items():
        a, b = np.asarray(w["a"], np.float32), np.asarray(w["b"], np.float32)
        merged = np.asarray(layers[name], np.float32) + scale * np.matmul(a, b)
        layers[name] = merged.astype(layers[name].dtype)
    params = frozen | {"layers": layers}
    for table, rows in trained.get("rows", {}).items():
        whole = np.array(params[table])
        whole[np.asarray(ids)] = np.asarray(rows)
        params[table] = whole
    return params
