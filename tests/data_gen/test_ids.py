"""The slices of the generator and the ids of training agree, for the tokenizers that are trained with."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from data_gen.categories import CATEGORIES
from data_gen.compose import Conversation, Message
from data_gen.dialogues import Dialogue, read_dialogues
from data_gen.rewriter import LeftOut, TemplateRewriter
from duplex_jax.template import default_template, make_template
from duplex_jax.timeline import Timeline
from duplex_jax.tokenizer import Tokenizer

AWKWARD = Dialogue(
    "awkward",
    (
        ("Schreib über Straßen.", "Die Straße ist lang. " * 6 + "再见，朋友。" * 5 + "👩‍👩‍👧 und Wörter. " * 4),
        ("```code```", "def f(x):\n    return x[0]\n\n\n" * 8),
        ("كيف حالك", "أنا بخير شكرا لك على سؤالك " * 8),
    ),
)  # fmt: skip


def spoken_ids(timeline: Timeline, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Each assistant message of a timeline, and the ids that a whole-timeline encoding gives its slices."""
    template = make_template(default_template(tokenizer), tokenizer)
    encoded = template.encode(timeline)
    ends = [*encoded.starts[1:].tolist(), len(encoded.ids)]
    found = []
    for m in (Message(**m) for m in timeline.meta["messages"]):
        if m.role != "assistant":
            continue
        ids: list[int] = []
        for i in range(m.first, m.last + 1):
            part = encoded.ids[encoded.decisions[i] : ends[i]].tolist()
            closing = template.closing(part[:1])
            ids += part[: len(part) - len(closing)]
        found.append(("".join(timeline.pairs[i].assistant or "" for i in range(m.first, m.last + 1)), ids))
    return found


@pytest.mark.parametrize("which", ["minicpm_tokenizer", "smollm2_tokenizer"])
@pytest.mark.parametrize("name", CATEGORIES)
def test_ids_of_the_slices_are_the_ids_of_the_message(
    name: str, which: str, shared: Path, request: pytest.FixtureRequest
):
    tokenizer: Tokenizer = request.getfixturevalue(which)
    source = shared / "data" / "dialogues" / "dialogues.jsonl"
    dialogues = [AWKWARD, *(d for d, _ in zip(read_dialogues(source, print), range(25), strict=False))]
    dialogues = [dataclasses.replace(d, again=tuple(f"Once more. {a}" for _, a in d.rounds)) for d in dialogues]
    messages = 0
    for seed, dialogue in enumerate(dialogues):
        rng = random.Random(seed)
        others = rng.sample(dialogues, rng.randint(*CATEGORIES[name].dialogues) - 1)
        try:
            timeline = CATEGORIES[name].make([*others, dialogue], Conversation(rng, tokenizer, 2), TemplateRewriter())
        except LeftOut:
            continue
        for text, ids in spoken_ids(timeline, tokenizer):
            assert ids == tokenizer.encode(text), json.dumps(text)
            messages += 1
    assert messages > 20
