"""Hugging Face folders: reads safetensors or `pytorch_model.bin`; writes safetensors, config and tokenizer."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duplex_jax.checkpoint import safetensors
from duplex_jax.checkpoint.names import DTYPES, Part, Tensor, assemble, disassemble, get, parts
from duplex_jax.errors import UserError, extra
from duplex_jax.model.config import ModelConfig, from_hf, to_hf
from duplex_jax.model.tree import Params
from duplex_jax.schema import read_json

SHARD_BYTES = 2 * 2**30
TYPES = ("auto", "minicpm")


def load(
    path: str | Path, dtype: np.dtype | None = None, vocab_multiple: int = 1, unread: bool = False
) -> tuple[ModelConfig, Params]:
    """Config and stacked numpy weights of a model folder, or of a `.safetensors` file next to its `config.json`.

    Tensors are read one at a time into place: peak memory is the model's own size plus a few tensors.

    Args:
        path: the folder or file.
        dtype: dtype of the result; None keeps each tensor's own.
        vocab_multiple: the vocabulary is padded to a multiple of this.
        unread: see `names.assemble`.

    Raises:
        UserError: a file is missing, truncated or of the wrong kind; a tensor is missing, has the wrong shape or is not
            part of the model.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    config = dataclasses.replace(config, vocab_multiple=vocab_multiple)
    return config, assemble(config, open_tensors(path), "hf", str(path), dtype, unread)


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; reads headers only.

    Raises:
        UserError: there are no weights, or a file cannot be read.
    """
    if path.is_file():
        return safetensors.open_file(path) if path.suffix == ".safetensors" else _torch_file(path)
    for stem, reader in (("model.safetensors", safetensors.open_file), ("pytorch_model.bin", _torch_file)):
        index, single = path / f"{stem}.index.json", path / stem
        if index.is_file():
            return _sharded(index, reader)
        if single.is_file():
            return reader(single)
    raise UserError(f"{path}: holds no weights; a model folder has model.safetensors or pytorch_model.bin")


def _sharded(index: Path, reader: Any) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) and Path(f).name == f for f in where.values()):
        raise UserError(f"{index}: weight_map must map tensor names to files in the same folder")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        file = index.parent / name
        if not os.path.isfile(file):  # the index may contain any name
            raise UserError(f"{file}: missing; {index.name} lists it")
        tensors |= reader(file)
    lost = [n for n in where if n not in tensors]
    if lost:
        raise UserError(f"{index.parent / where[lost[0]]}: tensor {lost[0]} missing; {index.name} puts it there")
    return tensors


def _torch_file(path: Path) -> dict[str, Tensor]:
    with extra("torch", f"{path}: reading it"):
        import torch
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # unpickling invalid data raises many types
        raise UserError(f"{path}: is not a complete PyTorch file of tensors ({str(e)[:200]}); fetch it again") from e
    if not isinstance(state, Mapping) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: must hold a dictionary of tensors")

    def read(tensor: Any) -> np.ndarray:
        tensor = tensor.contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
        return tensor.numpy()

    def dtype(tensor: Any) -> np.dtype:
        return read(tensor.new_empty(0)).dtype

    return {name: Tensor(tuple(t.shape), dtype(t), str(path), functools.partial(read, t)) for name, t in state.items()}


def save_config(
    folder: Path,
    config: ModelConfig,
    generation: Mapping[str, Any],
    dtype: np.dtype,
    hf_type: str = "auto",
    extra: Mapping[str, Any] | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json` and `generation_config.json` into an existing folder.

    Args:
        folder: the folder; use `files.atomic_folder` to write all or nothing.
        config: the model.
        generation: sampling defaults: `temperature`, `top_p`, `top_k`.
        dtype: dtype of the weights.
        hf_type: `auto` for a model type built into transformers (Llama, or Granite if a scale is not 1); `minicpm` for
            the released keys, which llama.cpp's converter and servers with their own MiniCPM read.
        extra: additional fields of `config.json`.
        decoding: additional fields of `generation_config.json`.

    Raises:
        OSError: the folder cannot be written.
    """
    row = to_hf(config)
    if hf_type == "minicpm":
        row = as_minicpm(config, row)
    row |= {"torch_dtype": np.dtype(dtype).name, **(extra or {})}
    ids = {k: row[k] for k in ("bos_token_id", "eos_token_id") if row.get(k) is not None}
    sampling = {"do_sample": True, **generation} if generation else {}
    _write_json(folder / "config.json", row)
    _write_json(folder / "generation_config.json", {**ids, **sampling, **(decoding or {})})


def as_minicpm(config: ModelConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with the keys of the released MiniCPM."""
    multipliers = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
    return {k: v for k, v in row.items() if k not in multipliers} | {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "scale_emb": config.scale_emb,
        "scale_depth": math.sqrt(config.num_layers) if config.scale_depth is None else config.scale_depth,
        "dim_model_base": config.hidden_size if config.dim_model_base is None else config.dim_model_base,
    }


def _write_json(path: Path, row: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(
    config: ModelConfig, params: Params, dtype: np.dtype | None, shard_bytes: int
) -> Iterator[tuple[int, list[Part]]]:
    """Groups tensors into files; yields each file's size in bytes and its tensors."""
    shard: list[Part] = []
    size = 0
    for part in parts(config, "hf"):
        bytes_ = math.prod(part.shape) * _dtype_of(params, part, dtype).itemsize
        if shard and size + bytes_ > shard_bytes:
            yield size, shard
            shard, size = [], 0
        shard.append(part)
        size += bytes_
    yield size, shard


def _dtype_of(params: Params, part: Part, dtype: np.dtype | None) -> np.dtype:
    return np.dtype(dtype or get(params, part.path).dtype)


def _reader(
    config: ModelConfig, params: Params, shard: Sequence[Part], dtype: np.dtype | None
) -> Callable[[str], np.ndarray]:
    """A function that loads a tensor of one file by name, for writing it."""
    parts_of = {part.name: part for part in shard}
    return lambda name: disassemble(config, params, parts_of[name], dtype)


def save_weights(
    folder: Path, config: ModelConfig, params: Params, dtype: np.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes weights as safetensors into an existing folder, in several files if they exceed `shard_bytes`.

    Tensors are copied, or read from their files, one at a time.

    Args:
        folder: the folder; use `files.atomic_folder` to write all or nothing.
        config: the model; vocabulary padding is left out.
        params: its weights: numpy, jax or `names.Unread`.
        dtype: dtype of the tensors; None keeps their own.
        shard_bytes: maximum size of a file, unless a single tensor is larger.

    Raises:
        OSError: the folder cannot be written.
    """
    shards = list(_shards(config, params, dtype, shard_bytes))
    weight_map: dict[str, str] = {}
    for i, (_, shard) in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {part.name: (part.shape, _dtype_of(params, part, dtype)) for part in shard}

        safetensors.write_file(folder / name, tensors, _reader(config, params, shard, dtype))
        weight_map |= {part.name: name for part in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for size, _ in shards)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
