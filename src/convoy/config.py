"""Settings: the one door to Hydra and OmegaConf, and to the types that settings must have."""

import dataclasses
import io
import json
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

import pydantic
from pydantic import AfterValidator, Field

from convoy.errors import ConvoyError, _hint

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
MAX_NAME_LENGTH = 60  # characters, so that a file can be called by it whatever its letters are


def _check_name(name: str) -> str:
    is_allowed = all(letter.isalnum() or unicodedata.category(letter)[0] == "M" or letter in " _.-" for letter in name)
    begins_well = name[:1].isalnum() or name[:1] == "_"
    if not (is_allowed and begins_well and name == name.strip() and len(name) <= MAX_NAME_LENGTH):
        raise ValueError(
            "it names folders, and MLflow's experiment and model: letters, digits, spaces and '_', '-', '.', "
            f"beginning with a letter, digit or '_', {MAX_NAME_LENGTH} characters at most"
        )
    # MLflow's own experiment, and how the lock of a model is called
    if name == "Default" or name.endswith(".moving"):
        raise ValueError("this name is reserved: choose another")
    return name


Name = Annotated[str, AfterValidator(_check_name)]  # of a data set, and of the experiment and model that it is in
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch and NumPy both take

Schema = TypeVar("Schema")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def schema(table: type[Schema]) -> type[Schema]:
    """Class decorator: a frozen dataclass whose values are checked when it is made.

    No key may be missing, unknown or of another type (3.7 is no int, "1" is no number, nan is no float), and no
    number out of its range.
    """
    strict = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=strict)(table)  # type: ignore[return-value]


def compose(
    root: Path, overrides: Sequence[str] = (), check: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Compose `root/conf` into `root/params.yaml`, and return it.

    Raises ConvoyError for what Hydra can't make sense of, and whatever `check` raises of the composed sections.
    Then `params.yaml` is left as it was.
    """
    text = composed(root, overrides)
    sections = parse(text)
    check(sections)
    try:
        (root / "params.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConvoyError(f"params.yaml can't be written: {error.strerror}") from error
    return sections


def composed(root: Path, overrides: Sequence[str] = ()) -> str:
    """What `root/conf` composes to: the very text that `dvc exp run` writes. Raises ConvoyError as `compose` does."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with tempfile.TemporaryDirectory() as folder:
            params = Path(folder) / "params.yaml"
            compose_and_dump(params, str(root / "conf"), None, "config", str(root), list(overrides))
            return params.read_text(encoding="utf-8")
    except MissingConfigException as error:
        file = Path(f"conf/{error.missing_cfg_file}.yaml")
        known = sorted(other.stem for other in (root / file.parent).glob("*.yaml"))
        raise ConvoyError(f"{file}: there is no such file; {_hint(file.stem, known)}") from error
    # OSError is OmegaConf's word for a file that holds no table
    except (DvcException, HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConvoyError(f"conf/ does not compose: {said}") from error


def load(params: Path) -> dict[str, Any]:
    """The sections of a composed `params.yaml`."""
    if not params.exists():
        raise ConvoyError(f"{params.name} is missing: compose it from conf/ with `make repro`")
    try:
        return parse(params.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # of bytes that are no text
        raise ConvoyError(_unreadable(error)) from error


def parse(text: str) -> dict[str, Any]:
    """The sections in the text of a `params.yaml`. Raises ConvoyError where there are none."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        sections = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (YAMLError, ValueError, OSError) as error:  # such as the marks of a merge conflict
        raise ConvoyError(_unreadable(error)) from error
    if not isinstance(sections, dict):
        raise ConvoyError(
            "params.yaml is not a table of sections: compose it again with `python -m pipeline --compose`"
        )
    return sections  # type: ignore[return-value]


def _unreadable(error: object) -> str:
    return f"params.yaml can't be read: compose it again with `python -m pipeline --compose` ({error})"


def typed(schema: type[Schema], values: Any, section: str) -> Schema:
    """`values` as a checked `schema`; `section` is their dotted name in params.yaml, for the message.

    Raises ConvoyError that lists every wrong key with what it may be.
    """
    try:
        # by way of JSON, where strict types still let a table become a dataclass
        return pydantic.TypeAdapter(schema).validate_json(json.dumps(values, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise ConvoyError("\n".join(_complaints(error, schema, values, section))) from None


def check_sections(params: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ConvoyError where the composed settings lack a known section, or have another."""
    for name in params:
        if name not in known:
            raise ConvoyError(f"conf/: {name}: unknown section; {_hint(name, known)}")
    for name in known:
        if not params.get(name) and params.get(name) != 0:
            raise ConvoyError(f"conf/: {name}: missing or empty; set it in conf/config.yaml")


def _complaints(error: pydantic.ValidationError, schema: Any, values: Any, section: str) -> Iterator[str]:
    wrong: dict[str, list[str]] = {}  # of each value, what it should be: several where it may be of several kinds
    for complaint in error.errors():
        *parents, key = complaint["loc"] or ("",)
        name = ".".join(str(part) for part in (section, *complaint["loc"]))
        match complaint["type"]:
            case "unexpected_keyword_argument":
                known = _fields(schema, parents)
                yield f"{name}: unknown key; {_hint(str(key), known)}"
            case "missing" | "missing_argument":
                yield f"{name}: missing; set it in conf/"
            case _:
                name = ".".join((section, *_keys(complaint["loc"], values)))
                said = complaint["msg"][0].lower() + complaint["msg"][1:]
                kind, value = complaint["type"], complaint["input"]
                if kind == "string_type" or (kind == "literal_error" and isinstance(value, bool)):
                    said += _quoting_hint(value)
                wrong.setdefault(f"{name}={complaint['input']!r}: ", []).append(said)
    for name, (first, *others) in wrong.items():
        yield name + ", or ".join([first, *(said.removeprefix("input should be ") for said in others)])


def _quoting_hint(value: Any) -> str:
    """Say how to write a text that YAML takes for another type where it is not quoted."""
    match value:
        case bool():
            words = "yes, on and true" if value else "no, off and false"
            return f"; YAML reads {words} as {value} unless quoted: write it in quotes, such as {words.split(',')[0]!r}"
        case int() | float():
            return f"; YAML reads digits as a number, and 007 as 7, unless quoted: write quotes, such as '{value}'"
        case None:
            return "; YAML reads null, ~ and an empty value as None unless quoted: write it in quotes, such as 'null'"
    return ""


def _keys(location: Sequence[Any], values: Any) -> Iterator[str]:
    """The keys and list places of a location: pydantic also puts there which kind of several did not fit."""
    for part in location:
        if (isinstance(values, Mapping) and part in values) or (isinstance(values, list) and isinstance(part, int)):
            values = values[part]
            yield str(part)


def _fields(schema: Any, parents: Sequence[Any]) -> list[str]:
    for parent in parents:
        kind = next((field.type for field in dataclasses.fields(schema) if field.name == parent), None)
        # of `Table | None`, the table
        schema = next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)
        if schema is None:
            return []
    return [field.name for field in dataclasses.fields(schema)]
