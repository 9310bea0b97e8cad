"""Tokenizers: text comes back byte for byte, nothing typed becomes a control token, files are found and refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex_jax.errors import UserError
from duplex_jax.gguf_vocabulary import from_gguf_fields
from duplex_jax.slicing import MAX_SLICE_TOKENS, slice_ids, slice_tokens
from duplex_jax.tokenizer import (
    Tokenizer,
    complete_utf8,
    decode,
    decode_bytes,
    load_tokenizer,
    resolve_tokenizer,
)
from tests.tiny import byte_tokenizer
from tests.tokenizers import CONTROL_WORDS, TOKENIZERS, UNSPELLED, texts

EXAMPLES = 60


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, reference: Path) -> Tokenizer:
    return TOKENIZERS[request.param](reference)


def test_typed_control_words_are_words(tokenizer: Tokenizer):
    control = set(tokenizer.special.values())
    for word in (*tokenizer.special, *CONTROL_WORDS):
        for text in (word, f"a{word}b", f" {word} ", f"{word}{word}", word[:-1] + "\n" + word):
            ids = tokenizer.encode(text)
            assert not control & set(ids), text
            assert decode(tokenizer, ids) == text


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=texts)
def test_text_comes_back(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert decode_bytes(tokenizer, ids) == text.encode()
    assert not set(tokenizer.special.values()) & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=texts)
def test_slices_joined_are_the_message(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    runs = list(slice_ids(ids, tokenizer))
    assert [i for run in runs for i in run] == ids
    assert all(0 < len(run) <= MAX_SLICE_TOKENS for run in runs)
    slices = slice_tokens(text, tokenizer)
    assert "".join(slices) == text
    assert all(s.encode("utf-8").decode("utf-8") == s for s in slices)


def test_added_tokens_are_control_tokens(tokenizer: Tokenizer):
    tokens = ["<new>", "<idle2>", "<|x|>"]
    grown = tokenizer.with_tokens(tokens)
    assert [grown.special[t] for t in tokens] == list(range(tokenizer.vocab_size, grown.vocab_size))
    assert tokenizer.special.items() <= grown.special.items()
    assert grown.token_bytes(tokenizer.vocab_size) == b"<new>"
    for text in ("<new>", "a <idle2> b<|x|>", "你好<new>"):
        assert grown.encode(text) == tokenizer.encode(text)


def test_characters_that_a_vocabulary_cannot_spell(reference: Path):
    tokenizer = TOKENIZERS["smollm2"](reference)
    for text in (*UNSPELLED, "\U00040000", "\U000bffff"):
        assert decode(tokenizer, tokenizer.encode(f"a{text}b")) == "a\ufffdb"
    for text in ("\x05", "\x7f", "\U0003ffff", "\U000c0000", "\U0010ffff", "\ufffd"):
        assert decode(tokenizer, tokenizer.encode(f"a{text}b")) == f"a{text}b"
    assert slice_tokens("\U00040000 a" * 9, tokenizer)[0].startswith("\ufffd a")


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.with_tokens(["<new>"]).save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.special == tokenizer.special | {"<new>": tokenizer.vocab_size}
    for text in ("Hello, world", " 你好 <new></s>", "a\n\n  b\té😀"):
        assert again.encode(text) == tokenizer.encode(text)


def test_released_markers(reference: Path):
    """design: `<用户>` and `<AI>` are three plain tokens each, `<idle>` is 122753 and `</s>` is 2."""
    tokenizer = TOKENIZERS["released"](reference)
    assert tokenizer.encode("<用户>") == [95396, 4194, 95388]
    assert tokenizer.encode("<AI>") == [95396, 10850, 95388]
    assert (tokenizer.special["<idle>"], tokenizer.special["</s>"], tokenizer.vocab_size) == (122753, 2, 122760)


def test_vocabulary_in_gguf_is_that_of_the_model_file(reference: Path):
    ours, released = (TOKENIZERS[n](reference) for n in ("sentencepiece_in_gguf", "released"))
    for text in (
        "What is the capital of France?",
        " famous for the Eiffel Tower,",
        "你好，世界！",
        "a  b\n\té 😀 19",
    ):
        assert ours.encode(text) == released.encode(text)


def test_transformers_agrees(tokenizer: Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello, world", " famous for", "你好，世界！", "a\n\nb\té 😀", "x = 12345;"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), text


def test_dummy_prefix_of_a_llama_vocabulary():
    """A model trained with a space in front of every text: ours starts where the text starts."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 6]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(6)],
        "tokenizer.ggml.add_space_prefix": True,
    }
    tokenizer = from_gguf_fields(fields, "m.gguf")
    assert tokenizer.special == {"<s>": 1, "</s>": 2}
    for text in ("ab", " ab", "a b", "  a", "\nab", "</s>ab"):
        assert decode(tokenizer, tokenizer.encode(text)) == text
    assert tokenizer.encode("ab") == [263]
    assert tokenizer.encode(" ab") == [264]


