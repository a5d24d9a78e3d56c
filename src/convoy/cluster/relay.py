"""The callback of Ray Train that passes checkpoints and failures on to the process that started the training."""

from typing import Any

from ray.train import Checkpoint, UserCallback
from ray.util.queue import Queue

from convoy.core.errors import ConvoyError, describe_error


class Relay(UserCallback):
    """Put what happens to the workers into a queue.

    Args:
        messages: Queue that receives `{"rows": history}` for a checkpoint, and `{"failure": reason, "is_final": bool}`.
    """

    def __init__(self, messages: Queue) -> None:
        self.messages = messages

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: "Checkpoint | None") -> None:
        """Pass the history on."""
        self.messages.put({"rows": metrics[0]["rows"]})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Pass a failure on, which is final if it would occur again."""
        errors = [getattr(error, "_base_exc", error) for error in worker_exceptions.values()]
        final = [error for error in errors if isinstance(error, ConvoyError)]
        message = str(final[0]) if final else describe_error(errors[0], 300)
        self.messages.put({"failure": message, "is_final": bool(final)})
