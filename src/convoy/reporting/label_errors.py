"""Probable label errors, by confident learning.

The method is that of Northcutt, Jiang & Chuang 2021, "Confident learning: estimating uncertainty in dataset labels".
The library of its authors, cleanlab, is under the AGPL, which this project can't depend on.
"""

import numpy as np
import pandas as pd


def find_label_errors(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Find images whose label is probably wrong.

    A class is confidently predicted for an image if its probability reaches the mean probability of that class among
    the images labelled with it (equation 2 of the paper). An image is a candidate if the most probable one of its
    confidently predicted classes is not its label: an off-diagonal entry of the confident joint (equation 1). The
    candidates are ranked by the normalized margin (section 3.2).

    Args:
        labels: (N,) class indices in [0, K).
        probabilities: (N, K) probabilities from a network that was not trained on these images.

    Returns:
        A table with one row per candidate, the most probable error first, and the columns row (position in `labels`),
        suggested (class index) and margin (how much more probable it is than the label, in [0, 1]).
    """
    rows, classes = probabilities.shape
    counts = np.bincount(labels, minlength=classes)
    own = probabilities[np.arange(rows), labels]
    # A class without images is never confidently predicted.
    thresholds = np.where(counts > 0, np.bincount(labels, own, classes) / np.maximum(counts, 1), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = confident.argmax(axis=1)
    found = np.flatnonzero((confident.max(axis=1) >= 0) & (suggested != labels))
    margin = probabilities[found, suggested[found]] - own[found]
    table = pd.DataFrame({"row": found, "suggested": suggested[found], "margin": margin})
    # A threshold may be so low that the suggested class is less probable than the label.
    return table[table["margin"] > 0].sort_values(["margin", "row"], ascending=[False, True], ignore_index=True)
