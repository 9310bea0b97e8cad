"""What is made of behaviour's counts: one JSON object, a table for a terminal, and plots."""

import collections
import importlib.util
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour import (
    BY_NAME,
    METRICS,
    Counts,
    add,
    complete,
    histogram,
    rounds,
    situation_accuracy,
    summarise,
)
from duplex_jax.evaluate.behaviour_run import HeldOut
from duplex_jax.evaluate.reports import of_unit, pyplot, save_figure, write
from duplex_jax.evaluate.statistics import value_of

BY_CATEGORY = (
    "free_macro_f1", "early_rate", "response_within_1", "yield_within_1", "goes_on_rate", "quiet_3_rate",
    "resume_rate",
)  # fmt: skip
CURVE = (
    "forced_macro_f1", "forced_missed_rate", "free_macro_f1", "early_rate", "response_rate", "response_within_1",
    "response_latency", "yield_within_1", "goes_on_rate", "quiet_3_rate", "talk_share",
)  # fmt: skip


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
    total = complete(add([c for seeds in counts.values() for c in seeds]))
    by_seed = []
    for seed in range(n_seeds):
        one = complete(add([seeds[seed] for seeds in counts.values()]))
        by_seed.append(
            {m.name: value_of(m.of, one) for m in METRICS if not m.name.startswith("forced_")}
        )  # fmt: skip
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


def read_beside(folder: str | Path, sha256: str) -> tuple[str, dict[str, Any]]:
    """The name and the description of the model in another run's report.

    Raises:
        UserError: no report there, or one on other data.
    """
    path = Path(folder) / "behaviour.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        name = report["model"]
        described = report["assistants"][name]
        if not all(m.name in described["all"] for m in METRICS):
            raise KeyError("metrics")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: no report of behaviour there ({e}); give the --out of another run") from e
    if report["data"]["sha256"] != sha256:
        raise UserError(f"{path}: was measured on other data; run it on the same --data")
    return name, described


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text: every metric for every assistant, then the model by category, round and bias."""
    assistants = report["assistants"]
    name = report["model"]
    data = report["data"]
    cells = {
        metric.name: [of_unit(d["all"][metric.name], number == 0 or a in report["beside"])
                      for number, (a, d) in enumerate(assistants.items())]
        for metric in METRICS
    }  # fmt: skip
    headers = [a if len(a) <= 28 else "..." + a[-25:] for a in assistants]
    widths = [max(len(h), *(len(row[i]) for row in cells.values())) for i, h in enumerate(headers)]
    first = max(len(m.name) for m in METRICS) + 4
    lines = [
        f"{data['scored']} conversations of {data['conversations']}, {len(report['settings']['seeds'])} seeds, "
        f"{report['settings']['slice_seconds']:g} s a slice; 95% intervals",
        "",
        " " * first + "  ".join(h.ljust(w) for h, w in zip(headers, widths, strict=True)).rstrip(),
    ]
    for group, metrics in itertools.groupby(METRICS, key=lambda m: m.group):
        lines.append(group)
        for metric in metrics:
            row = "  ".join(c.ljust(w) for c, w in zip(cells[metric.name], widths, strict=True))
            lines.append(f"  {metric.name:{first - 2}}{row}".rstrip())
    described = assistants[name]
    lines += ["", *_grid("by category", BY_CATEGORY, described["by_category"])]
    situations = described["by_situation"]
    if situations:
        lines += ["", "forced decisions that are right, by situation"]
        lines += [
            f"  {s:{first - 2}}{100 * v['value']:.1f}% of {v['decisions']:,.0f}" for s, v in situations.items()
        ]  # fmt: skip
    if described["by_round"]:
        lines += ["", f"{'by round':10}{'queries':>9}{'early':>9}{'within 1':>10}{'clean':>9}"]
        for row in described["by_round"]:
            early, within, clean = (100 * row[name]["value"] for name in ("early", "answered_within_1", "clean"))
            lines.append(f"{row['round']:<10}{row['queries']:>9,.0f}{early:>8.1f}%{within:>9.1f}%{clean:>8.1f}%")
    if len(report["curve"]) > 1:
        lines += ["", *_grid("by idle_bias", CURVE, {f"{p['idle_bias']:+g}": p for p in report["curve"]})]
    return lines


def _grid(title: str, names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    first = max(len(title), *(len(r) for r in rows)) + 2
    lines = [f"{title:{first}}" + "  ".join(names)]
    for label, row in rows.items():
        lines.append(
            f"{label:{first}}" + "  ".join(of_unit(row[n], False).rjust(len(n)) for n in names)
        )  # fmt: skip
    return lines


def write_report(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes `behaviour.json`, `behaviour.txt` and, where matplotlib is, the plots; gives what was written.

    Raises:
        UserError: the place cannot be written.
    """
    written = write(report, table(report), folder)
    if importlib.util.find_spec("matplotlib") is not None:
        _plot_behaviour(report, folder / "behaviour.png")
        written.append("behaviour.png")
        if len(report["curve"]) > 1:
            _plot_curve(report, folder / "tradeoff.png")
            written.append("tradeoff.png")
    return written


