"""Data lock: the class list of a data set, which only grows, and the last two versions of the data."""

import collections
import dataclasses
import hashlib
import shlex
from collections.abc import Collection, Iterable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field

from convoy.core.config import NonNegativeInt, schema, validate
from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.sources.base import DatasetConfig

if TYPE_CHECKING:
    import pandas as pd

HEADER = """\
# What the fetch stage knows of each data set: where its images come from (see data.dvc; if the same images were moved,
# write the new location here), its classes in the order of their labels, and the last two versions.
# Commit this file. A class without images keeps its label; to remove it for good, delete it from the list.
# Splits that are once drawn from training images are always drawn, so that no test image becomes a training image.
"""

DrawnSplit = Literal["val", "test"]
DRAWN_SPLITS: tuple[DrawnSplit, DrawnSplit] = ("val", "test")


@schema
class LockedVersion:
    """One version of a data set."""

    digest: str  # of all images with their labels and splits, independent of order and file names
    images: dict[str, NonNegativeInt]  # class -> number of images
    quarantine: NonNegativeInt  # number of excluded images
    labels: str | None = None  # the tables that the labels come from; None for names of folders


@schema
class DataLock:
    """The recorded state of a data set: an entry of data.lock."""

    source: str | None = None  # where the images come from, see `check_source`; None if not recorded
    classes: list[str]
    versions: Annotated[list[LockedVersion], Field(max_length=2)]  # newest last
    drawn: list[DrawnSplit] = dataclasses.field(default_factory=list)  # splits drawn from training images

    @classmethod
    def load(cls, file: Path, name: str) -> "DataLock":
        """Load the lock of the data set `name` from `file`; it is empty if the data set is new.

        Raises:
            ConvoyError: If the file is damaged.
        """
        values = _load_sections(file).get(name, {"classes": [], "versions": []})
        return validate(cls, values, f"{file.name}: {name}")

    def save(self, file: Path, name: str) -> None:
        """Save the lock to `file`, keeping the locks of other data sets."""
        values = dataclasses.asdict(self, dict_factory=_without_none)
        sections = _load_sections(file) | {name: values}
        text = HEADER + yaml.safe_dump(sections, sort_keys=False)
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)

    def check(self, name: str, classes: Sequence[str], labels: str | None = None) -> "DataLock":
        """Check that at least one known class is still present; otherwise this is a different data set.

        Args:
            name: The name of the data set.
            classes: The classes that are present.
            labels: The tables that the labels come from; None for names of folders.

        Returns:
            The lock, without classes if the labels come from another place now and all of them are new.

        Raises:
            ConvoyError: If none of the known classes is in `classes`.
        """
        if self.classes and not set(self.classes) & set(classes):
            # For example the classes were part_1 and part_2, and a table of labels was added.
            if self.versions and self.versions[-1].labels != labels:
                return dataclasses.replace(self, classes=[])
            raise ConvoyError(
                f"the data has the classes {truncate_names(classes)}, but none of those that data.lock records for"
                f" {name} ({truncate_names(self.classes)}): give a new data set a new name in conf/dataset/, or remove"
                f" {name} from data.lock; if these are folders that contain the classes, move the class folders to the"
                " top"
            )
        return self

    def splits_to_draw(self, given: Set[str]) -> list[DrawnSplit]:
        """Return the splits to draw from the images that the source assigns to training.

        These are the splits that the source does not assign, or did not assign in an earlier version.

        Args:
            given: The splits that the source assigns now; "" is for images without one.
        """
        # A source that assigns no splits now may assign these images to training later.
        if given <= {""}:
            return [*DRAWN_SPLITS]
        if "train" not in given:
            return self.drawn
        return [split for split in DRAWN_SPLITS if split in self.drawn or split not in given]

    def add_version(
        self, classes: Sequence[str], version: LockedVersion, drawn: Collection[str] = (), source: str | None = None
    ) -> "DataLock":
        """Return a copy with new classes appended and `version` as the newest version.

        Adding the newest version again changes nothing.

        Args:
            classes: The classes of this version, known or new.
            version: The version to add.
            drawn: The splits drawn from training images, added to those drawn before.
            source: Where the images come from; None keeps the recorded source.
        """
        versions = self.versions if self.versions[-1:] == [version] else [*self.versions[-1:], version]
        all_drawn = [split for split in DRAWN_SPLITS if split in self.drawn or split in drawn]
        return DataLock(
            source=source or self.source,
            classes=extend_classes(self.classes, classes),
            versions=versions,
            drawn=all_drawn,
        )

    def describe_changes(self) -> list[str]:
        """Describe the changes from the previous version to the newest, one message for each change."""
        if len(self.versions) < 2:
            return []
        before, now = self.versions
        messages = []
        if now.labels != before.labels:
            places = [version.labels or "the names of folders" for version in (now, before)]
            messages.append(f"the labels come from {places[0]}, and came from {places[1]} before")
        if new := [name for name in now.images if name not in before.images]:
            messages.append(f"new classes: {', '.join(map(repr, new))}")
        if gone := [name for name in before.images if name not in now.images]:
            # The class list begins again if the labels come from another place.
            kept = "; they keep their labels" if set(gone) & set(self.classes) else ""
            messages.append(f"classes without images now: {', '.join(map(repr, gone))}{kept}")
        total, total_before = sum(now.images.values()), sum(before.images.values())
        if total != total_before:
            messages.append(f"{total} images, {total - total_before:+} ({total_before} before)")
        for name in now.images:
            if name in before.images and now.images[name] != before.images[name]:
                messages.append(f"class {name!r}: {now.images[name]} images ({before.images[name]} before)")
        if not messages and now.digest != before.digest:
            messages.append("the number of images in each class is unchanged, but the images or their splits differ")
        if now.quarantine != before.quarantine:
            messages.append(f"{now.quarantine} images in quarantine ({before.quarantine} before)")
        return messages


