"""Images of a split with the predictions of a network, and lists of those that are worth a look."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from convoy.reporting.label_errors import find_label_errors


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a split as the networks see them, with the predictions of one network."""

    pixels: np.ndarray  # (N, H, W, C) uint8
    paths: list[str]
    labels: np.ndarray  # (N,) class indices
    probabilities: np.ndarray  # (N, K)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Return the predicted classes (N,)."""
        return self.probabilities.argmax(axis=1)

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """Return the probability of the predicted class (N,)."""
        return self.probabilities.max(axis=1)

    @functools.cached_property
    def is_correct(self) -> np.ndarray:
        """Return whether the predicted class is that of the label (N,)."""
        return self.predicted == self.labels

    @functools.cached_property
    def mistakes(self) -> np.ndarray:
        """Return the positions of the images that are classified wrongly, the most confident mistake first."""
        wrong = np.flatnonzero(~self.is_correct)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


def list_mistakes(classes: Sequence[str], images: Images) -> pd.DataFrame:
    """List all images that are classified wrongly, the most confident mistake first.

    Args:
        classes: Names of the classes.
        images: Images of a split.

    Returns:
        A table with the columns path, label, predicted, and probability, that of the predicted class.
    """
    names = np.array(classes, dtype=object)
    rows = images.mistakes
    return pd.DataFrame(
        {
            "path": np.array(images.paths, dtype=object)[rows],
            "label": names[images.labels[rows]],
            "predicted": names[images.predicted[rows]],
            "probability": images.confidence[rows],
        }
    )


def list_label_errors(classes: Sequence[str], splits: Mapping[str, Images]) -> pd.DataFrame:
    """List the probable label errors of some splits, the most probable first.

    Args:
        classes: Names of the classes.
        splits: Images of the validation and test splits, by the name of the split.

    Returns:
        A table with the columns path, split, label, suggested, margin, and row, the position in the split.
    """
    names = np.array(classes, dtype=object)
    tables = []
    for split, images in splits.items():
        found = find_label_errors(images.labels, images.probabilities)
        rows = found["row"].to_numpy()
        tables.append(
            pd.DataFrame(
                {
                    "path": np.array(images.paths, dtype=object)[rows],
                    "split": split,
                    "label": names[images.labels[rows]],
                    "suggested": names[found["suggested"].to_numpy()],
                    "margin": found["margin"],
                    "row": rows,
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)
    return table.sort_values(["margin", "path"], ascending=[False, True], ignore_index=True)
