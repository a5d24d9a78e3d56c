"""The differences of two runs: settings, images, code, environment and results."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from convoy.core import config
from convoy.core.artifact_names import HISTORY, IMAGE_TABLE, MANIFEST
from convoy.core.hashing import sha256
from convoy.core.yaml_parser import parse_yaml
from convoy.tracking import logged_run
from convoy.tracking.differences import compare_histories, compare_weights, only_different
from convoy.tracking.logged_run import LoggedRun
from convoy.tracking.provenance import CODE, git
from convoy.tracking.run_record import flatten
from convoy.tracking.store import open_store
from pipeline.dvc_files import read_folder_file

MAX_LISTED_IMAGES = 10  # in the table; JSON has all
MAX_LISTED_FILES = 10
NOT_CACHED = "not known here: the list of images is neither in DVC's cache nor on its remote (`dvc pull`)"

# A value of the one run and of the other.
Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class ImageChanges:
    """The images of the second run that differ from those of the first, by path; None if a list is not available."""

    added: list[str] | None = None
    removed: list[str] | None = None
    relabelled: list[str] | None = None
    moved: list[str] | None = None  # to another split


@dataclasses.dataclass(frozen=True)
class RunDifferences:
    """What differs between two runs, by name, with the values of both."""

    runs: tuple[LoggedRun, LoggedRun]
    settings: dict[str, Pair]
    images: ImageChanges
    data: dict[str, Pair]
    code: dict[str, Pair]
    changed_files: list[str] | None  # None if a commit is not in this clone
    environment: dict[str, Pair]
    results: dict[str, Pair]  # with the checksums of the weights
    first_difference: dict[str, str]  # where weights and history begin to differ


def diff(root: Path, first: str, second: str, *, as_json: bool = False) -> None:
    """Print what differs between two runs.

    Args:
        root: The project folder.
        first: A run: its ID, the first digits of it, or an architecture.
        second: The other run.
        as_json: Whether to print JSON instead of a table.

    Raises:
        ConvoyError: If one of the runs does not exist or has no result.
    """
    scratch = root / "artifacts/.scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder:
        with open_store(root, config.load(root / "params.yaml")["register"]["name"]) as store:
            found = [logged_run.find(store, name) for name in (first, second)]
            one, other = (
                logged_run.download(store, each, Path(folder) / str(number)) for number, each in enumerate(found)
            )
        differences = compare(root, one, other)
    if as_json:
        print(json.dumps(describe(differences), indent=2, ensure_ascii=False))
    else:
        print_table(differences)


def compare(root: Path, one: LoggedRun, other: LoggedRun) -> RunDifferences:
    """Return what differs between two runs."""
    first, second = one.record, other.record
    commits = [run.commit_id for run in (one, other)]
    are_known = all(git(root, "cat-file", "-t", commit) for commit in commits)
    changed = git(root, "diff", "--name-only", *commits, "--", *CODE).splitlines() if are_known else None
    versions = [f"{record.data.name}@{record.data.digest}" for record in (first, second)]
    data: dict[str, Pair] = {
        "version": (versions[0], versions[1]),
        "source": (first.data.source, second.data.source),
        **{
            name: (first.data.profile.get(name), second.data.profile.get(name))
            for name in {**first.data.profile, **second.data.profile}
        },
    }
    code = {"commit": (one.commit, other.commit), "lock": (one.tags.get("lock"), other.tags.get("lock"))}
    environments = first.environment, second.environment
    results = [
        {name: value for name, value in run.metrics.items() if name.startswith(("kept/", "test/"))}
        | {"weights": sha256(run.weights)[:12] if run.weights else None}
        for run in (one, other)
    ]
    history = compare_histories(one.folder / HISTORY, other.folder / HISTORY).difference
    return RunDifferences(
        (one, other),
        _compare_values(dict(list_settings(one)), dict(list_settings(other))),
        compare_images(root, one, other) if first.data.digest != second.data.digest else ImageChanges([], [], [], []),
        only_different(data),
        only_different(code),
        changed,
        _compare_values(*environments),
        _compare_values(*results),
        {"weights": compare_weights(one.weights, other.weights).difference, "history": history},
    )


def _compare_values(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Pair]:
    # A variable of the environment that is not set is "", and records of earlier formats lack it.
    return {
        name: (one.get(name), other.get(name))
        for name in {**one, **other}
        if (one.get(name) or None) != (other.get(name) or None)
    }


def list_settings(run: LoggedRun) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a run by their dotted names, with those of all architectures under the same names."""
    record = run.record
    yield "architecture", record.architecture
    sections = {name: section for name, section in run.settings.items() if not name.startswith("model.")}
    sections |= {"train": record.train.__dict__, "trainer": dataclasses.asdict(record.trainer)}
    sections |= {"split": {"seed": record.data.split_seed}, "model": record.settings}
    for name, section in sections.items():
        yield from flatten(section, name)


