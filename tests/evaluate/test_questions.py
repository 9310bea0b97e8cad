"""Benchmarks by generation: questions and prompts, extraction, oracles and constant answers, bad files."""

import dataclasses
import functools
import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks import extraction
from duplex_jax.evaluate.benchmarks import questions as tables
from duplex_jax.evaluate.benchmarks.harness_tasks import answer_marks, mean_of_subtasks
from duplex_jax.evaluate.benchmarks.questions import Benchmark, Question, is_right, program, prompts
from duplex_jax.evaluate.sandbox import Program

Row = dict[str, Any]
TASKS = tables.TASKS["generation"]
CODE = {"humaneval", "mbpp"}
SHOTS = {"ceval": 5, "cmmlu": 5, "mmlu": 5, "bbh": 3, "humaneval": 0, "mbpp": 3, "gsm8k": 8, "math": 4,
         "arc_easy": 0, "arc_challenge": 0, "hellaswag": 0}  # fmt: skip


@functools.cache
def benchmark(name: str, folder: Path) -> Benchmark:
    return tables.read_benchmark("generation", name, str(folder))


def questions(name: str, folder: Path) -> list[Question]:
    return benchmark(name, folder).items


def score(questions: list[Question], right: list[bool]) -> float:
    return 100 * mean_of_subtasks([(q.subtask, float(r)) for q, r in zip(questions, right, strict=True)])


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    return shared / "data" / "benchmarks"


@pytest.mark.parametrize("name", TASKS)
def test_prompts_show_answered_questions_of_the_same_subtask(name: str, data: Path):
    found = questions(name, data)
    asked = prompts(benchmark(name, data), 7)
    for number in random.Random(name).sample(range(len(found)), 5):
        same = [q for q in found if q.subtask == found[number].subtask]
        drawn = random.Random(f"{name}/{number}/7").sample(same, SHOTS[name] + 1) if SHOTS[name] else []
        shots = [q.input + q.output for q in drawn if q != found[number]][: SHOTS[name]]
        description = [found[number].description] if name in ("mmlu", "ceval", "cmmlu") else []
        assert asked[number] == "\n\n".join([*description, *shots, found[number].input])


def test_counts(data: Path):
    assert {name: task.shots for name, task in TASKS.items()} == SHOTS
    assert {name for name, task in TASKS.items() if task.runs_code} == CODE
    assert len(questions("mmlu", data)) == 14_042 - 9
    assert len(questions("bbh", data)) == 6_511 - 2
    subtasks = {name: len({q.subtask for q in questions(name, data)}) for name in TASKS}
    assert subtasks == dict.fromkeys(TASKS, 1) | {"mmlu": 57, "ceval": 52, "cmmlu": 67, "bbh": 27, "math": 7}


@pytest.mark.parametrize("name", [name for name in TASKS if name not in CODE])
def test_an_oracle_scores_all_and_a_constant_answer_its_share(name: str, data: Path):
    task, found = TASKS[name], questions(name, data)
    assert score(found, [is_right(task, q, q.output) for q in found]) == 100
    assert score(found, [is_right(task, q, "") for q in found]) == 0
    if name not in ("gsm8k", "math"):
        shares = defaultdict(list)
        for q in found:
            shares[q.subtask].append(q.output == "(A)")
        expected = sum(sum(share) / len(share) for share in shares.values()) / len(shares)
        assert score(found, [is_right(task, q, "(A)") for q in found]) == pytest.approx(100 * expected)
        assert 0.1 < expected < 0.6


def runs(made: Program) -> bool:
    compare = f"def __answer__(i, value): assert value == [{', '.join(made.expected)}][i]\n"
    text = compare + made.source
    return subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(("name", "wrong"), [("humaneval", "\n    return None\n"), ("mbpp", "x = 1\n")])
