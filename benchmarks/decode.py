"""`duplex-jax bench decode`: cost of a slice as a function of the history, compared with what people would run instead.

Ways to answer the same slice of the same conversation with the same weights:

    ours                     the engine's step: the history is in the KV cache
    re-encoding (JAX)        the reference's way in the same model: every slice encodes the whole history again
    re-encoding (torch)      the same with transformers' `generate`
    cached (torch)           transformers' `generate` with its own DynamicCache kept between slices
    compiled (torch)         transformers' model under `torch.compile`, its StaticCache kept; on a CPU only on request
    llama.cpp                llama-cpp-python with its own cache (float16 entries) kept between slices

torch runs in float32. All decode greedily. Within a repetition all ways and histories are measured one right after the
other, so that other load on the machine affects all of them.
"""

import dataclasses
import functools
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import llama
from benchmarks.peers import (
    QUESTION,
    USER_TOKENS,
    CompiledTorch,
    LlamaCpp,
    OurStep,
    Peer,
    Reencoding,
    Torch,
    conversation,
    torch_model,
    without_end,
)
from benchmarks.profile import Profile, parts_line
from duplex_jax.checkpoint.registry import LoadedModel, load_model
from duplex_jax.decode import floor
from duplex_jax.decode.engine import Engine
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, check_writable
from duplex_jax.model.config import STORES
from duplex_jax.slicing import MAX_SLICE_TOKENS

HISTORIES = (256, 512, 1024, 2048, 4096)
_PREFILL_CHUNK = 512


@dataclasses.dataclass
class _Timings:
    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    said: list[int] = dataclasses.field(default_factory=list)
    profile: Profile = dataclasses.field(default_factory=Profile)


def bench_decode(
    model: str = "smollm2-135m-instruct",
    histories: str = ",".join(map(str, HISTORIES)),
    repeats: int = 10,
    slow_repeats: int = 2,
    png: str = "",
    precision: str = "float32",
    entries: str = "float32",
    compiled: bool = False,
    gguf: str = "",
) -> dict[str, Any]:
    """Latency and tokens of a slice (6 tokens in, 10 out) by history: ours, the reference's way, torch and llama.cpp.

    Args:
        model: as `load_model` takes it.
        histories: comma-separated numbers of tokens before the slice.
        repeats: measurements of the ways that keep a cache.
        slow_repeats: measurements of the ways that encode the history again.
        png: file for a plot of the results.
        precision: storage type of the weights: float32, bfloat16 or int8 (Q8_0 for llama.cpp).
        entries: storage type of our cache, one of the same; llama.cpp's is float16, its default.
        compiled: also measure `torch.compile` on a CPU.
        gguf: a file of the same model, such as a Q4_1 one, that llama.cpp runs instead of one in our precision.

    Raises:
        UserError: an argument is invalid, or a plot was requested without matplotlib.
    """
    try:
        lengths = [int(n) for n in histories.split(",")]
    except ValueError:
        raise UserError(f"histories={histories}: must be numbers of tokens with commas, as in 256,4096") from None
    if png:
        check_plot()
        check_writable(png)
    if gguf and not Path(gguf).is_file():
        raise UserError(f"gguf={gguf}: no such file")
    loaded = load_model(model, dtype="float32")
    report = run(loaded, lengths, repeats, slow_repeats, _print_status, precision, entries, compiled, gguf)
    if png:
        plot(report, png)
    return report


