"""The source: labelled images that are about to be read, wherever they lie."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field

from convoy.config import Count, Name, schema
from convoy.data.image_io import InvalidImageError


@schema
class TorchvisionSet:
    """A data set that torchvision knows."""

    name: str  # of the class in torchvision.datasets
    # split -> the arguments that select it; "all" for a set without splits
    splits: Annotated[dict[Literal["train", "val", "test", "all"], dict[str, Any]], Field(min_length=1)]


def _is_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"neither null nor folder nor a regular expression ({error})") from None
    return text


@schema
class DatasetConfig:
    """Where labelled images come from."""

    name: Name  # what reports, folders that are made, and by default the experiment and the model in MLflow call it
    longest_side: Count  # pixels; a larger image is reduced when it is decoded, which bounds the disk
    # "folder", or a regular expression that finds the group's name in a path
    group: Annotated[str, AfterValidator(_is_pattern)] | None
    torchvision: TorchvisionSet | None = None  # None: the folders and archives in data/

    @property
    def origin(self) -> str:
        """What says which version of the data it is."""
        return f"torchvision {self.torchvision.name}" if self.torchvision else "data.dvc"


# as written -> as meant; the words that Hugging Face's `datasets` knows, too
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

FileContent = str | bytes | InvalidImageError  # the name of a file; what was in one; or why it is no use
Content = FileContent | np.ndarray  # (H, W, 1 or 3) uint8


class Sample(NamedTuple):
    """One labelled image, not decoded yet."""

    path: str  # as reports name it: data/cats/1.jpg, data/pets.zip:cats/1.jpg, MNIST/train/17
    label: str  # the name of its class; "" where that is unknown, which `content` then says
    split: str  # train, val or test where the source says so, else ""
    group: str  # images of one group stay on one side of the split; "" where the source names none
    content: Content
    more: tuple[str, ...] = ()  # what `Source.more` names; nothing where nothing is said


@dataclasses.dataclass(frozen=True)
class Source:
    """Labelled images, to be gone through once."""

    classes: list[str]  # every label of a member, in the order of the source
    count: int  # of the members
    members: Iterator[Sample]  # in an order that does not change from run to run
    more: Sequence[str] = ()  # names of the other columns of the tables of labels
    notes: Sequence[str] = ()  # what may not be as it was meant, in sentences
