"""Every flag that names a file, a folder or a model goes through one function: `~` is expanded, URLs refused."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from duplex_jax.errors import UserError
from duplex_jax.files import local_path
from duplex_jax.model.config import ModelConfig
from duplex_jax.native import cache_folder
from duplex_jax.sources import locate
from duplex_jax.train.config import Config, Data, Model, Optim, check

REPOSITORY = Path(__file__).parents[2]

# Flags of words that are no paths. A new flag is added here, or made with `app.path_flag`.
WORDS = {
    "allowed_hosts", "allowed_origins", "categories", "contexts", "coordinator", "dtype", "fold", "histories", "host",
    "idle_bias", "judge_model", "mind", "mind_model", "profile", "programs", "rewriter_model", "seeds", "server",
    "shares", "stages", "system", "tasks", "template", "ways",
}  # fmt: skip


def words_flags() -> Iterator[tuple[str, str]]:
    """The file and name of each flag that is made with `DEFINE_string` or `DEFINE_list` and a name written out."""
    for path in sorted((REPOSITORY / "launch").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("DEFINE_string", "DEFINE_list") and isinstance(node.args[0], ast.Constant):
                yield path.name, node.args[0].value


def test_no_flag_takes_a_path_as_a_word():
    found = list(words_flags())
    assert len(found) > 15
    assert [(file, name) for file, name in found if name not in WORDS] == []


def test_local_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/x/") == "/home/me/x/"
    for same in ("", "data/x", "/x", "./~/x", "a~b", "hf:owner/name", "out/run@40", "C:/x"):
        assert local_path(same) == same
    for url in ("gs://bucket/x", "s3://bucket/x", "https://host/x", "gs:/bucket"):
        with pytest.raises(UserError, match="URLs cannot be read or written; give a local path"):
            local_path(url)
    with pytest.raises(UserError, match="give the path alone, without file://"):
        local_path("file:///x")
    with pytest.raises(UserError, match="no such user"):
        local_path("~nobody-of-that-name/x")


def test_paths_that_are_no_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Fields of a config, a model's name in Python, the cache's variable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shape = ModelConfig(16, 8, 8, 1, 1, 1, 8)
    config = Config("c", model=Model(shape=shape, tokenizer="~/m"), data=Data(train=("~/a", "b"), eval=("~/c",)))
    config = check(config)
    assert config.model.tokenizer == f"{tmp_path}/m"
    assert (config.data.train, config.data.eval) == ((f"{tmp_path}/a", "b"), (f"{tmp_path}/c",))
    with pytest.raises(UserError, match=r"config.optim.decay_from: gs://b/run@4: gs: URLs"):
        check(Config("c", model=Model(shape=shape), optim=Optim(decay_from="gs://b/run@4")))
    (tmp_path / "model").mkdir()
    assert locate("~/model") == tmp_path / "model"
    with pytest.raises(UserError, match="gs: URLs"):
        locate("gs://bucket/model")
    monkeypatch.setenv("DUPLEX_JAX_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("DUPLEX_JAX_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match="gs: URLs"):
        cache_folder()


def job(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HOME": str(home), "PYTHONPATH": str(REPOSITORY), "GLIBC_TUNABLES": ""}
    command = [sys.executable, "-m", "launch.main", *words]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "--model=m", "--out=gs://bucket/m"],
        ["train", f"--config={REPOSITORY}/configs/tiny.py", "--workdir=gs://bucket/run"],
        ["train", f"--config={REPOSITORY}/configs/tiny.py", "--workdir=run", "--config.data.train=s3://bucket/d"],
        ["pack", "--input=x", "--out=gs://bucket/p", "--model=m"],
        ["evaluate", "behaviour", "--model=m", "--data=d", "--out=o", "--beside=a,gs://bucket/b"],
        ["bench", "decode", "png=gs://bucket/x.png"],
    ],
    ids=lambda words: words[0],
)
def test_urls_are_refused_before_work(tmp_path: Path, words: list[str]):
    done = job(tmp_path, *words)
    assert done.returncode == 2
    assert "URLs cannot be read or written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_home_is_expanded_in_every_flag(tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"id": "1", "data": ["Hello there", "Hello. How are you?"]}\n')
    done = job(tmp_path, "generate", "--input=~/in.jsonl", "--out=~/made", "--categories=basic", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "made"]
    done = job(
        tmp_path, "pack", "--input=~/in.jsonl", "--out=~/packed", "--model=smollm2-135m-instruct", "--length=256"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "packed/manifest.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "made", "packed"]