def compare_images(root: Path, one: LoggedRun, other: LoggedRun) -> ImageChanges:
    """Return which images were added, removed, relabelled or moved to another split, by their checksums."""
    before, after = (read_images(root, run) for run in (one, other))
    if before is None or after is None:
        return ImageChanges()
    common = before.merge(after, left_index=True, right_index=True, suffixes=("_before", "_after"))
    return ImageChanges(
        after.loc[~after.index.isin(before.index), "path"].tolist(),
        before.loc[~before.index.isin(after.index), "path"].tolist(),
        common.loc[common["label_before"] != common["label_after"], "path_after"].tolist(),
        common.loc[common["split_before"] != common["split_after"], "path_after"].tolist(),
    )


def read_images(root: Path, run: LoggedRun) -> pd.DataFrame | None:
    """Return path, label and split of the images of a run by checksum, or None if they can't be had."""
    content = find_image_table(root, run)
    if content is None:
        return None
    images = pd.read_parquet(io.BytesIO(content), columns=["sha256", "path", "label", "split"])
    return images.set_index("sha256").sort_values("path").astype(str)


def find_image_table(root: Path, run: LoggedRun) -> bytes | None:
    """Return the table of the images of a run from the last run of the pipeline or from DVC, or None."""
    prepared = root / "artifacts/preprocess"
    if (prepared / MANIFEST).exists() and sha256(prepared / MANIFEST).startswith(run.record.data.digest):
        return (prepared / IMAGE_TABLE).read_bytes()
    stages = run.stages
    if not stages:
        # A run of an earlier version has no dvc.lock of its own, and its commit's may be of other data.
        committed = git(root, "show", f"{run.commit_id}:./dvc.lock")
        stages = (parse_yaml(committed) or {}).get("stages", {}) if committed else {}
    for output in stages.get("preprocess", {}).get("outs", []):
        manifest = read_folder_file(root, output["md5"], MANIFEST)
        if manifest and hashlib.sha256(manifest).hexdigest().startswith(run.record.data.digest):
            return read_folder_file(root, output["md5"], IMAGE_TABLE)
    return None


def describe(differences: RunDifferences) -> dict[str, Any]:
    """Return the differences as JSON-serializable values."""
    return {
        "runs": [
            {"run": run.run_id, "architecture": run.record.architecture, "commit": run.commit, "data": run.tags["data"]}
            for run in differences.runs
        ],
        "settings": differences.settings,
        "data": {**differences.data, "images": dataclasses.asdict(differences.images)},
        "code": {**differences.code, "changed_files": differences.changed_files},
        "environment": differences.environment,
        "results": differences.results,
        "first_difference": differences.first_difference,
    }


def print_table(differences: RunDifferences) -> None:
    """Print the differences as one table, with a heading for each part."""
    table = Table("", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for run in differences.runs:
        table.add_column(f"{run.run_id[:8]}\n{run.record.architecture}", overflow="fold")
    for row in table_rows(differences):
        table.add_row(*map(escape, row))
    console = Console()
    # A log file has no width of its own.
    Console(width=max(console.width, 100)).print(table)


def table_rows(differences: RunDifferences) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: a heading for each part, and below it what differs."""
    yield from _section("settings", differences.settings)
    images = dataclasses.asdict(differences.images)
    lists = {f"images {name}": _shorten(paths, MAX_LISTED_IMAGES) for name, paths in images.items() if paths}
    if None in images.values():
        lists["images"] = NOT_CACHED
    yield from _section("data", {**differences.data, **{name: ("", text) for name, text in lists.items()}})
    files = differences.changed_files
    text = "a commit is not in this clone (`git fetch`)" if files is None else _shorten(files, MAX_LISTED_FILES)
    yield from _section("code", {**differences.code, **({"changed files": ("", text)} if text else {})})
    yield from _section("environment", differences.environment)
    yield from _section("results", differences.results, ".4f")


def _section(title: str, values: Mapping[str, Pair], floats: str = "g") -> Iterator[tuple[str, str, str]]:
    yield (title, "", "") if values else (title, "the same", "")
    for name, pair in values.items():
        before, after = (format(value, floats) if isinstance(value, float) else value for value in pair)
        yield f"  {name}", "-" if before is None else str(before), "-" if after is None else str(after)


def _shorten(names: list[str], limit: int) -> str:
    more = f"\nand {len(names) - limit} more" if len(names) > limit else ""
    return (f"{len(names)}: " if len(names) > 1 else "") + "\n".join(names[:limit]) + more
