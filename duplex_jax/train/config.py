"""Configuration of a run: frozen dataclasses, built by a Python file; dotted flags override single fields."""

import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.files import local_path
from duplex_jax.model.attention import BACKENDS
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import REMAT
from duplex_jax.parallel import MeshSpec, check_batch

SCHEDULES = ("wsd", "cosine", "linear", "constant")
DECAYS = ("exponential", "linear", "cosine", "1-sqrt")
DTYPES = ("float32", "bfloat16")
ON_BAD = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class Model:
    """The model to train.

    Attributes:
        source: the model to start from, as `--model` takes it; empty for random weights of `shape`.
        shape: shape of random weights; its vocabulary is enlarged to the tokenizer's if smaller. `compile` and the
            benchmarks also use it, in place of `source`.
        tokenizer: where the tokenizer comes from; by default the source's own.
        template: minicpm, chatml or compact; by default the model's own.
        vocab_multiple: the vocabulary is padded to a multiple of this, so that tensor parallelism divides it.
    """

    source: str = ""
    shape: ModelConfig | None = None
    tokenizer: str = ""
    template: str = ""
    vocab_multiple: int = 1


@dataclasses.dataclass(frozen=True)
class Data:
    """The training data.

    Attributes:
        train: packed datasets, or files or folders of conversations that are small enough to pack at startup.
        weights: each dataset's share of the rows; proportional to size if empty.
        eval: held-out data, in the same forms; empty for none.
        length: T, tokens per row.
        batch: rows per step over all devices.
        micro_batches: number of micro-batches per step, whose gradients are summed; 0 for one row per device at a time.
        idle_weight: loss weight of idle decisions; speech has weight 1.
        seed: seed of the row order.
        workers: processes that read data; 0 for a thread.
    """

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    eval: tuple[str, ...] = ()
    length: int = 4096
    batch: int = 8
    micro_batches: int = 1
    idle_weight: float = 1.0
    seed: int = 0
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its learning rate schedule.

    Attributes:
        steps: number of steps in the run.
        lr: peak learning rate.
        schedule: wsd, cosine, linear or constant, each after a linear warm-up.
        warmup: number of warm-up steps.
        decay: shape of WSD's decay: exponential, linear, cosine or 1-sqrt.
        decay_steps: length of the decay; the stable phase ends at `steps - decay_steps`.
        final: last learning rate divided by the peak.
        decay_from: a stable checkpoint (`WORKDIR` or `WORKDIR@STEP`) from which this run starts its decay at once.
        beta1, beta2, eps, weight_decay: AdamW's parameters; norms and vectors are not decayed.
        clip: maximum global gradient norm; 0 for no clipping.
    """

    steps: int = 1000
    lr: float = 1e-3
    schedule: str = "wsd"
    warmup: int = 50
    decay: str = "exponential"
    decay_steps: int = 100
    final: float = 0.1
    decay_from: str = ""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021, "LoRA").

    Attributes:
        rank: rank of the updates; 0 trains all weights.
        alpha: updates are scaled by `alpha / rank`.
        targets: names of the weights in a layer that get an update.
        new_tokens: also train the embedding (and head) rows of the template's control tokens.
        merge: export the merged model instead of the adapter alone.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    new_tokens: bool = True
    merge: bool = True


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a step is computed.

    Attributes:
        dtype: dtype of the computation; master weights and moments stay float32.
        frozen_dtype: dtype of the weights that LoRA leaves frozen.
        remat: what the backward pass recomputes: none; dots (all but products with weights and attention); attention
            (all but attention); or full.
        attention: xla, splash (TPU), cudnn (GPU, bfloat16), or auto: the mesh's own, but xla for float32 on GPUs.
        loss_chunk: tokens of a row whose logits are materialised at once.
    """

    dtype: str = "float32"
    frozen_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    loss_chunk: int = 512


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save checkpoints and which to keep.

    Attributes:
        every: steps between checkpoints; 0 for only the last step.
        every_minutes: also save when this many minutes have passed since the last checkpoint; 0 for never.
        keep: how many of the newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are kept for good; 0 for none.
        export: write the model for `chat` at the end of the run.
    """

    every: int = 500
    every_minutes: float = 0.0
    keep: int = 2
    keep_every: int = 0
    export: bool = True


@dataclasses.dataclass(frozen=True)
class Log:
    """Logging and evaluation.

    Attributes:
        every: steps between log lines.
        eval_every: steps between evaluations; 0 for only the last step.
        eval_batches: most batches per evaluation; 0 for all rows.
        tensorboard: write TensorBoard events if tensorboardX is installed.
        wandb: name of a Weights & Biases project; empty for none.
    """

    every: int = 10
    eval_every: int = 0
    eval_batches: int = 0
    tensorboard: bool = False
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Trouble:
    """What to do at a bad step: a loss or gradient that is not finite, or a loss spike.

    Attributes:
        action: `stop`, or `skip` the update and continue; the weights stay unchanged either way.
        spike: a loss above this multiple of its running mean is a spike; 0 disables the check.
        most: number of consecutive skipped updates after which the run stops.
    """

    action: str = "stop"
    spike: float = 0.0
    most: int = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        name: name of the experiment.
        seed: seed of the initial weights.
        model, data, optim, lora, compute, checkpoint, log, trouble: see each class.
    """

    name: str
    seed: int = 0
    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    lora: Lora = Lora()
    compute: Compute = Compute()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    trouble: Trouble = Trouble()