def test_programs_tell_right_code_from_wrong(name: str, wrong: str, data: Path):
    task, found = TASKS[name], questions(name, data)
    goes_on = {"humaneval": "\n\nprint('done')\ndef other(:\n", "mbpp": '\n\n"""Write a function.\nassert f(1)"""\n'}[
        name
    ]
    for q in found:
        compile(program(task, q, q.output).source, "program", "exec")
    for number in (0, 5, 81):
        q = found[number]
        assert runs(program(task, q, q.output + goes_on))
        assert not runs(program(task, q, wrong))
        with pytest.raises(ValueError, match="are run"):
            is_right(task, q, q.output)


# Without the files: what each task makes of a row.

CHOICES = {"subject": "world_law", "question": "Who? ", "choices": ["me", " you", "we", "(D) all"], "answer": "C"}
REQUIREMENT = "Requirement:\nChoose and respond with the letter of the correct answer, including the parentheses.\n"


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("ceval", CHOICES, Question(
            "world_law", "问题：\nWho? \n要求：\n从以下选项中选择并回答正确答案的选项字母，包括左右括号。\n选项：\n"
            "(A) me\n(B)  you\n(C) we\n(D) (D) all\n答案：\n", "(C)", "(C)", option="we")),
        ("mmlu", CHOICES | {"answer": 1}, Question(
            "world_law", f"Question:\nWho? \n{REQUIREMENT}Options:\n(A) me\n(B)  you\n(C) we\n(D) (D) all\nAnswer:\n",
            "(B)", "(B)", "The following are multiple choice questions (with answers) about world_law.\n\n", " you")),
        ("mmlu", CHOICES | {"choices": ["me", "you", "me", "we"]}, None),
        ("bbh", {"task": "sports_understanding", "input": "Plausible?", "target": "no"}, Question(
            "sports_understanding", f"Question:\nPlausible?\n{REQUIREMENT}Options:\n(A) Yes\n(B) No\nAnswer:\n",
            "(B)", "(B)", option="No")),
        *(("bbh", {"task": task, "input": "So?", "target": target}, Question(
            task, f"Question:\nSo?\n{REQUIREMENT}Options:\n(A) {a}\n(B) {b}\nAnswer:\n", "(B)", "(B)", option=b))
          for task, target, a, b in (("boolean_expressions", "False", "True", "False"), ("navigate", "No", "Yes", "No"),
                                     ("formal_fallacies", "invalid", "valid", "invalid"))),
        ("bbh", {"task": "snarks", "input": "Which?\nOptions:\n(A) so\n(B) (C) no", "target": "(B)"}, Question(
            "snarks", f"Question:\nWhich?\nOptions:\n(A) so\n(B) (C) no\n{REQUIREMENT}Options:\n(A) so\n(B) (C) no\n"
            "Answer:\n", "(B)", "(B)", option="(C) no")),
        ("bbh", {"task": "movie_recommendation", "input": "Like?\nOptions:\n(A) Up\n(B) Mon\n(C) Inc",
                 "target": "Mon, Inc"},
         Question("movie_recommendation", f"Question:\nLike?\nOptions:\n(A) Up\n(B) Mon\n(C) Inc\n{REQUIREMENT}"
                  "Options:\n(A) Up\n(B) Mon\n(C) Inc\nAnswer:\n", "(B)", "(B)", option="Mon")),
        ("bbh", {"task": "ruin_names", "input": "?\nOptions:\n(A) rita\n(B) sue", "target": "rita, sue"}, None),
        ("bbh", {"task": "dyck_languages", "input": "Close: (", "target": ")"},
         Question("dyck_languages", "Question:\nClose: (\nAnswer:\n", ")", ")")),
        ("humaneval", {"prompt": "\ndef f():\n    '''It.'''\n", "entry_point": "f", "canonical_solution": "    pass\n",
                       "test": "def check(f):\n    f()\n"},
         Question("", "def f():\n    '''It.'''", "    pass\n", "def check(f):\n    f()\n\ncheck(f)",
                  head="\ndef f():\n    '''It.'''\n")),
        ("mbpp", {"text": "Add.", "code": "def f(a):\r\n  return a", "test_setup_code": "g = f",
                  "test_list": ["assert g(1)", "assert g(2)"]},
         Question("", '"""Add.\nassert g(1)\nassert g(2)"""', "def f(a):\r\n  return a",
                  "g = f\nassert g(1)\nassert g(2)")),
        ("gsm8k", {"question": "How much?", "answer": "500+500=<<500+500=1000>>1000\n#### 1,000"},
         Question("", "Question: How much?\nAnswer: ", "500+500=<<500+500=1000>>1000\n#### 1,000", "1000")),
        ("math", {"problem": "Half?", "type": "Algebra", "solution": "It is $\\boxed{x =\n \\frac12}$."},
         Question("Algebra", "Problem: Half?\nSolution: ", "It is $\\boxed{x =\n \\frac12}$.\nFinal Answer: "
                  "The final answer is $x = \\frac12$. I hope it is correct.", "\\frac{1}{2}")),
        ("arc_easy", {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
         Question("", f"Question:\nWhy?\n{REQUIREMENT}Options:\n(A) a\n(B) b\nAnswer:\n", "(B)", "(B)", option="b")),
        ("hellaswag", {"activity_label": "Tea", "ctx": "[header] Boil", "endings": ["it.", "me."], "label": "0"},
         Question("", "Context:\n Tea: [header] Boil\nQuestion:\nWhich ending makes the most sense?\n"
                  f"{REQUIREMENT}Options:\n(A) it.\n(B) me.\nAnswer:\n", "(A)", "(A)", option="it.")),
    ],
)  # fmt: skip
def test_questions_of_each_task(name: str, row: Row, expected: Question | None):
    assert TASKS[name].parse(row) == expected


