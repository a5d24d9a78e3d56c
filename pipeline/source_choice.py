"""Choice of the source of images: its name, and the files in which the project names it."""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from convoy.core import config
from convoy.core.config import MAX_NAME_LENGTH, validate
from convoy.core.errors import ConvoyError, suggest
from convoy.data.data_lock import DataLock, find_source
from convoy.data.sources.archive import ARCHIVE_SUFFIXES
from convoy.data.sources.base import DatasetConfig
from convoy.data.sources.table_file import TABLE_SUFFIXES
from convoy.tracking.provenance import git
from pipeline import conf_files

USE = "convoy use"
# The packages with which DVC reads from storage of a kind, and which may not be installed.
DVC_PACKAGES = {"s3": "dvc_s3", "gs": "dvc_gs", "azure": "dvc_azure", "ssh": "dvc_ssh", "hdfs": "dvc_hdfs"}

DATA_DVC = """\
frozen: true
deps:
- path: {source}
{outs}"""
DATASET = """\
{header}
name: {name}
longest_side: 256 # pixels; see folder.yaml
group: null # see folder.yaml
table: {{file: null, path: null, label: null, group: null, split: null}} # see folder.yaml
include: null # see folder.yaml
exclude: null # see folder.yaml
first_page: false # see folder.yaml
"""


# The source and its name


def check_address(source: str) -> str:
    """Return the address of a bucket or a web server, if DVC can read from there."""
    package = DVC_PACKAGES.get(source.partition("://")[0])
    if package and not importlib.util.find_spec(package):
        raise ConvoyError(f"{source}: DVC needs another package for it: `uv pip install {package.replace('_', '-')}`")
    return source


def locate(root: Path, path: Path) -> str:
    """Return a path as data.dvc names it: relative to the project if it is in it, else absolute."""
    place, root = path.resolve(), root.resolve()
    if root.is_relative_to(place):
        raise ConvoyError(f"{path} contains the project itself: name the folder of the images")
    if place.is_relative_to(root / "data"):
        raise ConvoyError(
            f"{path} is in data/, which DVC replaces by a copy of the source: move it out, for example by"
            f" `mv {shlex.quote(str(path))} my-images`, and use that"
        )
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else str(place)


def default_name(location: str) -> str:
    """Return the name of a folder or file, without its suffix and without characters that need quotes in a shell."""
    name = location.rstrip("/").rpartition("/")[2]
    suffix = next((suffix for suffix in (*ARCHIVE_SUFFIXES, *TABLE_SUFFIXES) if name.lower().endswith(suffix)), "")
    stem = re.sub(r"[^\w.-]+", "-", name[: len(name) - len(suffix)])
    return check_name(stem.strip("-.")[:MAX_NAME_LENGTH])


def check_name(name: str) -> str:
    """Return the name of a data set if it is valid."""
    try:
        validate(DatasetConfig, {"name": name, "longest_side": 1, "group": None}, "dataset")
    except ConvoyError as error:
        raise ConvoyError(f"{error}; give it a name by --name") from None
    return name


def find_torchvision_set(root: Path, source: str, name: str | None) -> str:
    """Return the file in conf/dataset/, without its suffix, of a data set that torchvision provides."""
    if "/" in source or source.lower().endswith((*ARCHIVE_SUFFIXES, *TABLE_SUFFIXES)):
        raise ConvoyError(f"{source}: there is no such file or folder")
    files = sorted((root / "conf/dataset").glob("*.yaml"))
    known = [file.stem for file in files if "torchvision" in _load(file)]
    if source not in known:
        raise ConvoyError(
            f"{source}: there is no such file or folder, and no such data set of torchvision in conf/dataset/;"
            f" {suggest(source, known)}"
        )
    if name not in (None, source):
        raise ConvoyError(f"--name {name}: data sets of torchvision keep the names that they have in conf/dataset/")
    return source


# The files


def dataset_file(root: Path, name: str, location: str) -> tuple[str, dict[Path, str]]:
    """Find the file in conf/dataset/ for images of a name, or describe it.

    Args:
        root: The project folder.
        name: The name of the data set.
        location: Where its images come from.

    Returns:
        The file without its suffix, and its content by path if it is not there yet.

    Raises:
        ConvoyError: If the name belongs to images from another source.
    """
    recorded = DataLock.load(root / "data.lock", name).source
    if recorded not in (None, location):
        raise ConvoyError(
            f"data.lock records that the images of {name} come from {recorded}: give these another name by --name. If"
            f" the same images were moved, set `source: {_quote(location)}` under {name} in data.lock"
        )
    header = f"# The images in {location}."
    for file in sorted((root / "conf/dataset").glob("*.yaml")):
        table = _load(file)
        if name not in (file.stem, table["name"]):
            continue
        is_chosen = conf_files.chosen(root, "dataset") == file.stem and find_source(root / "data.dvc") == location
        is_same = recorded == location or is_chosen or file.read_text(encoding="utf-8").startswith(f"{header}\n")
        if table["name"] != name or "torchvision" in table or not is_same:
            raise ConvoyError(
                f"conf/dataset/{file.name} is for other images: give these another name by --name, or remove that file"
            )
        return file.stem, {}
    return name, {root / f"conf/dataset/{name}.yaml": DATASET.format(header=header, name=_quote(name))}


