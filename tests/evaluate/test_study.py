"""The user study: its plan, its file, and its server's steps."""

import asyncio
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex_jax.errors import UserError
from duplex_jax.evaluate.study.plan import SYSTEMS, Step, check_scores, next_step, plan_of, read_texts
from duplex_jax.evaluate.study.store import Conversation, Scores, Store, UnknownCode, read
from duplex_jax.evaluate.study.talk import Talk
from duplex_jax.serve import events
from duplex_jax.serve.sessions import Limits
from tests.evaluate.studies import SETUP, TEXTS, Participant, all_of, said, studying, until
from tests.serve.serving import run

# The plan.


@given(st.integers(0, 300))
def test_order_and_labels_are_counterbalanced_whenever_the_study_ends(participants: int):
    plans = [plan_of(n + 1) for n in range(participants)]
    for of in (lambda p: p.order[0], lambda p: p.labels["a"]):
        counts = Counter(map(of, plans))
        assert abs(2 * max(counts.values(), default=0) - participants) <= 1
    both = Counter((p.order[0], p.labels["a"]) for p in plans[: participants // 4 * 4])
    assert set(both.values()) <= {participants // 4}
    assert len(both) == (4 if participants >= 4 else 0)


@given(st.integers(1, 8), st.integers(1, 6))
def test_every_step_comes_once_and_in_order(number: int, sessions: int):
    plan, talked, scored, steps = plan_of(number), dict.fromkeys(SYSTEMS, 0), set(), []
    while (step := next_step(plan, sessions, talked, scored, False)).kind != "review":
        steps.append(step)
        if step.kind == "talk":
            talked[step.system] += 1
        else:
            scored.add(step.system)
    first, second = plan.order
    assert steps == [
        *(Step("talk", first, i + 1) for i in range(sessions)), Step("score", first),
        *(Step("talk", second, i + 1) for i in range(sessions)), Step("score", second),
    ]  # fmt: skip
    assert next_step(plan, sessions, talked, scored, True) == Step("done")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overall": 0}, "overall needs a whole number of 1 to 7"),
        ({"overall": 8}, "overall needs a whole number"),
        ({"overall": 3.5}, "overall needs a whole number"),
        ({"overall": True}, "overall needs a whole number"),
        ({"overall": None}, "overall needs a whole number"),
        ({"speed": 3}, "'speed' is no aspect"),
    ],
)
def test_scores_out_of_range_are_refused(change: dict[str, Any], message: str):
    assert check_scores(all_of(7)) == all_of(7)
    with pytest.raises(UserError, match=message):
        check_scores(all_of(4) | change)


def test_texts(tmp_path: Path):
    own = read_texts(5)
    assert len(own.openings) == 5
    assert "Withdraw" in own.consent
    few = tmp_path / "few.txt"
    few.write_text("One.\n\nTwo.\n")
    assert read_texts(2, openings=str(few)).openings == ("One.", "Two.")
    with pytest.raises(UserError, match=r"2 sentences for --sessions=3"):
        read_texts(3, openings=str(few))
    with pytest.raises(UserError, match=r"--note=.*none\.txt: cannot be read"):
        read_texts(1, note=str(tmp_path / "none.txt"))


# The file.


def test_files_of_something_else_are_refused(tmp_path: Path):
    words = tmp_path / "words.db"
    words.write_text("no database at all, but long enough to look at " * 50)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE replies (key TEXT)")
    later = tmp_path / "later.db"
    Store(later).close()
    with sqlite3.connect(later) as db:
        db.execute("PRAGMA user_version = 99")
    for path, message in ((words, "not a database"), (other, "of no study"), (later, "another version")):
        before = path.read_bytes()
        for opened in (Store, read):
            with pytest.raises(UserError, match=message):
                opened(path)
        assert path.read_bytes() == before
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.db")


def test_another_setup_is_refused_once_somebody_takes_part(tmp_path: Path):
    store = Store(tmp_path / "study.db")
    store.agree(SETUP | {"model_a": "a mistake"})
    store.agree(SETUP)
    store.admit()
    store.agree(SETUP)
    with pytest.raises(UserError, match='participants with mode_b="turn_based", and now it is "duplex"'):
        store.agree(SETUP | {"mode_b": "duplex"})
    store.close()


KILLED = """
import os, signal, sys
from duplex_jax.evaluate.study.plan import ASPECTS
from duplex_jax.evaluate.study.store import Conversation, Scores, Store
from duplex_jax.timeline import SlicePair, Timeline
store = Store(sys.argv[1])
number, code = store.admit()
store.add(number, 1, Conversation("a", 1, True, Timeline([SlicePair("Hello there.", " Hi.")])))
store.score(number, 1, "a", Scores(dict.fromkeys(ASPECTS, 6), "good"))
print(code, flush=True)
with store._change() as db:
    db.execute("DELETE FROM scores")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_server_loses_nothing_that_it_acknowledged(tmp_path: Path):
    path = tmp_path / "study.db"
    command = [sys.executable, "-c", KILLED, str(path)]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert found.returncode == -9, found.stderr
    store = Store(path)
    number = store.number(found.stdout.strip())
    assert store.step(number, 1) == Step("talk", "b", 1)
    assert store.scores(number) == {"a": Scores(all_of(6), "good")}
    store.close()


def test_withdrawal_leaves_nothing_but_a_count(tmp_path: Path):
    path = tmp_path / "study.db"
    store = Store(path)
    store.agree(SETUP)
    codes = [store.admit()[1] for _ in range(2)]
    for n in (1, 2):
        system = plan_of(n).order[0]
        store.add(n, 1, Conversation(system, 1, True, said((f"unmistakable words of {n}", " Hi."))))
        store.score(n, 1, system, Scores(all_of(6), f"unmistakable comment of {n}"))
    store.withdraw(1)
    for again in (lambda: store.number(codes[0]), lambda: store.step(1, 1), lambda: store.withdraw(1)):
        with pytest.raises(UnknownCode):
            again()
    everything = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert b"unmistakable words of 2" in everything
    assert b"of 1" not in everything
    assert store.admit()[0] == 3  # numbers are not given twice
    store.close()
    kept = read(path)
    assert ([p.number for p in kept.participants], kept.withdrawn) == ([2, 3], 1)


def test_codes_are_kept_as_hashes_and_may_be_typed_badly(tmp_path: Path):
    store = Store(tmp_path / "study.db")
    number, code = store.admit()
    assert store.number(f" {code.upper().replace('-', ' ')} ") == number
    with pytest.raises(UnknownCode):
        store.number(code[:-1])
    everything = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert code.replace("-", "").encode() not in everything
    assert code.encode() not in everything
    store.close()


# The server.


def test_from_consent_to_confirmed_scores(tmp_path: Path):
    """Every step in its order; whatever comes out of order is refused with one line."""

    async def refused(p: Participant, status: int, message: str, path: str, **body: Any) -> None:
        state = dict(p.state)
        found, answer = await p.ask("POST", path, json=body)
        assert (found, message in answer["error"]) == (status, True), answer
        if p.code:
            assert await p.ask("GET", "state") == (200, state)

    async def refused_page(p: Participant, message: str, *sent: dict[str, Any]) -> None:
        async with p.page() as ws:
            for each in sent:
                await ws.send_json(each)
            assert message in (await p.next(ws, "error"))["message"]

    async def test() -> None:
        async with studying(tmp_path / "study.db") as place, Participant.of(place) as p:
            await refused(p, 409, "without consent", "begin")
            await refused(p, 409, "without consent", "begin", consent=False)
            await refused(p, 404, "no participant has this code", "confirm")
            assert not read(tmp_path / "study.db").participants
            await p.begin()
            start = {"type": "start", "code": p.code}
            assert (p.state["step"], p.state["model"], p.state["session"]) == ("talk", "A", 1)
            assert p.state["opening"] == TEXTS.openings[0]
            await refused(p, 409, "cannot be scored yet", "scores", model="A", scores=all_of(4))
            await refused(p, 409, "nothing to confirm", "confirm")
            await refused_page(p, "no participant has this code", {"type": "start", "code": "wrong"})
            await refused_page(p, "before the conversation", {"type": "end"})
            await refused_page(p, "of your own", start, {"type": "end"})
            for label in p.state["order"]:
                for session in (1, 2):
                    assert (p.state["step"], p.state["model"], p.state["session"]) == ("talk", label, session)
                    assert p.state["opening"] == TEXTS.openings[session - 1]
                    # A, which speaks all the time, may be in the middle of a slice when the words come.
                    await p.talk(answers={"A": 2, "B": 1}[label])
                assert (p.state["step"], p.state["model"]) == ("score", label)
                await refused_page(p, "no conversation to begin now", start)
                await refused(p, 409, "nothing to confirm", "confirm")
                await refused(p, 400, "1 to 7", "scores", model=label, scores=all_of(8))
                await refused(p, 400, "neither of A, B", "scores", model="C", scores=all_of(4))
                assert await p.score(label, 3, " dull ") == 200
            assert p.state["step"] == "review"
            assert await p.score("A", 6) == 200  # a change of mind
            assert (await p.ask("POST", "confirm", json={}))[0] == 200
            assert p.state["step"] == "done"
            await refused(p, 409, "confirmed", "scores", model="A", scores=all_of(1))
        [kept] = read(tmp_path / "study.db").participants
        assert kept.confirmed
        assert kept.scores == {"a": Scores(all_of(6)), "b": Scores(all_of(3), "dull")}
        talks = [(c.system, c.session) for c in kept.conversations if c.finished]
        assert talks == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
        for c in kept.conversations:
            users = [pair.user for pair in c.timeline.pairs if pair.user]
            opening = TEXTS.openings[c.session - 1]
            assert " ".join(users) == (f"{opening} And now?" if c.finished else opening)
            ticks, firsts, ends = (c.timeline.meta[name] for name in ("tick", "first", "end"))
            assert ticks == sorted(ticks)
            for pair, tick, first, end in zip(c.timeline.pairs, ticks, firsts, ends, strict=True):
                assert (first is None) == (pair.assistant is None)
                assert tick <= end + 0.002  # both are rounded
                assert first is None or tick - 0.002 <= first <= end

    run(test)


def test_nothing_tells_a_participant_which_model_is_which(tmp_path: Path):
    """Two participants to whom A is another system each are told the same, but for the models' words."""
    plans = plan_of(1), plan_of(2)
    assert [p.labels[p.order[0]] for p in plans] == ["A", "A"]
    assert plans[0].order != plans[1].order

    async def test() -> None:
        told: list[Any] = []
        async with studying(tmp_path / "study.db") as place:
            for _ in plans:
                async with Participant.of(place) as p:
                    await p.begin()
                    states = []
                    for label in p.state["order"]:
                        for _ in range(2):
                            states.append(p.state)
                            await p.talk()
                        await p.score(label, 4)
                    forms = {label: {(m["type"], *sorted(m)) for m in of} for label, of in p.messages.items()}
                    told.append((states, forms))
        assert told[0] == told[1]
        assert told[0][1]["A"] == told[0][1]["B"]
        assert {kind for kind, *_ in told[0][1]["A"]} == {"started", "words", "ended"}

    run(test)


def test_a_participant_goes_on_where_they_were(tmp_path: Path):
    """A page that comes back soon finds its conversation; later, or at another server, the session begins anew."""
    path = tmp_path / "study.db"

    async def test() -> None:
        async with studying(path) as place, Participant.of(place) as p:
            await p.begin()
            code, start = p.code, {"type": "start", "code": p.code}
            await p.talk()
            async with p.page() as ws:
                await ws.send_json(start)
                await p.next(ws, "words")
                await ws.send_json({"type": "text", "text": "Wait for me."})
                await p.next(ws, "words")
            async with p.page() as ws:
                await ws.send_json(start)
                log = (await p.next(ws, "started"))["log"]
                assert [text for who, text in log if who == "you"] == [TEXTS.openings[1], "Wait for me."]
                async with p.page() as other:  # a second window takes over
                    await other.send_json(start)
                    await p.next(other, "started")
                    await p.next(ws, "moved")
        # The server has gone in the middle of it.
        async with studying(path, grace=0.0) as place, Participant.of(place, code) as p:
            await p.ask("GET", "state")
            assert (p.state["step"], p.state["session"], p.state["live"]) == ("talk", 2, False)
            async with p.page() as ws:
                await ws.send_json(start)
                assert (await p.next(ws, "started"))["log"] == [["you", TEXTS.openings[1]]]
                await p.next(ws, "words")

            async def broken_off() -> bool:
                await p.ask("GET", "state")
                return not p.state["live"]

            await until(broken_off)
            await p.talk()
            assert p.state["step"] == "score"
        [kept] = read(path).participants
        assert [(c.session, c.finished) for c in kept.conversations] == [(1, True), (2, False), (2, False), (2, True)]

    run(test)


def test_a_conversation_that_reaches_its_limit_counts(tmp_path: Path):
    async def test() -> None:
        limits = Limits(per_client=1, session_seconds=0.01)
        async with studying(tmp_path / "study.db", limits=limits) as place, Participant.of(place) as p:
            await p.begin()
            async with p.page() as ws:
                await ws.send_json({"type": "start", "code": p.code})
                await p.next(ws, "over")
                await ws.send_json({"type": "text", "text": "Too late."})
                assert "is over" in (await p.next(ws, "error"))["message"]
                await ws.send_json({"type": "end"})
                await p.next(ws, "ended")
            await p.ask("GET", "state")
            assert (p.state["step"], p.state["session"]) == ("talk", 2)

    run(test)


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came():
    talk = Talk(1, Step("talk", "b", 1), "Hello there.", 2.0)
    talk.take(events.Spoken(0, "Hello there.", None, 0.0, 0.0))
    for text in ("Good", " mor"):
        talk.take(events.Delta(text, False))
    kept = talk.kept(finished=True)
    assert kept is not None
    assert kept.timeline.pairs == [("Hello there.", None), (None, "Good mor")]
    first, (tick, end) = kept.timeline.meta["first"], (kept.timeline.meta[name][1] for name in ("tick", "end"))
    assert first[0] is None
    assert tick <= first[1] <= end
    assert talk.log == [["model", "Good mor"]]


def test_withdrawal_in_the_middle_of_a_conversation(tmp_path: Path):
    path = tmp_path / "study.db"

    async def test() -> None:
        async with studying(path) as place, Participant.of(place) as p:
            await p.begin()
            await p.talk("unmistakable words")
            async with p.page() as ws:
                await ws.send_json({"type": "start", "code": p.code})
                await p.next(ws, "words")
                await ws.send_json({"type": "text", "text": "unmistakable words"})
                assert await p.ask("POST", "withdraw", json={}) == (200, {"withdrawn": True})
                while not ws.closed:
                    await asyncio.wait_for(ws.receive(), 20)
            assert (await p.ask("GET", "state"))[0] == 404
            assert b"unmistakable" not in b"".join(f.read_bytes() for f in tmp_path.iterdir())
        kept = read(path)
        assert (kept.participants, kept.withdrawn) == ((), 1)

    run(test)


def test_a_study_with_a_key_lets_nobody_in_without(tmp_path: Path):
    async def test() -> None:
        async with studying(tmp_path / "study.db", keys=("secret",)) as place, Participant.of(place) as p:
            assert (await p.ask("POST", "begin", json={"consent": True}))[0] == 401
            body = {"json": {"consent": True}, "headers": {"Authorization": "Bearer secret"}}
            assert (await p.ask("POST", "begin", **body))[0] == 200
            elsewhere = {"headers": {"Authorization": "Bearer secret", "Origin": "http://elsewhere"}}
            assert (await p.ask("POST", "begin", json={"consent": True}, **elsewhere))[0] == 403

    run(test)


def test_nobody_fills_the_study_s_file(tmp_path: Path):
    async def test() -> None:
        path = tmp_path / "study.db"
        async with studying(path, per_hour=5) as place, Participant.of(place) as p:
            answers = [await p.ask("POST", "begin", json={"consent": True}) for _ in range(40)]
            assert [status for status, _ in answers] == [200] * 5 + [429] * 35
            assert "5 participants came from here" in answers[-1][1]["error"]
            p.code = answers[0][1]["code"]
            assert (await p.ask("GET", "state"))[0] == 200  # who takes part goes on
        assert len(read(path).participants) == 5

    run(test)


def test_a_study_is_reached_under_its_own_name_alone(tmp_path: Path):
    async def test() -> None:
        async with studying(tmp_path / "study.db") as place, Participant.of(place) as p:
            for headers in ({"Host": "evil.example", "Origin": "http://evil.example"}, {"Origin": "http://[x"}):
                status, answer = await p.ask("POST", "begin", json={"consent": True}, headers=headers)
                assert (status, list(answer)) == (403, ["error"])
            async with p.session.get(f"http://{place}/") as page:
                assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
                assert page.headers["X-Content-Type-Options"] == "nosniff"

    run(test)
