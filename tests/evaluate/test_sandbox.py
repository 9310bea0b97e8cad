"""Programs of a model: which pass, what none may do, what is left of them, and machines that cannot hold them."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from duplex_jax.errors import UserError
from duplex_jax.evaluate.sandbox import Outcome, protections, run_program, run_programs
from tests.evaluate.conftest import held

RIGHT = """
from dataclasses import dataclass
from typing import List

@dataclass
class Point:
    x: int

def add(a: List[int]) -> int:
    return sum(a)

def check(f):
    assert f([1, 2]) == 3 and Point(1) == Point(1)

if __name__ == "__main__":
    check(add)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders of programs are made: it must be empty after each test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def run(source: str, **limits: float) -> Outcome:
    """Runs it in small limits; afterwards its folder is gone and the next program runs."""
    outcome = run_program(source, **{"seconds": 1, "wall_seconds": 20, **limits})  # type: ignore[arg-type]
    assert os.listdir(tempfile.gettempdir()) == []
    assert run_program(RIGHT, wall_seconds=60) == Outcome(True, "passed", "")
    return outcome


def denied(ways: str, before: str = "", after: str = "", errors: str = "OSError") -> None:
    """Each of `ways`, functions in a Python list, raises; then `after` runs to its end."""
    outcome = run(f"""
import ctypes, os, resource, shutil, signal, socket
libc = ctypes.CDLL(None)
{before}
for i, way in enumerate([{ways}]):
    try:
        way()
    except ({errors}):
        continue
    raise Exception(i)
{after}
""")
    assert outcome == Outcome(True, "passed", "")


def processes(mark: str) -> list[int]:
    """Processes whose name is the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == mark:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(what: Callable[[], object]) -> bool:
    """Whether it comes true within 20 seconds."""
    deadline = time.monotonic() + 20
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(what())


@held
@pytest.mark.parametrize(
    ("source", "reason", "detail"),
    [
        ("", "passed", ""),
        (RIGHT, "passed", ""),
        ("import json, re, math, hashlib, random, collections, datetime, asyncio.events, decimal", "passed", ""),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", "passed", ""),
        ("import os\nassert os.environ['HOME'] == os.getcwd() and os.listdir() == [] and open('a', 'w').write('x')",
         "passed", ""),
        ("open('/dev/null', 'w').write('x')", "passed", ""),
        ("assert input() == ''", "failed", "EOFError: EOF when reading a line"),
        ("assert 1 == 2, 'not equal'", "failed", "AssertionError: not equal"),
        ("def f(:\n  pass", "failed", "SyntaxError: invalid syntax"),
        ("x = '\ud800'", "passed", ""),
        ("x\0", "failed", ""),
        ("import no_such_module", "failed", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(): f()\nf()", "failed", "RecursionError: maximum recursion depth exceeded"),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("import os\nos._exit(0)\nassert False", "exit", "ended with code 0 before its last line"),
        ("import sys\nsys.exit(0)\nassert False", "exit", ""),
        ("raise SystemExit", "exit", ""),
        ("exit = __import__('os')._exit\ntry:\n  assert False\nfinally:\n  exit(0)", "exit",
         "ended with code 0 before its last line"),
        ("raise Exception('\\x1b[31mred')", "failed", "Exception: ?[31mred"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nos._exit(0)", "*", ""),
        ("import ctypes\nctypes.string_at(0)", "signal", "ended by signal 11"),
    ],
)  # fmt: skip
def test_how_programs_end(source: str, reason: str, detail: str):
    outcome = run_program(source, wall_seconds=20)
    if reason == "*":  # the first process of a namespace does not hear itself
        assert not outcome.passed
    else:
        assert (outcome.passed, outcome.reason) == (reason == "passed", reason), outcome
        assert outcome.detail.startswith(detail)


@held
def test_neither_its_variables_nor_its_callers_frames_hold_the_token():
    """A program that writes all strings it can walk to, on all descriptors, does not pass."""
    outcome = run("""
