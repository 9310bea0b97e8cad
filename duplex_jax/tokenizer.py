"""Tokenizers under one interface: plain text to ids and ids to bytes, with control tokens kept apart.

`encode` never returns a control token, whatever the text says: `<idle>`, `</s>` or `<|im_end|>` typed by a user are
ordinary characters. Control tokens are reached by name only, through `special`.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from duplex_jax.errors import UserError


class Tokenizer(Protocol):
    """What templates, generators and sessions need of a tokenizer."""

    special: dict[str, int]
    """Control tokens: their content and id."""

    vocab_size: int
    """One more than the largest id."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no control token, nothing put in front or behind."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text; a control token gives its content."""
        ...

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """A tokenizer that has these control tokens too, with ids from `vocab_size` on."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the files by which transformers (and `load_tokenizer`) find this tokenizer."""
        ...


def decode_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The bytes of a run of ids; joined runs give joined bytes."""
    return b"".join(tokenizer.token_bytes(i) for i in ids)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a run of ids; bytes that are no UTF-8 become U+FFFD."""
    return decode_bytes(tokenizer, ids).decode("utf-8", errors="replace")


def complete_utf8(data: bytes) -> int:
    """The length of the longest prefix of `data` that cuts no character in two."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        width = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(data) - back if width > back else len(data)
    return len(data)


class SentencePieceTokenizer:
    """A SentencePiece `.model`, with the added tokens of the folder it came from.

    Args:
        model: the serialized model.
        added: ids of tokens that the folder adds after the model's own.
        where: the file, for messages.
        config: `tokenizer_config.json`, kept for `save`.
    """

    def __init__(
        self,
        model: bytes,
        added: Mapping[str, int] | None = None,
        where: str = "tokenizer.model",
        config: Mapping[str, Any] | None = None,
    ):
        import sentencepiece

        self._model = model
        self._added = dict(added or {})
        self._config = dict(config or {})
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model)
        except Exception as e:
            raise UserError(f"{where}: is no SentencePiece model; give the released tokenizer.model") from e
        n = self._sp.get_piece_size()
        self.special = {self._sp.id_to_piece(i): i for i in range(n) if self._sp.is_control(i)} | self._added
        self.vocab_size = max([n - 1, *self._added.values()]) + 1
        self._dummy_prefix = self._sp.encode("a", out_type=str)[0].startswith("▁")
        self._names = {i: name.encode() for name, i in self.special.items()}
        self._space_bytes = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in "▁".encode()]

    def encode(self, text: str) -> list[int]:
        # U+2581 stands for a space inside SentencePiece; a literal one goes in as its three bytes, and comes back.
        ids: list[int] = []
        for i, part in enumerate(text.split("▁")):
            if i:
                ids += self._space_bytes
            if part:
                ids += self._without_prefix(part) if self._dummy_prefix else self._sp.encode(part)
        return ids

    def _without_prefix(self, part: str) -> list[int]:
        # The model puts a space in front of every text; it goes in front of a newline that is cut off again.
        newline = self._sp.encode("\n")
        ids = self._sp.encode("\n" + part)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._sp.encode(part)

    @functools.cache  # noqa: B019 - one tokenizer a process
    def token_bytes(self, token: int) -> bytes:
        if token in self._names:
            return self._names[token]
        if token >= self._sp.get_piece_size():
            return b""
        piece = self._sp.id_to_piece(token)
        if self._sp.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def with_tokens(self, tokens: Sequence[str]) -> "SentencePieceTokenizer":
        added = {t: self.vocab_size + i for i, t in enumerate(tokens)}
        return SentencePieceTokenizer(self._model, self._added | added, config=_with_added(self._config, added))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        (folder / "tokenizer.model").write_bytes(self._model)
        if self._added:
            (folder / "added_tokens.json").write_text(json.dumps(self._added, indent=1, ensure_ascii=False))
        if self._config:
            (folder / "tokenizer_config.json").write_text(json.dumps(self._config, indent=1, ensure_ascii=False))

    def gguf_fields(self, vocab_size: int) -> dict[str, Any]:
        """See `gguf_fields` of this module."""
        from sentencepiece import sentencepiece_model_pb2 as pb

        proto = pb.ModelProto.FromString(self._model)  # type: ignore[attr-defined]
        pieces = {i: (p.piece, int(p.type)) for i, p in enumerate(proto.pieces)}
        config = {"bos_token": "<s>", "eos_token": "</s>", **self._config}
        fields = _gguf_vocabulary(self, "llama", pieces, vocab_size, config)
        scores = [float(p.score) for p in proto.pieces]
        fields["tokenizer.ggml.scores"] = scores + [0.0] * (len(fields["tokenizer.ggml.tokens"]) - len(scores))
        return fields | {"tokenizer.ggml.add_space_prefix": self._dummy_prefix}


class HFTokenizer:
    """A Hugging Face `tokenizer.json`; its added tokens are control tokens and are never found in text.

    Args:
        spec: the parsed `tokenizer.json`.
        where: the file, for messages.
        config: `tokenizer_config.json`, kept for `save`.
    """

    def __init__(self, spec: Mapping[str, Any], where: str = "tokenizer.json", config: Mapping[str, Any] | None = None):
        import tokenizers

        self._spec = dict(spec)
        self._config = dict(config or {})
        # Without its added tokens and post-processor the tokenizer sees plain text and adds nothing to it.
        plain = self._spec | {"added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
        try:
            self.special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))
        except Exception as e:
            raise UserError(f"{where}: is no tokenizer that the tokenizers package reads ({e})") from e
        self._by_id = {i: token for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items()}
        self._byte_level = "ByteLevel" in json.dumps(spec.get("decoder") or {})
        self._names = {i: name.encode() for name, i in self.special.items()}
        self.vocab_size = max([*self._by_id, *self._names]) + 1
        self._unspelled = _unspelled(set(self._by_id.values())) if self._byte_level else None

    def encode(self, text: str) -> list[int]:
        if self._unspelled is not None:
            text = self._unspelled.sub("\ufffd", text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if any(i in self._names for i in ids):  # a vocabulary that lists a control token among its words
            return [i for c in text for i in self._tokenizer.encode(c, add_special_tokens=False).ids]
        return ids

    @functools.cache  # noqa: B019 - one tokenizer a process
    def token_bytes(self, token: int) -> bytes:
        if token in self._names:
            return self._names[token]
        piece = self._by_id.get(token, "")
        if self._byte_level:
            return bytes(_UNICODE_TO_BYTE[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def with_tokens(self, tokens: Sequence[str]) -> "HFTokenizer":
        added = {t: self.vocab_size + i for i, t in enumerate(tokens)}
        entries = [_added_token(i, t) for t, i in added.items()]
        spec = self._spec | {"added_tokens": [*self._spec.get("added_tokens", []), *entries]}
        return HFTokenizer(spec, config=_with_added(self._config, added))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(json.dumps(self._spec, ensure_ascii=False))
        (folder / "tokenizer_config.json").write_text(json.dumps(self._config, indent=1, ensure_ascii=False))

    def gguf_fields(self, vocab_size: int) -> dict[str, Any]:
        """See `gguf_fields` of this module."""
        model, splitter = self._spec["model"], self._spec.get("pre_tokenizer")
        pre = next((name for name, known in _PRE_TOKENIZERS.items() if known == splitter), None)
        is_bpe = model.get("type") == "BPE" and bool(model.get("merges")) and self._byte_level
        if not is_bpe or pre is None or self._spec.get("normalizer"):
            raise UserError("this tokenizer.json splits text in a way that has no name in GGUF; byte-level BPE as of "
                            f"{', '.join(_PRE_TOKENIZERS)} can be written; --format=hf")  # fmt: skip
        pieces = {i: (token, _NORMAL) for i, token in self._by_id.items()}
        fields = _gguf_vocabulary(self, "gpt2", pieces, vocab_size, self._config)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        return fields | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def _added_token(token: int, content: str) -> dict[str, Any]:
    """A control token's entry in `tokenizer.json`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": True}


