"""Compiling for hardware that is not here: whether a run fits, what it sends around, and how long a step should take.

libtpu and the CUDA plugin compile for a described topology on any machine. What they say of memory is exact; times are
predictions from peak rates. One process compiles one program: the platform is chosen when JAX starts.
"""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax import parallel
from duplex_jax.decode.backends import Settings
from duplex_jax.decode.backends.xla import Xla
from duplex_jax.decode.programs import Program, Programs
from duplex_jax.decode.step import Stops, empty_rows, empty_step
from duplex_jax.errors import UserError
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import abstract
from duplex_jax.model.tree import shapes
from duplex_jax.parallel import MeshSpec
from duplex_jax.train import flops
from duplex_jax.train import step as steps
from duplex_jax.train.config import Config, fit_batch

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# What a kernel reaches of the peak in practice; a prediction is peak over this.
EFFICIENCY = 0.55

_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}

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
            options = {"num_slices": spec.slice} if spec.slice > 1 else {}
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


def compile_decode(config: Config, spec: MeshSpec, sessions: int, capacity: int) -> Report:
    """Compiles the two programs of a TDM step, `feed` and `say`, for the sessions of a mesh, cut by `tensor`.

    Args:
        config: the model and the dtype.
        spec: the mesh.
        sessions: rows of the cache on all devices; 0 for as many as take half of what the weights leave, 8 at most, on
            each.
        capacity: tokens a row.

    Raises:
        UserError: the mesh does not divide the model or the sessions, or its compiler is not installed.
    """
    model = model_shape(config)
    parallel.check_model(spec, model)
    T, stops = 16, Stops(idle_id=3, most=10)
    slots = capacity + T + stops.most
    if not sessions:
        size = jnp.dtype(jnp.bfloat16).itemsize
        weights = size * sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(model)))
        row = size * 2 * model.num_layers * model.num_kv_heads * model.head_dim * slots
        fit = (spec.chip.memory - weights / spec.tensor) * spec.tensor // (2 * row)
        sessions = spec.batch_shards * int(min(8, max(1, fit)))
    parallel.check_batch(spec, sessions, 1)
    mesh = parallel.make_mesh(spec, described_devices(spec))
    plan = steps.Plan(config, model, mesh, spec)
    # Decoding copies weights to every row's device rather than gathering them at each token.
    serving = {"embed": None, **{k: v for k, v in parallel.RULES.items() if k != "embed"}}

    def placed(x: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        named = jax.sharding.PartitionSpec(*(None if a is None else serving[a] for a in axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, named))

    def by_rows(x: Any) -> jax.ShapeDtypeStruct:
        return placed(x, ("batch",) + (None,) * (x.ndim - 1))

    backend = Xla(abstract(model), Settings(capacity, jnp.dtype(jnp.bfloat16), "bfloat16", "bfloat16"))
    params = tuple(map(placed, backend.weights, backend.axes))
    cache = jax.eval_shape(lambda: backend.new_cache(sessions, slots))
    cache = jax.tree.map(lambda x: placed(x, ("batch", "kv_heads", None, None)), cache)
    kinds = np.zeros((2, model.padded_vocab_size), bool)
    nobody = empty_rows(np.zeros(sessions, np.int32), kinds, kinds)
    inputs = jax.eval_shape(lambda: empty_step(nobody, (sessions, T)))
    placed_kinds = placed(inputs.rows.suppress, (None, None))
    inputs = jax.tree.map(by_rows, inputs)
    inputs.rows.suppress = inputs.rows.ends = placed_kinds
    programs = Programs(backend, stops, T)
    size = (sessions, slots)
    reports = []
    with jax.set_mesh(mesh):
        for kind, tokens, given in (("feed", T, (inputs,)), ("say", stops.most, (inputs.counts, inputs.rows))):
            lowered = programs[Program(kind, slots, size, sessions, tokens)].lower(params, cache, *given)
            work = sessions * tokens * flops.forward_flops(model, 2 * capacity) / spec.size
            # A pass reads the weights and the cache once.
            passes = 1 if kind == "feed" else stops.most - 1
            traffic = passes * (_bytes_a_device(params) + _bytes_a_device(cache))
            reports.append(_report("decode", plan, lowered, work, traffic, config))
    return _in_turn(*reports)


def _in_turn(first: Report, second: Report) -> Report:
    """Two programs that run one behind the other, as one: the most memory of both, and all of their time."""
    most = {f: max(getattr(first, f), getattr(second, f))
            for f in ("argument_bytes", "temporary_bytes", "output_bytes", "peak_bytes")}  # fmt: skip
    sums = {f: getattr(first, f) + getattr(second, f)
            for f in ("flops", "compute_seconds", "memory_seconds", "network_seconds", "step_seconds",
                      "compile_seconds")}  # fmt: skip
    kinds = {**first.collectives, **second.collectives}
    both = {kind: [r.collectives.get(kind, (0, 0.0)) for r in (first, second)] for kind in kinds}
    collectives = {kind: (a[0] + b[0], a[1] + b[1]) for kind, (a, b) in both.items()}
    mfu = (first.mfu * first.step_seconds + second.mfu * second.step_seconds) / max(1e-12, sums["step_seconds"])
    worse = first if not first.fits else second
    return dataclasses.replace(
        worse, **most, **sums, collectives=collectives, mfu=mfu, fits=first.fits and second.fits
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
    collectives: dict[str, tuple[int, float]] = {}
    network = 0.0
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
        collectives, network = count_collectives(compiled.as_text(), spec)
    seconds = time.monotonic() - began
    compute = work / chip.flops
    hbm = traffic / chip.bandwidth
    predicted = max(compute / EFFICIENCY, hbm, network)
    useful = work if program == "decode" else flops.step_flops(config, plan.model) / spec.size
    fits = not over and peak <= chip.memory
    return Report(
        program=program, mesh=f"{spec.name} {dict(zip(parallel.AXES, spec.shape, strict=True))}", chip=chip.name,
        argument_bytes=argument, temporary_bytes=temporary, output_bytes=output, peak_bytes=peak, memory=chip.memory,
        fits=fits, flops=work, collectives=collectives, compute_seconds=compute, memory_seconds=hbm,
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


_SHAPE = re.compile(r"\b(pred|s8|u8|bf16|f16|s32|u32|f32|s64|f64)\[([\d,]*)\]")
_OPENING = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count["\s:{]+n["\s:]+"?(\d+)')


def count_collectives(hlo: str, spec: MeshSpec) -> tuple[dict[str, tuple[int, float]], float]:
    """Collectives of an optimised program: kind to (instructions, bytes a device sends a step), and seconds.

    Loops count as often as they run. Bytes sent by a ring over n devices for a result of S bytes: all-gather
    S (n - 1) / n, all-reduce 2 S (n - 1) / n, reduce-scatter S (n - 1) (S is its small result), the others S.
    """
    lines: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in hlo.splitlines():
        if opened := _OPENING.match(line.strip()):
            name = opened.group(1)
            lines[name] = []
            entry = name if line.strip().startswith("ENTRY") else entry
        elif name:
            lines[name].append(line)
    counts: dict[str, tuple[int, float]] = {}
    seconds = 0.0

    def visit(computation: str, times: int) -> None:
        nonlocal seconds
        for line in lines.get(computation, []):
            trips = times
            if " while(" in line:
                trips = times * _trips(line, lines)
            for called in _CALLED.findall(line):
                visit(called, trips)
            for branches in _BRANCHES.findall(line):
                for called in branches.split(","):
                    visit(called.strip().lstrip("%"), times)
            for kind in COLLECTIVES:
                if re.search(rf"\s{kind}(-start)?\(", line):
                    size, group = _result_bytes(line, kind), _group(line, spec)
                    if len(group) > 1:
                        sent = size * _SENT[kind](len(group))
                        n, total = counts.get(kind, (0, 0.0))
                        counts[kind] = (n + times, total + times * sent)
                        seconds += times * sent / (spec.chip.link if _local(group, spec) else spec.chip.network)

    visit(entry, 1)
    return counts, seconds


def _trips(line: str, lines: dict[str, list[str]]) -> int:
    """How often a loop runs: as XLA noted it, else by the constant that its condition compares with, else 1."""
    if noted := _TRIPS.search(line):
        return int(noted.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    body = lines.get(condition.group(1), []) if condition else []
    compared = next((re.search(r"compare\((.*)\), direction=LT", x) for x in body if "ROOT" in x), None)
    for name in re.findall(r"%([\w.\-]+)", compared.group(1)) if compared else []:
        for x in body:
            if constant := re.match(rf"\s*%{re.escape(name)} = s32\[\]\S* constant\((\d+)\)", x):
                return int(constant.group(1))
    return 1


_SENT = {
    "all-gather": lambda n: (n - 1) / n, "all-reduce": lambda n: 2 * (n - 1) / n, "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n, "collective-permute": lambda n: 1.0,
}  # fmt: skip


def _result_bytes(line: str, kind: str) -> float:
    head = line.split(f" {kind}", 1)[0]
    sizes = [
        _DTYPE_BYTES[kind_] * math.prod(int(d) for d in dims.split(",") if d) for kind_, dims in _SHAPE.findall(head)
    ]
    # A started collective's type lists its operands before its results, but for an all-reduce.
    if f"{kind}-start(" in line and len(sizes) > 1 and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :] if kind != "collective-permute" else sizes[:1]
    return float(sum(sizes))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]


def _devices(sizes: str | None, order: str | None, count: int = 0) -> np.ndarray:
    """Places in the mesh as XLA writes them, `[8,8]T(1,0)`: counted in `sizes`, then transposed."""
    shape = _numbers(sizes) or [count]
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) or None)


