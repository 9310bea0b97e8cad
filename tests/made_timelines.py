"""Small conversations for the data and training tests, over the tokenizer with a token for each byte."""

import json
import random
from pathlib import Path

from duplex_jax.template import Template, make_template
from duplex_jax.timeline import SlicePair, Timeline, write_timelines
from tests.tiny import END, byte_tokenizer

WORDS = ("river", "garden", "engine", "market", "planet", "violin", "harbour", "library", "mountain", "bridge")


def template(name: str = "compact") -> Template:
    """A template over the byte tokenizer."""
    tokenizer = byte_tokenizer()
    if name == "minicpm":
        tokenizer.special["</s>"] = END
    return make_template(name, tokenizer)


def timeline(rng: random.Random, pairs: int) -> Timeline:
    """A question in slices, an answer in slices, and silence."""
    out = []
    for i in range(pairs):
        user = f"{rng.choice(WORDS)} and {rng.choice(WORDS)}" if i % 4 < 2 else None
        assistant = None if user or rng.random() < 0.3 else f" the {rng.choice(WORDS)}"
        out.append(SlicePair(user, assistant))
    category = rng.choice(["basic", "regeneration", "back_on_topic"])
    return Timeline(out, id=str(rng.random()), category=category)


def timelines(n: int, most: int = 8, seed: int = 0) -> list[Timeline]:
    """`n` of them, of one to `most` pairs."""
    rng = random.Random(seed)
    return [timeline(rng, rng.randint(1, most)) for _ in range(n)]


def write(folder: Path, n: int = 60, most: int = 8, seed: int = 0) -> tuple[Path, Path]:
    """A folder of timelines, and a folder with the tokenizer, as `--input` and `--model` take them."""
    data, model = folder / "timelines", folder / "tokenizer"
    data.mkdir(parents=True, exist_ok=True)
    model.mkdir(exist_ok=True)
    made = timelines(n, most, seed)
    write_timelines(data / "a.jsonl", made[: n // 2])
    write_timelines(data / "b.jsonl.gz", made[n // 2 :])
    byte_tokenizer().save(model)
    return data, model


def write_chats(path: Path, n: int = 5) -> Path:
    """Turn-based chats, in both forms that are read."""
    rng = random.Random(1)
    rows: list[dict[str, object]] = []
    for i in range(n):
        turns = [f"{rng.choice(WORDS)} {j}" for j in range(2 * rng.randint(1, 3))]
        roles = [{"role": ("user", "assistant")[j % 2], "content": t} for j, t in enumerate(turns)]
        rows.append({"data": turns} if i % 2 else {"messages": [{"role": "system", "content": "be brief"}, *roles]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
