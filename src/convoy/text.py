"""Naming: what a sentence says of many things, the first of them by name."""

from collections.abc import Sequence

FEW = 5


def truncate_names(names: Sequence[str]) -> str:
    """The first `FEW` names, and how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
