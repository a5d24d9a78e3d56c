"""Settings of the register stage: the name of the model and the criteria of the promotion gate."""

from typing import Annotated, Literal

from pydantic import Field

from convoy.core.config import (
    Fraction,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ProperFraction,
    SelectionMetric,
    schema,
)


@schema
class GateConfig:
    """Criteria that a challenger must meet to be promoted."""

    mode: Literal["better", "non_inferior"]  # non_inferior: for newer data, or a smaller or faster network
    alpha: Annotated[float, Field(gt=0, lt=0.5)]  # (0, 0.5): risk per evaluation of promoting an equally good model
    margin: ProperFraction  # (0, 1): largest loss accepted in mode non_inferior, with confidence 1 - alpha
    min_test_images: PositiveInt  # >= 1: with fewer test images the decision is always HOLD
    min_accuracy: Fraction  # [0, 1]: minimum test accuracy, or minimum of another selection metric
    max_recall_drop: Fraction  # [0, 1]: largest accepted drop of a class's recall; only a significant drop blocks
    min_images_per_class: PositiveInt  # >= 1: minimum number of test images of a class for its recall to be checked
    max_parameters: NonNegativeInt  # maximum number of parameters of the network; 0: no limit
    max_latency_ratio: NonNegativeFloat  # maximum latency, as a multiple of the champion's; 0: no limit
    max_test_set_uses: PositiveInt  # >= 1: evaluations on one set of test images, after which the gate warns
    # Names of classes that were added, removed or are no longer predicted on purpose.
    acknowledged_class_changes: list[str]


@schema
class RegisterConfig:
    """Where runs and models are registered, and the criteria for a promotion."""

    name: Name  # name of the MLflow experiment and of the registered model
    # Metric by which the challenger is chosen on validation images, and compared with the champion on test images.
    selection_metric: SelectionMetric
    # Of architectures whose difference in validation is within its standard error: best, or the smallest one.
    prefer: Literal["best", "small"]
    gate: GateConfig