import os, sys
found, frame = [], sys._getframe()
while frame:
    found += [v for d in (frame.f_locals, frame.f_globals) for v in list(d.values())]
    frame = frame.f_back
texts = [t for t in found if isinstance(t, bytes)]
for fd in range(3, 256):
    try:
        for text in texts:
            os.write(fd, text)
    except OSError:
        pass
os._exit(0)
""")
    assert not outcome.passed


THREADS = """
import threading, time
for _ in range(100_000):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""
WRITES = "f = open('f', 'wb')\nfor _ in range(1000): f.write(bytes(1 << 20))"


@held
@pytest.mark.parametrize(
    ("source", "limits", "reason"),
    [
        ("while True: pass", {"seconds": 0.3, "wall_seconds": 1}, "time"),
        ("import time\ntime.sleep(60)", {"seconds": 0.3, "wall_seconds": 1}, "time"),
        ("try:\n  while True: pass\nexcept BaseException: pass", {"seconds": 0.3, "wall_seconds": 1}, "time"),
        ("import os\nos.closerange(0, 256)\nwhile True: pass", {"seconds": 0.3, "wall_seconds": 1}, "time"),
        ("x = bytearray(50 << 30)", {}, "memory"),
        ("x = []\nwhile True: x.append('x' * (1 << 20))", {"memory_mib": 256}, "memory"),
        (THREADS, {"memory_mib": 256}, "(?!passed).*"),
        ("while True: print('x' * 1000)", {"output_mib": 1}, "output|time"),
        (WRITES, {"disk_mib": 4}, "failed"),
    ],
)
def test_limits(source: str, limits: dict[str, float], reason: str):
    outcome = run(source, **limits)
    assert re.fullmatch(reason, outcome.reason), outcome
    assert source != WRITES or re.search("File too large|No space left", outcome.detail)


@held
def test_the_last_line_of_its_errors_is_kept():
    write = "import sys\nsys.stderr.write('x' * 100_000)\nsys.stderr.write('\\nlast\\n')"
    outcome = run(f"{write}\nassert False, 'y' * 5000")
    assert (outcome.reason, outcome.detail) in [("failed", "y" * 500), ("failed", "AssertionError: " + "y" * 484)]


@held
@pytest.mark.parametrize("how", ["os.fork()", "os.forkpty()", "os.posix_spawn('/bin/true', ['true'], {})",
                                 "subprocess.run(['/bin/true'])", "os.execv('/bin/true', ['true'])",
                                 "os.system('true') == 0 or os.fork()",
                                 "multiprocessing.get_context('fork').Process(target=print).start()"])  # fmt: skip
def test_it_starts_no_process(how: str):
    outcome = run(f"import os, subprocess, multiprocessing\n{how}")
    assert outcome.reason == "failed"
    assert re.search("PermissionError|Permission denied|not permitted", outcome.detail)


@held
def test_fork_bomb_and_daemon():
    bomb = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.prctl(15, b"boundfork", 0, 0, 0)
for _ in range(1000):
    for way in (os.fork, libc.fork, libc.vfork, lambda: libc.syscall(56, 17, 0, 0, 0, 0),
                lambda: libc.syscall(435, bytes(64), 64)):
        try:
            way()
        except OSError:
            pass
"""
    assert run(bomb).reason == "passed"
    daemon = """
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b"bounddaemon", 0, 0, 0)
os.setsid()
for _ in range(2):
    try:
        if os.fork():
            os._exit(0)
    except OSError:
        pass
