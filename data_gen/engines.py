"""Runs units of work in this process, in local processes, or on a Ray cluster."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Protocol

from duplex_jax.errors import UserError, extra
from duplex_jax.processes import end_with_parent

# Per worker: the context shared by all its calls, and (Ray) the reference from which it was fetched.
_context: Any = None
_reference: Any = None


class Engine(Protocol):
    """Runs `work(context, *args)` somewhere."""

    parallel: int
    """Number of calls that run at once."""

    def submit(self, *args: Any) -> Future: ...

    def close(self) -> None: ...


class Inline:
    """Runs calls in this process, immediately."""

    parallel = 1

    def __init__(self, work: Callable[..., Any], context: Any):
        self._work, self._context = work, context

    def submit(self, *args: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(self._work(self._context, *args))
        except Exception as e:
            future.set_exception(e)
        return future

    def close(self) -> None: ...


def _start_worker(context: Any) -> None:
    """Stores the context, leaves Ctrl-C to the parent, and makes the worker end with its parent."""
    global _context
    _context = context
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _in_worker(work: Callable[..., Any], *args: Any) -> Any:
    return work(_context, *args)


class Processes:
    """A pool of local processes; each receives the context once."""

    def __init__(self, work: Callable[..., Any], context: Any, workers: int):
        self.parallel = workers
        self._work = work
        # Fresh interpreters: threads of the tokenizer and of an HTTP client do not survive a fork.
        self._pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(context,)
        )

    def submit(self, *args: Any) -> Future:
        return self._pool.submit(_in_worker, self._work, *args)

    def pids(self) -> list[int]:
        """Ids of the running processes."""
        return list(self._pool._processes or {})

    def close(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.terminate()
        # Also waits for the pool's thread, which closes pipes that the interpreter uses again at exit.
        self._pool.shutdown(cancel_futures=True)


class Ray:
    """A Ray cluster: the one named by RAY_ADDRESS, otherwise a new one with `workers` CPUs.

    The cluster's machines need this package installed. Results are returned to the caller, which writes all files.
    """

    def __init__(self, work: Callable[..., Any], context: Any, workers: int):
        with extra("ray", "--engine=ray"):
            import ray
        self._ray = ray
        if not ray.is_initialized():
            local: dict[str, Any] = (
                {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            )
            try:
                ray.init(log_to_driver=False, logging_level=logging.WARNING, **local)
            except Exception as e:  # Ray raises many types; all mean that there is no cluster
                raise UserError(f"--engine=ray: no Ray cluster ({type(e).__name__}: {e}); see RAY_ADDRESS") from e
        self.parallel = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._task = ray.remote(_in_ray)
        self._work = work
        # Inside a list the reference is not resolved per call, so a worker can fetch its value once.
        self._context = [ray.put(context)]

    def submit(self, *args: Any) -> Future:
        return self._task.remote(self._context, self._work, *args).future()

    def close(self) -> None:
        self._ray.shutdown()


def _in_ray(reference: list[Any], work: Callable[..., Any], *args: Any) -> Any:
    global _context, _reference
    if _reference != reference[0]:
        import ray

        _context, _reference = ray.get(reference[0]), reference[0]
    return work(_context, *args)


def make_engine(name: str, work: Callable[..., Any], context: Any, workers: int) -> Engine:
    """Makes an engine by name: "local" or "ray"."""
    if name == "ray":
        return Ray(work, context, workers)
    return Inline(work, context) if workers == 1 else Processes(work, context, workers)
