"""The data card: it describes and shows the data, whatever the labels look like."""

import re
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from convoy.data.card import fonts
from convoy.data.card.card import write_fetch_card, write_preprocess_card
from convoy.data.card.plots import make_tile
from convoy.data.card.summary import FetchSummary, PreprocessSummary

RED = (255, 0, 0)
LABELS = ["a|b", "<script>alert(1)</script>", "🦉 owl", "猫", "$x^2$ $y$", "__init__", "*star*", "`tick`", "007", "1e5",
          "[link](there)", "![picture](there)", "العربية", "# heading", "~~gone~~", "&amp;", "C:\\dir\\", "_a_", "=",
          "-", "$\\frac$"]  # fmt: skip


def make_images(height: int = 8, width: int = 8, channels: int = 3) -> Callable[[int], np.ndarray]:
    """Images that are red, or white where they are grey."""
    return lambda row: np.broadcast_to(np.array(RED[:channels], np.uint8), (height, width, channels))


def make_table(labels: Iterable[str], split: str = "") -> pd.DataFrame:
    """A table of images of 8x8 pixels."""
    table = pd.DataFrame({"label": list(labels)}, dtype=str)
    table["path"] = [f"{label}/{row}.png" for row, label in enumerate(table["label"])]
    return table.assign(split=split, group="", height=8, width=8, channels=3, source_height=8, source_width=8)


def make_excluded(count: int) -> pd.DataFrame:
    """Images that are left out."""
    paths = [f"cat/{row}.png" for row in range(count)]
    return pd.DataFrame({"path": paths, "label": "cat", "reason": "is empty"}, dtype=str)


def make_fetch_summary(table: pd.DataFrame, **more: Any) -> FetchSummary:
    empty = {
        "quarantine": make_excluded(0),
        "merged": pd.DataFrame({"path": [], "kept": []}, dtype=str),
        "changes": [],
        "notes": [],
    }
    classes = list(dict.fromkeys(table["label"]))
    return FetchSummary(
        **{"name": "toy", "classes": classes, "table": table, "read_image": make_images()} | empty | more
    )


def make_pairs(table: pd.DataFrame, *rows: tuple[int, int]) -> pd.DataFrame:
    """Near duplicates: pairs of rows of `table`."""
    one, other = (table.iloc[[pair[side] for pair in rows]].reset_index(drop=True) for side in (0, 1))
    return pd.DataFrame(
        {"path": one["path"], "other": other["path"], "label": one["label"], "other_label": other["label"]}
    )


def make_preprocess_summary(table: pd.DataFrame, **more: Any) -> PreprocessSummary:
    measured = {"size": 8, "channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    images = {
        "classes": sorted(set(table["label"])),
        "table": table,
        "read_image": make_images(),
        "read_original": lambda path: make_images()(0),
    }
    near = more.get("near_duplicates", make_pairs(table))
    counts = {"pair_count": len(near), "conflict_count": int((near["label"] != near["other_label"]).sum())}
    empty = {"near_duplicates": near, "excluded": make_excluded(0), "notes": []} | counts
    return PreprocessSummary(**{"name": "toy"} | measured | images | empty | more)


