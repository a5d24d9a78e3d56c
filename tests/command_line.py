"""The command line `convoy`, run within the process of a test."""

from pipeline import cli


def run_command(*arguments: object) -> None:
    """Run a command in the current folder; raises SystemExit if it fails."""
    try:
        cli.main(list(map(str, arguments)))
    except SystemExit as end:
        if end.code:
            raise
