"""One page of several evaluations: its figures are those of the reports, in HTML and Markdown, and nothing is lost."""

import base64
import dataclasses
import html.parser
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from duplex_jax.errors import UserError
from duplex_jax.evaluate import behaviour_report, yardsticks
from duplex_jax.evaluate import behaviour_run as behaviour_runs
from duplex_jax.evaluate.benchmarks import report as benchmark_report
from duplex_jax.evaluate.benchmarks.harness_tasks import choice_marks
from duplex_jax.evaluate.benchmarks.questions import read_benchmark
from duplex_jax.evaluate.judge import report as judge_report
from duplex_jax.evaluate.judge import scores
from duplex_jax.evaluate.judge.judging import Verdict, verdicts_path, write_verdicts
from duplex_jax.evaluate.judge.tasks import TABLE_5
from duplex_jax.evaluate.pages import as_html, as_markdown, write_page
from duplex_jax.evaluate.reports import DASH, Cell, Row, Section, Table, as_text, publish
from duplex_jax.evaluate.study import report as study_report
from duplex_jax.evaluate.study.store import read
from duplex_jax.evaluate.summary import make_page, read_sources
from duplex_jax.timeline import Event, SlicePair, Timeline, write_timelines
from tests.evaluate.studies import all_of, make_up
from tests.launch.test_evaluate_behaviour import run

VERSIONS = {"python": "3.11.7", "duplex-jax": "0.1.0"}
EVIL = "<script>alert('x')</script>|`a`&amp;*b*"


def about(what: str, model: str, **more: Any) -> dict[str, Any]:
    command = f"duplex-jax evaluate {what} --model={model}"
    return {"what": what, "model": model, "weights": f"w-{model}", "command": command, "versions": VERSIONS} | more


