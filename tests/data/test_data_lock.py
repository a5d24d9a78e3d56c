"""The versions of a data set: labels never shift, and changes are described."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.data.data_lock import DataLock, LockedVersion, check_source, compute_version, extend_classes
from convoy.data.sources.base import DatasetConfig
from factories import EMPTY_LOCK

names = st.lists(st.text(max_size=5), unique=True, max_size=6)


def make_version(quarantine: int = 0, digest: str = "a", **images: int) -> LockedVersion:
    return LockedVersion(digest=digest, images=images, quarantine=quarantine)


@given(known=names, classes=names)
def test_class_list_only_grows_and_no_label_shifts(known: list[str], classes: list[str]) -> None:
    longer = extend_classes(known, classes)
    assert longer[: len(known)] == known
    assert set(longer) == {*known, *classes}
    assert len(set(longer)) == len(longer)
    assert extend_classes(longer, classes) == longer


def test_data_without_a_known_class_is_another_dataset() -> None:
    history = EMPTY_LOCK.add_version(["cat", "dog"], make_version(cat=3))
    EMPTY_LOCK.check("pets", ["rose"])
    history.check("pets", ["dog", "rose"])
    with pytest.raises(
        ConvoyError,
        match=r"^the data has the classes rose, tulip, but none of those that data.lock records for pets \(cat, dog\)",
    ):
        history.check("pets", ["rose", "tulip"])


@pytest.mark.parametrize(
    ("before", "given", "drawn"),
    [
        ([], "", ["val", "test"]),
        ([], "train", ["val", "test"]),
        ([], "train test", ["val"]),
        ([], "train val test", []),
        (["val", "test"], "train val test", ["val", "test"]),
        (["test"], "test", ["test"]),
    ],
)
def test_missing_splits_are_drawn_once_and_kept(before: list, given: str, drawn: list) -> None:
    history = EMPTY_LOCK.add_version(["cat"], make_version(cat=3), before)
    assert history.splits_to_draw({"", *given.split()}) == drawn
    assert history.add_version(["cat"], make_version(cat=3), drawn).drawn == drawn


def test_first_version_has_no_changes() -> None:
    assert EMPTY_LOCK.add_version(["cat"], make_version(cat=3)).describe_changes() == []


def test_added_and_removed_images_are_described() -> None:
    history = EMPTY_LOCK.add_version(["cat", "dog"], make_version(cat=3, dog=4, quarantine=1, digest="a"))
    history = history.add_version(["cat", "owl"], make_version(cat=5, owl=7, digest="b"))
    assert history.classes == ["cat", "dog", "owl"]
    assert history.describe_changes() == [
        "new classes: 'owl'",
        "classes without images now: 'dog'; they keep their labels",
        "12 images, +5 (7 before)",
        "class 'cat': 5 images (3 before)",
        "0 images in quarantine (1 before)",
    ]


def test_replaced_images_of_equal_count_are_detected() -> None:
    history = EMPTY_LOCK.add_version(["cat"], make_version(cat=3, digest="a")).add_version(
        ["cat"], make_version(cat=3, digest="b")
    )
    assert history.describe_changes() == [
        "the number of images in each class is unchanged, but the images or their splits differ"
    ]


def test_repeated_version_reports_the_same_changes() -> None:
    once = EMPTY_LOCK.add_version(["cat"], make_version(cat=3)).add_version(["cat"], make_version(cat=4))
    assert once.add_version(["cat"], make_version(cat=4)) == once


def make_table(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["sha256", "label", "split"], dtype="str")


def test_version_depends_on_labels_and_splits_alone() -> None:
    rows = [("a", "cat", ""), ("b", "dog", ""), ("c", "dog", "")]
    same = compute_version([make_table(rows)], 0)
    assert same.images == {"cat": 1, "dog": 2}
    assert compute_version([make_table(rows[::-1])], 0) == same
    assert compute_version([make_table([("a", "dog", ""), *rows[1:]])], 0).digest != same.digest
    assert compute_version([make_table([("a", "cat", "test"), *rows[1:]])], 0).digest != same.digest


@given(labels=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True, min_size=1, max_size=5))
def test_any_class_name_round_trips(labels: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("history") / "data.lock"
    history = EMPTY_LOCK.add_version(labels, make_version(**dict.fromkeys(labels, 2)))
    history.save(file, "pets")
    assert DataLock.load(file, "pets") == history


def test_several_datasets_share_the_file(tmp_path: Path) -> None:
    file = tmp_path / "data.lock"
    for name in ("pets", "digits"):
        EMPTY_LOCK.add_version(["no", "007"], make_version(no=1)).save(file, name)
    assert file.read_text().startswith("# ")
    assert list(yaml.safe_load(file.read_text())) == ["pets", "digits"]
    assert DataLock.load(file, "flowers") == EMPTY_LOCK


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pets: [", "data.lock can't be read: restore it from git"),
        ("- pets", "data.lock is not a mapping of data sets: restore it from git"),
        ("pets: {classes: [cat]}", "data.lock: pets.versions: missing"),
        ("pets: {classes: cat, versions: []}", "data.lock: pets.classes='cat'"),
    ],
)
def test_damaged_file_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.lock").write_text(text)
    with pytest.raises(ConvoyError) as refusal:
        DataLock.load(tmp_path / "data.lock", "pets")
    assert message in str(refusal.value)


def test_full_disk_leaves_data_lock_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, *_: object, **__: object) -> int:
        file.write_bytes(b"")
        raise OSError(28, "No space left on device")

    known = EMPTY_LOCK.add_version(["cat"], make_version(cat=2))
    known.save(tmp_path / "data.lock", "pets")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        known.add_version(["dog"], make_version(cat=2, dog=1)).save(tmp_path / "data.lock", "pets")
    assert DataLock.load(tmp_path / "data.lock", "pets") == known


def make_config(torchvision: dict | None = None) -> DatasetConfig:
    return validate(
        DatasetConfig, {"name": "pets", "longest_side": 9, "group": None, "torchvision": torchvision}, "dataset"
    )


def write_data_dvc(root: Path, source: str | None, repo: str | None = None) -> None:
    """Write a data.dvc whose images come from `source`; None: from nowhere but data/ itself, as `dvc add` does."""
    dep = {"path": source} | ({"repo": {"url": repo}} if repo else {})
    (root / "data.dvc").write_text(yaml.safe_dump({"deps": [dep] if source else [], "outs": [{"path": "data"}]}))


def write_data_lock(root: Path, source: str | None) -> None:
    EMPTY_LOCK.add_version(["cat"], make_version(cat=2), source=source).save(root / "data.lock", "pets")


def test_new_source_under_a_known_name_is_refused(tmp_path: Path) -> None:
    write_data_lock(tmp_path, "samples")
    write_data_dvc(tmp_path, "s3://bucket/more pets")
    with pytest.raises(ConvoyError) as refusal:
        check_source(tmp_path, make_config())
    said = str(refusal.value)
    assert "would come from s3://bucket/more pets, but data.lock records that they come from samples" in said
    assert "its own name: `convoy use 's3://bucket/more pets' --name NAME`" in said
    assert "set `source: s3://bucket/more pets` under pets in data.lock" in said


@pytest.mark.parametrize("moved", ["/mnt/pets", "../pets: new", "no", "007", "# pets", "{pets}", "péts 🐈", "x" * 200])
def test_moved_source_is_accepted_by_the_advised_fix(moved: str, tmp_path: Path) -> None:
    write_data_lock(tmp_path, "samples")
    write_data_dvc(tmp_path, moved)
    with pytest.raises(ConvoyError) as refusal:
        check_source(tmp_path, make_config())
    line = str(refusal.value).partition("set `source")[2].rpartition("` under")[0]
    lock = tmp_path / "data.lock"
    lock.write_text(lock.read_text().replace("source: samples", f"source{line}"))
    assert check_source(tmp_path, make_config()) == moved


@pytest.mark.parametrize("known", [None, "samples"])
def test_known_or_first_source_is_accepted(known: str | None, tmp_path: Path) -> None:
    write_data_lock(tmp_path, known)
    write_data_dvc(tmp_path, "samples")
    assert check_source(tmp_path, make_config()) == "samples"


def test_source_is_kept_without_data_dvc(tmp_path: Path) -> None:
    write_data_lock(tmp_path, "samples")
    assert check_source(tmp_path, make_config()) is None
    grown = DataLock.load(tmp_path / "data.lock", "pets").add_version(["dog"], make_version(dog=2), source=None)
    assert grown.source == "samples"


def test_every_kind_of_source_is_distinguished(tmp_path: Path) -> None:
    write_data_dvc(tmp_path, "pets", repo="https://example.com/data.git")
    found = [check_source(tmp_path, make_config())]
    for source in ("pets", None):
        write_data_dvc(tmp_path, source)
        found.append(check_source(tmp_path, make_config()))
    found.append(check_source(tmp_path, make_config({"name": "MNIST", "splits": {"all": {}}})))
    assert found == ["https://example.com/data.git pets", "pets", "data", "torchvision MNIST"]


@pytest.mark.parametrize("text", ["deps: [", "- pets", "deps: {path: pets}", "deps: [{}]", "deps: [{path: [1]}]", ""])
def test_damaged_data_dvc_is_one_clear_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text(text)
    with pytest.raises(ConvoyError, match=r"^data\.dvc does not contain the source of the images: restore it"):
        check_source(tmp_path, make_config())


def test_table_of_labels_that_is_added_is_a_new_version() -> None:
    def version(images: dict[str, int], labels: str | None = None) -> LockedVersion:
        return LockedVersion(digest="0" * 32, images=images, quarantine=0, labels=labels)

    lock = DataLock(classes=["part_1", "part_2"], versions=[version({"part_1": 1, "part_2": 1})])
    with pytest.raises(ConvoyError, match="give a new data set a new name"):
        lock.check("moles", ["mel", "nv"])
    lock = lock.check("moles", ["mel", "nv"], "metadata.csv")
    lock = lock.add_version(["mel", "nv"], version({"mel": 1, "nv": 1}, "metadata.csv"))
    assert lock.classes == ["mel", "nv"]
    assert lock.describe_changes() == [
        "the labels come from metadata.csv, and came from the names of folders before",
        "new classes: 'mel', 'nv'",
        "classes without images now: 'part_1', 'part_2'",
    ]


def test_table_with_the_same_labels_is_a_new_version_too(tmp_path: Path) -> None:
    same = {"digest": "0" * 32, "images": {"a": 1, "b": 1}, "quarantine": 0}
    lock = DataLock(classes=["a", "b"], versions=[LockedVersion(**same)])
    lock = lock.check("pets", ["a", "b"], "labels.csv").add_version(
        ["a", "b"], LockedVersion(**same, labels="labels.csv")
    )
    assert len(lock.describe_changes()) == 1
    lock.save(tmp_path / "data.lock", "pets")
    assert DataLock.load(tmp_path / "data.lock", "pets") == lock
