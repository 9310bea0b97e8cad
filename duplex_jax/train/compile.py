"""Compiling for hardware that is not here: whether a run fits, what it sends around, and how long a step should take.

libtpu and the CUDA plugin compile for a described topology on any machine. What they say of memory is exact; times are
predictions from peak rates. One process compiles one program: the platform is chosen when JAX starts.
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from duplex_jax import parallel
from duplex_jax.decode.backends import Settings
from duplex_jax.decode.backends.pallas import Pallas
from duplex_jax.decode.backends.xla import Xla
from duplex_jax.decode.floor import BYTES, token_bytes
from duplex_jax.decode.programs import Program, Programs
from duplex_jax.decode.step import Stops, empty_rows, empty_step
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import abstract
from duplex_jax.model.tree import shapes
from duplex_jax.parallel import MeshSpec
from duplex_jax.train import collectives, flops
from duplex_jax.train import step as steps
from duplex_jax.train.config import Config, fit_batch

# What a kernel reaches of the peak in practice; a prediction is peak over this.
EFFICIENCY = 0.55

# What the paper's run reached: 6,300 tokens/s on an A100 (section 4.1), by `flops.mfu`.
PAPER_MFU = 0.376

# Device descriptions that XLA ships for its own tests (xla/tools/hlo_opt/gpu_specs), the fields that it needs.
_GPU_TARGETS = {
    "a100": {
        "device_description_str": "NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "core_count": 108,
        "clock_rate_ghz": 1.41, "memory_bandwidth": 2039000000000, "l2_cache_size": 41943040,
        "device_memory_size": 84987740160, "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912, "threads_per_core_limit": 2048,
    },
    "h100": {
        "device_description_str": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "core_count": 132,
        "clock_rate_ghz": 1.98, "memory_bandwidth": 3352320000000, "l2_cache_size": 52428800,
        "device_memory_size": 84978434048, "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448, "threads_per_core_limit": 2048,
    },
}  # fmt: skip


def target_config(name: str) -> str:
    """The text of a GPU target config, as the CUDA plugin reads it."""
    t = _GPU_TARGETS[name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {t["shared_memory_per_core"]}
  threads_per_core_limit: {t["threads_per_core_limit"]}
  core_count: {t["core_count"]}
  fpus_per_core: {64 if name == "a100" else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {t["memory_bandwidth"]}
  l2_cache_size: {t["l2_cache_size"]}
  clock_rate_ghz: {t["clock_rate_ghz"]}
  device_memory_size: {t["device_memory_size"]}
  shared_memory_per_block_optin: {t["shared_memory_per_block_optin"]}
  cuda_compute_capability {{ major: {t["major"]} minor: {t["minor"]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{t["device_description_str"]}"
"""


