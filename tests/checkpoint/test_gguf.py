"""GGUF files: every type that is read and written, llama.cpp's row order, both architectures, damage that is named."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from duplex_jax.checkpoint import gguf as reader
from duplex_jax.checkpoint import huggingface
from duplex_jax.checkpoint.names import disassemble, parts
from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig, RopeScaling, to_hf
from duplex_jax.model.tree import Params, from_tree
from duplex_jax.sources import read_gguf_header
from duplex_jax.template import make_template
from duplex_jax.tokenizer import HFTokenizer, load_tokenizer
from tests.tiny import byte_tokenizer, fresh_tree, logits_of

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=32,
    rope_theta=20000.0, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which llama.cpp's converter writes q and k: the two halves of each head, zipped."""
    return np.concatenate(
        [np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in np.split(weight, heads)]
    )  # fmt: skip


def write(
    path: Path,
    config: ModelConfig,
    params: Params,
    kind: str = "F32",
    arch: str = "llama",
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    skip: str = "",
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{arch}.{name}", value)
    qtype = gguf.GGMLQuantizationType[kind]
    for part in parts(config, "gguf"):
        if part.name == skip:
            continue
        value = disassemble(config, params, part).astype(np.float32)
        if "attn_q" in part.name or "attn_k" in part.name:
            value = interleave(value, config.num_heads if "attn_q" in part.name else config.num_kv_heads)
        own = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else qtype
        writer.add_tensor(part.name, gguf.quants.quantize(value, own), raw_dtype=own)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def params() -> Params:
    return fresh_tree(CONFIG)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("F32", 0),
        ("F16", 1e-4),
        ("BF16", 5e-4),
        ("Q8_0", 1e-3),
        ("Q4_0", 2e-2),
        ("Q4_1", 2e-2),
        ("Q5_0", 1e-2),
        ("Q5_1", 1e-2),
    ],
)
def test_types(params: Params, tmp_path: Path, kind: str, error: float):
    path = write(tmp_path / "m.gguf", CONFIG, params, kind)
    config, found = reader.load(path)
    assert config == CONFIG
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, atol=error, rtol=0)
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert found["layers"]["q"].dtype.name == stored
    # Exactly what the package's own reader and dequantiser make of each tensor.
    for tensor in gguf.GGUFReader(path).tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for part in parts(config, "gguf"):
            if part.name == tensor.name:
                value = disassemble(config, found, part).astype(np.float32)
                if "attn_q" in part.name or "attn_k" in part.name:
                    value = interleave(value, config.num_heads if "attn_q" in part.name else config.num_kv_heads)
                np.testing.assert_array_equal(value, want.reshape(value.shape), part.name)


