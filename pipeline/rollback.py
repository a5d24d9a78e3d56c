"""Rollback: the previous champion becomes the champion again, and the reason is recorded."""

from pathlib import Path

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.promotion import champion
from convoy.tracking import provenance
from convoy.tracking.store import open_store


def roll_back(root: Path, reason: str) -> None:
    """Make the previous champion the champion again.

    Args:
        root: The project folder.
        reason: Why; recorded with the model.

    Raises:
        ConvoyError: If the reason is empty, or there is no previous champion.
    """
    if not reason.strip():
        raise ConvoyError('give a reason: convoy rollback --reason "it confuses wolves and dogs"')
    name = config.load(root / "params.yaml")["register"]["name"]
    with open_store(root, name) as store:
        champion.complete_pending(store, name)
        event = champion.roll_back(store, name, reason, provenance.user(), provenance.git_commit())
    replaced = f"version {event.before}" if event.before else "none"
    print(f"version {event.after} is the champion of {name} again, instead of {replaced}: {event.reason}")
