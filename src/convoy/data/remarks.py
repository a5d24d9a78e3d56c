"""Remarks: what decoded images may have that is unintended, collected while they are decoded."""

import collections

import numpy as np

from convoy.core.text import MAX_LISTED_NAMES, truncate_names
from convoy.data.decode_cache import BILEVEL, ONE_COLOUR


class Remarks:
    """Counts of the images with several frames, with one bit, one colour or one pixel, and examples of each."""

    def __init__(self) -> None:
        self.total = self.unused_frames = 0
        self.counts = collections.Counter[str]()
        self.examples = collections.defaultdict[str, list[str]](list)

    def add(self, paths: list[str], records: np.ndarray) -> None:
        """Add usable images.

        Args:
            paths: Their paths.
            records: (N,) `RECORD`.
        """
        frames, traits = records["frames"], records["traits"]
        self.total += len(paths)
        self.unused_frames += int((frames - 1).sum())
        has_one_pixel = (records["source_height"] == 1) & (records["source_width"] == 1)
        is_remarkable = {
            "frames": frames > 1,
            "bilevel": traits & BILEVEL > 0,
            "colour": (traits & ONE_COLOUR > 0) & ~has_one_pixel,
            "pixel": has_one_pixel,
        }
        for kind, rows in is_remarkable.items():
            found = np.flatnonzero(rows)
            self.counts[kind] += len(found)
            missing = MAX_LISTED_NAMES - len(self.examples[kind])
            self.examples[kind] += [
                f"{paths[row]} ({frames[row]})" if kind == "frames" else paths[row] for row in found[:missing]
            ]

    def describe(self) -> list[str]:
        """Return the remarks in sentences."""
        notes = []
        if count := self.counts["frames"]:
            notes.append(
                f"{count:,} of {self.total:,} images have several frames or pages, of which only the first is used, and"
                f" {self.unused_frames:,} are not: {self._list('frames')}"
            )
        if 0 < (count := self.counts["bilevel"]) < self.total:
            notes.append(
                f"{count:,} of {self.total:,} images have one bit per pixel, as masks have: {self._list('bilevel')}; if"
                " these are no images of the classes, leave them out by dataset.exclude"
            )
        for kind in ("colour", "pixel"):
            if count := self.counts[kind]:
                notes.append(f"{count:,} of {self.total:,} images have only one {kind}: {self._list(kind)}")
        return notes

    def _list(self, kind: str) -> str:
        examples = self.examples[kind]
        return truncate_names(examples) + (", ..." if self.counts[kind] > len(examples) else "")