def q4_k(block: bytes) -> list[float]:
    """256 weights of a Q4_K block, one at a time (ggml's block_q4_K: d, dmin, 6-bit scales and mins, nibbles)."""
    d, dmin = np.frombuffer(block[:4], np.float16).astype(np.float32)
    packed, nibbles = block[4:16], block[16:]
    out = []
    for i in range(256):
        j = i // 32
        if j < 4:
            scale, low = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4)
            low = (packed[j + 4] >> 4) | (packed[j] >> 6 << 4)
        byte = nibbles[i // 64 * 32 + i % 32]
        q = byte >> 4 if i // 32 % 2 else byte & 15
        out.append(float(d * np.float32(scale)) * q - float(dmin * np.float32(low)))
    return out


def q6_k(block: bytes) -> list[float]:
    """256 weights of a Q6_K block, one at a time (ggml's block_q6_K: low nibbles, high bits, int8 scales, d)."""
    low, high = block[:128], block[128:192]
    scales = np.frombuffer(block[192:208], np.int8)
    d = float(np.frombuffer(block[208:], np.float16)[0])
    out = []
    for i in range(256):
        half, k = divmod(i, 128)
        group, n = divmod(k, 32)
        byte = low[half * 64 + n + 32 * (group % 2)]
        q = (byte >> 4 if group >= 2 else byte & 15) | (high[half * 32 + n] >> 2 * group & 3) << 4
        out.append(d * int(scales[i // 16]) * (q - 32))
    return out


@pytest.mark.parametrize(("kind", "slow", "size"), [("Q4_K", q4_k, 144), ("Q6_K", q6_k, 210)])
def test_k_quants(kind: str, slow, size: int):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (8, 2, size), dtype=np.uint8)
    scale = np.asarray([0.01, 0.02], np.float16).view(np.uint8)
    raw[..., :4] = scale if kind == "Q4_K" else raw[..., :4]
    raw[..., -2:] = scale[:2] if kind == "Q6_K" else raw[..., -2:]
    want = np.asarray([[x for block in row for x in slow(block.tobytes())] for row in raw])
    found = reader._dequantise(raw.reshape(8, -1), kind, (8, 512), None)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_minicpm(reference: Path, tmp_path: Path):
    """The released scales go through their GGUF keys; logits stay those of the released code."""
    config, params = huggingface.load(reference / "minicpm-tiny-mha")
    extra = {
        "embedding_scale": config.scale_emb,
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_divisor,
    }
    path = write(tmp_path / "m.gguf", config, params, arch="minicpm", extra=extra)
    again, found = reader.load(path)
    assert again.residual_scale == pytest.approx(config.residual_scale, rel=1e-6)
    assert (again.scale_emb, again.logit_divisor) == (config.scale_emb, config.logit_divisor)
    assert again.tie_word_embeddings
    expected = np.load(reference / "minicpm-tiny-mha" / "expected.npz")
    logits = logits_of(again, found, expected["input_ids"])
    assert np.abs(logits - expected["logits"]).max() < 1e-4


def test_minicpm_before_its_keys(params: Params, tmp_path: Path):
    config, _ = reader.load(write(tmp_path / "m.gguf", CONFIG, params, arch="minicpm"))
    assert (config.scale_emb, config.logit_divisor) == (12.0, 1.0)
    assert config.residual_scale == pytest.approx(1.4 / math.sqrt(2))


def merging_tokenizer() -> HFTokenizer:
    """A token a byte, one merge, and the control tokens of the compact template."""
    tokenizer = byte_tokenizer()
    tokenizer.spec["model"]["vocab"] |= {"he": 262}
    tokenizer.spec["model"]["merges"] = [["h", "e"]]
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    return HFTokenizer(tokenizer.spec, config=config)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2e-4), ("bfloat16", 2e-3), ("q8_0", 2e-3)])
def test_written_model_comes_back(tmp_path: Path, scaled: bool, dtype: str, error: float):
    """Config, weights as exact as the type, tokenizer and template; norms are exact in each."""
    scales = {"scale_emb": 6.0, "scale_depth": 2.0 * math.sqrt(2), "dim_model_base": 64.0} if scaled else {}
    config = dataclasses.replace(CONFIG, vocab_size=265, tie_word_embeddings=not scaled, vocab_multiple=8,
                                 bos_token_id=256, eos_token_id=257, **scales)  # fmt: skip
    params = fresh_tree(config, 1)
    tokenizer = merging_tokenizer()
    model = LoadedModel("m", from_tree(config, params), tokenizer, make_template("compact", tokenizer, -0.3))
    save_model(model, tmp_path / "m.gguf", format="gguf", dtype=dtype)
    again = load_model(tmp_path / "m.gguf")
    assert again.config == dataclasses.replace(config, vocab_multiple=1)
    for part in parts(config, "gguf"):
        a, b = (disassemble(m.config, m.params, part, np.dtype(np.float32)) for m in (again, model))
        np.testing.assert_allclose(a, b, atol=0 if a.ndim == 1 else error, rtol=0, err_msg=part.name)
    assert again.template.name == "compact"
    assert again.template.idle_bias == np.float32(-0.3)
    assert again.tokenizer.special == tokenizer.special
    text = "hey the <idle> é"
    assert again.tokenizer.encode(text) == tokenizer.encode(text)
    assert 262 in tokenizer.encode(text)
    assert again.tokenizer.config["chat_template"] == "{{ messages }}"
    assert read_gguf_header(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"][263:] == ["[PAD263]", "[PAD264]"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_written_sentencepiece_comes_back(reference: Path, tmp_path: Path):
    config, weights = huggingface.load(reference / "minicpm-tiny-mha")
    tokenizer = load_tokenizer(reference / "minicpm-tokenizer")
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    weights["embed"] = np.zeros((config.vocab_size, config.hidden_size), np.float32)
    reader.save(config, weights, tokenizer, tmp_path / "m.gguf", "float32")
    again = load_model(tmp_path / "m.gguf", template="minicpm").tokenizer
    assert again.special == tokenizer.special
    for text in ("你好, what is  it?", " a <idle> b\n"):
        assert again.encode(text) == tokenizer.encode(text)


def test_what_cannot_be_written(tmp_path: Path, params: Params):
    path = tmp_path / "m.gguf"
    tokenizer = merging_tokenizer()
    with pytest.raises(UserError, match="dtype 'q4_0' is not written as GGUF; one of float32, float16, "):
        reader.save(CONFIG, params, tokenizer, path, "q4_0")
    with pytest.raises(UserError, match="rope scaling 'yarn' is not written as GGUF; --format=hf"):
        reader.save(dataclasses.replace(CONFIG, rope_scaling=RopeScaling("yarn", 2.0, 64)), params, tokenizer, path)
    with pytest.raises(UserError, match="splits text in a way that has no name in GGUF"):
        reader.save(CONFIG, params, byte_tokenizer(), path)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(UserError, match=r"m.gguf: already exists; give another name, or --overwrite"):
        reader.save(CONFIG, params, tokenizer, path)
    assert path.read_text() == "mine"


def test_frequency_factors(params: Params, tmp_path: Path):
    """Llama 3.1's `rope_freqs` become divisors: the same frequencies as from its config.json."""
    from duplex_jax.model.rope import inverse_frequencies

    scaling = RopeScaling("llama3", 8.0, 64, 1.0, 4.0)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    plain = inverse_frequencies(CONFIG, 128)[0]
    wanted = inverse_frequencies(config, 128)[0]
    divisors = (plain / wanted).astype(np.float32)
    path = write(tmp_path / "m.gguf", CONFIG, params, tensors={"rope_freqs.weight": divisors})
    again, _ = reader.load(path)
    for length in (64, 1000):
        frequencies, factor = inverse_frequencies(again, length)
        np.testing.assert_allclose(frequencies, wanted, rtol=1e-6)
        assert factor == 1.0
    assert to_hf(again)["rope_scaling"]["rope_type"] == "longrope"


def test_longrope(params: Params, tmp_path: Path):
    from duplex_jax.model.rope import inverse_frequencies

    short, long = (np.linspace(a, b, 16, dtype=np.float32) for a, b in ((1, 2), (3, 9)))
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    path = write(tmp_path / "m.gguf", CONFIG, params, tensors=tensors)
    config, _ = reader.load(path)
    plain = inverse_frequencies(CONFIG, 1)[0]
    np.testing.assert_allclose(inverse_frequencies(config, 128)[0], plain / short, rtol=1e-6)
    np.testing.assert_allclose(inverse_frequencies(config, 129)[0], plain / long, rtol=1e-6)


def test_header_is_what_the_package_reads(smollm2: LoadedModel):
    from duplex_jax.sources import locate

    path = locate("smollm2-135m-instruct")
    header, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    for name, value in header.fields.items():
        assert value == theirs.fields[name].contents(), name
    assert len(header.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        found = header.tensors[tensor.name]
        assert (found.type, found.offset) == (tensor.tensor_type, tensor.data_offset)
        assert found.shape == tuple(int(n) for n in tensor.shape[::-1])
    assert isinstance(smollm2.tokenizer, HFTokenizer)
    assert smollm2.template.name == "chatml"
    assert smollm2.config.num_params == 134_515_008


@pytest.mark.parametrize(
    ("extra", "scaling"),
    [
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0, 128)),
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0, 128)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, RopeScaling()),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 16.0,
             "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 0.5},
            RopeScaling("yarn", 4.0, 128, beta_fast=16.0, beta_slow=2.0,
                        attention_factor=0.5 * (1 + 0.1 * math.log(4.0))),
        ),
    ],
)  # fmt: skip
def test_rope_scaling_as_llama_cpp_reads_it(params: Params, tmp_path: Path, extra: dict, scaling: RopeScaling):
    """A factor without a type is linear, `rope.scale_linear` is its older key, yarn has its own constants."""
    path = write(tmp_path / "m.gguf", CONFIG, params, extra=extra)
    assert reader.load(path)[0].rope_scaling == scaling


