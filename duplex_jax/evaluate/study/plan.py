"""The steps of a participant and their order, determined by the participant's number and progress.

The researcher's two systems are `a` and `b`; a participant sees two labels, `A` and `B`, and is never told which label
belongs to which system.
"""

import dataclasses
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from duplex_jax.errors import UserError

SYSTEMS = ("a", "b")
LABELS = ("A", "B")

ASPECTS = {
    "responsiveness": "Did it answer when you wanted an answer, and how soon?",
    "faithfulness": "Did it understand you, do what you asked, and stay on your subject?",
    "factuality": "As far as you can tell, was what it said true?",
    "human_likeness": "How much was talking with it like talking with a person?",
    "overall": "All in all, how was it?",
}
"""The five aspects of the paper's appendix B.2, in its order, with the questions shown to participants."""

LOW, MIDDLE, HIGH = 1, 4, 7
SCALE = {LOW: "disappointing", MIDDLE: "neither good nor bad", HIGH: "excellent"}
"""The scale of the paper's section 4.5, and the labels of some of its points."""

MOST_COMMENT = 4_000
"""Maximum length of a comment in characters."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts that participants read.

    Attributes:
        consent: the consent form; paragraphs are separated by empty lines.
        note: sample instructions, as suggestions for what to talk about.
        openings: the first sentence of each session, the same for both models.
    """

    consent: str
    note: tuple[str, ...]
    openings: tuple[str, ...]


def read_texts(sessions: int, consent: str | None = None, note: str | None = None,
               openings: str | None = None) -> Texts:  # fmt: skip
    """Reads the texts from files, or the package's own.

    Args:
        sessions: number of sessions with each model, and so of openings.
        consent: a text file.
        note: a text file, one sample per line.
        openings: a text file, one sentence per line; those beyond `sessions` are ignored.

    Raises:
        UserError: a file cannot be read or has too few lines.
    """
    first = _lines(openings, "openings")
    if len(first) < sessions:
        raise UserError(
            f"--openings={openings or 'the package'}: {len(first)} sentences for --sessions={sessions}; one a line"
        )
    return Texts(_read(consent, "consent"), tuple(_lines(note, "note")), tuple(first[:sessions]))


def _read(path: str | None, name: str) -> str:
    own = resources.files("duplex_jax") / "assets" / "study" / f"{name}.txt"
    try:
        text = own.read_text(encoding="utf-8") if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--{name}={path}: cannot be read ({e}); give a text file in UTF-8") from e
    if not text.strip():
        raise UserError(f"--{name}={path}: is empty")
    return text.strip()


def _lines(path: str | None, name: str) -> list[str]:
    return [line.strip() for line in _read(path, name).splitlines() if line.strip()]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which system a participant talks to first, and the label of each system.

    Attributes:
        order: the systems in the order of their sessions.
        labels: each system's label.
    """

    order: tuple[str, str]
    labels: Mapping[str, str]

    def system(self, label: str) -> str:
        """The system under a label."""
        return next(s for s in SYSTEMS if self.labels[s] == label)


def plan_of(number: int) -> Plan:
    """The plan of participant `number`, from 1.

    Odd numbers talk to system `a` first and even ones to `b`, as in the paper. There, `a` is always called A; here, the
    labels are exchanged for the second and third of every four participants. So after any number of participants,
    equally many (within one) have talked to `a` first as to `b`, and have known `a` as A as have known it as B.

    Raises:
        ValueError: the number is below 1.
    """
    if number < 1:
        raise ValueError(f"participant {number}: they are counted from 1")
    order = ("a", "b") if number % 2 else ("b", "a")
    labels = LABELS if number % 4 in (0, 1) else LABELS[::-1]
    return Plan(order, dict(zip(SYSTEMS, labels, strict=True)))


@dataclasses.dataclass(frozen=True)
class Step:
    """A participant's next step.

    Attributes:
        kind: `talk` in session `session` with `system`; `score` `system`; `review`, change and confirm both scores; or
            `done`.
        system: the system of `talk` and `score`.
        session: the session of `talk`, from 1.
    """

    kind: Literal["talk", "score", "review", "done"]
    system: str | None = None
    session: int | None = None


def next_step(
    plan: Plan, sessions: int, talked: Mapping[str, int], scored: Collection[str], confirmed: bool
) -> Step:  # fmt: skip
    """The next step: all sessions with one system and its scores, then the other's, then the review of both.

    Args:
        plan: the participant's plan.
        sessions: number of sessions with each system.
        talked: number of finished sessions by system.
        scored: systems that have scores.
        confirmed: whether the scores are confirmed.
    """
    for system in plan.order:
        if talked.get(system, 0) < sessions:
            return Step("talk", system, talked.get(system, 0) + 1)
        if system not in scored:
            return Step("score", system)
    return Step("done") if confirmed else Step("review")


def check_scores(given: Any) -> dict[str, int]:
    """Checks a participant's scores, one for every aspect.

    Raises:
        UserError: an aspect is missing or unknown, or a score is not an integer from 1 to 7.
    """
    if not isinstance(given, dict):
        raise UserError("scores: must be an object with a score for each aspect")
    for name in (*ASPECTS, *given):
        if name not in ASPECTS:
            raise UserError(f"scores: {str(name)[:40]!r} is no aspect; they are {', '.join(ASPECTS)}")
        value = given.get(name)
        if type(value) is not int or not LOW <= value <= HIGH:
            raise UserError(f"scores: {name} needs a whole number of {LOW} to {HIGH}")
    return {name: given[name] for name in ASPECTS}