import threading
threading.Thread(target=time.sleep, args=(60,)).start()
"""
    assert run(daemon).reason == "passed"
    assert processes("boundfork") == processes("bounddaemon") == []


@held
@pytest.mark.parametrize("who", ["caller", "guard"])
def test_nothing_outlives_its_caller(who: str, temporary: Path):
    mark = f"bound{who}"
    source = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{mark}', 0, 0, 0)\nwhile True: pass"
    code = f"from duplex_jax.evaluate.sandbox import run_program\nrun_program({source!r}, seconds=60)"
    environment = {**os.environ, "TMPDIR": str(temporary)}  # a caller that was killed leaves the empty folder
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=environment) as caller:
        try:
            assert wait_for(lambda: processes(mark))
            if who == "caller":
                caller.kill()
            else:
                status = Path(f"/proc/{processes(mark)[0]}/status").read_text()
                os.kill(int(re.findall(r"PPid:\t(\d+)", status)[0]), signal.SIGKILL)
            assert wait_for(lambda: not processes(mark))
        finally:
            caller.kill()


@held
def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'x')")
        assert (outcome.reason, outcome.detail) == ("failed", "PermissionError: [Errno 1] Operation not permitted")
        with pytest.raises(BlockingIOError):
            server.accept()
    denied("""
    lambda: socket.create_server(("127.0.0.1", 0)), lambda: socket.socket(socket.AF_UNIX), socket.socketpair,
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), lambda: socket.socket(socket.AF_NETLINK),
    lambda: socket.getaddrinfo("example.com", 80),
""", after="assert libc.syscall(425, 8, bytes(120)) == -1")  # fmt: skip


@held
def test_files_outside(tmp_path: Path):
    outside, file = tmp_path / "outside", tmp_path / "file"
    outside.mkdir()
    file.write_text("kept")
    file.chmod(0o640)
    before = file.stat()
    ways = """
    lambda: open(outside + "/new", "w"), lambda: open(file, "w"), lambda: open(file, "a"),
    lambda: os.truncate(file, 0), lambda: os.unlink(file), lambda: os.rename(file, file + "2"),
    lambda: os.rename(file, "here"), lambda: os.link(file, "here"), lambda: os.symlink("x", outside + "/new"),
    lambda: os.mkdir(outside + "/new"), lambda: os.mkfifo(outside + "/new"), lambda: os.rmdir(outside),
    lambda: shutil.rmtree(outside), lambda: os.chmod(file, 0o777), lambda: os.utime(file, (0, 0)),
    lambda: os.setxattr(file, "user.x", b"x"), lambda: open("../../file", "w"),
    lambda: (os.symlink(file, "link"), open("link", "w")), lambda: open("/dev/shm/sandbox-test", "w"),
    lambda: os.listdir("/proc/1"), lambda: os.memfd_create("x"),
"""
    if "landlock" in protections()["files"]:
        ways += "lambda: open(file), lambda: os.listdir('/home'), lambda: open('/etc/passwd'),"
    clean = "for name in os.listdir(): os.unlink(name)"
    denied(ways, f"outside, file = {str(outside)!r}, {str(file)!r}", clean)
    assert file.read_text() == "kept"
    after = file.stat()
    assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
    assert os.listdir(outside) == []
    assert not os.path.exists("/dev/shm/sandbox-test")


@held
def test_folders_that_are_hard_to_remove():
    assert run("""
import os
os.mkdir("none", 0)
os.mkdir("unlisted", 0o300)
os.mkdir("unlisted/inner")
for _ in range(3000):
    os.mkdir("deeper")
    os.chdir("deeper")
""").passed


@held
def test_nothing_of_the_caller_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("A_SECRET_KEY", "the secret")
    with open(tmp_path / "secret", "w+") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = run(f"""
import os
assert "the secret" not in str(os.environ)
for pid in ({os.getpid()}, os.getppid(), 1, "self"):
    try:
        assert b"the secret" not in open(f"/proc/{{pid}}/environ", "rb").read()
    except OSError:
        pass
for fd in range(4, 256):
    try:
        os.fstat(fd)
    except OSError:
        continue
    raise Exception(fd)