def _with_added(config: Mapping[str, Any], added: Mapping[str, int]) -> dict[str, Any]:
    """`tokenizer_config.json` with more control tokens, where it lists them."""
    known = config.get("added_tokens_decoder")
    if known is None:
        return dict(config)
    entries = {str(i): {k: v for k, v in _added_token(i, t).items() if k != "id"} for t, i in added.items()}
    return {**config, "added_tokens_decoder": {**known, **entries}}


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level BPE: character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_UNICODE_TO_BYTE = _byte_alphabet()


def _unspelled(vocabulary: set[str]) -> re.Pattern[str] | None:
    """Matches characters that a byte-level vocabulary cannot spell, for want of their first byte; None: it spells all.

    SmolLM2's lacks six control characters and the lead bytes of unassigned planes. Dropped in silence, as BPE does it,
    they would leave empty slices and halves of characters; as U+FFFD they stay one character.
    """
    ranges = []
    for stand_in, byte in _UNICODE_TO_BYTE.items():
        if stand_in in vocabulary:
            continue
        if byte < 0x80:
            ranges.append((byte, byte))
        elif 0xC2 <= byte < 0xF5:
            shift = 6 if byte < 0xE0 else 12 if byte < 0xF0 else 18
            first = (byte & (0x1F if shift == 6 else 0x0F if shift == 12 else 0x07)) << shift
            ranges.append((first, min(first + (1 << shift) - 1, 0x10FFFF)))
    if not ranges:
        return None
    return re.compile("[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges) + "]")


