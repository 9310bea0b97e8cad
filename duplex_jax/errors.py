"""`UserError`, the exception for bad input: one line for the user and exit code 2; and helpers for its messages."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what would be right.

    Command lines print it without a traceback and exit with code 2; library callers may catch it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)
"""Exceptions from accessing fields of malformed data."""


def reason(error: Exception) -> str:
    """Describes in words why fields could not be read."""
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Context for imports that need an extra of this package.

    Args:
        name: the extra's name in pyproject.toml.
        what: what it is needed for, as the beginning of a sentence: "reading Parquet".

    Raises:
        UserError: a package is not installed; the message says how to install it.
    """
    try:
        yield
    except ImportError as e:
        raise UserError(f"{what} needs {e.name or 'a package'}: pip install 'duplex-jax[{name}]'") from e
