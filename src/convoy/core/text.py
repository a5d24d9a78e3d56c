"""Text for messages that list many names."""

from collections.abc import Sequence

MAX_LISTED_NAMES = 5


def truncate_names(names: Sequence[str]) -> str:
    """Join the first `MAX_LISTED_NAMES` names with commas, and add how many more there are."""
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return ", ".join(names[:MAX_LISTED_NAMES]) + more
