"""Hugging Face folders out and in: transformers computes the same, tensors come back bit for bit, damage is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duplex_jax.checkpoint import huggingface
from duplex_jax.checkpoint.names import TABLE, parts
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig, from_hf, to_hf
from duplex_jax.model.tree import Params
from tests.tiny import logits_of

GOLDEN = ("minicpm-tiny-mha", "minicpm-tiny-gqa-untied")


def write(folder: Path, config: ModelConfig, params: Params, hf_type: str = "auto", **options) -> Path:
    folder.mkdir(exist_ok=True)
    huggingface.save_config(folder, config, {}, params["embed"].dtype, hf_type)
    huggingface.save_weights(folder, config, params, **options)
    return folder


def assert_same_bits(a: Params, b: Params) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


@pytest.fixture
def model(reference: Path) -> tuple[ModelConfig, Params]:
    return huggingface.load(reference / GOLDEN[1])


@pytest.fixture
def folder(reference: Path, tmp_path: Path) -> Path:
    """A copy of the untied golden checkpoint that a test may damage."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(reference / GOLDEN[1] / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("shard_bytes", [huggingface.SHARD_BYTES, 300_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip(reference: Path, tmp_path: Path, name: str, dtype: str, shard_bytes: int):
    torch = pytest.importorskip("torch")
    import transformers

    config, params = huggingface.load(reference / name, jnp.dtype(dtype), vocab_multiple=96)
    out = write(tmp_path / "out", config, params, shard_bytes=shard_bytes)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes == 300_000)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    tokens = np.load(reference / name / "expected.npz")["input_ids"]
    with torch.no_grad():
        expected = theirs(torch.asarray(tokens).long()).logits.numpy()
    ours = logits_of(config, params, tokens)
    np.testing.assert_allclose(ours[..., : config.vocab_size], expected, atol=1e-4)
    if dtype == "float32":
        np.testing.assert_allclose(np.load(reference / name / "expected.npz")["logits"], expected, atol=1e-4)

    again_config, again = huggingface.load(out, vocab_multiple=96)
    assert_same_bits(params, again)
    assert dataclasses.replace(again_config, scale_depth=config.scale_depth) == config
    assert again_config.residual_scale == pytest.approx(config.residual_scale, rel=1e-12)
    # The tensors are those of the released file, bit for bit.
    if dtype == "float32":
        ours_by_name = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
        released = load_file(reference / name / "model.safetensors")
        assert ours_by_name.keys() == released.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
        assert all(ours_by_name[k].tobytes() == released[k].tobytes() for k in ours_by_name)


def test_released_config_keys(model, tmp_path: Path):
    config, params = model
    out = write(tmp_path / "out", config, params, hf_type="minicpm")
    row = json.loads((out / "config.json").read_text())
    assert row["model_type"] == "minicpm"
    assert (row["scale_emb"], row["scale_depth"], row["dim_model_base"]) == (1.0, 1.0, 48)
    assert "embedding_multiplier" not in row
    assert huggingface.load(out)[0] == config


