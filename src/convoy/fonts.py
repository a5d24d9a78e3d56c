"""Fonts: the families that together have every letter of the names in a plot."""

import functools
from collections.abc import Iterable
from pathlib import Path

DEFAULT = "DejaVu Sans"  # matplotlib brings it along


def font_families(texts: Iterable[str]) -> list[str]:
    """Return matplotlib's default family and, where it lacks letters of `texts`, installed ones that have them."""
    return list(_families(frozenset("".join(texts)))[0])


def missing_letters(texts: Iterable[str]) -> set[str]:
    """Return the letters of `texts` that no installed font has, and that a plot shows as boxes."""
    return set(_families(frozenset("".join(texts)))[1])


@functools.cache
def _families(letters: frozenset[str]) -> tuple[list[str], set[str]]:
    from matplotlib.font_manager import findfont, findSystemFonts, fontManager, get_font

    families = [DEFAULT]
    missing = {ord(letter) for letter in letters} - get_font(findfont(DEFAULT)).get_charmap().keys()
    # not from matplotlib's list of fonts, which it keeps in a file and which lacks those that were installed since
    for file in sorted(findSystemFonts(), key=_preference) if missing else []:
        try:
            font = get_font(file)
            has = missing & font.get_charmap().keys()
        except (OSError, RuntimeError):
            continue
        # matplotlib can't draw fonts of bitmaps, such as those of coloured emoji
        if has and font.scalable:
            fontManager.addfont(file)
            families.append(font.family_name)
            missing -= has
        if not missing:
            break
    return families, {chr(letter) for letter in missing}


def _preference(file: str) -> tuple[bool, bool, str]:
    """Put upright fonts without serifs first, and always in the same order."""
    name = Path(file).name.lower()
    return "sans" not in name, "regular" not in name, name
