"""Source: labelled images from any storage that are about to be read, and the settings that select them."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field

from convoy.core.config import Name, PositiveInt, schema
from convoy.data.image_io import InvalidImageError


@schema
class TorchvisionConfig:
    """Settings of a data set that torchvision provides."""

    name: str  # class in torchvision.datasets
    # Maps each split to the constructor arguments that select it; "all" is for a data set without splits.
    splits: Annotated[dict[Literal["train", "val", "test", "all"], dict[str, Any]], Field(min_length=1)]


def _is_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"must be null, folder or a regular expression ({error})") from None
    return text


@schema
class TableConfig:
    """Settings of the table of labels: which file it is, and what its columns are called."""

    file: str | None = None  # a pattern as in .gitignore; None for every table beside the images
    path: str | None = None  # the column of the names of the files; None for the first of `COLUMN_NAMES`
    label: str | list[str] | None = None  # the column of the classes, or the columns of a one-hot table
    group: str | None = None
    split: str | None = None


@schema
class Selection:
    """Settings that say which files of a source are its images and its table of labels."""

    table: TableConfig = dataclasses.field(default_factory=TableConfig)
    include: list[str] | None = None  # patterns as in .gitignore; images that match none are left out
    exclude: list[str] | None = None  # patterns as in .gitignore; files that match one are left out


EVERYTHING = Selection()


@schema
class DatasetConfig(Selection):
    """Settings that say where labelled images come from."""

    name: Name  # used in reports, folder names and, by default, for the experiment and the model in MLflow
    longest_side: PositiveInt  # pixels; larger images are downscaled when decoded, which bounds the disk usage
    # "folder", a regular expression that finds the name of the group in a path, or None for no groups.
    group: Annotated[str, AfterValidator(_is_pattern)] | None
    first_page: bool = False  # whether the first page is the image of a TIFF that has several
    torchvision: TorchvisionConfig | None = None  # None for the folders and archives in data/

    @property
    def origin(self) -> str:
        """The name of what determines the version of the data."""
        return f"torchvision {self.torchvision.name}" if self.torchvision else "data.dvc"


# Maps accepted names of a split to the split. Hugging Face's `datasets` accepts the same names.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# The name of a file, the bytes of one, or the reason why it can't be used.
FileContent = str | bytes | InvalidImageError
Content = FileContent | np.ndarray  # (H, W, 1 or 3) uint8


class Sample(NamedTuple):
    """One labelled image that is not decoded yet."""

    path: str  # as shown in reports: data/cats/1.jpg, data/pets.zip:cats/1.jpg, MNIST/train/17
    label: str  # class name; "" if it is unknown, in which case `content` is the error
    split: str  # train, val or test if the source assigns one, else ""
    group: str  # images of one group are kept in the same split; "" if the source names none
    content: Content
    # Values of the columns in `Source.extra_columns`; empty if the source has none for this image.
    extra_values: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """Labelled images that can be iterated over once."""

    classes: list[str]  # every label that occurs, in the order of the source
    count: int  # number of samples in `samples`
    samples: Iterator[Sample]  # in the same order in every run
    extra_columns: Sequence[str] = ()  # names of the additional columns of the label tables
    notes: Sequence[str] = ()  # warnings about what may be unintended, in sentences
    labels: str = ""  # the tables that the labels come from; "" for names of folders and for Parquet files with images
    mismatch: "Mismatch | None" = None


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """How a table and the files do not meet."""

    rows: Sequence[str]  # the paths in the table that lead to no file
    files: Sequence[str]  # the images that no row leads to
    message: str  # one sentence with the first of each
