"""LoRA updates kept apart from their model: a small folder that `load_model` merges into its base."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from duplex_jax.checkpoint.names import as_dtype
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_folder, set_default_mode
from duplex_jax.model import lora
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import Params

CONFIG_FILE = "adapter.json"
WEIGHTS_FILE = "adapter.safetensors"
CARD_FILE = "README.md"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter folder says beside its weights.

    Attributes:
        base: the model that it was trained on, as `--model` takes it.
        template: by name.
        rank, alpha: updates are scaled by `alpha / rank`.
        row_ids: tokens whose embedding (and head) rows it replaces.
        idle_bias: see `Template.idle_bias`.
        training: what is needed to make it again, as far as it is known: the step, the resolved config, and facts about
            the data; see `train.export.history`.
    """

    base: str
    template: str
    rank: int
    alpha: float
    row_ids: tuple[int, ...]
    idle_bias: float = 0.0
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def save(
    folder: str | Path, adapter: Adapter, trained: Params, dtype: Any = "float32", overwrite: bool = False
) -> None:
    """Writes an adapter; the folder appears complete or not at all.

    Args:
        folder: where to.
        adapter: what it is.
        trained: the tree of `model.lora`, on the host.
        dtype: of the stored weights; the 16-bit ones halve them, and float16 rounds updates of this size least.
        overwrite: replaces a folder that is there and not empty; a `README.md` in it, the model card, stays.

    Raises:
        UserError: a folder that is there, or one that cannot be written.
    """
    from safetensors.numpy import save_file

    kind = as_dtype(dtype)
    flat = {f"layers.{name}.{part}": x for name, w in trained["layers"].items() for part, x in w.items()}
    flat |= {f"rows.{table}": x for table, x in trained.get("rows", {}).items()}
    card = Path(folder) / CARD_FILE
    with atomic_folder(folder, overwrite) as aside:
        save_file({k: np.ascontiguousarray(np.asarray(x), dtype=kind) for k, x in flat.items()}, aside / WEIGHTS_FILE)
        set_default_mode(aside / WEIGHTS_FILE)  # the library makes private files
        if card.is_file():
            shutil.copyfile(card, aside / CARD_FILE)
        (aside / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(adapter), indent=1) + "\n", encoding="utf-8")


def is_adapter(path: Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return (path / CONFIG_FILE).is_file()


def read(folder: Path) -> tuple[Adapter, Params]:
    """What `save` wrote; weights in float32.

    Raises:
        UserError: a file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        row = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        adapter = Adapter(**row | {"row_ids": tuple(row["row_ids"])})
        flat = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise UserError(f"{folder}: is no adapter that can be read ({e}); fetch or export it again") from e
    tree: Params = {"layers": {}}
    for name, x in flat.items():
        group, *rest = name.split(".")
        node = tree.setdefault(group, {})
        for part in rest[:-1]:
            node = node.setdefault(part, {})
        node[rest[-1]] = x.astype(np.float32)
    return adapter, tree


def merge(folder: Path, adapter: Adapter, config: ModelConfig, params: Params, trained: Params) -> Params:
    """The base's weights with the updates added.

    Raises:
        UserError: the adapter belongs to a model of another shape.
    """
    for name, w in trained["layers"].items():
        have, want = (w["a"].shape[0], w["a"].shape[1], w["b"].shape[2]), tuple(params["layers"][name].shape)
        if have != want:
            raise UserError(f"{folder}: its update of {name} is for {list(have)} and the base has {list(want)}; "
                            f"it belongs to another model than {adapter.base}")  # fmt: skip
    for i in adapter.row_ids:
        if i >= config.vocab_size:
            raise UserError(f"{folder}: replaces row {i} of a vocabulary of {config.vocab_size}; it belongs to another "
                            f"model than {adapter.base}")  # fmt: skip
    return lora.merge(params, trained, adapter.alpha / adapter.rank, adapter.row_ids)
