"""Has a chat model write dialogues itself, in blocks, so that an interrupted run can be resumed."""

import collections
import json
from collections.abc import Generator, Iterator
from pathlib import Path

from data_gen.questions import openings
from data_gen.self_written import KINDS, Ask, Refused, Words, Written, plan
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.writing import Draw, Drawn, write
from duplex_jax.files import atomic_write
from duplex_jax.template import Template
from duplex_jax.tokenizer import decode

BLOCK = 128
# Queries are sampled broadly, for variety; answers close to the model's best, because they are trained on.
QUERIES, ANSWERS = Sampling(temperature=0.9, top_p=0.9), Sampling(temperature=0.6, top_p=0.8)


def _front(template: Template, ask: Ask) -> tuple[list[int], int]:
    """Ids before the requested words, and how many of them are the same in every conversation."""
    messages = list(ask.messages)
    shared = _before_user(template, [m for m in messages[:1] if m[0] == "system"])
    if ask.role == "assistant":
        return template.turn_prompt(messages), len(shared)
    return _before_user(template, messages) + template.tokenizer.encode(ask.begin), len(shared)


def _before_user(template: Template, messages: list[tuple[str, str]]) -> list[int]:
    """Ids of the chat template between the conversation and the user's next message."""
    a, b = (template.turn_prompt([*messages, ("user", x)]) for x in ("A", "B"))
    return a[: next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)]


def _writer(template: Template, talk: Generator[Ask, Words, Written]) -> Generator[Draw, Drawn, Written | str]:
    """Runs a dialogue's writer on ids; returns the dialogue, or why there is none."""
    try:
        ask = next(talk)
        while True:
            prompt, shared = _front(template, ask)
            drawn = yield Draw(prompt, ask.max_tokens, QUERIES if ask.role == "user" else ANSWERS, shared)
            text = ask.begin + decode(template.tokenizer, drawn.ids)
            ask = talk.send(Words(text, drawn.ended))
    except StopIteration as stop:
        return stop.value
    except Refused as e:
        return str(e)


def self_write(engine: Engine, out: Path, count: int, seed: int, rows: int) -> Iterator[int]:
    """Writes `count` dialogues in blocks; yields how many were tried after each block.

    Brief, spoken dialogues go to `out/spoken`, those in the model's usual style to `out/plain`, both as
    `dialogues-NNNNN.jsonl` in UltraChat's layout; a block whose counts are in `out/blocks` is not written again.

    Args:
        engine: the model's engine; it needs a few more rows than `rows`.
        out: the output folder.
        count: number of dialogues to try; unusable ones are dropped.
        seed: random seed.
        rows: dialogues written at once.
    """
    starts = list(openings(seed))
    for block in range(-(-count // BLOCK)):
        numbers = range(block * BLOCK, min(count, (block + 1) * BLOCK))
        done = out / "blocks" / f"block-{block:05d}.json"
        if not done.exists():
            writers = ((n, _writer(engine.template, plan(n, seed, starts))) for n in numbers)
            made = dict(sorted(write(engine, writers, rows)))
            kept = {n: w for n, w in made.items() if isinstance(w, Written)}
            for folder, brief in (("spoken", True), ("plain", False)):
                with atomic_write(out / folder / f"dialogues-{block:05d}.jsonl") as f:
                    for n, w in kept.items():
                        if KINDS[w.kind][1].brief == brief:
                            row = {"id": f"self-{seed}-{n:06d}", "kind": w.kind, "data": w.said, "again": w.again}
                            f.write(json.dumps(row) + "\n")
            refused = collections.Counter(reason for reason in made.values() if isinstance(reason, str))
            with atomic_write(done) as f:
                json.dump({"kept": len(kept), "refused": dict(refused.most_common())}, f)
        yield numbers.stop
