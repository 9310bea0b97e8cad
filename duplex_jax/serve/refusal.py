"""Something that a client asked for and does not get: an error that names the field."""

from duplex_jax.errors import UserError

_LONGEST = 500
"""Characters of an error: what is wrong with a message may be as long as the message."""


class Refusal(UserError):
    """Something that a client asked for and does not get.

    Args:
        message: what is wrong, where, and what would be right.
        code: how OpenAI's protocols call it.
        param: the field, as `session.audio.input.format`.
    """

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None):
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ...")
        self.code, self.param = code, param and param[:_LONGEST]
