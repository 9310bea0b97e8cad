"""What an export tells other programs: the program in its card, run as it is by transformers, speaks as the engine."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import gguf
import pytest

from duplex_jax.checkpoint import adapter, card
from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request
from duplex_jax.decode.sampling import Sampling
from tests.tiny import tiny_model

HEARD = ["Hello there", None, "what is the", "capital of", None, None, "stop <idle>", None]


def duplex(template: str, idle_bias: float) -> LoadedModel:
    """The tiny model as one that was trained on slices."""
    model = tiny_model(template)
    changed = copy.copy(model.template)
    changed.in_slices, changed.idle_bias = True, idle_bias
    return dataclasses.replace(model, template=changed)


def engine_says(engine: Engine, model: LoadedModel) -> list[list[int]]:
    engine.template = model.template
    row, said = engine.open(model.template.start(), Sampling(temperature=0.0)), []
    for i, heard in enumerate(HEARD):
        closing = model.template.closing(said[-1]) if i else []
        said.append(engine.advance({row: Request([*closing, *model.template.user_part(heard)])})[row])
    engine.close(row)
    return [[i for i in ids if i not in model.template.stop_ids] for ids in said]


@pytest.mark.parametrize("template", ["compact", "chatml"])
def test_the_cards_program_is_the_engine(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    every = []
    engine = Engine(tiny_model().model, tiny_model().template, capacity=512)
    for bias in (0.0, 3.0):
        out = tmp_path / str(bias)
        model = duplex(template, bias)
        save_model(model, out)
        again = load_model(out)
        assert (again.template.in_slices, again.template.idle_bias) == (True, bias)
        assert again.template.turn_ends == model.template.turn_ends
        program = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.S)
        assert program
        monkeypatch.chdir(out)
        names: dict[str, Any] = {"__name__": "card"}
        exec(program[1], names)
        every.append([names["step"](heard) for heard in HEARD])
        assert every[-1] == engine_says(engine, model)
    assert every[0] != every[1], "the bias decides nothing here"
    assert any(every[1])
    assert not all(every[1])


def test_an_export_that_was_not_trained_on_slices_has_no_bias(tmp_path: Path):
    save_model(tiny_model("chatml"), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "not trained on time slices" in text
    assert r"<|im_start|>user\nWhat is the capital of France?</s>" in text  # the tiny model has two names for it
    assert "sequence_bias" not in (tmp_path / "out" / "generation_config.json").read_text()


def test_gguf_says_what_it_has_words_for(smollm2: LoadedModel, tmp_path: Path):
    template = copy.copy(smollm2.template)
    template.in_slices, template.idle_bias = True, 1.5
    small = dataclasses.replace(smollm2, template=template)
    save_model(small, tmp_path / "m.gguf", format="gguf", dtype="q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if name != "tokenizer.ggml.tokens"}
    assert fields["general.name"] == small.name
    assert fields["tokenizer.ggml.eot_token_id"] == template.end_id
    assert fields["tokenizer.ggml.eom_token_id"] == template.idle_id
    assert f"+1.5 belongs on the logit of token {template.idle_id}" in fields["general.description"]
    again = load_model(tmp_path / "m.gguf").template
    assert (again.in_slices, again.idle_bias, again.turn_ends) == (True, 1.5, template.turn_ends)


def test_an_adapters_card_gives_the_settings(tmp_path: Path):
    template = duplex("compact", 0.5).template
    text = card.adapter_card("mine", "base", template)
    assert "LoRA's updates of `base`" in text
    assert '"sequence_bias": [[[258], -1024.0], [[261, 258], 1024.5]]' in text
    assert adapter.CARD_FILE == "README.md"