class Parsed(html.parser.HTMLParser):
    """Tables as rows of texts, numbers behind figures, and whether every element is closed by its own end."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.values: list[float] = []
        self.warnings: list[str] = []
        self.warns = False
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "data":
            self.values.append(float(dict(attrs)["value"] or "nan"))
        elif tag == "p":
            self.warns = dict(attrs).get("class") == "warning"
            self.warnings += [""] if self.warns else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif self.open[-1:] == ["p"] and self.warns:
            self.warnings[-1] += data


def values_in(report: Any) -> Iterator[float]:
    """Every number in a JSON object."""
    if isinstance(report, Mapping):
        report = list(report.values())
    if isinstance(report, list):
        for part in report:
            yield from values_in(part)
    elif isinstance(report, int | float):
        yield float(report)


def likelihood(folder: Path, model: str, data: Path, right: set[int], **more: Any) -> Path:
    """A report of benchmarks by likelihood, where the answers to `right` are right."""
    of = read_benchmark("likelihood", "arc_easy", str(data))
    samples = []
    for n, item in enumerate(of.items):
        said = [-9.0 if (c == item.gold) != (n in right) else -1.0 for c in range(len(item.choices))]
        samples.append({"doc": {"number": n}} | choice_marks(item._asdict(), [(x, False) for x in said]))
    task = {"sha256": of.sha256, "items": 12, "chosen": 12, "chance": benchmark_report.chance(of, 0),
            "ways": {"turn_based": benchmark_report.describe("likelihood", of, samples)}}  # fmt: skip
    settings = about("benchmark", model, capacity=4096, template="compact") | more
    report = settings | {"tasks": {"arc_easy": task}, "beside": []}
    publish(report, benchmark_report.section(report), folder)
    return folder


@pytest.fixture
def items(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"query": f"Question: Is {i} odd?", "choices": ["yes", "no!"], "gold": 1 - i % 2} for i in range(12)]
    (folder / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def written(folder: Path, model: str, right: Mapping[str, list[bool]], sha256: str = "s") -> Path:
    """A report of benchmarks by generation."""
    tasks = {
        task: {"sha256": sha256, "items": 9, "chosen": len(of), "ways": {"duplex": {
            "score": {"value": sum(of) / len(of), "low": 0.1, "high": 0.9}, "subtasks": {}, "stopped": {"end": len(of)},
            "tokens": 7.0, "early": 0, "scored": len(of),
            "right": {"score": {"": {str(n): r for n, r in enumerate(of)}}}}}}
        for task, of in right.items()
    }  # fmt: skip
    report = about("generation", model, capacity=4096, seed=3, tasks=tasks, beside=[])
    publish(report, benchmark_report.section(report), folder)
    return folder


def judged(folder: Path, model: str, bonus: float, judge: str = "gpt-4") -> Path:
    """Verdicts and the report of them."""
    tasks, kept = {}, {}
    for task in ("mt_bench", *TABLE_5):
        found = [
            Verdict(n, t, ("math", "stem")[n % 2], 10 + n, 4.0 + n + t / 4 + bonus) for n in range(3) for t in (1, 2)
        ]
        kept[task] = found
        write_verdicts(verdicts_path(folder, task, "duplex"), found, {"judge": judge, "prompts": f"p-{task}"})
        row = scores.described(found) | {"answers": 6, "tokens": 60, "early_tokens": 0, "forgot": 0, "stopped": {}}
        tasks[task] = {"path": "q", "sha256": f"h-{task}", "questions": 3, "chosen": 3, "published": 80,
                       "ways": {"duplex": row}}  # fmt: skip
    averages = {"duplex": scores.mean_of_tasks({task: kept[task] for task in TABLE_5})}
    report = about("judge", model, capacity=4096, seed=0, temperature=0.8, tasks=tasks, averages=averages,
                   comparisons=[], judge={"model": judge, "versions": [], "prompts": {t: f"p-{t}" for t in tasks}},
                   not_comparable=["mt_bench has 3 of the published 80 questions"])  # fmt: skip
    publish(report, judge_report.section(report), folder)
    return folder


def behaved(folder: Path, model: str, held_out: Path, as_: str, **data: Any) -> Path:
    """A report of behaviour by one that needs no weights."""
    of = behaviour_runs.read_held_out(held_out)
    names = dict.fromkeys([model, "oracle", "always_idle", "always_talking"])
    described = {
        name: behaviour_report.describe(
            of, behaviour_runs.degenerate_counts(of, as_ if name == model else name, 2.0), 2.0
        )
        for name in names
    }
    report = about("behaviour", model, settings={"seeds": [0, 1], "idle_bias": 0.0, "slice_seconds": 2.0,
                                                      "model_idle_bias": -0.5 if model == "duplex" else None},
                   data={"path": str(held_out), "sha256": of.sha256, "conversations": 2, "scored": 2} | data,
                   beside=[], assistants=described, curve=[])  # fmt: skip
    publish(
        report, dataclasses.replace(behaviour_report.section(report), figures=behaviour_report.figures(report)), folder
    )
    return folder


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    pairs = [SlicePair("say", None), SlicePair("it?", " yes"), SlicePair("No.", None), SlicePair(None, " no")]
    events = [Event("query_end", 1), Event("barge_in", 2), Event("yield", 2), Event("query_end", 2)]
    write_timelines(tmp_path / "held.jsonl", [Timeline(pairs, f"t{i}", "basic", events=events) for i in range(2)])
    return tmp_path / "held.jsonl"


def studied(folder: Path) -> Path:
    """A study of two participants."""
    folder.mkdir(parents=True)
    make_up(folder / "study.db", [{"a": all_of(6), "b": all_of(3)}, {"a": all_of(5), "b": all_of(5)}])
    models = {"a": {"model": "ours", "mode": "duplex"}, "b": {"model": EVIL, "mode": "turn_based"}}
    report = {"what": "study", "command": "duplex-jax evaluate study report", "versions": VERSIONS}
    report |= study_report.describe(read(folder / "study.db")) | {"models": models}
    publish(report, dataclasses.replace(study_report.section(report), figures=study_report.figures(report)), folder)
    return folder


def test_yardsticks_are_shown(tmp_path: Path):
    """Every measure of both writings, and what is better where less of it is."""
    for model, rate in (("base", 0.25), ("duplex", 0.5)):
        figure = {"value": rate, "low": rate - 0.1, "high": rate + 0.1, "successes": 1, "trials": 4}
        measures = {w: {m[0]: figure for m in yardsticks.MEASURES} for w in yardsticks.WRITINGS}
        report = about("yardsticks", model, settings={"seeds": [0, 1]}, measures=measures,
                       data={"path": "p", "sha256": "s", "sentences": 9})  # fmt: skip
        publish(report, yardsticks.section(report), tmp_path / model)
    html_text, _, found = page_of(tmp_path / "base", tmp_path / "duplex")
    assert not found.warnings
    table = found.tables[0]
    assert table[0] == ["Figure", "base, as written", "base, bare", "duplex, as written", "duplex, bare"]
    assert [row[0].partition(":")[0] for row in table[1:]] == [m[0] for m in yardsticks.MEASURES]
    assert all(row[1:] == ["25.0 (15.0 to 35.0) of 4"] * 2 + ["50.0 (40.0 to 60.0) of 4"] * 2 for row in table[1:])
    best = re.findall(r'class="best"><data value="([\d.]+)"', html_text)
    assert best == [v for m in yardsticks.MEASURES for v in (["0.25"] if m[0] in yardsticks.LOW else ["0.5"]) * 2]


def page_of(*folders: Path) -> tuple[str, str, Parsed]:
    title, sections = make_page(read_sources([str(f) for f in folders]))
    text = as_html(title, sections)
    return text, as_markdown(title, sections), Parsed(text)


def test_figures_are_those_of_the_reports(tmp_path: Path, items: Path, held_out: Path):
    """Everything at once: each number on the page stands in a report, and the tables are the paper's."""
    a, b = tmp_path / "a", tmp_path / "b"
    folders = [
        likelihood(a / "likelihood", "base", items, {1, 2, 3}),
        likelihood(b / "likelihood", "duplex", items, {2, 3, 4, 5}),
        written(a / "generation", "base", {"gsm8k": [True, False, False], "ceval": [True, True]}),
        written(b / "generation", "duplex", {"gsm8k": [True, True, False], "ceval": [True, False]}),
        judged(a / "judge", "base", 0.0), judged(b / "judge", "duplex", 1.5),
        behaved(a / "behaviour", "base", held_out, "always_talking"),
        behaved(b / "behaviour", "duplex", held_out, "oracle"), studied(b / "study"),
    ]  # fmt: skip
    # The folders of both, or the folders in them: the same reports.
    assert {s.folder for s in read_sources([str(a), str(b)])} == set(folders)
    _, markdown, found = page_of(a, b)
    assert not found.warnings

    reports = [
        json.loads(path.read_text()) for f in folders for path in f.glob("*.json") if path.name != "settings.json"
    ]
    known = {v for report in reports for v in values_in(report)}
    tables = {table[0][0]: table for table in found.tables}
    differences = [t for t in found.tables if t[0][0] == "Figure" and t[0][1] == "of"]
    made = {float(n) for t in differences for row in t[1:] for n in re.findall(r"^[+-]?[\d.]+", row[3]) if n}
    _, sections = make_page(read_sources([str(a), str(b)]))
    ours = [c.value for s in sections for t in s.tables if "Paired" not in t.title for _, cells in t.lines()
            for c in cells if c.value is not None]  # fmt: skip
    assert len(ours) > 150
    assert set(ours) <= known
    assert set(ours) <= set(found.values)
    assert made  # what was asked of both was compared
    # Every one of a report's figures is there: of behaviour all, of the others those that the tables have.
    for report in (r for r in reports if r["what"] == "behaviour"):
        all_ = report["assistants"][report["model"]]["all"]
        assert {f["value"] for f in all_.values() if f["value"] is not None} <= set(ours)
    (generated, base_generated) = (r for r in reversed(reports) if r["what"] == "generation")
    row = next(r for t in found.tables for r in t if r[0] == "GSM8K")
    assert row[1:] == ["33.3 (10.0 to 90.0)", "66.7 (10.0 to 90.0)"]
    assert generated["tasks"]["gsm8k"]["ways"]["duplex"]["score"]["value"] == pytest.approx(2 / 3)
    assert base_generated["model"] == "base"

    # Table 4, 5, 3 and 2 as the paper has them, models in the order given.
    table4 = next(t for t in found.tables if [r[0] for r in t] == ["Score", "First turn", "Second turn", "Avg."])
    assert table4[0] == ["Score", "base, duplex", "duplex, duplex"]
    table5 = next(t for t in found.tables if t[-1][0] == "Avg." and t is not table4)
    assert [r[0] for r in table5[1:]] == ["Refinement-multi", "Expansion-multi", "Follow-up-multi", "Avg."]
    table3 = tables["Metric"]
    assert table3[0] == ["Metric", "a: ours", f"b: {EVIL}", "difference", "wins (a:tie:b)", "n", "statistic", "p"]
    assert table3[1] == ["responsiveness", "5.50 (5.00 to 6.00)", "4.00 (3.00 to 5.00)", "+1.50 (+0.00 to +3.00)",
                         "1:1:0", "1", "0.0", "1.0000"]  # fmt: skip
    names = [r[0] for r in next(t for t in found.tables if t[0][0] == "Benchmark")]
    assert names == ["Benchmark", "C-Eval", "GSM8K"]
    assert "oracle" in next(t for t in found.tables if t[1][0] == "forced_idle_precision")[0]

    # The paired differences by hand: 2 and 3 both, 1 lost, 4 and 5 won.
    likely = next(r for t in differences for r in t if r[0] == "ARC-e, acc")
    assert likely[1:4] == ["duplex, turn_based", "base, turn_based", "12"]
    assert likely[4].startswith("+8.3 (")
    assert likely[5] == "2:1"
    by_judge = next(r for t in differences for r in t if r[0] == "MT-Bench, score")
    assert by_judge[3:5] == ["6", "+1.50 (+1.50 to +1.50)"]
    assert next(r for t in differences for r in t if r[0] == "GSM8K, score")[5] == "1:0"

    # Where they come from.
    provenance = tables["No."]
    assert len(provenance) == 1 + len(reports)
    for source, row in zip(read_sources([str(a), str(b)]), provenance[1:], strict=True):
        assert row[0] == f"[{source.number}]"
        assert row[4] == source.report["command"]
        assert all(sha in row[6] for sha in source.hashes.values())
        assert "duplex-jax 0.1.0" in row[8]
        assert row[5] == {"behaviour": "0, 1", "generation": "3", "judge": "0"}.get(source.what, "-")
    targets = {attrs["id"] for tag, attrs in found.seen if tag == "tr" and "id" in attrs}
    links = {attrs["href"] for tag, attrs in found.seen if tag == "a"}
    assert links == {f"#{target}" for target in targets}
    assert len(targets) == len(reports)

    # The same in Markdown: every cell, line by line.
    plain = re.sub(r"\\(.)", r"\1", markdown).replace("**", "").replace("&lt;", "<").replace("&gt;", ">")
    plain = plain.replace("&amp;", "&")
    for table in found.tables:
        for row in table:
            assert f"| {' | '.join(row)} |" in plain


