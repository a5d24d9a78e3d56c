"""The search space of a network: which of its settings are searched, and the range of each."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from convoy.core.errors import ConvoyError, suggest

# Significant digits of a number that is tried, so that what was tried can be written into conf/ and read there.
SIGNIFICANT_DIGITS = 3
FORMS = "log:LOW:HIGH, uniform:LOW:HIGH or choice:A,B,C"

# Maps the dotted name of a setting to where it may be.
Space = Mapping[str, BaseDistribution]


def parse_space(
    ranges: Mapping[str, str], settings: Mapping[str, Any], architecture: str
) -> dict[str, BaseDistribution]:
    """Parse the ranges of settings.

    Whether a number is an integer follows from the present setting.

    Args:
        ranges: The range of each setting, such as `{"recipe.lr": "log:0.001:0.3"}`.
        settings: Present settings of the architecture.
        architecture: Name of the architecture, for messages.

    Raises:
        ConvoyError: If a setting does not exist, or a range is wrong.
    """
    known = flatten(settings)
    space = {}
    for name, text in ranges.items():
        if name not in known:
            raise ConvoyError(f"{name}={text}: model.{architecture} has no such setting; {suggest(name, list(known))}")
        try:
            space[name] = _parse_range(str(text), known[name])
        except ValueError as error:
            raise ConvoyError(f"{name}={text}: {error}; write {FORMS}") from None
    return space


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def list_bounds(space: Space) -> list[dict[str, Any]]:
    """Return values of the space that a schema must accept, if it is to accept all: the ends, and each choice."""
    sides = [
        list(each.choices) if isinstance(each, CategoricalDistribution) else [each.low, each.high]  # type: ignore[attr-defined]
        for each in space.values()
    ]
    longest = max(map(len, sides), default=0)
    return [
        {name: values[min(number, len(values) - 1)] for name, values in zip(space, sides, strict=True)}
        for number in range(longest)
    ]


def contains(space: Space, settings: Mapping[str, Any]) -> bool:
    """Return whether settings are within the space."""
    known = flatten(settings)
    return all(
        known[name] in each.choices
        if isinstance(each, CategoricalDistribution)
        else each.low <= known[name] <= each.high  # type: ignore[attr-defined]
        for name, each in space.items()
    )


def round_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """Round the numbers that a sampler has drawn to those that are tried."""
    return {
        name: float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
        for name, value in params.items()
    }


def change_settings(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of settings with other values.

    Args:
        settings: Nested settings of an architecture.
        values: New values by dotted name.
    """
    changed = copy.deepcopy(dict(settings))
    for name, value in values.items():
        *tables, key = name.split(".")
        table = changed
        for each in tables:
            table = table[each]
        table[key] = value
    return changed


def _parse_range(text: str, present: Any) -> BaseDistribution:
    form, _, rest = text.partition(":")
    if form == "choice":
        choices = [yaml.safe_load(part) for part in rest.split(",") if part.strip()]
        if len(choices) < 2:
            raise ValueError("there is nothing to choose from")
        return CategoricalDistribution(choices)
    if form not in ("log", "uniform"):
        raise ValueError("this is no range")
    if isinstance(present, bool) or not isinstance(present, int | float):
        raise ValueError(f"the setting is no number, but {present!r}")
    kind = int if isinstance(present, int) else float
    try:
        low, high = (kind(part) for part in rest.split(":"))
    except ValueError:
        needed = "two whole numbers" if kind is int else "two numbers"
        raise ValueError(f"{form} needs {needed}, LOW:HIGH") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{rest.replace(':', ' to ')} is no range from a lower to a higher number")
    if form == "log" and low <= 0:
        raise ValueError("a logarithmic range must begin above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=form == "log")
    return FloatDistribution(low, high, log=form == "log")
