"""Native CPU kernels, compiled once per machine by its own C++ compiler and called through JAX's FFI.

Without a compiler, or with `DUPLEX_JAX_NATIVE=off`, XLA does the work instead.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.files import local_path, temporary

_log = logging.getLogger(__name__)
_SOURCES = [Path(__file__).with_name(name) for name in ("common.h", "decode.cc")]
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w")
_HANDLERS = {"duplex_jax_matmul": "DuplexMatmul", "duplex_jax_block": "DuplexBlock"}
_registered: list[ctypes.CDLL] = []
_PARTS = ("products", "attention", "small", "head")


def cache_folder() -> Path | None:
    """Folder of compiled programs: `DUPLEX_JAX_CACHE` or the user's cache folder; None if that is `off`."""
    folder = os.environ.get("DUPLEX_JAX_CACHE") or "~/.cache/duplex_jax"
    return None if folder == "off" else Path(local_path(folder))


def _processor() -> str:
    """CPU identity, part of the build cache key."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def private_folder(folder: Path) -> Path | None:
    """The folder, created if missing, if only this user can have written what is in it.

    Code loaded from the cache runs with this user's rights, so nobody else may be able to write there. Write access of
    others to this user's own folder is removed first.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if state.st_uid != os.getuid():
            _log.warning("%s: belongs to another user; nothing is kept there (DUPLEX_JAX_CACHE names another)", folder)
            return None
        if state.st_mode & 0o022:
            folder.chmod(0o700)
            for entry in folder.iterdir():  # others may have written these while they could
                if entry.lstat().st_uid != os.getuid():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return folder if os.access(folder, os.W_OK | os.X_OK) else None
    except OSError:
        return None


def _compile(compiler: str, library: Path) -> None:
    """Compiles the kernels; library and digest are flushed to disk, and the library appears complete or not at all."""
    with temporary(library, folder=True) as folder:
        made = folder / library.name
        units = [str(source) for source in _SOURCES if source.suffix == ".cc"]
        command = [*shlex.split(compiler), *_FLAGS, f"-I{jax.ffi.include_dir()}", *units, "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.chmod(0o600)
        digest = made.with_suffix(".sha256")
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        for file in (digest, made):
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(file, library.with_suffix(file.suffix))


def _is_whole(library: Path) -> bool:
    """Whether a library belongs to this user, is not writable by others, and has the bytes that were compiled."""
    try:
        state = library.lstat()
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
            return False
        digest = library.with_suffix(".sha256").read_text()
        return hashlib.sha256(library.read_bytes()).hexdigest() == digest
    except (OSError, UnicodeDecodeError):
        return False


def spent() -> dict[str, float]:
    """Seconds that this process has spent in the kernels; empty if none was called.

    Counted apart: matrix products in layers, attention, a layer's small operations (norms, rotation, activation), and
    products outside of layers.
    """
    if not _registered:
        return {}
    nanoseconds = (ctypes.c_int64 * len(_PARTS))()
    _registered[0].DuplexSpent(nanoseconds)
    return {part: value / 1e9 for part, value in zip(_PARTS, nanoseconds, strict=True)}


@functools.cache
def available() -> bool:
    """Whether the kernels can be used; compiles and registers them on the first call.

    Raises:
        UserError: `DUPLEX_JAX_NATIVE` is neither `on` nor `off`, or it is `on` and the kernels cannot be built.
    """
    wanted = os.environ.get("DUPLEX_JAX_NATIVE", "")
    if wanted not in ("", "on", "off"):
        raise UserError(f"DUPLEX_JAX_NATIVE={wanted}: must be on or off; unset uses the kernels where they compile")
    if wanted == "off":
        return False
    if jax.default_backend() != "cpu":
        if wanted == "on":
            raise UserError(f"DUPLEX_JAX_NATIVE=on: the kernels need a CPU, but JAX runs on {jax.default_backend()}")
        return False
    try:
        _register()
    except (OSError, subprocess.SubprocessError, AttributeError) as e:
        why = (getattr(e, "stderr", None) or str(e)).strip().splitlines()[:1]
        message = f"no native kernels for the CPU, decoding is slower: {''.join(why)}"
        if wanted == "on":
            raise UserError(f"DUPLEX_JAX_NATIVE=on: {message}") from e
        _log.warning(message)
        return False
    return True


def _register() -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler (g++ or clang++); install one")
    sources = [source.read_text(encoding="utf-8") for source in _SOURCES]
    key = "\0".join([*sources, compiler, " ".join(_FLAGS), jax.__version__, _processor()])
    kept = cache_folder()
    with tempfile.TemporaryDirectory() as nowhere_else:
        folder = (kept and private_folder(kept)) or Path(nowhere_else)
        library = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not _is_whole(library):
            _compile(compiler, library)
        loaded = ctypes.CDLL(str(library))
    _registered.append(loaded)
    for target, symbol in _HANDLERS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")


def matmul(x: jax.Array, panels: jax.Array, scales: jax.Array, width: int) -> jax.Array:
    """float32 `x` `[T, D]` times a matrix in panels (see `decode.backends.cpu`): `[T, width]`."""
    shape = jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32)
    return jax.ffi.ffi_call("duplex_jax_matmul", shape)(x, panels, scales)


def block(
    x: jax.Array, tables: tuple[jax.Array, jax.Array], rows: Sequence[jax.Array],
    weights: Sequence[jax.Array], entries: Sequence[jax.Array], *, num_heads: int, eps: float, residual_scale: float,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """One layer of decoding: `model.layers.Block` on tokens whose keys and values are appended to the cache.

    Args:
        x: float32 `[P, D]`.
        tables: rotary cosines and sines, float32 `[P, H / 2]`.
        rows: four int32 `[R]`: start of each row's tokens in `x`, their number, the row's index in the cache, and its
            length before the tokens. A token attends to the row's cached entries and to its own tokens up to itself;
            outputs of tokens that belong to no row are zero.
        weights: first norm; q, k and v; o; second norm; gate and up; down: panels and scales of each.
        entries: keys `[B, K, H, S]` and values `[B, K, S, H]`, plus their scales float32 `[B, K, S]` if int8.
        num_heads: N.
        eps, residual_scale: the model's constants.

    Returns:
        `[P, D]`, and the entries with the tokens' own written into place.
    """
    given = [*entries, *[jnp.zeros(0, jnp.float32)] * (4 - len(entries))]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *given)]
    first = 1 + 2 + 4 + len(weights)
    aliases = {first + i: 1 + i for i in range(len(given))}
    call = jax.ffi.ffi_call("duplex_jax_block", shapes, input_output_aliases=aliases)
    found = call(
        x, *tables, *rows, *weights, *given,
        num_heads=np.int64(num_heads), eps=np.float32(eps), residual_scale=np.float32(residual_scale),
    )  # fmt: skip
    return tuple(found[: 1 + len(entries)])
