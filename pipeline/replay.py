"""Train a run again from nothing, and compare what comes out with what MLflow holds of it."""

import dataclasses
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy import stats

from convoy.core import config
from convoy.core.artifact_names import HISTORY, WEIGHTS
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.tracking import logged_run
from convoy.tracking.differences import Comparison, compare_histories, compare_metrics, compare_weights, only_different
from convoy.tracking.logged_run import LoggedRun
from convoy.tracking.store import TrackingStore, open_store
from convoy.training.record import TrainingRecord
from pipeline.replay_workspace import Workspace, check_commit, open_workspace

# Exit status if the run was repeated with another result.
OTHER_RESULT = 3
SEEDS = 3
CONFIDENCE = 0.95  # of the interval for the accuracy of another seed


@dataclasses.dataclass(frozen=True)
class SeedSpread:
    """The test accuracy of a run, and of training runs in this environment that differ in nothing but their seeds."""

    recorded: float
    repeated: Mapping[int, float]  # by seed, first that of the run
    test_images: int

    def interval(self) -> tuple[float, float]:
        """Return the interval in which the accuracy of one more seed is in 95 of 100 cases.

        It is Student's prediction interval. As seeds may agree by chance, it reaches at least one test image to both
        sides of their mean.
        """
        accuracies = list(self.repeated.values())
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(accuracies) - 1)
        reach = quantile * statistics.stdev(accuracies) * (1 + 1 / len(accuracies)) ** 0.5
        reach, mean = max(reach, 1 / self.test_images), statistics.mean(accuracies)
        return mean - reach, mean + reach

    def is_usual(self) -> bool:
        """Return whether the accuracy of the run is one that another seed would give."""
        low, high = self.interval()
        # An accuracy in MLflow has seven digits.
        return low - 1e-6 <= self.recorded <= high + 1e-6


@dataclasses.dataclass(frozen=True)
class Replay:
    """The outcome of repeating a run."""

    run: LoggedRun
    comparisons: list[Comparison]
    inputs: dict[str, tuple[Any, Any]]  # what it was made from and differs: recorded and repeated
    environment: dict[str, tuple[Any, Any]]  # hardware and versions that differ: recorded and repeated
    spread: SeedSpread | None = None  # where the environment and the results differ

    @property
    def is_identical(self) -> bool:
        """Return whether weights, history and metrics are bit-identical."""
        return not any(comparison.difference for comparison in self.comparisons)

    @property
    def answer(self) -> str:
        """Return the answer in a few words."""
        if self.is_identical:
            return "bit-identical"
        if self.inputs:
            return "not bit-identical, from other inputs"
        if not self.environment:
            return "not bit-identical, in the same environment"
        if self.spread is None:
            return "not bit-identical, in another environment"
        usual = "as another seed" if self.spread.is_usual() else "unlike another seed"
        return f"not bit-identical, in another environment; its accuracy is {usual}"

    @property
    def status(self) -> int:
        """Return the exit status: 0 if the run was reproduced as far as its environment was."""
        is_usual = self.spread is not None and self.spread.is_usual()
        return 0 if self.is_identical or (is_usual and not self.inputs) else OTHER_RESULT


def replay(root: Path, name: str, *, as_json: bool = False) -> int:
    """Train a run again, and print how the result compares with the recorded one.

    Args:
        root: The project folder.
        name: The run: its ID, the first digits of it, or an architecture.
        as_json: Whether to print JSON.

    Returns:
        0 if the result is bit-identical, or the environment differs and the accuracy is that of another seed; else 3.

    Raises:
        ConvoyError: If the run can't be repeated.
    """
    scratch = root / "artifacts/.scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        with open_store(root, config.load(root / "params.yaml")["register"]["name"]) as store:
            run = logged_run.download(store, logged_run.find(store, name), Path(folder))
            check_commit(root, run)
            check_machines(run.record)
            run = fetch_initial_weights(root, store, run)
        with open_workspace(root, run) as workspace:
            workspace.train()
            repeated = compare(workspace)
            if not repeated.is_identical and repeated.environment and not repeated.inputs:
                repeated = dataclasses.replace(repeated, spread=train_seeds(workspace))
    print(json.dumps(describe(repeated), indent=2) if as_json else format_replay(repeated))
    return repeated.status


def check_machines(record: TrainingRecord) -> None:
    """Raise ConvoyError if a run was trained on several machines."""
    if record.trainer.num_nodes > 1:
        raise ConvoyError(
            f"the run was trained on {record.trainer.num_nodes} machines at once, and a replay runs on one: check out "
            "its commit on each of them, and start it by torchrun (docs/training.md)"
        )