def test_yarn_that_is_computed_otherwise_is_refused(params: Params, tmp_path: Path):
    extra = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_log_multiplier": 0.1}
    with pytest.raises(UserError, match="yarn_log_multiplier is not supported"):
        reader.load(write(tmp_path / "m.gguf", CONFIG, params, extra=extra))


def test_parts_and_the_other_byte_order_are_told(params: Params, tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match=r"part 2 of 3; merge them with llama.cpp's gguf-split --merge"):
        read_gguf_header(tmp_path / "part.gguf")
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match="big-endian; turn it with gguf-convert-endian FILE little"):
        read_gguf_header(tmp_path / "big.gguf")


def test_other_architecture(params: Params, tmp_path: Path):
    path = write(tmp_path / "m.gguf", CONFIG, params, arch="qwen2")
    with pytest.raises(UserError, match=r"m.gguf: architecture 'qwen2' is not supported; llama and minicpm are"):
        load_model(path)


def test_other_tensor_type(params: Params, tmp_path: Path):
    path = write(tmp_path / "m.gguf", CONFIG, params, "TQ2_0")
    with pytest.raises(UserError, match=r"tensor token_embd.weight \[64, 256\] is of type TQ2_0; F32, "):
        reader.load(path)


def test_experts(params: Params, tmp_path: Path):
    path = write(tmp_path / "m.gguf", CONFIG, params, extra={"expert_count": 8})
    with pytest.raises(UserError, match=r"llama.expert_count=8.0 is not supported"):
        reader.load(path)


