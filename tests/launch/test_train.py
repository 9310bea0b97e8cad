"""`duplex-jax train` and packed data: what they disagree on is taken from the data, or is one line."""

import dataclasses
from pathlib import Path

import pytest

from configs import tiny
from duplex_jax.data.dataset import MANIFEST, Manifest
from duplex_jax.errors import UserError
from duplex_jax.train.config import Config
from launch.train import as_packed


def packed(folder: Path, length: int, template: str) -> str:
    """A packed dataset, as far as its manifest goes."""
    manifest = Manifest(
        format=1, length=length, rows=1, tokens=9, documents=1, conversations=1, split=0, left_out=0, decisions=1,
        template=template, tokenizer="t", vocab_size=9, model="m", categories=["basic"], category_tokens=[9], hash="h",
        shards=[],
    )  # fmt: skip
    folder.mkdir()
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return str(folder)


def config(*paths: str) -> Config:
    run = tiny.get_config()
    return dataclasses.replace(run, data=dataclasses.replace(run.data, train=paths))


def test_the_data_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A config of 256 tokens and template compact meets rows that the documented `pack` made."""
    run = as_packed(config(packed(tmp_path / "a", 512, "chatml")), set())
    assert (run.data.length, run.model.template) == (512, "chatml")
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'a'}: was packed with length 512; the run takes that in place of the config's 256",
        f"{tmp_path / 'a'}: was packed with template chatml; the run takes that in place of the config's compact",
    ]


def test_what_fits_or_is_not_packed_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in (packed(tmp_path / "a", 256, "compact"), str(tmp_path / "timelines.jsonl")):
        assert as_packed(config(path), set()) == config(path)
    assert capsys.readouterr().out == ""


def test_contradictions_are_one_line(tmp_path: Path):
    a, b = packed(tmp_path / "a", 512, "chatml"), packed(tmp_path / "b", 256, "chatml")
    with pytest.raises(UserError, match=r"a: was packed with length 512, and --config.data.length is 256; pack again "):
        as_packed(config(a), {"data.length"})
    with pytest.raises(UserError, match=r"b: was packed with length 256, and data.length of .*a is 512; pack again"):
        as_packed(config(a, b), set())
