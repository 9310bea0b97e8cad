"""LoRA updates in PEFT's layout: what is written is read again as the same model, and other kinds are refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from duplex_jax.checkpoint import adapter, peft, safetensors
from duplex_jax.checkpoint.registry import load_model, save_model
from duplex_jax.errors import UserError
from tests.checkpoint.test_registry import CONFIG, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and the same updates in our layout and in PEFT's."""
    folder = tmp_path_factory.mktemp("peft")
    save_model(tiny(), folder / "base")
    L, D, W = CONFIG.num_layers, CONFIG.hidden_size, CONFIG.num_heads * CONFIG.head_dim
    random = np.random.default_rng(0)
    update = {"a": random.normal(size=(L, D, 2)), "b": random.normal(size=(L, 2, W))}
    rows = {name: random.normal(size=(1, D)) for name in ("embed", "head")}
    what = adapter.Adapter(str(folder / "base"), "chatml", 2, 4.0, (258,), 0.5)
    trained = {"layers": {"q": update}, "rows": rows}
    adapter.save(folder / "ours", what, trained)
    peft.save(folder / "peft", what, trained, np.dtype(np.float32))
    return folder


@pytest.mark.parametrize("unread", [False, True])
def test_the_same_model(folders: Path, unread: bool):
    ours, theirs = (load_model(folders / name, unread=unread) for name in ("ours", "peft"))
    assert theirs.template.name == "chatml"
    assert theirs.template.idle_bias == ours.template.idle_bias == 0.5
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours.params, theirs.params)


def test_names_and_shapes_are_peft_s(folders: Path):
    """As `peft.PeftModel.save_pretrained` writes LoRA with `trainable_token_indices`."""
    tensors = safetensors.open_file(folders / "peft" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{stem}.lora_A.weight"].shape == (2, CONFIG.hidden_size)
    assert tensors[f"{stem}.lora_B.weight"].shape == (CONFIG.num_heads * CONFIG.head_dim, 2)
    rows = tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert rows.shape == (1, CONFIG.hidden_size)
    row = json.loads((folders / "peft" / "adapter_config.json").read_text())
    assert row["target_modules"] == ["q_proj"]
    assert row["trainable_token_indices"] == {"embed_tokens": [258], "lm_head": [258]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 3}, "not of rank 3"),
        ({"lora_alpha": "x"}, "adapter_config.json: lora_alpha"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    ],
)
def test_what_is_refused(folders: Path, tmp_path: Path, change: dict, words: str):
    for file in (folders / "peft").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)
