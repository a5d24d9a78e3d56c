"""Results of the fetch and preprocess stages, as shown in their cards."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

# Function from a row number to an image (H, W, 1 or 3) uint8.
ReadImage = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class FetchSummary:
    """Result of the fetch stage, as shown in its card."""

    name: str
    classes: list[str]  # K names; some classes may have no images (any more)
    # A row for each image: path, label, split ("", train, val or test, as the source gives it), group, height, width,
    # channels (as stored), source_height, source_width (in the file).
    table: pd.DataFrame
    read_image: ReadImage
    quarantine: pd.DataFrame  # path, label, reason
    merged: pd.DataFrame  # path, kept: an exact copy, and the path of the image that is kept instead
    changes: list[str]  # sentences: the changes since the last version of the data; [] for the first version
    notes: list[str]  # sentences


@dataclass(frozen=True)
class PreprocessSummary:
    """Result of the preprocess stage, as shown in its card."""

    name: str
    classes: list[str]  # K names
    size: int  # height and width of an image, in pixels
    channels: int  # 1 grey or 3 RGB
    mean: list[float]  # of each channel, in [0, 1]
    std: list[float]  # of each channel, in (0, 1]
    table: pd.DataFrame  # path, label, split; a row for each image, in the order of the arrays
    read_image: ReadImage  # (size, size, channels) uint8; the inputs of the networks
    read_original: Callable[[str], np.ndarray]  # path -> (H, W, 1 or 3) uint8, for any image that has a near-duplicate
    # path, other, label, other_label: near-duplicates; pairs with two different labels first
    near_duplicates: pd.DataFrame
    pair_count: int  # number of pairs in total, of which `near_duplicates` may list only the first
    conflict_count: int  # number of pairs with two different labels
    excluded: pd.DataFrame  # path, label, reason: images excluded because they would leak between splits
    notes: list[str]  # sentences
    groups: str = ""  # how many groups each split has, in one sentence; "" if there are none
