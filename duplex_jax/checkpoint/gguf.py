"""GGUF files: reads config, weights (dequantised) and tokenizer; writes models as GGUF."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duplex_jax.checkpoint.names import DTYPES, Tensor, assemble, disassemble, parts, read_array
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_path, check_new_file, check_space
from duplex_jax.gguf_vocabulary import gguf_fields
from duplex_jax.model.config import ModelConfig, RopeScaling
from duplex_jax.model.tree import Params
from duplex_jax.sources import GGUFHeader, GGUFTensor, read_gguf_header
from duplex_jax.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "minicpm")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K")
WRITTEN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""GGUF types of the matrices that `save` can write; norms are always float32."""

# If one of these fields is set, the file needs arithmetic that this model does not have.
_UNSUPPORTED = ("expert_count", "attention.sliding_window", "attention.key_length_mla", "attention.kv_lora_rank")


def load(
    path: str | Path, dtype: np.dtype | None = None, vocab_multiple: int = 1, unread: bool = False
) -> tuple[ModelConfig, Params]:
    """Config and stacked numpy weights of a GGUF file.

    Args:
        path: a file of architecture `llama` or `minicpm` whose tensors have types in `TYPES`.
        dtype: dtype of the result; None makes quantised tensors float32 and keeps the others' own.
        vocab_multiple: the vocabulary is padded to a multiple of this.
        unread: see `names.assemble`.

    Raises:
        UserError: unsupported architecture or tensor type; a tensor is missing, truncated or has the wrong shape.
    """
    header = read_gguf_header(path)
    config = read_config(header, str(path), vocab_multiple)
    return config, assemble(config, _tensors(Path(path), header, config), "gguf", str(path), dtype, unread)


