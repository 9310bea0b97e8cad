"""`--model` to a model in memory: whatever the source, one frozen result."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from duplex_jax.checkpoint import adapter, gguf, huggingface, orbax
from duplex_jax.checkpoint.names import as_dtype
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_folder, check_space
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import Params
from duplex_jax.sources import locate, read_gguf_header
from duplex_jax.template import TEMPLATES, Template, default_template, make_template, missing_tokens
from duplex_jax.tokenizer import Tokenizer, resolve_tokenizer

FORMATS = ("hf", "orbax", "gguf")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for use.

    Attributes:
        name: what it was asked for by.
        config: its shape and scales.
        params: stacked numpy arrays on the host, the tree of `model.minicpm.declare`; put them where they are needed.
        tokenizer: with every token that the template needs.
        template: how timelines become its tokens.
        generation: sampling defaults that came with it, such as `temperature` and `top_p`.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    template: Template
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)


def load_model(
    name_or_path: str | Path, *, dtype: Any = None, template: str | None = None, vocab_multiple: int = 1
) -> LoadedModel:
    """Loads a model with its tokenizer and template.

    Args:
        name_or_path: a folder (Hugging Face's layout, Orbax, a LoRA adapter, or a trainer's working folder), a `.gguf`
            file, a `.safetensors` file with config and tokenizer beside it, `hf:owner/name`, or a name of
            `sources.REGISTRY`.
        dtype: of the weights; None as stored (quantised ones float32), `auto` float32 on CPU and bfloat16 elsewhere.
        template: by name; None for the one that the config names, else the one that the vocabulary was made for.
            Tokens that it needs and the vocabulary lacks are added, each with the mean of all rows.
        vocab_multiple: the stored vocabulary is padded to a multiple of it, so that it can be sharded.

    Raises:
        UserError: whatever is missing, cut off, or does not fit together.
    """
    path = locate(name_or_path)
    if adapter.is_adapter(path):
        return _load_adapted(str(name_or_path), path, dtype, template, vocab_multiple)
    kind = as_dtype(dtype)
    row: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    if path.suffix == ".gguf" and path.is_file():
        config, params = gguf.load(path, kind, vocab_multiple)
        fields = read_gguf_header(path).fields
        duplex = (gguf.TEMPLATE_FIELD, gguf.IDLE_BIAS_FIELD, gguf.IN_SLICES_FIELD)
        row = {"duplex": {name.removeprefix("duplex."): fields.get(name) for name in duplex}}
    elif orbax.is_store(path):
        config, params = orbax.load(path, kind, vocab_multiple)
        row, generation = _side_files(path)
    elif path.is_dir() or path.suffix in (".safetensors", ".bin"):
        folder = path if path.is_dir() else path.parent
        row, generation = _side_files(folder)
        config, params = huggingface.load(path, kind, vocab_multiple)
    else:
        raise UserError(f"{path}: is no model; give a folder, or a .gguf or .safetensors file")
    tokenizer = resolve_tokenizer(path)
    name = template or _template_of(row, path) or default_template(tokenizer)
    in_slices = _in_slices(row, name, tokenizer)
    if missing := missing_tokens(name, tokenizer):
        config, params, tokenizer = add_tokens(config, params, tokenizer, missing)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size} rows; "
                        "they do not belong together")  # fmt: skip
    made = make_template(name, tokenizer, _idle_bias_of(row, path), in_slices)
    return LoadedModel(str(name_or_path), config, params, tokenizer, made, generation)


def _load_adapted(name: str, path: Path, dtype: Any, template: str | None, vocab_multiple: int) -> LoadedModel:
    """An adapter's base with the updates merged."""
    what, trained = adapter.read(path)
    try:
        base = load_model(what.base, dtype=dtype, template=template or what.template, vocab_multiple=vocab_multiple)
    except UserError as e:
        raise UserError(f"model {name!r} needs its base: {e}") from e
    params = adapter.merge(path, what, base.config, base.params, trained)
    made = make_template(base.template.name, base.tokenizer, what.idle_bias, in_slices=True)
    return dataclasses.replace(base, name=name, params=params, template=made)


def _side_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A folder's `config.json` and the sampling defaults of its `generation_config.json`."""
    config = huggingface.read_json(folder / "config.json")
    path = folder / "generation_config.json"
    generation = huggingface.read_json(path) if path.is_file() else {}
    return config, {k: generation[k] for k in ("temperature", "top_p", "top_k") if generation.get(k) is not None}


