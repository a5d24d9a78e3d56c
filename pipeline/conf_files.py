"""Reading and editing of the files in conf/, which keeps the comments there."""

import contextlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from ruamel.yaml.tokens import CommentToken

from convoy.core import config
from convoy.core.errors import ConvoyError

# Maps a dotted key to both values; the value is `...` if a table lacks the key.
Differences = dict[str, tuple[Any, Any]]


def differences(wanted: Mapping[str, Any], composed: Mapping[str, Any], around: str = "") -> Differences:
    """Return the dotted keys at which two tables of settings differ, with both values.

    Where one table lacks a key, only the outermost missing key is returned.

    Args:
        wanted: The first table.
        composed: The second table.
        around: A prefix for the returned keys.
    """
    found: Differences = {}
    for key in dict.fromkeys((*wanted, *composed)):
        name, (left, right) = f"{around}{key}", (wanted.get(key, ...), composed.get(key, ...))
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= differences(left, right, f"{name}.")
            # The order of the architectures is a setting; the order of other keys is not.
            if name == "model" and left.keys() == right.keys() and list(left) != list(right):
                found[name] = (list(left), list(right))
        elif ... in (left, right) or json.dumps(left) != json.dumps(right):
            found[name] = (left, right)
    return found


def adopt_settings(root: Path, wanted: Mapping[str, Any]) -> None:
    """Edit `root/conf` so that it composes to the wanted settings.

    The choices (experiment, data set, trainer, architectures) are set first, then the values, each in the file that
    takes precedence for it. If an error is raised, conf/ is left unchanged.

    Args:
        root: The project folder.
        wanted: The sections that conf/ is to compose to.

    Raises:
        ConvoyError: If no file of conf/ sets a key that differs.
    """
    if not _differences(root, wanted):
        return
    names = list(wanted["model"])
    unknown = [name for name in names if not (root / f"conf/model/{name}.yaml").exists()]
    if unknown:
        raise ConvoyError(f"params.yaml has model.{unknown[0]}, for which there is no conf/model/{unknown[0]}.yaml")
    with restore_on_error((root / "conf").rglob("*.yaml")) as before:
        _choose_experiment(root, wanted)
        present = config.parse(config.compose_text(root))
        for group in ("dataset", "trainer"):
            if group in wanted and wanted[group] != present.get(group):
                _choose_file(root, group, wanted)
        if names != list(present["model"]):
            set_choice(root, "model", names)
        # A value that refers to another one, such as ${preprocess.size}, is replaced only if that is not enough.
        for keeps_references in (True, False):
            for key, (value, old) in _differences(root, wanted).items():
                if ... not in (value, old):
                    _set_value(root, key, value, keeps_references=keeps_references)
        left = _differences(root, wanted)
        if left:
            raise ConvoyError(
                f"conf/ can't be made to compose to params.yaml, as no file there sets {', '.join(left)}: edit conf/"
                " yourself, or discard these settings by `convoy settings compose`"
            )
    _print_edited(root, before)


def write_values(root: Path, values: Mapping[str, Any]) -> None:
    """Edit `root/conf` so that it composes to other values of some settings.

    Each is set in the file that takes precedence for it. If an error is raised, conf/ is left unchanged.

    Args:
        root: The project folder.
        values: The values by the dotted names of the settings.

    Raises:
        ConvoyError: If conf/ does not compose to the values afterwards.
    """
    with restore_on_error((root / "conf").rglob("*.yaml")) as before:
        for key, value in values.items():
            _set_value(root, key, value, keeps_references=False)
        composed = config.parse(config.compose_text(root))
        for key, value in values.items():
            path = key.split(".")
            table = _find_table(composed, path)
            if table is None or table[path[-1]] != value:
                raise ConvoyError(f"no file in conf/ sets {key}: set it to {value} yourself")
    _print_edited(root, before)


def _print_edited(root: Path, before: Mapping[Path, bytes | None]) -> None:
    for file, content in before.items():
        if file.read_bytes() != content:
            print(f"{file.relative_to(root)}: edited, as `git diff conf` shows")


@contextlib.contextmanager
def restore_on_error(files: Iterable[Path]) -> Iterator[dict[Path, bytes | None]]:
    """Restore files, and remove those that are new, if an error is raised within the context.

    Yields:
        The present content of each file, None if it does not exist.
    """
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        yield before
    except BaseException:
        for file, content in before.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                file.write_bytes(content)
        raise


def _differences(root: Path, wanted: Mapping[str, Any], *overrides: str) -> Differences:
    return differences(wanted, config.parse(config.compose_text(root, overrides)))


# Choices


def _choose_experiment(root: Path, wanted: Mapping[str, Any]) -> None:
    """Choose the experiment with which the fewest keys differ; in a tie the current choice is kept."""
    models = f"model=[{','.join(wanted['model'])}]"
    now = len(_differences(root, wanted, models))
    counts = {}
    for option in [*_options(root, "experiment"), "null"] if now else []:
        # An experiment may not compose with the other choices.
        with contextlib.suppress(ConvoyError):
            override = "~experiment" if option == "null" else f"experiment={option}"
            counts[option] = len(_differences(root, wanted, models, override))
    best = min(counts, key=counts.__getitem__, default="")
    if best and counts[best] < now:
        set_choice(root, "experiment", None if best == "null" else best)


