"""MT-Bench and MT-Eval: questions, answers that survive a kill, prompts, verdicts over HTTP, scores."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duplex_jax.checkpoint.registry import save_model
from duplex_jax.errors import UserError
from duplex_jax.evaluate.judge import judging, rules, scores
from duplex_jax.evaluate.judge.judging import JudgeModel
from duplex_jax.evaluate.judge.prompts import ask_about, ask_which, count_sentences, read_prompts
from duplex_jax.evaluate.judge.systems import read_beside
from duplex_jax.evaluate.judge.tasks import RULED, TABLE_5, TASKS, Questions, read_questions
from duplex_jax.llm.cache import ReplyCache
from duplex_jax.llm.client import Client
from tests.data_gen.fake_server import FakeServer
from tests.launch.test_evaluate_behaviour import run
from tests.tiny import tiny_model

ARTICLE = "A cook looks for a berry.\n\nShe finds it."
SINGLE = "[Question]\n{question}\n\n[Answer]\n{answer}\n"
MULTI = "1 {question_1}\n{answer_1}\n2 {question_2}\n{answer_2}"
PAIR = "[Q]\n{question}\n[A]\n{answer_a}\n[B]\n{answer_b}"
PAIR_MULTI = "{question_1}|{question_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}"
REFERENCE, REFERENCES = "Right: {ref_answer_1}\n", "Right: {ref_answer_1}, {ref_answer_2}\n"
EVAL = {
    "refinement_multi_evaluation": '{content}#{response}#{num_words}#{num_sent}#{constraints}\n{\n  "Score": <n>\n}',
    "expansion_evaluation": "{content}#{constraints}#{response}",
    "mt-bench_evaluation": "{conversation}#{num_words}#{num_sent}",
}


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def turn(user: str, sys: str = "", asked: bool = True, **more: str) -> dict[str, Any]:
    return {"user": user, "sys": sys, "do_inference": asked, "id": "x"} | more


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All files, made up: six questions of MT-Bench, and a conversation or two of each task of MT-Eval."""
    folder = tmp_path / "data"
    folder.mkdir()
    categories = ("writing", "math", "coding", "writing", "stem", "reasoning")
    write(folder / "mt_bench_questions.jsonl", *(
        {"question_id": 81 + i, "category": c, "turns": [f"What is {i}? Tell me now, in a few words.", f"Why {i}?"]}
        for i, c in enumerate(categories)
    ))  # fmt: skip
    write(folder / "mt_bench_reference_gpt4.jsonl", *(
        {"question_id": 81 + i, "choices": [{"index": 0, "turns": [f"It is {i}.", f"Because of {i}."]}]}
        for i in (1, 2, 5)
    ))  # fmt: skip
    prompts = {
        "single-v1": SINGLE, "single-v1-multi-turn": MULTI, "single-math-v1": REFERENCE + SINGLE,
        "single-math-v1-multi-turn": REFERENCES + MULTI, "pair-v2": PAIR, "pair-v2-multi-turn": PAIR_MULTI,
        "pair-math-v1": REFERENCE + PAIR, "pair-math-v1-multi-turn": REFERENCES + PAIR_MULTI,
    }  # fmt: skip
    write(folder / "mt_bench_judge_prompts.jsonl", *(
        {"name": name, "system_prompt": f"You are {name}.", "prompt_template": text} for name, text in prompts.items()
    ))  # fmt: skip
    (folder / "mt_eval_judge_prompts.json").write_text(json.dumps({"prompts": EVAL}))
    about = [
        turn(f"Content: {ARTICLE}\n\nInstruction: Sum it up.", id="1_sum_1", inst="Sum it up."),
        turn("Be brief.", id="1_sum_2", inst="Be brief."),
        turn("List all names.", id="1_ner_1", inst="List all names."),
    ]
    write(folder / "mt_eval_refinement_multi.jsonl", {"id": "1_sum_ner", "conv": about})
    write(folder / "mt_eval_expansion_multi.jsonl", {"id": "1", "conv": about[::2]})
    fixed = [turn("Draft a mail to my dear boss, please.", "Dear boss, I am well.", asked=False),
             turn("Say more. ", " I really am. ", asked=False)]  # fmt: skip
    write(folder / "mt_eval_follow-up_multi.jsonl", *(
        {"id": str(i), "conv": [*fixed, turn(f"And {i}?", f"So {i}."), turn("Bye?")]} for i in range(2)
    ))  # fmt: skip
    write(folder / "mt_eval_recollection_multi_cls.jsonl",
          {"id": "1", "conv": [turn("Name the kind.", "OK", asked=False), turn("Ball", "sports")]})  # fmt: skip
    write(folder / "mt_eval_recollection_multi_global-inst.jsonl",
          {"id": "2", "inst_name": "punctuation:no_comma", "inst_args": {"letter": None},
           "conv": [turn("No commas.", "ok.", asked=False), turn("Hi?"), turn("Ha?")]})  # fmt: skip
    return folder