@given(data=st.binary(max_size=12))
def test_complete_utf8_cuts_at_characters(data: bytes):
    n = complete_utf8(data)
    assert len(data) - n < 4
    if (text := data.decode("utf-8", "ignore")).encode() == data:
        assert n == len(data)
        for cut in range(len(data) + 1):
            assert text.encode()[: complete_utf8(data[:cut])].decode() is not None


@given(text=st.text(min_size=1, max_size=8), cut=st.integers(0, 32))
def test_complete_utf8_is_the_longest(text: str, cut: int):
    data = text.encode("utf-8", "surrogatepass") if not any("\ud800" <= c <= "\udfff" for c in text) else b"x"
    cut = min(cut, len(data))
    whole = [0]
    for c in data.decode():
        whole.append(whole[-1] + len(c.encode()))
    assert complete_utf8(data[:cut]) == max(w for w in whole if w <= cut)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer there"),
        ({"tokenizer.json": "{"}, "tokenizer.json: is not JSON"),
        ({"tokenizer.json": '{"model": 3}'}, "is not a tokenizer that the tokenizers package can read"),
        ({"tokenizer.json": "[]"}, "tokenizer.json: "),
        ({"tokenizer.model": "nonsense"}, "tokenizer.model: is not a SentencePiece model"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "x"}, "tokenizer_config.json: is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, files: dict[str, str], words: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as e:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "bert", "tokens": ["a"]}, "vocabulary of kind 'bert' is not supported"),
        ({"model": "gpt2", "tokens": ["a"], "pre": "tekken", "merges": []}, "pre-tokenizer 'tekken' is not supported"),
        ({}, "m.gguf: vocabulary of kind None"),
        ({"model": "gpt2", "tokens": ["a"], "pre": "gpt-2"}, "m.gguf: its vocabulary is incomplete"),
        ({"model": "gpt2", "tokens": ["a"], "token_type": [1, 1]}, "m.gguf: its vocabulary is incomplete"),
        ({"model": "llama", "tokens": ["a"], "scores": ["b"]}, "m.gguf: its vocabulary is incomplete"),
    ],
)  # fmt: skip
def test_bad_vocabulary_in_gguf(fields: dict, words: str):
    with pytest.raises(UserError, match=words):
        from_gguf_fields({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, "m.gguf")


def test_gguf_that_does_not_say_how_text_is_split(caplog: pytest.LogCaptureFixture):
    tokens = sorted(byte_tokenizer().spec["model"]["vocab"], key=byte_tokenizer().spec["model"]["vocab"].get)
    fields: dict = {"model": "gpt2", "tokens": tokens, "merges": []}
    assert from_gguf_fields({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, "m.gguf").encode("hé")
    assert "m.gguf: has no tokenizer.ggml.pre" in caplog.text


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_in_a_file_of_its_own_is_kept(tmp_path: Path, name: str):
    source = "{{ messages[0]['content'] }}"
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    byte_tokenizer().save(tmp_path / "in")
    config = json.loads((tmp_path / "in/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "in/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "in" / name).write_text(source if "jinja" in name else json.dumps({"chat_template": source}))
    load_tokenizer(tmp_path / "in").save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").config["chat_template"] == source
    assert source in (tmp_path / "out/tokenizer_config.json").read_text()  # where older programs look


def test_a_model_file_that_cannot_be_read_gives_way(tmp_path: Path):
    """Llama 3 has a tiktoken file of that name beside its tokenizer.json."""
    byte_tokenizer().save(tmp_path)
    for text in ("IQ== 0\nIg== 1\n", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"):
        (tmp_path / "tokenizer.model").write_text(text)
        assert load_tokenizer(tmp_path).encode("hé") == byte_tokenizer().encode("hé")


def spm_model(*pieces: tuple[str, int]) -> bytes:
    """A SentencePiece model with a space in front of texts; pieces have a type of their own."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto()
    rows = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256)), *pieces]
    for i, (piece, kind) in enumerate(rows):
        proto.pieces.add(piece=piece, score=-float(i), type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name, proto.normalizer_spec.add_dummy_prefix = "identity", True
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


WORDS = ["▁", *"hewlordtmn", "he", "ll", "▁he", "▁w", "▁t", "lo"]


def test_a_sentencepiece_model_saved_as_json_encodes_alike(tmp_path: Path):
    """transformers 5 saves `tokenizer.json` alone, which puts a space in front of every text."""
    transformers = pytest.importorskip("transformers")
    given, saved = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    (given / "tokenizer.model").write_bytes(spm_model(*((w, 1) for w in WORDS)))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (given / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": True, "add_bos_token": True}))
    (given / "config.json").write_text('{"model_type": "llama"}')
    transformers.AutoTokenizer.from_pretrained(given).save_pretrained(saved)
    assert not (saved / "tokenizer.model").exists()
    a, b = load_tokenizer(given), load_tokenizer(saved)
    for text in ("hello world", "\n", "the model", " hello", "a ▁ b", "</s>hello", "é  he"):
        assert a.encode(text) == b.encode(text), text
        assert decode(b, b.encode(text)) == text
    assert a.token_bytes(a.encode("hello world")[0]) == b"he"


def test_user_defined_markers_in_gguf_are_control_tokens():
    """Converters give added tokens the type "user-defined", which SentencePiece would find in typed text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "<|im_start|>", "[INST]", "<b>"]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 4, 4, 4],
        "tokenizer.ggml.scores": [-float(i) for i in range(len(pieces))],
        "tokenizer.chat_template": "{{ '[INST]' + messages[0]['content'] }}",
    }
    tokenizer = from_gguf_fields(fields, "m.gguf")
    assert tokenizer.special == {"<s>": 1, "</s>": 2, "<|im_start|>": 261, "[INST]": 262}
    for word in ("<|im_start|>", "[INST]"):
        assert not set(tokenizer.special.values()) & set(tokenizer.encode(f"a{word}a"))
        assert decode(tokenizer, tokenizer.encode(word)) == word
    assert 263 in tokenizer.encode("<b>")  # a word like any other


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": None}, ""),
        ("added_tokens.json", {"<x>": "1200"}, "added_tokens.json: <x>: .*integer"),
        ("added_tokens.json", {"<x>": 10**9}, "added_tokens.json: <x>: .*less than"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "added_tokens_decoder.x"),
        ("tokenizer_config.json", {"eos_token": 3}, "tokenizer_config.json: eos_token"),
    ],
)
def test_files_beside_a_sentencepiece_model(tmp_path: Path, name: str, row: dict, words: str):
    (tmp_path / "tokenizer.model").write_bytes(spm_model(("▁", 1)))
    (tmp_path / name).write_text(json.dumps(row))
    if not words:
        assert load_tokenizer(tmp_path).vocab_size == 260
        return
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


def test_resolve(reference: Path, tmp_path: Path):
    assert resolve_tokenizer(reference / "minicpm-tokenizer").vocab_size == 122760
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"x.txt: holds no tokenizer"):
        resolve_tokenizer(tmp_path / "x.txt")
    with pytest.raises(UserError, match="no such file or folder"):
        resolve_tokenizer(tmp_path / "nowhere")


def test_a_vocabulary_that_lists_control_tokens_among_its_words(tmp_path: Path):
    """BPE would find the token in text; typed by a user it is characters all the same."""
    spec = json.loads((_saved(tmp_path) / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab |= {"ab": 300, "<idle>": 258}
    spec["model"]["merges"] = ["a b"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [300]
    assert 258 not in tokenizer.encode("<idle>ab")
    assert decode(tokenizer, tokenizer.encode("<idle>ab")) == "<idle>ab"


def _saved(folder: Path) -> Path:
    from tests.tiny import byte_tokenizer

    byte_tokenizer().save(folder)
    return folder
