"""Tokenizers behind one interface: plain text to ids, ids to bytes, and control tokens by name only.

`encode` never returns a control token: `<idle>`, `</s>` or `<|im_end|>` typed by a user are ordinary characters.
Control tokens come only from `special`.
"""

import codecs
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import pydantic

from duplex_jax.errors import UserError
from duplex_jax.schema import Schema, checked, read_json, read_json_beside

_MARKER = re.compile(r"<<?\S+>>?|\[\S+\]")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_Id = Annotated[int, pydantic.Field(ge=0, lt=2**24)]


class _AddedToken(Schema):
    content: Annotated[str, pydantic.Field(min_length=1)]
    lstrip: bool = False
    rstrip: bool = False


class _ListedToken(_AddedToken):
    id: _Id


class _Spec(Schema):
    added_tokens: list[_ListedToken] = pydantic.Field(default_factory=list)


class _NamedTemplate(Schema):
    name: str
    template: str


class _TokenizerConfig(Schema):
    added_tokens_decoder: dict[str, _AddedToken] | None = None
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    add_bos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None


class Tokenizer(Protocol):
    """The interface that templates, generators and sessions use."""

    special: dict[str, int]
    """Control tokens: content to id."""

    vocab_size: int
    """One more than the largest id."""

    config: dict[str, Any]
    """`tokenizer_config.json`, including the chat template."""

    strips: dict[str, tuple[bool, bool]]
    """Control tokens that absorb the whitespace on their left and right in a rendered chat template."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without control tokens or a prefix space."""

    def encode_run(self, text: str, first: bool) -> list[int]:
        """Ids of plain text between control tokens, prefix space included; `first`: whether it begins the context."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text; for a control token, its content."""

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """A tokenizer with these control tokens added, with ids from `vocab_size` on."""

    def save(self, folder: str | Path) -> None:
        """Writes the files from which transformers (and `load_tokenizer`) load this tokenizer."""


def decode_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The bytes of a sequence of ids; concatenated sequences give concatenated bytes."""
    return b"".join(tokenizer.token_bytes(i) for i in ids)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
    return decode_bytes(tokenizer, ids).decode("utf-8", errors="replace")


def complete_utf8(data: bytes) -> int:
    """The length of the longest prefix of `data` that ends between two characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    return len(data) - len(decoder.getstate()[0])


class SentencePieceTokenizer:
    """A SentencePiece `.model` with the added tokens of its folder.

    Args:
        model: the serialized model.
        added: ids of tokens that the folder adds to the model's own.
        where: the file, for error messages.
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

        self.model = model
        self.added = dict(added or {})
        self.config = dict(config or {})
        self.strips = _strips(self.config.get("added_tokens_decoder") or {})
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(_without_typed_markers(model, str(self.config.get("chat_template"))))
        except Exception as e:
            raise UserError(f"{where}: is not a SentencePiece model; give the released tokenizer.model") from e
        n = self._sp.get_piece_size()
        self.special = {self._sp.id_to_piece(i): i for i in range(n) if self._sp.is_control(i)} | self.added
        self.vocab_size = max([n - 1, *self.added.values()]) + 1
        self.dummy_prefix = "".join(self._sp.encode("a", out_type=str)).startswith("▁")
        self._names = {i: name.encode() for name, i in self.special.items()}
        self._space_bytes = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in "▁".encode()]

    def encode(self, text: str) -> list[int]:
        return self._encode(text, self._without_prefix if self.dummy_prefix else self._sp.encode)

    def encode_run(self, text: str, first: bool) -> list[int]:
        # Like transformers' LlamaTokenizer: with `legacy` every run gets a prefix space, otherwise only the first.
        wanted = self.config.get("add_prefix_space") is not False and (first or bool(self.config.get("legacy", False)))
        return self._encode(text, self._sp.encode) if self.dummy_prefix and wanted else self.encode(text)

    def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        # U+2581 represents a space in SentencePiece, so a literal one is encoded as its three bytes.
        ids: list[int] = []
        for i, part in enumerate(text.split("▁")):
            if i:
                ids += self._space_bytes
            if part:
                ids += encode(part) if not i else self._without_prefix(part) if self.dummy_prefix else encode(part)
        return ids

    def _without_prefix(self, part: str) -> list[int]:
        # The model adds a prefix space to every text: encode it after a newline, which is then removed.
        newline = self._sp.encode("\n")
        ids = self._sp.encode("\n" + part)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._sp.encode(part)

    @functools.cache  # noqa: B019 - one tokenizer per process
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
        return SentencePieceTokenizer(self.model, self.added | added, config=_with_added(self.config, added))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        (folder / "tokenizer.model").write_bytes(self.model)
        if self.added:
            (folder / "added_tokens.json").write_text(json.dumps(self.added, indent=1, ensure_ascii=False))
        if self.config:
            (folder / "tokenizer_config.json").write_text(json.dumps(self.config, indent=1, ensure_ascii=False))


def _without_typed_markers(model: bytes, chat_template: str) -> bytes:
    """A SentencePiece model whose chat markers are control pieces.

    Converters give added tokens the type "user-defined", which SentencePiece recognises in any text, so that a typed
    `<|im_start|>` would become the real one. Other user-defined pieces (HTML tags, digits) are kept.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto.FromString(model)  # type: ignore[attr-defined]
    kinds = pb.ModelProto.SentencePiece  # type: ignore[attr-defined]
    changed = False
    for entry in proto.pieces:
        if entry.type == kinds.USER_DEFINED:
            marker = _MARKER.fullmatch(entry.piece)
            if marker and (entry.piece.startswith("<|") or entry.piece in chat_template):
                entry.type, changed = kinds.CONTROL, True
    return proto.SerializeToString() if changed else model


