"""`duplex-jax chat`: talk with a model slice by slice, or replay the user's side of a timeline."""

import asyncio
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

from absl import flags

from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, check_writable
from duplex_jax.timeline import IDLE, Timeline, dump_line, read_timelines, whole_characters, write_timelines
from duplex_jax.tokenizer import complete_utf8, decode_bytes
from launch import app, view

# JAX is imported only when a model is about to run, so that bad flags and Ctrl-C are handled at once before that.
if TYPE_CHECKING:
    from duplex_jax.decode.engine import Engine
    from duplex_jax.decode.replay import Replay
    from duplex_jax.decode.session import DuplexSession, Slice
    from duplex_jax.serve.client import RemoteSession
    from duplex_jax.serve.local import LocalSession

_MODEL = app.path_flag(
    "model", None, "A folder, a file, hf:owner/name, or a known name; by default smollm2-135m-duplex, and its base "
    "smollm2-135m-instruct with --mode=turn_based.",
)  # fmt: skip
_TEMPLATE = app.template_flag()
_MODE = flags.DEFINE_enum(
    "mode",
    "duplex",
    ["duplex", "turn_based"],
    "duplex: talk in time slices. turn_based: talk in whole turns (the baseline).",
)
_TIMELINE = app.path_flag("timeline", None, "Replay the user's side of this JSONL file on a virtual clock.")
_OUT = app.path_flag("out", None, "With --timeline: write the resulting timelines to this JSONL file.")
_ROWS = flags.DEFINE_integer(
    "rows", 1, "With --timeline: number of conversations replayed at once (batch size).", lower_bound=1
)
_SLICE_SECONDS = flags.DEFINE_float("slice_seconds", 2.0, "Length of a time slice in seconds.", lower_bound=0.1)
_SAMPLING = app.SamplingFlags(__name__)
_IDLE_BIAS = flags.DEFINE_float(
    "idle_bias", 0.0, "Added to the logit of <idle>: above 0 the model speaks less, below 0 more."
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.", 0, 2**32 - 1)
_SYSTEM = flags.DEFINE_string("system", None, "System prompt; none by default.")
_CAPACITY = flags.DEFINE_integer("capacity", None, "Maximum context length in tokens; 4096 by default.", lower_bound=1)
_STORES = app.StoreFlags(__name__)
_KEEP_IDLE = flags.DEFINE_integer(
    "keep_idle", 1, "Number of consecutive silent pairs kept in the context; -1 keeps all.", -1
)
_DORMANT = flags.DEFINE_bool("dormant", False, "Never speak unprompted: a silent user slice is answered with silence.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Maximum length of a turn-based answer in tokens.", lower_bound=1)
_SERVER = flags.DEFINE_string(
    "server", None, "URL of a running `duplex-jax serve`, for example ws://localhost:8765. It replaces --model; the "
    "API key, if required, is read from DUPLEX_JAX_API_KEY.",
)  # fmt: skip
_MIND = app.MindFlags(__name__)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object per line on standard output.")

DEFAULT_MODELS = {"duplex": "smollm2-135m-duplex", "turn_based": "smollm2-135m-instruct"}
"""Default of --model, by mode."""

QUICK_SECONDS = 1.2
"""A slice faster than this is quick: it leaves the rest of a 2-second interval for hearing and speaking."""


def _options() -> "Replay":
    from duplex_jax.decode.replay import Replay

    return Replay(
        sampling=_SAMPLING.sampling(_IDLE_BIAS.value),
        seed=_SEED.value,
        system=_SYSTEM.value,
        keep_idle=None if _KEEP_IDLE.value < 0 else _KEEP_IDLE.value,
        dormant=_DORMANT.value,
        max_tokens=_MAX_TOKENS.value,
    )


def _engine(rows: int) -> "Engine":
    from duplex_jax.checkpoint.registry import load_model
    from duplex_jax.decode.engine import Engine
    from duplex_jax.template import refuse_typed_markers

    with app.ends_at_once():
        app.use_compilation_cache()
        name = _MODEL.value or DEFAULT_MODELS[_MODE.value]
        _status(f"loading {name}")
        model = load_model(name, dtype="auto", template=_TEMPLATE.value, unread=True)
        refuse_typed_markers(model.template)
        return Engine(
            model.model, model.template, rows=rows, capacity=_CAPACITY.value,
            weights=_STORES.weights, entries=_STORES.entries,
        )  # fmt: skip


def _warm_up(engine: "Engine", length: int) -> None:
    """Compiles, for contexts of up to `length` tokens or 1,024, before a view that shows times."""
    _status("compiling; later starts are faster")
    with app.ends_at_once():
        engine.warm_up(min(length, 1024))


def _status(text: str) -> None:
    """Prints a status message, separate from the output."""
    if sys.stderr.isatty():
        print(f"\033[2m{text}\033[0m", file=sys.stderr, flush=True)


def _json_line(user: str | None, result: "Slice", conversation: int | None = None) -> str:
    row = {"index": result.index, "user": user, "assistant": result.text,
           "seconds": round(result.seconds, 4), "context": result.context}  # fmt: skip
    return json.dumps(row if conversation is None else {"conversation": conversation, **row}, ensure_ascii=False)


def _times(seconds: list[float]) -> str:
    """The last line of a replay: how many of its slices were quick."""
    quick = sum(s < QUICK_SECONDS for s in seconds)
    return (f"{quick} of {len(seconds)} slices ({quick / len(seconds):.0%}) under {QUICK_SECONDS} s; "
            f"median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s")  # fmt: skip


def _timelines(path: str) -> list[Timeline]:
    """The timelines to replay; reports invalid files before a model is loaded."""
    timelines = list(read_timelines(path))
    if not timelines:
        raise UserError(f"{path}: contains no timeline; expected one JSON object per line")
    if _OUT.value:
        check_writable(_OUT.value)
    return timelines


def _replay_file(timelines: list[Timeline], options: "Replay") -> None:
    from duplex_jax.decode.replay import Replayed, replay, replay_turns

    engine = _engine(min(_ROWS.value, len(timelines)))
    done: dict[int, Timeline] = {}
    if _MODE.value == "turn_based":
        for number, timeline in replay_turns(engine, timelines, options):
            done[number] = timeline
            for pair in timeline.pairs:
                if _JSON.value:
                    row = {"conversation": number, "user": pair.user, "assistant": pair.assistant}
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                elif pair.user or pair.assistant:
                    print(f"user       {pair.user}" + (f"\nassistant  {pair.assistant}" if pair.assistant else ""))
    else:
        seconds: list[float] = []
        lanes = view.Lanes(conversations=len(timelines) > 1)
        if not _JSON.value:
            _warm_up(engine, 16 * max(len(t.pairs) for t in timelines))  # approximate tokens per pair
            lanes.header()
        for item in replay(engine, timelines, options):
            if not isinstance(item, Replayed):
                done[item[0]] = item[1]
                continue
            seconds.append(item.slice.seconds)
            if _JSON.value:
                print(_json_line(item.user, item.slice, item.conversation), flush=True)
            else:
                lanes.add(item.user, item.slice, item.conversation)
        if not _JSON.value:
            lanes.end()
            print(_times(seconds), flush=True)
    if _OUT.value:
        with atomic_write(_OUT.value) as f:
            for number in sorted(done):
                f.write(dump_line(done[number]))
        _status(f"wrote {_OUT.value}")


def _stdin_lines() -> Iterator[str]:
    """Lines of standard input as text; invalid UTF-8 is an error that names the line."""
    for n, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as e:
            raise UserError(f"standard input, line {n}: not UTF-8 (byte {e.start}); send UTF-8 text") from e


def _pipe(options: "Replay") -> None:
    """Treats each line of standard input as one user slice, an empty one as silence; runs as fast as possible."""
    session = _session(options, 256 if not _JSON.value else 0)
    lanes = view.Lanes(fold_silence=False)  # one row per line
    if not _JSON.value:
        lanes.header()
    with contextlib.closing(session):
        for line in _stdin_lines():
            words = line.strip()
            user = None if words in ("", IDLE) else words
            result = session.step(user)
            if _JSON.value:
                print(_json_line(user, result), flush=True)
            else:
                lanes.add(user, result)


def _remote() -> "RemoteSession":
    """Opens a session on the server."""
    from duplex_jax.serve.client import RemoteSession

    settings = {
        **_SAMPLING.values(), "seed": _SEED.value,
        "idle_bias": _IDLE_BIAS.value, "system": _SYSTEM.value, "dormant": _DORMANT.value,
        "slice_seconds": _SLICE_SECONDS.value,
    }  # fmt: skip
    return RemoteSession(_SERVER.value or "", settings, os.environ.get("DUPLEX_JAX_API_KEY"))


def _with_mind(engine: "Engine", options: "Replay") -> "LocalSession":
    """A session here whose words are --mind's."""
    from duplex_jax.serve.local import LocalSession
    from duplex_jax.serve.settings import Settings

    settings = Settings(
        mode="turn_based" if _MODE.value == "turn_based" else "duplex", clock="client",
        slice_seconds=_SLICE_SECONDS.value, sampling=options.sampling,
        seed=options.seed, system=options.system, dormant=options.dormant, max_tokens=options.max_tokens,
        keep_idle=options.keep_idle,
    )  # fmt: skip
    return LocalSession(engine, settings, _MIND.make, _tell_trouble)


def _tell_trouble(message: str) -> None:
    """What goes wrong while a conversation goes on."""
    if sys.stdin.isatty() and not _JSON.value:
        print(f"       ({message})", flush=True)
    else:
        print(f"duplex-jax: {message}", file=sys.stderr, flush=True)


def _replay_in_turn(timelines: list[Timeline], begin: Callable[[], "RemoteSession | LocalSession"]) -> None:
    """Like `_replay_file`, but one conversation after the other, each in a session of its own."""
    done = []
    for number, timeline in enumerate(timelines):
        seconds = []
        lanes = view.Lanes()
        if not _JSON.value:
            lanes.header()
        with contextlib.closing(begin()) as session:
            for pair in timeline.pairs:
                result = session.step(pair.user)
                seconds.append(result.seconds)
                if _JSON.value:
                    print(_json_line(pair.user, result, number), flush=True)
                else:
                    lanes.add(pair.user, result)
        if not _JSON.value:
            lanes.end()
            print(_times(seconds), flush=True)
        done.append(dataclasses.replace(timeline, pairs=session.timeline, events=[]))
    if _OUT.value:
        write_timelines(_OUT.value, done)
        _status(f"wrote {_OUT.value}")


def _open(engine: "Engine", options: "Replay") -> "DuplexSession":
    from duplex_jax.decode.session import DuplexSession

    return DuplexSession(
        engine, system=options.system, seed=options.seed, sampling=options.sampling,
        keep_idle=options.keep_idle, dormant=options.dormant,
    )  # fmt: skip


def _session(options: "Replay", warm_up: int) -> "DuplexSession | RemoteSession | LocalSession":
    """Opens the conversation's session, in this process or on a server."""
    if _SERVER.value:
        return _remote()
    engine = _engine(1)
    if warm_up:
        _warm_up(engine, warm_up)
    return _with_mind(engine, options) if _MIND.url else _open(engine, options)


def _own_replies(engine: "Engine", options: "Replay") -> Callable[[str], Generator[str, None, None]]:
    """The model's own answers to queries, as they come."""
    from duplex_jax.decode.turns import open_turns

    session = open_turns(engine, system=options.system, seed=options.seed, sampling=options.sampling)

    def reply(query: str) -> Generator[str, None, None]:
        data = b""
        for ids in session.reply(query, session.make_room(query, options.max_tokens)):
            data += decode_bytes(engine.template.tokenizer, ids)
            whole = complete_utf8(data)
            yield data[:whole].decode("utf-8", errors="replace")
            data = data[whole:]

    return reply


def _turns(options: "Replay") -> None:
    """The turn-based baseline: whole query in, whole answer out, streamed; drops the oldest rounds when full."""
    engine = _engine(1)
    if not _MIND.url:
        _answer_queries(_own_replies(engine, options))
        return
    with contextlib.closing(_with_mind(engine, options)) as session:
        _answer_queries(session.reply)


def _answer_queries(reply: Callable[[str], Generator[str, None, None]]) -> None:
    """Answers each query of standard input, or of a terminal, as it is asked."""
    terminal = sys.stdin.isatty()

    def queries() -> Iterator[str]:
        if not terminal:
            yield from _stdin_lines()
            return
        while True:
            try:
                yield input("you        ")
            except EOFError:
                return

    for query in queries():
        asked = query.strip()
        if not asked:
            continue
        began, words = time.perf_counter(), []
        # On a terminal Ctrl-C stops an answer; at the prompt it ends the program.
        with view.interruptible() if terminal else contextlib.nullcontext(lambda: False) as stopped:
            if not _JSON.value:
                print("assistant  ", end="", flush=True)
            with contextlib.closing(reply(asked)) as parts:
                for text in parts:
                    words.append(text)
                    if not _JSON.value:
                        print(text, end="", flush=True)
                    if stopped():
                        break
        seconds = time.perf_counter() - began
        if _JSON.value:
            row = {"user": query, "assistant": "".join(words), "seconds": round(seconds, 4)}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            print(f"  ({'stopped, ' if stopped() else ''}{seconds:.1f} s)", flush=True)


def _terminal(options: "Replay") -> None:
    """A live conversation: the user can type at any time; each tick of the clock sends whole words and gets a slice."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.document import Document
    from prompt_toolkit.patch_stdout import patch_stdout

    session = _session(options, 1024)
    lanes = view.Lanes()
    # The view shows what was typed slice by slice, so the input line is erased.
    prompt: PromptSession[str] = PromptSession(erase_when_done=True, reserve_space_for_menu=0)
    # The terminal stays raw while a row is printed above the input line, so that no keystroke is lost.
    prompt.app.input.cooked_mode = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    sent: list[str] = []  # lines ended with Enter that wait for the clock

    def take() -> str | None:
        """The words typed since the last tick; an unfinished word stays in the input line."""
        buffer = prompt.default_buffer
        words = " ".join(sent)
        sent.clear()
        if prompt.app.is_running and " " in buffer.text:
            whole, _, rest = buffer.text.rpartition(" ")
            words = f"{words} {whole}"
            buffer.document = Document(rest, len(rest))
        # A terminal may send bytes that are not UTF-8.
        return words.strip().encode("utf-8", "replace").decode() or None

    async def clock() -> None:
        tick = time.monotonic()
        while True:
            tick = max(tick + _SLICE_SECONDS.value, time.monotonic())
            await asyncio.sleep(tick - time.monotonic())
            user = take()
            try:
                lanes.add(user, await asyncio.to_thread(session.step, user))
            except UserError as e:  # words that do not fit must not end the conversation
                print(f"       ({e})", flush=True)
            prompt.app.invalidate()

    async def typing() -> int:
        """Collects lines until Ctrl-D or Ctrl-C; returns the exit code."""
        while True:
            try:
                sent.append(await prompt.prompt_async("> ", rprompt=lambda: f"slice {len(session.timeline)}"))
            except EOFError:
                return 0
            except KeyboardInterrupt:
                return app.EXIT_INTERRUPTED

    async def both() -> int | None:
        tasks: list[asyncio.Task[int | None]] = [asyncio.create_task(clock()), asyncio.create_task(typing())]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if _SERVER.value or _MIND.url:  # a step may be waiting for it
            await asyncio.to_thread(session.close)
        await asyncio.gather(*pending, return_exceptions=True)
        return next(task.result() for task in done)

    print("Type at any moment; Ctrl-D or Ctrl-C ends the conversation.")
    lanes.header()
    try:
        with patch_stdout(raw=True):
            code = asyncio.run(both())
    except Exception as e:
        where = f"slice {len(session.timeline)}"
        raise UserError(f"the conversation ended at {where}: {type(e).__name__}: {e}") from e
    lanes.end()
    if code:
        raise KeyboardInterrupt


def main(argv: list[str]) -> None:
    """Runs a replay, a pipe or a terminal."""
    app.no_arguments(argv)
    if _OUT.value and not _TIMELINE.value:
        raise UserError("--out needs --timeline, the file whose user side is replayed")
    if _SYSTEM.value and not whole_characters(_SYSTEM.value):
        raise UserError("--system: not valid UTF-8; pass UTF-8 text")
    timelines = _timelines(_TIMELINE.value) if _TIMELINE.value else []
    if _SERVER.value and (_MODEL.value or _MODE.value == "turn_based"):
        raise UserError(
            "--server: the server chooses the model and every session is duplex; leave out --model and --mode"
        )
    if _SERVER.value and _MIND.url:
        raise UserError("--server: the server has its own --mind; leave one of them out")
    if _MIND.url and timelines and _MODE.value == "turn_based":
        raise UserError("--mind: replays --timeline in slices alone; leave out --mode=turn_based")
    _MIND.make()  # bad flags are refused before a model is loaded
    options = _options()
    if timelines and _SERVER.value:
        _replay_in_turn(timelines, _remote)
    elif timelines and _MIND.url:
        engine = _engine(1)
        _replay_in_turn(timelines, lambda: _with_mind(engine, options))
    elif timelines:
        _replay_file(timelines, options)
    elif _MODE.value == "turn_based":
        _turns(options)
    elif sys.stdin.isatty() and not _JSON.value:
        _terminal(options)
    else:
        _pipe(options)


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
