"""Ways to answer one slice after a history: ours, and the peers of the decoding benchmark."""

import copy
import inspect
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks import llama
from duplex_jax.checkpoint.registry import LoadedModel, save_model
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request, Row
from duplex_jax.decode.sampling import Sampling
from duplex_jax.slicing import MAX_SLICE_TOKENS
from duplex_jax.template import Template
from duplex_jax.timeline import read_timelines

USER_TOKENS = 6
QUESTION = " Tell me a long story about the sea and the people who live beside it."


class Peer(Protocol):
    """One way to answer a slice.

    Attributes:
        name: its name in the table.
        slow: whether the time of a slice grows with its history; such peers are measured fewer times.
    """

    name: str
    slow: bool

    def prepare(self, history: list[int]) -> None:
        """Prepares, untimed, for a slice after `history`, a prefix of the longest history."""

    def step(self, user: list[int]) -> tuple[list[int], int]:
        """Takes the user's ids; returns the sampled ids, and how many tokens went through the layers for them."""


class OurStep:
    """The engine's step after a cached history."""

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
        # As in a live session, the last sampled id is pending.
        self._engine.truncate(self._row, len(history) - 1, history[-1:])

    def step(self, user: list[int]) -> tuple[list[int], int]:
        assert self._row is not None
        before = self._row.cached
        said = self._engine.advance({self._row: Request(user, allow_idle=False)})[self._row]
        return said, self._row.cached - before


class Reencoding:
    """The reference's way in the same model: nothing is kept between slices."""

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
        longest: the longest history; encoded once if `cached`.
        cached: whether to keep a DynamicCache of the history between slices.
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
    """transformers' model under `torch.compile` with a StaticCache that is as long as the longest history needs.

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
        # This mode records CUDA graphs, which make it fast on a GPU.
        mode = "reduce-overhead" if self._device.type == "cuda" else "default"
        self._forward: Any = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)
        self._history: list[int] = []

    def prepare(self, history: list[int]) -> None:
        self._history, n = history, len(history) - 1
        # In place, because the compiled program holds the addresses of the entries.
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
    """llama.cpp after a cached history."""

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
        # The next decode performs the copy, so one is done before timing.
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
    """transformers' name for the cache among a model's arguments and results: `past_key_values` before 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def conversation(template: Template, length: int) -> list[int]:
    """Exactly `length` ids of a conversation in slices: the packaged one, repeated."""
    with resources.as_file(resources.files("duplex_jax") / "assets" / "demo.jsonl") as path:
        pairs = template.encode(next(iter(read_timelines(path))))
    start = template.start()
    body = pairs.ids[len(start) :].tolist()
    return (start + body * (length // len(body) + 1))[:length]


def torch_model(model: LoadedModel) -> Any:
    """The same weights as a float32 transformers model on all cores that never ends by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", dtype="float32")
        loaded: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    loaded.generation_config.eos_token_id = None
    return loaded.to(device).eval()


def without_end(template: Template) -> Template:
    """The template with idle as its only stop; where idle is not allowed either, every slice has the maximum length."""
    template = copy.copy(template)
    template.end_id, template.turn_ends = template.idle_id, frozenset()
    return template
