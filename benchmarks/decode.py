"""What a slice costs against how much was said before it: our step beside what people would run instead.

Ways to answer the same slice of the same conversation with the same weights:

    ours                     the engine's step: the history lies in the KV cache
    re-encoding (JAX)        the reference's way in the same model: the whole history is encoded anew for each slice
    re-encoding (torch)      the same with transformers' `generate`
    cached (torch)           transformers' `generate` with its own DynamicCache kept from slice to slice
    compiled (torch)         transformers' model under `torch.compile`, its StaticCache kept; on a CPU only if asked for
    llama.cpp                llama-cpp-python with its own cache (of float16 entries) kept from slice to slice

torch takes part in float32. All draw greedily. The measurements of one repetition follow each other closely, way after
way and history after history, so that a busy machine hurts them alike.
"""

import copy
import dataclasses
import functools
import importlib.util
import inspect
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks import llama
from benchmarks.profile import Profile, parts_line
from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.decode import floor
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request, Row
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, check_writable
from duplex_jax.model.config import STORES
from duplex_jax.slicing import MAX_SLICE_TOKENS
from duplex_jax.template import Template
from duplex_jax.timeline import read_timelines

HISTORIES = (256, 512, 1024, 2048, 4096)
USER_TOKENS = 6
_PREFILL_CHUNK = 512

QUESTION = " Tell me a long story about the sea and the people who live beside it."


class Peer(Protocol):
    """One way to answer a slice.

    Attributes:
        name: as the table shows it.
        slow: whether a slice takes as long as its history: measured fewer times.
    """

    name: str
    slow: bool

    def prepare(self, history: list[int]) -> None:
        """Makes ready, off the clock, for a slice behind `history`, a beginning of the longest one."""

    def step(self, user: list[int]) -> tuple[list[int], int]:
        """Takes the user's ids; gives the ids said, and how many tokens went through the layers for them."""


class OurStep:
    """The engine's step behind a cached history."""

    name, slow = "ours", False

    def __init__(self, engine: Engine, entries: tuple[np.ndarray, np.ndarray]):
        self._engine, self._entries = engine, entries
        self._row: Row | None = None

    def prepare(self, history: list[int]) -> None:
        if self._row is None or self._row.ids[: len(history)] != history or len(self._row.ids) > len(history) + 64:
            if self._row is not None:
                self._engine.close(self._row)
            k, v = self._entries
            n = len(history) - 1
            self._row = self._engine.open(sampling=Sampling(temperature=0))
            self._engine.write(self._row, history, (k[..., :n], v[..., :n, :]))
            jax.block_until_ready(self._engine.cache)
        # In a live session the last sampled id is pending too.
        self._engine.truncate(self._row, len(history) - 1, history[-1:])

    def step(self, user: list[int]) -> tuple[list[int], int]:
        assert self._row is not None
        before = self._row.cached
        said = self._engine.advance({self._row: Request(user, allow_idle=False)})[self._row]
        return said, self._row.cached - before


class Reencoding:
    """The reference's way in the same model: nothing is kept from slice to slice."""

    name, slow = "re-encoding (JAX)", True

    def __init__(self, engine: Engine):
        self._engine = engine
        self.row = engine.open(sampling=Sampling(temperature=0))

    def prepare(self, history: list[int]) -> None:
        self._engine.truncate(self.row, 0, history)

    def step(self, user: list[int]) -> tuple[list[int], int]:
        said = self._engine.advance({self.row: Request(user, allow_idle=False)})[self.row]
        return said, self.row.cached


class Torch:
    """transformers' `generate` on the exported weights.

    Args:
        model: a causal language model of transformers.
        longest: the longest history; it is encoded once where `cached` is asked for.
        cached: keeps a DynamicCache of the history from slice to slice.
        said: most tokens of a slice.
    """

    def __init__(self, model: Any, longest: list[int], cached: bool, said: int = MAX_SLICE_TOKENS):
        import torch

        self.name = "cached (torch)" if cached else "re-encoding (torch)"
        self.slow = not cached
        self._torch, self._model, self._said, self._name = torch, model, said, _cache_name(model)
        self._master: list[tuple[Any, Any]] | None = None
        self._history: list[int] = []
        self._cache: Any = None
        if cached:
            with torch.inference_mode():
                out = model.model(self._ids(longest), use_cache=True)
            self._master = [(layer.keys, layer.values) for layer in getattr(out, self._name).layers]

    def _ids(self, ids: Sequence[int]) -> Any:
        return self._torch.tensor([list(ids)], device=self._model.device)

    def prepare(self, history: list[int]) -> None:
        from transformers import DynamicCache

        self._history = history
        if self._master is not None:
            n = len(history) - 1
            self._cache = DynamicCache()
            for i, (k, v) in enumerate(self._master):
                self._cache.update(k[:, :, :n].clone(), v[:, :, :n].clone(), i)

    def step(self, user: list[int]) -> tuple[list[int], int]:
        ids = self._ids([*self._history, *user])
        out = self._model.generate(
            ids, attention_mask=self._torch.ones_like(ids), return_dict_in_generate=True, do_sample=False,
            min_new_tokens=self._said, max_new_tokens=self._said, **{self._name: self._cache},
        )  # fmt: skip
        before = 0 if self._cache is None else len(self._history) - 1
        return out.sequences[0, ids.shape[1] :].tolist(), getattr(out, self._name).get_seq_length() - before


