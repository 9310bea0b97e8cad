"""What is made of behaviour's counts: one JSON object, its tables, and plots."""

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from duplex_jax.evaluate import plots
from duplex_jax.evaluate.behaviour import DEGENERATE, SITUATIONS, Counts
from duplex_jax.evaluate.behaviour_metrics import (
    BY_NAME,
    METRICS,
    ROUNDS,
    differences,
    histogram,
    rounds,
    situation_accuracy,
    summarise,
)
from duplex_jax.evaluate.behaviour_run import HeldOut
from duplex_jax.evaluate.reports import Cell, Figure, Row, Section, Table, difference, difference_table, of_unit, share
from duplex_jax.evaluate.statistics import add, value_of

GLANCE = [
    "free_macro_f1",
    "forced_macro_f1",
    "early_rate",
    "response_within_1",
    "clean_rate",
    "yield_within_1",
    "reply_per_interruption",
    "goes_on_rate",
    "quiet_3_rate",
    "resume_rate",
]
CURVE = [
    "forced_macro_f1",
    "forced_missed_rate",
    "free_macro_f1",
    "early_rate",
    "response_rate",
    "response_within_1",
    "response_latency",
    "yield_within_1",
    "goes_on_rate",
    "quiet_3_rate",
    "talk_share",
]


def describe(data: HeldOut, counts: Mapping[int, Sequence[Counts]], slice_seconds: float) -> dict[str, Any]:
    """Everything about one assistant, as it stands in the report: see docs/behaviour.md.

    Args:
        data: what was scored.
        counts: by conversation, one for each seed.
        slice_seconds: k.
    """
    by_category: dict[str, list[Sequence[Counts]]] = collections.defaultdict(list)
    for number, seeds in counts.items():
        by_category[data.category(number)].append(seeds)
    n_seeds = max(map(len, counts.values()))
    total = add(c for seeds in counts.values() for c in seeds)
    by_seed = []
    for seed in range(n_seeds):
        one = add(seeds[seed] for seeds in counts.values())
        by_seed.append({m.name: value_of(m.of, one) for m in METRICS if not m.name.startswith("forced_")})
    return {
        "all": summarise(list(counts.values()), slice_seconds),
        "by_category": {name: summarise(by_category[name], slice_seconds) for name in sorted(by_category)},
        "by_seed": by_seed,
        "by_round": rounds(total, n_seeds),
        "by_situation": situation_accuracy(total),
        "slices": {name: histogram(total, name) for name in ("latency", "yield", "quiet_run")},
    }


def curve_point(idle_bias: float, seeds: int, described: Mapping[str, Any]) -> dict[str, Any]:
    """One point of the trade-off between eager and patient."""
    return {"idle_bias": idle_bias, "seeds": seeds} | {name: described["all"][name] for name in CURVE}


