"""What a participant does, and in which order: it follows from the participant's number and what is done so far.

The researcher's two systems are `a` and `b`; a participant sees two labels, `A` and `B`, and is never told which label
is which system.
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
"""The five aspects of the paper's appendix B.2, in its order, with the question that a participant reads."""

LOW, MIDDLE, HIGH = 1, 4, 7
SCALE = {LOW: "disappointing", MIDDLE: "neither good nor bad", HIGH: "excellent"}
"""The scale of the paper's section 4.5, and what stands at some of its points."""

MOST_COMMENT = 4_000
"""Characters of a free text."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """What participants read.

    Attributes:
        consent: what they agree to; paragraphs with empty lines between them.
        note: sample instructions, to find something to talk about.
        openings: the first sentence of each session, the same with both models.
    """

    consent: str
    note: tuple[str, ...]
    openings: tuple[str, ...]


def read_texts(sessions: int, consent: str | None = None, note: str | None = None,
               openings: str | None = None) -> Texts:  # fmt: skip
    """The texts of three files, the package's own where none is given.

    Args:
        sessions: with each model; so many openings are taken.
        consent: a text file.
        note: a text file, one sample a line.
        openings: a text file, one sentence a line; more than `sessions` are left out.

    Raises:
        UserError: a file that cannot be read or says too little.
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
    """Which system a participant talks to first, and under which label each system goes.

    Attributes:
        order: the systems, in the order in which they are talked to.
        labels: of each system.
    """

    order: tuple[str, str]
    labels: Mapping[str, str]

    def system(self, label: str) -> str:
        """The system under a label."""
        return next(s for s in SYSTEMS if self.labels[s] == label)


def plan_of(number: int) -> Plan:
    """The plan of participant `number`, from 1.

    Odd numbers talk to system `a` first and even ones to `b`, as in the paper; there `a` is always called A, and here
    the labels change places for every second and third of four. So after any number of participants as many have talked
    to `a` first as to `b`, and as many have known `a` as A as have known it as B, within one.

    Raises:
        ValueError: a number below 1.
    """
    if number < 1:
        raise ValueError(f"participant {number}: they are counted from 1")
    order = ("a", "b") if number % 2 else ("b", "a")
    labels = LABELS if number % 4 in (0, 1) else LABELS[::-1]
    return Plan(order, dict(zip(SYSTEMS, labels, strict=True)))


@dataclasses.dataclass(frozen=True)
class Step:
    """What comes next for a participant.

    Attributes:
        kind: talk in session `session` with `system`; score `system`; review both scores, change and confirm them; or
            done.
        system: of `talk` and `score`.
        session: of `talk`, from 1.
    """

    kind: Literal["talk", "score", "review", "done"]
    system: str | None = None
    session: int | None = None


def next_step(
    plan: Plan, sessions: int, talked: Mapping[str, int], scored: Collection[str], confirmed: bool
) -> Step:  # fmt: skip
    """The next step: all sessions with one system and its scores, then the other's, then both are reviewed.

    Args:
        plan: the participant's.
        sessions: with each system.
        talked: finished sessions by system.
        scored: systems that have scores.
        confirmed: whether the scores were confirmed.
    """
    for system in plan.order:
        if talked.get(system, 0) < sessions:
            return Step("talk", system, talked.get(system, 0) + 1)
        if system not in scored:
            return Step("score", system)
    return Step("done") if confirmed else Step("review")


def check_scores(given: Any) -> dict[str, int]:
    """A score for every aspect, as they came from outside.

    Raises:
        UserError: an aspect is missing or unknown, or a score is no whole number of 1 to 7.
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