class HFTokenizer:
    """A Hugging Face `tokenizer.json`; its added tokens are control tokens and are not recognised in text.

    Args:
        spec: the parsed `tokenizer.json`.
        where: the file, for error messages.
        config: `tokenizer_config.json`, kept for `save`.

    Raises:
        UserError: the `tokenizers` package cannot read it.
    """

    def __init__(self, spec: Mapping[str, Any], where: str = "tokenizer.json", config: Mapping[str, Any] | None = None):
        self.spec = dict(spec)
        self.config = dict(config or {})
        added = checked(_Spec, self.spec, where).added_tokens
        self.special = {t.content: t.id for t in added}
        self.strips = {t.content: (t.lstrip, t.rstrip) for t in added if t.lstrip or t.rstrip}
        # Without its added tokens and post-processor the tokenizer sees plain text and adds nothing to it.
        plain = self.spec | {"added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
        bare, self._prefix_scheme = _without_prefix_space(plain)
        self._tokenizer = _backend(bare, where)
        self._prefixing = self._tokenizer if self._prefix_scheme == "never" else _backend(plain, where)
        self.pieces = {i: token for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items()}
        """The vocabulary's tokens by id, without added control tokens."""
        self.byte_level = "ByteLevel" in json.dumps(self.spec.get("decoder") or {})
        self._metaspace = not self.byte_level and "▁" in json.dumps(plain | {"model": None}, ensure_ascii=False)
        self._names = {i: name.encode() for name, i in self.special.items()}
        self.vocab_size = max([-1, *self.pieces, *self._names]) + 1
        self._unspelled = _unspelled(set(self.pieces.values())) if self.byte_level else None

    def encode(self, text: str) -> list[int]:
        return self._encode(text, self._tokenizer)

    def encode_run(self, text: str, first: bool) -> list[int]:
        prefixed = self._prefix_scheme == "always" or (self._prefix_scheme == "first" and first)
        return self._encode(text, self._prefixing if prefixed else self._tokenizer)

    def _encode(self, text: str, backend: Any) -> list[int]:
        if self._metaspace and "▁" in text:  # represents a space; a literal one is encoded as its bytes
            spelled = [self._tokenizer.token_to_id(f"<0x{b:02X}>") for b in "▁".encode()]
            if None not in spelled:
                parts = [self._encode(p, self._tokenizer if i else backend) for i, p in enumerate(text.split("▁"))]
                return [*parts[0], *(i for part in parts[1:] for i in (*spelled, *part))]
        if self._unspelled is not None:
            text = self._unspelled.sub("\ufffd", text)
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids if text else []
        if any(i in self._names for i in ids):  # the vocabulary contains a control token as a word
            return [i for c in text for i in self._tokenizer.encode(c, add_special_tokens=False).ids]
        return ids

    @functools.cache  # noqa: B019 - one tokenizer per process
    def token_bytes(self, token: int) -> bytes:
        if token in self._names:
            return self._names[token]
        piece = self.pieces.get(token, "")
        if self.byte_level:
            return b"".join(bytes([_UNICODE_TO_BYTE[c]]) if c in _UNICODE_TO_BYTE else c.encode() for c in piece)
        if _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def with_tokens(self, tokens: Sequence[str]) -> "HFTokenizer":
        added = {t: self.vocab_size + i for i, t in enumerate(tokens)}
        entries = [added_token(i, t) for t, i in added.items()]
        spec = self.spec | {"added_tokens": [*self.spec.get("added_tokens", []), *entries]}
        return HFTokenizer(spec, config=_with_added(self.config, added))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(json.dumps(self.spec, ensure_ascii=False))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config, indent=1, ensure_ascii=False))