def section(report: Mapping[str, Any]) -> Section:
    """Every figure of every assistant, then the model by situation, category, round and bias."""
    model, data = report["model"], report["data"]
    shown = [model, *report["beside"], *(name for name in DEGENERATE if name not in (model, *report["beside"]))]
    assistants = {name: report["assistants"][name] for name in shown if name in report["assistants"]}

    def row(name: str, drawn: bool = False) -> Row:
        cells = {a: of_unit(of["all"][name]) for a, of in assistants.items() if name in of["all"]}
        return Row(name, cells, BY_NAME[name].better, drawn)

    def grid(title: str, first: str, names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Table:
        cells = {of: {name: of_unit(found[name], False) for name in names} for of, found in rows.items()}
        return Table(f"{model}: {title}.", first, [Row(of, found) for of, found in cells.items()])

    given = [name for name in DEGENERATE if name != model]
    found = [Table("Behaviour at a glance, 95% intervals.", "Figure", [row(name, True) for name in GLANCE], given)]
    for group, metrics in itertools.groupby(METRICS, key=lambda m: m.group):
        rows = [row(m.name) for m in metrics if m.name not in GLANCE]
        title = f"Behaviour, {group}: 95% intervals; docs/behaviour.md says what each figure is."
        found.append(Table(title, "Figure", rows, given))
    own = assistants[model]
    right = [
        Row(f"{name}: {SITUATIONS[name]}", {model: share(of, of["decisions"])})
        for name, of in own["by_situation"].items()
    ]
    found.append(Table("Forced decisions that are right, in %.", "Situation", right))
    found.append(grid("by category", "Category", GLANCE, own["by_category"]))
    by_round = [
        Row(str(of["round"]), {name: share(of[name]) for name in ROUNDS} | {"queries": Cell(f"{of['queries']:,.0f}")})
        for of in own["by_round"]
    ]
    found.append(Table(f"{model}: by round of the conversation, in %.", "Round", by_round))
    if len(report["curve"]) > 1:
        found.append(grid("by idle_bias", "Bias", CURVE, {f"{p['idle_bias']:+g}": p for p in report["curve"]}))
    settings = report["settings"]
    note = (
        f"{data['scored']} conversations of {data['conversations']}, {len(settings['seeds'])} seeds, "
        f"{settings['slice_seconds']:g} s a slice"
    )
    notes = [note] + (
        [f"{data['without_events']} conversations have no events: only their forced decisions count"]
        if data.get("without_events")
        else []
    )
    return Section("Behaviour", found, notes)


def compared(
    ours: str, theirs: str, a: Mapping[int, Sequence[Counts]], b: Mapping[int, Sequence[Counts]]
) -> list[Table]:
    """Paired differences of two models on the conversations that both replayed, given their counts.

    Args:
        ours, theirs: their names.
        a, b: their counts by number of the conversation.
    """
    both = len(a.keys() & b.keys())
    rows = [
        difference(name, ours, theirs, both, of_unit(row | {"unit": BY_NAME[name].unit}, sign="+", unit=""), row)
        for name, row in (differences(a, b) if both else {}).items()
    ]
    return difference_table("of behaviour on the same conversations, shares in points, by drawing conversations", rows)


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """Rates of all assistants, the model's latencies and rounds, and how eager stands against patient."""
    if not plots.can_draw():
        return []
    model = report["model"]
    glance, own = section(report).tables[0], report["assistants"][model]
    texts = {"latency": "response", "yield": "yield", "quiet_run": "silence after 'be quiet'"}
    slices = {
        texts[name]: [(int(n), share({"value": count / sum(counts.values())})) for n, count in counts.items()]
        for name, counts in own["slices"].items()
        if counts
    }
    by_round = {name: [(of["round"], share(of[name])) for of in own["by_round"]] for name in ROUNDS}
    panels = [
        plots.bars(glance.rows, glance.columns),
        plots.curves(slices, "slices", "% of events", whole=True),
        plots.curves(by_round, "round of the conversation", "% of queries", whole=True),
    ]
    title = f"{model}: {report['data']['scored']} conversations"
    found = [Figure("behaviour.png", plots.draw(panels, title, (20, 7)), title)]
    if len(report["curve"]) > 1:
        points = sorted(report["curve"], key=lambda p: p["idle_bias"])
        early = [share(p["early_rate"]) for p in points]
        prompt = [share(p["response_within_1"]) for p in points]
        trade = [(x, y) for x, y in zip(early, prompt, strict=True) if x.value is not None]
        names = ("free_macro_f1", "forced_macro_f1", "yield_within_1", "goes_on_rate", "quiet_3_rate")
        panels = [
            plots.curves({"one point a bias": trade}, "early answers, % of queries", "answered within 1 slice, %"),
            plots.curves({n: [(p["idle_bias"], share(p[n])) for p in points] for n in names}, "idle_bias", "%"),
        ]
        found.append(Figure("tradeoff.png", plots.draw(panels, f"{model}: eager to patient", (11, 5)), "tradeoff"))
    return found