def fetch_initial_weights(root: Path, store: TrackingStore, run: LoggedRun) -> LoggedRun:
    """Download the weights of the other run that a run started from, if it did.

    Raises:
        ConvoyError: If the weights are not the ones that the run started from.
    """
    start = run.record.initial_weights
    if start.init in ("scratch", "pretrained"):
        return run
    # A version of the registered model is named with its run.
    if source := re.search(r"run ([0-9a-f]{32})$", start.source):
        other = logged_run.download(store, store.client.get_run(source[1]), run.folder / "initial")
        weights = other.folder / WEIGHTS
    else:
        weights = root / start.init
    if not weights.exists() or (start.sha256 and sha256(weights) != start.sha256):
        raise ConvoyError(
            f"run {run.name} started from {start.source or start.init}, and those weights are not there any more"
        )
    return dataclasses.replace(run, initial_weights=weights)


def compare(workspace: Workspace) -> Replay:
    """Compare the result in a workspace with that of its run."""
    run, record = workspace.run, workspace.record()
    metrics = {name.removeprefix("test/"): value for name, value in run.metrics.items() if name.startswith("test/")}
    comparisons = [
        compare_weights(run.weights, workspace.weights),
        compare_histories(run.folder / HISTORY, workspace.history),
        compare_metrics(metrics, workspace.test_metrics()),
    ]
    inputs = {
        "images": (run.record.data.digest, record.data.digest),
        "initial weights": (run.record.initial_weights.sha256, record.initial_weights.sha256),
        **dict.fromkeys(workspace.changed_code(), ("code of the run", f"code of commit {run.commit}")),
    }
    before, after = run.record.environment, record.environment
    # Records of earlier formats do not have all of them.
    environment = {name: (before.get(name, ""), after.get(name, "")) for name in {**before, **after}}
    if run.record.stopped == "max_time":
        environment["end by trainer.max_time"] = ("after", f"{run.record.trainer.max_time} on that machine")
    return Replay(run, comparisons, only_different(inputs), only_different(environment))


def train_seeds(workspace: Workspace) -> SeedSpread | None:
    """Train a run with two more seeds, and return the accuracies; None if the training of the run failed."""
    run = workspace.run
    if "test/accuracy" not in run.metrics:
        return None
    seed, accuracies = run.record.train.seed, {}
    for number in range(seed, seed + SEEDS):
        if number > seed:
            print(f"training with seed {number}, as the environment differs", file=sys.stderr)
            workspace.set_seed(number)
            workspace.train()
        accuracies[number] = workspace.test_metrics()["accuracy"]
    return SeedSpread(run.metrics["test/accuracy"], accuracies, run.record.data.profile["test"])


def describe(repeated: Replay) -> dict[str, Any]:
    """Return the outcome of a replay as JSON-serializable values."""
    run, spread = repeated.run, repeated.spread
    described = {
        "run": run.run_id,
        "architecture": run.record.architecture,
        "commit": run.commit,
        "answer": repeated.answer,
        "bit_identical": repeated.is_identical,
        **{comparison.part: comparison.difference or "identical" for comparison in repeated.comparisons},
        "inputs": repeated.inputs,
        "environment": repeated.environment,
    }
    if spread:
        values = {"recorded": spread.recorded, "by_seed": spread.repeated, "interval": spread.interval()}
        described["accuracy"] = values
    return described


def format_replay(repeated: Replay) -> str:
    """Return the outcome of a replay for the terminal."""
    run, spread = repeated.run, repeated.spread
    data = f"{run.record.data.name}@{run.record.data.digest}"
    lines = [f"run {run.run_id} ({run.record.architecture}), commit {run.commit}, images {data}"]
    for each in repeated.comparisons:
        lines.append(f"  {each.part:<9} {each.compared:<12} {each.difference or 'identical'}")
    for what, values in (("other inputs", repeated.inputs), ("another environment", repeated.environment)):
        if values:
            lines.append(f"{what}:")
            lines += [f"  {name:<20} {before or '-'} became {after or '-'}" for name, (before, after) in values.items()]
    if spread:
        low, high = spread.interval()
        seeds = ", ".join(f"{accuracy:.4f} (seed {seed})" for seed, accuracy in spread.repeated.items())
        lines.append(
            f"test accuracy {spread.recorded:.4f}, here {seeds}: another seed gives {low:.4f} to {min(high, 1):.4f}"
        )
    return "\n".join([*lines, repeated.answer])