@pytest.fixture
def client(server: FakeServer, tmp_path: Path) -> Iterator[Client]:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    client = Client(server.url, cache, backoff=0.01, timeout=2, flag="--judge_url")
    yield client
    client.close()
    cache.close()


def test_sentences():
    counts = {
        "": 0, "One": 1, "One. Two.": 2, "Dr. Who asks J. Smith. He nods!": 2, 'He said "No." Then left?': 2,
        "It costs 3.50 now. Really?! Yes.": 3, "1. First\n2. Second": 1, "一。二！": 2, "No stop\nhere": 1,
    }  # fmt: skip
    assert {text: count_sentences(text) for text in counts} == counts


def test_rules():
    held = {
        "startend:start_char": ({"letter": "r"}, " Roses", "a rose"),
        "startend:start_emoji": ({}, "🙂 hi", "hi"),
        "startend:end_phrase": ({"end_phrase": "Any more?"}, "So. any more?'", "Any more? No"),
        "format:json_format": ({}, '```json\n{"a": 1}\n```', "a: 1"),
        "format:bullet_list": ({"num_bullets": 2}, "* a\n - b", "* a\n** b"),
        "length_constraints:number_sentences": (
            {"num_sentences": 3, "relation": "less than"},
            "So it. Is.",
            "One. Two. Three.",
        ),
        "keywords:existence": ({"keywords": ["city", "hat"]}, "City HAT", "city"),
        "change_case:capital_letter": ({}, "YES, 1", "Yes"),
        "change_case:lowercase": ({}, "yes, 1", "Yes"),
        "punctuation:no_comma": ({}, "a b", "a, b"),
        "combination:two_responses": ({}, "a\n******\nb", "a ****** a"),
        "content:placeholder": ({"num_placeholder": 2}, "[a] [b]", "[a]"),
        "format:constrained_response": ({"response_options": ["My answer is no."]}, "My answer is no. So", "no"),
    }
    for name, (arguments, right, wrong) in held.items():
        assert rules.keeps(right, name, arguments) is True, name
        assert rules.keeps(wrong, name, arguments) is False, name
    assert rules.keeps("да", "language:response_language", {"lang": "Bulgarian"}) is None
    assert not rules.keeps("******a******", "combination:two_responses", {})
    assert not rules.keeps("", "startend:start_emoji", {})
    with pytest.raises(UserError, match="rule 'x:y' is unknown"):
        rules.keeps("", "x:y", {})
    with pytest.raises(UserError, match=r"has arguments \{'n': 1\}"):
        rules.keeps("", "punctuation:no_comma", {"n": 1})
    assert rules.names_label("It is 'Sports'.", "sports")
    assert not rules.names_label("sport", "sports")


# What judges are asked.


def test_questions(data: Path):
    bench = read_questions("mt_bench", data)
    assert [bool(q.references) for q in bench.items] == [False, True, True, False, False, True]
    assert bench.items[1].references == ("It is 1.", "Because of 1.")
    assert set(bench.chosen(2)) < set(bench.chosen(4))
    follow = read_questions("mt_eval_follow_up", data).items[0]
    assert follow.asked == [2, 3]
    assert read_questions("mt_eval_refinement", data).items[0].content == ARTICLE
    assert read_questions("mt_eval_recollection_inst", data).items[0].rule == ("punctuation:no_comma", {})


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("mt_bench", {"question_id": 1, "category": "stem", "turns": ["one"]}, "1 turns; each question has two"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": ["a", "b"]}, "has no answer to question 1"),
        ("mt_bench", [1], "is no line of mt_bench_questions.jsonl"),
        ("mt_eval_expansion", {"id": "1", "conv": [turn("Content: x", inst="y")]}, "is no line of"),
        ("mt_eval_expansion", {"id": "1", "conv": [turn("C", id="1_s_1", inst="y")]}, "first turn is not 'Content"),
        ("mt_eval_follow_up", {"id": "1", "conv": [turn("x", "", asked=False)]}, "'' is no text"),
        ("mt_eval_follow_up", {"id": "1", "conv": [turn("x", "y", asked=False)]}, "no turn with do_inference"),
        ("mt_eval_follow_up", {"id": "1"}, "field 'conv' is missing"),
    ],
)
def test_lines_that_are_no_questions(task: str, row: Any, message: str, data: Path):
    write(data / TASKS[task].file, row)
    with pytest.raises(UserError, match=message):
        read_questions(task, data)