def read_image(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


class Cells(HTMLParser):
    """The texts of all cells of all tables."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside = tag in ("td", "th")
        if self.inside:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data


def read_cells(card: str) -> list[str]:
    parser = Cells()
    parser.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card))
    return parser.texts


def write_fetch_text(folder: Path, **more: Any) -> str:
    write_fetch_card(make_fetch_summary(**more), folder)
    return (folder / "card.md").read_text()


def write_preprocess_text(folder: Path, **more: Any) -> str:
    write_preprocess_card(make_preprocess_summary(**more), folder)
    return (folder / "card.md").read_text()


def find_headings(card: str) -> list[str]:
    return re.findall(r"^## (.*)", card, re.MULTILINE)


def make_full_fetch_summary() -> FetchSummary:
    table = make_table(["cat"] * 7 + ["owl"] * 3)
    table.loc[0, ["height", "source_height"]] = 16, 900
    merged = pd.DataFrame({"path": ["cat/copy.png"], "kept": ["cat/1.png"]})
    return make_fetch_summary(
        table, quarantine=make_excluded(60), merged=merged, changes=["3 images of 'owl' are new."]
    )


def make_full_preprocess_summary() -> PreprocessSummary:
    table = make_table(["cat"] * 7 + ["owl"] * 3).assign(split=["train", "train", "val", "test", "train"] * 2)
    return make_preprocess_summary(
        table,
        near_duplicates=make_pairs(table, (0, 1), (2, 8)),
        excluded=make_excluded(2),
        notes=["Class 'owl' is small."],
    )


# Both cards


@pytest.mark.parametrize(
    ("write", "made"),
    [(write_fetch_card, make_full_fetch_summary), (write_preprocess_card, make_full_preprocess_summary)],
)
def test_card_shows_exactly_the_plots_beside_it(write: Callable, made: Callable, tmp_path: Path) -> None:
    write(made(), tmp_path)
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (tmp_path / "card.md").read_text())
    assert sorted(shown) == sorted(file.name for file in tmp_path.glob("*.png"))
    assert len(shown) >= 3


@pytest.mark.parametrize(
    ("write", "made"),
    [(write_fetch_card, make_full_fetch_summary), (write_preprocess_card, make_full_preprocess_summary)],
)
def test_card_is_bit_identical_under_any_matplotlib_style(write: Callable, made: Callable, tmp_path: Path) -> None:
    for name, size in (("one", 10), ("other", 20)):
        (tmp_path / name).mkdir()
        with matplotlib.rc_context({"font.size": size, "axes.facecolor": "red", "xtick.labelsize": size}):
            write(made(), tmp_path / name)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "other").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_sections_without_content_are_quarantine(tmp_path: Path) -> None:
    everyday = ["Changes", "Classes", "Size and colour", "Sample images"]
    assert find_headings(write_fetch_text(tmp_path, table=make_table(["cat", "owl"]))) == everyday
    assert find_headings(write_preprocess_text(tmp_path, table=make_table(["cat"], "train"))) == [
        "Splits",
        "Network inputs",
    ]


def test_label_is_shown_as_it_is_whatever_is_in_it(tmp_path: Path) -> None:
    shown = read_cells(
        write_fetch_text(tmp_path, table=make_table(LABELS), quarantine=make_excluded(1).assign(path="a|b/<0>.png"))
    )
    assert set(LABELS) | {"a|b/<0>.png"} <= set(shown)


printing = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30)


@settings(max_examples=5)
@given(st.lists(printing, min_size=20, max_size=20, unique=True))
def test_any_text_can_be_a_label(tmp_path_factory: pytest.TempPathFactory, labels: list[str]) -> None:
    assert set(labels) <= set(read_cells(write_fetch_text(tmp_path_factory.mktemp("card"), table=make_table(labels))))


def test_unprintable_characters_are_escaped(tmp_path: Path) -> None:
    shown = read_cells(write_fetch_text(tmp_path, table=make_table(["two\nlines", "first " + "w" * 500 + " last"])))
    assert r"two\nlines" in shown
    (long,) = {text for text in shown if text.startswith("first")}
    assert long.endswith("w last")
    assert len(long) <= 80


def test_names_that_cannot_be_drawn_are_listed_below_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    fonts._find_families.cache_clear()
    assert "From top to bottom: 'cat', '猫'." in write_fetch_text(tmp_path, table=make_table(["cat", "猫"]))
    assert "From top to bottom" not in write_fetch_text(tmp_path, table=make_table(["cat", "owl"]))


def test_largest_and_smallest_of_many_classes_are_shown(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(300)]
    loaded: list[int] = []

    def images(row: int) -> np.ndarray:
        loaded.append(row)
        return make_images()(row)

    table = make_table(np.repeat(names, np.arange(300, 0, -1)))  # 45,150 images
    card = write_fetch_text(tmp_path, table=table, read_image=images)
    assert "Of 300 classes these are the 50 largest and the 50 smallest." in card
    assert {"class 0", "class 49", "class 250", "class 299"} <= set(read_cells(card))
    assert not {"class 50", "class 249"} & set(read_cells(card))
    assert len(loaded) <= 100 * 10


@pytest.mark.parametrize("count", [1, 2, 50, 51, 200])
def test_every_class_is_in_the_table_and_on_a_contact_sheet(count: int, tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(count)]
    assert set(names) <= set(read_cells(write_fetch_text(tmp_path, table=make_table(names))))
    rows = sum((len(read_image(file)) + 3) // 67 for file in tmp_path.glob("contact_*.png"))
    assert rows == count


@pytest.mark.parametrize("image", [make_images(8, 8), make_images(60, 60), make_images(900, 900)])
def test_small_images_are_enlarged_and_large_ones_reduced(image: Callable, tmp_path: Path) -> None:
    write_fetch_text(tmp_path, table=make_table(["cat"] * 3), read_image=image)
    red = int((read_image(tmp_path / "contact_1.png") == RED).all(axis=2).sum())
    assert 3 * 60**2 <= red <= 3 * 64**2


@pytest.mark.parametrize("shape", [(8, 400, 3), (400, 8, 1), (3, 9, 1), (500, 100, 3)])
def test_very_wide_image_is_shown_by_its_center(shape: tuple[int, int, int]) -> None:
    shown = make_tile(np.zeros(shape, np.uint8), 96)
    dark = np.argwhere((shown == 0).all(axis=2))
    high, wide = dark.max(axis=0) - dark.min(axis=0) + 1
    assert max(high, wide) >= 72
    assert min(high, wide) >= 18


def test_long_list_is_truncated_and_names_the_complete_file(tmp_path: Path) -> None:
    card = write_fetch_text(tmp_path, table=make_table(["cat", "owl"]), quarantine=make_excluded(51))
    assert "50 of 51; all are in quarantine.csv:" in card
    assert "cat/49.png" in card
    assert "cat/50.png" not in card


# The card of fetch


def test_class_imbalance_is_described_in_a_sentence(tmp_path: Path) -> None:
    card = write_fetch_text(tmp_path, table=make_table(["cat"] * 6 + ["owl"] * 2), classes=["cat", "newt", "owl"])
    assert "'cat', has 6 images: 3.0 times as many as the smallest, 'owl', with 2." in card
    assert "Always predicting 'cat' is correct for 75.0% of the images." in card
    assert "Classes without images: 'newt'." in card


def test_given_splits_are_counted_apart(tmp_path: Path) -> None:
    table = make_table(["cat"] * 5).assign(split=["train", "train", "test", "", ""])
    rows = [line for line in write_fetch_text(tmp_path, table=table).splitlines() if line.startswith("| cat ")]
    assert re.findall(r"[\d.]+%?", rows[0]) == ["2", "1", "2", "5", "100.0%"]


def test_sizes_are_drawn_only_where_they_differ(tmp_path: Path) -> None:
    table = make_table(["cat"] * 3)
    assert "Every image has 8x8 pixels. All are RGB." in write_fetch_text(tmp_path, table=table)
    assert not (tmp_path / "sizes.png").exists()
    table["source_width"], table["channels"] = [8, 20, 40], [1, 1, 3]
    card = write_fetch_text(tmp_path, table=table)
    assert "the smallest image has 8x8, the median 20x8, the largest 40x8" in card
    assert "Reduced: 2 images, no side above 8 pixels. 2 (66.7%) are grey, 1 are RGB." in card
    assert (tmp_path / "sizes.png").exists()


def test_reasons_are_counted_the_most_frequent_first(tmp_path: Path) -> None:
    quarantine = pd.concat([make_excluded(2).assign(reason="has no label"), make_excluded(3)])
    shown = read_cells(write_fetch_text(tmp_path, table=make_table(["cat"]), quarantine=quarantine))
    start = shown.index("reason")
    assert shown[start : start + 6] == ["reason", "images", "is empty", "3", "has no label", "2"]


def test_changes_are_listed_and_a_first_version_is_marked(tmp_path: Path) -> None:
    assert "This is the first version of the data." in write_fetch_text(tmp_path, table=make_table(["cat"]))
    card = write_fetch_text(tmp_path, table=make_table(["cat"]), changes=["3 images are new.", "1 is gone."])
    assert "- 3 images are new.\n- 1 is gone.\n" in card


def test_empty_dataset_has_a_card_too(tmp_path: Path) -> None:
    card = write_fetch_text(tmp_path, table=make_table([]), classes=["cat"], quarantine=make_excluded(3))
    assert find_headings(card) == ["Changes", "Classes", "Quarantine"]


# The card of preprocess


def test_fractions_and_sizes_are_reported(tmp_path: Path) -> None:
    table = make_table(["cat"] * 10).assign(split=["train"] * 7 + ["val"] + ["test"] * 2)
    card = write_preprocess_text(tmp_path, table=table)
    assert "Of the images 70.0% train, 10.0% val, 20.0% test." in card
    assert "Every image has 8x8 pixels, RGB." in card
    start = read_cells(card).index("red")
    assert read_cells(card)[start : start + 3] == ["red", "0.5", "0.2"]
    card = write_preprocess_text(
        tmp_path, table=table, channels=1, mean=[0.5], std=[0.2], read_image=make_images(channels=1)
    )
    assert "Every image has 8x8 pixels, grey." in card


def test_pairs_with_different_labels_have_a_section_of_their_own(tmp_path: Path) -> None:
    table = make_table(["cat"] * 3 + ["owl"], "train")
    card = write_preprocess_text(tmp_path, table=table, near_duplicates=make_pairs(table, (0, 1), (1, 2), (2, 3)))
    same, different = card.index("## Near-duplicates with the same"), card.index("## Near-duplicates with different")
    assert different < same
    assert "1 pair. One of the two labels may be wrong." in card[different:same]
    assert "owl/3.png" in card[different:same]
    assert "2 pairs." in card[same:]


def test_pair_with_an_excluded_image_is_drawn(tmp_path: Path) -> None:
    table = make_table(["cat"] * 4, "train")
    asked: list[str] = []

    def found(path: str) -> np.ndarray:
        asked.append(path)
        return make_images()(0)

    write_preprocess_text(tmp_path, table=table[:3], near_duplicates=make_pairs(table, (0, 3)), read_original=found)
    assert asked == ["cat/0.png", "cat/3.png"]
    assert (tmp_path / "near_duplicates.png").exists()


def test_excluded_images_are_listed_with_reasons(tmp_path: Path) -> None:
    card = write_preprocess_text(
        tmp_path, table=make_table(["cat"], "train"), excluded=make_excluded(2).assign(reason="nearly equals x")
    )
    assert read_cells(card)[-3:] == ["cat/1.png", "cat", "nearly equals x"]