def load_config(path: str | Path) -> Config:
    """The config returned by a Python file's `get_config()`.

    Raises:
        UserError: there is no such file, or it returns no config.
    """
    path = Path(path)
    if not path.is_file():
        there = [str(p) for p in sorted(path.parent.glob("[!_]*.py"))] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), there, 1)
        raise UserError(f"--config={path}: no such file; {f'did you mean {near[0]}?' if near else 'see configs/'}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: is not a Python file; see configs/ for examples")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if hasattr(module, "get_config") else None
    if not isinstance(config, Config):
        raise UserError(f"--config={path}: has no get_config() that returns a duplex_jax.train.config.Config")
    return config


def override(config: Any, settings: Sequence[tuple[str, str]]) -> Any:
    """A config with fields replaced by dotted name, as in `("optim.lr", "3e-4")`; sequences are comma-separated.

    Raises:
        UserError: there is no such field (the message names the nearest one), or the value has the wrong type.
    """
    for name, text in settings:
        config = _set(config, name.split("."), text, name)
    return config


def _set(node: Any, path: list[str], text: str, full: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(node)}
    head, rest = path[0], path[1:]
    if head not in fields:
        near = difflib.get_close_matches(head, fields, 1, cutoff=0.4)
        prefix = full[: len(full) - len(".".join(path))]
        known = f"did you mean --config.{prefix}{near[0]}?" if near else f"the fields are {', '.join(fields)}"
        raise UserError(f"--config.{full}: there is no field {head!r}; {known}")
    value = getattr(node, head)
    if not rest:
        if dataclasses.is_dataclass(value):
            names = ", ".join(f"{full}.{f.name}" for f in dataclasses.fields(value))
            raise UserError(f"--config.{full}: is a group of fields; set one of {names}")
        return dataclasses.replace(node, **{head: _parse(_hints(type(node))[head], text, full)})
    if not dataclasses.is_dataclass(value):
        raise UserError(f"--config.{full}: {head!r} has no fields of its own in this config")
    return dataclasses.replace(node, **{head: _set(value, rest, text, full)})


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _parse(kind: Any, text: str, name: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        return _parse(kind, text, name)
    if origin is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(_parse(inner, part.strip(), name) for part in text.split(",") if part.strip())
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is int and "e" in text.lower():
            number = float(text)
            if number != int(number):
                raise ValueError(text)
            return int(number)
        return kind(text.replace("_", "") if kind is int else text)
    except (ValueError, KeyError):
        raise UserError(f"--config.{name}={text}: must be of type {kind.__name__}") from None


def _local(config: Config) -> Config:
    """The config with its paths converted by `files.local_path`.

    Raises:
        UserError: a field holds a URL; the message names it.
    """
    for name in ("model.source", "model.tokenizer", "data.train", "data.eval", "optim.decay_from"):
        group, field = name.split(".")
        node = getattr(config, group)
        value = getattr(node, field)
        try:
            found = local_path(value) if isinstance(value, str) else tuple(map(local_path, value))
        except UserError as e:
            raise UserError(f"config.{name}: {e}") from e
        config = dataclasses.replace(config, **{group: dataclasses.replace(node, **{field: found})})
    return config


def check(config: Config) -> Config:
    """Checks that the settings are consistent; returns the config with local paths.

    Raises:
        UserError: they are not; the message names the field and what would be right.
    """
    for field, value, allowed in (
        ("optim.schedule", config.optim.schedule, SCHEDULES),
        ("optim.decay", config.optim.decay, DECAYS),
        ("compute.dtype", config.compute.dtype, DTYPES),
        ("compute.frozen_dtype", config.compute.frozen_dtype, DTYPES),
        ("compute.remat", config.compute.remat, tuple(REMAT)),
        ("compute.attention", config.compute.attention, ("auto", *BACKENDS)),
        ("trouble.action", config.trouble.action, ON_BAD),
    ):
        if value not in allowed:
            raise UserError(f"config.{field}={value}: must be one of {', '.join(allowed)}")
    for field, number in (
        ("optim.steps", config.optim.steps), ("optim.lr", config.optim.lr), ("data.length", config.data.length),
        ("data.batch", config.data.batch),
        ("compute.loss_chunk", config.compute.loss_chunk), ("log.every", config.log.every),
        ("model.vocab_multiple", config.model.vocab_multiple), ("checkpoint.keep", config.checkpoint.keep),
    ):  # fmt: skip
        if number <= 0:
            raise UserError(f"config.{field}={number}: must be above 0")
    if config.compute.attention == "cudnn" and config.compute.dtype == "float32":
        raise UserError("config.compute.attention=cudnn: does not support float32; give "
                        "--config.compute.dtype=bfloat16 or --config.compute.attention=auto")  # fmt: skip
    if config.lora.rank and not config.lora.merge and not config.model.source:
        raise UserError("config.lora.merge=False: an adapter needs a model.source to be loaded onto")
    if config.data.micro_batches < 0:
        raise UserError(f"config.data.micro_batches={config.data.micro_batches}: must be 0 (the mesh's) or more")
    if config.checkpoint.every_minutes < 0:
        raise UserError(f"config.checkpoint.every_minutes={config.checkpoint.every_minutes}: must be 0 (never) or more")
    if config.lora.rank < 0:
        raise UserError(f"config.lora.rank={config.lora.rank}: must be 0 (train every weight) or more")
    if not 0 <= config.optim.final <= 1:
        raise UserError(f"config.optim.final={config.optim.final}: must be from 0 to 1, a share of the learning rate")
    if config.optim.schedule == "wsd" and config.optim.warmup + config.optim.decay_steps > config.optim.steps:
        raise UserError(
            f"config.optim: warm-up {config.optim.warmup} and decay {config.optim.decay_steps} are more than "
            f"{config.optim.steps} steps; lower optim.warmup or optim.decay_steps, or raise optim.steps"
        )
    if not config.model.source and config.model.shape is None:
        raise UserError("config.model: needs a source to start from, or a shape for fresh weights")
    return _local(config)


def fit_batch(config: Config, spec: MeshSpec) -> Config:
    """The config with the number of micro-batches resolved for a mesh.

    Raises:
        UserError: the batch does not divide evenly.
    """
    data = config.data
    whole = data.batch % spec.batch_shards == 0
    parts = data.micro_batches or (data.batch // spec.batch_shards if whole else 1)
    check_batch(spec, data.batch, parts)
    return dataclasses.replace(config, data=dataclasses.replace(data, micro_batches=parts))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(row: Mapping[str, Any], kind: type = Config) -> Any:
    """Inverse of `to_dict`; unknown fields are ignored, and missing ones get their default."""
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name not in row:
            continue
        value, hint = row[field.name], hints[field.name]
        options = [k for k in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(k)]
        if options and value is not None:
            value = from_dict(value, options[0])  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        values[field.name] = value
    return kind(**values)


def to_lines(config: Any, prefix: str = "config") -> list[str]:
    """Every field as the flag that sets it."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            lines += to_lines(value, name)
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"--{name}={text}")
    return lines