def _backend(spec: Mapping[str, Any], where: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic in the package is not an Exception
        raise UserError(f"{where}: is not a tokenizer that the tokenizers package can read ({str(e)[:200]})") from e


def _without_prefix_space(spec: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A `tokenizer.json` that adds no prefix space.

    SentencePiece models get that space from `Metaspace` or a `Prepend` normalizer, GPT-2's relatives from `ByteLevel`.
    Slices are encoded without it.

    Returns:
        The changed file, and where the original adds a space: `never`, before the `first` run of text, or `always`,
        before every run between control tokens.
    """
    schemes: list[str] = []

    def bare(step: Any) -> Any:
        if not isinstance(step, dict):
            return step
        kind = step.get("type")
        for name in ("pretokenizers", "normalizers"):
            if kind == "Sequence" and isinstance(step.get(name), list):
                return step | {name: [s for s in map(bare, step[name]) if s is not None]}
        if kind == "Prepend":
            schemes.append("always")
            return None
        if kind == "ByteLevel" and step.get("add_prefix_space"):
            schemes.append("always")
            return step | {"add_prefix_space": False}
        if kind == "Metaspace":
            schemes.append(step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never"))
            return {k: v for k, v in step.items() if k != "add_prefix_space"} | {"prepend_scheme": "never"}
        return step

    changed = {**spec, "normalizer": bare(spec.get("normalizer")), "pre_tokenizer": bare(spec.get("pre_tokenizer"))}
    return changed, next((s for s in ("always", "first") if s in schemes), "never")


def encode_markup(tokenizer: Tokenizer, text: str, fence: str, first: bool = True) -> list[int]:
    """Ids of text with control tokens spelled out, encoded as transformers does for a rendered chat template.

    Args:
        tokenizer: its control tokens are recognised.
        text: a rendered template, or a part of it.
        fence: a character that is removed after control tokens were found, so that none is found across it.
        first: whether the text begins the context; some vocabularies add a space there.
    """
    names = sorted((n for n in tokenizer.special if len(n) > 1), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids: list[int] = []
    for place, part in enumerate(parts):
        if place % 2:
            ids.append(tokenizer.special[part])
            continue
        if place and tokenizer.strips.get(parts[place - 1], (False, False))[1]:
            part = part.lstrip()
        if place + 1 < len(parts) and tokenizer.strips.get(parts[place + 1], (False, False))[0]:
            part = part.rstrip()
        for i, run in enumerate(part.split(fence)):
            if run:
                ids += tokenizer.encode(run) if i else tokenizer.encode_run(run, first and not place)
    return ids


def token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that have a named role, as far as known: `bos_token`, `eos_token` and so on."""
    named = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = tokenizer.config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is None and isinstance(tokenizer, SentencePieceTokenizer):
            usual = {"bos_token": "<s>", "eos_token": "</s>"}.get(name)
            token = usual if usual in tokenizer.special else None
        if isinstance(token, str):
            named[name] = token
    return named


def added_token(token: int, content: str) -> dict[str, Any]:
    """A control token's entry in `tokenizer.json`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": True}


def _with_added(config: Mapping[str, Any], added: Mapping[str, int]) -> dict[str, Any]:
    """`tokenizer_config.json` with added control tokens, if it lists them."""
    known = config.get("added_tokens_decoder")
    if known is None:
        return dict(config)
    entries = {str(i): {k: v for k, v in added_token(i, t).items() if k != "id"} for t, i in added.items()}
    return {**config, "added_tokens_decoder": {**known, **entries}}


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that represent bytes in GPT-2's byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_UNICODE_TO_BYTE = _byte_alphabet()


def _unspelled(vocabulary: set[str]) -> re.Pattern[str] | None:
    """Matches the characters whose first byte a byte-level vocabulary lacks; None if it lacks none.

    SmolLM2's lacks six control characters and the lead bytes of unassigned planes. BPE would drop them silently, which
    leaves empty slices and partial characters; as U+FFFD they remain one character.
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


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the vocabulary; tokenizers with equal hashes give every id the same meaning."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.special.items())).encode())
    for i in range(tokenizer.vocab_size):
        digest.update(tokenizer.token_bytes(i) + b"\xff")
    return digest.hexdigest()[:16]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.model` (with `added_tokens.json`) or `tokenizer.json`.

    `tokenizer.model` is preferred, because its pieces are exact bytes. If it is not a SentencePiece model (Llama 3's
    format, a git-lfs pointer), the `tokenizer.json` next to it is used.

    Raises:
        UserError: neither file exists, or one cannot be read.
    """
    folder = Path(folder)
    config = _read_config(folder)
    model, spec = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        decoder = config.get("added_tokens_decoder") or {}
        where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
        numbers = ((i, int(i) if re.fullmatch("[0-9]+", i) else i) for i in decoder)
        ids = {i: checked(_Id, number, f"{where}.{i}") for i, number in numbers}
        added = {token["content"]: ids[i] for i, token in decoder.items()}
        file = folder / "added_tokens.json"
        added |= checked(dict[str, _Id], read_json_beside(file), str(file))
        try:
            return SentencePieceTokenizer(model.read_bytes(), added, str(model), config)
        except UserError as e:
            if not spec.is_file():
                raise
            logging.getLogger(__name__).warning("%s; %s is read instead", str(e).partition(";")[0], spec.name)
    if not spec.is_file():
        raise UserError(f"{folder}: no tokenizer there; a tokenizer.model or tokenizer.json belongs to a model")
    return HFTokenizer(read_json(spec), str(spec), config)


def _read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, completed from other files: names of tokens, and the chat template."""
    path = folder / "tokenizer_config.json"
    config = read_json_beside(path)
    names = read_json_beside(folder / "special_tokens_map.json")
    config = {k: v for k, v in names.items() if k in ("bos_token", "eos_token", "unk_token", "pad_token")} | config
    template = folder / "chat_template.jinja"
    if template.is_file():
        try:
            config["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{template}: cannot read ({e}); fetch it again") from e
    elif config.get("chat_template") is None and (folder / "chat_template.json").is_file():
        config["chat_template"] = read_json(folder / "chat_template.json").get("chat_template")
    read = checked(_TokenizerConfig, config, str(path))
    if isinstance(read.chat_template, list):
        named = {t.name: t.template for t in read.chat_template}
        config["chat_template"] = named.get("default")
    return {k: v for k, v in config.items() if k != "chat_template" or v is not None}


def _strips(decoder: Mapping[str, Any]) -> dict[str, tuple[bool, bool]]:
    found = {t["content"]: (bool(t.get("lstrip")), bool(t.get("rstrip"))) for t in decoder.values()}
    return {name: sides for name, sides in found.items() if any(sides)}


def resolve_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer that a flag names: a model folder, a `.gguf` file, `hf:owner/name`, or a registered name.

    Raises:
        UserError: there is nothing of that name, or it has no tokenizer.
    """
    from duplex_jax.gguf_vocabulary import from_gguf_fields
    from duplex_jax.sources import base_of, locate, read_gguf_header

    path = locate(name_or_path, weights=False)
    for _ in range(8):  # an adapter without a tokenizer of its own uses its base's
        base = base_of(path)
        if base is None or any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            break
        path = locate(base, weights=False)
    else:
        raise UserError(f"{name_or_path}: is an adapter of an adapter, eight levels deep; give the base model itself")
    if path.is_dir() or path.suffix in (".safetensors", ".bin"):
        return load_tokenizer(path if path.is_dir() else path.parent)
    if path.suffix == ".gguf":
        return from_gguf_fields(read_gguf_header(path).fields, str(path))
    raise UserError(f"{path}: holds no tokenizer; give the model's folder or a .gguf file")