def write(folder: Path, file: str, *rows: Any) -> None:
    (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def problem(name: str, folder: Path) -> str:
    with pytest.raises(UserError) as e:
        tables.read_benchmark("generation", name, str(folder))
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", TASKS)
def test_missing_files_and_broken_lines(name: str, tmp_path: Path):
    task = TASKS[name]
    assert "no such folder" in problem(name, tmp_path / "none")
    missing = problem(name, tmp_path)
    assert f"{task.file}.jsonl: is missing, and task {name} reads it; it is {task.source}" in missing
    write(tmp_path, "ultraeval_task_configs", {"dataset": name, "task": "law", "description": "On law."})
    write(tmp_path, task.file)
    assert "holds no question" in problem(name, tmp_path)
    broken: list[Any] = ["", {"query": 3}, {}]
    for row in broken:
        write(tmp_path, task.file, row)
        found = problem(name, tmp_path)
        assert found.startswith(f"{tmp_path / task.file}.jsonl:1: is no line of {task.file} (")
        assert found.endswith(f"it is {task.source}")
    (tmp_path / f"{task.file}.jsonl").write_text("{broken")
    assert ".jsonl:1: is no line of" in problem(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmlu", CHOICES | {"answer": 4}, "the right choice is not among them"),
        ("mmlu", CHOICES | {"choices": ["a", 2, "c", "d"]}, "2 is no text"),
        ("bbh", {"task": "navigate", "input": "?", "target": "maybe"}, "maybe is none of yes, no, true"),
        ("bbh", {"task": "snarks", "input": "?\nOptions:\n(A) a", "target": "(B)"}, "not in list"),
        ("gsm8k", {"question": "?", "answer": "18"}, "no ####"),
        ("math", {"problem": "?", "type": "Algebra", "solution": "\\boxed{1"}, "no boxed answer"),
    ],
)
def test_lines_that_are_no_questions(name: str, row: Row, message: str, tmp_path: Path):
    write(tmp_path, TASKS[name].file, row)
    assert message in problem(name, tmp_path)


