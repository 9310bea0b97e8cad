"""A model's weights as a plain tree with short names, for files, optimisers and jitted functions.

    {"embed": [V, D], "layers": {"attn_norm": [L, D], "q": [L, D, N H], ..., "down": [L, F, D]}, "final_norm": [D]}

plus `head` where it is not tied to the embedding. LoRA weights are a separate tree,
`{"layers": {name: {"a": [L, in, r], "b": [L, r, out]}}, "rows": {"embed": [n, D]}}`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from duplex_jax.model import minicpm
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import MiniCPM

Params = dict[str, Any]


@functools.cache
def _shapes(config: ModelConfig) -> Params:
    return to_tree(minicpm.abstract(config))


def shapes(config: ModelConfig) -> Params:
    """The tree as float32 `jax.ShapeDtypeStruct`s; allocates nothing."""
    return jax.tree.map(lambda x: x, _shapes(config))


def short_name(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Converts a parameter's path in the module to its path in the tree."""
    if path[-1] == "rows":
        return "rows", path[0]
    return tuple(str(name).removeprefix("lora_") for name in path if name not in ("attention", "mlp", "weight"))


def to_tree(
    model: MiniCPM, of: Callable[[nnx.Variable], Any] = nnx.Variable.get_raw_value, kind: Any = nnx.Param
) -> Params:
    """The tree of a model with stacked layers.

    Args:
        model: the model.
        of: computes a leaf from a parameter; its value by default.
        kind: filter that selects parameters: all by default, or a subset such as `nnx.LoRAParam`.
    """
    tree: Params = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, kind)):
        short, node = short_name(path), tree
        for parent in short[:-1]:
            node = node.setdefault(parent, {})
        node[short[-1]] = of(variable)
    return tree


def with_weights(model: MiniCPM, tree: Mapping[str, Any], kind: Any = nnx.Param) -> MiniCPM:
    """The model with the parameters of this kind replaced by the tree's weights."""
    graphdef, state, rest = nnx.split(model, kind, ...)  # type: ignore[misc]
    flat = {path: variable.replace(get(tree, short_name(path))) for path, variable in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat), rest)


def from_tree(config: ModelConfig, tree: Mapping[str, Any]) -> MiniCPM:
    """Builds a model from a tree of weights."""
    return with_weights(minicpm.abstract(config), tree)


def get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf of a nested mapping at `path`."""
    node: Any = tree
    for name in path:
        node = node[name]
    return node


def leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf of a nested mapping with its path."""
    for name, value in tree.items():
        here = (*path, name)
        if isinstance(value, Mapping):
            yield from leaves(value, here)
        else:
            yield here, value
