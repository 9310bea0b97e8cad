"""The model's arithmetic against released MiniCPM numbers, and against transformers' Granite and Llama."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax.checkpoint import huggingface
from duplex_jax.checkpoint.names import disassemble, parts
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig, from_hf, to_hf
from duplex_jax.model.tree import Params, from_tree
from tests.tiny import logits_of

GOLDEN = ("minicpm-tiny-mha", "minicpm-tiny-gqa-untied")


def mean_loss(config: ModelConfig, params: Params, tokens: jax.Array, labels: jax.Array, remat: str):
    """The released code's loss: the mean over next tokens whose label is not -100."""
    model = from_tree(config, params)
    out = model.logits(model.hidden(tokens, remat=remat))[:, :-1]
    labels = labels[:, 1:]
    mask = labels != -100
    picked = jnp.take_along_axis(out, jnp.where(mask, labels, 0)[..., None], -1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(out, -1) - picked) * mask) / mask.sum()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits(reference: Path, name: str):
    config, params = huggingface.load(reference / name)
    expected = np.load(reference / name / "expected.npz")
    assert np.abs(logits_of(config, params, expected["input_ids"]) - expected["logits"]).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "remat"), [(GOLDEN[0], "none"), (GOLDEN[1], "none"), (GOLDEN[1], "full"), (GOLDEN[1], "dots")]
)
def test_golden_loss_and_gradient_norms(reference: Path, name: str, remat: str):
    config, params = huggingface.load(reference / name)
    expected = np.load(reference / name / "expected.npz")
    tokens, labels = jnp.asarray(expected["input_ids"]), jnp.asarray(expected["labels"])
    loss, grads = jax.jit(
        jax.value_and_grad(lambda p: mean_loss(config, p, tokens, labels, remat))
    )(params)  # fmt: skip
    assert abs(float(loss) - float(expected["loss"])) < 1e-5
    norms = json.loads((reference / name / "grad_norms.json").read_text())
    found = {part.name: np.linalg.norm(disassemble(config, grads, part)) for part in parts(config, "hf")}
    assert {f"grad/{n}" for n in found} == {n for n in norms if n.startswith("grad/")}
    for part_name, norm in found.items():
        assert norm == pytest.approx(norms[f"grad/{part_name}"], rel=1e-3), part_name


@pytest.mark.parametrize("name", GOLDEN)
def test_padded_vocabulary_changes_nothing(reference: Path, name: str):
    tokens = np.load(reference / name / "expected.npz")["input_ids"][:1, :16]
    config, params = huggingface.load(reference / name)
    padded_config, padded = huggingface.load(reference / name, vocab_multiple=96)
    assert padded_config.padded_vocab_size == 576
    out = logits_of(padded_config, padded, tokens)
    np.testing.assert_allclose(out[..., : config.vocab_size], logits_of(config, params, tokens), atol=1e-6)
    assert (out[..., config.vocab_size :] == -1e30).all()


SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
SCALES = {
    "embedding_multiplier": 12.0, "residual_multiplier": 1.4 / math.sqrt(2), "logits_scaling": 2.25,
    "attention_multiplier": 0.25,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.5 * i for i in range(8)]}  # fmt: skip
CASES = {
    "llama": ("llama", {}, 48),
    "llama_untied_gqa": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}, 48),
    "llama_mqa_wide_heads": ("llama", {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}, 48),
    "llama_linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 48),
    "llama_dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 48),
    "llama_dynamic_beyond": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 100),
    "llama_llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}, 64),
    "llama_yarn": ("llama", {"rope_scaling": YARN}, 64),
    "llama_yarn_given_factor": ("llama", {"rope_scaling": YARN | {"attention_factor": 0.8, "beta_fast": 16.0}}, 64),
    "llama_longrope_short": ("llama", {"rope_scaling": LONGROPE}, 32),
    "llama_longrope_long": ("llama", {"rope_scaling": LONGROPE}, 64),
    "granite": ("granite", SCALES, 48),
    "granite_untied_gqa": ("granite", SCALES | {"num_key_value_heads": 2, "tie_word_embeddings": False}, 48),
    "granite_llama3": ("granite", SCALES | {"rope_scaling": LLAMA3}, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_logits(case: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    import transformers

    kind, overrides, length = CASES[case]
    make = {"llama": transformers.LlamaConfig, "granite": transformers.GraniteConfig}[kind]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(make(**SMALL | overrides), attn_implementation="eager")
    theirs = theirs.float().eval()
    theirs.save_pretrained(tmp_path)
    config, params = huggingface.load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 128, (2, length))
    with torch.no_grad():
        expected = theirs(torch.asarray(tokens)).logits.numpy()
    found = logits_of(config, params, tokens)
    assert expected.std() > 0.3  # the comparison says something
    np.testing.assert_allclose(found, expected, atol=1e-4)
    again = from_hf(to_hf(config))
    assert dataclasses.replace(again, scale_depth=config.scale_depth) == config
    assert again.residual_scale == pytest.approx(config.residual_scale, rel=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "qwen2"), ("attention_bias", True), ("hidden_act", "gelu"), ("sliding_window", 16),
        ("num_local_experts", 8), ("rope_scaling", {"rope_type": "su"}), ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}), ("num_key_value_heads", 3),
    ],
)  # fmt: skip
def test_unsupported_config_is_refused_by_name(field: str, value: object):
    with pytest.raises(UserError, match=r"config.json|num_attention_heads") as e:
        from_hf({"model_type": "llama"} | SMALL | {field: value})
    assert str(value if field == "model_type" else field.replace("_scaling", "")) in str(e.value).replace(
        "RoPE", "rope"
    )


def test_missing_shape_is_refused():
    row = {"model_type": "llama"} | SMALL
    del row["hidden_size"]
    with pytest.raises(UserError, match="hidden_size is missing"):
        from_hf(row)