def test_subjects_are_described_and_large_enough(tmp_path: Path):
    rows = [CHOICES | {"question": f"Who {i}?"} for i in range(6)]
    write(tmp_path, "ceval_val", *rows)
    found = problem("ceval", tmp_path)
    assert "ultraeval_task_configs.jsonl: is missing, and task ceval reads it; it is a row with dataset" in found
    config = {"dataset": "cmmlu", "task": "world-law", "description": "关于法律。"}
    write(tmp_path, "ultraeval_task_configs", config)
    assert "jsonl:1: subject world_law of ceval is not described in" in problem("ceval", tmp_path)
    write(tmp_path, "ultraeval_task_configs", config, {"dataset": "ceval"})
    assert "ultraeval_task_configs.jsonl:2: is no line of" in problem("ceval", tmp_path)
    write(tmp_path, "ultraeval_task_configs", config, config | {"dataset": "ceval", "description": "世界法。"})
    assert {q.description for q in tables.read_benchmark("generation", "ceval", str(tmp_path)).items} == {"世界法。"}
    write(tmp_path, "ceval_val", *rows[:5])
    assert "holds 5 questions of world_law, and 6 or more" in problem("ceval", tmp_path)


def test_shots_repeat_and_never_show_what_is_asked():
    asked = [Question(f"s{i % 2}", f"[{i}]", f"<{i}>", "") for i in range(14)]
    asked[12] = asked[0]  # the same question twice
    of = Benchmark(TASKS["mmlu"], asked, "")
    seen = set()
    for seed in range(20):
        assert prompts(of, seed) == prompts(of, seed)
        for number, (question, text) in enumerate(zip(asked, prompts(of, seed), strict=True)):
            *shots, last = text.split("\n\n")
            assert last == question.input
            assert question.input + question.output not in shots
            assert len(shots) == 5 or (number in (0, 12) and len(shots) == 4)
            assert set(shots) <= {q.input + q.output for q in asked if q.subtask == question.subtask}
            seen.add(text)
    assert len(seen) > 200


def test_each_subtask_weighs_the_same():
    asked = [Question("a", "", "", "(A)")] * 9 + [Question("b", "", "", "(A)")]
    docs = [{"task": "bbh", **dataclasses.asdict(q)} for q in asked]
    said = ["(A)"] * 3 + ["(B)"] * 6 + ["(A) it is"]
    marks = [answer_marks(doc, [text])["score"] for doc, text in zip(docs, said, strict=True)]
    assert mean_of_subtasks(marks) == pytest.approx((1 / 3 + 1) / 2)


# Golden cases of extraction.


@pytest.mark.parametrize(
    ("output", "right"),
    [("(C)", True), ("\n (C) we\n\nQuestion:", True), ("(C)。", True), ("C", False), ("（C）", False), ("(B)", False),
     ("答案：(C)", False), ("(B) or (C)", False), ("", False)],
)  # fmt: skip
def test_prefix_match(output: str, right: bool):
    assert extraction.prefix_match(output, "(C)") == right


@pytest.mark.parametrize(
    ("output", "right"),
    [("(C)", True), ("C", True), ("C.", True), ("(C).", True), ("The answer is (C).", True), ("Answer: C", True),
     ("sugar water", True), ("sugar", False), ("(B) sugar water", False), ("B or C", False), ("not (B", False),
     ("It is\n(C)", False), ("\n\n(C)\n(B)", True), ("答案是 (C)", True), ("答案是(C)", False), ("Cats", False),
     ("C)", False), ("(c)", False), ("", False)],
)  # fmt: skip
def test_qa_match(output: str, right: bool):
    assert extraction.qa_match(output, "(C)", "sugar water") == right


def test_an_empty_option_is_no_answer():
    assert not extraction.qa_match("(B)", "(C)", "")


@pytest.mark.parametrize(
    ("output", "answer"),
    [("24", "24"), ("24.", "24"), ("  -35\n\nQuestion:\n1 + 1 =\nAnswer:\n2", "-35"), ("", ""), ("\n \n", ""),
     ("So the answer is 8.", "8"), ("The answer is 7. No, so the answer is 8.\n\nthe answer is 9", "8"),
     ("> ) }", "> ) }"), ("答案是 8", "答案是 8"), ("one\ntwo", "one\ntwo")],
)  # fmt: skip
def test_bbh_post(output: str, answer: str):
    assert extraction.bbh_post(output) == answer