def test_missing_tensor(params: Params, tmp_path: Path):
    path = write(tmp_path / "m.gguf", CONFIG, params, skip="blk.1.attn_k.weight")
    with pytest.raises(UserError, match=r"tensor blk.1.attn_k.weight \[128, 256\] missing"):
        reader.load(path)


def test_wrong_shape(params: Params, tmp_path: Path):
    other = params | {"final_norm": params["final_norm"][:32]}
    path = write(tmp_path / "m.gguf", CONFIG, other)
    with pytest.raises(UserError, match=r"output_norm.weight has shape \[32\]; the config makes it \[256\]"):
        reader.load(path)


def test_truncated(params: Params, tmp_path: Path):
    path = write(tmp_path / "m.gguf", CONFIG, params, "Q8_0")
    data = path.read_bytes()
    for keep in (0, 3, 20, 200, 600):
        path.write_bytes(data[:keep])
        with pytest.raises(UserError, match=r"m.gguf: (is not a complete GGUF file|cannot read).*fetch it again"):
            reader.load(path)
    for keep in (5000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(UserError, match=r"m.gguf: cut off in tensor \S+ \[\d+(, \d+)?\] \(\w+, up to byte"):
            reader.load(path)


def test_no_gguf(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_text("a text file, and not a model at all")
    with pytest.raises(UserError, match="does not start with 'GGUF'"):
        reader.load(path)


@pytest.mark.parametrize("seed", range(40))
def test_corrupt_header_is_one_clear_line(params: Params, tmp_path: Path, seed: int):
    path = write(tmp_path / "m.gguf", CONFIG, params)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(4, 1500, 12):
        data[at] = rng.integers(0, 256)
    path.write_bytes(data)
    message = None
    try:
        reader.load(path)
    except UserError as e:
        message = str(e)
    # A changed byte may do no harm, in a name that is not read.
    assert message is None or ("\n" not in message and str(path) in message)