def read_selection(root: Path, dataset: str, files: Mapping[Path, str], options: Mapping[str, Any]) -> DatasetConfig:
    """Return the settings of a data set, of which some were given as options of the command."""
    file = root / f"conf/dataset/{dataset}.yaml"
    values = yaml.safe_load(files[file]) if file in files else _load(file)
    for key, value in options.items():
        table, _, name = key.rpartition(".")
        (values.setdefault(table, {}) if table else values)[name] = value
    return validate(DatasetConfig, values, "dataset")


def import_file(root: Path, location: str) -> dict[Path, str]:
    """Return the content of data.dvc by path, if it names another source now; the next run then imports this one."""
    file = root / "data.dvc"
    if find_source(file) == location:
        return {}
    # The recorded version stays, so that the next run knows which files in data/ DVC put there.
    outs = _load(file)["outs"] if file.exists() else [{"hash": "md5", "path": "data"}]
    text = DATA_DVC.format(source=_quote(location), outs=yaml.safe_dump({"outs": outs}, sort_keys=False))
    return {file: text}


def write_choice(
    root: Path, files: Mapping[Path, str], dataset: str, options: Mapping[str, Any]
) -> tuple[dict[Path, bytes | None], dict[str, Any]]:
    """Write files, choose the data set in conf/ and set its options, and compose the settings.

    If an error is raised, nothing is changed.

    Returns:
        The previous content of each file that changed, None for a new file; and the composed settings.
    """
    with conf_files.restore_on_error([*files, *(root / "conf").rglob("*.yaml")]) as before:
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
        conf_files.set_values(root / f"conf/dataset/{dataset}.yaml", options)
        if conf_files.chosen(root, "dataset") != dataset:
            conf_files.set_choice(root, "dataset", dataset)
        params = config.parse(config.compose_text(root))
        validate(DatasetConfig, params["dataset"], "dataset")
    return {file: content for file, content in before.items() if file.read_bytes() != content}, params


# The way back


def committed_files(root: Path) -> set[Path]:
    """Return data.dvc and the files of conf/ that are the same as in git's last commit."""
    paths = ("--", "data.dvc", "conf")
    tracked, changed = git(root, "ls-files", *paths), git(root, "diff", "--relative", "--name-only", "HEAD", *paths)
    return {root / name for name in {*tracked.splitlines()} - {*changed.splitlines()}}


def present_choice(root: Path, options: Iterable[str]) -> list[str]:
    """Return the command that chooses the present source, as words; none if there is no source.

    Args:
        root: The project folder.
        options: The settings, such as table.path, whose present values the command sets.
    """
    dataset = conf_files.chosen(root, "dataset")
    table = _load(root / f"conf/dataset/{dataset}.yaml")
    source = dataset if "torchvision" in table else find_source(root / "data.dvc")
    flags = [word for key in options for word in _option_words(table, key)]
    return [*USE.split(), source, "--name", table["name"], *flags] if source else []


def _option_words(table: Mapping[str, Any], key: str) -> Iterator[str]:
    """Yield the option that sets a setting to its value in a table, as words."""
    outer, _, name = key.rpartition(".")
    value = (table.get(outer) or {} if outer else table).get(name) or ""
    for each in [value] if isinstance(value, str) else value:
        yield from (f"--{'table' if name == 'file' else name}", each)


def undo_commands(
    root: Path, changed: Mapping[Path, bytes | None], committed: set[Path], choice: list[str]
) -> list[str]:
    """Return the commands that undo a choice.

    Args:
        root: The project folder.
        changed: What `write_choice` changed.
        committed: The files that git could restore before they were changed.
        choice: The command that chooses the previous source, for files that git could not restore.
    """
    new = [file for file, content in changed.items() if content is None]
    edited = [file for file, content in changed.items() if content is not None]
    restored = [file for file in edited if file in committed]
    commands = [
        ["git", "checkout", "--", *names(root, restored)] if restored else [],
        choice if len(restored) < len(edited) else [],
        ["rm", *names(root, new)] if new else [],
    ]
    return [shlex.join(command) for command in commands if command]


def names(root: Path, files: Iterable[Path]) -> list[str]:
    """Return the paths of files relative to the project."""
    return [file.relative_to(root).as_posix() for file in files]


def _load(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _quote(text: str) -> str:
    """Quote a string for YAML, unless every reader of YAML takes it for a string, which differ on 1e3, for example."""
    is_plain = re.fullmatch(r"[A-Za-z_/.][\w/.-]*", text, re.ASCII) and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)