def _group(line: str, spec: MeshSpec) -> list[int]:
    """The first group of devices that a collective joins, by their places in the mesh."""
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[\d+,(\d+)\]<={order}", line):
        return _devices(found.group(2), found.group(3)).reshape(-1, int(found.group(1)))[0].tolist()
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return _numbers(found.group(1))
    # mesh['axis_0'=1,'axis_1'=16], device_ids=([4,4]T(1,0)) {'axis_1'}
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({order}\))? \{{([^}}]*)\}}", line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
        joined = re.findall(r"'(\w+)'", found.group(4))
        devices = _devices(found.group(2), found.group(3), math.prod(axes.values())).reshape(list(axes.values()))
        devices = np.moveaxis(devices, [list(axes).index(name) for name in joined], range(-len(joined), 0))
        return devices.reshape(-1, math.prod(axes[name] for name in joined))[0].tolist()
    return list(range(spec.size))


def _local(group: list[int], spec: MeshSpec) -> bool:
    """Whether devices reach each other over the fast network: that of one TPU slice, or of one GPU host."""
    near = spec.size // (spec.slice if spec.platform == "tpu" else spec.hosts)
    return len({device // near for device in group}) == 1


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
    lines.append(
        f"  step     {report.step_seconds:.3f} s predicted (compute {report.compute_seconds:.3f} s at peak, "
        f"memory {report.memory_seconds:.3f} s, network {report.network_seconds:.3f} s), MFU {report.mfu:.0%}"
    )
    if run := report.run:
        dollars = "" if run.dollars is None else f", ${run.dollars:,.0f}"
        lines.append(
            f"  run      {run.steps:,} steps, {run.tokens / 1e9:,.1f}B tokens: {run.hours:,.1f} h, "
            f"{run.device_hours:,.0f} device-hours{dollars}"
        )
    lines.append(f"  compiled in {report.compile_seconds:.0f} s")
    lines += [f"  advice   {line}" for line in report.advice]
    return lines
