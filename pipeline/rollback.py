"""Command that makes the previous champion the champion again and records the reason."""

import argparse
from pathlib import Path

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.promotion import champion
from convoy.tracking import provenance
from convoy.tracking.store import open_store
from pipeline.errors import exit_on_error


def main() -> None:
    """Make the previous champion the champion again."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.rollback", description=main.__doc__)
    parser.add_argument("--reason", required=True, help="why; recorded with the model")
    options = parser.parse_args()
    root = Path.cwd()
    with exit_on_error("rollback"):
        if not options.reason.strip():
            raise ConvoyError('give a reason: make rollback REASON="it confuses wolves and dogs"')
        name = config.load(root / "params.yaml")["register"]["name"]
        with open_store(root, name) as store:
            champion.complete_pending(store, name)
            event = champion.roll_back(store, name, options.reason, provenance.user(), provenance.git_commit())
        replaced = f"version {event.before}" if event.before else "none"
        print(f"version {event.after} is the champion of {name} again, instead of {replaced}: {event.reason}")


if __name__ == "__main__":
    main()