def _print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(
    model: LoadedModel,
    histories: Sequence[int] = HISTORIES,
    repeats: int = 10,
    slow_repeats: int = 2,
    say: Callable[[str], None] = lambda text: None,
    precision: str = "float32",
    entries: str = "float32",
    compiled: bool = False,
    gguf: str = "",
) -> dict[str, Any]:
    """Measures every way at every history.

    Args:
        model: its weights are stored as `precision`.
        histories: numbers of tokens before the slice.
        repeats: measurements of the ways that keep a cache.
        slow_repeats: measurements of the ways that encode the history again.
        say: receives progress messages, one line at a time.
        precision, entries: storage types, each one of `STORES`.
        compiled: also measure `torch.compile` on a CPU.
        gguf: a file that llama.cpp runs instead of one in our precision.

    Returns:
        A JSON-compatible report: `machine`, `slice` (tokens in and out), `left_out` (omitted peers with the reason),
        `rows` (one per history and peer: median and minimum seconds, tokens processed, ratio of the medians to ours,
        how many of the sampled tokens equal ours; for ours `floor_seconds` and `parts`, see `floor` and `profile`),
        `ceilings`, and `flatness`, for each peer the minimum seconds at the longest history divided by those at the
        shortest.

    Raises:
        UserError: the histories are invalid or do not fit the model.
    """
    histories = sorted(set(histories))
    if not histories or histories[0] < 2 or repeats < 1 or slow_repeats < 1:
        raise UserError(f"histories {list(histories)} and repeats must be positive; a history has at least 2 tokens")
    check_stores(precision, entries)
    config, said = model.config, MAX_SLICE_TOKENS
    capacity = max(histories[-1] + USER_TOKENS + said, 2 * (_PREFILL_CHUNK + said))
    if capacity > config.max_position_embeddings:
        raise UserError(f"a history of {histories[-1]} with its slice needs {capacity} positions and the model has "
                        f"{config.max_position_embeddings}; give a shorter one")  # fmt: skip
    longest = conversation(model.template, histories[-1])
    user = model.tokenizer.encode(QUESTION)[:USER_TOKENS]
    template = without_end(model.template)
    make = functools.partial(
        Engine, template=template, capacity=capacity, dtype="float32", weights=precision,
        entries=entries,
    )  # fmt: skip
    engine = make(model.model)
    prefiller = make(engine.backend, chunk=_PREFILL_CHUNK)
    say(f"encoding the longest history, {histories[-1]} tokens")
    reencoding = Reencoding(prefiller)
    reencoding.prepare(longest)
    prefiller.encode(reencoding.row, len(longest))
    ours = OurStep(engine, prefiller.read(reencoding.row))
    peers: list[Peer] = [ours, reencoding]
    others, left_out = _others(model, longest, precision, compiled, gguf, say)
    peers += others

    _warm_up(peers, histories, longest, user, say)
    # A re-encoding slice is also compiled before timing, after entries that already exist.
    for history in reversed(histories):
        prefiller.truncate(reencoding.row, 0, longest[:history])
        prefiller.encode(reencoding.row, history)
        reencoding.step(user)

    results = _measure(peers, histories, longest, user, repeats, slow_repeats, say)
    say("measuring the machine")
    ceilings = floor.measure()
    report = _report(model, histories, peers, results, left_out)
    for row in report["rows"]:
        if row["peer"] == OurStep.name:
            row["floor_seconds"] = floor.slice_floor(
                config, ceilings, row["history"], USER_TOKENS + 1, said, weights=precision, entries=entries
            )
            row["parts"] = results[row["history"], OurStep.name].profile.parts
    return report | {"precision": precision, "entries": entries, "ceilings": dataclasses.asdict(ceilings)}


def _warm_up(
    peers: Sequence[Peer], histories: Sequence[int], longest: list[int], user: list[int], say: Callable[[str], None]
) -> None:
    for history in histories:
        say(f"warming up at {history} tokens")
        for peer in peers:
            if not peer.slow or history == histories[0]:
                peer.prepare(longest[:history])
                peer.step(user)


def _others(
    model: LoadedModel, longest: list[int], precision: str, compiled: bool, gguf: str, say: Callable[[str], None]
) -> tuple[list[Peer], dict[str, str]]:
    """The ways of torch and llama.cpp, and the reasons for omitted ones, by name."""
    peers: list[Peer] = []
    left_out: dict[str, str] = {}

    def leave_out(reason: str, *names: str) -> None:
        left_out.update(dict.fromkeys(names, reason))
        say(f"left out: {', '.join(names)}; {reason}")

    torch_ways = ("re-encoding (torch)", "cached (torch)")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        leave_out(f"{' and '.join(missing)} not installed: pip install 'duplex-jax[torch]'", *torch_ways)
    elif precision != "float32":
        leave_out("measured in float32 only", *torch_ways)
    else:
        exported = torch_model(model)
        peers += [Torch(exported, longest, cached=False), Torch(exported, longest, cached=True)]
        if compiled or exported.device.type == "cuda":
            say("compiling torch's model")
            peers.append(CompiledTorch(exported, longest))
    if llama.missing():
        leave_out("llama_cpp not installed: pip install llama-cpp-python", LlamaCpp.name)
    else:
        try:
            peers.append(LlamaCpp(model, precision, longest, gguf))
        except UserError as e:  # GGUF cannot represent the tokenizer
            if gguf:
                raise
            leave_out(str(e), LlamaCpp.name)
    return peers, left_out


