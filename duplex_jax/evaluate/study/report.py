"""What comes of a study: one JSON object, its tables, and figures like the paper's Figures 5 and 6."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from duplex_jax.evaluate import plots
from duplex_jax.evaluate.reports import Cell, Figure, Row, Section, Table, figure, share
from duplex_jax.evaluate.statistics import Bootstrap, Estimate, Sums
from duplex_jax.evaluate.study.plan import ASPECTS, HIGH, LOW, SYSTEMS
from duplex_jax.evaluate.study.store import Kept, Participant
from duplex_jax.files import atomic_write
from duplex_jax.timeline import Timeline, write_timelines

ABOUT = ("model", "mode", "template", "weights", "model_idle_bias")
SETTINGS = ("openings", "slice_seconds", "temperature", "top_p", "top_k", "max_tokens", "capacity")

_FEW = 2  # participants below which there is no interval


def describe(kept: Kept) -> dict[str, Any]:
    """Everything that a report says of a study; scores are those of participants who have confirmed theirs."""
    complete = [p for p in kept.participants if p.confirmed]
    return {
        "models": {s: {name: kept.setup.get(f"{name}_{s}") for name in ABOUT} for s in SYSTEMS},
        "settings": {name: kept.setup.get(name) for name in SETTINGS},
        "participants": {
            "complete": len(complete),
            "incomplete": len(kept.participants) - len(complete),
            "withdrawn": kept.withdrawn,
        },
        "aspects": {name: _compare(complete, name) for name in ASPECTS},
        "order": _orders(complete),
        "waiting": {s: _waiting(complete, s) for s in SYSTEMS},
        "comments": sum(bool(of.comment) for p in complete for of in p.scores.values()),
    }


def _compare(complete: Sequence[Participant], name: str) -> dict[str, Any]:
    """Both systems on one aspect, by the participant's two scores of it."""
    a, b = (np.array([p.scores[s].of[name] for p in complete], int) for s in SYSTEMS)
    scores = {s: _described(values) for s, values in zip(SYSTEMS, (a, b), strict=True)}
    return scores | {
        "difference": _mean([{"sum": float(d), "n": 1.0} for d in a - b]),
        "wins": {"a": int((a > b).sum()), "tie": int((a == b).sum()), "b": int((b > a).sum())},
        "wilcoxon": signed_ranks(a, b),
    }


def _described(values: np.ndarray) -> dict[str, Any]:
    counts = {str(n): int((values == n).sum()) for n in range(LOW, HIGH + 1)}
    return _mean([{"sum": float(v), "n": 1.0} for v in values]) | {"scores": counts}


def _mean_of(sums: Sums) -> Any:
    return sums["sum"] / sums["n"]


def _mean(items: Sequence[Mapping[str, float]]) -> Estimate:
    """A mean with its 95% bootstrap interval over participants, each with a `sum` of `n` values."""
    return Bootstrap(items).estimate(_mean_of)


