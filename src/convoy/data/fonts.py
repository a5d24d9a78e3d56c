"""Fonts: find installed families that together cover all characters in the text of a plot."""

import functools
from collections.abc import Iterable
from pathlib import Path

# The font that comes with matplotlib.
DEFAULT = "DejaVu Sans"


def font_families(texts: Iterable[str]) -> list[str]:
    """Return the font families needed to draw texts.

    The first is matplotlib's default family. Installed families that have the characters it lacks follow.
    """
    return list(_families(frozenset("".join(texts)))[0])


def missing_letters(texts: Iterable[str]) -> set[str]:
    """Return the characters of texts that no installed font has, and that a plot shows as boxes."""
    return set(_families(frozenset("".join(texts)))[1])


@functools.cache
def _families(letters: frozenset[str]) -> tuple[list[str], set[str]]:
    from matplotlib.font_manager import findfont, findSystemFonts, fontManager, get_font

    families = [DEFAULT]
    missing = {ord(letter) for letter in letters} - get_font(findfont(DEFAULT)).get_charmap().keys()
    # Search the system rather than matplotlib's font list: that is cached in a file and lacks newly installed fonts.
    for file in sorted(findSystemFonts(), key=_preference) if missing else []:
        try:
            font = get_font(file)
            has = missing & font.get_charmap().keys()
        except (OSError, RuntimeError):
            continue
        # matplotlib can't draw bitmap fonts, such as those of coloured emoji.
        if has and font.scalable:
            fontManager.addfont(file)
            families.append(font.family_name)
            missing -= has
        if not missing:
            break
    return families, {chr(letter) for letter in missing}


def _preference(file: str) -> tuple[bool, bool, str]:
    """Return a sort key that puts upright sans-serif fonts first, in a reproducible order."""
    name = Path(file).name.lower()
    return "sans" not in name, "regular" not in name, name
