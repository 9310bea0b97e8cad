"""Runs programs written by a language model and reports whether each one completed (HumanEval, MBPP).

Every program gets its own interpreter (standard library only, no site-packages, hash seed 0), started from scratch and
not forked from the caller, whose threads hold JAX. It runs as one process, with threads but without children, in an
empty folder that is removed afterwards.

It is confined by kernel features that need no privileges; unless the first two are in force, nothing is run:

- Network: a system call filter (seccomp) denies all sockets, including local ones; if permitted, also a network
  namespace without interfaces.
- Files: Landlock permits reading what an interpreter needs (the library, shared objects) and writing in its own folder
  only; if permitted, also all file systems are mounted read-only and the folder is in memory, with a limit on its total
  size. At least one of the two is required. The filter denies changing modes, owners and times of files.
- Processes: the filter denies new processes, other programs, and signals to other processes; if permitted, the program
  is also the first process of a process namespace, which ends with it.
- Resources: CPU time and wall time, address space, size of each file, descriptors, output; no core dumps. The number of
  threads is limited if user namespaces are permitted and the caller is not root; otherwise only memory and time limit
  them.
- Inheritance: no environment, no descriptors, no capabilities, empty stdin.

It does not protect against kernel bugs (this is not a virtual machine), side channels through the machine's time and
load, or reading the interpreter's library folders and, without Landlock, all files that the user can read (although the
program cannot send them anywhere). Without read-only mounts many files can fill the disk until the time is up.

A program passes only if its last line is reached, which writes a random token that the guard outside knows; leaving
early by `sys.exit(0)` or `os._exit(0)` does not pass. If a test has the form `assert CALL == LITERAL` (all but 15 of
HumanEval's 164 problems and all but one of MBPP's 974 have only such tests), the literal never enters the program's
process: the value is sent out as plain data and compared by the guard, so neither `__eq__`, subclasses, tracing,
changed tests nor a token found in memory can make a wrong answer pass. Other tests (`assert abs(f(x) - y) < 1e-6`,
loops, plain truth values) run inside the program's process, and a program that redefines `==` or `assert` there, or
searches its own memory for the token (`gc`, `ctypes`), can cheat. A program can also contain memorised answers, or
check whether an input is one of the tests.
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

    reason: `passed`; `failed`: it raised an exception or is not valid Python; `exit`: it left before its last line;
        `time`, `memory` or `output`: it exceeded a limit; `signal`: it crashed; `error`: it could not be run, which
        says nothing about the program.
    detail: its last line on stderr, or a short explanation; at most 500 characters.
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
        except (OSError, RecursionError):  # folders without permissions, or nested too deeply
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, "--", path], check=False, capture_output=True)


@dataclass(frozen=True)
class Program:
    """Python text, and the literals that its tests expect.

    In the text, `__answer__(i, value)` asserts that `value` equals literal number i.
    """

    source: str
    expected: tuple[str, ...] = ()


def with_tests(code: str, tests: str) -> Program:
    """Code followed by its tests; the guard compares top-level assertions of the form `CALL == LITERAL`."""
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
    """Runs the guard; returns its three lines: protections in force, reason of the end, detail."""
    with _folder() as folder:
        limits = [str(x) for x in (seconds, wall, memory_mib, disk_mib, output_mib, THREADS)]
        source = program.source.encode("utf-8", "replace")  # a model's text may contain a partial character
        run = subprocess.run(
            [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(GUARD), str(len(source)), folder, *limits],
            input=source + json.dumps(program.expected).encode(),
            capture_output=True,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            cwd=folder,
            start_new_session=True,  # detached from the terminal
            timeout=wall + 60,
        )
        lines = run.stdout.decode("utf-8", "replace").split("\n")
        if run.returncode or len(lines) < 3:
            errors = run.stderr.decode("utf-8", "replace").strip().splitlines()
            return ["", "error", errors[-1] if errors else f"the guard ended with code {run.returncode}"]
        return lines


@functools.cache
def protections() -> dict[str, tuple[str, ...]]:
    """What confines a program on this machine as to network, files and processes, determined by running one.

    Nothing is run if `network` or `files` is empty.

    Raises:
        UserError: it cannot be determined, because no process can be started or no folder created.
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
    return found if "seccomp" in names else {**found, "network": ()}  # a namespace alone leaves local sockets


def check_sandbox() -> None:
    """Checks, before any work is done, that programs can be confined on this machine.

    Raises:
        UserError: network or files are not protected; or as for `protections`.
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
    """Runs Python text as `__main__` and reports whether its last line was reached without an exception.

    Args:
        program: the program with its tests.
        seconds: CPU time limit.
        wall_seconds: wall time limit; by default twice `seconds` plus one.
        memory_mib: address space limit in MiB.
        disk_mib: size limit of each written file, and of all together if its folder is in memory, in MiB.
        output_mib: output limit in MiB; only the last line of stderr is kept.

    Raises:
        UserError: as for `check_sandbox`, or a limit is not positive.
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
    """`run_program` for each program, `workers` at a time (by default one per CPU); returns outcomes in order.

    Raises:
        UserError: as for `run_program`.
    """
    check_sandbox()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(functools.partial(run_program, **limits), programs))  # type: ignore[arg-type]