def signed_ranks(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Wilcoxon's signed-rank test of two scores of the same participants, two-sided (Wilcoxon 1945).

    It is `scipy.stats.wilcoxon(a, b)` as it is by default: ties are dropped (`zero_method="wilcox"`), there is no
    continuity correction, and scipy chooses between the exact distribution and the normal approximation.

    Args:
        a: int `[N]`, one score for each participant.
        b: int `[N]`, the same participants'.

    Returns:
        `n`, how many did not tie; the `statistic`, the smaller one of both rank sums; and `p`. The latter two are None
        where all tied, and `note` says so.
    """
    differences = np.asarray(a) - np.asarray(b)
    n = int(np.count_nonzero(differences))
    if not n:
        note = "no participants" if not len(differences) else "all tied"
        return {"n": 0, "statistic": None, "p": None, "note": note}
    found = stats.wilcoxon(a, b)
    return {"n": n, "statistic": float(found.statistic), "p": float(found.pvalue), "note": None}


def _orders(complete: Sequence[Participant]) -> dict[str, Any]:
    """Means by which system came first, and by the label that it went under: a check of the counterbalancing."""
    ways = {
        "a first": [p for p in complete if p.plan.order[0] == "a"],
        "b first": [p for p in complete if p.plan.order[0] == "b"],
        "a as A": [p for p in complete if p.plan.labels["a"] == "A"],
        "a as B": [p for p in complete if p.plan.labels["a"] == "B"],
    }
    return {
        way: {"participants": len(some)}
        | {
            name: {s: float(np.mean([p.scores[s].of[name] for p in some])) if some else None for s in SYSTEMS}
            for name in ASPECTS
        }
        for way, some in ways.items()
    }


def latencies(timelines: Sequence[Timeline]) -> tuple[list[float], int]:
    """How long a participant waited for answers.

    A query is a run of slices in which the user speaks. Its latency is measured from the tick that takes its last slice
    to the first words that come from there on and before the user's next words; words that were under way already
    count, as 0 at least.

    Args:
        timelines: with the times of `Talk.kept`.

    Returns:
        Seconds, one for each query that was answered, and the number of queries.
    """
    found, queries = [], 0
    for timeline in timelines:
        users = [pair.user is not None for pair in timeline.pairs]
        ticks, firsts = timeline.meta["tick"], timeline.meta["first"]
        for i, speaks in enumerate(users):
            if not speaks or (i + 1 < len(users) and users[i + 1]):
                continue
            queries += 1
            until = next((j for j in range(i + 1, len(users)) if users[j]), len(users))
            first = next((firsts[j] for j in range(i, until) if firsts[j] is not None), None)
            if first is not None:
                found.append(max(0.0, first - ticks[i]))
    return found, queries


def _waiting(complete: Sequence[Participant], system: str) -> dict[str, Any]:
    """How long participants waited for answers, in finished conversations; see `latencies`."""
    conversations, queries, items = 0, 0, []
    for p in complete:
        talks = [c.timeline for c in p.conversations if c.finished and c.system == system]
        seconds, asked = latencies(talks)
        conversations, queries = conversations + len(talks), queries + asked
        items.append({"sum": sum(seconds), "n": float(len(seconds)), "asked": float(asked)})
    answered = Bootstrap(items).estimate(_answered)
    return {"conversations": conversations, "queries": queries, "answered": answered, "seconds": _mean(items)}


def _answered(sums: Sums) -> Any:
    return sums["n"] / sums["asked"]


def section(report: Mapping[str, Any]) -> Section:
    """Means, wins and the test in the layout of the paper's Table 3, then distributions, order and waiting."""
    people, names = report["participants"], {s: f"{s}: {of['model']}" for s, of in report["models"].items()}
    points = [str(n) for n in range(LOW, HIGH + 1)]
    aspects, scores = [], []
    for name, row in report["aspects"].items():
        test = row["wilcoxon"]
        p = Cell(test["note"]) if test["note"] else Cell(f"{test['p']:.4f}", test["p"])
        aspects.append(
            Row(
                name,
                {names[s]: figure(row[s]) for s in SYSTEMS}
                | {
                    "difference": figure(row["difference"], sign="+"),
                    "wins (a:tie:b)": Cell(":".join(map(str, row["wins"].values()))),
                    "n": Cell(str(test["n"]), test["n"]),
                    "statistic": figure({"value": test["statistic"]}, digits=1),
                    "p": p,
                },
                "high",
            )
        )
        scores += [
            Row(f"{name}, {s}", {n: Cell(str(row[s]["scores"][n]), row[s]["scores"][n]) for n in points})
            for s in SYSTEMS
        ]
    ways = {f"{way} ({of['participants']})": of for way, of in report["order"].items()}
    orders = [
        Row(f"{name}, {s}", {way: figure({"value": of[name][s]}) for way, of in ways.items()})
        for name in ASPECTS
        for s in SYSTEMS
    ]
    waiting = [
        Row(
            s,
            {
                "conversations": Cell(f"{of['conversations']}"),
                "queries": Cell(f"{of['queries']}"),
                "answered, %": share(of["answered"]),
                "seconds to the answer": figure(of["seconds"]),
            },
        )
        for s, of in report["waiting"].items()
    ]
    title = (
        "User study (the paper's Table 3): mean scores, 95% intervals, participants who prefer each, and Wilcoxon's "
        "signed-rank test, ties left out. Higher is better."
    )
    notes = [
        f"{people['complete']} participants complete, {people['incomplete']} incomplete, {people['withdrawn']} "
        f"withdrawn; scores of {LOW} to {HIGH}",
        *(f"{s} is {t}" for s, t in _legend(report).items()),
    ]
    notes += [f"no intervals: they need {_FEW} participants"] if people["complete"] < _FEW else []
    return Section(
        f"User study: {', '.join(names.values())}",
        [
            Table(title, "Metric", aspects, given=[name for name in aspects[0].cells if name not in names.values()]),
            Table("How often each score was given.", "Aspect", scores),
            Table("Means by order: a check of the counterbalancing.", "Aspect (participants)", orders),
            Table("Waiting for answers, in finished conversations.", "System", waiting),
        ],
        notes,
    )


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """As the paper's Figures 5 and 6: how often each score was given, and who gave which system the higher one."""
    whole = report["participants"]["complete"]
    if not whole or not plots.can_draw():
        return []
    legend, aspects = _legend(report), report["aspects"]
    panels = [
        plots.curves(
            {
                f"{legend[s]}: {row[s]['value']:.2f}": [(int(n), Cell("", k)) for n, k in row[s]["scores"].items()]
                for s in SYSTEMS
            },
            name.replace("_", "-"),
            "participants",
            whole=True,
        )
        for name, row in aspects.items()
    ]
    labels = {"a": f"{legend['a']} is higher", "tie": "tie", "b": f"{legend['b']} is higher"}
    wins = [
        Row(name.replace("_", "-"), {labels[side]: share({"value": n / whole}) for side, n in row["wins"].items()})
        for name, row in aspects.items()
    ]
    return [
        Figure("scores.png", plots.draw(panels, "How often each score was given, and its mean", (16, 4)), "scores"),
        Figure("wins.png", plots.draw([plots.bars(wins, list(labels.values()))], "Participants", (8, 5)), "wins"),
    ]


def _legend(report: Mapping[str, Any]) -> dict[str, str]:
    return {s: f"{of['model']}, {of['mode']}" for s, of in report["models"].items()}


def write_csv(kept: Kept, folder: Path) -> str:
    """Writes `scores.csv`: a line for each confirmed questionnaire; gives its name.

    Raises:
        UserError: the place cannot be written.
    """
    with atomic_write(folder / "scores.csv") as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow(["participant", "first", "system", "label", *ASPECTS, "comment"])
        for p in (p for p in kept.participants if p.confirmed):
            for s in SYSTEMS:
                of = p.scores[s]
                rows.writerow([p.number, p.plan.order[0], s, p.plan.labels[s], *of.of.values(), of.comment])
    return "scores.csv"


def write_conversations(kept: Kept, folder: Path) -> str:
    """Writes `conversations.jsonl`: everybody's conversations as timelines, the unfinished ones too; gives its name.

    Raises:
        UserError: the place cannot be written.
    """

    def timelines() -> Iterator[Any]:
        for p in kept.participants:
            for c in p.conversations:
                c.timeline.meta |= {
                    "participant": p.number,
                    "system": c.system,
                    "session": c.session,
                    "finished": c.finished,
                    "confirmed": p.confirmed,
                }
                yield c.timeline

    write_timelines(folder / "conversations.jsonl", timelines())
    return "conversations.jsonl"
