"""Runs programs that a language model wrote, and says whether each came to its end (HumanEval, MBPP).

Every program gets an interpreter of its own (standard library alone, no site-packages, hash seed 0), started anew and
not forked from the caller, whose threads hold JAX. It runs as one process, with threads but without children, in an
empty folder that is removed afterwards.

What keeps it in, from the kernel's means that need no privileges; the first two must be in force, or nothing is run:

- Network: a filter of system calls (seccomp) denies every socket, local ones too; where allowed, also a network
  namespace without interfaces.
- Files: Landlock lets it read what an interpreter reads (the library, shared objects) and write in its folder alone;
  where allowed, also every file system is mounted read-only for it and its folder lies in memory, with a bound on its
  whole size. At least one of the two. Modes, owners and times of files are denied by the filter.
- Processes: the filter denies new processes, other programs, and signals to any process but itself; where allowed, it
  is also the first process of a process namespace, with whose end all in it ends.
- What it takes: time of the processor and on the clock, address space, the size of each file, descriptors, output; no
  core dumps. Threads are bounded by a number where user namespaces are allowed and the caller is not root, and by
  memory and time alone elsewhere.
- What it inherits: no environment, no descriptors, no capabilities, stdin empty.

What this does not protect from: faults of the kernel (this is no virtual machine); what leaks through time and load of
the machine; reading what the interpreter's library folders hold and, where Landlock is missing, all that the user may
read (though it has no way to send it anywhere); without read-only mounts, many files that fill the disk until its time
is over.

A program passes only if its last line was reached: then a random token is written that the guard outside knows. Leaving
early by `sys.exit(0)` or `os._exit(0)` is no pass. Where a test has the form `assert CALL == LITERAL` (all but 15 of
HumanEval's 164 problems and all but one of MBPP's 974 have no other), the literal never enters the program's process:
the value goes out as plain data and is compared by the guard, so neither `__eq__`, subclasses, tracing, changed tests
nor a token that was found in memory make a wrong answer right. Other tests (`assert abs(f(x) - y) < 1e-6`, loops, plain
truth) run inside the program's process, and a program that changes what `==` or `assert` mean there, or searches its
own memory for the token (`gc`, `ctypes`), can pretend. Nor is a program kept from telling answers by heart, or from
trying whether an input is one of the tests.
"""

import ast
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from duplex_jax.errors import UserError

GUARD = Path(__file__).with_name("sandbox_guard.py")
THREADS = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    reason: `passed`; `failed`, it raised something or is no Python; `exit`, it left before its last line; `time`,
        `memory` or `output`, it took more than it was given; `signal`, it crashed; `error`, it could not be run, which
        says nothing about the program.
    detail: the last line that it wrote to stderr, or a few words; 500 characters at most.
    """

    passed: bool
    reason: str
    detail: str


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="program-")
    try:
        yield path
    finally:
        try:
            shutil.rmtree(path)
        except (OSError, RecursionError):  # folders without rights, or more of them than Python goes down
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, "--", path], check=False, capture_output=True)


@dataclass(frozen=True)
class Program:
    """Python text, and the literals that its tests expect: `__answer__(i, value)` in it stands for an assertion that
    `value` equals the i-th."""

    source: str
    expected: tuple[str, ...] = ()


def with_tests(code: str, tests: str) -> Program:
    """Code with tests behind it; assertions of the form `CALL == LITERAL`, outside of loops and conditions, are
    compared by the guard."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError):
        return Program(f"{code}\n{tests}\n")
    expected: list[str] = []

    def rewrite(body: list[ast.stmt]) -> None:
        for i, statement in enumerate(body):
            if isinstance(statement, ast.FunctionDef):
                rewrite(statement.body)
            match statement:
                case ast.Assert(ast.Compare(ast.Call() as call, [ast.Eq()], [right])) if _is_literal(right):
                    number: ast.expr = ast.Constant(len(expected))
                    expected.append(ast.unparse(right))
                    told = ast.Expr(ast.Call(ast.Name("__answer__", ast.Load()), [number, call], []))
                    body[i] = ast.copy_location(told, statement)

    rewrite(tree.body)
    return Program(f"{code}\n{ast.unparse(ast.fix_missing_locations(tree))}\n", tuple(expected))


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _guarded(
    program: Program, seconds: float, wall: float, memory_mib: int, disk_mib: int, output_mib: int
) -> list[str]:
    """Three lines of the guard: what was in force, the reason of the end, a detail."""
    with _folder() as folder:
        limits = [str(x) for x in (seconds, wall, memory_mib, disk_mib, output_mib, THREADS)]
        source = program.source.encode("utf-8", "replace")  # text of a model may hold half a character
        run = subprocess.run(
            [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(GUARD), str(len(source)), folder, *limits],
            input=source + json.dumps(program.expected).encode(),
            capture_output=True,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            cwd=folder,
            start_new_session=True,  # no terminal
            timeout=wall + 60,
        )
        lines = run.stdout.decode("utf-8", "replace").split("\n")
        if run.returncode or len(lines) < 3:
            errors = run.stderr.decode("utf-8", "replace").strip().splitlines()
            return ["", "error", errors[-1] if errors else f"the guard ended with code {run.returncode}"]
        return lines