""")
        assert outcome == Outcome(True, "passed", "")


@held
def test_signals_do_not_leave_it():
    me = os.getpid()
    denied(f"""
    lambda: os.kill(os.getppid(), 9), lambda: os.kill({me}, 9), lambda: os.kill(0, 9), lambda: os.kill(-1, 9),
    lambda: os.killpg(0, 9), lambda: signal.pidfd_send_signal(os.pidfd_open({me}), 9),
    lambda: resource.prlimit({me}, resource.RLIMIT_CPU, (1, 1)), lambda: os.sched_setaffinity({me}, [0]),
    lambda: os.setpriority(os.PRIO_PROCESS, 0, 19), lambda: resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999)),
    lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
""", errors="OSError, ValueError", after=f"""
assert libc.ptrace(16, {me}, 0, 0) == -1
assert libc.prctl(1, 0, 0, 0, 0) == -1
assert libc.unshare(0x10000000) == -1
""")  # fmt: skip


@held
def test_many_at_once_in_order():
    sources = ["assert True", "assert False", "while True: pass", "import os\nos._exit(0)", "(", RIGHT]
    outcomes = run_programs(sources, workers=3, seconds=1, wall_seconds=20)
    assert [o.reason for o in outcomes] == ["passed", "failed", "time", "exit", "failed", "passed"]
    assert run_programs([]) == []
    with pytest.raises(UserError, match="above zero"):
        run_program("", seconds=0)


def test_what_is_in_force():
    found = protections()
    assert set(found) == {"network", "files", "processes"}
    if sys.platform != "linux":
        assert not any(found.values())


LESS = """
import os, sys
from duplex_jax.errors import UserError
from duplex_jax.evaluate import sandbox, sandbox_guard as guard

missing, file = sys.argv[1].split(), sys.argv[2]
denied, partly = guard.numbers()
numbers = {"landlock": 444, "namespaces": denied["unshare"]}
rules = {partly["prctl"]: guard.never(0, [22])} if "seccomp" in missing else {}
try:
    guard.install_filter(guard.filter_program({name: numbers[name] for name in missing if name in numbers}, rules))
except OSError:
    sys.exit(77)
print(sandbox.protections())
for source in ("pass", f"open({file!r}, 'w')", "open('x', 'w').write('z')", "import os; os.kill(os.getppid(), 9)",
               "import os; os.fork()", "import socket; socket.socket()", f"import os; os.chmod({file!r}, 0o777)"):
    try:
        outcome = sandbox.run_program(source)
        print(outcome.reason, outcome.detail)
    except UserError as e:
        print(e)
"""


def on_a_lesser_machine(missing: str, file: Path) -> list[str]:
    """What programs come to where the kernel gives less, which a filter pretends to their caller."""
    run = subprocess.run([sys.executable, "-c", LESS, missing, file], capture_output=True, text=True, timeout=100)
    if run.returncode == 77:
        pytest.skip("this machine has no filters of system calls")
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@held
@pytest.mark.parametrize("missing", ["landlock", "namespaces"])
def test_one_wall_is_enough(missing: str, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("kept")
    file.chmod(0o600)
    needed = {"landlock": "read-only mounts", "namespaces": "landlock"}[missing]
    if needed not in protections()["files"]:
        pytest.skip(f"this machine has no {needed}")
    found, *outcomes = on_a_lesser_machine(missing, file)
    assert re.search(rf"'files': \('{needed}',\)", found)
    assert [o.split()[0] for o in outcomes] == ["passed", "failed", "passed", *["failed"] * 4]
    assert file.read_text() == "kept"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("landlock namespaces", "nothing keeps them from files (needs Landlock"),
        ("seccomp", "nothing keeps them from the network (needs seccomp"),
        ("seccomp landlock namespaces", "nothing keeps them from the network (needs seccomp, on Linux for x86-64 or "
         "64-bit ARM) and from files (needs Landlock"),
    ],
)  # fmt: skip
def test_machines_that_cannot_hold_a_program(missing: str, message: str, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("kept")
    _, *outcomes = on_a_lesser_machine(missing, file)
    assert all(message in o for o in outcomes), outcomes
    assert file.read_text() == "kept"
