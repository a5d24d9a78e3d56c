"""The command `use`: it makes a source of images the one to train on, and says what it found and what to run next."""

import itertools
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.ingest import FetchConfig
from convoy.data.packed.packed_dataset import SPLITS
from convoy.promotion.config import RegisterConfig
from pipeline import conf_files, data_folder
from pipeline import source_choice as choice
from pipeline.preview import Preview, preview_source
from pipeline.source_choice import USE

RUN = "convoy run"
# Images with a longer side show more than small networks that are trained from scratch can use.
MAX_SMALL_SIDE = 64  # pixels
# DVC tracks each file on its own, which becomes slow with about this many.
MANY_FILES = 5_000
MAX_NOTES = 5
# Test images are drawn one by one, so that there may be fewer than expected.
SAFE_TEST_FRACTION = 0.8


def use(root: Path, source: str, name: str | None = None, options: Mapping[str, Any] | None = None) -> None:
    """Make a source of labelled images the one that the next run trains on.

    Nothing is downloaded or copied before that run.

    Args:
        root: The project folder.
        source: A folder, an archive, a Parquet file, an address such as s3://bucket/pets, or a data set that
            torchvision provides, by the name of its file in conf/dataset/.
        name: The name of the data set; by default that of the folder or file.
        options: Settings of the data set, such as table.path, which are written into its file in conf/dataset/; ""
            for null.

    Raises:
        ConvoyError: If the source or the name can't be used, or if files in data/ would be lost.
    """
    path, is_address = Path(source).expanduser(), "://" in source
    preview = None
    options = {key: value if any(value) else None for key, value in (options or {}).items()}
    files: dict[Path, str] = {}
    if is_address or path.exists():
        location = choice.check_address(source) if is_address else choice.locate(root, path)
        name = choice.check_name(name) if name else choice.default_name(str(path.resolve()))
        dataset, files = choice.dataset_file(root, name, location)
        data_folder.check_replaceable(root)
        files |= choice.import_file(root, location)
        if not is_address:
            preview = preview_source(path, choice.read_selection(root, dataset, files, options))
    else:
        if options:
            raise ConvoyError(f"{source}: a data set of torchvision has no table, and all of its images are used")
        dataset = choice.find_torchvision_set(root, source, name)
    committed, previous = choice.committed_files(root), choice.present_choice(root, options)
    changed, params = choice.write_choice(root, files, dataset, options)
    undo = choice.undo_commands(root, changed, committed, previous)
    # The commands are for the project's folder.
    if undo and not Path.cwd().samefile(root):
        undo.insert(0, shlex.join(["cd", str(root)]))

    if preview:
        print(f"found {_describe(preview)}")
        for note in _notes(preview, params):
            print(f"note: {note}")
    elif is_address:
        print(f"{source} was not looked at: the next run fetches it")
    else:
        print(f"{_first_comment(root / f'conf/dataset/{dataset}.yaml')} The next run downloads it")
    written = ", ".join(choice.names(root, changed))
    print(f"wrote {written}" if changed else "data.dvc and conf/ name this source already")
    print(_advise(root, preview))
    if preview and preview.loose_files >= MANY_FILES and (pack := _pack_commands(path, str(name))):
        print("DVC tracks each file on its own, which is slow for so many. To pack them into one archive first:")
        print("\n".join(f"  {command}" for command in [*undo, *pack]))
    if undo:
        print(f"undo: {' && '.join(undo)}")


def _describe(preview: Preview) -> str:
    """Return what was found, in one line."""
    splits = [split for split in SPLITS if split in preview.splits]
    if preview.is_sample:
        classes = list(preview.classes)
        count = f"{len(classes)} classes ({truncate_names(classes)}) in a sample of {preview.count:,} images"
    else:
        classes = [f"{name} {count:,}" for name, count in preview.classes.items() if count]
        count = f"{preview.count:,} images in {len(classes)} classes ({truncate_names(classes)})"
        splits = [f"{split} {preview.splits[split]:,}" for split in splits]
    given = f"splits: {', '.join(splits)}" if splits else "no splits"
    return f"{count}; {given}; {'grey' if preview.is_grey else 'colour'}, about {preview.width}x{preview.height} pixels"


def _notes(preview: Preview, params: Mapping[str, Any]) -> Iterator[str]:
    """Yield what may surprise in the next run."""
    yield from preview.notes[:MAX_NOTES]
    if len(preview.notes) > MAX_NOTES:
        yield f"{len(preview.notes) - MAX_NOTES} more, which the fetch stage shows"
    if preview.problems:
        count, limit = len(preview.problems), validate(FetchConfig, params["fetch"], "fetch").max_invalid_fraction
        is_fatal = count > limit * (preview.count + count)
        result = f"too many for fetch.max_invalid_fraction={limit}, so that a run stops" if is_fatal else "left out"
        shown = preview.mismatch or truncate_names(preview.problems)
        yield f"{count:,} image{'s' * (count > 1)} can't be used ({result}): {shown}"
    minimum = validate(RegisterConfig, params["register"], "register").gate.min_test_images
    expected = preview.splits.get("test") or preview.count * params["preprocess"]["test_fraction"]
    if expected < minimum and not preview.is_sample:
        yield (
            f"about {expected:.0f} images will be for testing, and with fewer than register.gate.min_test_images="
            f"{minimum} no model becomes the champion: add images, or this setting to the command, such as"
            f" register.gate.min_test_images={max(1, int(SAFE_TEST_FRACTION * expected))}"
        )


def _advise(root: Path, preview: Preview | None) -> str:
    """Return the settings that suit the images, and what to run next."""
    if experiment := conf_files.chosen(root, "experiment"):
        return f"conf/config.yaml chooses experiment: {experiment}\nnext: {RUN}"
    if preview is None:
        return f"photographs suit experiment=photographs or, if they are large, experiment=finetune_small\nnext: {RUN}"
    if max(preview.height, preview.width) > MAX_SMALL_SIDE:
        return (
            "such large images suit experiment=finetune_small, a pretrained ResNet-18 (a download of 45 MB), or, with a"
            " GPU, experiment=finetune, three larger networks (300 MB); from scratch: experiment=photographs\n"
            f"next: {RUN} experiment=finetune_small"
        )
    if not preview.is_grey:
        return (
            "small photographs suit experiment=photographs, which mirrors and shifts them in training; letters do not\n"
            f"next: {RUN} experiment=photographs"
        )
    return f"small grey images suit the default settings\nnext: {RUN}"


def _pack_commands(path: Path, name: str) -> list[str]:
    """Return commands that pack a folder into an archive beside it and use that; none if there is such a file."""
    folder = path.resolve()
    archive = folder.with_name(f"{folder.name}.zip")
    commands = [["python", "-m", "zipfile", "-c", archive, folder], [*USE.split(), archive, "--name", name]]
    return [] if archive.exists() else [shlex.join(map(str, command)) for command in commands]


def _first_comment(file: Path) -> str:
    """Return the comment at the beginning of a YAML file in one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)
