"""Composition of params.yaml from conf/, which refuses to discard settings from `dvc exp apply` or an edit."""

import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.tracking.provenance import git
from pipeline.conf_files import adopt_settings, differences

# Checksum of the params.yaml that was composed last.
CHECKSUM_FILE = Path("artifacts/.scratch/params.sha256")
MAX_COMMITS = 20  # commits searched for the conf/ that params.yaml was composed from
MAX_LISTED = 20  # keys in a message
MAX_VALUE_WIDTH = 60  # characters of a value in a message


def compose(
    root: Path,
    check: Callable[[dict[str, Any]], None],
    overrides: Sequence[str] = (),
    *,
    adopt: bool = False,
    discard: bool = False,
) -> dict[str, Any]:
    """Compose `root/conf` into `root/params.yaml`.

    What was composed is recorded, so that the next call may replace it, whatever its overrides were.
    If an error is raised, params.yaml is left unchanged.

    Args:
        root: The project folder.
        check: A function that validates the composed sections and raises ConvoyError if they are invalid.
        overrides: Hydra overrides of settings in conf/.
        adopt: Whether to write settings that only params.yaml has into conf/ first.
        discard: Whether to discard settings that only params.yaml has.

    Returns:
        The composed sections.

    Raises:
        ConvoyError: If params.yaml has settings that conf/ does not compose to and neither `adopt` nor `discard` is
            set, or `check` fails.
    """
    params = root / "params.yaml"
    text = config.compose_text(root, overrides)
    present = params.read_bytes() if params.exists() else b""
    if adopt:
        wanted = config.load(params)
        check(wanted)
        adopt_settings(root, wanted)
        text = config.compose_text(root, overrides)
    elif not discard and present.strip():
        _refuse_loss(root, present, text)
    sections = config.parse(text)
    check(sections)
    _write(root, present, text)
    return sections


def _refuse_loss(root: Path, present: bytes, text: str) -> None:
    """Raise ConvoyError if `present` holds settings that neither `text` nor conf/ without overrides has."""
    if present == text.encode() or _checksum(present) in _recorded_checksums(root):
        return
    composed = config.parse(config.compose_text(root))
    try:
        changed = differences(config.parse(present.decode()), composed)
    except (ConvoyError, ValueError):
        raise ConvoyError(
            "params.yaml can't be read, as after a merge conflict: choose one version (`git checkout --ours"
            " params.yaml`, or --theirs), or discard it by `convoy settings compose`"
        ) from None
    if not changed:
        return
    if _is_left_by_experiment(root, present):
        print("params.yaml held the settings of the last `dvc exp run`: conf/ is composed again")
    elif not _was_composed(root, present):
        lines = [f"  {key}: {_describe(*values)}" for key, values in changed.items()]
        if len(lines) > MAX_LISTED:
            lines[MAX_LISTED:] = [f"  and {len(lines) - MAX_LISTED} more"]
        raise ConvoyError(
            "params.yaml holds settings that conf/ does not compose to, as after `dvc exp apply`, a merge or an edit:\n"
            + "\n".join(lines)
            + "\nTo keep them, write them into conf/:\n  convoy settings adopt\n"
            "To discard them, compose conf/ again:\n  convoy settings compose"
        )


def _describe(present: Any, composed: Any) -> str:
    return f"{_show(present)} in params.yaml, {_show(composed)} in conf/"


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    text = "nothing" if value is ... else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_WIDTH else f"{text[:MAX_VALUE_WIDTH]}..."


# Cases in which params.yaml is safe to replace


def _recorded_checksums(root: Path) -> list[str]:
    return (root / CHECKSUM_FILE).read_text().split() if (root / CHECKSUM_FILE).exists() else []


def _is_left_by_experiment(root: Path, present: bytes) -> bool:
    """Return whether params.yaml is what the last `dvc exp run` in this workspace composed and was not chosen since.

    It was chosen if it was applied, staged or committed afterwards, or if it was restored after a later run had
    composed conf/ again.
    """
    blob = git(root, "hash-object", "params.yaml")
    started, composed = next(_experiments(root), (0, ""))
    checksum_file = root / CHECKSUM_FILE
    if not blob or composed != blob or blob == git(root, "rev-parse", "--quiet", "--verify", ":./params.yaml"):
        return False
    applied = "refs/exps/exec/EXEC_APPLY"
    if git(root, "rev-parse", "--quiet", "--verify", f"{applied}:./params.yaml") == blob:
        ref = root / git(root, "rev-parse", "--git-path", applied)
        # If git has packed the ref, its time is unknown.
        if not ref.exists() or ref.stat().st_mtime_ns > started:
            return False
    return not checksum_file.exists() or checksum_file.stat().st_mtime_ns < started


def _experiments(root: Path) -> Iterator[tuple[int, str]]:
    """Yield the start time (ns) and git's hash of params.yaml of each experiment in this workspace, the latest first.

    Failed experiments are included, those in temporary copies are not. DVC keeps an info file for each experiment,
    named after the commit, on no branch, in which DVC stored the composed settings.
    """
    files = [(file.stat().st_mtime_ns, file) for file in (root / ".dvc/tmp/exps/run").glob("*/*.run")]
    for time, file in sorted(files, reverse=True):
        try:
            is_here = json.loads(file.read_text()).get("location") == "workspace"
        except (OSError, ValueError, AttributeError):
            continue
        if is_here and re.fullmatch("[0-9a-f]{40,}", file.stem):
            yield time, git(root, "rev-parse", "--quiet", "--verify", f"{file.stem}:./params.yaml")


def _was_composed(root: Path, present: bytes) -> bool:
    """Return whether params.yaml is unchanged since HEAD and conf/ composed to it at one of the commits that have it.

    If so, conf/ was edited later by a commit that did not compose it. The params.yaml of a merged experiment was never
    composed from conf/.
    """
    blob = git(root, "hash-object", "params.yaml")
    if not blob or blob != git(root, "rev-parse", "--quiet", "--verify", "HEAD:./params.yaml"):
        return False
    commits = git(root, "log", f"--max-count={MAX_COMMITS}", "--format=%H", "--", "params.yaml", "conf")
    candidates = [name for name in commits.split() if git(root, "rev-parse", f"{name}:./params.yaml") == blob]
    return any(_composed_at(root, commit) == present.decode() for commit in candidates)


def _composed_at(root: Path, commit: str) -> str | None:
    archive = subprocess.run(["git", "archive", commit, "conf"], cwd=root, capture_output=True)
    if archive.returncode:
        return None
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        try:
            return config.compose_text(Path(folder))
        except ConvoyError:
            return None


# Writing


def _write(root: Path, present: bytes, text: str) -> None:
    """Replace params.yaml and its recorded checksum, so that a kill at any moment leaves a recorded params.yaml."""
    (root / CHECKSUM_FILE).parent.mkdir(parents=True, exist_ok=True)
    temporary = (root / CHECKSUM_FILE).with_name("params.yaml")
    steps = [
        (root / CHECKSUM_FILE, f"{_checksum(present)}\n{_checksum(text.encode())}\n"),
        (root / "params.yaml", text),
        (root / CHECKSUM_FILE, f"{_checksum(text.encode())}\n"),
    ]
    for file, content in steps:
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(file)
        except OSError as error:
            raise ConvoyError(f"{file.relative_to(root)} can't be written: {error.strerror}") from error


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