class CompiledTorch:
    """transformers' model under `torch.compile` behind its StaticCache, which is as long as the longest history needs.

    Args:
        model: a causal language model of transformers.
        longest: the longest history; it is encoded once.
        said: tokens of a slice.
    """

    name, slow = "compiled (torch)", False

    def __init__(self, model: Any, longest: list[int], said: int = MAX_SLICE_TOKENS):
        import torch
        from transformers import StaticCache

        self._torch, self._device, self._said = torch, model.device, said
        cache: Any = StaticCache(config=model.config, max_cache_len=len(longest) + USER_TOKENS + said)
        with torch.no_grad():
            model.model(torch.tensor([longest], device=self._device), use_cache=True, **{_cache_name(model): cache})
        self._arguments: dict[str, Any] = {_cache_name(model): cache, "use_cache": True, "logits_to_keep": 1}
        self._cache, self._master = cache, [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        # CUDA graphs, which this mode records, are what makes it fast on a GPU.
        mode = "reduce-overhead" if self._device.type == "cuda" else "default"
        self._forward: Any = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)
        self._history: list[int] = []

    def prepare(self, history: list[int]) -> None:
        self._history, n = history, len(history) - 1
        # In place: the compiled program knows where the entries lie.
        for layer, (k, v) in zip(self._cache.layers, self._master, strict=True):
            layer.keys[:, :, :n].copy_(k[:, :, :n])
            layer.values[:, :, :n].copy_(v[:, :, :n])
            layer.cumulative_length.fill_(n)

    def step(self, user: list[int]) -> tuple[list[int], int]:
        torch, said = self._torch, []
        ids = torch.tensor([[self._history[-1], *user]], device=self._device)
        with torch.no_grad():
            for _ in range(self._said):
                torch.compiler.cudagraph_mark_step_begin()
                out = self._forward(input_ids=ids, **self._arguments)
                ids = out.logits[:, -1:].argmax(-1)
                said.append(ids)
        return torch.cat(said, 1)[0].tolist(), len(user) + self._said


class LlamaCpp:
    """llama.cpp behind a cached history."""

    name, slow = "llama.cpp", False

    def __init__(self, model: LoadedModel, precision: str, longest: list[int], gguf: str):
        # One sequence keeps the longest history; the other one answers.
        self._llama = llama.Llama(model, precision, 2, len(longest) + USER_TOKENS + MAX_SLICE_TOKENS, gguf)
        self._llama.encode(0, longest)
        self._history: list[int] = []

    def prepare(self, history: list[int]) -> None:
        at = len(history) - 1
        self._llama.copy(0, 1)
        self._llama.cut(1, at)
        # The copy is made by the next decode; that is not to be a timed one.
        self._llama.decode([(1, at, history[-1:])])
        self._llama.cut(1, at)
        self._history = history

    def step(self, user: list[int]) -> tuple[list[int], int]:
        place, feed, said = len(self._history) - 1, [self._history[-1], *user], []
        for _ in range(MAX_SLICE_TOKENS):
            said.append(int(self._llama.decode([(1, place, feed)])[0].argmax()))
            place, feed = place + len(feed), said[-1:]
        return said, place - len(self._history) + 1