def prepare_environment(spec: MeshSpec) -> None:
    """Sets what must stand before JAX looks for devices: no accelerator of this machine takes part."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # or libtpu asks a metadata server, at length
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")


def described_devices(spec: MeshSpec) -> list[Any]:
    """Devices of a mesh that is not there.

    Raises:
        UserError: the compiler for it is not installed, or does not know the topology.
    """
    if spec.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", spec.size)
        return jax.devices()
    from jax.experimental import topologies

    try:
        if spec.platform == "tpu":
            options: dict[str, Any] = {"num_slices": spec.slice} if spec.slice > 1 else {}
            if spec.size == 1:
                options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu takes it that a host has four
            return topologies.get_topology_desc(platform="tpu", topology_name=spec.topology, **options).devices
        return topologies.get_topology_desc(
            platform="cuda", topology_name=spec.target, target_config=target_config(spec.target),
            topology=spec.topology,
        ).devices  # fmt: skip
    except Exception as e:
        extra = "tpu" if spec.platform == "tpu" else "cuda"
        raise UserError(
            f"mesh {spec.name}: cannot compile for {spec.topology} ({str(e).splitlines()[0][:160]}); needs "
            f"pip install 'duplex-jax[{extra}]'"
        ) from e


@dataclasses.dataclass(frozen=True)
class Run:
    """A whole run at the predicted step time.

    Attributes:
        steps: of it.
        tokens: that they take in.
        hours: on the clock.
        device_hours: on all devices.
        dollars: None without a price.
    """

    steps: int
    tokens: float
    hours: float
    device_hours: float
    dollars: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled program says.

    Attributes:
        program: `train` or `decode`.
        mesh: name and axes.
        chip: whose peaks were used.
        argument_bytes, temporary_bytes, output_bytes: on one device; donated outputs share with arguments.
        peak_bytes: what must be held at once.
        memory: what a device has.
        fits: whether it is enough.
        flops: of a step on one device, by formula.
        collectives: kind to (instructions, bytes a step on one device), loops counted.
        leaving_bytes: those of them that leave the GPU host or TPU slice.
        compute_seconds, memory_seconds, network_seconds: from peak rates.
        step_seconds: predicted.
        mfu: predicted.
        compile_seconds: what this took.
        advice: what helps where it does not fit.
        run: all of the config's steps; None for decoding.
    """

    program: str
    mesh: str
    chip: str
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    peak_bytes: int
    memory: float
    fits: bool
    flops: float
    collectives: dict[str, tuple[int, float]]
    leaving_bytes: float
    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    step_seconds: float
    mfu: float
    compile_seconds: float
    advice: list[str]
    run: Run | None = None


