"""Dialogue reset: the user drops one conversation for another, four times.

The first four of five dialogues are truncated at a random point in an answer. The next dialogue's first query follows
at once, after one of the 18 sentences of A.3 (or of our own), and the rewriter fuses both into one input; after A.3's
empty sentence the query is unchanged. Usually the first answer is cut: Table 1's 194.7 pairs for five dialogues,
compared with 153.9 for one basic dialogue, leave no room for late cuts.
"""

import random
from collections.abc import Sequence

from data_gen.compose import Conversation, pick_cut
from data_gen.dialogues import Dialogue
from data_gen.rewriter import LeftOut, Rewriter
from data_gen.transitions import number
from duplex_jax.slicing import slice_tokens
from duplex_jax.timeline import Timeline
from duplex_jax.tokenizer import Tokenizer

# Probability that an answer is the one to be cut, given that none before it was.
EARLY = 0.75


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """All dialogues, truncated except for the last."""
    rng, tokenizer = talk.rng, talk.tokenizer
    places = [_pick_answer(d, rng, tokenizer) for d in dialogues[:-1]]
    queries = [d.rounds[0][0] for d in dialogues[1:]]
    sentences = [rewriter.transitions.reset(rng, rewriter.can_announce(query)) for query in queries]
    starts = rewriter.fuse(list(zip(sentences, queries, strict=True)))

    talk.query(dialogues[0].rounds[0][0])
    for (at, slices), dialogue, start in zip(places, dialogues[:-1], starts, strict=True):
        for (_, answer), (query, _) in zip(dialogue.rounds[:at], dialogue.rounds[1:], strict=False):
            talk.say(answer)
            talk.pause()
            talk.query(query)
        talk.say_part(slices, pick_cut(slices, rng, tokenizer))
        talk.interrupt(start)
    last = dialogues[-1].rounds
    talk.say(last[0][1])
    talk.pause()
    for query, answer in last[1:]:
        talk.round(query, answer)
    return talk.timeline(
        "dialogue_reset", [d.id for d in dialogues], transitions=[number(s, "reset") for s in sentences]
    )


def _pick_answer(dialogue: Dialogue, rng: random.Random, tokenizer: Tokenizer) -> tuple[int, list[str]]:
    """The round whose answer is cut, preferring early ones, and that answer's slices."""
    cuttable = []
    for i, (_, answer) in enumerate(dialogue.rounds):
        slices = slice_tokens(answer, tokenizer)
        if len(slices) > 1:
            cuttable.append((i, slices))
            if rng.random() < EARLY:
                break
    if not cuttable:
        raise LeftOut("a dialogue without an answer longer than a slice")
    return cuttable[-1]
