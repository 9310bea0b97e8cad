"""llama.cpp, through llama-cpp-python, with the same weights: the peer for decoding on CPUs."""

import ctypes
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duplex_jax.checkpoint.registry import LoadedModel, save_model
from duplex_jax.errors import UserError

# Type of a GGUF file's matrices for each of our storage types.
FILES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0"}
_AT_ONCE = 2048


def missing() -> bool:
    """Whether llama-cpp-python is not installed."""
    return importlib.util.find_spec("llama_cpp") is None


class Llama:
    """A llama.cpp context of several sequences, each with its own cache.

    Args:
        model: its weights are written to a GGUF file.
        precision: a key of `FILES`.
        sequences: number of sequences.
        slots: most tokens of each sequence.
        gguf: a file of the same model in another precision, used instead of writing one.

    Raises:
        UserError: GGUF cannot represent the model, the file cannot be loaded, or there are too many sequences.
    """

    def __init__(self, model: LoadedModel, precision: str, sequences: int, slots: int, gguf: str = ""):
        import llama_cpp

        self._api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._vocab_size = model.config.vocab_size
        if sequences > llama_cpp.llama_max_parallel_sequences():
            raise UserError(f"{sequences} sequences: llama.cpp has {llama_cpp.llama_max_parallel_sequences()} at most")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(gguf or Path(folder) / "model.gguf")
            if not gguf:
                save_model(model, path, format="gguf", dtype=FILES[precision])
            self._model = llama_cpp.llama_model_load_from_file(
                str(path).encode(), llama_cpp.llama_model_default_params()
            )
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}; it must be a GGUF file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = sequences * (-(-slots // 256) * 256), sequences, False
        settings.n_batch = _AT_ONCE
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        settings.n_threads = settings.n_threads_batch = cores
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise MemoryError(f"llama.cpp has no memory for {sequences} sequences of {slots} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_AT_ONCE, 0, 1)

    def decode(self, feeds: Sequence[tuple[int, int, Sequence[int]]]) -> np.ndarray:
        """Feeds each (sequence, position, ids); returns the logits after the last ids, float32 `[len(feeds), V]`."""
        batch, n, last = self._batch, 0, []
        for sequence, position, ids in feeds:
            for i, token in enumerate(ids):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = int(token), position + i, 1
                batch.seq_id[n][0], batch.logits[n] = sequence, i == len(ids) - 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        failed = self._api.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not decode {n} tokens ({failed})")
        pointers = [self._api.llama_get_logits_ith(self._context, i) for i in last]
        return np.stack([np.ctypeslib.as_array(p, (self._vocab_size,)) for p in pointers])

    def encode(self, sequence: int, ids: Sequence[int]) -> None:
        """Feeds a whole context to an empty sequence."""
        for at in range(0, len(ids), _AT_ONCE):
            self.decode([(sequence, at, ids[at : at + _AT_ONCE])])

    def cut(self, sequence: int, length: int) -> None:
        """Removes a sequence's tokens from position `length` on."""
        self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def copy(self, sequence: int, to: int) -> None:
        """Copies one sequence's context to another."""
        self._api.llama_memory_seq_rm(self._memory, to, -1, -1)
        self._api.llama_memory_seq_cp(self._memory, sequence, to, -1, -1)

    def close(self) -> None:
        """Frees the context and the model."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