def compile_train(config: Config, spec: MeshSpec, price: float = 0.0) -> Report:
    """Compiles the whole training step for a mesh. cuDNN settles its workspace on the card: that is not counted.

    Args:
        config: the run.
        spec: the mesh.
        price: dollars for an hour of one device; 0 where nobody asks.

    Raises:
        UserError: the mesh does not divide the model or the batch, or its compiler is not installed.
    """
    model = model_shape(config)
    parallel.check_model(spec, model)
    config = fit_batch(config, spec)
    mesh = parallel.make_mesh(spec, described_devices(spec))
    rows = tuple(range(4)) if config.lora.rank and config.lora.new_tokens else ()
    plan = steps.Plan(config, model, mesh, spec, rows)
    with jax.set_mesh(mesh):
        lowered = steps.jitted_step(plan).lower(
            steps.abstract_state(plan), steps.abstract_frozen(plan), steps.abstract_batch(plan)
        )
        work = steps_flops(plan)
        weights = _bytes_a_device(steps.abstract_state(plan)) + _bytes_a_device(steps.abstract_frozen(plan))
        # Moments and masters are read and written once; the weights go by once a pass and micro-batch.
        passes = 3 if config.compute.remat != "none" else 2
        compute_bytes = 2 if config.compute.dtype == "bfloat16" else 4
        traffic = 2.0 * weights + passes * config.data.micro_batches * compute_bytes * model.num_params / spec.tensor
        report = _report("train", plan, lowered, work, traffic, config)
    number, hours = config.optim.steps, config.optim.steps * report.step_seconds / 3600
    tokens = float(number) * config.data.batch * config.data.length
    dollars = price * hours * spec.size if price else None
    return dataclasses.replace(report, run=Run(number, tokens, hours, hours * spec.size, dollars))


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A decode program before it is compiled.

    Attributes:
        kind: `feed` or `say`.
        program: the lowered program.
        weights, cache: its arguments' shapes and shardings.
        tokens: tokens a row.
    """

    kind: str
    program: Any
    weights: Any
    cache: Any
    tokens: int


def compile_decode(config: Config, spec: MeshSpec, sessions: int, capacity: int, entries: str = "bfloat16") -> Report:
    """Compiles the two programs of a TDM step, `feed` and `say`, for the sessions of a mesh, cut by `tensor`.

    Args:
        config: the model and the dtype.
        spec: the mesh.
        sessions: rows of the cache on all devices; 0 for as many as take half of what the weights leave, 8 at most, on
            each.
        capacity: tokens a row.
        entries: how cached keys and values are stored.

    Raises:
        UserError: the mesh does not divide the model or the sessions, or its compiler is not installed.
    """
    model = model_shape(config)
    parallel.check_model(spec, model)
    if not sessions:
        weights = BYTES["bfloat16"] * sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(model)))
        fit = (spec.chip.memory - weights / spec.tensor) * spec.tensor // (2 * capacity * token_bytes(model, entries))
        sessions = spec.batch_shards * int(min(8, max(1, fit)))
    parallel.check_batch(spec, sessions, 1)
    mesh = parallel.make_mesh(spec, described_devices(spec))
    plan = steps.Plan(config, model, mesh, spec)
    reports = []
    for lowered in lower_decode(model, spec, mesh, sessions, capacity, entries):
        work = sessions * lowered.tokens * flops.forward_flops(model, 2 * capacity) / spec.size
        # A pass reads the weights and the cache once.
        passes = 1 if lowered.kind == "feed" else lowered.tokens - 1
        traffic = passes * (_bytes_a_device(lowered.weights) + _bytes_a_device(lowered.cache))
        reports.append(_report("decode", plan, lowered.program, work, traffic, config))
    return _in_turn(*reports)


def lower_decode(
    model: ModelConfig, spec: MeshSpec, mesh: Mesh, sessions: int, capacity: int, entries: str = "bfloat16"
) -> list[Lowered]:
    """The two programs of a TDM step, lowered for a mesh; arguments as of `compile_decode`."""
    T, stops = 16, Stops(idle_id=3, most=10)
    slots = capacity + T + stops.most
    # Decoding copies weights to every row's device rather than gathering them at each token.
    serving = {"embed": None, **{k: v for k, v in parallel.RULES.items() if k != "embed"}}

    def placed(x: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        named = jax.sharding.PartitionSpec(*(None if a is None else serving[a] for a in axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, named))

    def by_rows(x: Any) -> jax.ShapeDtypeStruct:
        return placed(x, ("batch",) + (None,) * (x.ndim - 1))

    settings = Settings(capacity, jnp.dtype(jnp.bfloat16), "bfloat16", entries)
    backends: dict[str, Callable[..., Xla]] = {
        "tpu": Pallas,
        "gpu": functools.partial(Xla, slot_major_keys=True),
        "cpu": Xla,
    }
    backend = backends[spec.platform](abstract(model), settings)
    weights = tuple(map(placed, backend.weights, backend.axes))
    cache = jax.eval_shape(lambda: backend.new_cache(sessions, slots))
    cache = jax.tree.map(lambda x: placed(x, ("batch", "kv_heads", None, None)[: x.ndim]), cache)
    kinds = np.zeros((2, model.padded_vocab_size), bool)
    nobody = empty_rows(np.zeros(sessions, np.int32), kinds, kinds)
    inputs = jax.eval_shape(lambda: empty_step(nobody, (sessions, T)))
    placed_kinds = placed(inputs.rows.suppress, (None, None))
    inputs = jax.tree.map(by_rows, inputs)
    inputs.rows.suppress = inputs.rows.ends = placed_kinds
    programs = Programs(backend, stops, T)
    lowered = []
    with jax.set_mesh(mesh):
        for kind, tokens, given in (("feed", T, (inputs,)), ("say", stops.most, (inputs.counts, inputs.rows))):
            program = programs[Program(kind, slots, (sessions, slots), sessions, tokens)]
            lowered.append(Lowered(kind, program.lower(weights, cache, *given), weights, cache, tokens))
    return lowered


def _in_turn(first: Report, second: Report) -> Report:
    """Two programs that run one behind the other, as one: the most memory of both, and all of their time."""
    most = {f: max(getattr(first, f), getattr(second, f))
            for f in ("argument_bytes", "temporary_bytes", "output_bytes", "peak_bytes")}  # fmt: skip
    sums = {f: getattr(first, f) + getattr(second, f)
            for f in ("flops", "leaving_bytes", "compute_seconds", "memory_seconds", "network_seconds", "step_seconds",
                      "compile_seconds")}  # fmt: skip
    kinds = {**first.collectives, **second.collectives}
    both = {kind: [r.collectives.get(kind, (0, 0.0)) for r in (first, second)] for kind in kinds}
    sent = {kind: (a[0] + b[0], a[1] + b[1]) for kind, (a, b) in both.items()}
    mfu = (first.mfu * first.step_seconds + second.mfu * second.step_seconds) / max(1e-12, sums["step_seconds"])
    worse = first if not first.fits else second
    return dataclasses.replace(
        worse, **most, **sums, collectives=sent, mfu=mfu, fits=first.fits and second.fits
    )  # fmt: skip


def model_shape(config: Config) -> ModelConfig:
    """The model that a config trains, by its `shape`: nothing is downloaded.

    Raises:
        UserError: the config gives a source alone.
    """
    if config.model.shape is None:
        from duplex_jax.checkpoint.registry import load_model

        return load_model(config.model.source, vocab_multiple=config.model.vocab_multiple).config
    return dataclasses.replace(config.model.shape, vocab_multiple=config.model.vocab_multiple)


def steps_flops(plan: steps.Plan) -> float:
    """FLOPs of a step on one device, work done again for remat included."""
    model, data = plan.model, plan.config.data
    # A forward pass over a row of no length is one without attention.
    again = {"full": flops.forward_flops(model, data.length), "attention": flops.forward_flops(model, 0)}
    a_token = flops.train_flops(model, data.length, plan.is_lora) + again.get(plan.config.compute.remat, 0.0)
    return a_token * data.batch * data.length / plan.spec.size


def _bytes_a_device(tree: Any) -> float:
    total = 0
    for x in jax.tree.leaves(tree):
        total += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return float(total)


def _report(program: str, plan: steps.Plan, lowered: Any, work: float, traffic: float, config: Config) -> Report:
    spec, chip = plan.spec, plan.spec.chip
    began = time.monotonic()
    argument = temporary = output = peak = 0
    found: list[collectives.Collective] = []
    over = ""
    try:
        compiled = lowered.compile()
    except Exception as e:
        over = out_of_memory(str(e))
        if not over:
            raise UserError(f"mesh {spec.name}: the compiler failed: {str(e).splitlines()[0][:300]}") from e
    else:
        memory = compiled.memory_analysis()
        argument, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        output = memory.output_size_in_bytes
        peak = argument + temporary + output - memory.alias_size_in_bytes
        found = collectives.read(compiled.as_text(), spec)
    seconds = time.monotonic() - began
    compute = work / chip.flops
    hbm, network = traffic / chip.bandwidth, collectives.seconds(found, spec)
    predicted = max(compute / EFFICIENCY, hbm, network)
    useful = work if program == "decode" else flops.step_flops(config, plan.model) / spec.size
    fits = not over and peak <= chip.memory
    return Report(
        program=program, mesh=f"{spec.name} {dict(zip(parallel.AXES, spec.shape, strict=True))}", chip=chip.name,
        argument_bytes=argument, temporary_bytes=temporary, output_bytes=output, peak_bytes=peak, memory=chip.memory,
        fits=fits, flops=work, collectives=collectives.by_kind(found),
        leaving_bytes=sum(c.times * c.sent for c in found if not c.near), compute_seconds=compute, memory_seconds=hbm,
        network_seconds=network, step_seconds=predicted, mfu=useful / chip.flops / predicted,
        compile_seconds=seconds, advice=use_room(plan, program, peak) if fits else advise(plan, program, over),
    )  # fmt: skip


def out_of_memory(message: str) -> str:
    """What a TPU compiler says of a program that is too large; empty for another error."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return ""
    found = re.search(r"Used [\d.]+\w of [\d.]+\w hbm[^.]*\. ?(Exceeded hbm capacity by [\d.]+\w)?", message)
    return found.group(0) if found else "the program is larger than the memory of a chip"