def _choose_file(root: Path, group: str, wanted: Mapping[str, Any]) -> None:
    """Choose the file of a group that differs in the fewest keys; in a tie the current choice is kept."""
    counts = {}
    for option in _options(root, group):
        table = yaml.safe_load((root / f"conf/{group}/{option}.yaml").read_text())
        counts[option] = len(differences(wanted[group], table if isinstance(table, Mapping) else {}))
    best = min(counts, key=counts.__getitem__, default="")
    if best and counts[best] < counts.get(chosen(root, group), sys.maxsize):
        set_choice(root, group, best)


def _options(root: Path, group: str) -> list[str]:
    return sorted(file.stem for file in (root / "conf" / group).glob("*.yaml"))


def chosen(root: Path, group: str) -> Any:
    """Return the file, without its suffix, that conf/ chooses from a group; None for none."""
    return next((entry[name] for _, _, entry, name in _entries(root, group)), None)


def set_choice(root: Path, group: str, value: Any) -> None:
    """Choose a file of a group in the defaults list that takes precedence for it, keeping the comments there."""
    for file, document, entry, name in _entries(root, group):
        _replace(file, document, entry, name, value)
        return
    raise ConvoyError(f"conf/config.yaml: there is no {group} among the defaults, so {value} can't be chosen")


def _entries(root: Path, group: str) -> Iterator[tuple[Path, Any, Any, str]]:
    """Yield the entries of the defaults lists that choose from a group, in order of precedence."""
    files = [root / "conf/config.yaml"]
    if group != "experiment" and (experiment := chosen(root, "experiment")):
        files.insert(0, root / f"conf/experiment/{experiment}.yaml")
    for file in files:
        document = _yaml().load(file)
        for entry in document.get("defaults", []):
            for name in entry if isinstance(entry, Mapping) else ():
                if name.removeprefix("override ").removeprefix("/") == group:
                    yield file, document, entry, name


# Values


def _set_value(root: Path, key: str, value: Any, *, keeps_references: bool) -> None:
    """Set a key in the file that takes precedence for it, if any file sets it.

    A setting that only a shared file states, of recipes or builders, is added to the file of the architecture.
    """
    path = key.split(".")
    for file, keys in _places(root, path):
        document = _yaml().load(file)
        if (table := _find_table(document, keys)) is not None:
            if not (keeps_references and "${" in str(table[keys[-1]])):
                _replace(file, document, table, keys[-1], value)
            return
    group, keys = ("recipe", path[3:]) if path[2:3] == ["recipe"] else ("builder", path[2:])
    for option in _options(root, group) if path[0] == "model" and keys else []:
        table = _find_table(_yaml().load(root / f"conf/{group}/{option}.yaml"), keys)
        if table is not None:
            _add(root / f"conf/model/{path[1]}.yaml", path[1:], value, table.ca.items.get(path[-1]))
            return


def _find_table(document: Any, keys: Sequence[str]) -> Any:
    """Return the table that holds the last of the nested keys, or None if there is none."""
    table = document
    for name in keys[:-1]:
        table = table.get(name) if isinstance(table, Mapping) else None
    return table if isinstance(table, Mapping) and keys[-1] in table else None


def _places(root: Path, path: Sequence[str]) -> Iterator[tuple[Path, Sequence[str]]]:
    """Yield the files that may set a key, in order of precedence, with the path of the key in each."""
    section, *inner = path
    if experiment := chosen(root, "experiment"):
        yield root / f"conf/experiment/{experiment}.yaml", path
    yield root / "conf/config.yaml", path
    if inner and (option := chosen(root, section)):
        name = inner[0] if section == "model" else option
        yield root / f"conf/{section}/{name}.yaml", inner


def set_values(file: Path, values: Mapping[str, Any]) -> None:
    """Set dotted keys in a file, adding those that it lacks and keeping the comments."""
    for key, value in values.items():
        _add(file, key.split("."), value, None)


def _add(file: Path, keys: Sequence[str], value: Any, comment: Any) -> None:
    """Add a setting and its comment to a file, with the tables around it."""
    document = table = _yaml().load(file)
    for name in keys[:-1]:
        table = table.setdefault(name, CommentedMap())
    table[keys[-1]] = None
    if comment:
        table.ca.items[keys[-1]] = comment
    _replace(file, document, table, keys[-1], value)


def _replace(file: Path, document: Any, table: Any, key: str, value: Any) -> None:
    """Replace a value in a document that was read from `file`, keeping its style, and write the file."""
    is_block = isinstance(table[key], CommentedSeq) and table[key].fa.flow_style() is False
    table[key] = _quoted(value)
    if isinstance(value, list) and not is_block:
        table[key].fa.set_flow_style()
    for comment in table.ca.items.get(key) or ():
        if isinstance(comment, CommentToken):
            # Column 0 puts the comment directly after the value.
            comment.column = 0
    text = io.StringIO()
    _yaml().dump(document, text)
    file.write_text(text.getvalue(), encoding="utf-8")


def _quoted(value: Any) -> Any:
    """Convert a value for a document, quoting strings that YAML would read as another type, such as no, 010 or null."""
    if isinstance(value, list):
        return CommentedSeq(_quoted(item) for item in value)
    is_plain = not isinstance(value, str) or yaml.safe_load(value) == value
    return value if is_plain else DoubleQuotedScalarString(value)


def _yaml() -> YAML:
    """Create a YAML reader and writer that keeps comments, quotes and the style of conf/."""
    both = YAML()
    both.preserve_quotes = True
    both.width = 4096
    both.indent(mapping=2, sequence=4, offset=2)
    both.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return both
