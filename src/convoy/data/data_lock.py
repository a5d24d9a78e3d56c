"""The history of a data set: its class list, which only ever grows, and its last two versions."""

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import Field

from convoy.config import Whole, schema, typed
from convoy.data.sources.base import DatasetConfig
from convoy.errors import ConvoyError
from convoy.text import truncate_names

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
    """What a data set held at one time."""

    digest: str  # of all images, their labels and splits, in whatever order and under whatever names
    images: dict[str, Whole]  # class -> how many
    quarantine: Whole  # images left out


@schema
class DataLock:
    """A data set through time."""

    source: str | None = None  # where its images come from, see `check_source`; None: nobody has written it down
    classes: list[str]
    versions: Annotated[list[LockedVersion], Field(max_length=2)]  # the newest last
    drawn: list[Drawn] = dataclasses.field(default_factory=list)  # from images given for training

    @classmethod
    def load(cls, file: Path, name: str) -> "DataLock":
        """What `file` tells of the data set `name`: nothing where it is new. Raises ConvoyError for a damaged file."""
        values = _sections(file).get(name, {"classes": [], "versions": []})
        return typed(cls, values, f"{file.name}: {name}")

    def save(self, file: Path, name: str) -> None:
        """Put it into `file`, beside other data sets."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        sections = _sections(file) | {name: values}
        text = HEADER + yaml.safe_dump(sections, sort_keys=False)
        arriving = file.with_name(f"{file.name}.arriving")
        arriving.write_text(text, encoding="utf-8")
        arriving.replace(file)

    def check(self, name: str, classes: Sequence[str]) -> None:
        """Raises ConvoyError where no class is left of those that are known: that is not the same data set any more."""
        if self.classes and not set(self.classes) & set(classes):
            raise ConvoyError(
                f"none of the classes that data.lock knows of {name} ({truncate_names(self.classes)}) is there, but"
                f" {truncate_names(classes)}: give another data set another name in conf/dataset/, or take this one out"
                " of data.lock; if these are folders around the classes, put the classes themselves at the top"
            )

    def draws(self, given: Set[str]) -> list[Drawn]:
        """The splits to draw from images given for training: those that are not given, or were not at one time."""
        if given <= {""}:
            return [*DRAWN]  # as these images may be given for training later
        if "train" not in given:
            return self.drawn
        return [split for split in DRAWN if split in self.drawn or split not in given]

    def grown(
        self, classes: Sequence[str], version: LockedVersion, drawn: Collection[str] = (), source: str | None = None
    ) -> "DataLock":
        """With the classes that are new at the end, and this version as the newest. The same twice is the same."""
        versions = self.versions if self.versions[-1:] == [version] else [*self.versions[-1:], version]
        ever = [split for split in DRAWN if split in self.drawn or split in drawn]
        source = source or self.source
        return DataLock(source=source, classes=extended(self.classes, classes), versions=versions, drawn=ever)

    def changes(self) -> list[str]:
        """From the version before to the newest, in words."""
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


NEW = DataLock(classes=[], versions=[])  # that of a data set which was never seen


def extended(known: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The class list `known` with those that are new at its end, so that no label ever shifts."""
    return list(dict.fromkeys([*known, *classes]))


def version_of(pieces: Iterable[pd.DataFrame], quarantine: int) -> LockedVersion:
    """Of the images in tables: sha256, label and split."""
    total, counts = 0, collections.Counter[str]()  # a sum does not depend on the order, and needs no memory
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
    """Return where the images of a data set come from, as data.dvc in `root` has it; None where there is no such file.

    Raises ConvoyError where data.lock has another source for the data set of this name.
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
