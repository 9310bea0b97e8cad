"""The model for EleutherAI's lm-evaluation-harness, beside the harness's own model on transformers."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duplex_jax.checkpoint.registry import LoadedModel, save_model
from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks.likelihood import make_row
from duplex_jax.evaluate.benchmarks.questions import Item
from duplex_jax.evaluate.benchmarks.ways import WAYS
from tests.evaluate import against_harness
from tests.launch.test_evaluate_behaviour import run
from tests.tiny import END, tiny_model, with_config, with_params

_MISSING = [name for name in ("lm_eval", "torch", "accelerate") if importlib.util.find_spec(name) is None]
needs_harness = pytest.mark.skipif(
    bool(_MISSING), reason=f"needs {', '.join(_MISSING)}: pip install 'duplex-jax[harness,torch]' accelerate"
)
# What the harness and its data library warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [
    ("Question: Why is the sky blue?\nAnswer:", " air"), ("Question: Why is the sky blue?\nAnswer:", " sea water"),
    ("Question: Why is the sky blue?\nAnswer: ", "air"), ("Once upon a", " time"), ("", "No context at all"),
    ("x" * 300, " a beginning that does not fit"), ("Once upon a", " time"),
]  # fmt: skip
CAPACITY = 256


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type, unused-ignore]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """A model whose most probable token is always a printable character, or the end of its message."""
    model = tiny_model("chatml", with_config(eos_token_id=END))
    head = model.params["head"].copy()
    printable = [model.tokenizer.encode(chr(c))[0] for c in range(32, 127)]
    head[[i for i in range(len(head)) if i not in (*printable, END)]] = 0
    return dataclasses.replace(model, model=with_params(model.model, head=head))


@pytest.fixture(scope="module")
def ours(model: LoadedModel) -> Any:
    from duplex_jax.evaluate.harness import DuplexLM

    return DuplexLM(model, capacity=CAPACITY, rows=2)


@pytest.fixture(scope="module")
def theirs(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The same weights in transformers, as the harness runs them."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("exported") / "model"
    save_model(model, folder, dtype="float32")
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=CAPACITY,
               prefix_token_id=END)  # fmt: skip
    if offline is None:
        del os.environ["HF_HUB_OFFLINE"]


@needs_harness
def test_likelihoods_are_those_of_transformers(ours: Any, theirs: Any):
    requests = [request("loglikelihood", *pair) for pair in PAIRS]
    mine, others = (m.loglikelihood(requests, disable_tqdm=True) for m in (ours, theirs))
    np.testing.assert_allclose([x for x, _ in mine], [x for x, _ in others], rtol=1e-4, atol=1e-3)
    assert [g for _, g in mine] == [g for _, g in others]
    assert mine[3] == mine[6]
    assert mine[0] == pytest.approx(mine[2])  # white space goes with what follows it


@needs_harness
def test_greedy_continuations_are_told(ours: Any, theirs: Any):
    """What the model itself says is greedy, and the same with its last character changed is not."""
    context, settings = "Once upon a", {"max_gen_toks": 12, "until": []}
    (said,) = ours.generate_until([request("generate_until", context, settings)], disable_tqdm=True)
    assert said
    other = said[:-1] + ("b" if said[-1] == "a" else "a")
    requests = [request("loglikelihood", context, text) for text in (said, other)]
    assert [g for _, g in ours.loglikelihood(requests, disable_tqdm=True)] == [True, False]
    assert [g for _, g in theirs.loglikelihood(requests, disable_tqdm=True)] == [True, False]


@needs_harness
def test_long_text_goes_through_in_windows(ours: Any, theirs: Any):
    requests = [request("loglikelihood_rolling", text) for text in ("Short.", "All work and no play. " * 40)]
    mine, others = (m.loglikelihood_rolling(requests, disable_tqdm=True) for m in (ours, theirs))
    np.testing.assert_allclose(mine, others, rtol=1e-4)


@needs_harness
def test_words_are_those_of_transformers(ours: Any, theirs: Any):
    """Three prompts in two rows; one of them stops at a text, which is not part of the answer."""
    whole = {"max_gen_toks": 24, "until": []}
    contexts = ["Question: Who?\nAnswer:", "Once upon a", "y" * 200]
    requests = [request("generate_until", context, whole) for context in contexts]
    mine, others = (m.generate_until(requests, disable_tqdm=True) for m in (ours, theirs))
    assert mine == others
    longest = max(mine, key=len)
    context, stop = contexts[mine.index(longest)], longest[3:5]
    cut = ours.generate_until([request("generate_until", context, whole | {"until": [stop]})], disable_tqdm=True)
    assert cut == [longest[: longest.index(stop)]]
    assert not ours._engine.rows  # every row was given back


@needs_harness
@pytest.mark.parametrize("way", ["turn_based", "duplex"])
def test_other_ways_are_those_of_the_benchmarks(way: str, model: LoadedModel, ours: Any):
    from duplex_jax.evaluate.harness import DuplexLM

    lm = DuplexLM(model, way=way, rows=2, capacity=CAPACITY)
    lm._engine = ours._engine  # what that has compiled
    item = Item("What do plants need most to grow well?", ("water", "sand and nothing else"), 0)
    expected = WAYS[way](model.template, item, "a seed")
    found = [lm._continuation(item.query, f" {choice}", "a seed") for choice in item.choices]
    assert found == [(continuation, False) for continuation in expected]
    settings = {"max_gen_toks": 8, "until": ["\n\n"]}
    requests = [request("generate_until", text, settings) for text in (item.query, "Why is that? Tell me now, please.")]
    first = lm.generate_until(requests, disable_tqdm=True)
    assert lm.generate_until(requests[::-1], disable_tqdm=True) == first[::-1]
    assert any(first)
    assert not lm._engine.rows
    with pytest.raises(UserError, match="goes with way=plain"):
        lm.apply_chat_template([{"role": "user", "content": "Hi"}])


@needs_harness
def test_chat_template(ours: Any, model: LoadedModel):
    template = model.template
    history = [("system", "Be kind."), ("user", "Hi <|im_end|>"), ("assistant", "Yes?"), ("user", "Who?")]
    messages = [{"role": role, "content": text} for role, text in history]
    prompt = ours.apply_chat_template(messages)
    assert ours._encode(prompt) == template.turn_prompt(history)  # what a user types is no control token
    begun = ours.apply_chat_template([*messages, {"role": "assistant", "content": "It is"}], False)
    assert ours._encode(begun) == [*template.turn_prompt(history), *template.tokenizer.encode("It is")]
    found, _ = ours._continuation(prompt, "me", "")
    assert found.ids == [*template.turn_prompt(history), *template.tokenizer.encode("me")]
    assert ours.chat_template(True) == "chatml"
    assert "/" not in ours.tokenizer_name


@needs_harness
def test_refusals(model: LoadedModel, ours: Any):
    from duplex_jax.evaluate.harness import DuplexLM

    with pytest.raises(UserError, match="one of plain, turn_based, duplex, duplex_whole"):
        DuplexLM(model, way="duplx")
    with pytest.raises(UserError, match="rows 1 or more"):
        DuplexLM(model, rows=0)
    with pytest.raises(UserError, match="--model_args=row: must be model=M"):
        DuplexLM(model, row=2)
    with pytest.raises(UserError, match="must be model=M"):
        DuplexLM()
    with pytest.raises(UserError, match="leaves no room"):
        ours.generate_until([request("generate_until", "a", {"max_gen_toks": 250})], disable_tqdm=True)


def ask(lm: Any, task: str, data: Path, **more: Any) -> Any:
    """What the harness finds of one of our own tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from duplex_jax.evaluate.harness import TASKS

    metadata = {"data": str(data), "seed": 0}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **more)


