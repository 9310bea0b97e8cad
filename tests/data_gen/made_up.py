"""A tokenizer and dialogues made up for the generator's tests."""

import random

from data_gen.dialogues import Dialogue
from duplex_jax.tokenizer import _UNICODE_TO_BYTE, HFTokenizer


def byte_tokenizer() -> HFTokenizer:
    """Byte-level BPE with a few merges: any text, tokens of one to five bytes."""
    vocab = {c: i for i, c in enumerate(sorted(_UNICODE_TO_BYTE))}
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "o n", "e r", "Ġ w", "Ġ s", "a n", "in g", "r e", "Ġ o", "l l"]
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)
    control = ["<s>", "</s>", "<idle>"]
    return HFTokenizer(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": len(vocab) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}
                for i, t in enumerate(control)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": vocab, "merges": merges,
            },
        }
    )  # fmt: skip


_NOUNS = [
    "river",
    "garden",
    "engine",
    "market",
    "planet",
    "violin",
    "harbour",
    "library",
    "mountain",
    "recipe",
    "bridge",
]
_VERBS = ["carries", "shows", "needs", "holds", "follows", "changes", "reaches", "keeps"]


def sentence(rng: random.Random) -> str:
    a, b, c = rng.sample(_NOUNS, 3)
    return f"The old {a} {rng.choice(_VERBS)} the {b} near a quiet {c}."


def make_dialogue(index: int, rounds: int | None = None) -> Dialogue:
    """A dialogue that no other index gives."""
    rng = random.Random(index)
    made = tuple(
        (
            f"What can you tell me about the {rng.choice(_NOUNS)}, number {index} in part {r}?",
            " ".join(sentence(rng) for _ in range(rng.randint(3, 6))),
        )
        for r in range(rounds or rng.randint(1, 4))
    )
    return Dialogue(f"made:{index}", made, tuple(" ".join(sentence(rng) for _ in range(4)) for _ in made))