def test_html_is_whole_and_escaped(tmp_path: Path, held_out: Path):
    folders = [behaved(tmp_path / "a", EVIL, held_out, "oracle"), studied(tmp_path / "s")]
    html_text, markdown, found = page_of(*folders)
    assert "<script" not in html_text
    assert "<script" not in markdown
    assert EVIL in found.tables[0][0] or any(EVIL in " ".join(row) for table in found.tables for row in table)
    tags = [tag for tag, _ in found.seen]
    assert tags.count("caption") == tags.count("table") > 3
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in found.seen if tag == "th")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.seen
    assert "prefers-color-scheme: dark" in html_text
    # One file: nothing is fetched from anywhere.
    assert not {"link", "script", "iframe"} & set(tags)
    images = [attrs for tag, attrs in found.seen if tag == "img"]
    assert all((attrs["src"] or "").startswith("data:image/png;base64,") and attrs["alt"] for attrs in images)
    done = write_page(*make_page(read_sources([str(f) for f in folders])), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(done)
    assert re.findall(r"\]\(([^)]+)\)", markdown) == [name for name in done if name.endswith(".png")]
    if importlib.util.find_spec("matplotlib"):
        assert len(images) == len(done) - 2 >= 2
        first = base64.b64decode((images[0]["src"] or "").partition(",")[2])
        assert first == (tmp_path / "out" / done[2]).read_bytes()
        assert first.startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_flagged(tmp_path: Path, items: Path, held_out: Path):
    a = written(tmp_path / "a", "base", {"gsm8k": [True, False]})
    b = written(tmp_path / "b", "duplex", {"gsm8k": [True, True]}, sha256="other")
    _, markdown, found = page_of(a, b)
    assert set(found.warnings) == {'Not comparable: the data\'s sha256 of GSM8K is "s" in [1] and "other" in [2].'}
    assert "Not comparable: the data's sha256 of GSM8K" in markdown
    assert not any("won:lost" in table[0] for table in found.tables)
    assert not [attrs for tag, attrs in found.seen if attrs.get("class") == "best"]

    # Settings, numbers of items, another judge.
    c = likelihood(tmp_path / "c", "base", items, {1})
    d = likelihood(tmp_path / "d", "duplex", items, {2}, capacity=64)
    assert set(page_of(c, d)[2].warnings) == {"Not comparable: capacity is 4096 in [1] and 64 in [2]."}
    e, f = judged(tmp_path / "e", "base", 0.0), judged(tmp_path / "f", "duplex", 1.0, judge="other")
    found = page_of(e, f)[2]
    assert set(found.warnings) == {'Not comparable: the judge is "gpt-4" in [1] and "other" in [2].'}
    assert not any("won:lost" in table[0] for table in found.tables)
    g = behaved(tmp_path / "g", "base", held_out, "oracle")
    h = behaved(tmp_path / "h", "duplex", held_out, "oracle", scored=1)
    found = page_of(g, h)[2]
    assert set(found.warnings) == {"Not comparable: the number of conversations is 2 in [1] and 1 in [2]."}
    assert not any("always_idle" in table[0] for table in found.tables)  # whose data would they be on?


def test_behaviour_is_paired_by_conversation(tmp_path: Path, held_out: Path):
    """Assistants that need no weights: always talking is early in each query, the oracle in none."""
    folders = [behaved(tmp_path / name, name, held_out, name) for name in ("always_talking", "oracle")]
    _, _, found = page_of(*folders)
    (differences,) = (t for t in found.tables if t[0][-1] == "won:lost")
    rows = {row[0]: row[1:] for row in differences[1:]}
    early = {name: json.loads((tmp_path / name / "behaviour.json").read_text())["assistants"][name]["all"]["early_rate"]
             for name in ("always_talking", "oracle")}  # fmt: skip
    assert early["oracle"]["value"] == 0 < early["always_talking"]["value"]
    points = -100 * early["always_talking"]["value"]
    assert rows["early_rate"] == [
        "oracle",
        "always_talking",
        "2",
        f"{points:+.1f} ({points:+.1f} to {points:+.1f})",
        "-",
    ]
    held_out.write_text(held_out.read_text().replace("say", "tell"))
    html_text, _, found = page_of(*folders)
    assert not any("won:lost" in table[0] for table in found.tables)
    assert "holds other conversations by now" in html_text


def test_the_best_is_marked_where_there_is_one():
    def marked(better: str, *values: float | None, given: tuple[str, ...] = (), warnings: tuple[str, ...] = ()):
        row = Row("r", {f"c{i}": Cell("x", v) for i, v in enumerate(values)}, better)
        [(_, cells)] = Table("t", "f", [row], given, warnings=warnings).lines()
        return [c.best for c in cells]

    assert marked("high", 1.0, 3.0, None, 3.0) == [False, True, False, True]
    assert marked("low", 1.0, 3.0) == [True, False]
    assert marked("", 1.0, 3.0) == marked("high", 2.0, 2.0) == marked("high", 2.0, None) == [False, False]
    assert marked("high", 1.0, 2.0, 9.0, given=("c2",)) == [False, True, False]
    assert marked("high", 1.0, 2.0, warnings=("Not comparable",)) == [False, False]


def test_text_shows_what_the_table_has():
    """Given columns last, a dash where there is no figure, no row without any, long headers cut in front."""
    rows = [
        Row("first", {"oracle": Cell("1"), f"{'x' * 30}end": Cell("0.5")}),
        Row("gone", {}),
        Row("last", {"oracle": DASH}),
    ]
    text = as_text(Section("Title", [Table("Table.", "Figure", rows, ["oracle"]), Table("Empty.", "F", [])], ["note"]))
    lines = [line.split() for line in text.splitlines()]
    head = f"...{'x' * 22}end"
    assert lines == [
        ["Title"],
        ["note"],
        [],
        ["Table."],
        ["Figure", head, "oracle"],
        ["first", "0.5", "1"],
        ["last", "-", "-"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a/judge.json: no report of judged dialogue there (Expecting"),
        ("[]", "a/judge.json: no report of judged dialogue there"),
        ('{"what": "behaviour"}', "no report of judged dialogue there (its `what` is 'behaviour')"),
        ('{"what": "judge", "model": "m"}', "a/judge.json: lacks a field or has another thing"),
        ('{"what": "judge", "model": "m", "tasks": {"mt_bench": {"sha256": "s"}}}', "lacks a field"),
        ('{"what": "judge", "model": "m", "tasks": {"mt_bench": {"sha256": "s", "ways": {"duplex": {"score": 3}}}}}',
         "lacks a field"),
    ],
)  # fmt: skip
def test_files_that_are_no_reports(text: str, message: str, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "judge.json").write_text(text)
    with pytest.raises(UserError) as e:
        make_page(read_sources([str(tmp_path / "a")]))
    assert message in str(e.value)


def test_one_model_with_different_figures(tmp_path: Path):
    a = written(tmp_path / "a", "m", {"gsm8k": [True, False]})
    b = written(tmp_path / "b", "m", {"gsm8k": [True, True]})
    with pytest.raises(UserError, match=r"a/generation\.json and .*b/generation\.json: both have m, duplex"):
        page_of(a, b)
    # Other tasks of the same model are more of the same column, and the same figures are no conflict.
    c = written(tmp_path / "c", "m", {"math": [True, False], "gsm8k": [True, False]})
    assert page_of(a, c)[2].tables[0] == [
        ["Benchmark", "m, duplex"], ["GSM8K", "50.0 (10.0 to 90.0)"], ["MATH", "50.0 (10.0 to 90.0)"],
    ]  # fmt: skip


def test_the_program(tmp_path: Path):
    a = written(tmp_path / "a", "base", {"gsm8k": [True, False]})
    b = written(tmp_path / "b", "duplex", {"gsm8k": [True, True]}, sha256="other")
    found = run("report", str(a), str(b), f"--out={tmp_path / 'out'}")
    assert found.returncode == 0, found.stderr
    assert "Not comparable: the data's sha256 of GSM8K" in found.stdout
    assert "2 reports; wrote report.html, report.md" in found.stdout
    assert {"report.html", "report.md"} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs the folders of evaluations and --out=FOLDER"),
        (["none", "--out=OUT"], "none: no such folder"),
        (["EMPTY", "--out=OUT"], "holds no report (generation.json, benchmark.json"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    arguments = [a.replace("EMPTY", str(tmp_path / "empty")).replace("OUT", str(tmp_path / "out")) for a in arguments]
    found = run("report", *arguments)
    assert found.returncode == 2
    assert found.stderr.startswith("duplex-jax: ")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_twice(tmp_path: Path):
    a = written(tmp_path / "a", "m", {"gsm8k": [True]})
    with pytest.raises(UserError, match="is named twice"):
        read_sources([str(a), str(a)])
