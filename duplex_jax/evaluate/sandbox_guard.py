"""Confines and watches one program; `sandbox.run_program` starts it in its own interpreter.

The guard enters new namespaces if the kernel permits it, then forks. The child drops what it does not need before it
runs the program: file systems, descriptors, capabilities, system calls. The guard stays outside and enforces the time
limit. Protections are reported from what the child has just enabled, not from what the machine should support.
"""

import ast
import contextlib
import ctypes
import decimal
import fractions
import functools
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

TAIL = 4096  # bytes of stderr that are kept
ANSWERS = 1 << 20  # bytes of the program's answers that are read

# System call numbers on x86-64 and on 64-bit ARM; - where there is none.
CALLS = """
    fork 57 -, vfork 58 -, execve 59 221, execveat 322 281,
    socket 41 198, connect 42 203, accept 43 202, sendto 44 206, sendmsg 46 211, bind 49 200, listen 50 201,
    socketpair 53 199, accept4 288 242, sendmmsg 307 269,
    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, pidfd_open 434 434,
    pidfd_getfd 438 438, pidfd_send_signal 424 424, process_madvise 440 440, process_mrelease 448 448,
    tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
    setpriority 141 140, sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122,
    sched_setattr 314 274, ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239,
    unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428,
    move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442,
    truncate 76 45, chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54,
    utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
    removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, open_by_handle_at 304 265, fanotify_init 300 262,
    memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193,
    semctl 66 191, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181,
    io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
    bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, add_key 248 217, request_key 249 218, keyctl 250 219,
    init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294,
    reboot 169 142, swapon 167 224, swapoff 168 225, syslog 103 116, acct 163 89, quotactl 179 60, personality 135 92,
    settimeofday 164 170, adjtimex 159 171, clock_settime 227 112, clock_adjtime 305 266, sethostname 170 161,
    setdomainname 171 162, iopl 172 -, ioperm 173 -, modify_ldt 154 -
"""
# Calls of which some uses are needed; the filter inspects their arguments.
PARTLY = {"clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prctl": (157, 167), "fcntl": (72, 25),
          "ioctl": (16, 29), "prlimit64": (302, 261)}  # fmt: skip
CLONE3, NEWEST = 435, 450  # the program gets ENOSYS for calls newer than these
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF, MOUNT_SETATTR = 444, 445, 446, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, name in the filter
EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000

Step = tuple[int, int, int, int]
libc = ctypes.CDLL(None, use_errno=True)


