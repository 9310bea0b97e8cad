"""Other libraries of the Flax ecosystem take the model as it is: Tunix trains it, qwix adapts and quantises it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import MiniCPM, unstack

CONFIG = ModelConfig(
    vocab_size=97, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128
)


@pytest.fixture
def model() -> MiniCPM:
    return unstack(MiniCPM(CONFIG, rngs=nnx.Rngs(0)))


def tokens(rows: int = 4, length: int = 24) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, length)), jnp.int32)


def test_flax_shows_the_model(model: MiniCPM) -> None:
    shown = nnx.tabulate(model, tokens(), console_kwargs={"width": 200})
    assert "MiniCPM" in shown
    assert f"{sum(w.size for w in jax.tree.leaves(nnx.state(model, nnx.Param))):,}" in shown


def test_tunix_trains(model: MiniCPM) -> None:
    trainer_of = pytest.importorskip("tunix.sft.peft_trainer", reason="google-tunix is not installed")

    def loss(model: MiniCPM, input_tokens: jax.Array, **_: Any) -> jax.Array:
        logits = model(input_tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, input_tokens[:, 1:]).mean()

    def inputs(x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"input_tokens": x["tokens"]}

    rows = {"tokens": tokens()}
    before = float(loss(model, rows["tokens"]))
    trainer = trainer_of.PeftTrainer(
        model, optax.adamw(3e-3), trainer_of.TrainingConfig(eval_every_n_steps=1000, max_steps=10)
    ).with_gen_model_input_fn(inputs)
    trainer = trainer.with_loss_fn(loss)
    trainer.train([rows] * 10)
    assert float(loss(model, rows["tokens"])) < before - 0.3


def test_qwix_adds_lora(model: MiniCPM) -> None:
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    provider = qwix.LoraProvider(module_path=".*(q|v|up)", rank=4, alpha=8)
    adapted = qwix.apply_lora_to_model(model, provider, tokens(), rngs=nnx.Rngs(1))
    added = nnx.state(adapted, nnx.LoRAParam)
    shapes = sorted({w.shape for w in jax.tree.leaves(added)})
    assert shapes == [(4, 32), (4, 64), (4, 128), (64, 4)]
    np.testing.assert_allclose(adapted(tokens()), model(tokens()), atol=1e-5)  # B is zero at first

    def loss(low_rank: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, low_rank, rest)(tokens()).std()

    graphdef, low_rank, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    assert any(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(jax.grad(loss)(low_rank)))


def test_qwix_quantises(model: MiniCPM) -> None:
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    rules = [qwix.QuantizationRule(module_path=".*/(q|k|v|o|gate|up|down)", weight_qtype="int8")]
    quantised = qwix.quantize_model(model, qwix.PtqProvider(rules), tokens())
    assert {"int8"} <= {str(w.dtype) for w in jax.tree.leaves(nnx.state(quantised))}
    ours, theirs = (np.asarray(m(tokens())) for m in (model, quantised))
    assert 0 < np.abs(ours - theirs).max() < 0.05 * np.abs(ours).max()
