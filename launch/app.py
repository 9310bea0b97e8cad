"""The frame of every job: flags common to several jobs, one-line errors for bad input, exit codes."""

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
    from duplex_jax.serve.mind import Mind

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
    """Makes --help show a job's module if it is not the program that was started, as under `duplex-jax JOB`."""
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
        std_logging.getLogger("jax").setLevel(std_logging.WARNING)  # hides which backends it tried
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for terminals that lack a character
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
    # A shell starts background jobs with SIGINT ignored; Ctrl-C should still work.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with reader_may_go():
            app.run(guarded, flags_parser=_parse)
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    raise SystemExit(0)


@contextlib.contextmanager
def reader_may_go() -> Iterator[None]:
    """Ends the process silently with code 0 when the reader of its output, such as `head`, has closed the pipe."""
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
    """Within this context Ctrl-C ends the process at once, even during a compilation.

    For periods in which nothing is half-written. A compiler's threads cannot be unwound: they crash the interpreter at
    exit, and an exception raised while one of them calls back is lost.
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
    """Locks `out` against other runs until the job ends.

    Args:
        out: the folder that the job works in.
        beside: put the lock next to `out`, if that is a file or a folder that appears only once complete.

    Raises:
        UserError: another run is writing there, or the place cannot be written.
    """
    _claimed.enter_context(locked(out, beside))


def _drop_output() -> None:
    """Discards output that is still buffered."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def use_compilation_cache() -> None:
    """Caches compiled programs on disk, in `DUPLEX_JAX_CACHE` or the user's cache folder; `off` disables the cache."""
    import jax

    from duplex_jax.native import cache_folder, private_folder

    kept = cache_folder()
    folder = kept and private_folder(kept)
    if folder is None:
        return
    # JAX's own variables take precedence; they may name a bucket.
    for name, value in (("compilation_cache_dir", str(folder)), ("persistent_cache_min_compile_time_secs", 0.5)):
        if not os.environ.get(f"JAX_{name.upper()}"):
            jax.config.update(f"jax_{name}", value)


class _Path(flags.ArgumentParser[str]):
    """Parses flags that name a file, a folder or a model; see `local_path`."""

    def parse(self, argument: str) -> str:
        try:
            return local_path(argument)
        except UserError as e:
            raise ValueError(str(e)) from e


class _Paths(_Path):
    """Several comma-separated paths."""

    def parse(self, argument: Any) -> Any:
        if isinstance(argument, str):
            argument = [part.strip() for part in argument.split(",") if part.strip()]
        return [super(_Paths, self).parse(part) for part in argument]


def path_flag(name: str, default: str | None, help: str, **options: Any) -> Any:
    """Defines a flag that names a file, a folder or a model; takes the arguments of `flags.DEFINE_string`."""
    options.setdefault("module_name", _caller())
    return flags.DEFINE(_Path(), name, default, help, **options)


def paths_flag(name: str, help: str) -> Any:
    """Defines a flag that names several comma-separated paths; empty by default."""
    return flags.DEFINE(_Paths(), name, [], help, serializer=flags.ListSerializer(","), module_name=_caller())


def template_flag(name: str = "template") -> Any:
    """The flag of the template that a model's slices are written in; its own by default."""
    help = "Template that turns slices into tokens; by default the model's own."
    return flags.DEFINE_enum(name, None, ["minicpm", "chatml", "compact"], help, module_name=_caller())


def _caller() -> str:
    """Name of the job's module that defines a flag here, because `--help` lists flags by module."""
    return str(sys._getframe(2).f_globals["__name__"])


class StoreFlags:
    """Flags of `module` for the storage types of an engine's weights and cache entries."""

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
        """Storage type of the weights, as `Engine` takes it."""
        return self._weights.value

    @property
    def entries(self) -> str | None:
        """Storage type of the cache entries, as `Engine` takes it."""
        return self._entries.value


class MeshFlags:
    """Flags of `module` for a job's mesh."""

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
        """The mesh with its axes resized.

        Raises:
            UserError: there is no such mesh, or the axes' product is not the number of devices.
        """
        from duplex_jax import parallel

        sizes = {axis: flag.value for axis, flag in self._axes.items()}
        return parallel.resize(parallel.load_mesh_spec(self._mesh.value), **sizes)


class SamplingFlags:
    """Sampling flags of `module`; the defaults are the paper's."""

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
        """The values by the field names of `Sampling`."""
        return {"temperature": self._temperature.value, "top_p": self._top_p.value, "top_k": self._top_k.value}

    def sampling(self, idle_bias: float = 0.0) -> "Sampling":
        """The values as `Sampling`, with this idle bias."""
        from duplex_jax.decode.sampling import Sampling

        return Sampling(**self.values(), idle_bias=idle_bias)


class MindFlags:
    """Flags of `module` for the chat model that provides the words of answers."""

    def __init__(self, module: str):
        here: dict[str, Any] = {"module_name": module}
        self._url = flags.DEFINE_string(
            "mind", None, "Base URL of an OpenAI-compatible API: its model gives the words, the duplex model decides "
            "when to speak. The key comes from OPENAI_API_KEY. Needs pip install 'duplex-jax[llm]'.", **here
        )  # fmt: skip
        self._model = flags.DEFINE_string("mind_model", None, "Name of the model at --mind.", **here)
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
        """Name of the chat model."""
        return self._model.value

    @property
    def filler_after(self) -> float | None:
        """Seconds after which a filler is spoken."""
        return self._filler_after.value

    def make(self) -> "Mind | None":
        """The mind, or None where there is no --mind.

        Raises:
            UserError: see `make_mind`.
        """
        from duplex_jax.serve.mind import make_mind

        return make_mind(self.url, self.model, self.filler_after)


def names(flag: str, given: list[str], known: Collection[str]) -> list[str]:
    """Checks the value of a flag that takes some of a few names.

    Raises:
        UserError: it is empty, or has a duplicate or an unknown name; the message suggests the nearest one.
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
    """Checks the value of a flag that takes distinct finite numbers.

    Raises:
        UserError: it is empty, or has a duplicate or something that is not such a number.
    """
    try:
        found = [kind(v) for v in given]
    except ValueError as e:
        raise UserError(f"--{flag}={','.join(given)}: {e}; give numbers separated by commas") from e
    if not found or len(set(found)) < len(found) or not all(map(math.isfinite, found)):
        raise UserError(f"--{flag}={','.join(given)}: must be finite numbers, each at most once")
    return found


def no_arguments(argv: Sequence[str]) -> None:
    """Raises UserError for positional arguments of a job that takes none."""
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}; this job takes flags only (--help lists them)")
