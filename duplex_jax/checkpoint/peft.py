"""LoRA updates in PEFT's format, read and written: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from duplex_jax.checkpoint import safetensors
from duplex_jax.checkpoint.adapter import Adapter
from duplex_jax.checkpoint.card import CARD_FILE
from duplex_jax.checkpoint.names import TABLE, finite
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_folder, set_default_mode
from duplex_jax.model.tree import Params
from duplex_jax.schema import Schema, checked, read_json, read_json_beside
from duplex_jax.sources import base_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DUPLEX_FILE = "duplex.json"
"""A file for what PEFT has no field for: the slice template and the bias on idle."""
_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_TABLES = {"embed": "embed_tokens", "head": "lm_head"}
# If one of these fields is set, the update is computed differently.
_UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
)
_Ids = list[Annotated[int, Field(ge=0, lt=2**24)]]


class _Duplex(Schema):
    template: str = ""
    idle_bias: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0


class _Row(Schema):
    peft_type: str
    r: Annotated[int, Field(ge=1, lt=2**16)]
    lora_alpha: float
    bias: str = "none"
    trainable_token_indices: _Ids | dict[str, _Ids] | None = None


def read_config(folder: Path) -> Adapter:
    """Metadata of a PEFT folder; one written by other programs names no template.

    Raises:
        UserError: the file is missing, invalid, or of an unsupported kind, which the message names.
    """
    path = folder / CONFIG_FILE
    given = read_json(path)
    row = checked(_Row, given, str(path))
    for name in _UNSUPPORTED:
        if given.get(name):
            raise UserError(f"{path}: {name}={str(given[name])[:60]} is not supported; plain LoRA is")
    if row.peft_type != "LORA" or row.bias != "none":
        raise UserError(f"{path}: peft_type={row.peft_type!r} with bias={row.bias!r} is not supported; plain LoRA is")
    ids = row.trainable_token_indices or []
    if isinstance(ids, dict):
        kinds = list(ids.values()) or [[]]
        if any(kind != kinds[0] for kind in kinds):
            raise UserError(f"{path}: trainable_token_indices differ between tables; they must be the same in each")
        ids = kinds[0]
    ours = checked(_Duplex, read_json_beside(folder / DUPLEX_FILE), str(folder / DUPLEX_FILE))
    return Adapter(base_of(folder) or "", ours.template, row.r, row.lora_alpha, tuple(ids), ours.idle_bias)


def read(folder: Path) -> tuple[Adapter, Params]:
    """A PEFT folder's updates as the tree of `model.lora`, float32.

    Raises:
        UserError: a file is missing or invalid, or it updates an unsupported weight.
    """
    adapter, path = read_config(folder), folder / WEIGHTS_FILE
    places: dict[str, tuple[str, str, int]] = {}
    tensors = {name.removeprefix(_PREFIX): t for name, t in safetensors.open_file(path).items()}
    number = 1 + max([-1, *(int(p[2]) for n in tensors if (p := n.split("."))[2:] and p[2].isdecimal())])
    for (group, *short), entry in TABLE.items():
        if group == "layers" and entry.transposed:
            for i in range(min(number, len(tensors))):
                stem = entry.hf.format(i).removesuffix(".weight")
                places |= {f"{stem}.lora_{x.upper()}.weight": (short[0], x, i) for x in "ab"}
    rows = {f"{TABLE[(t,)].hf.removesuffix('.weight')}{_ROWS}": t for t in _TABLES}
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    tree: Params = {"layers": {}}
    for name, tensor in tensors.items():
        if name in places and len(tensor.shape) == 2:
            short_name, part, i = places[name]
            found.setdefault(short_name, {}).setdefault(part, {})[i] = finite(tensor, name).astype(np.float32).T
        elif name in rows and len(tensor.shape) == 2 and tensor.shape[0] == len(adapter.row_ids):
            tree.setdefault("rows", {})[rows[name]] = finite(tensor, name).astype(np.float32)
        else:
            raise UserError(f"{path}: tensor {name[:100]} {list(tensor.shape)} is not a supported update")
    for short_name, parts in found.items():
        whole = {part: [layers.get(i) for i in range(number)] for part, layers in parts.items()}
        shapes = {part: {None if w is None else w.shape for w in layers} for part, layers in whole.items()}
        if len(whole) != 2 or any(None in s or len(s) != 1 for s in shapes.values()):
            raise UserError(f"{path}: its update of {short_name} is not the same in every layer; train all of them")
        tree["layers"][short_name] = {
            part: np.stack([w for w in layers if w is not None]) for part, layers in whole.items()
        }
        a, b = tree["layers"][short_name]["a"], tree["layers"][short_name]["b"]
        if a.shape[2] != adapter.rank or b.shape[1] != adapter.rank:
            raise UserError(f"{path}: its update of {short_name} is not of rank {adapter.rank}; fetch it again")
    return adapter, tree


def save(
    folder: str | Path, adapter: Adapter, trained: Params, dtype: np.dtype, overwrite: bool = False, card: str = ""
) -> None:
    """Writes updates in PEFT's format; the folder appears complete or not at all.

    Args:
        folder: the folder to write.
        adapter: its metadata; PEFT finds the base by `base_model_name_or_path`.
        trained: the tree of `model.lora`, on the host.
        dtype: dtype of the stored weights.
        overwrite: replace a nonempty folder.
        card: the model card.

    Raises:
        UserError: the folder exists, or it cannot be written.
    """
    from safetensors.numpy import save_file

    arrays = {}
    for name, w in trained["layers"].items():
        stem = TABLE["layers", name].hf.removesuffix(".weight")
        for part in "ab":
            for i, value in enumerate(np.asarray(w[part])):
                arrays[f"{_PREFIX}{stem.format(i)}.lora_{part.upper()}.weight"] = value.T
    rows = trained.get("rows", {})
    for table, value in rows.items():
        arrays[f"{_PREFIX}{TABLE[(table,)].hf.removesuffix('.weight')}{_ROWS}"] = np.asarray(value)
    row: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.removeprefix("hf:"),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [TABLE["layers", n].hf.split(".")[-2] for n in trained["layers"]],
        "trainable_token_indices": {_TABLES[t]: list(adapter.row_ids) for t in rows} or None,
        "inference_mode": True,
    }
    with atomic_folder(folder, overwrite) as aside:
        save_file(
            {k: np.ascontiguousarray(v, dtype) for k, v in arrays.items()}, aside / WEIGHTS_FILE, {"format": "pt"}
        )
        set_default_mode(aside / WEIGHTS_FILE)
        (aside / CONFIG_FILE).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        ours = {"template": adapter.template, "idle_bias": adapter.idle_bias}
        if card:
            (aside / CARD_FILE).write_text(card, encoding="utf-8")
        (aside / DUPLEX_FILE).write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
