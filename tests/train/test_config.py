"""Dotted flags: every field can be set, none can be invented, and a config survives being stored."""

import dataclasses
from pathlib import Path

import pytest

from duplex_jax import parallel
from duplex_jax.errors import UserError
from duplex_jax.train import config as configs
from launch.dotted import take_dotted

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("[!_]*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_loads_and_comes_back(path: Path):
    config = configs.check(configs.load_config(path))
    assert configs.from_dict(configs.to_dict(config)) == config
    text = path.read_text()
    assert f"--config=configs/{path.name}" in text
    assert all(word in text for word in ("Needs:", "--workdir"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_printed_flags_make_the_same_config(path: Path):
    config = configs.load_config(path)
    lines = [line.removeprefix("--config.").split("=", 1) for line in configs.to_lines(config)]
    again = configs.override(config, [(name, value) for name, value in lines if "rope_scaling" not in name])
    assert again == config


def tiny() -> configs.Config:
    return configs.load_config(FOLDER / "tiny.py")


def test_types():
    changed = configs.override(
        tiny(),
        [
            ("optim.lr", "3e-4"), ("optim.steps", "1e3"), ("data.train", "a,b"), ("data.weights", "0.5,0.5"),
            ("log.tensorboard", "true"), ("model.shape.num_layers", "7"), ("model.shape.scale_depth", "none"),
            ("lora.targets", "q,v"), ("name", "x"),
        ],
    )  # fmt: skip
    assert changed.optim.lr == 3e-4
    assert changed.optim.steps == 1000
    assert changed.data.train == ("a", "b")
    assert changed.data.weights == (0.5, 0.5)
    assert changed.log.tensorboard is True
    assert changed.model.shape is not None
    assert changed.model.shape.num_layers == 7
    assert changed.model.shape.scale_depth is None
    assert changed.lora.targets == ("q", "v")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.learning_rate", "1", "did you mean --config.optim."),
        ("optim.stpes", "1", "did you mean --config.optim.steps?"),
        ("otpim.lr", "1", "did you mean --config.optim?"),
        ("optim", "1", "is a group of fields"),
        ("optim.lr.x", "1", "has no fields of its own"),
        ("optim.steps", "many", "must be of type int"),
        ("optim.steps", "1.5e0", "must be of type int"),
        ("log.tensorboard", "perhaps", "must be of type bool"),
    ],
)
def test_an_override_that_cannot_be(name: str, value: str, message: str):
    with pytest.raises(UserError) as e:
        configs.override(tiny(), [(name, value)])
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.schedule", "wds", "one of wsd"),
        ("optim.decay", "sqrt", "1-sqrt"),
        ("compute.remat", "some", "one of none, full, attention, dots"),
        ("compute.attention", "flash", "one of auto, xla"),
        ("optim.warmup", "500", "are more than"),
        ("optim.final", "2", "0 to 1"),
        ("data.batch", "0", "must be above 0"),
        ("checkpoint.every_minutes", "-1", "must be 0 (never) or more"),
        ("trouble.action", "ignore", "one of stop, skip"),
    ],
)
def test_a_value_that_makes_no_sense(name: str, value: str, message: str):
    with pytest.raises(UserError) as e:
        configs.check(configs.override(tiny(), [(name, value)]))
    assert message in str(e.value)


def test_a_file_that_is_no_config(tmp_path: Path):
    with pytest.raises(UserError, match=r"did you mean .*tiny\.py"):
        configs.load_config(FOLDER / "tiyn.py")
    (tmp_path / "x.py").write_text("y = 1\n")
    with pytest.raises(UserError, match="has no get_config"):
        configs.load_config(tmp_path / "x.py")


def test_dotted_flags_leave_the_others():
    rest, dotted = take_dotted(["--mesh=cpu1", "--config.optim.lr=1", "--config=x.py", "-config.data.batch", "4", "y"])
    assert rest == ["--mesh=cpu1", "--config=x.py", "y"]
    assert dotted == [("optim.lr", "1"), ("data.batch", "4")]


def test_micro_batches_that_a_mesh_asks_for():
    config = configs.load_config(FOLDER / "minicpm_2b_duplex.py")
    for mesh, parts in (("v5e-16", 50), ("a100x8", 100), ("a100x40", 20), ("v5p-64", 25)):
        assert configs.fit_batch(config, parallel.load_mesh_spec(mesh)).data.micro_batches == parts
    with pytest.raises(UserError, match="such as 768"):
        configs.fit_batch(config, parallel.load_mesh_spec("v5e-256"))


@pytest.mark.parametrize("name", parallel.mesh_names())
def test_every_mesh_carries_the_paper_s_model(name: str):
    spec = parallel.load_mesh_spec(name)
    config = configs.load_config(FOLDER / "minicpm_2b_duplex.py")
    assert config.model.shape is not None
    parallel.check_model(spec, dataclasses.replace(config.model.shape, vocab_multiple=config.model.vocab_multiple))
    assert spec.name == name
    assert spec.size % spec.hosts == 0
