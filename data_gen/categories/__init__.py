"""The categories of Duplex-UltraChat, one module each: pure functions from dialogues to a timeline."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from data_gen.categories import (
    back_on_topic,
    backchannel,
    basic,
    dialogue_reset,
    generation_termination,
    hesitation,
    opening,
    regeneration,
    silence,
    topic_interweaving,
)
from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import Rewriter
from duplex_jax.timeline import Timeline


class Make(Protocol):
    """Writes a timeline into an empty `talk`, which also provides the random generator; deterministic.

    Raises:
        LeftOut: the dialogues are unsuitable.
    """

    def __call__(self, dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline: ...


@dataclasses.dataclass(frozen=True)
class Category:
    """One kind of timeline.

    Attributes:
        make: the function that writes a timeline.
        share: timelines per source dialogue. For the paper's six it is Table 1's count divided by UltraChat's 1,468,352
            dialogues; for extras, which are off by default, it is the share used when they are enabled.
        dialogues: minimum and maximum number of source dialogues per timeline.
        extra: whether it is an addition to the paper's categories.
    """

    make: Make
    share: float
    dialogues: tuple[int, int] = (1, 1)
    extra: bool = False


_ULTRACHAT = 1_468_352

CATEGORIES: dict[str, Category] = {
    "basic": Category(basic.make, 1_458_353 / _ULTRACHAT),
    "topic_interweaving": Category(topic_interweaving.make, 489_065 / _ULTRACHAT, (3, 5)),
    "generation_termination": Category(generation_termination.make, 1_468_141 / _ULTRACHAT),
    "regeneration": Category(regeneration.make, 806_687 / _ULTRACHAT),
    "dialogue_reset": Category(dialogue_reset.make, 300_318 / _ULTRACHAT, (5, 5)),
    "back_on_topic": Category(back_on_topic.make, 327_286 / _ULTRACHAT),
    "backchannel": Category(backchannel.make, 0.2, extra=True),
    "hesitation": Category(hesitation.make, 0.2, extra=True),
    "silence": Category(silence.make, 0.1, extra=True),
    "opening": Category(opening.make, 0.1, extra=True),
}
PAPER = tuple(name for name, category in CATEGORIES.items() if not category.extra)
