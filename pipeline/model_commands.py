"""The commands of `convoy` that use or move registered models.

As in `pipeline.cli`, each command imports what it runs only when it is called.
"""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import caller_folder, resolve_model, resolve_typed

app = typer.Typer(rich_markup_mode=None)
Model = Annotated[
    str | None, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION or a folder; by default the champion.")
]


@app.command(epilog="Example: convoy predict photos/ 'more/*.png' --json")
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="A file, a folder or a pattern: '*.png'.")],
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a table in CSV.")] = False,
    top_k: Annotated[int | None, typer.Option(min=1, help="Print this many of the most probable classes.")] = None,
) -> None:
    """Print the label and probability of each IMAGE."""
    from pipeline.predict import open_model, print_predictions

    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv exclude each other")
    loaded = open_model(Path.cwd(), resolve_model(model))
    with contextlib.chdir(caller_folder()):
        print_predictions(loaded, images, form="json" if as_json else "csv" if as_csv else "table", top_k=top_k)


@app.command(epilog="Example: convoy serve --port 8000")
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at. Another than this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    check_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks at the alias for a new version.")
    ] = 10.0,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 64,
    max_images: Annotated[int, typer.Option(min=1, help="Most images of a request.")] = 1000,
    log: Annotated[Path | None, typer.Option(help="Folder to log predictions to, as Parquet files.")] = None,
    log_days: Annotated[int, typer.Option(min=1, help="Days after which logged predictions are removed.")] = 30,
    log_images: Annotated[bool, typer.Option("--log-images", help="Log the image files as well.")] = False,
) -> None:
    """Serve a model over HTTP, with a page to try it.

    When the alias moves to another version, that one is loaded and takes over without a pause. An API key is read from
    the environment variable CONVOY_API_KEY.
    """
    from convoy.serving.service import Limits
    from pipeline.serve import serve

    serve(
        Path.cwd(),
        resolve_model(model),
        host=host,
        port=port,
        check_seconds=check_seconds,
        log_folder=resolve_typed(log) if log else None,
        log_days=log_days,
        log_images=log_images,
        limits=Limits(max_bytes=max_megabytes << 20, max_images=max_images),
    )


@app.command(epilog="Example: convoy package downloads/server")
def package(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to create.")],
    model: Model = None,
) -> None:
    """Write a folder with a model and its server.

    It holds a requirements file without PyTorch, DVC and MLflow, and a Dockerfile.
    """
    from pipeline.package import write_package

    write_package(Path.cwd(), resolve_typed(folder), resolve_model(model))


@app.command(epilog="Example: convoy verify models:/digits@champion artifacts/evaluate/resnet")
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    evaluated: Annotated[Path, typer.Argument(metavar="EVALUATED", help="Folder of its evaluation.")],
    prepared: Annotated[
        Path | None,
        typer.Argument(metavar="[PREPARED]", help="Folder of the prepared images.", show_default="those of its size"),
    ] = None,
) -> None:
    """Verify that a model predicts as evaluated.

    This checks the files of MODEL, loads it in a new process and compares its predictions with the recorded ones.
    """
    from pipeline.verify import verify_model

    images = resolve_typed(prepared) if prepared else None
    print(verify_model(Path.cwd(), model, resolve_typed(evaluated), images))


@app.command(epilog='Example: convoy rollback --reason "it confuses wolves and dogs"')
def rollback(reason: Annotated[str, typer.Option(help="Why; recorded with the model.")]) -> None:
    """Make the previous champion the champion again."""
    from pipeline.rollback import roll_back

    roll_back(Path.cwd(), reason)


@app.command(epilog="Example: convoy sync")
def sync() -> None:
    """Sync the runs of the current results to MLflow.

    Each is then there completely and exactly once, whatever was missing before.
    """
    from pipeline.sync_mlflow import sync_results

    sync_results(Path.cwd())


@app.command(epilog="Example: MLFLOW_TRACKING_URI=http://server:5000 convoy migrate")
def migrate() -> None:
    """Copy the runs and models of this data set to an MLflow server.

    These are the runs and the registered model, with its versions and its champion, in mlflow.db. MLFLOW_TRACKING_URI
    names the server.
    """
    from pipeline.migrate_mlflow import migrate_to_server

    migrate_to_server(Path.cwd())
