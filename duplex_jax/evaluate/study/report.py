"""What comes of a study: one JSON object, a table for a terminal, and figures like the paper's Figures 5 and 6."""

import csv
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from duplex_jax.evaluate.reports import columns, interval, pyplot, save_figure, share, write
from duplex_jax.evaluate.statistics import Bootstrap, Sums, value_of
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
        "models": {
            s: {name: kept.setup.get(f"{name}_{s}") for name in ABOUT}
            for s in SYSTEMS
        },
        "settings": {name: kept.setup.get(name) for name in SETTINGS},
        "participants": {
            "complete": len(complete), "incomplete": len(kept.participants) - len(complete),
            "withdrawn": kept.withdrawn,
        },
        "aspects": {name: _compare(complete, name) for name in ASPECTS},
        "order": _orders(complete),
        "waiting": {s: _waiting(complete, s) for s in SYSTEMS},
        "comments": sum(bool(of.comment) for p in complete for of in p.scores.values()),
    }  # fmt: skip


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


def _mean(items: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """A mean with its 95% bootstrap interval over participants, each with a `sum` of `n` values."""
    total = {name: sum(item[name] for item in items) for name in ("sum", "n")}
    low, high = Bootstrap(items).interval(_mean_of) or (None, None)
    return {"value": value_of(_mean_of, total), "low": low, "high": high}


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
    bounds = Bootstrap(items).interval(_answered) or (None, None)
    total = {name: sum(item[name] for item in items) for name in ("sum", "n", "asked")}
    rate = {"value": value_of(_answered, total), "low": bounds[0], "high": bounds[1]}
    return {"conversations": conversations, "queries": queries, "answered": rate, "seconds": _mean(items)}


def _answered(sums: Sums) -> Any:
    return sums["n"] / sums["asked"]


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text: means, wins and the test, then distributions, order and waiting."""
    people = report["participants"]
    lines = [f"{people['complete']} participants complete, {people['incomplete']} incomplete, {people['withdrawn']} "
             f"withdrawn; scores of {LOW} to {HIGH}, 95% intervals", ""]  # fmt: skip
    lines += [f"{s} is {m['model']}, {m['mode']}" for s, m in report["models"].items()]
    rows = [["aspect", "a", "b", "a less b", "a wins", "ties", "b wins", "n", "statistic", "p"]]
    for name, row in report["aspects"].items():
        test, wins = row["wilcoxon"], row["wins"]
        tested = [test["note"], ""] if test["note"] else [f"{test['statistic']:g}", f"{test['p']:.4f}"]
        means = [interval(row["a"]), interval(row["b"]), interval(row["difference"], sign="+")]
        rows.append([name, *means, *(str(wins[w]) for w in ("a", "tie", "b")), str(test["n"]), *tested])
    lines += ["", *columns(rows), "(n, statistic and p: Wilcoxon's signed-rank test, ties left out)"]
    points = [str(n) for n in range(LOW, HIGH + 1)]
    rows = [["scores", "", *points]]
    for name, row in report["aspects"].items():
        rows += [[name if s == "a" else "", s, *(str(row[s]["scores"][n]) for n in points)] for s in SYSTEMS]
    lines += ["", *columns(rows)]
    orders = report["order"]
    rows = [["means by order", *(f"{way} ({of['participants']})" for way, of in orders.items())]]
    for name in ASPECTS:
        cells = [" and ".join("-" if of[name][s] is None else f"{of[name][s]:.2f}" for s in SYSTEMS)
                 for of in orders.values()]  # fmt: skip
        rows.append([name, *cells])
    lines += ["", *columns(rows), "(of a and of b)"]
    rows = [["waiting", "conversations", "queries", "answered %", "seconds to the answer"]]
    for s, of in report["waiting"].items():
        rows.append([s, str(of["conversations"]), str(of["queries"]), share(of["answered"]), interval(of["seconds"])])
    lines += ["", *columns(rows)]
    if people["complete"] < _FEW:
        lines += ["", f"no intervals: they need {_FEW} participants"]
    return lines


def write_report(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes `study.json`, `study.txt` and, where matplotlib is, the figures; gives what was written.

    Raises:
        UserError: the place cannot be written.
    """
    written = write(report, table(report), folder)
    if importlib.util.find_spec("matplotlib") is not None and report["participants"]["complete"]:
        _plot_scores(report, folder / "scores.png")
        _plot_wins(report, folder / "wins.png")
        written += ["scores.png", "wins.png"]
    return written


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
                c.timeline.meta |= {"participant": p.number, "system": c.system, "session": c.session,
                                    "finished": c.finished, "confirmed": p.confirmed}  # fmt: skip
                yield c.timeline

    write_timelines(folder / "conversations.jsonl", timelines())
    return "conversations.jsonl"


def _legend(report: Mapping[str, Any]) -> dict[str, str]:
    return {s: f"{m['model']}, {m['mode']}" for s, m in report["models"].items()}


def _title(name: str) -> str:
    return name.replace("_", "-")


def _plot_scores(report: Mapping[str, Any], path: Path) -> None:
    """How often each score was given, one panel an aspect; a dashed line is the mean (as the paper's Figure 5)."""
    figure, axes = pyplot().subplots(1, len(ASPECTS), figsize=(14, 3.4), sharey=True, layout="constrained")
    for ax, (name, row) in zip(axes, report["aspects"].items(), strict=True):
        for number, (s, label) in enumerate(_legend(report).items()):
            counts = row[s]["scores"]
            places = [int(n) + 0.4 * (number - 0.5) for n in counts]
            ax.bar(places, list(counts.values()), 0.4, color=f"C{number}", label=label)
            ax.axvline(row[s]["value"], color=f"C{number}", linestyle="--", linewidth=1)
        ax.set(title=_title(name), xlabel="score", xticks=range(LOW, HIGH + 1))
    axes[0].set_ylabel("participants")
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


def _plot_wins(report: Mapping[str, Any], path: Path) -> None:
    """Participants who gave one system the higher score, or both the same (as the paper's Figure 6)."""
    figure, ax = pyplot().subplots(figsize=(8, 3.6), layout="constrained")
    names = _legend(report)
    left = np.zeros(len(ASPECTS))
    for side, color, label in (("a", "C0", f"{names['a']} is higher"), ("tie", "0.75", "tie"),
                               ("b", "C1", f"{names['b']} is higher")):  # fmt: skip
        counts = np.array([row["wins"][side] for row in report["aspects"].values()])
        shares = 100 * counts / report["participants"]["complete"]
        bars = ax.barh([_title(n) for n in ASPECTS], shares, left=left, color=color, label=label)
        ax.bar_label(bars, [str(n) if n else "" for n in counts], label_type="center")
        left += shares
    ax.invert_yaxis()
    ax.set(xlabel="% of participants", xlim=(0, 100))
    figure.legend(loc="outside lower center", ncols=1)
    save_figure(figure, path)