def from_gguf_fields(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer inside a GGUF file.

    Args:
        fields: the file's `tokenizer.*` metadata, as plain Python values.
        where: the file, for messages.

    Raises:
        UserError: a kind of vocabulary that is not supported.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{where}: vocabulary of kind {kind!r} is not supported; 'gpt2' and 'llama' are")
    try:
        return _from_gguf_fields(kind, fields, where)
    except (KeyError, ValueError, TypeError, IndexError) as e:
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
    }
    return SentencePieceTokenizer(_sentencepiece_model(fields, tokens, types), where=where, config=config)


# How each `tokenizer.ggml.pre` splits text before BPE. llama.cpp keeps the same list by name.
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
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"{where}: pre-tokenizer {pre!r} is not supported; {', '.join(_PRE_TOKENIZERS)} are")
    return {
        "version": "1.0",
        "added_tokens": [_added_token(i, t) for t, i in control.items()],
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
    """The `tokenizer.*` metadata of a GGUF file; `from_gguf_fields` is the inverse.

    Args:
        tokenizer: byte-level BPE, or SentencePiece.
        vocab_size: rows of the embedding; ids that the tokenizer lacks become unused tokens.

    Raises:
        UserError: a kind of vocabulary, or a way to split text, that has no name in GGUF.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.gguf_fields(vocab_size)
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.gguf_fields(vocab_size)
    raise UserError(f"a {type(tokenizer).__name__} cannot be written as GGUF; --format=hf")


_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


def _gguf_vocabulary(
    tokenizer: Tokenizer, kind: str, pieces: Mapping[int, tuple[str, int]], vocab_size: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What both kinds of vocabulary have; `pieces` maps ids to a token and its type."""
    control = {i: (t, _CONTROL) for t, i in tokenizer.special.items()}
    known = {**pieces, **control}
    listed = [known.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(max(vocab_size, tokenizer.vocab_size))]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [t for t, _ in listed],
        "tokenizer.ggml.token_type": [k for _, k in listed],
        # Templates write every control token themselves.
        "tokenizer.ggml.add_bos_token": bool(config.get("add_bos_token", False)),
    }
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if token in tokenizer.special:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = tokenizer.special[token]
    if isinstance(config.get("chat_template"), str):
        fields["tokenizer.chat_template"] = config["chat_template"]
    return fields


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.model` (with `added_tokens.json`) or `tokenizer.json`.

    Raises:
        UserError: neither file is there, or one cannot be read.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json") or {}
    model = folder / "tokenizer.model"
    # A tokenizer.model is preferred: its pieces are exact bytes, and a converted tokenizer.json may not be.
    if model.is_file():
        added = {t["content"]: int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
        added |= _read_json(folder / "added_tokens.json") or {}
        return SentencePieceTokenizer(model.read_bytes(), added, str(model), config)
    spec = _read_json(folder / "tokenizer.json")
    if spec is None:
        raise UserError(f"{folder}: no tokenizer there; a tokenizer.model or tokenizer.json belongs to a model")
    return HFTokenizer(spec, str(folder / "tokenizer.json"), config)


def resolve_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer that a flag means: a model folder, a `.gguf` file, `hf:owner/name`, or a registered name.

    Raises:
        UserError: nothing of that name, or no tokenizer in it.
    """
    from duplex_jax.sources import locate, read_gguf_header

    path = locate(name_or_path, weights=False)
    adapter = _read_json(path / "adapter.json")
    if adapter is not None:  # a LoRA adapter has its base's
        return resolve_tokenizer(adapter["base"])
    if path.is_dir() or path.suffix == ".safetensors":
        return load_tokenizer(path if path.is_dir() else path.parent)
    if path.suffix == ".gguf":
        return from_gguf_fields(read_gguf_header(path).fields, str(path))
    raise UserError(f"{path}: holds no tokenizer; give the model's folder or a .gguf file")


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"{path}: is no JSON ({e}); fetch it again") from e
    if not isinstance(row, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(row).__name__}; fetch it again")
    return row
