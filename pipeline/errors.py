"""How a command ends on an error that the user can fix: with one message and exit status 1."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from convoy.core.disk import explain_full_disk
from convoy.core.errors import ConvoyError


@contextlib.contextmanager
def exit_on_error(command: str = "") -> Iterator[None]:
    """Exit with the message of a ConvoyError that is raised within the context.

    Args:
        command: The name of the stage or process, printed in front of the message; "" for a command of the user.
    """
    try:
        yield
    except ConvoyError as error:
        sys.exit(f"convoy: {command}: {error}{explain_restoring()}" if command else f"convoy: {error}")
    except Exception:
        print(explain_restoring().lstrip(), end="", file=sys.stderr)
        raise


def explain_restoring() -> str:
    """Return a line on how to restore the workspace if an experiment of DVC changes it, else ""."""
    # In a temporary copy, DVC_ROOT is the folder that it was copied from.
    if "DVC_EXP_NAME" not in os.environ or os.environ.get("DVC_ROOT") != str(Path.cwd()):
        return ""
    return (
        "\nconvoy: the experiment has changed the workspace: `git checkout params.yaml dvc.lock && dvc "
        "checkout --allow-missing` restores what was committed"
    )


@contextlib.contextmanager
def explain_system_errors(fix: str = "run `convoy run` again") -> Iterator[None]:
    """Replace an error of the system that the user can fix by a ConvoyError that explains how.

    These are a full disk, files that this user may not write, and a full memory of the GPU.

    Args:
        fix: What the user should do once the cause is removed, for the message.
    """
    try:
        yield
    except ConvoyError:
        raise
    except Exception as error:
        if message := _explain(error, fix):
            raise ConvoyError(message) from error
        raise


def _explain(error: Exception, fix: str) -> str | None:
    # Libraries may wrap an error of the operating system in their own exceptions.
    if full := explain_full_disk(error, Path.cwd(), fix):
        return full
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        file = error.filename2 or error.filename or "artifacts/"
        reason = (error.strerror or "not permitted").lower()
        return f"{file}: {reason}: let this user read and write there, and {fix}"
    # This is `torch.OutOfMemoryError`. It is compared by name because few stages import torch.
    if type(error).__name__ == "OutOfMemoryError":
        return f"the memory of the GPU is full: end what else uses it, or set trainer: cpu ({error})"
    return None
