"""The CPU's own kernels: compiled once for this machine by its own C++ compiler, called through JAX's FFI.

Without a compiler, or with `DUPLEX_JAX_NATIVE=off`, there are none: XLA's products do the work.
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
    """Where compiled programs are kept: `DUPLEX_JAX_CACHE`, or the user's cache folder; None where that is `off`."""
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
    """The folder, made where it lacks, if what lies in it can be trusted to be this user's own and can be written.

    What is loaded from a cache runs with this user's rights: nobody else may be able to put it there. A folder of this
    user's that others can write to is closed to them first.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if state.st_uid != os.getuid():
            _log.warning("%s: belongs to another user; nothing is kept there (DUPLEX_JAX_CACHE names another)", folder)
            return None
        if state.st_mode & 0o022:
            folder.chmod(0o700)
            for entry in folder.iterdir():  # what others may have left while they could
                if entry.lstat().st_uid != os.getuid():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return folder if os.access(folder, os.W_OK | os.X_OK) else None
    except OSError:
        return None


def _compile(compiler: str, library: Path) -> None:
    """Compiles the kernels; library and digest reach the disk, and the library appears complete or not at all."""
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
    """Whether a library is this user's own file, written by nobody else, with the bytes that were compiled."""
    try:
        state = library.lstat()
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
            return False
        digest = library.with_suffix(".sha256").read_text()
        return hashlib.sha256(library.read_bytes()).hexdigest() == digest
    except (OSError, UnicodeDecodeError):
        return False


def spent() -> dict[str, float]:
    """Seconds that this process spent in the kernels until now: on the layers' products, attention, all that is small
    in a layer (norms, rotation, activation), and products outside of layers; empty where no kernel was called."""
    if not _registered:
        return {}
    nanoseconds = (ctypes.c_int64 * len(_PARTS))()
    _registered[0].DuplexSpent(nanoseconds)
    return {part: value / 1e9 for part, value in zip(_PARTS, nanoseconds, strict=True)}


@functools.cache
def available() -> bool:
    """Whether the kernels can be called; compiles and registers them the first time.

    Raises:
        UserError: `DUPLEX_JAX_NATIVE` is neither `on` nor `off`, or is `on` where there can be none.
    """
    wanted = os.environ.get("DUPLEX_JAX_NATIVE", "")
    if wanted not in ("", "on", "off"):
        raise UserError(f"DUPLEX_JAX_NATIVE={wanted}: must be on or off; unset takes the kernels where they compile")
    if wanted == "off":
        return False
    if jax.default_backend() != "cpu":
        if wanted == "on":
            raise UserError(f"DUPLEX_JAX_NATIVE=on: the kernels are the CPU's, and JAX runs on {jax.default_backend()}")
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
    """float32 `x` `[T, D]` times a matrix in panels, see `decode.backends.cpu`: `[T, width]`."""
    shape = jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32)
    return jax.ffi.ffi_call("duplex_jax_matmul", shape)(x, panels, scales)


def block(
    x: jax.Array, tables: tuple[jax.Array, jax.Array], rows: Sequence[jax.Array],
    weights: Sequence[jax.Array], entries: Sequence[jax.Array], *, num_heads: int, eps: float, residual_scale: float,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """One layer of decoding: `model.layers.Block` on tokens whose keys and values go into the cache.

    Args:
        x: float32 `[P, D]`.
        tables: rotary cosines and sines, float32 `[P, H / 2]`.
        rows: of R rows, int32 `[R]` each: where their tokens stand in `x`, how many there are (the others are not
            computed; they come out as zeros), which row of the cache is theirs, and how many slots that has before
            them. A token sees what the row had, and its own tokens up to itself.
        weights: the first norm, q, k and v, o, the second norm, gate and up, down: panels and scales of each.
        entries: keys `[B, K, H, S]` and values `[B, K, S, H]`, and their scales float32 `[B, K, S]` if they are int8.
        num_heads: N.
        eps, residual_scale: of the model.

    Returns:
        `[P, D]`, and the entries with those of the tokens in place.
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
