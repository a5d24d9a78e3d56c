"""Companions: files whose names say that they are masks, labels or other versions of the images beside them."""

import collections
import itertools
import re
from collections.abc import Iterable

from convoy.core.text import truncate_names

# A word at the end of a name, or the name of a folder, by which data sets mark what is no image of a class.
MASK_WORDS = {
    "annotation", "annotations", "depth", "groundtruth", "gt", "instance", "label", "labels", "mask", "masks", "matte",
    "overlay", "seg", "segmentation", "segmentations", "thumb", "thumbnail", "trimap",
}  # fmt: skip
# Other words count if at least this fraction of the images, and this many, end with the same one.
MIN_FRACTION, MIN_COUNT = 0.1, 3
ENDING = re.compile(r"[ _.-]+([A-Za-z]{2,}(?:[ _-][A-Za-z]+)*)[ _.-]?\d*$")


def note_companions(paths: Iterable[str]) -> list[str]:
    """Return notes about files that look like companions of other files, such as x_mask.png beside x.png.

    Args:
        paths: The paths of the images with a label.
    """
    found: dict[str, list[str]] = collections.defaultdict(list)
    count = 0
    # One folder at a time, as there may be very many images.
    for folder, group in itertools.groupby(paths, lambda path: path.rpartition("/")[0]):
        listed = list(group)
        count += len(listed)
        stems = {path.rpartition(".")[0] for path in listed}
        for path in listed:
            stem, _, kind = path.rpartition(".")
            if (ending := ENDING.search(stem)) and _has_base(stem, ending, stems):
                found[f"*{stem[ending.start() : ending.end(1)]}*.{kind}"].append(path)
        if word := next((name for name in folder.split("/") if name.lower() in MASK_WORDS), None):
            found[f"{word}/"] += listed
    return [
        f"{truncate_names(same)}: by the name{'s' * (len(same) > 1)} masks or other versions; if these are no images of"
        f" the classes, leave them out by dataset.exclude (convoy use --exclude '{pattern}')"
        for pattern, same in found.items()
        if _is_mask(pattern) or len(same) >= max(MIN_COUNT, MIN_FRACTION * count)
    ]


def _has_base(stem: str, ending: re.Match[str], stems: set[str]) -> bool:
    """Check whether a name without its ending, with or without the number in it, is the name of another image."""
    return stem[: ending.start()] in stems or stem[: ending.start()].rstrip("0123456789") in stems


def _is_mask(pattern: str) -> bool:
    words = re.findall("[a-z]+", pattern.rpartition(".")[0].lower() or pattern.lower())
    return bool(MASK_WORDS.intersection(words))
