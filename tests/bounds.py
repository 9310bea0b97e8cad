"""What reading a file from outside may take, however it is damaged: 5 seconds of the processor and 1 GiB."""

import contextlib
import resource
import signal
from collections.abc import Iterator
from typing import Any

SECONDS, BYTES = 5, 2**30


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails where the block takes more of either."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s of the processor")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < BYTES
