"""One unit of work: all timelines of one category from one block of dialogues, a pure function."""

import collections
import dataclasses
import hashlib
import io
import random
from collections.abc import Mapping

import zstandard

from data_gen.categories import CATEGORIES
from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.hearing import draw_style
from data_gen.rewriter import LeftOut, ModelRewriter, Pending, Request, Rewriter, Sampling, TemplateRewriter
from data_gen.transitions import Transitions
from duplex_jax.llm.cache import Answer
from duplex_jax.timeline import dump_line
from duplex_jax.tokenizer import Tokenizer

ZSTD_LEVEL = 6


@dataclasses.dataclass(frozen=True)
class Context:
    """What all units have in common.

    Attributes:
        tokenizer: cuts assistant messages.
        seed: seed of the data set.
        max_idle_pairs: see `compose.Conversation`.
        sampling: sampling settings of the model; None uses templates.
        compress: whether shards are zstd-compressed.
        transitions: name of the sentences that users interrupt with.
        spoken: fraction of the timelines whose user's words are as a speech recogniser or a chat window gives them.
    """

    tokenizer: Tokenizer
    seed: int = 0
    max_idle_pairs: int = 0
    sampling: Sampling | None = None
    compress: bool = False
    transitions: str = "paper"
    spoken: float = 0.0


@dataclasses.dataclass(frozen=True)
class Unit:
    """A block of dialogues and the category to make from it.

    Attributes:
        category: category of all its timelines.
        share: timelines per dialogue, over the whole input.
        block: number of the block and of its shard.
        first: index of the block's first dialogue in the input.
        dialogues: the block. Each dialogue is used in turn; a timeline of several draws the others from the same block,
            so that only the block has to be in memory.
    """

    category: str
    share: float
    block: int
    first: int
    dialogues: tuple[Dialogue, ...]


@dataclasses.dataclass(frozen=True)
class Made:
    """A finished shard, or the requests to answer before it can be made.

    Attributes:
        data: the shard's bytes as written to its file.
        sha256: hash of the shard.
        rows: timelines in it.
        pairs: their slice pairs.
        left_out: timelines that could not be made, by reason.
        pending: requests without an answer; if there are any, the other fields are meaningless.
    """

    data: bytes = b""
    sha256: str = ""
    rows: int = 0
    pairs: int = 0
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pending: tuple[Request, ...] = ()


def make_unit(context: Context, unit: Unit, answers: Mapping[str, Answer]) -> Made:
    """Makes a shard; deterministic, wherever it runs.

    Args:
        context: common to all units.
        unit: the block and its category.
        answers: the model's answers by request key.
    """
    transitions = Transitions(context.transitions)
    rewriter: Rewriter = TemplateRewriter(transitions)
    if context.sampling:
        rewriter = ModelRewriter(context.sampling, answers, transitions)
    category = CATEGORIES[unit.category]
    left_out: collections.Counter[str] = collections.Counter()
    pending: dict[str, Request] = {}
    raw = io.BytesIO()
    out = zstandard.ZstdCompressor(level=ZSTD_LEVEL).stream_writer(raw, closefd=False) if context.compress else raw
    rows = pairs = 0
    for place, index in enumerate(range(unit.first, unit.first + len(unit.dialogues))):
        for variant in range(int((index + 1) * unit.share) - int(index * unit.share)):
            name = f"{unit.category}-{index:08d}" + (f"-{variant}" if variant else "")
            rng = random.Random(f"{context.seed}/{name}")
            try:
                dialogues = _draw(unit.dialogues, place, rng.randint(*category.dialogues), rng)
                style = draw_style(context.spoken, random.Random(f"{context.seed}/{name}/style"))
                talk = Conversation(rng, context.tokenizer, context.max_idle_pairs, style)
                timeline = category.make(dialogues, talk, rewriter)
            except LeftOut as e:
                left_out[str(e)] += 1
                continue
            except Pending as e:
                pending |= {r.key: r for r in e.requests}
                continue
            timeline.id = name
            if style:
                timeline.meta["style"] = style
            if not pending:
                out.write(dump_line(timeline).encode())
            rows += 1
            pairs += len(timeline.pairs)
    if pending:
        return Made(pending=tuple(pending.values()))
    if out is not raw:
        out.close()
    data = raw.getvalue() if rows else b""
    return Made(data, hashlib.sha256(data).hexdigest(), rows, pairs, dict(sorted(left_out.items())))


def _draw(block: tuple[Dialogue, ...], place: int, number: int, rng: random.Random) -> list[Dialogue]:
    """`number` dialogues of a block, at random except for the last one, which is the one at `place`."""
    if number > len(block):
        raise LeftOut(f"fewer than {number} dialogues to draw from")
    others = rng.sample(range(len(block) - 1), number - 1)
    return [*(block[i + (i >= place)] for i in others), block[place]]
