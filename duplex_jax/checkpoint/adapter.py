"""LoRA adapters: updates stored apart from their model in a small folder that `load_model` merges into the base."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from duplex_jax.checkpoint import safetensors
from duplex_jax.checkpoint.card import CARD_FILE
from duplex_jax.checkpoint.names import Unread, as_dtype, finite
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_folder, set_default_mode
from duplex_jax.model import lora
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.tree import Params
from duplex_jax.schema import Schema, checked, read_json

CONFIG_FILE = "adapter.json"
WEIGHTS_FILE = "adapter.safetensors"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Metadata of an adapter folder.

    Attributes:
        base: the model that it was trained on, as `--model` takes it.
        template: name of the template.
        rank, alpha: updates are scaled by `alpha / rank`.
        row_ids: tokens whose embedding (and head) rows it replaces.
        idle_bias: see `Template.idle_bias`.
        training: what is known of its training: the step, the resolved config, and facts about the data; see
            `train.export.history`.
    """

    base: str
    template: str
    rank: int
    alpha: float
    row_ids: tuple[int, ...]
    idle_bias: float = 0.0
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def save(
    folder: str | Path,
    adapter: Adapter,
    trained: Params,
    dtype: Any = "float32",
    overwrite: bool = False,
    card: str = "",
) -> None:
    """Writes an adapter; the folder appears complete or not at all.

    Args:
        folder: the folder to write.
        adapter: its metadata.
        trained: the tree of `model.lora`, on the host.
        dtype: dtype of the stored weights. 16-bit types halve the size; float16 rounds updates of this magnitude least.
        overwrite: replace a nonempty folder; an existing `README.md`, the model card, is kept.
        card: the model card, if there is none yet.

    Raises:
        UserError: the folder exists, or it cannot be written.
    """
    from safetensors.numpy import save_file

    kind = as_dtype(dtype)
    flat = {f"layers.{name}.{part}": x for name, w in trained["layers"].items() for part, x in w.items()}
    flat |= {f"rows.{table}": x for table, x in trained.get("rows", {}).items()}
    kept = Path(folder) / CARD_FILE
    with atomic_folder(folder, overwrite) as aside:
        save_file({k: np.ascontiguousarray(np.asarray(x), dtype=kind) for k, x in flat.items()}, aside / WEIGHTS_FILE)
        set_default_mode(aside / WEIGHTS_FILE)  # the library creates private files
        if kept.is_file():
            shutil.copyfile(kept, aside / CARD_FILE)
        elif card:
            (aside / CARD_FILE).write_text(card, encoding="utf-8")
        (aside / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(adapter), indent=1) + "\n", encoding="utf-8")


def is_adapter(path: Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return (path / CONFIG_FILE).is_file()


class _Row(Schema):
    """The fields of `adapter.json`."""

    base: str
    template: str
    rank: Annotated[int, Field(ge=1, lt=2**16)]
    alpha: float
    row_ids: list[Annotated[int, Field(ge=0, lt=2**24)]]
    idle_bias: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0
    training: dict[str, Any] = Field(default_factory=dict)


def read_config(folder: Path) -> Adapter:
    """Metadata of an adapter folder.

    Raises:
        UserError: the file is missing or invalid.
    """
    path = folder / CONFIG_FILE
    row = checked(_Row, read_json(path, "fetch or export it again"), str(path), "fetch or export it again")
    return Adapter(**{**row.model_dump(), "row_ids": tuple(row.row_ids)})


def read(folder: Path) -> tuple[Adapter, Params]:
    """Reads what `save` wrote, with weights in float32.

    Raises:
        UserError: a file is missing or invalid.
    """
    adapter = read_config(folder)
    path = folder / WEIGHTS_FILE
    tree: Params = {"layers": {}}
    for name, tensor in safetensors.open_file(path).items():
        match name.split("."):
            case ["layers", weight, ("a" | "b") as part] if len(tensor.shape) == 3:
                tree["layers"].setdefault(weight, {})[part] = finite(tensor, name).astype(np.float32)
            case ["rows", table] if len(tensor.shape) == 2:
                tree.setdefault("rows", {})[table] = finite(tensor, name).astype(np.float32)
            case _:
                raise UserError(
                    f"{path}: tensor {name} {list(tensor.shape)} is not part of an adapter; export it again"
                )
    for name, w in tree["layers"].items():
        if len(w) != 2 or w["a"].shape[2] != adapter.rank or w["b"].shape[1] != adapter.rank:
            raise UserError(f"{path}: the update of {name} is not of rank {adapter.rank}; export it again")
    if any(len(rows) != len(adapter.row_ids) for rows in tree.get("rows", {}).values()):
        raise UserError(f"{path}: holds other rows than the {len(adapter.row_ids)} of row_ids; export it again")
    return adapter, tree


def merge(folder: Path, adapter: Adapter, config: ModelConfig, params: Params, trained: Params) -> Params:
    """The base model's weights plus the updates.

    Raises:
        UserError: the adapter does not match the model's shape.
    """
    for name, w in trained["layers"].items():
        have, want = (w["a"].shape[0], w["a"].shape[1], w["b"].shape[2]), tuple(params["layers"][name].shape)
        if have != want:
            raise UserError(f"{folder}: its update of {name} is for {list(have)}, but the base has {list(want)}; "
                            f"it was not made for {adapter.base}")  # fmt: skip
    for i in adapter.row_ids:
        if i >= config.vocab_size:
            raise UserError(f"{folder}: replaces row {i} of a vocabulary of {config.vocab_size}; it was not made "
                            f"for {adapter.base}")  # fmt: skip
    scale = adapter.alpha / adapter.rank
    if not isinstance(params["embed"], Unread):
        return lora.merge(params, trained, scale, adapter.row_ids)
    params = {**params, "layers": dict(params["layers"])}

    def updated(w: dict[str, np.ndarray], layer: int | None, value: np.ndarray) -> np.ndarray:
        return (np.asarray(value, np.float32) + scale * np.matmul(w["a"][layer], w["b"][layer])).astype(value.dtype)

    def replaced(rows: np.ndarray, _: int | None, value: np.ndarray) -> np.ndarray:
        whole = np.array(value)
        whole[list(adapter.row_ids)] = rows
        return whole

    for name, w in trained["layers"].items():
        params["layers"][name] = params["layers"][name].changed(functools.partial(updated, w))
    for name, rows in trained.get("rows", {}).items():
        params[name] = params[name].changed(functools.partial(replaced, rows))
    return params
