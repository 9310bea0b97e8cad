"""Loads what `--model` names, from any format, as one frozen result; writes models in any format."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from duplex_jax.checkpoint import adapter, card, gguf, huggingface, orbax, peft
from duplex_jax.checkpoint.names import Unread, as_dtype
from duplex_jax.checkpoint.resolve import resolve
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_folder, check_space
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.model.tree import Params, from_tree, to_tree
from duplex_jax.template import Template
from duplex_jax.tokenizer import Tokenizer

FORMATS = ("hf", "orbax", "gguf")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for use.

    Attributes:
        name: the name that it was loaded by.
        model: the module; its stacked weights are numpy arrays on the host.
        tokenizer: the tokenizer, with every token that the template needs.
        template: converts timelines to tokens.
        generation: the model's own sampling defaults, such as `temperature` and `top_p`.
    """

    name: str
    model: MiniCPM
    tokenizer: Tokenizer
    template: Template
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The model's shape and scales."""
        return self.model.config

    @property
    def params(self) -> Params:
        """The weights as the plain tree of `model.tree`."""
        return to_tree(self.model)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: Any = None,
    template: str | None = None,
    vocab_multiple: int = 1,
    unread: bool = False,
) -> LoadedModel:
    """Loads a model with its tokenizer and template.

    Args:
        name_or_path: a folder (Hugging Face's layout, Orbax, a LoRA adapter, or a trainer's working folder), a `.gguf`
            file, a `.safetensors` file next to config and tokenizer, `hf:owner/name`, or a name in `sources.REGISTRY`.
        dtype: dtype of the weights. None: as stored (quantised weights: float32); `auto`: float32 on CPU and bfloat16
            elsewhere.
        template: name of the template; None for the one that the config names, or else the one that suits the
            vocabulary. Tokens that the vocabulary lacks are added, each initialised with the mean of all rows.
        vocab_multiple: the vocabulary is padded to a multiple of this, so that it can be sharded.
        unread: leave weights in their files until an engine takes them, tensor by tensor (`names.Unread`); an Orbax
            checkpoint is always read whole.

    Raises:
        UserError: a file is missing, truncated, or does not fit the others.
    """
    found = resolve(name_or_path, template)
    path, kind, made = found.path, as_dtype(dtype), found.template
    if found.kind == "orbax":
        config, params = orbax.load(path, kind, vocab_multiple)
    else:
        config, params = (gguf if found.kind == "gguf" else huggingface).load(path, kind, vocab_multiple, unread)
    stored = made.tokenizer.vocab_size - len(found.added)
    if stored > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {stored} ids but the model has {config.vocab_size} rows; they do not belong "
            "together"
        )
    if found.added:
        config, params = add_rows(config, params, stored, made.tokenizer.vocab_size)
    for folder in found.adapters:
        what, trained = (adapter if adapter.is_adapter(folder) else peft).read(folder)
        params = adapter.merge(folder, what, config, params, trained)
    return LoadedModel(str(name_or_path), from_tree(config, params), made.tokenizer, made, found.generation)


def duplex_metadata(model: LoadedModel) -> dict[str, Any]:
    """The `duplex` field of `config.json`.

    It names the template, the ids that end a slice and, if they differ from the default, the bias on idle and whether
    the model was trained on slices.
    """
    template = model.template
    row = {"template": template.name, "idle_token_id": template.idle_id, "end_token_id": template.end_id}
    row |= {"idle_bias": template.idle_bias} if template.idle_bias else {}
    return row | ({"in_slices": template.in_slices} if template.in_slices or template.name == "compact" else {})


def save_model(
    model: LoadedModel,
    folder: str | Path,
    *,
    format: str = "hf",
    dtype: Any = None,
    hf_type: str = "auto",
    overwrite: bool = False,
) -> None:
    """Writes a model in a form that `load_model` reads: weights, config, tokenizer and sampling defaults.

    Args:
        model: the model.
        folder: target folder, which appears complete or not at all; for `gguf`, the target file.
        format: `hf` for transformers, `orbax` for the trainer, `gguf` for llama.cpp.
        dtype: dtype of the weights; None keeps their own. For `gguf` one of `gguf.WRITTEN`, float16 by default.
        hf_type: see `huggingface.save_config`.
        overwrite: replace a nonempty folder, or a file.

    Raises:
        UserError: unknown format, dtype or type; the target exists or cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; one of {', '.join(FORMATS)}")
    if hf_type not in huggingface.TYPES:
        raise UserError(f"hf_type {hf_type!r} is unknown; one of {', '.join(huggingface.TYPES)}")
    if format == "gguf":
        duplex = duplex_metadata(model)
        name = Path(model.name.removeprefix("hf:")).stem
        said: dict[str, Any] = {"general.name": name, "general.description": card.describe(model.template)}
        if model.template.in_slices:  # llama.cpp ends an answer at any of these three
            said |= {"tokenizer.ggml.eot_token_id": model.template.end_id}
            said |= {"tokenizer.ggml.eom_token_id": model.template.idle_id}
        said |= {f"duplex.{k}": v for k, v in duplex.items()}
        gguf.save(model.config, model.params, model.tokenizer, folder, dtype or "float16", said, overwrite)
        return
    kind = as_dtype(dtype)
    with atomic_folder(folder, overwrite) as aside:
        check_space(folder, sum(x.size * (kind or x.dtype).itemsize for x in jax.tree.leaves(model.params)))
        model.tokenizer.save(aside)
        huggingface.save_config(
            aside,
            model.config,
            model.generation,
            kind or model.model.dtype,
            hf_type,
            {"duplex": duplex_metadata(model)},
            card.generation_settings(model.template),
        )
        (aside / card.CARD_FILE).write_text(card.card(model.name, model.template), encoding="utf-8")
        if format == "orbax":
            orbax.save(aside, model.config, model.params, kind)
        else:
            huggingface.save_weights(aside, model.config, model.params, kind)


def add_rows(config: ModelConfig, params: Params, first: int, count: int) -> tuple[ModelConfig, Params]:
    """Provides rows for tokens `first` to `count - 1`, reusing rows of unused ids before adding new ones.

    A new row of the embedding, and of an untied head, is the mean of the existing rows, which makes the new token about
    as likely as an average one (Hewitt 2021, "Initializing new word embeddings").

    Returns:
        The new config and tree; the arguments are not changed.
    """
    grown = dataclasses.replace(config, vocab_size=max(config.vocab_size, count))
    params = dict(params)

    def table(_: int | None, old: np.ndarray) -> np.ndarray:
        rows = np.zeros((grown.padded_vocab_size, old.shape[1]), old.dtype)
        rows[: config.vocab_size] = old[: config.vocab_size]
        rows[first:count] = old[:first].mean(axis=0, dtype=np.float32)
        return rows

    for name in ("embed", "head"):
        if (old := params.get(name)) is not None:
            shape = (grown.padded_vocab_size, old.shape[1])
            params[name] = old.changed(table, shape) if isinstance(old, Unread) else table(None, np.asarray(old))
    return grown, params
