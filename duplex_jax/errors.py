"""The one exception that a user is meant to read: a single line, exit code 2; and what such a line says of fields."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Bad input: says what is wrong, where, and what would be right, in one line.

    Command lines print it without a traceback and exit with code 2; library callers may catch it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)
"""What reading fields raises where they are not what they should be."""


def reason(error: Exception) -> str:
    """Why fields could not be read, in words."""
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around imports that only an extra of the package brings.

    Args:
        name: the extra, as pyproject.toml has it.
        what: for what it is needed, as the beginning of a sentence: "reading Parquet".

    Raises:
        UserError: a package is not installed; the line says how to install it.
    """
    try:
        yield
    except ImportError as e:
        raise UserError(f"{what} needs {e.name or 'a package'}: pip install 'duplex-jax[{name}]'") from e