def call(result: int, what: str) -> int:
    """The result of a C function; raises OSError if it is -1."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option: int, value: int, address: int = 0) -> None:
    call(libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(address), 0, 0), f"prctl {option}")


def system_call(number: int, *arguments: int | bytes | None) -> int:
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return call(libc.syscall(ctypes.c_long(number), *given), f"system call {number}")


# --- the system call filter ---


# A step is an operation, the numbers of steps to skip if it is true and if it is false, and a value (linux/filter.h).


def load(offset: int) -> Step:
    return 0x20, 0, 0, offset


def equal(value: int, yes: int, no: int) -> Step:
    return 0x15, yes, no, value


def give(action: int) -> Step:
    return 0x06, 0, 0, action


def argument(i: int) -> Step:
    return load(16 + 8 * i)  # its low half, which holds all ints and flags that are inspected


def only(i: int, values: Sequence[int]) -> list[Step]:
    """Allows the call only if argument i is one of the values."""
    tests = [equal(v, len(values) - n, 0) for n, v in enumerate(values)]
    return [argument(i), *tests, give(ERRNO | EPERM), give(ALLOW)]


def never(i: int, values: Sequence[int]) -> list[Step]:
    """Denies the call if argument i is one of the values."""
    tests = [equal(v, len(values) - n, 0) for n, v in enumerate(values)]
    return [argument(i), *tests, give(ALLOW), give(ERRNO | EPERM)]


def filter_program(denied: dict[str, int], rules: dict[int, list[Step]]) -> bytes:
    """A BPF program that denies some calls by number, applies rules to others, and allows the rest.

    Raises:
        OSError: this processor's system call numbers are not known.
    """
    if os.uname().machine not in ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(ENOSYS, f"system calls of {os.uname().machine} are not known")
    steps = [load(4), equal(ARCHITECTURES[os.uname().machine][1], 1, 0), give(KILL), load(0)]
    # x86-64's second set of numbers is also above the newest one.
    steps += [(0x25, 0, 1, NEWEST), give(ERRNO | ENOSYS), equal(CLONE3, 0, 1), give(ERRNO | ENOSYS)]
    for number in sorted(denied.values()):
        steps += [equal(number, 0, 1), give(ERRNO | EPERM)]
    for number, rule in rules.items():
        steps += [equal(number, 0, len(rule)), *rule]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, give(ALLOW)])


def numbers() -> tuple[dict[str, int], dict[str, int]]:
    """The system calls that are denied, and those that are partly denied."""
    column = ARCHITECTURES.get(os.uname().machine, (0, 0))[0]
    table = {name: n for name, *n in (line.split() for line in CALLS.split(","))}
    return ({name: int(n[column]) for name, n in table.items() if n[column] != "-"},
            {name: n[column] for name, n in PARTLY.items()})  # fmt: skip


def install_filter(program: bytes) -> None:
    """Installs a filter on this process and its children. Without privileges this needs no_new_privs, which it sets.

    Raises:
        OSError: the kernel does not support filters.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(head))  # SECCOMP_MODE_FILTER


def filter_calls() -> None:
    """Restricts this process to itself: no sockets, no other processes; threads and signals to itself are permitted."""
    denied, partly = numbers()
    me = os.getpid()
    rules = {
        "clone": [argument(0), (0x45, 0, 1, 0x10000), give(ALLOW), give(ERRNO | EPERM)],  # CLONE_THREAD
        "kill": only(0, [me]),
        "tgkill": only(0, [me]),
        "prlimit64": only(0, [0, me]),
        "prctl": never(0, [PR_SET_PDEATHSIG, PR_SET_DUMPABLE]),
        "fcntl": never(1, [8, 10, 15]),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: indirect signals
        "ioctl": never(1, [0x8901, 0x8902, 0x5412, 0x541C]),  # the same; TIOCSTI, TIOCLINUX: fake keyboard input
    }
    install_filter(filter_program(denied, {partly[name]: rule for name, rule in rules.items()}))


# --- files ---


def readable() -> list[str]:
    """What an interpreter needs to read: its library, shared objects, time zones."""
    paths = [os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib"),
             "/lib", "/lib64", "/usr/lib", "/usr/lib64",
             "/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache", "/dev/urandom"]  # fmt: skip
    return [path for path in paths if os.path.exists(path)]


