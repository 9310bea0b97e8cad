"""The table that maps our weights to the names and layouts of other formats, used in both directions."""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.tree import Params, get, leaves, shapes


class Name(NamedTuple):
    """A weight's name in other formats, which store matrices as `[out, in]`; `{}` stands for the layer."""

    hf: str
    gguf: str
    transposed: bool = False


TABLE: dict[tuple[str, ...], Name] = {
    ("embed",): Name("model.embed_tokens.weight", "token_embd.weight"),
    ("layers", "attn_norm"): Name("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    ("layers", "q"): Name("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", True),
    ("layers", "k"): Name("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", True),
    ("layers", "v"): Name("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", True),
    ("layers", "o"): Name("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", True),
    ("layers", "mlp_norm"): Name("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    ("layers", "gate"): Name("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", True),
    ("layers", "up"): Name("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", True),
    ("layers", "down"): Name("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", True),
    ("final_norm",): Name("model.norm.weight", "output_norm.weight"),
    ("head",): Name("lm_head.weight", "output.weight"),
}

# Tensors that may be in files but hold no weights.
IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_VOCABULARY = (("embed",), ("head",))

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def as_dtype(dtype: Any) -> np.dtype | None:
    """Converts a dtype's name, `auto` (float32 on CPU, bfloat16 elsewhere), a numpy or jax dtype, or None.

    Raises:
        UserError: weights cannot have this dtype.
    """
    if dtype is None:
        return None
    if dtype == "auto":
        return DTYPES["float32" if jax.default_backend() == "cpu" else "bfloat16"]
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not supported; one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not yet read.

    Attributes:
        shape: shape in the file.
        dtype: dtype of what `read` returns.
        where: the file, for error messages.
        read: loads the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str
    read: Callable[[], np.ndarray]


def read_array(path: Path, offset: int, size: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """`size` bytes of a file at `offset` as an array. Not memory-mapped, because mapped pages would count twice."""
    return np.fromfile(path, np.uint8, size, offset=offset).view(dtype).reshape(shape)


def finite(tensor: Tensor, name: str) -> np.ndarray:
    """A tensor's values in float32 or the file's own dtype, after checking that all are finite.

    Raises:
        UserError: some are not finite; the message names the tensor and their number.
    """
    return check_finite(tensor.read(), name, tensor.where)


def check_finite(value: np.ndarray, name: str, where: str) -> np.ndarray:
    """`finite` for values already in memory."""
    if value.dtype.itemsize == 2:  # no fast isfinite for bfloat16: test for an exponent of all ones
        exponent = 0x7F80 if value.dtype == DTYPES["bfloat16"] else 0x7C00
        bad = int(np.count_nonzero((value.view(np.uint16) & exponent) == exponent))
    else:
        bad = value.size - int(np.count_nonzero(np.isfinite(value)))
    if bad:
        raise UserError(f"{where}: {bad} of {value.size} weights of tensor {name} are NaN or infinite; fetch it again")
    return value


class Part(NamedTuple):
    """A tensor of another format: its name there, path in our tree, layer (None if not stacked) and shape there."""

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


def parts(config: ModelConfig, column: str) -> Iterator[Part]:
    """Every tensor in a checkpoint of this model, named as in the table's `column` (`hf` or `gguf`)."""
    declared = dict(leaves(shapes(config)))
    for path, entry in TABLE.items():
        if path not in declared:
            continue
        weight = declared[path]
        shape = weight.shape[1:] if path[0] == "layers" else weight.shape
        if path in _VOCABULARY:
            shape = (config.vocab_size, *shape[1:])
        if entry.transposed:
            shape = shape[::-1]
        for layer in range(config.num_layers) if path[0] == "layers" else (None,):
            yield Part(getattr(entry, column).format(layer), path, layer, shape, entry.transposed)


def assemble(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    column: str,
    where: str,
    dtype: np.dtype | None = None,
    unread: bool = False,
) -> Params:
    """Stacked numpy weights from a checkpoint's tensors, read one at a time into place.

    Args:
        config: the model; rows added by its `vocab_multiple` are zero.
        tensors: the files' tensors by name.
        column: the naming scheme, `hf` or `gguf`.
        where: the checkpoint, for error messages.
        dtype: dtype of the result; None keeps each tensor's own.
        unread: return `Unread` leaves, for jobs that convert the weights at once.

    Returns:
        The tree of `model.tree`.

    Raises:
        UserError: a tensor is missing, truncated, has the wrong shape or is not part of the model.
    """
    if config.num_layers > len(tensors):  # a damaged layer count must not create a list of billions
        raise UserError(f"{where}: the config says {config.num_layers} layers, but the file has {len(tensors)} tensors")
    wanted = list(parts(config, column))
    _check(config, wanted, tensors, column, where)
    tree: Params = {}
    for path, weight in leaves(shapes(config)):
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        found = [(part, tensors[part.name]) for part in wanted if part.path == path]
        own = {tensor.dtype for _, tensor in found}
        kind = dtype or (own.pop() if len(own) == 1 else DTYPES["float32"])
        if unread:
            node[path[-1]] = _unread(config, found, weight.shape, kind)
            continue
        padded = path in _VOCABULARY and weight.shape[0] != config.vocab_size
        node[path[-1]] = (np.zeros if padded else np.empty)(weight.shape, kind)

    if unread:
        return tree

    def fill(part: Part) -> None:
        value = finite(tensors[part.name], part.name)
        leaf = get(tree, part.path)
        target = leaf[: value.shape[0]] if part.layer is None else leaf[part.layer]
        value = value.T if part.transposed else value
        if value.dtype == target.dtype and value.dtype.itemsize == 2:
            value, target = value.view(np.uint16), target.view(np.uint16)  # numpy copies native types faster
        target[...] = value

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for done in concurrent.futures.as_completed([pool.submit(fill, part) for part in wanted]):
            done.result()
    return tree


class Unread:
    """A weight still in its file, read at each use; stacked weights are read layer by layer.

    Memory then holds the model once, in its final form, plus one tensor of the file.

    Args:
        shape: shape of the weight.
        dtype: dtype of the values.
        read: reads the values.
        layers: for a stacked weight, its layers, which are read instead.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        read: Callable[[], np.ndarray] | None = None,
        layers: Sequence["Unread"] = (),
    ):
        self.shape, self.dtype, self._layers = tuple(shape), np.dtype(dtype), tuple(layers)
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self._read = read or (lambda: np.stack([np.asarray(layer) for layer in self._layers]))

    @property
    def T(self) -> np.ndarray:
        """The transposed values."""
        return np.asarray(self).T

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index] if self._layers and isinstance(index, int) else np.asarray(self)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(), dtype or self.dtype)

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(np.asarray(self))

    def astype(self, dtype: Any) -> np.ndarray:
        """The values in another dtype."""
        return np.asarray(self, dtype)

    def changed(
        self, change: Callable[[int | None, np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None
    ) -> "Unread":
        """The weight with a function applied to its values when they are read.

        Args:
            change: maps a layer's number (None if not stacked) and values to new values.
            shape: shape of the result; unchanged by default.
        """
        if self._layers:
            changes = (functools.partial(_of_layer, change, i) for i in range(len(self._layers)))
            layers = [layer.changed(part) for layer, part in zip(self._layers, changes, strict=True)]
            return Unread(self.shape, self.dtype, layers=layers)
        return Unread(shape or self.shape, self.dtype, lambda: change(None, np.asarray(self)))


def _of_layer(change: Callable[[int | None, np.ndarray], np.ndarray], i: int, _: None, w: np.ndarray) -> np.ndarray:
    return change(i, w)


def _unread(config: ModelConfig, own: Sequence[tuple[Part, Tensor]], shape: tuple[int, ...], dtype: np.dtype) -> Unread:
    """An unread weight made of one tensor, or of one per layer."""

    def read(part: Part, tensor: Tensor, wanted: tuple[int, ...]) -> np.ndarray:
        value = finite(tensor, part.name)
        value = (value.T if part.transposed else value).astype(dtype, copy=False)
        if value.shape == wanted:
            return value
        return np.concatenate([value, np.zeros((wanted[0] - value.shape[0], *wanted[1:]), dtype)])

    if own[0][0].layer is None:
        return Unread(shape, dtype, functools.partial(read, *own[0], shape))
    layers = [Unread(shape[1:], dtype, functools.partial(read, part, tensor, shape[1:])) for part, tensor in own]
    return Unread(shape, dtype, layers=layers)


def _check(config: ModelConfig, wanted: list[Part], tensors: Mapping[str, Tensor], column: str, where: str) -> None:
    missing = [p for p in wanted if p.name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"{where}: tensor {missing[0].name} {list(missing[0].shape)}{more} missing; the config needs "
            f"{len(wanted)} tensors, the file has {len(tensors)}"
        )
    for part in wanted:
        found = tensors[part.name]
        if found.shape != part.shape:
            raise UserError(
                f"{found.where}: tensor {part.name} has shape {list(found.shape)}; the config makes it "
                f"{list(part.shape)}"
            )
        if found.dtype.kind != "f" and found.dtype != DTYPES["bfloat16"]:
            raise UserError(f"{found.where}: tensor {part.name} is {found.dtype.name}; weights are float32 or bfloat16")
    names = {part.name for part in wanted}
    extra = [n for n in tensors if n not in names and not n.endswith(IGNORED)]
    head = getattr(TABLE["head",], column)
    if config.tie_word_embeddings and head in extra:
        # Released files may contain a tied head a second time.
        embed = tensors[getattr(TABLE["embed",], column)]
        if tensors[head].shape != embed.shape or not np.array_equal(tensors[head].read(), embed.read()):
            raise UserError(
                f"{tensors[head].where}: tensor {head} differs from the embedding, though the config ties them; "
                "set tie_word_embeddings to false in config.json"
            )
        extra.remove(head)
    if extra:
        found = tensors[extra[0]]
        more = f" and {len(extra) - 1} others" if len(extra) > 1 else ""
        raise UserError(
            f"{found.where}: tensor {extra[0]} {list(found.shape)}{more} not part of the model that the config "
            f"describes ({config.num_layers} layers{', tied head' if config.tie_word_embeddings else ''})"
        )


def disassemble(config: ModelConfig, params: Params, part: Part, dtype: np.dtype | None = None) -> np.ndarray:
    """Inverse of `assemble` for one tensor: a contiguous array of shape `part.shape`, without vocabulary padding."""
    leaf = get(params, part.path)
    value = np.asarray(leaf if part.layer is None else leaf[part.layer])[: part.shape[-1 if part.transposed else 0]]
    value = value.T if part.transposed else value
    return np.ascontiguousarray(value if dtype is None else value.astype(dtype))


def pad_vocabulary(config: ModelConfig, params: Params, multiple: int) -> tuple[ModelConfig, Params]:
    """The same numpy weights with the vocabulary padded to a multiple of `multiple`; added rows are zero."""
    if multiple == config.vocab_multiple:
        return config, params
    config = dataclasses.replace(config, vocab_multiple=multiple)
    params = dict(params)
    for name in ("embed", "head"):
        if name in params:
            old = np.asarray(params[name])[: config.vocab_size]
            rows = config.padded_vocab_size - config.vocab_size
            params[name] = np.concatenate([old, np.zeros((rows, old.shape[1]), old.dtype)]) if rows else old
    return config, params
