"""Promotion events for tests, and the exception that simulates a killed process."""

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
