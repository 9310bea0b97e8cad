"""Writes a run's metrics to the terminal, JSONL, TensorBoard and Weights & Biases."""

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

from duplex_jax.train.config import Config

FILE = "metrics.jsonl"


class Metrics:
    """Writes each step's metrics to every configured destination, on the first process only.

    Args:
        workdir: the run's folder; `metrics.jsonl` and `tensorboard/` are created there.
        config: the run's settings.
        start: the step from which the run continues; lines of later steps, from an interrupted run, are removed.
    """

    def __init__(self, workdir: Path, config: Config, start: int):
        self._on = jax.process_index() == 0
        self._board: Any = None
        self._wandb: Any = None
        self._steps = config.optim.steps
        self._started = time.monotonic()
        self._first = start
        if not self._on:
            return
        path = workdir / FILE
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= start]
            path.write_text("".join(line + "\n" for line in lines))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open until `close`
        if config.log.tensorboard:
            if importlib.util.find_spec("tensorboardX"):
                from tensorboardX import SummaryWriter

                self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
            else:
                logging.warning("log.tensorboard: tensorboardX is not installed; pip install 'duplex-jax[tensorboard]'")
        if config.log.wandb:
            if importlib.util.find_spec("wandb"):
                import wandb

                from duplex_jax.train.config import to_dict

                self._wandb = wandb.init(
                    project=config.log.wandb, name=config.name, dir=str(workdir), config=to_dict(config),
                    id=workdir.resolve().name, resume="allow",
                )  # fmt: skip
            else:
                logging.warning("log.wandb: wandb is not installed; pip install wandb")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds one line; `values` are numbers, or dictionaries of them."""
        if not self._on:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        flat = {k: v for k, v in _flatten(values) if isinstance(v, int | float)}
        if self._board is not None:
            for name, value in flat.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)
        self._print(step, values)

    def _print(self, step: int, values: dict[str, Any]) -> None:
        if "eval" in values:
            e = values["eval"]
            text = f"eval loss {e['loss']:.4f}  perplexity {e['perplexity']:.2f}"
            if e.get("idle_f1") is not None:
                text += f"  idle P {e['idle_precision']:.3f} R {e['idle_recall']:.3f} F1 {e['idle_f1']:.3f}"
        else:
            done = max(1, step - self._first)
            left = (time.monotonic() - self._started) / done * (self._steps - step)
            text = (
                f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  |g| {values['grad_norm']:.2f}  "
                f"{values['tokens_per_second']:,.0f} tok/s  MFU {values['mfu']:.1%}  fill {values['packing']:.3f}  "
                f"wait {values['data_wait']:.2f} s  mem {values['memory_gib']:.2f} GiB  left {_clock(left)}"
            )
        print(f"step {step}/{self._steps}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flushes and closes all destinations."""
        if self._on:
            self._file.close()
        for writer in (self._board, self._wandb):
            if writer is not None:
                writer.close() if writer is self._board else writer.finish()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 60  # a truncated line


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{name}/")
        else:
            flat.append((prefix + name, value))
    return flat


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}"


def memory_gib() -> float:
    """Peak memory of a device in GiB; on CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