def extend_classes(known: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return the class list `known` with new classes appended, so that the index of a class never changes."""
    return list(dict.fromkeys([*known, *classes]))


def _without_none(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if value is not None}


def compute_version(chunks: Iterable["pd.DataFrame"], quarantine: int, labels: str | None = None) -> LockedVersion:
    """Compute the version that consists of the given images.

    Args:
        chunks: Tables with a row for each image and the columns sha256, label and split.
        quarantine: The number of excluded images.
        labels: The tables that the labels come from; None for names of folders.
    """
    # The digest is a sum of hashes, because a sum does not depend on the order and needs no memory.
    total, counts = 0, collections.Counter[str]()
    for chunk in chunks:
        for row in zip(*(chunk[name].tolist() for name in ("sha256", "label", "split")), strict=True):
            total += int.from_bytes(hashlib.sha256("\t".join(row).encode()).digest())
        counts.update(chunk["label"].tolist())
    return LockedVersion(
        digest=f"{total % 2**128:032x}",
        images=dict(sorted(counts.items())),
        quarantine=quarantine,
        labels=labels,
    )


def check_source(root: Path, dataset: DatasetConfig) -> str | None:
    """Return where the images of a data set come from, and check it against data.lock.

    Args:
        root: The project folder, with data.dvc and data.lock.
        dataset: The settings of the data set.

    Returns:
        The torchvision data set if the settings name one, else the source in data.dvc; None if there is no such file.

    Raises:
        ConvoyError: If data.lock records another source for the data set of this name.
    """
    source = dataset.origin if dataset.torchvision else find_source(root / "data.dvc")
    recorded = DataLock.load(root / "data.lock", dataset.name).source
    if source is None or recorded is None or source == recorded:
        return source
    rename = (
        "set `name:` in conf/dataset/" if dataset.torchvision else f"`convoy use {shlex.quote(source)} --name NAME`"
    )
    line = yaml.safe_dump({"source": source}, allow_unicode=True, width=10**6).strip()
    raise ConvoyError(
        f"the images of {dataset.name} would come from {source}, but data.lock records that they come from {recorded}."
        f" If this is a different data set, give it its own name: {rename}. If the same images were moved, set"
        f" `{line}` under {dataset.name} in data.lock"
    )


def find_source(dvc_file: Path) -> str | None:
    """Return where the images come from according to data.dvc, or None if there is no such file."""
    if not dvc_file.exists():
        return None
    try:
        (dep,) = yaml.safe_load(dvc_file.read_text(encoding="utf-8")).get("deps") or [{"path": "data"}]
        return " ".join([*([dep["repo"]["url"]] if "repo" in dep else []), dep["path"]])
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{dvc_file.name} does not contain the source of the images"
        raise ConvoyError(f"{problem}: restore it from git ({error})") from None


def _load_sections(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConvoyError(f"{file.name} can't be read: restore it from git ({error})") from error
    if not isinstance(sections, dict):
        raise ConvoyError(f"{file.name} is not a mapping of data sets: restore it from git")
    return sections