def _cache_name(model: Any) -> str:
    """How transformers calls the cache among a model's arguments and results: `past_key_values` before 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def conversation(template: Template, length: int) -> list[int]:
    """Exactly `length` ids of a conversation in slices: the one that comes with the package, over and over."""
    with resources.as_file(resources.files("duplex_jax") / "assets" / "demo.jsonl") as path:
        pairs = template.encode(next(iter(read_timelines(path))))
    start = template.start()
    body = pairs.ids[len(start) :].tolist()
    return (start + body * (length // len(body) + 1))[:length]


def torch_model(model: LoadedModel) -> Any:
    """The same weights as a transformers model in float32, on every core, that never ends of itself."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", dtype="float32")
        loaded: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    loaded.generation_config.eos_token_id = None
    return loaded.to(device).eval()


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
    """Latency and tokens of a slice (6 tokens in, 10 out) against history, ours beside the reference's way, torch's and
    llama.cpp's.

    Args:
        model: as `load_model` takes it.
        histories: tokens said before the slice, with commas.
        repeats: measurements of the ways that keep their cache.
        slow_repeats: measurements of those that encode the history anew.
        png: a file to draw the figures into.
        precision: of the weights: float32, bfloat16 or int8 (Q8_0 for llama.cpp).
        entries: of our cache, one of the same; llama.cpp's are float16, its default.
        compiled: measure `torch.compile` on a CPU, too.
        gguf: a file of the same model that llama.cpp runs in place of one of our precision, as one of Q4_1.

    Raises:
        UserError: an argument that makes no sense, or a PNG without matplotlib.
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
    report = run(loaded, lengths, repeats, slow_repeats, _say, precision, entries, compiled, gguf)
    if png:
        plot(report, png)
    return report


def _say(text: str) -> None:
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
        model: its weights are taken as `precision`.
        histories: tokens that were said before the slice.
        repeats: measurements of the ways that keep their cache.
        slow_repeats: measurements of those that encode the history anew.
        say: is told what goes on, a line at a time.
        precision, entries: each one of `STORES`.
        compiled: measure `torch.compile` on a CPU, too.
        gguf: a file that llama.cpp runs in place of one of our precision.

    Returns:
        A report that goes into JSON as it is: `machine`, `slice` (tokens in and out), `left_out` (peers, with the
        reason), `rows` (one for each history and peer: median and least seconds, tokens processed, ratio of the
        medians to ours, how many of the said tokens are ours; for ours `floor_seconds` and `parts`, see `floor` and
        `profile`), `ceilings`, and `flatness`, for each peer the least seconds at the longest history over those at
        the shortest.

    Raises:
        UserError: histories that make no sense or do not fit the model.
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
        except UserError as e:  # a tokenizer that its files cannot hold
            if gguf:
                raise
            leave_out(str(e), LlamaCpp.name)

    for history in histories:
        say(f"warming up at {history} tokens")
        for peer in peers:
            if not peer.slow or history == histories[0]:
                peer.prepare(longest[:history])
                peer.step(user)
    # The step of a re-encoding slice is compiled off the clock too, behind entries that are already there.
    for history in reversed(histories):
        prefiller.truncate(reencoding.row, 0, longest[:history])
        prefiller.encode(reencoding.row, history)
        reencoding.step(user)

    results = {(history, peer.name): _Timings() for history in histories for peer in peers}
    for repeat in range(max(repeats, slow_repeats)):
        for history in histories:
            for peer in peers:
                if repeat >= (slow_repeats if peer.slow else repeats):
                    continue
                peer.prepare(longest[:history])
                timings = results[history, peer.name]
                time.sleep(0.05)  # the threads of the one before come to rest
                began = time.perf_counter()
                with timings.profile.one():
                    timings.said, timings.tokens = peer.step(user)
                timings.seconds.append(time.perf_counter() - began)
        say(f"repetition {repeat + 1} of {max(repeats, slow_repeats)}")
    say("measuring the machine")
    ceilings = floor.measure()
    report = _report(model, histories, peers, results, left_out)
    for row in report["rows"]:
        if row["peer"] == OurStep.name:
            row["floor_seconds"] = floor.slice_floor(
                config, ceilings, row["history"], USER_TOKENS + 1, said, weights=precision, entries=entries
            )  # fmt: skip
            row["parts"] = results[row["history"], OurStep.name].profile.parts
    return report | {"precision": precision, "entries": entries, "ceilings": dataclasses.asdict(ceilings)}


def check_stores(precision: str, entries: str) -> None:
    """Refuses what weights and entries cannot be stored as.

    Raises:
        UserError: says what can be.
    """
    for name, how in (("precision", precision), ("entries", entries)):
        if how not in STORES:
            raise UserError(f"{name} {how!r} is unknown; one of {', '.join(STORES)}")


def without_end(template: Template) -> Template:
    """The template with idle as its only stop: where idle is not allowed either, every slice is as long as may be."""
    template = copy.copy(template)
    template.end_id, template.turn_ends = template.idle_id, frozenset()
    return template


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
    """The report as lines of text."""
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
    """Refuses, before any time is spent, a plot that cannot be drawn.

    Raises:
        UserError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("a PNG needs matplotlib: pip install 'duplex-jax[plot]'")


def plot(report: dict[str, Any], path: str | Path) -> None:
    """Draws seconds per slice and tokens processed against history, a line a way, into a PNG file.

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
