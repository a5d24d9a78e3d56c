"""Text for messages that list many names."""

from collections.abc import Sequence

FEW = 5


def truncate_names(names: Sequence[str]) -> str:
    """Join the first `FEW` names with commas, and add how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
