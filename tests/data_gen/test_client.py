"""A model over HTTP: nothing lost, nothing asked twice, every trouble counted and named, budgets kept."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import FakeServer
from made_up import make_dialogue

from data_gen.batch import BatchWriter, collect, submit
from data_gen.engines import make_engine
from data_gen.pipeline import Answers, Summary, generate, make_recipe, parse_shares
from data_gen.rewriter import Request, Sampling
from data_gen.transitions import FUSE_PROMPT
from data_gen.unit import Context, make_unit
from duplex_jax.errors import UserError
from duplex_jax.llm.cache import Reply, ReplyCache
from duplex_jax.llm.client import GIVE_UP_AFTER, Budget, Client, Stopped
from duplex_jax.timeline import read_timelines
from duplex_jax.tokenizer import Tokenizer

SAMPLING = Sampling("m")


def questions(number: int) -> list[Request]:
    found = []
    for i in range(number):
        source = f"What is the number {i} good for?"
        prompt = FUSE_PROMPT.format(sentence_a="Let's talk about [topic].", sentence_b=source)
        found.append(Request("fuse", (("user", prompt),), 64, SAMPLING, source))
    return found


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ReplyCache]:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    yield cache
    cache.close()


@pytest.fixture
def client(request: pytest.FixtureRequest, server: FakeServer, cache: ReplyCache) -> Iterator[Client]:
    """Waits for long, as the machine may be busy; not where a test gives another time-out."""
    client = Client(server.url, cache, concurrency=8, timeout=getattr(request, "param", 60.0), backoff=0.01)
    yield client
    client.close()


TROUBLE = [
    (429, "HTTP 429"), (500, "HTTP 500"), (503, "HTTP 503"), ("truncated", "broken reply"),
    ("not json", "broken reply"), ("no choices", "broken reply"), ("drop", "connection lost"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "cause"), TROUBLE)
def test_every_trouble_is_survived_and_counted(client: Client, server: FakeServer, what: object, cause: str):
    client.answer(questions(1)).result()
    server.behave = lambda n, body: what if n % 3 == 1 else None
    answers = client.answer(questions(12)).result()
    assert answers is not None
    assert [a.text for a in answers.values()] == [
        f"Let's talk about that. What is the number {i} good for?" for i in range(12)
    ]
    assert set(client.report.retried) == {cause}
    assert client.report.sent == len(server.bodies) == 12 + client.report.retried[cause]
    assert not client.report.unanswered


@pytest.mark.parametrize("client", [1.0], indirect=True)
def test_a_server_that_hangs_is_asked_again(client: Client, server: FakeServer):
    """On a busy machine good replies may be late, too: they are asked for again like those that never come."""
    client.answer(questions(1)).result()
    server.behave = lambda n, body: "hang" if n in (1, 4, 7) else None
    answers = client.answer(questions(12)).result()
    assert answers is not None
    assert all(a.text for a in answers.values())
    assert set(client.report.retried) == {"time-out"}
    assert client.report.sent == 12 + client.report.retried["time-out"] >= 15
    assert not client.report.unanswered


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty answer"),
        ("I'm sorry, but I can't help with that number.", "refusal"),
        ("Talk about [topic]. What is the number good for?", "template bracket left"),
        ("Fuse the two sentences smoothly: what is the number good for?", "instruction echoed"),
    ],
)
def test_unusable_answers_are_asked_for_again_then_left_out(client: Client, server: FakeServer, text: str, fault: str):
    server.behave = lambda n, body: text if "number 3" in body["messages"][0]["content"] or body["seed"] == 0 else None
    answers = client.answer(questions(5)).result()
    assert answers is not None
    assert [a.text is None for a in answers.values()] == [False, False, False, True, False]
    assert client.report.left_out == {fault: 1}
    assert client.report.rejected == {fault: 5 + 2}
    assert len(server.bodies) == 4 * 2 + 3


def test_the_second_time_nothing_is_asked(client: Client, server: FakeServer, cache: ReplyCache):
    server.behave = lambda n, body: 400 if "number 2" in body["messages"][0]["content"] else "no" if n % 2 else None
    first = client.answer(questions(6)).result()
    sent = len(server.bodies)
    again = Client("http://127.0.0.1:9/v1", cache)
    try:
        assert again.answer(questions(6)).result() == first
        assert again.report.sent == 0
        assert again.report.cached == 6
    finally:
        again.close()
    assert len(server.bodies) == sent
    assert first is not None
    assert first[questions(6)[2].key].reason == "HTTP 400"


def test_the_same_question_at_once_is_asked_once(client: Client, server: FakeServer):
    waiting = [client.answer(questions(4)) for _ in range(5)]
    assert len({json.dumps(w.result()) for w in waiting}) == 1
    assert len(server.bodies) == 4


def test_many_requests_are_in_flight_and_no_more_than_asked_for(client: Client, server: FakeServer):
    server.together = 8
    client.answer(questions(60)).result()
    assert server.most_at_once == 8


def test_retry_after_is_kept(client: Client, server: FakeServer):
    server.retry_after = "0.4"
    server.behave = lambda n, body: 429 if n == 0 else None
    start = time.monotonic()
    client.answer(questions(1)).result()
    assert time.monotonic() - start >= 0.4


def test_a_server_that_is_gone_ends_the_run(server: FakeServer, cache: ReplyCache):
    client = Client(server.url, cache, retries=1, backoff=0.001)
    try:
        assert client.answer(questions(2)).result()
        server.behave = lambda n, body: 500
        with pytest.raises(Stopped, match="requests in a row got no reply"):
            client.answer(questions(200)).result()
        assert len(server.bodies) < 100
        assert client.report.unanswered["HTTP 500"] >= GIVE_UP_AFTER
    finally:
        client.close()


def test_a_missing_package_is_told_at_once(cache: ReplyCache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # what Python does where it is not installed
    with pytest.raises(UserError, match=r"needs openai: pip install 'duplex-jax\[llm\]'"):
        Client("http://127.0.0.1:9/v1", cache)


def test_no_server_at_all(cache: ReplyCache):
    client = Client("http://127.0.0.1:9/v1", cache, backoff=0.001)
    try:
        with pytest.raises(UserError, match="cannot be reached"):
            client.answer(questions(1)).result()
    finally:
        client.close()


@pytest.mark.parametrize(("status", "why"), [(401, "OPENAI_API_KEY"), (404, "no such address")])
def test_a_server_that_refuses_us(client: Client, server: FakeServer, status: int, why: str):
    server.behave = lambda n, body: status
    with pytest.raises(UserError, match=why):
        client.answer(questions(3)).result()


@pytest.mark.parametrize(
    "budget", [Budget(tokens=1000), Budget(dollars=0.01, price_in=10.0, price_out=10.0)], ids=["tokens", "dollars"]
)
def test_a_budget_is_never_exceeded_not_even_by_many_at_once(server: FakeServer, tmp_path: Path, budget: Budget):
    cache = ReplyCache(tmp_path / "c.sqlite")
    for _ in range(2):  # a second run has what the first one left, which is nothing
        client = Client(server.url, cache, concurrency=16, budget=budget)
        with pytest.raises(Stopped, match="--budget_"):
            client.answer(questions(100)).result()
        client.close()
        spent = sum(cache.spent())
        assert 200 < spent <= 1000  # what one request may cost at most is held back
        assert spent == 30 * len(server.bodies)
    cache.close()


def test_the_key_is_sent_and_nowhere_else(
    server: FakeServer, cache: ReplyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    client = Client(server.url, cache)
    client.answer(questions(2)).result()
    assert server.keys == {"Bearer sk-very-secret"}
    assert "secret" not in json.dumps(client.report.as_json())
    server.behave = lambda n, body: 401
    with pytest.raises(UserError) as caught:
        client.answer(questions(3)).result()
    assert "secret" not in str(caught.value)
    client.close()
    assert all(b"secret" not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_file_that_is_no_cache(tmp_path: Path):
    (tmp_path / "c").write_text("some text that is no database at all" * 50)
    with pytest.raises(UserError, match="cannot be used as a cache"):
        ReplyCache(tmp_path / "c")


def test_a_cache_of_before_models_were_kept(tmp_path: Path):
    old = sqlite3.connect(tmp_path / "c")
    old.execute(
        "CREATE TABLE replies (key TEXT, attempt INTEGER, text TEXT, finish_reason TEXT, prompt_tokens INTEGER, "
        "completion_tokens INTEGER, PRIMARY KEY (key, attempt)) WITHOUT ROWID"
    )
    old.execute("INSERT INTO replies VALUES ('k', 0, 'yes', 'stop', 3, 4)")
    old.commit()
    old.close()
    for _ in range(2):
        cache = ReplyCache(tmp_path / "c")
        cache.put("k", 1, Reply("no", "stop", 1, 1, "m"))
        assert cache.replies("k") == [Reply("yes", "stop", 3, 4), Reply("no", "stop", 1, 1, "m")]
        cache.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    rows = [{"id": str(i), "data": [t for r in make_dialogue(i).rounds for t in r]} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def make(source: Path, out: Path, tokenizer: Tokenizer, answers: Answers, workers: int = 1) -> Summary:
    recipe = make_recipe(source, parse_shares(["all"], []), tokenizer, "bytes", sampling=SAMPLING, block=8)
    engine = make_engine("local", make_unit, Context(tokenizer, sampling=SAMPLING), workers)
    try:
        return generate(source, out, recipe, engine, answers)
    finally:
        engine.close()


def shards(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*-0*"))}


def test_a_data_set_by_a_model_with_a_server_full_of_trouble(
    server: FakeServer, source: Path, tmp_path: Path, tokenizer: Tokenizer
):
    calm = ReplyCache(tmp_path / "calm.sqlite")
    client = Client(server.url, calm)
    make(source, tmp_path / "calm", tokenizer, client)
    client.close()
    calm.close()
    whole = shards(tmp_path / "calm")
    asked = {json.dumps(b, sort_keys=True) for b in server.bodies}
    assert len(asked) == len(server.bodies) > 50

    trouble = [429, 500, "hang", "truncated", "drop", "not json"]
    server.bodies.clear()
    server.behave = lambda n, body: trouble[n % 6] if n % 5 == 0 else None
    cache = ReplyCache(tmp_path / "stormy.sqlite")
    client = Client(server.url, cache, timeout=1.0, backoff=0.01)
    summary = make(source, tmp_path / "stormy", tokenizer, client, workers=2)
    client.close()
    assert shards(tmp_path / "stormy") == whole  # nothing lost, nothing duplicated
    assert not summary.unfinished
    assert len(client.report.retried) >= 4
    again = Client("http://127.0.0.1:9/v1", cache)
    (tmp_path / "again").mkdir()
    make(source, tmp_path / "again", tokenizer, again)
    again.close()
    cache.close()
    assert again.report.sent == 0
    assert shards(tmp_path / "again") == whole


def test_what_was_never_answered_waits_for_the_next_run(
    server: FakeServer, source: Path, tmp_path: Path, tokenizer: Tokenizer, cache: ReplyCache
):
    server.behave = lambda n, body: 500 if "number 20" in json.dumps(body) else None
    client = Client(server.url, cache, retries=1, backoff=0.01)
    summary = make(source, tmp_path / "o", tokenizer, client)
    client.close()
    assert summary.unfinished
    assert not (tmp_path / "o/dataset.json").exists()
    left = len(shards(tmp_path / "o"))
    server.behave = lambda n, body: None
    before = len(server.bodies)
    client = Client(server.url, cache)
    summary = make(source, tmp_path / "o", tokenizer, client)
    client.close()
    assert not summary.unfinished
    assert len(shards(tmp_path / "o")) > left
    new = [json.dumps(b) for b in server.bodies[before:]]
    assert (
        all("number 20" in b for b in new if "Write the one" not in b and "You speak" not in b) or len(new) < before / 4
    )


def test_batch_files_go_round_until_nothing_is_left(
    server: FakeServer, source: Path, tmp_path: Path, tokenizer: Tokenizer, cache: ReplyCache
):
    live_cache = ReplyCache(tmp_path / "live.sqlite")
    client = Client(server.url, live_cache)
    make(source, tmp_path / "live", tokenizer, client)
    client.close()
    live_cache.close()
    live = len(server.bodies)
    server.bodies.clear()

    out, rounds = tmp_path / "o", 0
    while True:
        writer = BatchWriter(cache)
        summary = make(source, out, tokenizer, writer)
        if not summary.unfinished:
            break
        rounds += 1
        [path] = writer.write(out / "batch")
        assert writer.write(out / "batch") == [path]
        assert len(path.read_text().splitlines()) == len(writer.waiting)
        submit(out / "batch", server.url)
        with pytest.raises(UserError, match="no unsent request file"):
            submit(out / "batch", server.url)
        assert collect(out / "batch", server.url, cache)["completed"] == 1
        assert rounds < 5
    assert rounds == 3  # question, reply, rest: each follows from the one before
    assert shards(out) == shards(tmp_path / "live")
    assert len(server.bodies) == live
    assert not list((out / "batch").glob("*.jsonl"))


def test_broken_batch_replies_are_named(tmp_path: Path, cache: ReplyCache):
    writer = BatchWriter(cache)
    writer.answer(questions(1))
    [path] = writer.write(tmp_path)
    path.with_suffix(".replies").write_text('{"custom_id": "other", "response": {"status_code": 200}}\n')
    with pytest.raises(UserError, match=r"\.replies:1: is not a reply"):
        collect(tmp_path, "http://127.0.0.1:9/v1", cache)


def test_the_command_with_a_server_killed_and_started_again(
    server: FakeServer, source: Path, tmp_path: Path, tokenizer_folder: Path
):
    argv = [
        sys.executable, "-m", "launch.generate", f"--input={source}", f"--out={tmp_path / 'o'}", "--categories=all",
        f"--tokenizer={tokenizer_folder}", "--block=8", "--workers=1", "--rewriter=openai", "--rewriter_model=m",
        f"--base_url={server.url}",
    ]  # fmt: skip
    server.behave = lambda n, body: time.sleep(0.02)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    while len(server.bodies) < 30:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    server.behave = lambda n, body: None
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    keys = [json.dumps(b, sort_keys=True) for b in server.bodies]
    assert len(keys) - len(set(keys)) <= 16  # only what was in flight is asked again
    assert "usable answers" in done.stdout
    before = len(server.bodies)
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert len(server.bodies) == before
    assert "0 requests sent" in done.stdout
    rows = [t for p in (tmp_path / "o").rglob("*.jsonl") for t in read_timelines(p)]
    assert len({t.id for t in rows}) == len(rows) > 60
