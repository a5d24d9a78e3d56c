"""Settings: compose them with Hydra, load them, and validate them against typed schemas.

No other module uses Hydra or OmegaConf.
"""

import dataclasses
import io
import json
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args

import pydantic
from pydantic import AfterValidator, Field

from convoy.core.errors import ConvoyError, describe_error, suggest
from convoy.core.renamed_settings import list_keys, refuse_old_names

PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
ProperFraction = Annotated[float, Field(gt=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# Pixels, height and width of the images of a network. LeNet-5's are the smallest.
ImageSize = Annotated[int, Field(ge=32, le=1024)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# What epochs, architectures and champions are compared by. The last two weight all classes equally.
SelectionMetric = Literal["accuracy", "balanced_accuracy", "macro_f1"]
# Short enough to be a file name even where every character takes four bytes in UTF-8.
MAX_NAME_LENGTH = 60  # characters


def _check_name(name: str) -> str:
    is_allowed = all(letter.isalnum() or unicodedata.category(letter)[0] == "M" or letter in " _.-" for letter in name)
    begins_well = name[:1].isalnum() or name[:1] == "_"
    if not (is_allowed and begins_well and name == name.strip() and len(name) <= MAX_NAME_LENGTH):
        raise ValueError(
            "it names folders, and MLflow's experiment and model: letters, digits, spaces and '_', '-', '.', "
            f"beginning with a letter, digit or '_', {MAX_NAME_LENGTH} characters at most"
        )
    # `Default` is MLflow's own experiment; `.moving` ends the name of a model's lock.
    if name == "Default" or name.endswith(".moving"):
        raise ValueError("this name is reserved: choose another")
    return name


# The name of a data set, and of its MLflow experiment and registered model.
Name = Annotated[str, AfterValidator(_check_name)]
# The range that both torch and NumPy accept.
Seed = Annotated[int, Field(ge=0, lt=2**63)]

Schema = TypeVar("Schema")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def schema(table: type[Schema]) -> type[Schema]:
    """Turn a class into a frozen dataclass that validates its values on construction.

    A missing or unknown key, a value of another type and a number out of its range are errors. Types are strict:
    3.7 is not an int, "1" is not a number, and NaN and infinity are not floats.
    """
    strict = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=strict)(table)  # type: ignore[return-value]


def compose(
    root: Path, overrides: Sequence[str] = (), check: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Compose `root/conf`, write the result to `root/params.yaml`, and return its sections.

    If an error is raised, `params.yaml` is left unchanged.

    Args:
        root: Project folder.
        overrides: Hydra overrides, such as `experiment=finetune`.
        check: Function that validates the composed sections before they are written.

    Returns:
        The sections of `params.yaml` by name.

    Raises:
        ConvoyError: If Hydra can't compose the settings, or the file can't be written. Errors that `check` raises are
            passed on.
    """
    text = compose_text(root, overrides)
    sections = parse(text)
    check(sections)
    try:
        (root / "params.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConvoyError(f"params.yaml can't be written: {error.strerror}") from error
    return sections


def compose_text(root: Path, overrides: Sequence[str] = ()) -> str:
    """Compose `root/conf` and return the text, which is identical to what `dvc exp run` writes.

    Raises:
        ConvoyError: If an override has an old name, or Hydra can't compose the settings.
    """
    refuse_old_names([override.partition("=")[0].lstrip("+~") for override in overrides], "override")
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
        raise ConvoyError(f"{file}: there is no such file; {suggest(file.stem, known)}") from error
    # OmegaConf raises OSError for a file that does not hold a mapping.
    except (DvcException, HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        added = f" with {' '.join(overrides)}" if overrides else ""
        hint = _suggest_key(root, overrides, str(error))
        raise ConvoyError(f"conf/ does not compose{added}: {describe_error(error)}{hint}") from error


def _suggest_key(root: Path, overrides: Sequence[str], message: str) -> str:
    """Return a hint which setting an override means, if Hydra's message says that there is none of its name."""
    if not (found := re.search(r"Could not override '([^']+)'", message)):
        return ""
    values: Any = parse(compose_text(root, [each for each in overrides if each.partition("=")[0] != found[1]]))
    for key in found[1].split("."):
        if not isinstance(values, Mapping):
            return ""
        if key not in values:
            return f"; {suggest(key, list(values))}"
        values = values[key]
    return ""


def load(params: Path) -> dict[str, Any]:
    """Load the sections of a composed `params.yaml`.

    Raises:
        ConvoyError: If the file is missing, can't be read, does not hold sections, or has an old name of a setting.
    """
    if not params.exists():
        raise ConvoyError(f"{params.name} is missing: compose it from conf/ with `convoy settings compose`")
    try:
        sections = parse(params.read_text(encoding="utf-8"))
    # Bytes that are not UTF-8 raise ValueError.
    except (ValueError, OSError) as error:
        raise ConvoyError(_describe_unreadable(error)) from error
    refuse_old_names(list_keys(sections), params.name)
    return sections


def parse(text: str) -> dict[str, Any]:
    """Parse the text of a `params.yaml` into its sections.

    Raises:
        ConvoyError: If the text is not valid YAML, or is not a mapping of sections.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        sections = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    # The markers of a merge conflict, for example, are not valid YAML.
    except (YAMLError, ValueError, OSError) as error:
        raise ConvoyError(_describe_unreadable(error)) from error
    if not isinstance(sections, dict):
        raise ConvoyError("params.yaml is not a table of sections: compose it again with `convoy settings compose`")
    return sections  # type: ignore[return-value]


def _describe_unreadable(error: object) -> str:
    return f"params.yaml can't be read: compose it again with `convoy settings compose` ({error})"


def validate(schema: type[Schema], values: Any, section: str) -> Schema:
    """Validate values against a schema, and return an instance of it.

    Args:
        schema: Class made by the `schema` decorator.
        values: Values of the section, as loaded from params.yaml.
        section: Dotted name of the section in params.yaml, used in error messages.

    Raises:
        ConvoyError: If any key is wrong. The message lists every wrong key and what it may be.
    """
    try:
        # Strict validation of JSON still converts a mapping to a dataclass; that of Python objects does not.
        return pydantic.TypeAdapter(schema).validate_json(json.dumps(values, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise ConvoyError("\n".join(_describe_errors(error, schema, values, section))) from None


def describe_validation_error(error: pydantic.ValidationError) -> str:
    """Return the location and message of the first problem that pydantic found."""
    first = error.errors()[0]
    location = ".".join(map(str, first["loc"]))
    return f"{location}: " * bool(location) + first["msg"][0].lower() + first["msg"][1:]


def check_sections(params: Mapping[str, Any], known: Sequence[str]) -> None:
    """Check that the composed settings have all known sections and no others.

    Raises:
        ConvoyError: If a section is unknown, missing or empty, or a setting has an old name.
    """
    refuse_old_names(list_keys(params), "conf/")
    for name in params:
        if name not in known:
            raise ConvoyError(f"conf/: {name}: unknown section; {suggest(name, known)}")
    for name in known:
        if not params.get(name):
            raise ConvoyError(f"conf/: {name}: missing or empty; set it in conf/config.yaml")


def _describe_errors(error: pydantic.ValidationError, schema: Any, values: Any, section: str) -> Iterator[str]:
    # Messages by value. A value whose type is a union gets one for each member of the union.
    wrong: dict[str, list[str]] = {}
    for detail in error.errors():
        *parents, key = detail["loc"] or ("",)
        name = ".".join(str(part) for part in (section, *detail["loc"]))
        match detail["type"]:
            case "unexpected_keyword_argument":
                known = _list_fields(schema, parents)
                yield f"{name}: unknown key; {suggest(str(key), known)}"
            case "missing" | "missing_argument":
                yield f"{name}: missing; set it in conf/"
            case _:
                name = ".".join((section, *_find_keys(detail["loc"], values)))
                message = detail["msg"][0].lower() + detail["msg"][1:]
                kind, value = detail["type"], detail["input"]
                if kind == "string_type" or (kind == "literal_error" and isinstance(value, bool)):
                    message += _quoting_hint(value)
                wrong.setdefault(f"{name}={detail['input']!r}: ", []).append(message)
    for name, (first, *others) in wrong.items():
        yield name + ", or ".join([first, *(message.removeprefix("input should be ") for message in others)])


def _quoting_hint(value: Any) -> str:
    """Return a hint on how to quote a string that YAML otherwise reads as another type."""
    match value:
        case bool():
            words = "yes, on and true" if value else "no, off and false"
            return f"; YAML reads {words} as {value} unless quoted: write it in quotes, such as {words.split(',')[0]!r}"
        case int() | float():
            return f"; YAML reads digits as a number, and 007 as 7, unless quoted: write quotes, such as '{value}'"
        case None:
            return "; YAML reads null, ~ and an empty value as None unless quoted: write it in quotes, such as 'null'"
    return ""


def _find_keys(location: Sequence[Any], values: Any) -> Iterator[str]:
    """Yield the keys and list indices in pydantic's location of an error, without the names of union members."""
    for part in location:
        if (isinstance(values, Mapping) and part in values) or (isinstance(values, list) and isinstance(part, int)):
            values = values[part]
            yield str(part)


def _list_fields(schema: Any, parents: Sequence[Any]) -> list[str]:
    for parent in parents:
        kind = next((field.type for field in dataclasses.fields(schema) if field.name == parent), None)
        # For an optional schema (`Schema | None`), take the schema.
        schema = next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)
        if schema is None:
            return []
    return [field.name for field in dataclasses.fields(schema)]
