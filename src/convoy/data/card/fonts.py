"""Fonts: find installed families that together cover all characters in the text of a plot."""

import functools
from collections.abc import Iterable
from pathlib import Path

# The font that comes with matplotlib.
DEFAULT_FAMILY = "DejaVu Sans"


def find_font_families(texts: Iterable[str]) -> list[str]:
    """Return the font families needed to draw texts.

    The first is matplotlib's default family. Installed families that have the characters it lacks follow.
    """
    return list(_find_families(frozenset("".join(texts)))[0])


def find_missing_characters(texts: Iterable[str]) -> set[str]:
    """Return the characters of texts that no installed font has, and that a plot shows as boxes."""
    return set(_find_families(frozenset("".join(texts)))[1])


@functools.cache
def _find_families(characters: frozenset[str]) -> tuple[list[str], set[str]]:
    from matplotlib.font_manager import findfont, findSystemFonts, fontManager, get_font

    families = [DEFAULT_FAMILY]
    missing = {ord(character) for character in characters} - get_font(findfont(DEFAULT_FAMILY)).get_charmap().keys()
    # Search the system rather than matplotlib's font list: that is cached in a file and lacks newly installed fonts.
    for file in sorted(findSystemFonts(), key=_sort_key) if missing else []:
        try:
            font = get_font(file)
            added = missing & font.get_charmap().keys()
        except (OSError, RuntimeError):
            continue
        # matplotlib can't draw bitmap fonts, such as those of coloured emoji.
        if added and font.scalable:
            fontManager.addfont(file)
            families.append(font.family_name)
            missing -= added
        if not missing:
            break
    return families, {chr(character) for character in missing}


def _sort_key(file: str) -> tuple[bool, bool, str]:
    """Return a sort key that puts upright sans-serif fonts first, in a reproducible order."""
    name = Path(file).name.lower()
    return "sans" not in name, "regular" not in name, name