def advise(plan: steps.Plan, program: str, over: str) -> list[str]:
    """What helps a program that does not fit, the cheapest first."""
    config, spec = plan.config, plan.spec
    data = config.data
    advice = [over] if over else []
    if program == "decode":
        return [*advice, "fewer --sessions or a smaller --capacity", "a larger tensor axis (--tensor)"]
    if config.compute.dtype != "bfloat16":
        advice.append("--config.compute.dtype=bfloat16 halves activations")
    if config.compute.remat != "full":
        advice.append("--config.compute.remat=full keeps one activation a layer")
    rows = data.batch // data.micro_batches // spec.batch_shards
    if rows > 1:
        advice.append(
            f"--config.data.micro_batches={data.micro_batches * rows} puts one row on a device at a time, not {rows}"
        )
    if plan.backend == "xla" and spec.platform != "cpu":
        advice.append(f"--config.compute.attention={'splash' if spec.platform == 'tpu' else 'cudnn'} keeps no scores")
    if spec.data > 1:
        advice.append(f"--fsdp={spec.fsdp * spec.data} --data=1 cuts weights and moments further, where that divides")
    advice.append("--config.lora.rank=64 needs no moments for most weights, or a larger mesh")
    return advice


def use_room(plan: steps.Plan, program: str, peak: int) -> list[str]:
    """What memory that stays empty could be used for."""
    if program != "train" or plan.spec.platform == "cpu" or peak > 0.5 * plan.spec.chip.memory:
        return []
    less = {"full": "dots", "attention": "dots", "dots": "none"}.get(plan.config.compute.remat)
    return [f"room is left: --config.compute.remat={less} computes less again"] if less else []


