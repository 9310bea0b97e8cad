"""`duplex-jax bench train`: tokens per second and MFU of one step, compared with transformers + torch."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.profile import Profile, parts_line
from duplex_jax import parallel
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig, to_hf
from duplex_jax.train import flops
from duplex_jax.train import step as steps
from duplex_jax.train.config import Compute, Config, Data, Lora, Model, Optim, fit_batch

SMOLLM2_135M = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    max_position_embeddings=8192, rope_theta=100000.0,
)  # fmt: skip

Runner = Callable[[], float]


def bench_train(
    batch: int = 4, length: int = 512, rounds: int = 3, rank: int = 16, layers: int = 30, mesh: str = "cpu1",
    dtype: str = "float32", remat: str = "none", micro_batches: int = 1, torch: bool = True, full: bool = True,
    lora: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Times optimiser steps on random packed rows, ours and torch's alternating; reports the median of each.

    Every row holds four documents, and a third of its tokens have no loss, like the user's words in Duplex-UltraChat.
    torch gets the same rows without their boundaries, its fastest attention (SDPA), AdamW with `foreach`, all cores,
    and the loss of the same tokens. Each side has its own process: in a shared heap, memory that one side freed made
    the other wait for pages. Of two consecutive steps the second is timed, as in training: memory freed by a step is
    cheap to reuse at once, but not after a pause. MFU is relative to a matrix product measured in the same run.

    Args:
        batch: rows per step.
        length: tokens per row.
        rounds: timed steps per side.
        rank: LoRA rank.
        layers: how many of SmolLM2-135M's 30 layers; fewer for a quick look.
        mesh, dtype, remat, micro_batches: our settings.
        torch: also measure torch.
        full, lora: which trainings to measure.
    """
    model = dataclasses.replace(SMOLLM2_135M, num_layers=layers)
    rows = _rows(model, batch, length)
    seconds: dict[str, list[float]] = {}
    parts: dict[str, list[dict[str, float]]] = {}
    peak = 0.0
    for kind, r in [("full", 0)] * full + [("lora", rank)] * lora:  # one after the other, to limit memory
        wanted: dict[str, tuple[Any, ...]] = {
            f"duplex_jax {kind}": (_ours, model, rows, batch, length, r, mesh, dtype, remat, micro_batches)
        }
        if torch:
            wanted[f"torch {kind}"] = _torch, model, rows, r
        with contextlib.ExitStack() as stack:
            runners = {name: stack.enter_context(process()) for name in wanted}
            peak = max(peak, next(iter(runners.values())).submit(flops.measured_peak).result())
            for name, runner in runners.items():
                runner.submit(_prepare, *wanted[name]).result()
            for _ in range(rounds):
                for name, runner in runners.items():  # alternating, so that other load affects both sides
                    runner.submit(_run).result()
                    taken, went = runner.submit(_run).result()
                    seconds.setdefault(name, []).append(taken)
                    parts.setdefault(name, []).append(went)
    result: dict[str, Any] = {"peak_gflops": peak / 1e9}
    for name, times in seconds.items():
        rate = batch * length / statistics.median(times)
        used = flops.mfu(rate, model, length, name.endswith("lora"), peak)
        result[name] = {"tokens_per_second": rate, "mfu": used, "seconds": times}
        if parts[name][0]:
            means = {part: statistics.mean(went[part] for went in parts[name]) for part in parts[name][0]}
            result[name]["parts"] = parts_line(means)
    for name in ("full", "lora"):
        if f"torch {name}" in result:
            ours, theirs = (result[f"{who} {name}"]["tokens_per_second"] for who in ("duplex_jax", "torch"))
            result[f"ratio {name}"] = ours / theirs
    return result


def process() -> concurrent.futures.ProcessPoolExecutor:
    """A process for one runner; on an accelerator it allocates memory only as needed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


_runner: Runner
"""The runner of this process."""


def _prepare(make: Callable[..., Runner], *arguments: Any) -> None:
    global _runner
    _runner = make(*arguments)


def _run() -> tuple[float, dict[str, float]]:
    """Seconds of a step, and its breakdown; empty without the native CPU kernels."""
    profile = Profile()
    with profile.one():
        seconds = _runner()
    return seconds, profile.parts


def _rows(model: ModelConfig, batch: int, length: int) -> dict[str, np.ndarray]:
    if length % 4:
        raise UserError(f"length={length}: must be a multiple of 4, the documents of a row")
    rng = np.random.default_rng(0)
    document = np.arange(length) // (length // 4)
    return {
        "tokens": rng.integers(0, model.vocab_size, (batch, length), dtype=np.int32),
        "segment_ids": np.tile(document + 1, (batch, 1)).astype(np.int32),
        "positions": np.tile(np.arange(length) % (length // 4), (batch, 1)).astype(np.int32),
        "loss_weights": np.tile(np.arange(length) % 15 >= 5, (batch, 1)).astype(np.float32),
    }


def _ours(
    model: ModelConfig, rows: dict[str, np.ndarray], batch: int, length: int, rank: int, mesh: str, dtype: str,
    remat: str, micro_batches: int,
) -> Runner:  # fmt: skip
    spec = parallel.load_mesh_spec(mesh)
    config = Config(
        "bench", model=Model(shape=model), data=Data(length=length, batch=batch, micro_batches=micro_batches),
        optim=Optim(), lora=Lora(rank=rank),
        compute=Compute(dtype=dtype, remat=remat, frozen_dtype=dtype if rank else "float32"),
    )  # fmt: skip
    ids = (3, 4, 5) if rank else ()
    plan = steps.Plan(fit_batch(config, spec), model, parallel.make_mesh(spec), spec, ids)
    state, frozen = steps.init_state(plan, None)
    device_rows = {k: jax.device_put(v.reshape(plan.batch_shape), plan.batch_sharding) for k, v in rows.items()}
    step = steps.jitted_step(plan)

    def run() -> float:
        nonlocal state
        began = time.perf_counter()
        with jax.set_mesh(plan.mesh):
            state, out = step(state, frozen, device_rows)
        jax.block_until_ready(out)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    return run


def _torch(model: ModelConfig, rows: dict[str, np.ndarray], rank: int) -> Runner:
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as e:
        raise UserError("bench train compares with torch; pip install 'duplex-jax[torch]', or torch=false") from e
    shape: dict[str, Any] = to_hf(model) | {"attn_implementation": "sdpa"}
    peer = LlamaForCausalLM(LlamaConfig(**shape)).float()
    peer.train()
    if rank:
        _add_lora(peer, rank)
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
    tokens = torch.tensor(rows["tokens"], dtype=torch.long)
    labels = torch.where(torch.tensor(rows["loss_weights"]) > 0, tokens, -100)

    def run() -> float:
        began = time.perf_counter()
        peer(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return run


def _add_lora(model: Any, rank: int) -> None:
    """Adds an update to every linear layer of the blocks, as PEFT does."""
    import torch

    class Updated(torch.nn.Module):
        def __init__(self, base: Any):
            super().__init__()
            self.base = base
            self.a = torch.nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
            self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank))

        def forward(self, x: Any) -> Any:
            return self.base(x) + torch.nn.functional.linear(torch.nn.functional.linear(x, self.a), self.b)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, Updated(child))
