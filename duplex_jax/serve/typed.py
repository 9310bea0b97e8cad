"""Text that the user has typed and that waits for the next ticks."""

from duplex_jax.errors import UserError
from duplex_jax.slicing import USER_WORDS, words_of
from duplex_jax.timeline import whole_characters

MOST_WORDS = USER_WORDS[1]
"""Most words of typed text per slice; the rest waits for the next tick."""

MOST_WAITING = 2_000
"""Most characters that may wait."""


class Typed:
    """The waiting words of one session, oldest first."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def add(self, text: str) -> None:
        """Adds words for the next ticks.

        Raises:
            UserError: the text is blank, contains a partial character, or too much is waiting already.
        """
        if not whole_characters(text):
            raise UserError("text holds half of a surrogate pair; send whole characters")
        words = words_of(text)
        waiting = sum(map(len, self.words))
        if waiting + len(text) > MOST_WAITING:
            raise UserError(f"{waiting} characters already wait for the clock, and {len(text)} more arrived; "
                            f"at most {MOST_WAITING} may wait")  # fmt: skip
        if self.words and words and not words[0][0].isspace():
            words[0] = f" {words[0]}"  # a message begins a new word even if another one waits for the same tick
        self.words += words

    def take(self) -> str:
        """The words of one interval; empty if none wait."""
        words, self.words = self.words[:MOST_WORDS], self.words[MOST_WORDS:]
        return "".join(words).strip()