def test_exact_match():
    assert extraction.exact_match("> )}", ">) }")
    assert not extraction.exact_match("> )", ") >")
    assert not extraction.exact_match("Yes", "yes")
    assert not extraction.exact_match("", "")


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("#### 18\n\nQuestion: And?\nAnswer: 1\n#### 5", "18"),
        ("#### 1,234.", "1234"),
        ("#### -3", "-3"),
        ("#### 2.50", "2.50"),
        ("####18 = 5", "5"),
        ("#### $7, so 3 = <<3=3>>$4, left", "4"),
        ("It makes <<2+2=4>>4 and <<4*2=8>>$1,008. Good", "1008"),
        ("2 + 2 =", "2"),
        ("<<1=1>>", "1>>"),
        ("So 3 + 4 = $7.", "7"),
        ("Tom has 12 apples and 5 pears in all", "5"),
        ("a loss of -12", ""),
        ("The answer is 18.", ""),
        ("共有 42 个", "42"),
        ("none", ""),
        ("", ""),
    ],
)
def test_gsm8k_post(output: str, answer: str):
    assert extraction.gsm8k_post(output) == answer


@given(
    n=st.integers(-(10**9), 10**9), before=st.text("ab #=>$1.\n"), after=st.sampled_from(["", ".", "\n\n#### 3", " x"])
)
def test_the_number_behind_the_first_mark_counts(n: int, before: str, after: str):
    assert extraction.gsm8k_post(f"{before.replace('#', '')}\n#### {n:,}{after}") == str(n)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("So.\nFinal Answer: The final answer is $\\frac12$. I hope it is correct.", "\\frac{1}{2}"),
        ("The final answer is $3$. I hope it is correct.\n\nProblem: More.\nSolution: It is $4$.", "3"),
        ("Thus $x = 3$. Therefore, the answer is $x = 5$.", "5"),
        ("The final answer is $3$. The final answer is $4$.", "4"),
        ("Hence we get \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("Therefore, it costs $\\$1,\\!250.50$.", "1250.50"),
        ("therefore the answer is 1.5", "1.5"),
        ("The final answer is: 12.", "12"),
        ("$7$. Then $8$.", "7"),
        ("Enthusiastic $1$. No $2$", "1"),
        ("所以 $5$", "5"),
        ("", ""),
        ("...", ""),
    ],
)
def test_math_post(output: str, answer: str):
    assert extraction.math_post(output) == answer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("\\frac12", "\\frac{1}{2}"), ("\\dfrac 3{16}", "\\frac{3}{16}"), ("\\frac{1}2", "\\frac{1}{2}"),
        ("\\tfrac\\pi4", "\\frac{\\pi}{4}"), ("-1/2", "-\\frac{1}{2}"), ("frac{1}{2}", "\\frac{1}{2}"),
        ("\x0crac{1}{2}", "\\frac{1}{2}"), ("\\frac{\\sqrt3}2", "\\frac{\\sqrt{3}}{2}"), ("2\\sqrt 5", "2\\sqrt{5}"),
        ("\\sqrt[3]2", "\\sqrt[3]{2}"), ("\\frac", "\\frac"), ("\\frac{1", "\\frac{1"), ("\\sqrt[3", "\\sqrt[3"),
        (".5", "0.5"), ("-.25", "-0.25"), ("5.", "5"), ("10,000", "10000"), ("1{,}000", "1000"),
        ("1,2", "1,2"), ("-12,345.60", "-12345.60"), ("-7", "-7"), ("\\$18.90", "18.90"), ("25\\%", "25"),
        ("90^\\circ", "90"), ("90^{\\circ}", "90"), ("15\\mbox{ cm}^2", "15"), ("8\\text{ square\nunits}", "8"),
        ("144 \\text{ m}^3", "144"), ("18 \\text{ ways.}", "18"), ("12 inches", "12"), ("3 \\text{ and } 4", "3,4"),
        ("\\text{(E)}", "(E)"), ("\\text{June 20}", "June20"), ("\\text{m}", ""), ("x = 3", "3"), ("a+b=3", "a+b=3"),
        ("\\left( 1,\\ 2 \\right]", "(1,2]"), ("an ellipse", "ellipse"), ("a b", "ab"), ("\\text{the 4th}", "the4"),
        ("x \\leq 3", "x\\le3"), ("\\boxed{\\boxed{4}}", "4"), ("$1$ or $2$", "2"), ("", ""),
        ("\\leftarrow", "\\leftarrow"),
    ],
)  # fmt: skip
def test_normalised_answers(answer: str, normal: str):
    assert extraction.normalise_math(answer) == normal


