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
from duplex_jax.evaluate.benchmarks import run as runs
from duplex_jax.evaluate.benchmarks.likelihood import Likelihoods, log_likelihoods, make_row, padded_length
from duplex_jax.evaluate.benchmarks.report import compare, describe
from duplex_jax.evaluate.benchmarks.scoring import METRICS, accuracies, answer, chance, differences, is_right
from duplex_jax.evaluate.benchmarks.tasks import TASKS, Item, read_benchmark
from duplex_jax.evaluate.benchmarks.ways import WAYS, Continuation, duplex_pairs
from duplex_jax.evaluate.statistics import paired_difference
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


def test_fewer_items_are_the_first_of_more(tmp_path: Path):
    write(tmp_path, "arc_easy", *[ROWS["arc_easy"]] * 50)
    benchmark = read_benchmark("arc_easy", tmp_path)
    assert sorted(benchmark.chosen()) == list(range(50))
    assert benchmark.chosen(7) == benchmark.chosen(20)[:7] != list(range(7))


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


def scores(items: list[Item], say: Callable[[int, Item], list[float]]) -> dict[str, Any]:
    found = [Likelihoods(say(n, item), say(n, item)) for n, item in enumerate(items)]
    return {
        m: r["value"] for m, r in accuracies([is_right(i, f) for i, f in zip(items, found, strict=True)]).items()
    }  # fmt: skip


def test_an_oracle_scores_all_and_a_constant_answer_its_base_rate():
    items = [Item("q", ("aa", "bb", "cc", "dd"), gold) for gold in (0, 0, 0, 1, 2, 2, 3, 3, 3, 3)]
    assert scores(items, lambda n, item: [float(c == item.gold) for c in range(4)]) == dict.fromkeys(METRICS, 1.0)
    assert scores(items, lambda n, item: [-1.0, -1.0, -1.0, -1.0]) == dict.fromkeys(METRICS, 0.3)
    for constant, rate in enumerate((0.3, 0.1, 0.2, 0.4)):
        found = scores(items, lambda n, item: [float(c == constant) for c in range(4)])  # noqa: B023
        assert found == dict.fromkeys(METRICS, rate)
    assert chance(items) == 0.25
    assert chance(ITEMS) == pytest.approx((1 / 4 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_length_is_measured_in_bytes():
    item = Item("q", ("aaaa", "éééé", "b"), 1)
    found = is_right(item, Likelihoods([-5.0, -8.0, -2.0], [-3.0, -8.0, -2.0]))
    assert found == {"acc": False, "acc_norm": True, "acc_words": False, "acc_norm_words": False}
    assert answer([-2.0, -1.0, -1.0]) == 1


def test_paired_differences():
    def right(*bits: int) -> list[dict[str, bool]]:
        return [dict.fromkeys(METRICS, bool(b)) for b in bits]

    row = differences(right(1, 1, 1, 0, 0), right(1, 0, 0, 1, 0))["acc"]
    assert (row["points"], row["won"], row["lost"]) == (pytest.approx(20), 2, 1)
    assert -100 <= row["low"] < 20 < row["high"] <= 100
    other = differences(right(1, 0, 0, 1, 0), right(1, 1, 1, 0, 0))["acc"]
    assert (other["low"], other["high"]) == (pytest.approx(-row["high"]), pytest.approx(-row["low"]))
    same = differences(right(*[1, 0] * 100), right(*[1, 0] * 100))["acc"]
    assert same["points"] == 0
    assert -2 < same["low"] < 0 < same["high"] < 2  # never a point


def test_the_interval_of_a_paired_difference_covers():
    """95% of the intervals hold the true difference of two correlated answers."""
    rng = np.random.default_rng(0)
    for p in ((0.4, 0.1, 0.05, 0.45), (0.9, 0.05, 0.02, 0.03), (0.2, 0.3, 0.1, 0.4)):
        found = [paired_difference(*map(int, rng.multinomial(200, p))) for _ in range(2000)]
        assert 0.93 < np.mean([low <= p[1] - p[2] <= high for _, low, high in found]) < 0.98
    with pytest.raises(ValueError, match="no trial"):
        paired_difference(0, 0, 0, 0)


def test_what_was_asked_is_not_asked_again(tmp_path: Path):
    write(tmp_path / "data", "arc_easy", *[ROWS["arc_easy"] | {"query": f"Why {i}?"} for i in range(6)])
    model, benchmarks = tiny_model(), {"arc_easy": read_benchmark("arc_easy", tmp_path / "data")}
    fed: list[int] = []

    def ask(limit: int, ways: tuple[str, ...] = ("turn_based", "duplex"), of: LoadedModel = model) -> Any:
        fed.clear()
        return runs.ask(of, benchmarks, ways, limit, 4096, tmp_path / "out", lambda n: fed.append)

    first = ask(2)
    assert len(fed) == 4
    more = ask(5)
    assert len(fed) == 6
    assert {way: len(a) for (_, way), a in more.items()} == {"turn_based": 5, "duplex": 5}
    assert all(more[key][n] == a for key, answers in first.items() for n, a in answers.items())
    path = runs.records_path(tmp_path / "out", "arc_easy", "duplex")
    kept = path.read_bytes()
    path.write_bytes(kept[:-9])  # killed while it wrote
    assert ask(5) == more
    assert len(fed) == 1
    assert sorted(path.read_bytes().splitlines()) == sorted(kept.splitlines())
    assert ask(5) == more
    assert not fed

    settings = {"model": "tiny", "weights": "w"}
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    beside, theirs = runs.read_beside(tmp_path / "out", benchmarks)
    assert beside == settings | {"folder": str(tmp_path / "out")}
    rows = compare(benchmarks, {("arc_easy", "duplex"): more["arc_easy", "duplex"]}, theirs)
    assert [(r["way"], r["other_way"], r["items"]) for r in rows] == [
        ("duplex", "duplex", 5), ("duplex", "turn_based", 5)
    ]  # fmt: skip
    assert rows[0]["acc"]["points"] == 0

    write(tmp_path / "data", "arc_easy", ROWS["arc_easy"])
    benchmarks["arc_easy"] = read_benchmark("arc_easy", tmp_path / "data")
    with pytest.raises(UserError, match="holds results with items=6, and now it is 1"):
        ask(1)
    with pytest.raises(UserError, match="was measured on other items"):
        runs.read_beside(tmp_path / "out", benchmarks)


def test_items_that_are_too_long_are_left_out_and_counted(tmp_path: Path):
    write(tmp_path / "data", "arc_easy", ROWS["arc_easy"], ROWS["arc_easy"] | {"query": "Why? " * 50})
    benchmarks = {"arc_easy": read_benchmark("arc_easy", tmp_path / "data")}
    found = runs.ask(tiny_model(), benchmarks, ["plain"], 0, 128, tmp_path / "out", lambda n: lambda k: None)
    assert found["arc_easy", "plain"][1] is None
    row = describe(benchmarks, found, 0)["arc_easy"]["ways"]["plain"]
    assert (row["scored"], row["too_long"]) == (1, 1)


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
