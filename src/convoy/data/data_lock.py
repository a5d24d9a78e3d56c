"""Data lock: the class list of a data set, which only grows, and the last two versions of the data."""

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import Field

from convoy.core.config import NonNegativeInt, schema, validate
from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.sources.base import DatasetConfig

HEADER = """\
# What the fetch stage has seen of each data set: where its images come from (data.dvc says so; if the same images have
# moved, write the new place here), its classes in the order of their labels, and the last two versions.
# Commit it. A class that has no images any more keeps its place; to drop one for good, take it off the list here.
# Splits that are drawn from images given for training go on to be, so that no test image becomes a training image.
"""

Drawn = Literal["val", "test"]
DRAWN: tuple[Drawn, Drawn] = ("val", "test")


@schema
class LockedVersion:
    """One version of a data set."""

    digest: str  # of all images with their labels and splits, independent of order and file names
    images: dict[str, NonNegativeInt]  # class -> number of images
    quarantine: NonNegativeInt  # number of excluded images


@schema
class DataLock:
    """The history of a data set, as recorded in data.lock."""

    source: str | None = None  # where the images come from, see `check_source`; None if not recorded
    classes: list[str]
    versions: Annotated[list[LockedVersion], Field(max_length=2)]  # newest last
    drawn: list[Drawn] = dataclasses.field(default_factory=list)  # splits drawn from training images

    @classmethod
    def load(cls, file: Path, name: str) -> "DataLock":
        """Load the lock of the data set `name` from `file`; it is empty if the data set is new.

        Raises:
            ConvoyError: If the file is damaged.
        """
        values = _sections(file).get(name, {"classes": [], "versions": []})
        return validate(cls, values, f"{file.name}: {name}")

    def save(self, file: Path, name: str) -> None:
        """Save the lock to `file`, keeping the locks of other data sets."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        sections = _sections(file) | {name: values}
        text = HEADER + yaml.safe_dump(sections, sort_keys=False)
        arriving = file.with_name(f"{file.name}.arriving")
        arriving.write_text(text, encoding="utf-8")
        arriving.replace(file)

    def check(self, name: str, classes: Sequence[str]) -> None:
        """Check that at least one known class is still present; otherwise this is a different data set.

        Raises:
            ConvoyError: If none of the known classes is in `classes`.
        """
        if self.classes and not set(self.classes) & set(classes):
            raise ConvoyError(
                f"none of the classes that data.lock knows of {name} ({truncate_names(self.classes)}) is there, but"
                f" {truncate_names(classes)}: give another data set another name in conf/dataset/, or take this one out"
                " of data.lock; if these are folders around the classes, put the classes themselves at the top"
            )

    def draws(self, given: Set[str]) -> list[Drawn]:
        """Return the splits to draw from the images that the source assigns to training.

        These are the splits that the source does not assign, or did not assign in an earlier version.

        Args:
            given: The splits that the source assigns now; "" is for images without one.
        """
        # A source that assigns no splits now may assign these images to training later.
        if given <= {""}:
            return [*DRAWN]
        if "train" not in given:
            return self.drawn
        return [split for split in DRAWN if split in self.drawn or split not in given]

    def grown(
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
        ever = [split for split in DRAWN if split in self.drawn or split in drawn]
        source = source or self.source
        return DataLock(source=source, classes=extended(self.classes, classes), versions=versions, drawn=ever)

    def changes(self) -> list[str]:
        """Describe the changes from the previous version to the newest, one message for each change."""
        if len(self.versions) < 2:
            return []
        before, now = self.versions
        words = []
        if new := [name for name in now.images if name not in before.images]:
            words.append(f"new classes: {', '.join(map(repr, new))}")
        if gone := [name for name in before.images if name not in now.images]:
            words.append(f"classes that have no images any more: {', '.join(map(repr, gone))}; they keep their places")
        total, earlier = sum(now.images.values()), sum(before.images.values())
        if total != earlier:
            words.append(f"{total} images, {total - earlier:+} ({earlier} before)")
        for name in now.images:
            if name in before.images and now.images[name] != before.images[name]:
                words.append(f"class {name!r}: {now.images[name]} images ({before.images[name]} before)")
        if not words and now.digest != before.digest:
            words.append("as many images in each class as before, but not the same ones, or in another split")
        if now.quarantine != before.quarantine:
            words.append(f"{now.quarantine} images in quarantine ({before.quarantine} before)")
        return words


# The lock of a data set that has never been fetched.
NEW = DataLock(classes=[], versions=[])


def extended(known: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return the class list `known` with new classes appended, so that the index of a class never changes."""
    return list(dict.fromkeys([*known, *classes]))


def version_of(pieces: Iterable[pd.DataFrame], quarantine: int) -> LockedVersion:
    """Return the version that consists of the given images.

    Args:
        pieces: Tables with a row for each image and the columns sha256, label and split.
        quarantine: The number of excluded images.
    """
    # The digest is a sum of hashes, because a sum does not depend on the order and needs no memory.
    total, counts = 0, collections.Counter[str]()
    for piece in pieces:
        for row in zip(*(piece[name].tolist() for name in ("sha256", "label", "split")), strict=True):
            total += int.from_bytes(hashlib.sha256("\t".join(row).encode()).digest())
        counts.update(piece["label"].tolist())
    return LockedVersion(
        digest=f"{total % 2**128:032x}",
        images=dict(sorted(counts.items())),
        quarantine=quarantine,
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
    source = _source(root / "data.dvc", dataset)
    known = DataLock.load(root / "data.lock", dataset.name).source
    if source is None or known is None or source == known:
        return source
    file = "conf/dataset/" + ("" if dataset.torchvision else "folder.yaml")
    line = yaml.safe_dump({"source": source}, allow_unicode=True, width=10**6).strip()
    raise ConvoyError(
        f"the images of {dataset.name} are to come from {source}, and came from {known} until now (data.lock). If they "
        f"are another data set, give it a name of its own: set `name:` in {file}. If the same images have moved, set "
        f"`{line}` under {dataset.name} in data.lock"
    )


def _source(described: Path, dataset: DatasetConfig) -> str | None:
    if dataset.torchvision is not None:
        return dataset.origin
    if not described.exists():
        return None
    try:
        (dep,) = yaml.safe_load(described.read_text(encoding="utf-8")).get("deps") or [{"path": "data"}]
        return " ".join([*([dep["repo"]["url"]] if "repo" in dep else []), dep["path"]])
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = f"{described.name} does not say where the images come from"
        raise ConvoyError(f"{said}: take it from git again ({error})") from None


def _sections(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConvoyError(f"{file.name} can't be read: take it from git again ({error})") from error
    if not isinstance(sections, dict):
        raise ConvoyError(f"{file.name} is not a table of data sets: take it from git again")
    return sections