@functools.cache
def protections() -> dict[str, tuple[str, ...]]:
    """What keeps a program from the network, files and processes on this machine, found by running one.

    Nothing is run where `network` or `files` is empty.

    Raises:
        UserError: it cannot be found out, as no process can be started or no folder made.
    """
    names: list[str] = []
    if sys.platform == "linux":
        try:
            in_force, reason, detail, *_ = _guarded(Program(""), 5, 60, 1024, 1, 1)
        except (OSError, subprocess.SubprocessError) as e:
            reason, detail = "error", str(e)
        if reason in ("error", "time"):
            raise UserError(f"programs of a model cannot be run here: a first one ended with {reason} {detail}")
        names = in_force.split(",")
    walls = {
        "network": ("seccomp", "network namespace"),
        "files": ("landlock", "read-only mounts"),
        "processes": ("seccomp", "process namespace"),
    }
    found = {what: tuple(by for by in means if by in names) for what, means in walls.items()}
    return found if "seccomp" in names else {**found, "network": ()}  # a namespace has other ways out: local sockets


def check_sandbox() -> None:
    """Refuses, before any time is spent, a machine on which programs cannot be shut in.

    Raises:
        UserError: nothing keeps a program from the network or from files; or as `protections`.
    """
    found = protections()
    missing = [
        text
        for what, text in (
            ("network", "from the network (needs seccomp, on Linux for x86-64 or 64-bit ARM)"),
            ("files", "from files (needs Landlock, in Linux from 5.13, or user namespaces)"),
        )
        if not found[what]
    ]
    if missing:
        raise UserError(
            f"programs of a model cannot be run here: nothing keeps them {' and '.join(missing)}; allow that in the "
            "container's settings, or run them on another machine"
        )


def run_program(
    program: str | Program,
    *,
    seconds: float = 3.0,
    wall_seconds: float | None = None,
    memory_mib: int = 1024,
    disk_mib: int = 64,
    output_mib: int = 16,
) -> Outcome:
    """Runs Python text as `__main__` and says whether its last line was reached without an exception.

    Args:
        program: with its tests.
        seconds: time of the processor.
        wall_seconds: time on the clock; twice `seconds` and one more unless given.
        memory_mib: address space in MiB.
        disk_mib: the size of each file that it writes, and of all together where its folder lies in memory, in MiB.
        output_mib: what it may print, in MiB; nothing of it is kept but the last line of stderr.

    Raises:
        UserError: as `check_sandbox`, or a limit is not above zero.
    """
    wall = 2 * seconds + 1 if wall_seconds is None else wall_seconds
    if min(seconds, wall, memory_mib, disk_mib, output_mib) <= 0:
        raise UserError("limits of a program must be above zero")
    check_sandbox()
    try:
        given = program if isinstance(program, Program) else Program(program)
        _, reason, detail, *_ = _guarded(given, seconds, wall, memory_mib, disk_mib, output_mib)
    except (OSError, subprocess.SubprocessError) as e:
        reason, detail = "error", str(e)
    if reason == "unprotected":
        raise UserError(f"a program of a model was not run: its protections failed ({detail or 'no reason given'})")
    return Outcome(reason == "passed", reason, detail)


def run_programs(programs: Sequence[str | Program], workers: int | None = None, **limits: float) -> list[Outcome]:
    """`run_program` for each, `workers` at a time (unless given, as many as there are processors); in their order.

    Raises:
        UserError: as `run_program`.
    """
    check_sandbox()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(functools.partial(run_program, **limits), programs))  # type: ignore[arg-type]
