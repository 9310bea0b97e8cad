"""What the user has typed and the clock has not taken yet."""

from duplex_jax.errors import UserError
from duplex_jax.slicing import USER_WORDS, words_of
from duplex_jax.timeline import whole_characters

MOST_WORDS = USER_WORDS[1]
"""Words that one slice takes of what was typed; the rest waits for the next tick."""

MOST_WAITING = 2_000
"""Characters that may wait for the clock."""


class Typed:
    """The words of one session that wait, oldest first."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def add(self, text: str) -> None:
        """Words for the next ticks.

        Raises:
            UserError: nothing but white space is no words; too much waits already; half a character.
        """
        if not whole_characters(text):
            raise UserError("text holds half of a surrogate pair; send whole characters")
        words = words_of(text)
        waiting = sum(map(len, self.words))
        if waiting + len(text) > MOST_WAITING:
            raise UserError(f"{waiting} characters wait for the clock already and {len(text)} come; "
                            f"at most {MOST_WAITING} may")  # fmt: skip
        if self.words and words and not words[0][0].isspace():
            words[0] = f" {words[0]}"  # a message begins a word of its own, though another one waits for the same tick
        self.words += words

    def take(self) -> str:
        """The words of one interval; empty where none wait."""
        words, self.words = self.words[:MOST_WORDS], self.words[MOST_WORDS:]
        return "".join(words).strip()
