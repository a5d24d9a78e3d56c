"""The exception for errors that a user can fix, and phrases for its messages."""

import difflib
import textwrap
from collections.abc import Sequence


class ConvoyError(Exception):
    """An error that the user can fix.

    The message names the file or key, what is wrong with it, and how to fix it.
    """


def describe_error(error: BaseException, max_length: int | None = None) -> str:
    """Return the message of an error in one line, or its type if it has no message.

    Args:
        error: The error, usually of a library.
        max_length: Number of characters above which the message is shortened. None keeps all of it.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(message, max_length) if max_length else message


def suggest(name: str, known: Sequence[str]) -> str:
    """Return a hint which known name may be meant by an unknown one: the closest, or else all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"it may be one of {', '.join(known)}"
