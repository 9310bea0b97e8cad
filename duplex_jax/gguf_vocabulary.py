"""GGUF vocabularies: a tokenizer from a file's metadata, and the metadata from a tokenizer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, added_token, token_names

_log = logging.getLogger(__name__)


def from_gguf_fields(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer inside a GGUF file.

    Args:
        fields: the file's `tokenizer.*` metadata, as plain Python values.
        where: the file, for error messages.

    Raises:
        UserError: the kind of vocabulary is not supported.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{where}: vocabulary of kind {kind!r} is not supported; 'gpt2' and 'llama' are")
    try:
        return _from_gguf_fields(kind, fields, where)
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as e:
        raise UserError(f"{where}: its vocabulary is incomplete ({e}); fetch it again") from e


def _from_gguf_fields(kind: str, fields: Mapping[str, Any], where: str) -> Tokenizer:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    control = {t: i for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k in (3, 4)}
    names = {
        k: tokens[i]
        for k in ("bos", "eos", "unknown", "padding")
        if (i := fields.get(f"tokenizer.ggml.{k}_token_id")) is not None
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": fields.get("tokenizer.chat_template"),
        "bos_token": names.get("bos"), "eos_token": names.get("eos"),
        "unk_token": names.get("unknown"), "pad_token": names.get("padding"),
    }  # fmt: skip
    config = {k: v for k, v in config.items() if v is not None}
    if kind == "gpt2":
        return HFTokenizer(_byte_level_spec(fields, tokens, control, where), where, config)
    config |= {
        "tokenizer_class": "LlamaTokenizer",
        "add_prefix_space": bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", True)),
        "legacy": True,  # a space before every run of text, as in llama.cpp
    }
    return SentencePieceTokenizer(_sentencepiece_model(fields, tokens, types), where=where, config=config)


# How each `tokenizer.ggml.pre` splits text before BPE; llama.cpp has the same list.
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _regex_split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]},
    "llama-bpe": _regex_split(_LLAMA3_REGEX),
    "qwen2": _regex_split(_LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def _byte_level_spec(
    fields: Mapping[str, Any], tokens: Sequence[str], control: Mapping[str, int], where: str
) -> dict[str, Any]:
    pre = fields.get("tokenizer.ggml.pre")
    if pre is None:
        _log.warning(
            "%s: has no tokenizer.ggml.pre, which says how text is split; it is split as GPT-2's, and where that is "
            "wrong the model reads badly: convert the model again",
            where,
        )
        pre = "gpt-2"
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"{where}: pre-tokenizer {pre!r} is not supported; {', '.join(_PRE_TOKENIZERS)} are")
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, t) for t, i in control.items()],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": list(fields["tokenizer.ggml.merges"]),
        },
    }  # fmt: skip


def _sentencepiece_model(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto()  # type: ignore[attr-defined]
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    for piece, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=piece, score=float(score), type=int(kind))
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.vocab_size = len(tokens)
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString()


def gguf_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a GGUF file; inverse of `from_gguf_fields`.

    Args:
        tokenizer: byte-level BPE or SentencePiece.
        vocab_size: rows of the embedding; ids that the tokenizer lacks become unused tokens.

    Raises:
        UserError: GGUF has no name for this kind of vocabulary or way of splitting text.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece_fields(tokenizer, vocab_size)
    if isinstance(tokenizer, HFTokenizer):
        return _byte_level_fields(tokenizer, vocab_size)
    raise UserError(f"a {type(tokenizer).__name__} cannot be written as GGUF; --format=hf")


_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


def _gguf_vocabulary(
    tokenizer: Tokenizer, kind: str, pieces: Mapping[int, tuple[str, int]], vocab_size: int
) -> dict[str, Any]:
    """Fields common to both kinds of vocabulary; `pieces` maps ids to a token and its type."""
    control = {i: (t, _CONTROL) for t, i in tokenizer.special.items()}
    known = {**pieces, **control}
    listed = [known.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(max(vocab_size, tokenizer.vocab_size))]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [t for t, _ in listed],
        "tokenizer.ggml.token_type": [k for _, k in listed],
        # Templates write all control tokens themselves.
        "tokenizer.ggml.add_bos_token": bool(tokenizer.config.get("add_bos_token", False)),
    }
    names = token_names(tokenizer)
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := names.get(f"{name}_token")) in tokenizer.special:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = tokenizer.special[token]
    if isinstance(tokenizer.config.get("chat_template"), str):
        fields["tokenizer.chat_template"] = tokenizer.config["chat_template"]
    return fields


def _sentencepiece_fields(tokenizer: SentencePieceTokenizer, vocab_size: int) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto.FromString(tokenizer.model)  # type: ignore[attr-defined]
    pieces = {i: (p.piece, int(p.type)) for i, p in enumerate(proto.pieces)}
    fields = _gguf_vocabulary(tokenizer, "llama", pieces, vocab_size)
    scores = [float(p.score) for p in proto.pieces]
    fields["tokenizer.ggml.scores"] = scores + [0.0] * (len(fields["tokenizer.ggml.tokens"]) - len(scores))
    return fields | {"tokenizer.ggml.add_space_prefix": tokenizer.dummy_prefix}


def _byte_level_fields(tokenizer: HFTokenizer, vocab_size: int) -> dict[str, Any]:
    model, splitter = tokenizer.spec["model"], tokenizer.spec.get("pre_tokenizer")
    pre = next((name for name, known in _PRE_TOKENIZERS.items() if known == splitter), None)
    is_bpe = model.get("type") == "BPE" and bool(model.get("merges")) and tokenizer.byte_level
    if not is_bpe or pre is None or tokenizer.spec.get("normalizer"):
        raise UserError(
            "this tokenizer.json splits text in a way that has no name in GGUF; byte-level BPE as of "
            f"{', '.join(_PRE_TOKENIZERS)} can be written; --format=hf"
        )
    pieces = {i: (token, _NORMAL) for i, token in tokenizer.pieces.items()}
    fields = _gguf_vocabulary(tokenizer, "gpt2", pieces, vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return fields | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
