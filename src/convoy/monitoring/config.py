"""Settings of `convoy retrain` and `convoy monitor`."""

from typing import Annotated

from pydantic import Field

from convoy.core.config import PositiveInt, schema


@schema
class RetrainConfig:
    """When a retraining is due although settings and code are unchanged."""

    min_new_images: PositiveInt  # images that are new, relabelled or gone since the last run, from which it is due
    alpha: Annotated[float, Field(ge=0, le=0.1)]  # false-alarm probability of each test on fewer images; 0: no tests
