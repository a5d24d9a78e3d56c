"""Promotion events for tests, and the exception that simulates a killed process."""

from collections.abc import Callable
from typing import Any

from mlflow.store.model_registry.abstract_store import AbstractStore

from convoy.promotion import champion
from convoy.promotion.champion import PromotionEvent


def make_promotion(before: int | None, after: int) -> PromotionEvent:
    return PromotionEvent(champion.utc_now(), "promotion", before, after, "ada", "0" * 40, "PROMOTE: better")


class SimulatedKill(BaseException):
    """As if the process had died here."""


REGISTRY_WRITES = sorted(
    name
    for name in vars(AbstractStore)
    if name.split("_")[0] in ("create", "set", "delete", "update", "rename")
    and ("registered_model" in name or "model_version" in name)
)


def limit_writes(write: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """Return a function that writes until none of the writes in `left` is left, and then dies."""

    def limited(*arguments: Any, **named: Any) -> Any:
        if left[0] <= 0:
            raise SimulatedKill
        left[0] -= 1
        return write(*arguments, **named)

    return limited