def test_boxed():
    assert extraction.boxed("\\boxed{1} then \\boxed{\\frac{1}{\\{2\\}}}") == "\\frac{1}{\\{2\\}}"
    assert extraction.boxed("\\boxed{1") is None
    assert extraction.boxed("1") is None


@pytest.mark.parametrize(
    ("output", "code"),
    [("\n    return 1\n", "\n    return 1\n"), ("\n    return 1\n\nprint(f())\n", "\n    return 1\n"),
     ("    if x:\n        print(x)\n\n# Test\n", "    if x:\n        print(x)\n"), ("    pass\nif x:", "    pass"),
     ("    pass\n\n@cache\ndef g(): ...", "    pass\n"), ("    pass\nclass A: ...\ndef f(): ...", "    pass"),
     ("    pass<|endoftext|>def", "    pass"), ("", "")],
)  # fmt: skip
def test_humaneval_post(output: str, code: str):
    assert extraction.humaneval_post(output) == code


@pytest.mark.parametrize(
    ("output", "code"),
    [('def f():\n  return 1\n\n"""Write.\nassert g()"""def g(): ...', "def f():\n  return 1\n\n"), ("x = 1", "x = 1"),
     ('def f():\n  """It."""\n  return 1', 'def f():\n  """It."""\n  return 1'), ('"""Write', ""), ("", "")],
)  # fmt: skip
def test_new_mbpp_post(output: str, code: str):
    assert extraction.new_mbpp_post(output) == code


@given(st.text() | st.text('\\frac{}sqrtboxed[]$=1,. \n#>(A)"an'))
@example("\\boxed{" * 3)
@example("\\frac\\frac\\sqrt[")
def test_whatever_a_model_says_is_scored(output: str):
    for extract in (extraction.bbh_post, extraction.gsm8k_post, extraction.math_post, extraction.humaneval_post,
                    extraction.new_mbpp_post):  # fmt: skip
        assert isinstance(extract(output), str)
    extraction.qa_match(output, "(C)", "option")
    assert extraction.prefix_match(f" \n(C){output}", "(C)")
    body = extraction.humaneval_post(output)
    assert output.startswith(body)
    assert extraction.humaneval_post(body) == body


@given(a=st.integers(1, 9), b=st.integers(1, 9), sign=st.sampled_from(["", "-"]))
def test_all_spellings_of_a_fraction_are_one(a: int, b: int, sign: str):
    spellings = (f"\\frac{a}{b}", f"\\frac {a} {b}", f"\\dfrac{{{a}}}{{{b}}}", f"\\tfrac{a}{{{b}}}", f"{a}/{b}",
                 f"\\frac{a}{b}\\text{{ feet}}", f"\\frac{a}{b}^\\circ", f"\\left\\frac{a}{b}\\right")  # fmt: skip
    found = {extraction.normalise_math(sign + s) for s in spellings}
    assert found == {f"{sign}\\frac{{{a}}}{{{b}}}"}
    final = f"So $1$ it is.\nFinal Answer: The final answer is ${sign}{spellings[0]}$. I hope it is correct."
    assert extraction.math_post(final) in found
