"""What a run exports: the whole model, or LoRA's updates alone, with a record of the training."""

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from duplex_jax.checkpoint import adapter
from duplex_jax.checkpoint.card import adapter_card
from duplex_jax.checkpoint.orbax import quiet
from duplex_jax.checkpoint.registry import LoadedModel, save_model
from duplex_jax.checkpoint.resolve import load_template
from duplex_jax.errors import UserError
from duplex_jax.model import lora
from duplex_jax.model.tree import Params, from_tree
from duplex_jax.sources import locate
from duplex_jax.template import Template
from duplex_jax.timeline import SlicePair
from duplex_jax.train import checkpoints
from duplex_jax.train import step as steps
from duplex_jax.train.checkpoints import Record
from duplex_jax.train.config import Config, from_dict

EXPORT = "export"


def control_ids(template: Template, config: Config) -> tuple[int, ...]:
    """The template's control tokens, whose embedding rows LoRA trains."""
    if not config.lora.rank or not config.lora.new_tokens:
        return ()
    example = template.encode([SlicePair("a", " a"), SlicePair(None, None)]).ids.tolist()
    control = set(template.tokenizer.special.values())
    return tuple(sorted({i for i in example if i in control}))


def gather(tree: Any) -> Any:
    """Gathers a tree of global arrays as numpy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def export(
    plan: steps.Plan, state: steps.State, frozen: Any, template: Template, out: Path, record: Record | None = None
) -> None:
    """Writes what `duplex-jax chat` runs: the whole model for transformers, or LoRA's updates alone.

    Args:
        plan: the run's plan.
        state: its final state.
        frozen: the weights that LoRA left frozen.
        template: the run's template.
        out: target folder; replaced if it exists.
        record: the checkpoint's metadata, stored with an adapter.
    """
    trained = gather(state["params"])
    c = plan.config
    apart = plan.is_lora and not c.lora.merge
    template.in_slices = True
    if plan.is_lora and not apart:
        frozen = gather(frozen)
    if jax.process_index() != 0:
        return
    if apart:
        what = describe(c, template, plan.row_ids, record)
        adapter.save(out, what, trained, overwrite=True, card=adapter_card(c.name, what.base, template))
        return
    params = trained
    if plan.is_lora:
        params = lora.merge(frozen, trained, plan.scale, plan.row_ids)
    loaded = LoadedModel(c.name, from_tree(plan.model, params), template.tokenizer, template)
    save_model(loaded, out, overwrite=True)


def describe(config: Config, template: Template, row_ids: tuple[int, ...], record: Record | None) -> adapter.Adapter:
    """Metadata of an adapter from this run."""
    training = history(record) if record is not None else {}
    return adapter.Adapter(
        config.model.source, template.name, config.lora.rank, config.lora.alpha, row_ids, training=training
    )


def history(record: Record) -> dict[str, Any]:
    """A checkpoint's record for readers elsewhere, with that of the stable run from which it was branched, if any.

    Data and runs are named by the last part of their path, because a path means nothing on another machine; the hash
    identifies the data.
    """
    config, facts = copy.deepcopy(record.config), copy.deepcopy(record.facts)
    row: dict[str, Any] = {"step": record.step, "position": record.position, "config": config, "facts": facts}
    if where := config["optim"].get("decay_from"):
        try:
            row["branched_from"] = history(checkpoints.read_record(checkpoints.stable_checkpoint(where)[0]))
        except UserError:  # the stable run may have been deleted
            row["branched_from"] = None
        config["optim"]["decay_from"] = Path(where).name
    for kind in ("train", "eval"):
        config["data"][kind] = [Path(path).name for path in config["data"].get(kind, ())]
    for source in facts.get("data", ()):
        source["name"] = Path(source["name"]).name
    return row


def read_adapter(where: str) -> tuple[adapter.Adapter, Params]:
    """The updates from a checkpoint of a LoRA run, or from an existing adapter.

    Args:
        where: `WORKDIR` (newest complete checkpoint), `WORKDIR@STEP`, an adapter's folder, or a registered name.

    Returns:
        The adapter's metadata, and its weights in float32.

    Raises:
        UserError: it is neither, the run trained all weights, or the checkpoint cannot be read.
    """
    workdir = Path(where.rpartition("@")[0] or where) if not Path(where).exists() else Path(where)
    if (workdir / checkpoints.FOLDER).is_dir():
        return _from_checkpoint(where)
    path = locate(where)
    if not adapter.is_adapter(path):
        raise UserError(f"{where}: is neither an adapter nor the workdir of a LoRA run; give one of these")
    return adapter.read(path)


def _from_checkpoint(where: str) -> tuple[adapter.Adapter, Params]:
    from orbax.checkpoint import v1 as ocp

    folder, _ = checkpoints.find(where, "--model")
    record = checkpoints.read_record(folder)
    config = from_dict(record.config)
    if not config.lora.rank:
        raise UserError(f"{folder}: every weight was trained (lora.rank 0); only a LoRA run has an adapter")
    try:
        with quiet():
            stored = ocp.metadata(folder).metadata
            # A numpy array with strides of 0 has a shape and a dtype but takes no memory.
            abstract = jax.tree.map(lambda m: np.broadcast_to(np.zeros((), m.dtype), m.shape), stored)
            trained = ocp.load(folder, abstract)["params"]
    except Exception as e:  # missing and truncated files raise many types
        raise UserError(f"{folder}: cannot be read ({str(e)[:200]}); give another checkpoint") from e
    template = load_template(config.model.tokenizer or config.model.source, config.model.template)
    rows = control_ids(template, config)
    if rows and len(rows) != len(trained["rows"]["embed"]):
        raise UserError(f"{folder}: holds {len(trained['rows']['embed'])} rows of control tokens and the template "
                        f"{template.name} writes {len(rows)}; give the checkpoint of this version")  # fmt: skip
    return describe(config, template, rows, record), trained