def test_prompts_made_up(data: Path):
    """Which prompt, which fields; words in braces in an answer stay what they are."""
    prompts = read_prompts(data, TASKS)
    bench = read_questions("mt_bench", data).items
    said = ["{answer} {question}", "two"]
    assert ask_about(prompts, "mt_bench", bench[0], said, 0).messages == (
        ("system", "You are single-v1."),
        ("user", f"[Question]\n{bench[0].turns[0].user}\n\n[Answer]\n{{answer}} {{question}}\n"),
    )
    math = ask_about(prompts, "mt_bench", bench[1], said, 1)
    assert math.name == "single-math-v1-multi-turn"
    assert math.messages[1][1] == (
        f"Right: It is 1., Because of 1.\n1 {bench[1].turns[0].user}\n{{answer}} {{question}}\n2 Why 1?\ntwo"
    )
    assert ask_which(prompts, bench[0], ["a", "b"], ["c", "d"], 1).messages[1][1] == (
        f"{bench[0].turns[0].user}|Why 0?|a|b|c|d"
    )
    refined = read_questions("mt_eval_refinement", data).items[0]
    assert [ask_about(prompts, "mt_eval_refinement", refined, ["It. Is so."] * 3, i).messages for i in (1, 2)] == [
        (("user", f'{ARTICLE}#It. Is so.#3#2#1. Sum it up.\n2. Be brief.\n{{\n  "Score": <n>\n}}'),),
        (("user", f'{ARTICLE}#It. Is so.#3#2#1. List all names.\n{{\n  "Score": <n>\n}}'),),
    ]
    expanded = read_questions("mt_eval_expansion", data).items[0]
    assert ask_about(prompts, "mt_eval_expansion", expanded, ["", " x "], 1).messages == (
        ("user", f"{ARTICLE}#List all names.#x"),
    )  # fmt: skip
    follow = read_questions("mt_eval_follow_up", data).items[1]
    assert [
        ask_about(prompts, "mt_eval_follow_up", follow, ["", "", "mine", "last one"], i).messages for i in (2, 3)
    ] == [
        (("user", "User: Say more.\nAssistant: I really am.\nUser: And 1?\nAssistant: mine#1#1"),),
        (("user", "User: And 1?\nAssistant: So 1.\nUser: Bye?\nAssistant: last one#2#1"),),
    ]
    write(data / "mt_bench_judge_prompts.jsonl", {"name": "single-v1", "system_prompt": "", "prompt_template": "{x}"})
    with pytest.raises(UserError, match="has the fields x, and here it is answer, question"):
        ask_about(read_prompts(data, ["mt_bench"]), "mt_bench", bench[0], said, 0)
    with pytest.raises(UserError, match="have no 'single-math-v1'"):
        ask_about(read_prompts(data, ["mt_bench"]), "mt_bench", bench[1], said, 0)


def test_prompts_of_the_published_files(shared: Path):
    """Byte for byte what the files make when filled in by hand."""
    folder = shared / "data" / "benchmarks"
    prompts = read_prompts(folder, TASKS)
    rows = map(json.loads, (folder / "mt_bench_judge_prompts.jsonl").read_text().splitlines())
    bench = {row["name"]: row for row in rows}
    lines = (folder / "mt_bench_questions.jsonl").read_text().splitlines()
    references = (folder / "mt_bench_reference_gpt4.jsonl").read_text().splitlines()
    right = {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, references)}
    items = read_questions("mt_bench", folder).items
    assert len(items) == len(lines)
    for item, row in zip(items, map(json.loads, lines), strict=True):
        one, two = row["turns"]
        math = "-math" if row["category"] in ("math", "reasoning", "coding") else ""
        given = {f"ref_answer_{i + 1}": text for i, text in enumerate(right[row["question_id"]])} if math else {}
        expected = {
            0: (f"single{math}-v1", {"question": one, "answer": "A {b}\n"}),
            1: (f"single{math}-v1-multi-turn",
                {"question_1": one, "question_2": two, "answer_1": "A {b}\n", "answer_2": "é"}),
        }  # fmt: skip
        for place, (name, fields) in expected.items():
            filled = ask_about(prompts, "mt_bench", item, ["A {b}\n", "é"], place)
            text = bench[name]["prompt_template"].format(**fields, **given)
            assert filled.messages == (("system", bench[name]["system_prompt"]), ("user", text))
    for task in (*TABLE_5, *RULED):
        for item in read_questions(task, folder).items:
            for place in item.asked:
                answers = ["x, y"] * len(item.turns)
                if task in RULED:
                    assert item.rule is None or rules.keeps("x, y", *item.rule) in (True, False, None)
                else:
                    text = ask_about(prompts, task, item, answers, place).messages[0][1]
                    assert "x, y" in text
                    assert not any(f"{{{name}}}" in text for name in ("content", "conversation", "num_sent"))


