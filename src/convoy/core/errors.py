"""The exception for errors that a user can fix, and hints for its messages."""

import difflib
from collections.abc import Sequence


class ConvoyError(Exception):
    """An error that the user can fix.

    The message names the file or key, what is wrong with it, and how to fix it.
    """


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"it may be one of {', '.join(known)}"