def _template_of(row: dict[str, Any], path: Path) -> str | None:
    duplex = row.get("duplex") or {}
    name = duplex.get("template") if isinstance(duplex, dict) else None
    if name is not None and name not in TEMPLATES:
        where = "its metadata" if path.suffix == ".gguf" else "config.json"
        raise UserError(f"{path}: {where} names the template {name!r}; one of {', '.join(TEMPLATES)}, or --template")
    return name


def _idle_bias_of(row: dict[str, Any], path: Path) -> float:
    duplex = row.get("duplex") or {}
    bias = (duplex.get("idle_bias") if isinstance(duplex, dict) else None) or 0.0
    if not isinstance(bias, (int, float)) or not math.isfinite(bias):
        raise UserError(f"{path}: duplex.idle_bias is {bias!r}; must be a number")
    return float(bias)


def _in_slices(row: dict[str, Any], template: str, tokenizer: Tokenizer) -> bool:
    """Whether a model was trained on slices. Files that do not say so are told by a template, or a token, that no
    other model has."""
    duplex = row.get("duplex")
    if not isinstance(duplex, dict):
        return "<idle>" in tokenizer.special
    said = duplex.get("in_slices")
    return said if isinstance(said, bool) else duplex.get("template") == template == "compact"


def duplex_metadata(model: LoadedModel) -> dict[str, Any]:
    """What `config.json` says under `duplex`: the template, the ids that end a slice, and, where they are not as usual,
    the bias on idle and whether the model was trained on slices."""
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
    """Writes a model as what `load_model` reads: a folder with weights, config, tokenizer and sampling defaults.

    Args:
        model: what to write.
        folder: appears complete or not at all; a file's name for `gguf`.
        format: `hf` for transformers, `orbax` for a store that the trainer starts from, `gguf` for llama.cpp.
        dtype: of the weights; None keeps their own. For `gguf` one of `gguf.WRITTEN`, float16 by default.
        hf_type: see `huggingface.save`.
        overwrite: replaces a folder that is there and not empty, or a file.

    Raises:
        UserError: unknown format, dtype or type, something that is there, or a place that cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; one of {', '.join(FORMATS)}")
    if hf_type not in huggingface.TYPES:
        raise UserError(f"hf_type {hf_type!r} is unknown; one of {', '.join(huggingface.TYPES)}")
    if format == "gguf":
        duplex = duplex_metadata(model)
        gguf.save(model.config, model.params, model.tokenizer, folder, dtype or "float16", duplex, overwrite)
        return
    kind = as_dtype(dtype)
    with atomic_folder(folder, overwrite) as aside:
        check_space(folder, sum(x.size * (kind or x.dtype).itemsize for x in jax.tree.leaves(model.params)))
        model.tokenizer.save(aside)
        huggingface.save_config(
            aside,
            model.config,
            model.generation,
            kind or model.params["embed"].dtype,
            hf_type,
            {"duplex": duplex_metadata(model)},
        )
        if format == "orbax":
            orbax.save(aside, model.config, model.params, kind)
        else:
            huggingface.save_weights(aside, model.config, model.params, kind)


def add_tokens(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, tokens: Sequence[str]
) -> tuple[ModelConfig, Params, Tokenizer]:
    """Adds control tokens to a vocabulary: rows that no token had so far, else new ones.

    A new row of the embedding, and of the head where it is untied, is the mean of the old ones: it makes the new
    token about as likely as an average one (Hewitt 2021, "Initializing new word embeddings").

    Returns:
        The changed config, tree and tokenizer; the given ones stay as they are.
    """
    first = tokenizer.vocab_size
    tokenizer = tokenizer.with_tokens(tokens)
    grown = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    params = dict(params)
    for name in ("embed", "head"):
        if name in params:
            old = np.asarray(params[name])
            table = np.zeros((grown.padded_vocab_size, old.shape[1]), old.dtype)
            table[: config.vocab_size] = old[: config.vocab_size]
            table[first : tokenizer.vocab_size] = old[: min(first, config.vocab_size)].mean(axis=0, dtype=np.float32)
            params[name] = table
    return grown, params, tokenizer