def read_config(header: GGUFHeader, where: str, vocab_multiple: int = 1) -> ModelConfig:
    """The model that a GGUF file's metadata describes.

    Raises:
        UserError: a field is missing or not supported; the message names it.
    """
    arch = header.fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(f"{where}: architecture {arch!r} is not supported; {' and '.join(ARCHITECTURES)} are")
    fields = {k.removeprefix(arch + "."): v for k, v in header.fields.items() if k.startswith(arch + ".")}
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise UserError(f"{where}: {arch}.{name}={fields[name]} is not supported; only plain dense blocks are")
    try:
        hidden, heads, layers = (int(fields[k]) for k in ("embedding_length", "attention.head_count", "block_count"))
        head_dim = int(fields.get("attention.key_length") or hidden // heads)
        if int(fields.get("rope.dimension_count") or head_dim) != head_dim:
            raise UserError(f"{where}: {arch}.rope.dimension_count is not supported; every dimension is rotated")
        scales: dict[str, Any] = {}
        if arch == "minicpm":  # files older than these keys are of MiniCPM-2B
            scales = {
                "scale_emb": float(fields.get("embedding_scale", 12.0)),
                "scale_depth": float(fields.get("residual_scale", 1.4 / math.sqrt(layers))) * math.sqrt(layers),
                "dim_model_base": hidden / float(fields.get("logit_scale", hidden / 256)),
            }
        tokens = header.fields.get("tokenizer.ggml.tokens") or ()
        return ModelConfig(
            vocab_size=int(fields.get("vocab_size") or len(tokens)),
            hidden_size=hidden,
            intermediate_size=int(fields["feed_forward_length"]),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(fields.get("attention.head_count_kv") or heads),
            head_dim=head_dim,
            max_position_embeddings=int(fields["context_length"]),
            rms_norm_eps=_shortest(fields["attention.layer_norm_rms_epsilon"]),
            rope_theta=_shortest(fields.get("rope.freq_base", 10000.0)),
            rope_scaling=_rope_scaling(fields, header, where),
            **scales,
            tie_word_embeddings="output.weight" not in header.tensors,
            vocab_multiple=vocab_multiple,
            bos_token_id=header.fields.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=header.fields.get("tokenizer.ggml.eos_token_id"),
        )
    except KeyError as e:
        raise UserError(f"{where}: {arch}.{e.args[0]} is missing; it gives the model's shape") from None
    except (TypeError, ValueError, ArithmeticError) as e:
        raise UserError(f"{where}: a field has the wrong type or value ({e}); fetch it again") from e
    except UserError as e:
        raise UserError(f"{where}: {str(e).removeprefix(f'{where}: ')}") from None


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(fields: Mapping[str, Any], header: GGUFHeader, where: str) -> RopeScaling:
    # As llama.cpp reads them: the older key is a synonym of the newer one, and a factor without a type is linear.
    factor = float(fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0)
    kind = fields.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
    longest = int(fields["context_length"])
    original = int(fields.get("rope.scaling.original_context_length", longest))
    if "rope_factors_long.weight" in header.tensors:
        short, long = (_factors(header, f"rope_factors_{x}.weight", where) for x in ("short", "long"))
        scale = float(fields.get("rope.scaling.attn_factor", 1.0))
        return RopeScaling("longrope", longest / original, original, attention_factor=scale,
                           short_factor=short, long_factor=long)  # fmt: skip
    if "rope_freqs.weight" in header.tensors:  # Llama 3.1's scaling, precomputed: a divisor per frequency
        divisors = _factors(header, "rope_freqs.weight", where)
        return RopeScaling("longrope", 1.0, longest, attention_factor=1.0, short_factor=divisors, long_factor=divisors)
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind, factor, original)
    if kind == "yarn":
        for name, plain in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
            if float(fields.get(f"rope.scaling.{name}", plain)) != plain:
                raise UserError(f"{where}: rope.scaling.{name} is not supported; fetch the model as safetensors")
        times = fields.get("rope.scaling.attn_factor")
        return RopeScaling(
            kind,
            factor,
            original,
            beta_fast=float(fields.get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(fields.get("rope.scaling.yarn_beta_slow", 1.0)),
            # llama.cpp multiplies the formula's default by this factor.
            attention_factor=None if times is None else float(times) * (1 + 0.1 * math.log(factor)),
        )
    raise UserError(f"{where}: rope.scaling.type={kind!r} is not supported; none, linear, yarn and longrope are")


def _factors(header: GGUFHeader, name: str, where: str) -> tuple[float, ...]:
    entry = header.tensors.get(name)
    if entry is None or entry.type != 0 or len(entry.shape) != 1:
        raise UserError(f"{where}: tensor {name} must be a row of float32; fetch the file again")
    with open(where, "rb") as f:
        f.seek(entry.offset)
        data = f.read(4 * entry.shape[0])
    if len(data) < 4 * entry.shape[0]:
        raise UserError(f"{where}: cut off in tensor {name} {list(entry.shape)}; fetch it again")
    return tuple(map(_shortest, np.frombuffer(data, "<f4")))


def _tensors(path: Path, header: GGUFHeader, config: ModelConfig) -> dict[str, Tensor]:
    import gguf

    length = path.stat().st_size

    def tensor(name: str, entry: GGUFTensor) -> Tensor:
        known = {t.value: t.name for t in gguf.GGMLQuantizationType}
        kind = known.get(entry.type, str(entry.type))
        if kind not in TYPES:
            raise UserError(f"{path}: tensor {name} {list(entry.shape)} is of type {kind}; {', '.join(TYPES)} are read")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.type)]
        if not entry.shape or entry.shape[-1] % block:
            raise UserError(f"{path}: tensor {name} {list(entry.shape)} is not a whole number of {kind} blocks; fetch "
                            "it again")  # fmt: skip
        bytes_ = math.prod(entry.shape) // block * size
        if entry.offset + bytes_ > length:
            raise UserError(
                f"{path}: cut off in tensor {name} {list(entry.shape)} ({kind}, up to byte "
                f"{entry.offset + bytes_}; the file has {length}); fetch it again"
            )
        heads = None
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_heads if name.endswith("attn_q.weight") else config.num_kv_heads
        dtype = {"F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}.get(kind, DTYPES["float32"])

        def read() -> np.ndarray:
            rows = (*entry.shape[:-1], entry.shape[-1] // block * size)
            raw = read_array(path, entry.offset, bytes_, np.dtype(np.uint8), rows)
            return _dequantise(raw, kind, entry.shape, heads)

        return Tensor(entry.shape, dtype, str(path), read)

    return {name: tensor(name, entry) for name, entry in header.tensors.items()}


def _dequantise(raw: np.ndarray, kind: str, shape: tuple[int, ...], heads: int | None) -> np.ndarray:
    if heads and shape[0] % (2 * heads) == 0:
        # llama.cpp rotates adjacent dimensions, Hugging Face halves: GGUF interleaves the rows of each head.
        raw = raw.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape[0], -1)
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}[kind]
        return np.ascontiguousarray(raw).reshape(-1).view(dtype).reshape(shape)
    import gguf

    # The package dequantises 16 rows per call, so rows are joined; blocks are contiguous, which permits that.
    rows, join = raw.reshape(-1, raw.shape[-1]), 1
    while rows.shape[0] % (2 * join) == 0 and rows.shape[1] * join < 4096:
        join *= 2
    wide = np.ascontiguousarray(rows).reshape(rows.shape[0] // join, -1)
    return gguf.quants.dequantize(wide, gguf.GGMLQuantizationType[kind]).reshape(shape)


def save(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    path: str | Path,
    dtype: str = "float16",
    said: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a GGUF file with its tokenizer, of architecture `llama`, or `minicpm` if a scale is not 1.

    Tensors are copied one at a time. Format: ggml's docs/gguf.md.

    Args:
        config: the model; vocabulary padding is left out.
        params: its weights, numpy or jax.
        tokenizer: byte-level BPE or SentencePiece.
        path: the file; appears complete or not at all.
        dtype: one of `WRITTEN`.
        said: additional metadata, such as `general.name`, under which llama.cpp and related programs list the model.
        overwrite: replace an existing file.

    Raises:
        UserError: unknown dtype; GGUF cannot represent the model or tokenizer; the file exists or cannot be written.
    """
    import gguf

    if dtype not in WRITTEN:
        raise UserError(f"dtype {dtype!r} is not written as GGUF; one of {', '.join(WRITTEN)}")
    if config.rope_scaling.type != "default":
        raise UserError(f"rope scaling {config.rope_scaling.type!r} is not written as GGUF; --format=hf")
    path = check_new_file(path, overwrite)
    logging.getLogger("gguf").setLevel(logging.WARNING)  # by default it logs its plan
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[WRITTEN[dtype]]]
    types, sizes, wanted = {}, {}, list(parts(config, "gguf"))
    for part in wanted:
        # Norms, and rows that do not divide into blocks, get the same types as in llama.cpp's own converter.
        name = "F32" if len(part.shape) == 1 else WRITTEN[dtype] if part.shape[-1] % block == 0 else "F16"
        types[part.name] = gguf.GGMLQuantizationType[name]
        items, size = gguf.GGML_QUANT_SIZES[types[part.name]]
        sizes[part.name] = math.prod(part.shape) // items * size
    check_space(path, sum(sizes.values()))

    scaled = (config.scale_emb, config.residual_scale, config.logit_divisor) != (1.0, 1.0, 1.0)
    arch = "minicpm" if scaled else "llama"
    fields = _metadata(config, arch) | gguf_fields(tokenizer, config.vocab_size)
    fields["general.file_type"] = int(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    fields |= said or {}
    with atomic_path(path) as aside:
        writer = gguf.GGUFWriter(aside, arch)
        try:
            for name, value in fields.items():
                _add_field(writer, name, value)
            for part in wanted:
                writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), sizes[part.name], types[part.name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for part in wanted:
                value = disassemble(config, params, part, DTYPES["float32"])
                if part.name.endswith(("attn_q.weight", "attn_k.weight")):
                    value = _interleave(value, config.num_heads if "attn_q" in part.name else config.num_kv_heads)
                writer.write_tensor_data(gguf.quants.quantize(value, types[part.name]))
        finally:
            writer.close()


_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _metadata(config: ModelConfig, arch: str) -> dict[str, Any]:
    """The fields that `read_config` reads."""
    own: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if arch == "minicpm":
        own |= {
            "embedding_scale": config.scale_emb,
            "residual_scale": config.residual_scale,
            "logit_scale": config.logit_divisor,
        }
    ids = {f"tokenizer.ggml.{n}_token_id": getattr(config, f"{n}_token_id") for n in ("bos", "eos")}
    return {f"{arch}.{k}": v for k, v in own.items()} | {k: v for k, v in ids.items() if v is not None}


def _add_field(writer: Any, name: str, value: Any) -> None:
    import gguf

    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(name, value)  # omits empty arrays, which GGUF does not allow
    else:
        kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
        writer.add_key_value(name, value, kind)


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of the permutation of q and k rows in `_dequantise`."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        return weight
    halves = weight.reshape(heads, 2, rows // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
