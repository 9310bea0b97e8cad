"""How every job starts and ends: flags, one clear line for bad input, exit codes."""

import contextlib
import difflib
import errno
import io
import logging as std_logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging

from duplex_jax.errors import UserError
from duplex_jax.files import local_path, locked
from duplex_jax.model.config import STORES
from launch import machine

if TYPE_CHECKING:
    from duplex_jax.decode.sampling import Sampling
    from duplex_jax.parallel import MeshSpec

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def fail(message: object, code: int = EXIT_BAD_INPUT) -> NoReturn:
    """Prints one line on standard error and ends the process."""
    print(f"duplex-jax: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as e:
        fail(f"{e} (--help lists the flags)")


def _show_in_help(job: ModuleType) -> None:
    """Lets --help tell of a job's module when it is not the program that was started, as under `duplex-jax JOB`."""
    program = sys.modules["__main__"]
    if job is not program:
        program.__doc__ = job.__doc__
        for flag in flags.FLAGS.flags_by_module_dict().get(job.__name__, []):
            flags.FLAGS.register_flag_by_module(sys.argv[0], flag)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a job: parses flags, calls `main` with the positional arguments, and exits.

    Exit codes: 0 or what `main` returns; 2 for bad input (one line, no traceback); 130 for Ctrl-C.
    """

    def guarded(argv: list[str]) -> int | None:
        logging.use_absl_handler()
        std_logging.getLogger("jax").setLevel(std_logging.WARNING)  # which backends it tried is no news to a user
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks is no reason to fail
        try:
            with _claimed:
                code = main(argv[1:])
            sys.stdout.flush()
            return code
        except UserError as e:
            fail(e)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            _drop_output()
            fail(f"cannot write the output ({e.strerror}); nothing more was printed")
        except KeyboardInterrupt:
            fail("interrupted", EXIT_INTERRUPTED)
        except Exception:
            if why := machine.backend_trouble():
                fail(why)
            raise

    _show_in_help(sys.modules[main.__module__])
    # A shell starts background jobs with SIGINT ignored; Ctrl-C works all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with reader_may_go():
            app.run(guarded, flags_parser=_parse)
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    raise SystemExit(0)


@contextlib.contextmanager
def reader_may_go() -> Iterator[None]:
    """Ends the process without a word, code 0, where the reader of its output, such as `head`, has gone."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(0) from None


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """While this lasts Ctrl-C ends the process at once, in the midst of a compilation too.

    For times in which nothing is half-written. A compiler's threads cannot be unwound: the interpreter crashes on them
    at its end, and an exception that is raised while one of them calls back is lost.
    """
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def watch() -> None:
        with open(ear, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == signal.SIGINT:
                    _claimed.close()
                    os.write(2, b"duplex-jax: interrupted\n")
                    os._exit(EXIT_INTERRUPTED)

    handler = signal.signal(signal.SIGINT, lambda *_: None)
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="Ctrl-C", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, handler)
        os.close(mouth)


_claimed = contextlib.ExitStack()


def claim(out: str | Path, beside: bool = False) -> None:
    """Keeps other runs away from `out` until the job ends.

    Args:
        out: a folder in which the job works for a while.
        beside: the lock lies beside `out`: it is a file, or a folder that appears when it is whole.

    Raises:
        UserError: another run is writing there, or the place cannot be written.
    """
    _claimed.enter_context(locked(out, beside))


def _drop_output() -> None:
    """Sends what is still to be printed nowhere."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, in `DUPLEX_JAX_CACHE` or the user's cache folder; `off` keeps none."""
    import jax

    from duplex_jax.native import cache_folder, private_folder

    kept = cache_folder()
    folder = kept and private_folder(kept)
    if folder is None:
        return
    # JAX's own variables come first; the folder may be a bucket.
    for name, value in (("compilation_cache_dir", str(folder)), ("persistent_cache_min_compile_time_secs", 0.5)):
        if not os.environ.get(f"JAX_{name.upper()}"):
            jax.config.update(f"jax_{name}", value)


class _Path(flags.ArgumentParser[str]):
    """How every flag that names a file, a folder, or a model becomes a path; see `local_path`."""

    def parse(self, argument: str) -> str:
        try:
            return local_path(argument)
        except UserError as e:
            raise ValueError(str(e)) from e


class _Paths(_Path):
    """Several paths, separated by commas."""

    def parse(self, argument: Any) -> Any:
        if isinstance(argument, str):
            argument = [part.strip() for part in argument.split(",") if part.strip()]
        return [super(_Paths, self).parse(part) for part in argument]


def path_flag(name: str, default: str | None, help: str, **options: Any) -> Any:
    """A flag that names a file, a folder or a model; takes what `flags.DEFINE_string` takes."""
    options.setdefault("module_name", _caller())
    return flags.DEFINE(_Path(), name, default, help, **options)


def paths_flag(name: str, help: str) -> Any:
    """A flag that names several paths, separated by commas; empty by default."""
    return flags.DEFINE(_Paths(), name, [], help, serializer=flags.ListSerializer(","), module_name=_caller())


def _caller() -> str:
    """The job's module that defines a flag here: `--help` lists flags by module."""
    return str(sys._getframe(2).f_globals["__name__"])


class StoreFlags:
    """How a job's engine stores weights and cache entries, as flags of `module`."""

    def __init__(self, module: str):
        here: dict[str, Any] = {"module_name": module}
        self._weights = flags.DEFINE_enum(
            "weights", None, STORES, "dtype of the weights; by default float32 on a CPU, bfloat16 elsewhere.", **here
        )
        self._entries = flags.DEFINE_enum(
            "entries", None, STORES, "dtype of the cached keys and values; same default as --weights.", **here
        )

    @property
    def weights(self) -> str | None:
        """As `Engine` takes it."""
        return self._weights.value

    @property
    def entries(self) -> str | None:
        """As `Engine` takes it."""
        return self._entries.value


class MeshFlags:
    """The mesh of a job, as flags of `module`."""

    def __init__(self, module: str, default: str):
        here: dict[str, Any] = {"module_name": module}
        self._mesh = path_flag(
            "mesh", default, "Device mesh: a name from configs/mesh/, or a Python file that defines get_mesh().", **here
        )
        self._axes = {
            axis: flags.DEFINE_integer(
                axis, 0, f"Devices along the {axis} axis; 0 keeps the mesh's value.", lower_bound=0, **here
            )
            for axis in ("data", "fsdp", "tensor")
        }

    def spec(self) -> "MeshSpec":
        """The mesh, its axes resized.

        Raises:
            UserError: no such mesh, or axes that do not multiply to its devices.
        """
        from duplex_jax import parallel

        sizes = {axis: flag.value for axis, flag in self._axes.items()}
        return parallel.resize(parallel.load_mesh_spec(self._mesh.value), **sizes)


class SamplingFlags:
    """How tokens are drawn, as flags of `module`; the defaults are the paper's."""

    def __init__(self, module: str):
        here: dict[str, Any] = {"module_name": module}
        self._temperature = flags.DEFINE_float(
            "temperature", 0.8, "Sampling temperature; 0 is greedy.", lower_bound=0.0, **here
        )
        self._top_p = flags.DEFINE_float(
            "top_p", 0.8, "Nucleus sampling: keep the most probable tokens up to this total probability.", 0.0, 1.0,
            **here
        )  # fmt: skip
        self._top_k = flags.DEFINE_integer(
            "top_k", 0, "Keep only the k most probable tokens; 0 keeps all.", lower_bound=0, **here
        )

    def values(self) -> dict[str, Any]:
        """As `Sampling` names them."""
        return {"temperature": self._temperature.value, "top_p": self._top_p.value, "top_k": self._top_k.value}

    def sampling(self, idle_bias: float = 0.0) -> "Sampling":
        """As sessions take it."""
        from duplex_jax.decode.sampling import Sampling

        return Sampling(**self.values(), idle_bias=idle_bias)


class MindFlags:
    """The chat model that gives the words of answers, as flags of `module`."""

    def __init__(self, module: str):
        here: dict[str, Any] = {"module_name": module}
        self._url = flags.DEFINE_string(
            "mind", None, "Base URL of an OpenAI-compatible API: its model gives the words, the duplex model decides "
            "when to speak. The key comes from OPENAI_API_KEY. Needs pip install 'duplex-jax[llm]'.", **here
        )  # fmt: skip
        self._model = flags.DEFINE_string("mind_model", None, "The model's name at --mind.", **here)
        self._filler_after = flags.DEFINE_float(
            "mind_filler_after", None, "Seconds of waiting for --mind after which the duplex model says a slice of its "
            "own; silence by default.", 0.0, **here
        )  # fmt: skip

    @property
    def url(self) -> str | None:
        """Base URL."""
        return self._url.value

    @property
    def model(self) -> str | None:
        """Name of the model."""
        return self._model.value

    @property
    def filler_after(self) -> float | None:
        """Seconds."""
        return self._filler_after.value


def names(flag: str, given: list[str], known: Collection[str]) -> list[str]:
    """The value of a flag that takes some of a few names.

    Raises:
        UserError: none, one twice, or one that is unknown; says which was meant.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(f"--{flag}: {name!r} is unknown; "
                            + (f"did you mean {near[0]!r}?" if near else f"some of {', '.join(known)}"))  # fmt: skip
    if not given or len(set(given)) < len(given):
        raise UserError(f"--{flag}={','.join(given)}: must list any of {', '.join(known)}, each at most once")
    return given


def numbers(flag: str, given: Sequence[str], kind: type) -> list[Any]:
    """The value of a flag that takes finite numbers, none of them twice.

    Raises:
        UserError: none, one twice, or one that is no such number.
    """
    try:
        found = [kind(v) for v in given]
    except ValueError as e:
        raise UserError(f"--{flag}={','.join(given)}: {e}; give numbers separated by commas") from e
    if not found or len(set(found)) < len(found) or not all(map(math.isfinite, found)):
        raise UserError(f"--{flag}={','.join(given)}: must be finite numbers, each at most once")
    return found


def no_arguments(argv: Sequence[str]) -> None:
    """Refuses positional arguments of a job that takes none."""
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}; this job takes flags only (--help lists them)")
