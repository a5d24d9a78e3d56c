"""The error that a user can fix, and hints in its messages."""

import difflib
from collections.abc import Sequence


class ConvoyError(Exception):
    """What a user can mend. The message names the file or key, what is wrong with it, and the mend."""


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"it may be one of {', '.join(known)}"
