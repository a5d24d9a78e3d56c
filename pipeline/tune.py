"""The command that searches for better settings of an architecture, and compares them with the present ones."""

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convoy.cluster import uses_cluster
from convoy.core import config
from convoy.core.errors import ConvoyError, suggest
from convoy.core.yaml_parser import parse_yaml
from pipeline.check_settings import check_settings
from pipeline.conf_files import differences, write_values
from pipeline.stage import Stage

# It imports torch, which takes seconds.
if TYPE_CHECKING:
    from pipeline.tuner import TuningResult

# Sections that the prepared images depend on.
DATA_SECTIONS = ("dataset", "fetch", "preprocess", "split")
WORKER_TIMEOUT_S = 30  # until a worker is killed that has not ended with the search


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """Options of `convoy tune`."""

    trials: int | None = None  # in all, with those of earlier calls; None for no limit
    minutes: float | None = None  # of this call, with the comparison at its end; None for no limit
    ranges: Sequence[str] = ()  # such as "recipe.lr=log:0.001:0.3"; by default those of conf/search/
    sampler: Literal["tpe", "random"] = "tpe"
    jobs: int = 1  # trials at a time
    apply: bool = False  # whether to write better settings into conf/
    as_json: bool = False
    on_cluster: bool = False  # whether the trials run on a Ray cluster
    is_worker: bool = False  # whether another process has started this one to help it

    def list_arguments(self) -> list[str]:
        """Return the options that define the search, as arguments of the command line."""
        limits = {"--trials": self.trials, "--minutes": self.minutes}
        given = [part for name, value in limits.items() if value is not None for part in (name, f"{value:g}")]
        given += [part for text in self.ranges for part in ("--param", text)]
        given += ["--sampler", self.sampler] if self.sampler != "tpe" else []
        given += ["--ray"] if self.on_cluster else []
        return [*given, "--jobs", str(self.jobs)] if self.jobs > 1 else given


def tune(root: Path, architecture: str, overrides: Sequence[str], options: TuneOptions) -> None:
    """Search for better settings of an architecture, and compare them with the present ones.

    Only training and validation images are read. An interrupted search resumes when it is called again.

    Args:
        root: The project folder.
        architecture: The architecture, with its settings in conf/.
        overrides: Hydra overrides of settings, which hold for this search.
        options: Options of the search.

    Raises:
        ConvoyError: If the architecture, a setting or a range is wrong, there are no prepared images, or no trial can
            be completed.
    """
    if options.on_cluster:
        overrides = [*(["trainer=ray"] if "trainer=ray" not in overrides else []), *overrides]
    stage = open_stage(root, architecture, overrides)
    if uses_cluster(stage.section("trainer")) != options.on_cluster:
        raise ConvoyError("trainer=ray and --ray belong together: a search on a cluster needs both, any other neither")
    settings = stage.section(f"model.{architecture}")
    ranges = read_ranges(root, settings["recipe"]["optimizer"], options.ranges)

    # Wrong ranges are reported before the import of torch.
    from convoy.search.space import parse_space

    space = parse_space(ranges, settings, architecture)
    check_settings(stage.params)

    from pipeline.train import open_cluster
    from pipeline.tuner import Tuner

    with open_cluster(stage, workers=1) as cluster:
        tuner = Tuner(stage, space, ranges, options, cluster)
        with nullcontext() if cluster else start_workers(architecture, overrides, options):
            result = tuner.run()
    if options.is_worker:
        return
    folder = root / "artifacts" / "tune" / architecture
    url = tuner.write_results(result, folder)
    if options.as_json:
        print(json.dumps(result.describe()))
    else:
        print_result(result, architecture)
        print(f"See {folder.relative_to(root)}/ for plots and a table of the trials" + (f", and {url}" if url else ""))
    if not result.is_better:
        return
    if options.apply:
        write_values(root, {f"model.{architecture}.{name}": value for name, value in result.tuned.items()})
    elif not options.as_json:
        again = shlex.join(["convoy", "tune", architecture, *overrides, *options.list_arguments(), "--apply"])
        print(f"To write the tuned settings into conf/:\n  {again}")


def open_stage(root: Path, architecture: str, overrides: Sequence[str]) -> Stage:
    """Return the train stage of an architecture with the settings that conf/ composes to.

    Raises:
        ConvoyError: If conf/ has no such architecture, or the prepared images belong to other settings.
    """
    stage = Stage(root, "train", architecture)
    composed = config.parse(config.compose_text(root, overrides))
    if architecture not in (known := list(composed["model"])):
        raise ConvoyError(f"conf/ chooses no model {architecture}; {suggest(architecture, known)}")
    prepared = {name: stage.params.get(name) for name in DATA_SECTIONS}
    if changed := differences(prepared, {name: composed.get(name) for name in DATA_SECTIONS}):
        raise ConvoyError(
            f"the prepared images belong to other settings ({', '.join(changed)}): run `convoy run` first, which "
            "prepares them again"
        )
    stage.params = composed
    return stage


def read_ranges(root: Path, optimizer: str, given: Sequence[str]) -> dict[str, str]:
    """Return where each setting may be: as given on the command line, or else as in conf/search/.

    Args:
        root: The project folder.
        optimizer: The optimizer of the architecture, which names the file.
        given: Arguments such as "recipe.lr=log:0.001:0.3".

    Raises:
        ConvoyError: If an argument has no "=", or the file can't be read.
    """
    if given:
        pairs = [text.partition("=") for text in given]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise ConvoyError(f"--param {wrong[0]}: write a setting and its range, as in recipe.lr=log:0.001:0.3")
        return {name: text for name, _, text in pairs}
    file = Path("conf/search") / f"{optimizer}.yaml"
    try:
        found = parse_yaml((root / file).read_text())
    except (OSError, ValueError) as error:
        raise ConvoyError(f"{file} can't be read ({error}): restore it, or give ranges by --param") from None
    if not isinstance(found, Mapping) or not found:
        raise ConvoyError(f"{file} holds no ranges: write some, such as recipe.lr: log:0.001:0.3")
    return {str(name): str(text) for name, text in found.items()}


@contextmanager
def start_workers(architecture: str, overrides: Sequence[str], options: TuneOptions) -> Iterator[None]:
    """Start the other processes that work on the search, and end them with the context."""
    arguments = [architecture, *overrides, *options.list_arguments(), "--worker", *["--json"] * options.as_json]
    command = [sys.executable, "-m", "pipeline.cli", "tune", *arguments]
    workers = [subprocess.Popen(command) for _ in range(0 if options.is_worker else options.jobs - 1)]
    try:
        yield
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            try:
                worker.wait(WORKER_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                worker.kill()


def print_result(result: "TuningResult", architecture: str) -> None:
    """Print the best settings beside the present ones, and what may be concluded."""
    pruned = f", of which {result.pruned} ended early" if result.pruned else ""
    print(f"\n{architecture}: {result.trials} trials{pruned}; the best in validation is trial {result.best}")
    rows: list[tuple[str, Any, Any]] = [("", "present", "tuned")]
    rows += [(name, result.present[name], value) for name, value in result.tuned.items()]
    if compared := result.comparison:
        first, *_, last = result.seeds
        rows += [(f"{result.metric}, seeds {first} to {last}", _show(compared.present), _show(compared.tuned))]
    widths = [max(len(str(row[column])) for row in rows) for column in range(3)]
    for row in rows:
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(result.conclusion)


def _show(interval: Any) -> str:
    return f"{interval.mean:.4f} ({interval.low:.4f} to {interval.high:.4f})"
