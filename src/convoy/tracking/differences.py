"""The first differences between two training runs: in weights, history and metrics, compared bit by bit."""

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from convoy.tracking.runs import round_for_display


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A part of the results of two training runs, compared."""

    part: str  # weights, history or metrics
    compared: str  # what was compared, such as "10 tensors"
    difference: str  # where the first difference is; "" if there is none


def only_different(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Return those of some named pairs of values that are not equal."""
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def compare_weights(before: Path | None, after: Path | None) -> Comparison:
    """Compare two files of weights; None stands for a training run that failed and left none."""
    if before is None or after is None:
        none = [when for when, file in (("before", before), ("after", after)) if file is None]
        return Comparison("weights", "none", "" if len(none) == 2 else f"there are none {none[0]}")
    old, new = load_file(before), load_file(after)
    if old.keys() != new.keys():
        name = sorted(old.keys() ^ new.keys())[0]
        return Comparison("weights", f"{len(old)} tensors", f"{name} is only in one of them")
    changed = [name for name in sorted(old) if old[name].tobytes() != new[name].tobytes()]
    if not changed:
        return Comparison("weights", f"{len(old)} tensors", "")
    first = changed[0]
    if any(old[name].shape != new[name].shape for name in changed):
        return Comparison("weights", f"{len(old)} tensors", f"{first} and others have another shape")
    place = tuple(int(axis[0]) for axis in np.nonzero(np.atleast_1d(old[first] != new[first])))
    largest = max(float(np.nanmax(np.abs(old[name].astype(float) - new[name]))) for name in changed)
    values = f"{np.atleast_1d(old[first])[place]:.9g} became {np.atleast_1d(new[first])[place]:.9g}" if place else "NaN"
    return Comparison(
        "weights",
        f"{len(old)} tensors",
        f"{len(changed)} differ, by {largest:.2g} at most; first {first}{list(place)}: {values}",
    )


def compare_histories(before: Path, after: Path) -> Comparison:
    """Compare two files of the metrics of each epoch, as text, which holds every digit."""
    with before.open(newline="") as old_file, after.open(newline="") as new_file:
        old, new = list(csv.DictReader(old_file)), list(csv.DictReader(new_file))
    compared = f"{len(old)} epochs"
    for one, other in zip(old, new, strict=False):
        for column in one:
            if one[column] != other.get(column):
                difference = f"first in epoch {one['epoch']}: {column} {one[column]} became {other.get(column)}"
                return Comparison("history", compared, difference)
    return Comparison("history", compared, "" if len(old) == len(new) else f"{len(new)} epochs instead")


def compare_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> Comparison:
    """Compare test metrics by name, with the seven digits that MLflow holds."""
    names = [name for name in after if name in before]
    changed = [name for name in names if round_for_display(before[name]) != round_for_display(after[name])]
    changed = [name for name in changed if not (np.isnan(before[name]) and np.isnan(after[name]))]
    values = [f"{name} {before[name]:.7g} became {after[name]:.7g}" for name in changed]
    difference = f"{len(changed)} differ; first {values[0]}" if changed else ""
    return Comparison("metrics", f"{len(names)} metrics", difference)
