"""Benchmarks by log-likelihood: items, the three ways, likelihoods against plain forward passes, scores, resuming."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax.checkpoint.registry import LoadedModel, save_model
from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks import questions
from duplex_jax.evaluate.benchmarks.files import chosen
from duplex_jax.evaluate.benchmarks.harness_tasks import METRICS, choice_marks
from duplex_jax.evaluate.benchmarks.likelihood import Likelihoods, log_likelihoods, make_row, padded_length
from duplex_jax.evaluate.benchmarks.questions import Benchmark, Item
from duplex_jax.evaluate.benchmarks.report import chance, difference, mean
from duplex_jax.evaluate.benchmarks.ways import WAYS, Continuation, duplex_pairs
from duplex_jax.evaluate.statistics import paired_difference, wilson
from duplex_jax.timeline import SlicePair
from tests.tiny import logits_of, tiny_model

ITEMS = [
    Item("Question: What do plants need most to grow well in a dry and sunny place?\nAnswer:",
         ("water", "water and light", "sand, mostly sand and nothing else at all", "a friend"), 1),
    Item("Short?", ("yes", "no"), 0),
    Item("A man is playing the violin on a very large stage. He", ("stops. Then he bows.", "eats", "e"), 2),
    Item("Pick\nA. one\nB. two\nAnswer:", ("A", "B"), 1),
]  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {"query": "Question: Why?", "choices": ["a", "b", "c"], "gold": 2},
    "arc_challenge": {"id": "x", "answerKey": "2", "question": {
        "stem": "Why?", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]}},
    "hellaswag": {"activity_label": "Tea", "ctx_a": "[header] Make tea [title] Boil water.", "ctx_b": "then YOU",
                  "endings": ["wait. [substeps] Long.", "run."], "label": "1"},
    "mmlu": {"subject": "high_school_physics", "question": "Up? ", "choices": ["yes", "no ", "both", "0"],
             "answer": "C"},
    "mmlu_continuation": {"subject": "high_school_physics", "question": "Up?", "choices": ["yes", "no", "both", "0"],
                          "answer": 2},
}  # fmt: skip


TASKS = questions.TASKS["likelihood"]


def read_benchmark(task: str, folder: Path) -> Benchmark:
    return questions.read_benchmark("likelihood", task, str(folder))


def write(folder: Path, task: str, *rows: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{TASKS[task].file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("task", "item"),
    [
        ("arc_easy", Item("Question: Why?\nAnswer:", ("a", "b", "c"), 2)),
        ("arc_challenge", Item("Question: Why?\nAnswer:", ("a", "b"), 1)),
        ("hellaswag", Item("Tea: Make tea. Boil water. Then you", ("wait. Long.", "run."), 1)),
        ("mmlu", Item("The following are multiple choice questions (with answers) about high school physics.\n\n"
                      "Up?\nA. yes\nB. no\nC. both\nD. 0\nAnswer:", ("A", "B", "C", "D"), 2)),
        ("mmlu_continuation", Item("The following are questions (with answers) about high school physics.\n\n"
                                   "Question: Up?\nAnswer:", ("yes", "no", "both", "0"), 2)),
    ],
)  # fmt: skip
def test_items_of_each_task(task: str, item: Item, tmp_path: Path):
    write(tmp_path, task, ROWS[task])
    assert read_benchmark(task, tmp_path).items == [item]


def test_arc_as_hugging_face_has_it(tmp_path: Path):
    write(tmp_path, "arc_easy",
          {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"})  # fmt: skip
    assert read_benchmark("arc_easy", tmp_path).items == [Item("Question: Why?\nAnswer:", ("a", "b"), 1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "Q", "choices": ["a", "b"]}, "jsonl:1: is no line of arc_easy_test (field 'gold' is missing)"),
        ({"query": "Q", "choices": ["a", 3], "gold": 0}, "3 is no text"),
        ({"query": "Q", "choices": ["a"], "gold": 0}, "two choices or more"),
        ({"query": "Q", "choices": ["a", " "], "gold": 0}, "two choices or more"),
        ({"query": "Q", "choices": ["a", "b"], "gold": 2}, "the right one among them"),
        ("", "is no line of arc_easy_test"),
    ],
)
def test_lines_that_are_no_items(row: Any, message: str, tmp_path: Path):
    write(tmp_path, "arc_easy", row)
    with pytest.raises(UserError) as e:
        read_benchmark("arc_easy", tmp_path)
    assert message in str(e.value)


def test_missing_and_doubled_files(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        read_benchmark("mmlu", tmp_path / "none")
    with pytest.raises(UserError, match=r"arc_easy_test\.jsonl: is missing.*allenai/ai2_arc"):
        read_benchmark("arc_easy", tmp_path)
    for name in ("hellaswag_val.jsonl", "hellaswag_val_1000.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"holds hellaswag_val\.jsonl and hellaswag_val_1000\.jsonl"):
        read_benchmark("hellaswag", tmp_path)


def test_fewer_items_are_the_first_of_more():
    assert sorted(chosen(50)) == list(range(50))
    assert chosen(50, 7) == chosen(50, 20)[:7] != list(range(7))


def test_a_duplex_query_is_silence_until_its_last_slice():
    template = tiny_model().template
    pairs = duplex_pairs(template, ITEMS[0].query, ITEMS[0].choices[2], "arc_easy/3")
    users = [p.user for p in pairs if p.user is not None]
    assert "".join(" ".join(users).split()) == "".join(ITEMS[0].query.split())
    assert all(4 <= len(u.split()) <= 6 for u in users[:-1])
    assert [p.assistant for p in pairs[: len(users) - 1]] == [None] * (len(users) - 1)
    assert "".join(p.assistant or "" for p in pairs[len(users) - 1 :]) == ITEMS[0].choices[2]
    assert pairs == duplex_pairs(template, ITEMS[0].query, ITEMS[0].choices[2], "arc_easy/3")
    assert duplex_pairs(template, "Short?", "yes", "s") == [SlicePair("Short?", "yes")]


@pytest.mark.parametrize("template_name", ["compact", "chatml"])
@pytest.mark.parametrize("item", ITEMS)
def test_scored_tokens_are_the_words_of_the_choice(template_name: str, item: Item):
    template = tiny_model(template_name).template
    control = set(template.tokenizer.special.values())
    for way, encode in WAYS.items():
        for choice, found in zip(item.choices, encode(template, item, "seed"), strict=True):
            words = [found.ids[i] for i in found.scored]
            assert words == template.tokenizer.encode(f" {choice}" if way == "plain" else choice)
            assert not control & set(words)
            assert found.scored[-1] == len(found.ids) - 1
            if way == "duplex":
                encoded = template.encode(duplex_pairs(template, item.query, choice, "seed"))
                assert found.ids == encoded.ids[: len(found.ids)].tolist()
                # What is scored is what training gives weight to, but for silence and ends of slices.
                weighted = [i for i in np.flatnonzero(encoded.codes) if encoded.ids[i] not in template.stop_ids]
                assert found.scored == weighted
            else:
                bare = template.start() + template.tokenizer.encode(item.query)
                context = template.turn_prompt([("user", item.query)]) if way == "turn_based" else bare
                assert found.ids[: found.scored[0]] == context


def one_by_one(model: LoadedModel, continuations: list[Continuation]) -> Likelihoods:
    """One forward pass for each choice, without padding, summed on the host."""
    sums: tuple[list[float], list[float]] = ([], [])
    for ids, scored in continuations:
        logits = logits_of(model.config, model.params, [ids])[0].astype(np.float64)
        for of in sums:
            p = np.exp(logits - logits.max(-1, keepdims=True))
            of.append(sum(float(np.log(p[i - 1, ids[i]] / p[i - 1].sum())) for i in scored))
            logits[:, list(model.template.stop_ids)] = -np.inf
    return Likelihoods(*sums)


@pytest.mark.parametrize(
    ("way", "template_name"),
    [("plain", "compact"), ("turn_based", "chatml"), ("duplex", "compact"), ("duplex", "chatml")],
)
def test_likelihoods_are_those_of_one_pass_for_each_choice(
    way: str, template_name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("duplex_jax.evaluate.benchmarks.likelihood._TOKENS_CPU", 512)  # several batches
    monkeypatch.setattr("duplex_jax.evaluate.benchmarks.likelihood._QUERY_CHUNK", 64)
    monkeypatch.setattr("duplex_jax.evaluate.benchmarks.likelihood._HEAD_CHUNK", 16)
    model = tiny_model(template_name)
    items = [*ITEMS[1:], Item("same same", ("same", "same same", "same"), 0)]
    encoded = [WAYS[way](model.template, item, "seed") for item in items]
    rows = [make_row(continuations) for continuations in encoded]
    found = dict(log_likelihoods(model.model, rows, model.template.stop_ids, 4096))
    assert sorted(found) == list(range(len(items)))
    for i, continuations in enumerate(encoded):
        expected = one_by_one(model, continuations)
        np.testing.assert_allclose(found[i].all, expected.all, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[i].words, expected.words, rtol=1e-4, atol=1e-4)
        assert len(found[i].all) == len(items[i].choices)
    assert found[3].all[0] == pytest.approx(found[3].all[2], abs=1e-4)


def test_lengths_are_padded_by_a_third_at_most():
    assert [padded_length(n) for n in (1, 64, 65, 96, 97, 129, 193, 4096)] == [64, 64, 96, 96, 128, 192, 256, 4096]


def marks(item: Item, said: list[float]) -> dict[str, float]:
    found = choice_marks(item._asdict(), [(x, False) for x in said])
    assert found.pop("too_long") == 0
    return found


def test_an_oracle_scores_all_and_a_constant_answer_its_base_rate():
    items = [Item("q", ("aa", "bb", "cc", "dd"), gold) for gold in (0, 0, 0, 1, 2, 2, 3, 3, 3, 3)]

    def scores(of: Callable[[Item], list[float]]) -> dict[str, float]:
        found = [marks(item, of(item)) for item in items]
        return {metric: sum(row[metric] for row in found) / len(found) for metric in METRICS}

    assert scores(lambda item: [float(c == item.gold) for c in range(4)]) == dict.fromkeys(METRICS, 1.0)
    assert scores(lambda item: [-1.0] * 4) == dict.fromkeys(METRICS, 0.3)
    for constant, rate in enumerate((0.3, 0.1, 0.2, 0.4)):
        found = scores(lambda item: [float(c == constant) for c in range(4)])  # noqa: B023
        assert found == dict.fromkeys(METRICS, rate)
    assert chance(Benchmark(TASKS["mmlu"], items, ""), 0) == 0.25
    assert chance(Benchmark(TASKS["mmlu"], ITEMS, ""), 0) == pytest.approx((1 / 4 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_length_is_measured_in_bytes():
    item = Item("q", ("aaaa", "éééé", "b"), 1)
    assert marks(item, [-5.0, -8.0, -2.0]) == dict(zip(METRICS, (0, 1, 0, 1), strict=True))
    assert marks(Item("q", ("a", "b", "c"), 1), [-2.0, -1.0, -1.0])["acc"] == 1  # the first of equals


def test_paired_differences():
    def right(*bits: int) -> dict[str, dict[str, bool]]:
        return {"": {str(n): bool(b) for n, b in enumerate(bits)}}

    row = difference(right(1, 1, 1, 0, 0), right(1, 0, 0, 1, 0))
    assert row is not None
    assert (row["points"], row["won"], row["lost"]) == (pytest.approx(20), 2, 1)
    assert -100 <= row["low"] < 20 < row["high"] <= 100
    other = difference(right(1, 0, 0, 1, 0), right(1, 1, 1, 0, 0))
    assert other is not None
    assert (other["low"], other["high"]) == (pytest.approx(-row["high"]), pytest.approx(-row["low"]))
    same = difference(right(*[1, 0] * 100), right(*[1, 0] * 100))
    assert same is not None
    assert same["points"] == 0
    assert -2 < same["low"] < 0 < same["high"] < 2  # never a point
    assert difference(right(1), {"": {"7": True}}) is None


def test_a_score_is_the_mean_of_subtasks():
    """A subtask of three questions counts as much as one of one; differences are of the same questions."""
    right = {"algebra": {"0": True, "1": False, "2": False}, "geometry": {"3": True}}
    assert mean(right)["value"] == pytest.approx((1 / 3 + 1) / 2)
    none = {name: dict.fromkeys(of, False) for name, of in right.items()}
    row = difference(right, none)
    assert row is not None
    assert row["points"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert (row["items"], row["won"], row["lost"]) == (4, 2, 0)
    many = {"algebra": {str(n): n % 2 == 0 for n in range(9)}}
    assert (mean(many)["low"], mean(many)["high"]) == pytest.approx(wilson(5, 9))  # of one subtask: a plain rate's


def test_the_interval_of_a_mean_over_subtasks():
    """Against many made-up models that are right in known shares of two subtasks: nineteen of twenty intervals hold the
    mean of the shares, and the difference of two models lies in its own as often. Where nothing is right the interval
    is as wide as for so many questions."""
    rng = np.random.default_rng(0)
    sizes = {"a": (40, 0.5), "b": (10, 0.3)}

    def model(more: float) -> dict[str, dict[str, bool]]:
        return {name: {f"{name}{n}": bool(rng.random() < p + more) for n in range(k)} for name, (k, p) in sizes.items()}

    held = apart = 0
    for _ in range(400):
        ours, theirs = model(0.0), model(0.2)
        found, row = mean(ours), difference(theirs, ours)
        assert found["low"] is not None
        assert found["high"] is not None
        assert row is not None
        held += found["low"] <= 0.4 <= found["high"]
        apart += row["low"] <= 20 <= row["high"]
    assert held >= 0.93 * 400
    assert apart >= 0.93 * 400
    none = mean(model(-1.0))
    expected = wilson(0, 2**2 / (1 / 40 + 1 / 10))
    assert expected is not None
    assert (none["low"], none["high"]) == (0.0, pytest.approx(expected[1]))


def test_the_interval_of_a_paired_difference_covers():
    """95% of the intervals hold the true difference of two correlated answers."""
    rng = np.random.default_rng(0)
    for p in ((0.4, 0.1, 0.05, 0.45), (0.9, 0.05, 0.02, 0.03), (0.2, 0.3, 0.1, 0.4)):
        found = [paired_difference(*map(int, rng.multinomial(200, p))) for _ in range(2000)]
        assert 0.93 < np.mean([low <= p[1] - p[2] <= high for _, low, high in found]) < 0.98
    with pytest.raises(ValueError, match="no trial"):
        paired_difference(0, 0, 0, 0)


@pytest.mark.slow
def test_likelihoods_are_those_of_transformers(smollm2: LoadedModel, shared: Path, tmp_path: Path):
    """Bare text is tokenised there as one string, and the chat template is the released one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_model(smollm2, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")

    def expected(ids: list[int], scored: list[int]) -> float:
        with torch.no_grad():
            log_p = torch.log_softmax(theirs(torch.tensor([ids])).logits[0].double(), -1)
        return sum(log_p[i - 1, ids[i]].item() for i in scored)

    on_device = jax.tree.map(jnp.asarray, smollm2.model)
    for task, way in itertools.product(("arc_easy", "hellaswag", "mmlu"), WAYS):
        benchmark = read_benchmark(task, shared / "data" / "benchmarks")
        items = [benchmark.items[n] for n in benchmark.chosen(1)]
        encoded = [WAYS[way](smollm2.template, item, "seed") for item in items]
        rows = [make_row(continuations) for continuations in encoded]
        found = dict(log_likelihoods(on_device, rows, smollm2.template.stop_ids, 4096))
        for i, item in enumerate(items):
            for choice, continuation, value in zip(item.choices, encoded[i], found[i].all, strict=True):
                ids, scored = continuation
                if way == "plain":
                    assert ids == tokenizer(f"{item.query} {choice}").input_ids
                elif way == "turn_based":
                    messages = [{"role": "user", "content": item.query}, {"role": "assistant", "content": choice}]
                    whole = tokenizer.apply_chat_template(messages, return_dict=False)
                    assert ids == whole[: len(ids)]
                    assert whole[len(ids)] == smollm2.template.end_id
                assert value == pytest.approx(expected(ids, scored), abs=1e-3)