def landlock(folder: str) -> None:
    """Permits reading what an interpreter needs, and writing to the folder and to /dev/null only.

    The bits are those of linux/landlock.h: 1 is writing a file, 2 reading one, 3 listing a folder; 3 to 12 concern the
    contents of folders; 13 (moving between folders), 14 (truncating) and 15 (devices) came with later versions.

    Raises:
        OSError: the kernel does not support Landlock.
    """
    version = system_call(LANDLOCK_CREATE_RULESET, None, 0, 1)
    every = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (version >= 5) << 15
    attributes = struct.pack("=QQQ", every, 3, 3)  # also TCP, and signals and sockets to outside processes
    rules = system_call(LANDLOCK_CREATE_RULESET, attributes, 8 if version < 4 else 16 if version < 6 else 24, 0)
    of_files = every & ~(0b1111111111 << 3) & ~(1 << 13)  # a file's rule must not have folder bits
    for path, access in [*((path, 0b1100) for path in readable()), ("/dev/null", 0b0110), (folder, every)]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            access &= of_files
        system_call(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    system_call(LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    given = [x.encode() for x in (source, target, kind)]
    call(libc.mount(*given, ctypes.c_ulong(flags), data.encode() or None), f"mount {target}")


def set_mounts(path: str, recursive: bool, on: int, off: int) -> None:
    private = 1 << 18
    system_call(MOUNT_SETATTR, -100, path.encode(), 0x8000 * recursive, struct.pack("=QQQQ", on, off, private, 0), 32)


def read_only_mounts(folder: str, disk_mib: int) -> None:
    """Makes all file systems read-only and without devices, and mounts a small one in memory at the folder.

    Raises:
        OSError: there is no private mount namespace, or the kernel is older than 5.12.
    """
    read_only, no_setuid, no_devices = 1, 2, 4
    set_mounts("/", True, read_only | no_setuid | no_devices, 0)
    mount("/dev/null", "/dev/null", "", 4096)  # MS_BIND
    set_mounts("/dev/null", False, 0, read_only | no_devices)
    mount("tmpfs", "/proc", "tmpfs", read_only | no_setuid | no_devices, "size=4k,mode=555")
    mount("tmpfs", folder, "tmpfs", no_setuid | no_devices, f"size={disk_mib}m,nr_inodes=10000,mode=700")


# --- namespaces and capabilities ---


def leave() -> list[str]:
    """Enters new namespaces, as an ordinary user or else with root's rights; returns the names of those permitted.

    The user namespace comes first: in another user namespace a process cannot inspect the caller's processes.
    """
    user, mounts, network, processes, ipc = 0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x08000000
    uid, gid = os.geteuid(), os.getegid()
    for flags in (user | mounts | network | processes | ipc, mounts | network | processes | ipc):
        try:
            call(libc.unshare(flags), "unshare")
        except OSError:
            continue
        if flags & user:
            with contextlib.suppress(OSError):  # without a mapping the user is nobody, which is fine
                for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(text)
        names = ["mount namespace", "network namespace", "process namespace"]
        return ["user namespace", *names] if flags & user else names
    return []


def drop_capabilities() -> None:
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    call(libc.capset(header, none), "capset")


# --- the child ---


def shut_in(folder: str, disk_mib: int, memory_mib: int, seconds: float, threads: int, names: list[str]) -> list[str]:
    """Drops everything that the program must not have; returns the names of all protections in force."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ends with the guard
    if "mount namespace" in names:
        with contextlib.suppress(OSError):
            read_only_mounts(folder, disk_mib)
            names = [*names, "read-only mounts"]
    os.chdir(folder)
    cpu = math.ceil(seconds) + 1  # a fallback: the guard stops earlier, by a finer clock
    limits = {resource.RLIMIT_CPU: cpu, resource.RLIMIT_AS: memory_mib << 20, resource.RLIMIT_FSIZE: disk_mib << 20,
              resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 256, resource.RLIMIT_MEMLOCK: 0}  # fmt: skip
    if "user namespace" in names:  # otherwise the limit would include the user's other processes
        limits[resource.RLIMIT_NPROC] = threads
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    drop_capabilities()
    prctl(PR_SET_DUMPABLE, 0)  # core dump handlers ignore the limit
    for name, step in (("landlock", functools.partial(landlock, folder)), ("seccomp", filter_calls)):
        with contextlib.suppress(OSError):
            step()
            names = [*names, name]
    return names


def plain(value: Any) -> str:
    """A value as a Python literal, formatted by the built-in types' own methods, so that overrides have no effect.

    Raises:
        TypeError: it is not plain data.
    """
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        text = float.__repr__(value)
        return {"inf": "1e999", "-inf": "-1e999", "nan": "..."}.get(text, text)  # NaN equals nothing
    scalars: tuple[Any, ...] = (complex, str, bytes)
    for kind in scalars:
        if isinstance(value, kind):
            return kind.__repr__(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{plain(k)}: {plain(v)}" for k, v in dict.items(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(plain, list.__iter__(value))) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(plain(v) + ", " for v in tuple.__iter__(value)) + ")"
    if type(value) in (type({}.keys()), type({}.items())):
        value = set(value)
    groups: tuple[Any, ...] = (set, frozenset)
    for kind in groups:
        if isinstance(value, kind):
            return "{" + ", ".join(map(plain, kind.__iter__(value))) + "}" if kind.__len__(value) else "set()"
    if type(value) in (fractions.Fraction, decimal.Decimal):
        whole = fractions.Fraction(value)
        return plain(int(whole) if whole.denominator == 1 else float(whole) if float(whole) == whole else None)
    raise TypeError(f"an answer is of {type(value).__name__}, which is no plain data")


def answer(report: int, write: Callable[[int, bytes], int], number: int, value: object) -> None:
    """Reports the program's value for a test that expects plain data; the guard compares it."""
    data = f"{number} {plain(value)}".encode("utf-8", "backslashreplace") + b"\n"
    while data:
        data = data[write(report, data) :]


def are_right(answers: Sequence[bytes], expected: Sequence[str]) -> bool:
    """Whether every expectation was met each time it was tested."""
    met = set()
    for line in answers:
        number, _, text = line.decode("utf-8", "replace").partition(" ")
        try:
            if ast.literal_eval(text) != ast.literal_eval(expected[int(number)]):
                return False
        except (ValueError, SyntaxError, TypeError, IndexError, MemoryError, RecursionError):
            return False
        met.add(int(number))
    return len(met) == len(expected)


def steps(report: int, source: bytes) -> Iterator[Callable[[], object]]:
    """The program, followed by a step that reports completion by writing the random token a second time.

    The token is in no variable of a frame that the program could walk up to, only in the second of these functions,
    which the loop holds without naming it.
    """
    token = os.urandom(16).hex().encode()
    os.write(report, token + b"\n")
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    vars(main)["__answer__"] = functools.partial(answer, report, os.write)
    code = compile(source.decode(), "program.py", "exec", dont_inherit=True)
    return iter((functools.partial(exec, code, vars(main)), functools.partial(os.write, report, token)))


def run(report: int, source: bytes) -> None:
    """Runs the program; reports on the descriptor how it ended."""
    show, end, write = sys.__excepthook__, os._exit, os.write  # the program may replace these
    try:
        for step in steps(report, source):
            step()
        end(0)
    except SystemExit:
        write(report, b"exit")
    except MemoryError as e:
        write(report, b"memory")
        show(type(e), e, None)
    except BaseException as e:
        write(report, b"failed")
        with contextlib.suppress(BaseException):
            show(type(e), e, None)
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        end(1)


# --- the guard ---


def watch(child: int, pipes: list[int], seconds: float, wall: float, most: int) -> tuple[bytes, str, bytes]:
    """Waits until the child ends, or ends it.

    Returns:
        What it reported, the reason of its end or how it ended, and the end of its stderr.
    """
    report, out, err = pipes
    kept = {report: b"", out: b"", err: b""}
    taken, reason, ended = 0, "", False
    deadline = time.monotonic() + wall
    clock = ctypes.c_int()  # the child's CPU clock
    timed = libc.clock_getcpuclockid(child, ctypes.byref(clock)) == 0  # otherwise the kernel's limit applies
    poll = select.poll()
    for fd in pipes:
        poll.register(fd, select.POLLIN)
    poll.register(sys.stdout.fileno(), 0)  # detects when nobody reads any more
    left = set(pipes)
    while True:
        ready = [fd for fd, _ in poll.poll(0 if ended else 1000 * min(0.02, max(0, deadline - time.monotonic())))]
        if sys.stdout.fileno() in ready:  # the caller is gone
            os.kill(child, signal.SIGKILL)
            os._exit(1)
        for fd in ready:
            data = os.read(fd, 1 << 16)
            if not data:
                poll.unregister(fd)
                left.discard(fd)
            kept[fd] = (kept[fd] + data)[:ANSWERS] if fd == report else (kept[fd] + data)[-TAIL:]
            taken += len(data)
        if ended and not (ready and left and taken <= most + (1 << 20)):
            break
        if not ended and not reason:
            late = time.monotonic() > deadline or (timed and time.clock_gettime(clock.value) > seconds)
            reason = "output" if taken > most else "time" if late else ""
            if reason:
                os.kill(child, signal.SIGKILL)  # in a process namespace this kills all
        if not ended:
            # Without an open pipe nothing signals the child's end, so it is polled.
            pid, status, usage = os.wait4(child, 0 if reason else os.WNOHANG)
            ended = pid == child
            if not left and not ended:
                time.sleep(0.002)
    if not reason and os.WIFSIGNALED(status):
        spent = usage.ru_utime + usage.ru_stime > seconds
        number = os.WTERMSIG(status)
        reason = "time" if number in (signal.SIGKILL, signal.SIGXCPU) and spent else f"signal {number}"
    return kept[report], reason or f"code {os.WEXITSTATUS(status)}", kept[err]


def read(most: int = -1) -> bytes:
    """Reads exactly this many bytes from stdin; by default all that is left."""
    data = b""
    while len(data) != most and (more := os.read(0, 1 << 16 if most < 0 else min(1 << 16, most - len(data)))):
        data += more
    return data


def main(length: str, folder: str, *limits: str) -> None:
    """Reads a program from stdin; prints the protections in force, the reason of its end, and its last words.

    The literals that the tests expect follow the program on stdin. They are read after the fork, so that they are not
    in the child's memory.
    """
    source = read(int(length))
    seconds, wall, memory_mib, disk_mib, output_mib, threads = limits
    names = leave()
    pipes = [os.pipe() for _ in range(3)]
    child = os.fork()
    if child == 0:
        try:
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(pipes[0][1], 10)
            for fd, to in ((nothing, 0), (pipes[1][1], 1), (pipes[2][1], 2), (10, 3)):
                os.dup2(fd, to)
            os.closerange(4, 1 << 16)
            names = shut_in(folder, int(disk_mib), int(memory_mib), float(seconds), int(threads), names)
            os.write(3, ",".join(names).encode() + b"\n")
            if "seccomp" in names and {"landlock", "read-only mounts"} & set(names):
                sys.argv = ["program.py"]
                run(3, source)
        except BaseException as e:
            os.write(2, str(e).encode())
        finally:
            os._exit(1)
    for _, fd in pipes:
        os.close(fd)
    expected = json.loads(read() or b"[]")
    report, reason, err = watch(child, [p for p, _ in pipes], float(seconds), float(wall), int(output_mib) << 20)
    in_force, token, *said = *report.split(b"\n"), b""
    *answers, word = said[:-1] or [b""]
    lines = [line.strip() for line in err.decode("utf-8", "replace").splitlines() if line.strip()]
    detail = "".join(c if c.isprintable() else "?" for c in lines[-1][:500]) if lines else ""
    if not token:
        reason = reason if reason in ("time", "memory") else "unprotected"
    elif word == token:
        reason = "passed" if are_right(answers, expected) else "failed"
        detail = "" if reason == "passed" else "an answer is not what the test expects"
    elif word in (b"failed", b"memory", b"exit"):
        reason = reason if reason in ("time", "output") else word.decode()
    elif reason.startswith("code "):
        reason, detail = "exit", f"ended with {reason} before its last line"
    elif reason.startswith("signal "):
        reason, detail = "signal", f"ended by {reason}"  # an abort ends with signal 11 in a process namespace
    sys.stdout.buffer.write("\n".join((in_force.decode(), reason, detail)).encode("utf-8", "replace"))


if __name__ == "__main__":
    main(*sys.argv[1:])