def _measure(
    peers: Sequence[Peer],
    histories: Sequence[int],
    longest: list[int],
    user: list[int],
    repeats: int,
    slow_repeats: int,
    say: Callable[[str], None],
) -> dict[tuple[int, str], _Timings]:
    """Times every peer at every history; within a repetition they run one right after the other."""
    results = {(history, peer.name): _Timings() for history in histories for peer in peers}
    for repeat in range(max(repeats, slow_repeats)):
        for history in histories:
            for peer in peers:
                if repeat >= (slow_repeats if peer.slow else repeats):
                    continue
                peer.prepare(longest[:history])
                timings = results[history, peer.name]
                time.sleep(0.05)  # lets the previous peer's threads go idle
                began = time.perf_counter()
                with timings.profile.one():
                    timings.said, timings.tokens = peer.step(user)
                timings.seconds.append(time.perf_counter() - began)
        say(f"repetition {repeat + 1} of {max(repeats, slow_repeats)}")
    return results


def check_stores(precision: str, entries: str) -> None:
    """Checks the storage types of weights and entries.

    Raises:
        UserError: one is unknown; the message lists the valid ones.
    """
    for name, how in (("precision", precision), ("entries", entries)):
        if how not in STORES:
            raise UserError(f"{name} {how!r} is unknown; one of {', '.join(STORES)}")


def _report(
    model: LoadedModel, histories: Sequence[int], peers: Sequence[Peer],
    results: dict[tuple[int, str], _Timings], left_out: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    rows = []
    for history in histories:
        base = results[history, "ours"]
        for peer in peers:
            timings = results[history, peer.name]
            median = statistics.median(timings.seconds)
            rows.append({
                "history": history,
                "peer": peer.name,
                "median_seconds": median,
                "min_seconds": min(timings.seconds),
                "repeats": len(timings.seconds),
                "tokens": timings.tokens,
                "ratio": median / statistics.median(base.seconds),
                "min_ratio": min(timings.seconds) / min(base.seconds),
                "same_tokens": sum(a == b for a, b in zip(timings.said, base.said, strict=False)),
            })  # fmt: skip
    first, last = histories[0], histories[-1]
    flatness = {p.name: min(results[last, p.name].seconds) / min(results[first, p.name].seconds) for p in peers}
    return {
        "model": model.name,
        "slice": {"in": USER_TOKENS, "out": MAX_SLICE_TOKENS},
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "backend": jax.default_backend(),
                    "device": jax.devices()[0].device_kind, "jax": jax.__version__},
        "left_out": left_out,
        "rows": rows,
        "flatness": {"from": first, "to": last, **flatness},
    }  # fmt: skip


def table(report: dict[str, Any]) -> list[str]:
    """Formats the report as lines of text."""
    lines = [f"{'history':>7}  {'':22}{'median s':>9}{'least s':>9}{'tokens':>8}{'x ours':>8}{'least x':>9}"]
    for row in report["rows"]:
        lines.append(
            f"{row['history']:>7}  {row['peer']:22}{row['median_seconds']:>9.3f}{row['min_seconds']:>9.3f}"
            f"{row['tokens']:>8}{row['ratio']:>8.2f}{row['min_ratio']:>9.2f}"
        )
    for row in report["rows"]:
        if "floor_seconds" in row:
            share = row["floor_seconds"] / row["median_seconds"]
            lines.append(f"floor at {row['history']}: {row['floor_seconds']:.3f} s, {share:.0%} of ours")
        if row.get("parts"):
            lines.append(f"ours at {row['history']}: {parts_line(row['parts'])}")
    flat = dict(report["flatness"])
    first, last = flat.pop("from"), flat.pop("to")
    lines.append(f"least seconds at {last} over those at {first}: "
                 + ", ".join(f"{name} {ratio:.2f}" for name, ratio in flat.items()))  # fmt: skip
    lines += [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    return lines


def check_plot() -> None:
    """Checks, before any measurement, that a plot can be drawn.

    Raises:
        UserError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("a PNG needs matplotlib: pip install 'duplex-jax[plot]'")


def plot(report: dict[str, Any], path: str | Path) -> None:
    """Plots seconds per slice and tokens processed against history, one line per way, into a PNG file.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    check_plot()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, field, label in zip(
        axes, ("median_seconds", "tokens"), ("seconds per slice", "tokens processed per slice"), strict=True
    ):
        for peer in dict.fromkeys(row["peer"] for row in report["rows"]):
            points = [(row["history"], row[field]) for row in report["rows"] if row["peer"] == peer]
            axis.plot(*zip(*points, strict=True), marker="o", label=peer)
        axis.set(xscale="log", yscale="log", xlabel="tokens of history", ylabel=label)
        axis.set_xticks(sorted({row["history"] for row in report["rows"]}), minor=False)
        axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    axes[0].legend()
    taken = report["slice"]
    figure.suptitle(f"{report['model']}, {report['precision']}: {taken['in']} tokens in, {taken['out']} out")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
