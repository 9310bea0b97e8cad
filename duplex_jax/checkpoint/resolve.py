"""Resolves `--model` for every job to everything but its weights: files, tokenizer, template, end tokens."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from duplex_jax.checkpoint import adapter, gguf, orbax, peft
from duplex_jax.errors import UserError
from duplex_jax.gguf_vocabulary import from_gguf_fields
from duplex_jax.schema import Schema, checked, read_json, read_json_beside
from duplex_jax.sources import base_of, locate, read_gguf_header
from duplex_jax.template import TEMPLATES, Template, default_template, make_template, missing_tokens
from duplex_jax.tokenizer import Tokenizer, load_tokenizer

_Id = Annotated[int, Field(ge=0, lt=2**24)]
_ADAPTERS = 8
"""Longest chain of adapters on adapters; a longer one is taken for a cycle."""


class _Duplex(Schema):
    """The `duplex` field of a `config.json`, or the `duplex.*` fields of a GGUF file."""

    template: str | None = None
    idle_bias: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    in_slices: bool | None = None


class _Generation(Schema):
    """Sampling defaults and end tokens from `config.json` and `generation_config.json`."""

    eos_token_id: _Id | Annotated[list[_Id], Field(max_length=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @property
    def ends(self) -> list[int]:
        ids = self.eos_token_id
        return [] if ids is None else ids if isinstance(ids, list) else [ids]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A resolved `--model`.

    Attributes:
        path: location of the weights; for an adapter, those of its base.
        kind: `hf`, `orbax` or `gguf`.
        template: converts timelines to tokens; includes the tokenizer, the model's own idle bias and its end-of-turn
            tokens.
        added: tokens that the template needs and the vocabulary lacked; the last ones of `template.tokenizer`.
        generation: the model's own sampling defaults, such as `temperature` and `top_p`.
        adapters: folders of updates to merge into the weights, in this order.
    """

    path: Path
    kind: str
    template: Template
    added: tuple[str, ...] = ()
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapters: tuple[Path, ...] = ()


def resolve(name_or_path: str | Path, template: str | None = None, weights: bool = True) -> Resolved:
    """Finds a model and reads everything except its weights.

    Args:
        name_or_path: what `--model` takes, see `sources.locate`.
        template: name of the template; None for the one that the model names, or else the one that suits its
            vocabulary.
        weights: False fetches only the config and tokenizer of a repository.

    Raises:
        UserError: a file is missing, truncated, or does not fit the others.
    """
    return _resolve(name_or_path, template, weights, _ADAPTERS)


def load_template(name_or_path: str | Path, template: str = "") -> Template:
    """A model's template and tokenizer, without its weights; see `resolve`."""
    return resolve(name_or_path, template or None, weights=False).template


def _resolve(name_or_path: str | Path, template: str | None, weights: bool, depth: int) -> Resolved:
    path = locate(name_or_path, weights)
    base = base_of(path)
    if base is None:
        return _plain(path, template, weights)
    if not depth:
        raise UserError(f"{path}: is its own base; give the model that it was trained on")
    what = (adapter if adapter.is_adapter(path) else peft).read_config(path)
    try:
        found = _resolve(base, template or what.template or None, weights, depth - 1)
    except UserError as e:
        raise UserError(f"model {str(name_or_path)!r} needs its base: {e}") from e
    tokenizer = found.template.tokenizer
    if not found.added and any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(path)  # PEFT saves the tokenizer used in training with the updates
    ends = sorted(found.template.turn_ends)
    in_slices = bool(what.template) or found.template.in_slices
    made = make_template(found.template.name, tokenizer, what.idle_bias, in_slices, ends)
    return dataclasses.replace(found, template=made, adapters=(*found.adapters, path))


def _plain(path: Path, template: str | None, weights: bool) -> Resolved:
    if path.suffix == ".gguf" and path.is_file():
        kind, where = "gguf", f"{path}: its metadata"
        header = read_gguf_header(path)
        if weights:  # an unsupported model is reported before its vocabulary
            gguf.read_config(header, str(path))
        fields = header.fields
        tokenizer = from_gguf_fields(fields, str(path))
        said = {k.removeprefix("duplex."): v for k, v in fields.items() if k.startswith("duplex.")}
        ids = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        generation = _Generation(eos_token_id=[i for i in ids if isinstance(i, int) and 0 <= i < tokenizer.vocab_size])
        ends, named = generation.ends, checked(_Duplex, said, where)
        has_duplex = bool(said)
    elif path.is_dir() or path.suffix in (".safetensors", ".bin"):
        folder = path if path.is_dir() else path.parent
        kind = "orbax" if orbax.is_store(path) else "hf"
        file = folder / "config.json"
        where = str(file)
        # Without weights, as for packing, a folder with only a tokenizer is enough.
        row = read_json(file, "a model folder has one") if weights or file.is_file() else {}
        more = folder / "generation_config.json"
        generation = checked(_Generation, read_json_beside(more), str(more))
        ends = [*generation.ends, *checked(_Generation, {"eos_token_id": row.get("eos_token_id")}, where).ends]
        tokenizer = load_tokenizer(folder)
        has_duplex = isinstance(row.get("duplex"), dict)
        named = checked(_Duplex, row.get("duplex") or {}, f"{where}: duplex")
    else:
        raise UserError(f"{path}: is not a model; give a folder, or a .gguf or .safetensors file")
    if named.template is not None and named.template not in TEMPLATES:
        raise UserError(f"{where} names the template {named.template!r}; one of {', '.join(TEMPLATES)}, or --template")
    name = template or named.template or default_template(tokenizer)
    in_slices = _in_slices(named, has_duplex, name, tokenizer)
    if missing := missing_tokens(name, tokenizer):
        tokenizer = tokenizer.with_tokens(missing)
    made = make_template(name, tokenizer, named.idle_bias or 0.0, in_slices, ends)
    defaults = generation.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)
    return Resolved(path, kind, made, tuple(missing), defaults)


def _in_slices(named: _Duplex, has_duplex: bool, template: str, tokenizer: Tokenizer) -> bool:
    """Whether a model was trained on slices.

    If its files do not say so, a template or token that only such models have decides.
    """
    if not has_duplex:
        return "<idle>" in tokenizer.special
    return named.in_slices if named.in_slices is not None else named.template == template == "compact"