# Verdicts.


def answered(questions: Questions, text: str = "Well.") -> dict[int, list[str]]:
    return {
        n: [text if i in q.asked else t.given for i, t in enumerate(q.turns)] for n, q in enumerate(questions.items)
    }


def test_judged_over_http(data: Path, server: FakeServer, client: Client):
    """Unreadable replies are asked for again, then counted; the cache answers the second time."""
    questions, prompts = read_questions("mt_bench", data), read_prompts(data, TASKS)

    def behave(number: int, body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        if "Why 3?" in text:
            return "I cannot say."
        if "Why 4?" in text and "seed" not in body:
            return "Rating: none"
        return "Fine. Rating: [[4]]" if "Why" in text else "Fine. Rating: [[9]]"

    server.behave = behave
    seen: list[int] = []
    judge = ("mt_bench", questions, answered(questions), prompts, JudgeModel("gpt-4"), client)
    verdicts = judging.judge_answers(*judge, seen.append)
    assert len(verdicts) == sum(seen) == 12
    assert [v.score for v in verdicts if v.turn == 1] == [9] * 6
    assert [v.score for v in verdicts if v.turn == 2] == [4, 4, 4, None, 4, 4]
    assert [v.reason for v in verdicts if v.score is None] == ["no rating in the reply"]
    assert {v.version for v in verdicts if v.score} == {"m"}
    assert len(server.bodies) == 12 + 2 + 1
    assert {body["temperature"] for body in server.bodies} == {0}
    assert sum("seed" in body for body in server.bodies) == 3
    sent = next(b for b in server.bodies if "Why 0?" in b["messages"][-1]["content"])
    filled = ask_about(prompts, "mt_bench", questions.items[0], ["Well."] * 2, 1)
    assert sent["messages"] == [{"role": role, "content": text} for role, text in filled.messages]
    assert judging.judge_answers(*judge, seen.append) == verdicts
    assert len(server.bodies) == 15


def test_more_fields_reach_the_server(data: Path, server: FakeServer, client: Client, tmp_path: Path):
    """They are sent with questions of their kind alone, and what was replied without them does not stand for it."""
    path = tmp_path / "fields.json"
    path.write_text('{"json": {"grammar": "root ::= \\"a\\""}}')
    judge = JudgeModel("j", judging.read_fields(path))
    prompts = read_prompts(data, TASKS)
    for model in (JudgeModel("j"), judge):
        for task, fields in (("mt_bench", {}), ("mt_eval_expansion", model.fields.get("json", {}))):
            server.bodies.clear()
            questions = read_questions(task, data)
            server.behave = lambda n, body, t=task: "[[5]]" if t == "mt_bench" else '{"Score": 5}'
            verdicts = judging.judge_answers(
                task, questions, answered(questions), prompts, model, client, lambda n: None
            )
            assert {v.score for v in verdicts} == {5}
            assert bool(server.bodies) == (model is not judge or bool(fields))
            assert [body.get("grammar") for body in server.bodies] == [fields.get("grammar")] * len(server.bodies)
    assert judge.identity("x") != JudgeModel("j").identity("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object by kind (rating, json, pair)"),
        ('{"ratings": {}}', "'ratings' must be one of rating, json, pair"),
        ('{"json": 1}', "'json' must be one of rating, json, pair, and have an object of fields"),
        ('{"pair": {"seed": 1, "model": "x"}}', "model, seed of 'pair' cannot be set here"),
    ],
)
def test_fields_that_are_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "fields.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        judging.read_fields(tmp_path / "fields.json")


