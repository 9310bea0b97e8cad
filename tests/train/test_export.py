"""What a run leaves behind is a model: merged or apart, `load_model` gives the same logits that training saw."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from duplex_jax.checkpoint import adapter
from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.checkpoint.resolve import load_template
from duplex_jax.errors import UserError
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.train import loop
from duplex_jax.train import step as steps
from duplex_jax.train.checkpoints import Record, Store
from duplex_jax.train.config import to_dict
from duplex_jax.train.export import control_ids, read_adapter
from tests import made_timelines
from tests.tiny import fresh_model
from tests.train import plans


def logits(model: MiniCPM) -> np.ndarray:
    tokens = np.arange(48).reshape(2, 24) % 60 + 200
    tokens[0, 3:5] = plans.ROW_IDS
    found = jax.jit(lambda model: model(tokens))(model)
    return np.asarray(found)[..., : model.config.vocab_size]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    template = made_timelines.template()
    save_model(LoadedModel("base", fresh_model(plans.SHAPE, 3), template.tokenizer, template), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("merge", [True, False])
def test_lora_exported(base: Path, tmp_path: Path, merge: bool):
    plan = plans.plan(lora__rank=4, lora__merge=merge, model__source=base)
    loaded = load_model(base, vocab_multiple=8)
    state, frozen = steps.init_state(plan, loaded.model)
    with jax.set_mesh(plan.mesh):
        state, _ = steps.jitted_step(plan)(state, frozen, plans.put(plan, plans.rows(plan)))
    wanted = logits(steps.model_of(plan, state["params"], frozen))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    loop.export(plan, state, frozen, loaded.template, tmp_path / "run" / "export")
    again = load_model(tmp_path / "run")  # a working folder is its export
    np.testing.assert_allclose(logits(again.model), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(logits(loaded.model) - wanted).max() > 1e-2
    assert again.template.name == loaded.template.name
    assert load_template(tmp_path / "run").name == loaded.template.name
    assert adapter.is_adapter(tmp_path / "run" / "export") != merge


def test_adapter_of_a_checkpoint(base: Path, tmp_path: Path):
    """The newest checkpoint, or one by its step, gives what an export there would: same logits, in 16 bits."""
    template = made_timelines.template()
    plan = plans.plan(lora__rank=4, model__source=base, model__template=template.name)
    plan = dataclasses.replace(plan, row_ids=control_ids(template, plan.config))
    loaded = load_model(base, vocab_multiple=8)
    state, frozen = steps.init_state(plan, loaded.model)
    config = to_dict(plan.config)
    config["data"] |= {"train": ["/some/where/packed"], "eval": ["held"]}
    config["optim"]["decay_from"] = "/gone/run@7"
    facts = {"data": [{"name": "/some/where/packed", "rows": 3, "hash": "abc"}]}
    with contextlib.closing(Store(tmp_path / "run")) as store, jax.set_mesh(plan.mesh):
        for step in (1, 2):
            state, _ = steps.jitted_step(plan)(state, frozen, plans.put(plan, plans.rows(plan)))
            store.save(state, Record(step, 8 * step, config, facts), wait=True)
    wanted = logits(steps.model_of(plan, state["params"], frozen))

    what, trained = read_adapter(str(tmp_path / "run"))
    adapter.save(tmp_path / "adapter", what, trained, "float16")
    again = load_model(tmp_path / "adapter")
    np.testing.assert_allclose(logits(again.model), wanted, atol=2e-2)
    assert np.abs(logits(loaded.model) - wanted).max() > 5e-2
    assert (what.base, what.template, what.row_ids) == (str(base), template.name, plan.row_ids)
    kept = adapter.read(tmp_path / "adapter")[0].training
    assert (kept["step"], kept["branched_from"]) == (2, None)
    assert kept["config"]["data"]["train"] == ["packed"]  # paths of another machine say nothing
    assert kept["config"]["optim"]["decay_from"] == "run@7"
    assert kept["facts"]["data"] == [{"name": "packed", "rows": 3, "hash": "abc"}]
    assert config["data"]["train"] == ["/some/where/packed"]

    assert read_adapter(f"{tmp_path}/run@1")[0].training["step"] == 1
    with pytest.raises(UserError, match=r"run@3: no complete checkpoint of step 3; the complete ones are \[1, 2\]"):
        read_adapter(f"{tmp_path}/run@3")
    (tmp_path / "adapter" / adapter.CARD_FILE).write_text("a card")
    with pytest.raises(UserError, match="already exists and is not empty"):
        adapter.save(tmp_path / "adapter", what, trained)
    adapter.save(tmp_path / "adapter", *read_adapter(str(tmp_path / "adapter")), "float32", overwrite=True)
    assert (tmp_path / "adapter" / adapter.CARD_FILE).read_text() == "a card"


def test_a_run_that_trained_every_weight_has_no_adapter(tmp_path: Path):
    plan = plans.plan()
    state, _ = steps.init_state(plan, None)
    with contextlib.closing(Store(tmp_path / "run")) as store:
        store.save(state, Record(1, 8, to_dict(plan.config), {}), wait=True)
    with pytest.raises(UserError, match="every weight was trained"):
        read_adapter(str(tmp_path / "run"))


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path):
    shape = plans.with_shape(hidden_size=16)
    plan = plans.plan(shape=shape, lora__rank=4)
    state, _ = steps.init_state(plan, None)
    what = adapter.Adapter(str(base), "compact", 4, 8.0, plans.ROW_IDS)
    adapter.save(tmp_path / "adapter", what, jax.device_get(state["params"]))
    with pytest.raises(UserError, match="it was not made for"):
        load_model(tmp_path / "adapter")
    (tmp_path / "adapter" / adapter.WEIGHTS_FILE).write_bytes(b"xx")
    with pytest.raises(UserError, match="cut off in its header"):
        load_model(tmp_path / "adapter")