def to_lines(report: Report) -> list[str]:
    """A report as people read it."""
    gib = 2.0**30
    lines = [
        f"{report.program} on {report.mesh}, {report.chip}: {'fits' if report.fits else 'DOES NOT FIT'}",
        f"  memory   {report.argument_bytes / gib:.2f} GiB arguments + {report.temporary_bytes / gib:.2f} GiB "
        f"temporaries, peak {report.peak_bytes / gib:.2f} of {report.memory / gib:.2f} GiB a device",
        f"  work     {report.flops / 1e12:,.1f} TFLOP a device and step (formula)",
    ]
    for kind, (count, size) in sorted(report.collectives.items()):
        lines.append(f"  sends    {kind:18} x {count:<6} {size / 1e9:,.2f} GB a device and step")
    if report.leaving_bytes:
        lines.append(f"  leaves   the host or slice    {report.leaving_bytes / 1e9:,.2f} GB a device and step")
    lines.append(
        f"  step     {report.step_seconds:.3f} s predicted (compute {report.compute_seconds:.3f} s at peak, "
        f"memory {report.memory_seconds:.3f} s, network {report.network_seconds:.3f} s), MFU {report.mfu:.0%}"
    )
    if report.program == "train":
        slower = report.step_seconds * report.mfu / PAPER_MFU
        lines.append(f"           {slower:.3f} s at the paper's MFU, {PAPER_MFU:.1%}")
    if run := report.run:
        dollars = "" if run.dollars is None else f", ${run.dollars:,.0f}"
        lines.append(
            f"  run      {run.steps:,} steps, {run.tokens / 1e9:,.1f}B tokens: {run.hours:,.1f} h, "
            f"{run.device_hours:,.0f} device-hours{dollars}"
        )
    lines.append(f"  compiled in {report.compile_seconds:.0f} s")
    lines += [f"  advice   {line}" for line in report.advice]
    return lines
