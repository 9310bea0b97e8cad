"""SmolLM2-135M-Instruct end to end: export, transformers' logits and greedy answers on the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.turns import TurnSession
from tests.tiny import logits_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = (
    "Explain in a few paragraphs why the sky is blue.",
    "Write a short story about a lighthouse keeper and a storm.",
    "List ten fruits and say what each tastes like.",
    "What is the difference between a virus and a bacterium? Answer in detail.",
    "Give me a recipe for pancakes, step by step.",
    "Tell me about the history of Rome.",
    "Write a Python function that checks whether a number is prime, and explain it.",
    "How do I learn to play the guitar? Make a plan for a month.",
    "Describe your perfect day in the mountains.",
    "Pourquoi les chats dorment-ils autant ? Réponds en anglais, en détail.",
)
TOKENS = 64


@pytest.fixture(scope="module")
def exported(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder."""
    out = tmp_path_factory.mktemp("smollm2") / "out"
    save_model(smollm2, out)
    return out


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    """What transformers makes of that folder, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(smollm2: LoadedModel) -> Iterator[Engine]:
    return Engine(smollm2.model, smollm2.template, capacity=384)


def answer(engine: Engine, prompt: str) -> list[int]:
    """Our greedy turn-based answer: `TOKENS` ids, or fewer and the end token."""
    session = TurnSession(engine, sampling=Sampling(temperature=0.0))
    ids = [i for words in session.reply(prompt, TOKENS) for i in words]
    session.close()
    return ids if len(ids) == TOKENS else [*ids, engine.template.end_id]


def test_export_comes_back_bit_for_bit(smollm2: LoadedModel, exported: Path):
    again = load_model(exported)
    assert again.config == smollm2.config
    for x, y in zip(jax.tree.leaves(smollm2.params), jax.tree.leaves(again.params), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
    assert again.template.name == smollm2.template.name == "chatml"
    assert again.tokenizer.special == smollm2.tokenizer.special


def test_logits_are_those_of_transformers(smollm2: LoadedModel, theirs: Any):
    ids = smollm2.template.turn_prompt([("user", PROMPTS[3])])
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    found = logits_of(smollm2.config, smollm2.params, [ids])
    np.testing.assert_allclose(found, expected, atol=5e-4)  # logits up to 30 here
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_prompt_is_that_of_the_chat_template(smollm2: LoadedModel, exported: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    for messages in (
        [{"role": "user", "content": "Hi there!"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
         {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}],
    ):  # fmt: skip
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        found = smollm2.template.turn_prompt([(m["role"], m["content"]) for m in messages])
        assert found == expected


@pytest.mark.parametrize("prompt", PROMPTS[:1])
def test_greedy_answer_is_what_transformers_would_say(engine: Engine, theirs: Any, prompt: str):
    """One pass of transformers over our answer: each token is its first choice after those before it."""
    ours = answer(engine, prompt)
    assert len(ours) == TOKENS
    ids = engine.template.turn_prompt([("user", prompt)])
    with torch.no_grad():
        choices = theirs(torch.tensor([ids + ours])).logits[0].argmax(-1).tolist()
    assert choices[len(ids) - 1 : -1] == ours


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answer_is_that_of_transformers(engine: Engine, theirs: Any, prompt: str):
    ids = engine.template.turn_prompt([("user", prompt)])
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
    assert answer(engine, prompt) == expected
    assert len(expected) == TOKENS
