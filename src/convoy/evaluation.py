"""Evaluation: from probabilities and true labels to figures that can be compared."""

import numpy as np
import pandas as pd
from sklearn import metrics

from convoy.config import Count, schema


@schema
class Evaluate:
    """How test images are judged."""

    batch_size: Count  # images at a time; bounds the memory


def scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """The figures of a classifier: labels (N,) of K classes, probabilities (N, K)."""
    predicted = probabilities.argmax(axis=1)
    everything = np.arange(probabilities.shape[1])
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "balanced_accuracy": float(metrics.balanced_accuracy_score(labels, predicted)),
        "macro_f1": float(metrics.f1_score(labels, predicted, labels=everything, average="macro", zero_division=0)),
        "log_loss": float(metrics.log_loss(labels, probabilities, labels=everything)),
    }


def per_class(classes: list[str], labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """A row for each class: its test images, precision, recall and F1. No rows where there are no images at all."""
    if not len(labels):
        return pd.DataFrame(columns=["class", "images", "precision", "recall", "f1"])
    precision, recall, f1, images = metrics.precision_recall_fscore_support(
        labels, probabilities.argmax(axis=1), labels=np.arange(len(classes)), zero_division=0
    )
    return pd.DataFrame({"class": classes, "images": images, "precision": precision, "recall": recall, "f1": f1})


def predictions(classes: list[str], images: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """A row for each image: its sha256, the actual and the predicted class, and the probability of each class.

    `images` has the columns sha256 and label, in the order of `probabilities` (N, K).
    """
    table = pd.DataFrame({"sha256": images["sha256"].to_numpy(), "actual": images["label"].to_numpy()})
    table["predicted"] = np.array(classes, dtype=object)[probabilities.argmax(axis=1)]
    return pd.concat([table, pd.DataFrame(probabilities, columns=[f"probability_{name}" for name in classes])], axis=1)