def test_released_config_keys_of_a_llama(model):
    config = dataclasses.replace(model[0], scale_depth=None, dim_model_base=None)
    again = from_hf(huggingface.as_minicpm(config, to_hf(config)))
    assert (again.residual_scale, again.logit_divisor, again.scale_emb) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_bin(folder: Path, dtype: str, sharded: bool):
    torch = pytest.importorskip("torch")
    config, params = huggingface.load(folder, jnp.dtype(dtype))
    state = {k: torch.asarray(v).to(getattr(torch, dtype)) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(state)
        halves = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
        for file, part in halves.items():
            torch.save({n: state[n] for n in part}, folder / file)
        index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    again_config, again = huggingface.load(folder)
    assert again_config == config
    assert_same_bits(params, again)


def test_pickles_are_not_run(folder: Path):
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Path("/")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: is not a complete PyTorch file of tensors"):
        huggingface.load(folder)


def test_safetensors_file_alone(folder: Path, model):
    config, params = huggingface.load(folder / "model.safetensors")
    assert config == model[0]
    assert_same_bits(params, model[1])


def test_tied_head_stored_twice(reference: Path, tmp_path: Path):
    shutil.copyfile(reference / GOLDEN[0] / "config.json", tmp_path / "config.json")
    tensors = load_file(reference / GOLDEN[0] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_bits(huggingface.load(tmp_path)[1], huggingface.load(reference / GOLDEN[0])[1])
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight differs from the embedding.*set tie_word_embeddings"):
        huggingface.load(tmp_path)


def test_every_weight_has_one_name(model):
    config, params = model
    listed = list(parts(config, "hf"))
    assert len({p.name for p in listed}) == len(listed) == 3 * 9 + 3
    assert {p.path for p in listed} == set(TABLE)
    assert (
        sum(int(np.prod(p.shape)) for p in listed) == config.num_params == sum(x.size for x in jax.tree.leaves(params))
    )


def test_mixed_dtypes_of_a_stack_become_float32(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    params = huggingface.load(folder)[1]
    assert params["layers"]["up"].dtype == np.float32
    np.testing.assert_array_equal(params["layers"]["up"][0], tensors[name].T.astype(np.float32))


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensor(folder: Path):
    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"tensor model.layers.1.mlp.up_proj.weight \[240, 96\] missing"):
        huggingface.load(folder)


def test_extra_tensor(folder: Path):
    edit(folder, lambda t: t.update({"model.layers.3.bias": np.ones((2, 3), np.float32)}))
    with pytest.raises(UserError, match=r"tensor model.layers.3.bias \[2, 3\] not part of the model"):
        huggingface.load(folder)


def test_wrong_shape(folder: Path):
    def change(t):
        t["model.layers.1.mlp.up_proj.weight"] = np.ascontiguousarray(t["model.layers.1.mlp.up_proj.weight"].T)

    edit(folder, change)
    with pytest.raises(UserError, match=r"up_proj.weight has shape \[96, 240\]; the config makes it \[240, 96\]"):
        huggingface.load(folder)


def test_integer_weights(folder: Path):
    edit(folder, lambda t: t.update({"model.norm.weight": np.ones(96, np.int32)}))
    with pytest.raises(UserError, match=r"tensor model.norm.weight is int32"):
        huggingface.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, 700_000, -1])
def test_truncated_safetensors(folder: Path, keep: int):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: (cut off in|cannot read).*fetch it again") as e:
        huggingface.load(folder)
    if keep in (700_000, -1):
        assert "tensor " in str(e.value)
        assert "float32" in str(e.value)


@pytest.mark.parametrize("seed", range(8))
def test_corrupt_header_is_one_clear_line(folder: Path, seed: int):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, 600, 20):
        data[at] = rng.integers(0, 256)
    path.write_bytes(data)
    with pytest.raises(UserError) as e:
        huggingface.load(folder)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)


def test_shard_missing(model, tmp_path: Path):
    out = write(tmp_path / "out", *model, shard_bytes=300_000)
    first = min(out.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=rf"{first.name}: missing; model.safetensors.index.json lists it"):
        huggingface.load(out)


def test_shard_without_its_tensor(model, tmp_path: Path):
    out = write(tmp_path / "out", *model, shard_bytes=300_000)
    first = min(out.glob("*.safetensors"))
    tensors = load_file(first)
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, first)
    with pytest.raises(UserError, match=r"tensor model.embed_tokens.weight missing; .*index.json puts it there"):
        huggingface.load(out)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"weight_map": {"a": "../b"}}', '{"weight_map": 3}'])
def test_bad_index(folder: Path, text: str):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        huggingface.load(folder)


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", "{}", b"\xff\xfe"])
def test_bad_config(folder: Path, text: str | bytes):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config.json"):
        huggingface.load(folder)


def test_no_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        huggingface.load(folder)
