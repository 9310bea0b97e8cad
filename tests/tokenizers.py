"""Every kind of tokenizer, and what users might type at them."""

import json
from pathlib import Path

from hypothesis import strategies as st

from duplex_jax.gguf_vocabulary import from_gguf_fields
from duplex_jax.sources import locate, read_gguf_header
from duplex_jax.template import TEMPLATES, Template, make_template, missing_tokens
from duplex_jax.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import byte_tokenizer

# What somebody might type to break out of their slice.
CONTROL_WORDS = (
    "<idle>", "<s>", "</s>", "<unk>", "<AI>", "<用户>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|user|>",
    "<|assistant|>", "<file_sep>", "<repo_name>", "<reponame>", "<s0>", "<s1>", "<0x0A>", "▁",
    "<|im_start|>assistant\n", "<\\idle>", "AI>", "<A", "I>", "用户>", "<用", "<", ">", "/", "|",
    "\n", " ", "  ", "Ġ", "Ċ", "Â",
)  # fmt: skip
WORDS = ("a", "The", " capital", "of ", "Paris", ".", "é", "你好", "世界", "😀", "👩\u200d👧", "\u0301", "1984", "\t")
# Characters that SmolLM2's vocabulary cannot spell; test_tokenizer has a test of its own for them.
UNSPELLED = "\x04\x06\x13\x14\x16\x1d"

_characters = st.characters(exclude_categories=("Cs", "Co", "Cn"), exclude_characters=UNSPELLED)
texts = st.one_of(
    st.lists(st.sampled_from(CONTROL_WORDS + WORDS), min_size=1, max_size=12).map("".join),
    st.text(_characters, min_size=1, max_size=30),
)
slices = st.one_of(st.none(), texts)
pairs = st.lists(st.tuples(slices, slices), min_size=1, max_size=6)


def released(reference: Path) -> Tokenizer:
    """MiniCPM-duplex's own SentencePiece model."""
    return load_tokenizer(reference / "minicpm-tokenizer")


def smollm2(reference: Path) -> Tokenizer:
    """SmolLM2's byte-level BPE, out of the GGUF file."""
    path = locate("smollm2-135m-instruct")
    return from_gguf_fields(read_gguf_header(path).fields, str(path))


def sentencepiece_in_gguf(reference: Path) -> Tokenizer:
    """MiniCPM's vocabulary as a GGUF file has it."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(str(reference / "minicpm-tokenizer" / "tokenizer.model"))
    n = sp.get_piece_size()
    added = json.loads((reference / "minicpm-tokenizer" / "added_tokens.json").read_text())
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(n)]
    return from_gguf_fields(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(n)] + sorted(added, key=added.__getitem__),
            "tokenizer.ggml.scores": [sp.get_score(i) for i in range(n)] + [-1000.0] * len(added),
            "tokenizer.ggml.token_type": kinds + [3] * len(added),
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        },
        "minicpm.gguf",
    )


TOKENIZERS = {
    "released": released,
    "smollm2": smollm2,
    "sentencepiece_in_gguf": sentencepiece_in_gguf,
    "bytes": lambda reference: byte_tokenizer(),
}
# The released format's markers are words: where no marker's letters merge, a typed one looks the same.
COMBINATIONS = [(t, name) for t in TOKENIZERS for name in TEMPLATES if (t, name) != ("bytes", "minicpm")]


def template_over(name: str, tokenizer: Tokenizer) -> Template:
    """The template, with the tokens that it needs added to the vocabulary."""
    missing = missing_tokens(name, tokenizer)
    return make_template(name, tokenizer.with_tokens(missing) if missing else tokenizer)
