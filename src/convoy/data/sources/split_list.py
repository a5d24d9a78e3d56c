"""Split lists: text files with the names or ids of the images of a split."""

import functools
from collections.abc import Callable, Sequence

from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.sources.base import SPLIT_NAMES
from convoy.data.sources.file_listing import Annotation, FileSet
from convoy.data.sources.label_table import LabelTable
from convoy.data.sources.path_matching import File, PathMatcher

Rows = Sequence[Annotation]
UNLISTED = "is in no list of a split"


class SplitLists:
    """The splits that lists give to files.

    An image in no list is a training image, unless there is a list of the training images.

    Args:
        lists: The lists; none is allowed.
        file_sets: The file sets in which the files are looked up.

    Raises:
        ConvoyError: If a list leads to no file, or if two give a file different splits.
    """

    def __init__(self, lists: Sequence[LabelTable], file_sets: Sequence[FileSet]) -> None:
        self.lists, self.file_sets = lists, file_sets
        self.splits: dict[File, tuple[str, str]] = {}
        self.unmatched: list[str] = []
        for table in lists:
            matcher = PathMatcher(file_sets, table.file_set, table.folder, table.rows["path"])
            if not matcher.found:
                first = truncate_names([*table.rows["path"][:3]])
                raise ConvoyError(
                    f"{table.title} leads to no image by {first}: correct the names,"
                    f" or leave the list out by dataset.exclude (convoy use --exclude {table.title})"
                )
            names = table.rows["split"].str.strip().str.lower().map(SPLIT_NAMES).fillna("")
            for path, split in zip(table.rows["path"], names, strict=True):
                files = matcher.find(path)
                if len({file for _, file in files}) != 1:
                    self.unmatched.append(path)
                for file in files if len({file for _, file in files}) == 1 else []:
                    known, title = self.splits.setdefault(file, (split, table.title))
                    if known != split:
                        raise ConvoyError(
                            f"{file_sets[file[0]].name}{file[1]} is a {known} image by {title} and a {split} image by"
                            f" {table.title}: leave one of the two lists out by dataset.exclude (convoy use --exclude)"
                        )
        has_training = any(split == "train" for split, _ in self.splits.values())
        self.default = "" if has_training else "train"

    def apply(self, number: int, annotate: Callable[[str], Rows]) -> Callable[[str], Rows]:
        """Return the function `annotate` of a file set, with the splits of the lists added to what it returns."""
        if not self.lists:
            return annotate

        # The cache makes images with the same annotations share one object, which saves memory.
        @functools.cache
        def with_split(rows: Rows, split: str) -> Rows:
            return tuple(
                row if row.fault else row._replace(split=split) if split else row._replace(fault=UNLISTED)
                for row in rows
            )

        def annotate_with_split(path: str) -> Rows:
            rows = tuple(annotate(path))
            split, title = self.splits.get((number, path), (self.default, ""))
            if title and (other := {row.split for row in rows if not row.fault} - {"", split}):
                raise ConvoyError(
                    f"{self.file_sets[number].name}{path} is a {split} image by {title}, but a {min(other)} image by"
                    f" its folder or table: leave the list out by dataset.exclude (convoy use --exclude {title}), or"
                    " move the image"
                )
            return with_split(rows, split)

        return annotate_with_split
