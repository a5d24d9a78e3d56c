"""The command line `convoy`.

Each command imports what it runs only when it is called, so that it starts within a second. src/convoy/launcher.py
starts this module in the project folder; `python -m pipeline.cli` there does the same.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from convoy.core.errors import ConvoyError
from pipeline import model_commands
from pipeline.cli_options import AsJson, Overrides, Run, caller_folder, resolve_typed
from pipeline.errors import exit_on_error, explain_system_errors

EXIT_CODES = """\b
Exit codes:
  0          success
  1          an error that the message explains, or a stage that failed
  2          a wrong command, option or argument
  255        an internal error of DVC
  128 + n    ended by signal n: 130 for Ctrl-C, 143 for SIGTERM

`convoy --install-completion` makes the shell complete commands and options.
"""


class Commands(TyperGroup):
    """Commands whose errors end in one message and exit code 1 where the user can fix them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        with exit_on_error(), explain_system_errors("run this again"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    epilog=EXIT_CODES,
    help="From labelled images to a registered champion.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
settings_app = typer.Typer(help="Show, adopt or compose the settings.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(settings_app, name="settings")
# Without a name, these are commands of `convoy` itself.
app.add_typer(model_commands.app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; by default with the arguments of this process."""
    # File names may contain characters that the terminal can't encode.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app(args=arguments, prog_name="convoy")


def parse_jobs(jobs: str) -> int | None:
    """Return the number of architectures to train at a time; None for as many as the machine allows."""
    if jobs != "auto" and not (jobs.isdecimal() and int(jobs) > 0):
        raise typer.BadParameter(f"{jobs!r} is neither auto nor a number from 1", param_hint="--jobs")
    return None if jobs == "auto" else int(jobs)


def show_version(is_asked: bool) -> None:
    """Print the version and exit, if asked to."""
    if is_asked:
        print(f"convoy {importlib.metadata.version('convoy')}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Accept the options that stand before the command."""


@app.command(epilog="Example: convoy run model=resnet train.max_epochs=4")
def run(
    overrides: Overrides = None,
    update: Annotated[bool, typer.Option("--update", help="Fetch the newest data first.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Reuse results that the DVC remote has.")] = False,
    jobs: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Architectures to train at a time. auto: as many as there are processors, or GPUs, for.",
        ),
    ] = "1",
) -> None:
    """Run the pipeline and show the leaderboard.

    This composes conf/ into params.yaml, checks the settings, and runs the stages that are not up to date. OVERRIDES
    hold for this run only; `convoy settings adopt` afterwards writes them into conf/.
    """
    from pipeline.run import run

    raise typer.Exit(run(Path.cwd(), overrides or (), update=update, pull=pull, jobs=parse_jobs(jobs)))


@app.command(
    epilog="Example: convoy retrain --push\n\nExit codes: 0 promoted, 3 not promoted, 4 nothing has changed, 1 failed"
)
def retrain(
    push: Annotated[
        bool, typer.Option("--push", help="Push the results to the DVC remote, and the lock files as a branch.")
    ] = False,
    jobs: Annotated[str, typer.Option(metavar="N|auto", help="Architectures to train at a time.")] = "1",
    now: Annotated[
        bool, typer.Option("--now", help="Train on changed data whatever the triggers in `retrain` say.")
    ] = False,
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit with 0 unless it failed.")] = False,
    require_server: Annotated[
        bool, typer.Option("--require-server", help="Refuse to run without MLFLOW_TRACKING_URI.")
    ] = False,
) -> None:
    """Retrain on the newest data, unless nothing has changed.

    This fetches the newest data, runs what has changed, reusing results that the DVC remote has, lets the gate decide,
    and writes a summary to artifacts/retrain/summary.md.
    """
    from pipeline.retrain import retrain

    if require_server and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConvoyError(
            "MLFLOW_TRACKING_URI is not set: name a server there, as the champion would be gone with this machine"
        )
    raise typer.Exit(retrain(Path.cwd(), push=push, jobs=parse_jobs(jobs), exit_zero=exit_zero, now=now))


@app.command(
    epilog="Example: convoy monitor ../photos\n\nExit codes: 0 no drift, 3 drift, 1 an error that the message explains"
)
def monitor(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Images without labels, or the log of `convoy serve --log-images`.")
    ],
    alpha: Annotated[float, typer.Option(min=0.001, max=0.1, help="Probability of a false alarm.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Test new images for drift from those that the champion was trained on.

    This prints the p-value and the effect, and draws the most unusual images to artifacts/monitor/unusual.png.
    """
    from pipeline.monitor import monitor

    raise typer.Exit(monitor(Path.cwd(), resolve_typed(folder), alpha, as_json=as_json))


@app.command(epilog="Example: convoy use ../photos --name pets --table metadata.csv --path image_id --label species")
def use(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder, an archive, a Parquet file, an address such as s3://bucket/pets, or the name of a data set "
            "that torchvision provides, such as mnist.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the data set, its MLflow experiment and its model.")] = None,
    table: Annotated[str | None, typer.Option(metavar="FILE", help="The table of labels beside the images.")] = None,
    path: Annotated[str | None, typer.Option(metavar="COLUMN", help="Its column with the names of the files.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Its column with the classes; of a one-hot table, each.")
    ] = None,
    group: Annotated[str | None, typer.Option(metavar="COLUMN", help="Its column with groups: patients.")] = None,
    split: Annotated[str | None, typer.Option(metavar="COLUMN", help="Its column with train, val and test.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Use only images that match, as in .gitignore.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave out files that match, as in .gitignore.")
    ] = None,
) -> None:
    """Make a source of labelled images the one to train on.

    Nothing is downloaded or copied before the next run, and the command to undo it is printed. The options are written
    into the file of the data set in conf/dataset/; docs/data.md lists the forms of tables that need none.
    """
    from pipeline.use import use

    root = Path.cwd()
    options = {
        "table.file": table,
        "table.path": path,
        "table.label": label[0] if label and len(label) == 1 else label or None,
        "table.group": group,
        "table.split": split,
        "include": include or None,
        "exclude": exclude or None,
    }
    with contextlib.chdir(caller_folder()):
        use(root, source, name, {key: value for key, value in options.items() if value is not None})


@settings_app.command("show", epilog="Example: convoy settings show experiment=finetune")
def show_settings(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the settings that conf/ composes to.

    This runs and writes nothing.
    """
    from convoy.core import config

    text = config.compose_text(Path.cwd(), overrides or ())
    print(json.dumps(config.parse(text), indent=2, ensure_ascii=False) if as_json else text.rstrip())


@settings_app.command("adopt", epilog="Example: dvc exp apply bold-idea && convoy settings adopt")
def adopt_settings() -> None:
    """Write settings that only params.yaml has into conf/.

    params.yaml has such settings after `dvc exp apply`, a merge or a run with overrides.
    """
    from pipeline import settings
    from pipeline.check_settings import check_settings

    settings.compose(Path.cwd(), check_settings, adopt=True)


@settings_app.command("compose", epilog="Example: convoy settings compose")
def compose_settings() -> None:
    """Compose conf/ into params.yaml.

    This discards settings that only params.yaml has.
    """
    from pipeline import settings
    from pipeline.check_settings import check_settings

    settings.compose(Path.cwd(), check_settings, discard=True)


@app.command(epilog="Example: convoy leaderboard --json")
def leaderboard(as_json: AsJson = False) -> None:
    """Print the leaderboard of the last run."""
    from pipeline.leaderboard import print_leaderboard

    print_leaderboard(Path.cwd(), as_json=as_json)


@app.command(epilog="Example: convoy report")
def report() -> None:
    """Open the report of the last run, with the verdict.

    It is one file without outside requests, artifacts/report.html, which can be sent to others. Where there is no
    display, its path is printed.
    """
    from pipeline.show_report import show_report

    show_report(Path.cwd())


@app.command(epilog="Example: convoy ui")
def ui() -> None:
    """Start the MLflow UI, and print the links to its views.

    With MLFLOW_TRACKING_URI set, the UI of that server is used and none is started.
    """
    from pipeline.ui import start_ui

    start_ui(Path.cwd())


@app.command(epilog="Example: convoy gc --delete")
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
    days: Annotated[int, typer.Option(min=1, help="Keep checkpoints and model versions of the last days.")] = 30,
    commits: Annotated[int, typer.Option(min=1, help="Keep the data of this many commits of each branch.")] = 10,
    versions: Annotated[int, typer.Option(min=1, help="Keep this many of the newest model versions.")] = 10,
) -> None:
    """List old data, checkpoints and model versions that nothing needs.

    The rules are printed first. Nothing is removed without --delete.
    """
    from pipeline.gc import Rules, collect_garbage

    collect_garbage(Path.cwd(), Rules(days, commits, versions), delete=delete)


@app.command(epilog="Example: convoy replay resnet\n\nExit codes: 0 reproduced, 3 another result, 1 failed")
def replay(run: Run, as_json: AsJson = False) -> None:
    """Train a run again from nothing and compare the results.

    This checks out its commit, takes its images by their checksum and its settings, installs its packages if they are
    others than here, and trains. Where hardware and versions are the same, the answer is whether weights, history and
    metrics are bit-identical; where they differ, whether the accuracy is that of another seed.
    """
    from pipeline.replay import replay

    raise typer.Exit(replay(Path.cwd(), run, as_json=as_json))


@app.command(epilog="Example: convoy diff lenet resnet")
def diff(first: Run, second: Run, as_json: AsJson = False) -> None:
    """Show what differs between two runs.

    These are settings, images, code, environment and results, in one table.
    """
    from pipeline.diff import diff

    diff(Path.cwd(), first, second, as_json=as_json)


@app.command(epilog="Example: convoy find-lr resnet")
def find_lr(
    architecture: Annotated[str, typer.Argument(metavar="ARCHITECTURE", help="An architecture of the settings.")],
    as_json: AsJson = False,
) -> None:
    """Suggest a learning rate for an architecture.

    This trains it for a moment with rising learning rates, plots the loss and changes no setting.
    """
    from pipeline.find_lr import find_lr

    find_lr(Path.cwd(), architecture, as_json=as_json)


@app.command(epilog="Example: convoy tune lenet --minutes 15 --param recipe.lr=log:0.001:0.3")
def tune(
    architecture: Annotated[str, typer.Argument(metavar="ARCHITECTURE", help="An architecture of the settings.")],
    overrides: Overrides = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Trials in all, with those of earlier calls; 30 if --minutes is not given either."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Minutes of this call, with the comparison at its end.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=RANGE",
            help="Search this setting, in log:LOW:HIGH, uniform:LOW:HIGH or choice:A,B,C; by default those that "
            "conf/search/ names for the optimizer.",
        ),
    ] = None,
    sampler: Annotated[
        Literal["tpe", "random"], typer.Option(help="What draws the next settings; tpe learns from earlier trials.")
    ] = "tpe",
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time, each in a process of its own.")] = 1,
    on_cluster: Annotated[
        bool, typer.Option("--ray", help="Run the trials on the Ray cluster of trainer=ray, as many at a time as fit.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Write better settings into conf/.")] = False,
    as_json: AsJson = False,
    is_worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Search for better settings of an architecture.

    This trains it with other settings, compares the best with the present ones on three new seeds, and says so if they
    are not better. Test images are not read. An interrupted search resumes when it is called again.
    """
    from pipeline.tune import TuneOptions, tune

    options = TuneOptions(trials, minutes, param or (), sampler, jobs, apply, as_json, on_cluster, is_worker)
    tune(Path.cwd(), architecture, overrides or (), options)


if __name__ == "__main__":
    main()