_BARS = (
    "free_macro_f1", "forced_macro_f1", "early_rate", "response_within_1", "clean_rate", "yield_within_1",
    "reply_per_interruption", "goes_on_rate", "quiet_3_rate", "resume_rate",
)  # fmt: skip


def _errors(rows: Sequence[Mapping[str, Any]], scale: float = 1.0) -> list[list[float]]:
    """How far the interval reaches below and above each value."""
    return [
        [scale * max(0.0, r["value"] - (r["value"] if r["low"] is None else r["low"])) for r in rows],
        [scale * max(0.0, (r["value"] if r["high"] is None else r["high"]) - r["value"]) for r in rows],
    ]


def _plot_behaviour(report: Mapping[str, Any], path: Path) -> None:
    """Rates of all assistants side by side; the model's latencies, and its rates by round."""
    plt = pyplot()
    figure, axes = plt.subplot_mosaic([["rates", "rates"], ["slices", "rounds"]], figsize=(11, 8), layout="constrained")
    shown = dict(report["assistants"])
    height = 0.8 / len(shown)
    for number, (name, described) in enumerate(shown.items()):
        places = [(i, described["all"][m]) for i, m in enumerate(_BARS) if described["all"][m]["value"] is not None]
        rows = [row for _, row in places]
        axes["rates"].barh(
            [i + (number - (len(shown) - 1) / 2) * height for i, _ in places],
            [100 * row["value"] for row in rows], height, label=name, xerr=_errors(rows, 100),
            error_kw={"elinewidth": 1},
        )  # fmt: skip
    axes["rates"].set_yticks(
        range(len(_BARS)), [f"{m}{' (low is good)' * (BY_NAME[m].better == 'low')}" for m in _BARS]
    )
    axes["rates"].invert_yaxis()
    axes["rates"].set(xlabel="%", xlim=(0, 100))
    axes["rates"].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    described = shown[report["model"]]
    for name, text in (("latency", "response"), ("yield", "yield"), ("quiet_run", "silence after 'be quiet'")):
        counts = {int(slices): n for slices, n in described["slices"][name].items()}
        whole = sum(counts.values())
        if whole:
            axes["slices"].plot(counts.keys(), [100 * n / whole for n in counts.values()], marker="o", label=text)
    axes["slices"].set(xlabel="slices", ylabel="% of events")
    for name in ("slices", "rounds"):
        axes[name].xaxis.get_major_locator().set_params(integer=True)
    if axes["slices"].lines:
        axes["slices"].legend(fontsize="small")
    for name in ("clean", "answered_within_1", "early"):
        rows = described["by_round"]
        values = [row[name] for row in rows]
        if rows:
            axes["rounds"].errorbar(
                [row["round"] for row in rows], [100 * v["value"] for v in values], _errors(values, 100),
                marker="o", capsize=2, label=name,
            )  # fmt: skip
    axes["rounds"].set(xlabel="round of the conversation", ylabel="% of queries", ylim=(-3, 103))
    if described["by_round"]:
        axes["rounds"].legend(fontsize="small")
    figure.suptitle(f"{report['model']}: {report['data']['scored']} conversations")
    save_figure(figure, path)


def _plot_curve(report: Mapping[str, Any], path: Path) -> None:
    """Eager against patient: each idle_bias is a point."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    points = sorted(report["curve"], key=lambda p: p["idle_bias"])
    drawn = [p for p in points if p["early_rate"]["value"] is not None and p["response_within_1"]["value"] is not None]
    late = [
        {"value": 1 - p["response_within_1"]["value"], "low": 1 - p["response_within_1"]["high"],
         "high": 1 - p["response_within_1"]["low"]} for p in drawn
    ]  # fmt: skip
    early = [p["early_rate"] for p in drawn]
    axes[0].errorbar(
        [100 * r["value"] for r in early], [100 * r["value"] for r in late], _errors(late, 100), _errors(early, 100),
        marker="o", capsize=2,
    )  # fmt: skip
    for p, x, y in zip(drawn, early, late, strict=True):
        axes[0].annotate(
            f"{p['idle_bias']:+g}", (100 * x["value"], 100 * y["value"]), xytext=(4, 4), textcoords="offset points"
        )  # fmt: skip
    axes[0].set(xlabel="early answers, % of queries", ylabel="no answer within 1 slice, % of queries")
    for name in ("free_macro_f1", "forced_macro_f1", "yield_within_1", "goes_on_rate", "quiet_3_rate"):
        there = [p for p in points if p[name]["value"] is not None]
        if there:
            axes[1].plot(
                [p["idle_bias"] for p in there], [100 * p[name]["value"] for p in there], marker="o", label=name
            )  # fmt: skip
    axes[1].set(xlabel="idle_bias", ylabel="%", ylim=(-3, 103))
    axes[1].legend(fontsize="small")
    figure.suptitle(f"{report['model']}: eager to patient")
    save_figure(figure, path)
