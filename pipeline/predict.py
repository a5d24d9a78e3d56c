"""Prediction of the label and probability of images with a registered model, by ONNX runtime."""

import asyncio
import collections
import csv
import glob
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from convoy.core.csv_file import escape_formula
from convoy.core.errors import ConvoyError
from convoy.data.image_io import InvalidImageError
from convoy.serving import decode_worker, onnx_model
from convoy.serving.decode_pool import DecodePool, count_processors
from convoy.serving.loading import LoadedModel, load_model
from convoy.serving.onnx_model import ServedModel
from pipeline.model_choice import choose_model

BATCH_SIZE = 64  # images of a call of the model
# Starting a process to decode images costs as much as decoding a few hundred small ones.
MIN_PARALLEL_IMAGES = 200

# The keys are image and either label, probability and probabilities, or error.
Prediction = dict[str, str | float | dict[str, float]]


def open_model(root: Path, model: str | None) -> LoadedModel:
    """Load a model.

    Args:
        root: The project folder.
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a folder; None for the champion.

    Raises:
        ConvoyError: If there is no such model.
    """
    uri, project = choose_model(root, model)
    return load_model(uri, project, threads=count_processors())


def print_predictions(
    loaded: LoadedModel, paths: Sequence[str], *, form: str = "table", top_k: int | None = None
) -> None:
    """Print the label and probability of each image.

    Args:
        loaded: The model.
        paths: Files, folders (recursively) or patterns such as '*.png'.
        form: "table", "json" for a JSON object per line, or "csv".
        top_k: How many of the most probable classes to print; None for the label alone.

    Raises:
        ConvoyError: If an image could not be predicted, after the predictions of the others are printed.
    """
    predictions = show_progress(predict(loaded.model, paths, top_k))
    title = f"{loaded.name} {loaded.version}, {loaded.model.architecture}"
    printers: dict[str, Callable[[], int]] = {
        "table": lambda: print_table(predictions, title, top_k or 1),
        "json": lambda: print_lines(predictions),
        "csv": lambda: print_csv(predictions, top_k or 1),
    }
    if failed := printers[form]():
        raise ConvoyError(f"{failed} image{'s' if failed > 1 else ''} could not be predicted")


def predict(model: ServedModel, paths: Sequence[str], top_k: int | None = None) -> Iterator[Prediction]:
    """Yield a prediction or an error for each image.

    The order is that of the paths; images of a folder or a pattern are sorted by name.

    Args:
        model: The model.
        paths: Files, folders or patterns.
        top_k: The number of classes in `probabilities`; None leaves it out.
    """
    images = find_images(paths)
    first = list(islice(images, MIN_PARALLEL_IMAGES))
    rest = next(images, None)
    decoded = decode_here(model, first) if rest is None else decode_in_parallel(model, [*first, rest, *images])
    while batch := list(islice(decoded, BATCH_SIZE)):
        yield from _predict_batch(model, batch, top_k)


def _predict_batch(
    model: ServedModel, batch: Sequence[tuple[Path, np.ndarray | InvalidImageError]], top_k: int | None
) -> Iterator[Prediction]:
    pixels = [image for _, image in batch if isinstance(image, np.ndarray)]
    ranked = iter(onnx_model.rank(model, model.probabilities(np.stack(pixels)), top_k or 1) if pixels else [])
    for path, image in batch:
        if isinstance(image, InvalidImageError):
            yield {"image": str(path), "error": str(image)}
        else:
            probabilities = next(ranked)
            label, probability = next(iter(probabilities.items()))
            found: Prediction = {"image": str(path), "label": label, "probability": probability}
            yield found | {"probabilities": probabilities} if top_k else found


def decode_here(model: ServedModel, paths: Iterable[Path]) -> Iterator[tuple[Path, np.ndarray | InvalidImageError]]:
    """Decode images in this process."""
    for path in paths:
        try:
            yield path, decode_worker.preprocess(decode_worker.read_file(path), *model.spec)
        except InvalidImageError as fault:
            yield path, fault


def decode_in_parallel(
    model: ServedModel, paths: Iterable[Path]
) -> Iterator[tuple[Path, np.ndarray | InvalidImageError]]:
    """Decode images in as many processes as there are processors, in their order."""
    with asyncio.Runner() as runner:
        batches = _decode_batches(model, iter(paths))
        try:
            while batch := runner.run(anext(batches, None)):  # type: ignore[arg-type]
                yield from batch
        finally:
            runner.run(batches.aclose())  # type: ignore[attr-defined]


