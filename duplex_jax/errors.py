"""The one exception that a user is meant to read: a single line, exit code 2."""


class UserError(Exception):
    """Bad input: says what is wrong, where, and what would be right, in one line.

    Command lines print it without a traceback and exit with code 2; library callers may catch it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
