"""Damaged model files: every reader loads them or says what is wrong in one line, whatever the damage."""

import dataclasses
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duplex_jax.checkpoint import adapter, peft, safetensors
from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.checkpoint.resolve import resolve
from duplex_jax.data.dataset import PackedRows, write_packed
from duplex_jax.errors import UserError
from duplex_jax.model.config import from_hf
from duplex_jax.model.tree import from_tree
from duplex_jax.template import make_template
from tests import made_timelines
from tests.bounds import bounded
from tests.checkpoint.test_gguf import merging_tokenizer
from tests.checkpoint.test_registry import random_params, tiny

_NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 10**12, 10**400, 0.5, float("nan"), float("inf"), "", "x" * 300, "12", [], {}, [[]],
    {"content": 3}, [1, "a"], [-1],
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every form: a folder, a GGUF file, and an adapter upon the folder."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer, grown = merging_tokenizer(), dataclasses.replace(tiny().config, vocab_size=263)
    made = LoadedModel(
        "tiny", from_tree(grown, random_params(grown, 0)), tokenizer, make_template("compact", tokenizer)
    )
    save_model(tiny(), folder / "hf")
    save_model(made, folder / "model.gguf", format="gguf")
    what = adapter.Adapter(str(folder / "hf"), "chatml", 2, 4.0, (258,))
    config = tiny().config
    rows = {"embed": np.ones((1, config.hidden_size)), "head": np.ones((1, config.hidden_size))}
    width = config.num_heads * config.head_dim
    update = {"a": np.ones((config.num_layers, config.hidden_size, 2)), "b": np.ones((config.num_layers, 2, width))}
    adapter.save(folder / "adapter", what, {"layers": {"q": update}, "rows": rows})
    peft.save(folder / "peft", what, {"layers": {"q": update}, "rows": rows}, np.dtype(np.float32))
    shutil.copytree(folder / "hf", folder / "sharded")
    weights = load_file(folder / "hf" / "model.safetensors")
    (folder / "sharded" / "model.safetensors").rename(folder / "sharded" / "model-1.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(folder / "hf", folder / "prompted")
    (folder / "prompted" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] | trim }}{% endfor %}"
    )
    save_model(tiny(), folder / "orbax", format="orbax")
    data, tokenizer_folder = made_timelines.write(folder, n=8)
    write_packed(data, folder / "packed", str(tokenizer_folder), 64)
    for name in ("hf", "model.gguf", "adapter", "peft", "sharded", "prompted", "orbax"):
        load_model(folder / name)
    return folder


def read(path: Path) -> None:
    """Loads a model, or rows; the only error is one line, and little is taken."""
    told = ""
    try:
        with bounded():
            if path.name == "packed":
                rows = PackedRows(path, verify=True)
                assert rows[0]
            else:
                load_model(path)
    except UserError as e:
        told = str(e)
    assert "\n" not in told
    assert len(told) < 1000


def damaged_json(row: Any, source: random.Random) -> Any:
    """The value with one place in it changed."""
    if isinstance(row, dict) and row and source.random() < 0.9:
        key = source.choice(sorted(row))
        if source.random() < 0.15:
            return {k: v for k, v in row.items() if k != key}
        return row | {key: damaged_json(row[key], source)}
    if isinstance(row, list) and row and source.random() < 0.7:
        i = source.randrange(len(row))
        return [*row[:i], damaged_json(row[i], source), *row[i + 1 :]]
    return source.choice(_NASTY)