def test_pairs_in_both_orders(data: Path, server: FakeServer, client: Client):
    """A judge that always likes the first one gives nobody a win."""
    questions, prompts = read_questions("mt_bench", data), read_prompts(data, TASKS)
    ours, theirs = answered(questions, "Ours."), answered(questions, "Theirs.")
    said = {0: "A", 1: "B", 2: "C", 4: "?", 5: "mixed"}

    def behave(number: int, body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        n = next(i for i in range(6) if f"is {i}?" in text)
        first = text.index("Ours.") < text.index("Theirs.")
        if said.get(n) == "mixed":
            return "[[C]]" if first else "[[A]]"
        if n == 3 or said[n] == "C":
            return "[[A]]" if n == 3 else "[[C]]"
        return f"[[{said[n]}]]" if first else f"[[{ {'A': 'B', 'B': 'A'}.get(said[n], '?') }]]"

    server.behave = behave
    outcomes = judging.judge_pairs(questions, ours, theirs, prompts, JudgeModel("j"), client, lambda n: None)
    assert outcomes == [
        (n, t, o) for n, o in enumerate(["won", "lost", "tie", "disagree", "unjudged", "disagree"]) for t in (1, 2)
    ]  # fmt: skip
    found = scores.wins(outcomes)
    assert [found[k] for k in ("won", "lost", "tie", "disagree", "unjudged")] == [2, 2, 2, 4, 2]
    assert found["share"]["value"] == pytest.approx((2 + 6 * 0.5) / 10)
    mirrored = judging.judge_pairs(questions, theirs, ours, prompts, JudgeModel("j"), client, lambda n: None)
    swap = {"won": "lost", "lost": "won"}
    assert mirrored == [(n, t, swap.get(o, o)) for n, t, o in outcomes]


def test_no_reply_and_no_server(data: Path, server: FakeServer, tmp_path: Path):
    questions, prompts = read_questions("mt_bench", data), read_prompts(data, TASKS)
    cache = ReplyCache(tmp_path / "c.sqlite")
    judge = ("mt_bench", questions, answered(questions), prompts, JudgeModel("gpt-4"))
    flaky = Client(server.url, cache, backoff=0.001, retries=1, timeout=2)
    server.behave = lambda n, body: 500 if "Why 3?" in body["messages"][-1]["content"] else "[[5]]"
    with pytest.raises(judging.NoReply, match="1 of 12 questions to the judge got no reply"):
        judging.judge_answers(*judge, flaky, lambda n: None)
    flaky.close()
    gone = Client("http://127.0.0.1:9/v1", cache, backoff=0.001, flag="--judge_url")
    with pytest.raises(UserError, match=r"--judge_url=http://127\.0\.0\.1:9/v1: cannot be reached"):
        judging.judge_answers(*judge, gone, lambda n: None)
    gone.close()
    cache.close()


def test_verdicts_are_kept_and_another_judge_is_refused(data: Path, tmp_path: Path):
    questions = {"mt_eval_recollection_cls": read_questions("mt_eval_recollection_cls", data)}
    (of,) = questions.values()
    verdicts = judging.judge_by_rule(of, answered(of, "Sports!"))
    assert [v.score for v in verdicts] == [10]
    assert [v.score for v in judging.judge_by_rule(of, answered(of, "art"))] == [0]
    path = judging.verdicts_path(tmp_path, "mt_eval_recollection_cls", "duplex")
    judging.write_verdicts(path, verdicts, {"judge": "rules"})
    assert judging.read_verdicts(path, {"judge": "rules"}) == verdicts
    with pytest.raises(UserError, match="judge both alike"):
        judging.read_verdicts(path, {"judge": "gpt-4"})
    (tmp_path / "settings.json").write_text('{"model": "m"}')
    with pytest.raises(UserError, match="holds no results of mt_eval_recollection_cls"):
        read_beside(tmp_path, questions, 0, {})


# The program.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=m"], "needs --model=M, --data=FOLDER and --out=FOLDER"),
        (
            ["--model=m", "--data=DATA", "--out=OUT", "--tasks=mt_bech"],
            "'mt_bech' is unknown; did you mean 'mt_bench'?",
        ),
        (["--model=m", "--data=none", "--out=OUT"], "none: no such folder"),
        (["--model=m", "--data=OUT", "--out=OUT"], "mt_bench_questions.jsonl: is missing, and task mt_bench reads it"),
        (["--model=none", "--data=DATA", "--out=OUT"], "model 'none': no such file or folder"),
        (["--model=m", "--data=DATA", "--out=OUT", "--pairwise"], "--pairwise needs --judge_model=NAME"),
        (["--model=m", "--data=DATA", "--out=OUT", "--judge_fields=none.json"], "none.json: cannot be read as JSON"),
        (["--model=m", "--data=DATA", "--out=OUT", "--beside=DATA"], "no results of judged dialogue there"),
    ],
)
def test_bad_input(arguments: list[str], message: str, data: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    names = {"DATA": str(data), "OUT": str(tmp_path / "out")}
    arguments = [f"{f}={names.get(v, v)}" if v else f for f, _, v in (a.partition("=") for a in arguments)]
    found = run("judge", *arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_model_answers_and_is_judged(data: Path, tmp_path: Path, server: FakeServer):
    """Answers first, then verdicts, then the same again without a question; another run beside it, and pairs."""
    save_model(tiny_model(), tmp_path / "model")
    a, b = tmp_path / "a", tmp_path / "b"
    tasks = [t for t in TASKS if t != "mt_eval_recollection_inst"]
    flags = ["judge", f"--model={tmp_path / 'model'}", f"--data={data}", f"--tasks={','.join(tasks)}", "--capacity=512",
             "--max_tokens=20", "--patience=2", "--quiet=1", "--temperature=1"]  # fmt: skip
    server.behave = lambda n, body: (
        "[[A]]" if body["messages"][0]["content"].startswith("You are pair")
        else "Good. [[6]]" if len(body["messages"]) == 2 else '{"Rationale": "Good.", "Score": 7}'
    )  # fmt: skip
    found = run(*flags, f"--out={a}", "--seed=1")
    assert found.returncode == 0, found.stderr
    assert "answered, and not judged" in found.stdout
    kept = {p.relative_to(a): p.read_bytes() for p in a.rglob("duplex.jsonl")}
    assert len(kept) == len(tasks)

    gone = run(
        *flags, f"--out={a}", "--seed=1", "--judge_model=gpt-4", "--judge_url=http://127.0.0.1:9/v1", "--retries=0"
    )
    assert gone.returncode == 2
    assert "--judge_url=http://127.0.0.1:9/v1: cannot be reached" in gone.stderr

    judge = ["--judge_model=gpt-4", f"--judge_url={server.url}"]
    found = run(*flags, f"--out={a}", "--seed=1", *judge)
    assert found.returncode == 0, found.stderr
    assert {p: (a / p).read_bytes() for p in kept} == kept
    told = json.loads((a / "judge.json").read_text())
    assert told["judge"]["model"] == "gpt-4"
    assert told["judge"]["versions"] == ["m"]
    assert told["tasks"]["mt_bench"]["ways"]["duplex"]["score"] == {"value": 6, "low": 6, "high": 6}
    assert set(told["tasks"]["mt_bench"]["ways"]["duplex"]["by_category"]) == {
        "writing", "math", "coding", "stem", "reasoning"
    }  # fmt: skip
    assert told["averages"]["turn_based"]["value"] == 7
    assert any("the judge's server says that it runs m" in reason for reason in told["not_comparable"])
    assert "not comparable with published scores" in (a / "judge.txt").read_text()
    sent = len(server.bodies)
    again = run(*flags, f"--out={a}", "--seed=1", *judge)
    assert again.returncode == 0, again.stderr
    assert len(server.bodies) == sent
    assert json.loads((a / "judge.json").read_text())["tasks"] == told["tasks"]

    refused = run(*flags, f"--out={a}", "--seed=2", *judge)
    assert refused.returncode == 2
    assert "holds results with seed=1, and now it is 2" in refused.stderr

    found = run(*flags, f"--out={b}", *judge, f"--beside={a}", "--pairwise", "--ways=duplex")
    assert found.returncode == 0, found.stderr
    rows = json.loads((b / "judge.json").read_text())["comparisons"]
    assert [(r["way"], r["other_way"]) for r in rows if r["task"] == "mt_bench"] == [
        ("duplex", "turn_based"), ("duplex", "duplex")
    ]  # fmt: skip
    wins = next(r["wins"] for r in rows if "wins" in r)
    assert (wins["won"], wins["lost"], wins["disagree"]) == (0, 0, 12)
    assert "the orders disagree 12" in found.stdout