@needs_harness
def test_every_task_has_a_file():
    from lm_eval.tasks import TaskManager

    from duplex_jax.evaluate.benchmarks.questions import TASKS as FORMS
    from duplex_jax.evaluate.harness import TASKS

    known = set(TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks)
    assert known == {f"likelihood_{t}" for t in FORMS["likelihood"]} | {f"ultraeval_{t}" for t in FORMS["generation"]}
    careful = {"humaneval", "mbpp", "gsm8k", "math"}
    for name, task in FORMS["generation"].items():
        text = (TASKS / f"ultraeval_{name}.yaml").read_text()
        sampling = "generation_kwargs: {do_sample: true, temperature: 0.1, top_p: 0.95, max_gen_toks: 300, until: []}"
        assert (sampling in text) == (name in careful)
        assert ("unsafe_code: true" in text) == task.runs_code
    usual = "generation_kwargs: {do_sample: true, temperature: 0.3, top_p: 0.8, max_gen_toks: 300, until: []}"
    assert usual in (TASKS / "_ultraeval.yaml").read_text()


@needs_harness
def test_items_are_kept_and_not_asked_again(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By likelihood: fewer items before more, a line that was cut off, and an item that is longer than the context."""
    from duplex_jax.evaluate import harness

    rows = [{"query": f"Question: Why {i}?", "choices": ["a", "b", "c"], "gold": 2} for i in range(5)]
    rows.append({"query": "Question: Why? " * 30, "choices": ["a", "b"], "gold": 1})
    (tmp_path / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[int] = []
    real = harness.log_likelihoods
    monkeypatch.setattr(harness, "log_likelihoods", lambda m, r, *a: (asked.append(len(r)), real(m, r, *a))[1])
    lm = harness.DuplexLM(model, capacity=CAPACITY, way="duplex", log=tmp_path / "log")

    def samples(limit: int | None) -> list[Any]:
        found = ask(lm, "likelihood_arc_easy", tmp_path, limit=limit)
        return [(s["doc"]["number"], s["resps"], s["metrics"]) for s in found["samples"]["likelihood_arc_easy"]]

    first = samples(2)
    everything = samples(None)
    assert asked == [2, 4]
    assert everything[:2] == first
    assert [number for number, _, metrics in everything if metrics == ["too_long"]] == [5]
    path = tmp_path / "log" / "arc_easy" / "duplex.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    assert samples(None) == everything
    assert samples(None) == everything
    assert asked == [2, 4, 1]
    # What is measured is what the adapter tells of each continuation, with and without the silence before it.
    number, resps, _ = everything[0]
    item = Item(f"Question: Why {number}?\nAnswer:", ("a", "b", "c"), 2)
    (scores,) = dict(real(model.model, [make_row(WAYS["duplex"](model.template, item, f"arc_easy/{number}"))],
                          model.template.stop_ids, CAPACITY)).values()  # fmt: skip
    assert [r[0][0] for r in resps] == pytest.approx(scores.all)
    assert [r[0][0].words for r in resps] == pytest.approx(scores.words)


@needs_harness
def test_programs_are_run_in_the_sandbox():
    from duplex_jax.evaluate import sandbox
    from duplex_jax.evaluate.benchmarks.harness_tasks import answer_marks, run_programs
    from duplex_jax.evaluate.benchmarks.questions import Question

    try:
        sandbox.check_sandbox()
    except UserError as e:
        pytest.skip(str(e))
    said = ["def f():\n    return 1\n", "def f():\n    return 2\n", "import os; os._exit(0)", "def f(:"]
    doc = {"task": "mbpp", **dataclasses.asdict(Question("", "", "", "assert f() == 1"))}
    found = run_programs([[text] for text in said], [doc] * 4)
    assert [answer_marks(doc, [pair])["score"] for pair in found] == [("", 1.0), ("", 0.0), ("", 0.0), ("", 0.0)]


@needs_harness
@pytest.mark.slow
def test_the_harness_runs_it(tmp_path: Path, model: LoadedModel):
    """The registered name, the command, and a task of its own folder."""
    save_model(model, tmp_path / "model")
    (tmp_path / "odd.jsonl").write_text('{"q": "Is 3 odd?", "c": ["yes", "no"], "a": 0}\n' * 3)
    (tmp_path / "odd.yaml").write_text(
        "task: odd\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'odd.jsonl'}}}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n"
    )
    flags = ["harness", "--tasks", "odd", "--include_path", str(tmp_path)]
    found = run(*flags, "--model_args", f"model={tmp_path / 'model'},capacity=256")
    assert found.returncode == 0, found.stderr
    assert "duplex_jax" in found.stdout
    assert "|odd" in found.stdout


@needs_harness
@pytest.mark.parametrize(
    ("task", "message"), [("arc_easy", "model 'none': no such file or folder"), ("nosuch", "Tasks not found: nosuch;")]
)
def test_bad_input_is_one_line(task: str, message: str):
    refused = run("harness", "--tasks", task, "--model_args", "model=none")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"duplex-jax: {message}")
    assert "Traceback" not in refused.stderr


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_one_line_says_what_to_install():
    found = run("harness", "--tasks=arc_easy")
    assert found.returncode == 2
    assert found.stderr.startswith("duplex-jax: evaluate harness runs EleutherAI's lm-evaluation-harness: pip install")
    assert found.stderr.count("\n") == 1


@needs_harness
@pytest.mark.slow
def test_scores_of_smollm2_are_those_of_the_harness_on_transformers(smollm2: LoadedModel, shared: Path, tmp_path: Path):
    """`HARNESS_ITEMS` items of each task; `python -m tests.evaluate.against_harness` runs it at any size."""
    limits = dict.fromkeys(against_harness.TASKS, int(os.environ.get("HARNESS_ITEMS", "50")))
    rows = against_harness.compare(smollm2, shared / "data" / "benchmarks", limits, "plain", tmp_path)
    assert [row["task"] for row in rows] == list(limits)
    for row in rows:
        assert row["items"] == limits[row["task"]]
        # White space around endings and options, of which ours has none, is all that differs in a few.
        assert row["same_text"] >= 0.9 * row["items"]
        assert row["apart"] < 1e-2
        assert row["acc"]["same_choice"] >= 99
        # Of 50 items one is two points; with the same choice everywhere there is none.
        assert abs(row["acc"]["points"]) <= max(0.5, 100 / row["items"])