def damaged_bytes(data: bytes, source: random.Random, reach: int) -> bytes:
    """Bits flipped, numbers replaced, a stretch left out or the end cut off, mostly near the beginning."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 3))):
        at = source.randrange(min(reach, len(changed)))
        kind = source.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            changed[at : at + 8] = struct.pack("<Q", source.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
        elif kind == 2:
            del changed[at : at + source.randrange(1, 64)]
        elif kind == 3:
            del changed[at:]
            changed = changed or bytearray(b"x")
        else:
            changed[at : at + 4] = source.randbytes(4)
    return bytes(changed)


JSON_FILES = (
    "hf/config.json", "hf/tokenizer.json", "hf/tokenizer_config.json", "hf/generation_config.json",
    "adapter/adapter.json", "peft/adapter_config.json", "peft/duplex.json", "sharded/model.safetensors.index.json",
    "packed/manifest.json", "orbax/config.json",
)  # fmt: skip
BINARIES = {
    "hf/model.safetensors": 1200, "model.gguf": 8000, "adapter/adapter.safetensors": 400,
    "peft/adapter_model.safetensors": 400, "prompted/chat_template.jinja": 100, "packed/rows-00000.arrayrecord": 4000,
}  # fmt: skip


@pytest.mark.parametrize("name", [*JSON_FILES, *BINARIES])
def test_damaged_files_are_told_in_one_line(model: Path, tmp_path: Path, name: str):
    target = model / name
    good = target.read_bytes()
    try:
        for seed in range(80):
            source = random.Random(f"{name} {seed}")
            if name in BINARIES:
                target.write_bytes(damaged_bytes(good, source, BINARIES[name]))
            elif seed % 8 == 0:
                target.write_bytes(damaged_bytes(good, source, len(good)))
            else:
                target.write_text(json.dumps(damaged_json(json.loads(good), source)))
            read(target if name.endswith(".gguf") else target.parent)
    finally:
        target.write_bytes(good)


def changed(model: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(model / Path(name).parent, folder)
    path = folder / Path(name).name
    row = json.loads(path.read_text())
    change(row)
    path.write_text(json.dumps(row))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("hf/config.json", {"rope_theta": float("nan")}, "config.json: rope_theta is nan"),
        ("hf/config.json", {"num_hidden_layers": 10**9}, "config.json: num_layers is 1000000000"),
        ("hf/config.json", {"num_attention_heads": 0}, "config.json: "),
        ("hf/config.json", {"duplex": {"idle_bias": float("inf")}}, "duplex: idle_bias"),
        ("hf/config.json", {"duplex": {"template": "x"}}, "names the template 'x'"),
        ("hf/config.json", {"eos_token_id": -1}, "config.json: eos_token_id"),
        ("hf/generation_config.json", {"temperature": "hot"}, "generation_config.json: temperature"),
        ("hf/tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<x>"}}}, None),
        ("hf/tokenizer_config.json", {"chat_template": 3}, "tokenizer_config.json: chat_template"),
        ("hf/tokenizer.json", {"added_tokens": [{"id": 10**9, "content": "<x>"}]}, "tokenizer.json: added_tokens.0.id"),
        ("adapter/adapter.json", {"alpha": float("nan")}, "adapter.json: alpha"),
        ("adapter/adapter.json", {"row_ids": [-1]}, "adapter.json: row_ids.0"),
        ("adapter/adapter.json", {"idle_bias": float("inf")}, "adapter.json: idle_bias"),
        ("adapter/adapter.json", {"rank": 3}, "is not of rank 3"),
    ],
)
def test_values_that_no_model_has(model: Path, tmp_path: Path, name: str, change: dict, words: str | None):
    folder = changed(model, tmp_path, name, lambda row: row.update(change))
    if words is None:
        load_model(folder)
        return
    with pytest.raises(UserError, match=words):
        load_model(folder)


def test_an_adapter_upon_itself(model: Path, tmp_path: Path):
    folder = changed(model, tmp_path, "adapter/adapter.json", lambda row: None)
    row = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(row | {"base": str(folder)}))
    with pytest.raises(UserError, match="is its own base"):
        resolve(folder)


def test_more_tokens_than_rows(model: Path, tmp_path: Path):
    """Told before tokens of the template are added, which would hide it behind rows of zeros."""

    def add(row: dict[str, Any]) -> None:
        for token in row["added_tokens"]:
            token["id"] += 100

    folder = changed(model, tmp_path, "hf/tokenizer.json", add)
    for template in (None, "compact"):
        with pytest.raises(UserError, match=r"has \d+ ids but the model has \d+ rows; they do not belong"):
            load_model(folder, template=template)


def test_overlapping_tensors(tmp_path: Path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry | {"data_offsets": [4, 12]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(UserError, match="tensors a and b overlap"):
        safetensors.open_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers(model: Path, tmp_path: Path, kind: Any):
    folder = changed(model, tmp_path, "hf/config.json", lambda row: None)
    weights = {n: np.array(t.read(), kind) for n, t in safetensors.open_file(folder / "model.safetensors").items()}
    weights["model.norm.weight"][3] = np.nan
    weights["model.norm.weight"][5] = -np.inf
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"2 of \d+ weights of tensor model.norm.weight are NaN or infinite"):
        load_model(folder)


def test_from_hf_reads_a_list_of_ends():
    row = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = from_hf(row | {"num_attention_heads": 2, "eos_token_id": [5, 6]})
    assert config.eos_token_id == 5
    hash(config)
