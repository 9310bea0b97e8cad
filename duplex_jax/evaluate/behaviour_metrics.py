"""Behaviour, measured: figures made of the counts of `behaviour`, each with formula and source.

Sources, by the names used below:
    tau-voice          Ray et al. 2026, arXiv 2603.13686, section "voice interaction quality"
    Full-Duplex-Bench  Lin et al. 2025, arXiv 2503.04721 (v1) and 2507.23159 (v1.5)
    FD-Bench           Peng et al. 2025, arXiv 2507.19040
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duplex_jax.evaluate.behaviour import SITUATIONS, Counts
from duplex_jax.evaluate.statistics import Bootstrap, Defaulted, Estimate, Sums, add, rate

ROUNDS = ("early", "answered_within_1", "clean")
"""Counts that are kept by round of the conversation, too."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure: a function of summed counts.

    Attributes:
        name: as JSON and docs have it.
        group: under which heading it stands.
        text: what it says, in a line, with formula and source.
        of: from counts (numbers, or arrays over resamples) to the value.
        rate: names of successes and trials where it is a rate of events; its interval is Wilson's.
        unit: `share`, `slices`, or what is counted by what.
        better: `high`, `low`, or empty where neither is.
        seconds: how many slices lie between the figure's 0 and the clock's, where it is a time: x slices are
            (x + seconds) * slice_seconds seconds.
    """

    name: str
    group: str
    text: str
    of: Callable[[Sums], Any]
    rate: tuple[str, str] | None = None
    unit: str = "share"
    better: str = "high"
    seconds: int | None = None


def _rate(name: str, group: str, successes: str, trials: str, text: str, better: str = "high") -> Metric:
    return Metric(name, group, text, lambda c: c[successes] / c[trials], (successes, trials), better=better)


def _mean(
    name: str, group: str, total: str, number: str, text: str, unit: str, better: str = "low",
    seconds: int | None = None,
) -> Metric:  # fmt: skip
    return Metric(name, group, text, lambda c: c[total] / c[number], unit=unit, better=better, seconds=seconds)


def _decisions(kind: str) -> list[Metric]:
    def of(hit: str, *missed: str, times: int = 1) -> Callable[[Sums], Any]:
        """Hits / (hits + misses), each named by what was right and what was done."""
        names = [f"{kind}/{name}" for name in missed]
        return lambda c: times * c[f"{kind}/{hit}"] / (times * c[f"{kind}/{hit}"] + sum(c[name] for name in names))

    idle = of("idle/idle", "speak/idle", "idle/speak", times=2)
    speak = of("speak/speak", "idle/speak", "speak/idle", times=2)
    found = {
        "idle_precision": (of("idle/idle", "speak/idle"), "of the pairs left silent, those where idle was right"),
        "idle_recall": (of("idle/idle", "idle/speak"), "of the pairs where idle was right, those left silent"),
        "idle_f1": (idle, "2 P R / (P + R) of idle"),
        "speak_precision": (of("speak/speak", "idle/speak"), "of the pairs spoken in, those where speaking was right"),
        "speak_recall": (of("speak/speak", "speak/idle"), "of the pairs where speaking was right, those spoken in"),
        "speak_f1": (speak, "2 P R / (P + R) of speak"),
        "macro_f1": (lambda c: (idle(c) + speak(c)) / 2, "the mean of both F1"),
        "missed_rate": (of("speak/idle", "speak/speak"), "should have spoken, stayed silent: 1 - speak recall"),
    }
    return [
        Metric(f"{kind}_{name}", f"decisions, {kind}", text, figure, better="low" if name == "missed_rate" else "high")
        for name, (figure, text) in found.items()
    ]


def _slope(c: Sums) -> Any:
    """Least squares of clean (0 or 1) on the round: (n Sxy - Sx Sy) / (n Sxx - Sx^2)."""
    n, x, y = c["queries"], c["slope/x"], c["clean"]
    return (n * c["slope/xy"] - x * y) / (n * c["slope/xx"] - x * x)


METRICS: tuple[Metric, ...] = (
    *_decisions("forced"),
    *_decisions("free"),
    # Answers. "In time" and latency count from the pair with the query's last words.
    _rate("early_rate", "answers", "early", "queries",
          "the assistant speaks in a pair where the query goes on / queries (FD-Bench: EIRate)", "low"),
    _rate("early_avoidable_rate", "answers", "early_avoidable", "queries",
          "the same, but for those whose first such pair ends where a sentence does", "low"),
    _rate("early_at_sentence_share", "answers", "early_at_sentence", "early",
          "of the early ones, those whose first such pair ends where a sentence does: nobody could know", ""),
    _rate("early_carried_share", "answers", "early_carried", "early",
          "of the early ones, those that go on from before the query: an older message that did not stop", ""),
    _rate("response_rate", "answers", "answered", "queries",
          "the assistant speaks from the end of the query on, before the user's next turn / queries (tau-voice: R_R; "
          "FD-Bench: SRRate; Full-Duplex-Bench: takeover rate)"),
    _rate("response_within_1", "answers", "answered_within_1", "queries",
          "the same, no later than in the pair behind the query's last"),
    _mean("response_latency", "answers", "latency_slices", "answered",
          "mean pairs from the query's last words to the answer's first, over answered ones (tau-voice: L_R; "
          "FD-Bench: FSED); already speaking counts 0: read it beside early_rate", "slices", seconds=0),
    _rate("clean_rate", "answers", "clean", "queries",
          "not early, answered within one slice, and yielded within one slice where the query was a barge-in"),
    _rate("unanswered_rate", "answers", "unanswered", "queries",
          "missed intervention, by query: 1 - response_rate (Full-Duplex-Bench: 1 - takeover rate)", "low"),
    _mean("interruptions_per_turn", "answers", "interruptions", "turns",
          "the assistant starts to speak while the user does / user turns (tau-voice: I_A)", "per turn"),
    _rate("pause_takeover_rate", "answers", "hesitations_taken", "hesitations",
          "the assistant speaks in a pause inside a query / pauses (Full-Duplex-Bench: takeover rate in pause "
          "handling)", "low"),
    _rate("opening_rate", "answers", "opened", "openings",
          "the assistant speaks before the user's first words, where the reference does"),
    # Barge-ins.
    _rate("barge_in_met_rate", "barge-ins", "barge_ins", "barge_ins_meant",
          "the assistant was speaking in the pair before the barge-in / barge-ins; only these count below", ""),
    _rate("yield_rate", "barge-ins", "yielded", "barge_ins",
          "silent in some pair from the barge-in's first to the one behind its last / barge-ins met (tau-voice: R_Y "
          "without its window; FD-Bench: SIRate)"),
    _rate("yield_at_once", "barge-ins", "yielded_at_once", "barge_ins",
          "silent in the very pair in which the user starts"),
    _rate("yield_within_1", "barge-ins", "yielded_within_1", "barge_ins", "silent in that pair or the next"),
    _rate("yield_within_2s", "barge-ins", "yielded_in_window", "barge_ins",
          "silence is heard no later than 2.0 s after the user starts (tau-voice: R_Y)"),
    _mean("yield_latency", "barge-ins", "yield_slices", "yielded",
          "mean pairs from the barge-in's first to the first silent one, over yields; in seconds to the silence that "
          "is heard, one slice more (tau-voice: L_Y; Full-Duplex-Bench v1.5: stop latency; FD-Bench: IRD)", "slices",
          seconds=1),
    _rate("reply_per_interruption", "barge-ins", "yielded_and_answered", "yielded_to_query",
          "answered / queries by which the assistant was interrupted and yielded (FD-Bench: SRIRate)"),
    _mean("talk_over_tokens", "barge-ins", "talk_over_tokens", "turns",
          "tokens said in pairs in which the user is not finished / user turns", "tokens per turn"),
    # Holding the floor, and leaving it.
    _rate("goes_on_rate", "backchannels", "gone_on", "backchannels",
          "speaks in the pair of a backchannel / backchannels that met a speaking assistant (tau-voice: S_BC; "
          "Full-Duplex-Bench v1.5: resume after backchannel)"),
    _rate("goes_on_inside_rate", "backchannels", "gone_on_inside", "backchannels_inside",
          "the same, of those that met it inside a sentence: at its end the message may have been over"),
    _rate("false_yield_rate", "backchannels", "false_yields", "backchannels", "1 - goes_on_rate", "low"),
    _rate("quiet_3_rate", "quiet", "quiet_kept", "quiet",
          "at least 3 silent pairs behind a demand for silence (or all, where fewer come before the next turn) / "
          "demands"),
    _rate("quiet_throughout_rate", "quiet", "quiet_throughout", "quiet", "silent until the user's next turn / demands"),
    _mean("quiet_run", "quiet", "quiet_slices", "quiet",
          "mean silent pairs behind the demand's last, up to the next turn", "slices", "high", seconds=0),
    _rate("resume_rate", "back on topic", "resumed", "resumes_due",
          "takes the interrupted message up again (`find_resumption`) / where the reference does and it yielded"),
    _rate("resume_repeat_share", "back on topic", "repeated_ngrams", "resumed_ngrams",
          "word trigrams of the resumed text that it had said before (`repeated_ngrams`)", ""),
    Metric("clean_slope", "rounds", "least-squares slope of clean_rate on the round of the conversation: what each "
           "further round costs (FD-Bench: later interruptions)", _slope, unit="per round"),
    _mean("talk_share", "overall", "spoken", "slices", "pairs in which the assistant speaks / pairs", "share", ""),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}
# Trigrams of one text are no independent trials, and seeds repeat the same conversations.
_BOOTSTRAPPED = {"resume_repeat_share"}


def summarise(
    conversations: Sequence[Sequence[Mapping[str, float]]], slice_seconds: float = 2.0, resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """Every metric with its 95% interval.

    Args:
        conversations: for each conversation its counts, one for each seed. Seeds repeat a conversation, so they count
            as one where intervals are made: Wilson's n is events divided by seeds, and the bootstrap draws
            conversations with all their seeds.
        slice_seconds: k.
        resamples: of the bootstrap.

    Returns:
        By metric: `value` (None where nothing was there to be measured), `low`, `high`, and for rates `successes` and
        `trials`, for times `seconds`.
    """
    items = [add(seeds) for seeds in conversations]
    seeds = max((len(seeds) for seeds in conversations), default=1)
    total, bootstrap = add(items), Bootstrap(items, resamples)
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        if metric.rate is not None and metric.name not in _BOOTSTRAPPED:
            successes, trials = (total[name] for name in metric.rate)
            row: dict[str, Any] = rate(successes, trials, seeds) | {"unit": metric.unit}
            row |= {"successes": successes, "trials": trials}
        else:
            row = bootstrap.estimate(metric.of) | {"unit": metric.unit}
        if metric.seconds is not None and row["value"] is not None:
            row["seconds"] = (row["value"] + metric.seconds) * slice_seconds
        result[metric.name] = row
    return result


def differences(
    ours: Mapping[int, Sequence[Counts]], theirs: Mapping[int, Sequence[Counts]], resamples: int = 1000
) -> dict[str, Estimate]:
    """By metric ours less theirs on the conversations of both, with its 95% interval: conversations are drawn with what
    both made of them.

    Args:
        ours: by number of the conversation, its counts, one for each seed.
        theirs: the other's; seeds may be other ones.
        resamples: of the bootstrap.
    """
    sides = {"a/": ours, "b/": theirs}
    items = [
        {f"{side}{name}": number for side, of in sides.items() for name, number in add(of[n]).items()}
        for n in ours if n in theirs
    ]  # fmt: skip
    bootstrap = Bootstrap(items, resamples)

    def less(of: Callable[[Sums], Any]) -> Callable[[Sums], Any]:
        return lambda sums: operator.sub(
            *(of(Defaulted({k[2:]: v for k, v in sums.items() if k.startswith(side)})) for side in sides)
        )

    return {metric.name: bootstrap.estimate(less(metric.of)) for metric in METRICS}


def rounds(total: Mapping[str, float], seeds: int = 1) -> list[dict[str, Any]]:
    """Degradation over long conversations: `early`, `answered_within_1` and `clean` by round, with Wilson's intervals.

    Args:
        total: summed counts.
        seeds: how often each conversation is in them.
    """
    numbers = sorted({int(name.split("/")[1]) for name in total if name.startswith("round/")})
    rows = []
    for number in numbers:
        trials = total[f"round/{number}/queries"]
        figures = {name: rate(total.get(f"round/{number}/{name}", 0), trials, seeds) for name in ROUNDS}
        rows.append({"round": number, "queries": trials} | figures)
    return rows


def histogram(total: Mapping[str, float], name: str) -> dict[int, float]:
    """How many events took how many slices; `name` is `latency`, `yield` or `quiet_run`."""
    found = {int(key.split("/")[1]): n for key, n in total.items() if key.startswith(f"{name}/")}
    return dict(sorted(found.items()))


def situation_accuracy(total: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Share of right forced decisions in each of `SITUATIONS` that occurs."""
    return {
        name: {"value": total[f"forced/right/{name}"] / total[f"forced/at/{name}"], "decisions": number}
        for name in SITUATIONS
        if (number := total.get(f"forced/at/{name}", 0))
    }