async def _decode_batches(
    model: ServedModel, paths: Iterator[Path]
) -> AsyncIterator[list[tuple[Path, np.ndarray | InvalidImageError]]]:
    """Decode images, while the batches before them are predicted."""
    pending: collections.deque[tuple[list[Path], asyncio.Task]] = collections.deque()
    async with DecodePool(count_processors()) as pool:
        while True:
            while len(pending) < 2 * pool.size and (batch := list(islice(paths, BATCH_SIZE))):
                task = asyncio.create_task(pool.decode(model.spec, [str(path) for path in batch]))
                pending.append((batch, task))
            if not pending:
                return
            batch, task = pending.popleft()
            yield list(zip(batch, await task, strict=True))


def find_images(paths: Sequence[str]) -> Iterator[Path]:
    """Yield the files that the paths name; a path that matches nothing is yielded unchanged."""
    for name in paths:
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute one)
        for path in map(Path, matches or [name]):
            yield from _find_in_folder(path) if path.is_dir() else [path]


def _find_in_folder(folder: Path) -> list[Path]:
    """Return the images below a folder, or the folder itself if there are none."""
    # Imported here, because the time of predicting one image is that of imports.
    from convoy.data.sources.file_listing import is_image, is_junk

    below = sorted(file for file in folder.rglob("*") if not file.is_dir())
    files = [file for file in below if not is_junk(str(file.relative_to(folder)))]
    inside = [file for file in files if is_image(file.name) or not file.suffix]
    if other := len(files) - len(inside):
        name = escape_unprintable(str(folder))
        print(f"{name}: {other} files without an image suffix are ignored", file=sys.stderr)
    return inside or [folder]


def show_progress(predictions: Iterator[Prediction]) -> Iterator[Prediction]:
    """Count the predictions on the terminal, unless they are printed there one by one."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        return predictions
    from tqdm import tqdm

    return iter(tqdm(predictions, unit=" images", dynamic_ncols=True))


def print_lines(predictions: Iterator[Prediction]) -> int:
    """Print one JSON object per line, and return the number of images without a prediction."""
    failed = 0
    for prediction in predictions:
        failed += "error" in prediction
        print(json.dumps(prediction))
    sys.stdout.flush()
    return failed


def print_csv(predictions: Iterator[Prediction], top_k: int) -> int:
    """Print a table in CSV, and return the number of images without a prediction."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", *_columns(top_k), "error"])
    failed = 0
    for prediction in predictions:
        failed += "error" in prediction
        values = [str(value) for value in _values(prediction)]
        empty = [""] * (2 * top_k - len(values))
        row = [prediction["image"], *values, *empty, prediction.get("error", "")]
        writer.writerow([escape_formula(value) for value in row])
    return failed


def print_table(predictions: Iterator[Prediction], title: str, top_k: int) -> int:
    """Print predictions as a table and errors to standard error, and return the number of errors."""
    rows, failed = [], 0
    for prediction in predictions:
        image = escape_unprintable(str(prediction["image"]))
        if "error" in prediction:
            failed += 1
            print(f"{image} {prediction['error']}", file=sys.stderr)
        else:
            cells = [f"{each:.4f}" if isinstance(each, float) else escape_unprintable(each)
                     for each in _values(prediction)]  # fmt: skip
            rows.append([image, *cells])
    if rows:
        _print_rows(rows, ["image", *_columns(max(len(row) // 2 for row in rows))], title)
    return failed


def _print_rows(rows: Sequence[Sequence[str]], columns: Sequence[str], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        justify = "right" if column.startswith("probability") else "left"
        shown.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        shown.add_row(*map(escape, row))
    console = Console()
    # A log file has no width of its own.
    Console(width=max(console.width, 100)).print(shown)


def _columns(top_k: int) -> list[str]:
    """Return the names of the columns of the most probable classes."""
    more = [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "probability")]
    return ["label", "probability", *more]


def _values(prediction: Prediction) -> list[str | float]:
    """Return the labels and probabilities of the most probable classes, nothing for an error."""
    if "error" in prediction:
        return []
    names = prediction.get("probabilities")
    if not isinstance(names, dict):
        names = {str(prediction["label"]): prediction["probability"]}  # type: ignore[dict-item]
    return [value for pair in names.items() for value in pair]


def escape_unprintable(name: str) -> str:
    """Escape the unprintable characters of a name, so that none of them reaches the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
