"""GGUF files in: config from the metadata, dequantised weights, and the tokenizer inside."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duplex_jax.checkpoint.names import DTYPES, Tensor, assemble, read_array
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig, RopeScaling
from duplex_jax.model.minicpm import Params
from duplex_jax.sources import GGUFHeader, GGUFTensor, read_gguf_header

ARCHITECTURES = ("llama", "minicpm")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

# Arithmetic that this model does not have, where set.
_UNSUPPORTED = ("expert_count", "attention.sliding_window", "attention.key_length_mla", "attention.kv_lora_rank")


def load(path: str | Path, dtype: np.dtype | None = None, vocab_multiple: int = 1) -> tuple[ModelConfig, Params]:
    """Config and stacked numpy weights of a GGUF file.

    Args:
        path: the file, of architecture `llama` or `minicpm`, its tensors of `TYPES`.
        dtype: of the result; None: quantised ones become float32, others stay.
        vocab_multiple: the vocabulary is padded to a multiple of it.

    Raises:
        UserError: another architecture or tensor type, a tensor missing, mis-shaped or cut off.
    """
    header = read_gguf_header(path)
    config = read_config(header, str(path), vocab_multiple)
    return config, assemble(config, _tensors(Path(path), header, config), "gguf", str(path), dtype)


def read_config(header: GGUFHeader, where: str, vocab_multiple: int = 1) -> ModelConfig:
    """The model that a GGUF file's metadata describes.

    Raises:
        UserError: what is missing or not supported, by name.
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
        if arch == "minicpm":  # files from before these keys are MiniCPM-2B
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
    except (TypeError, ValueError) as e:
        raise UserError(f"{where}: a field has the wrong type ({e})") from e


def _shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(fields: Mapping[str, Any], header: GGUFHeader, where: str) -> RopeScaling:
    kind = fields.get("rope.scaling.type", "none")
    factor = float(fields.get("rope.scaling.factor", 1.0))
    longest = int(fields["context_length"])
    original = int(fields.get("rope.scaling.original_context_length", longest))
    if "rope_factors_long.weight" in header.tensors:
        short, long = (_factors(header, f"rope_factors_{x}.weight", where) for x in ("short", "long"))
        scale = float(fields.get("rope.scaling.attn_factor", 1.0))
        return RopeScaling("longrope", longest / original, original, attention_factor=scale,
                           short_factor=short, long_factor=long)  # fmt: skip
    if "rope_freqs.weight" in header.tensors:  # Llama 3.1's scaling, worked out: a divisor for each frequency
        divisors = _factors(header, "rope_freqs.weight", where)
        return RopeScaling("longrope", 1.0, longest, attention_factor=1.0, short_factor=divisors, long_factor=divisors)
    if kind == "none":
        return RopeScaling()
    if kind in ("linear", "yarn"):
        return RopeScaling(kind, factor, original)
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
            raise UserError(f"{path}: tensor {name} {list(entry.shape)} is no whole number of {kind} blocks; fetch it "
                            "again")  # fmt: skip
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
        # llama.cpp rotates neighbours where Hugging Face rotates halves: its rows are interleaved, head by head.
        raw = raw.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape[0], -1)
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}[kind]
        return np.ascontiguousarray(raw).reshape(-1).view(dtype).reshape(shape)
    import gguf

    # The package works 16 rows at a time; wide rows cost it fewer calls. Blocks lie in a run, so rows may be joined.
    rows, join = raw.reshape(-1, raw.shape[-1]), 1
    while rows.shape[0] % (2 * join) == 0 and rows.shape[1] * join < 4096:
        join *= 2
    wide = np.ascontiguousarray(rows).reshape(rows.shape[0] // join, -1)
    return gguf.quants.dequantize(wide, gguf.GGMLQuantizationType[kind]).reshape(shape)
