"""The section of a report about one architecture."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from convoy.evaluation.metrics import PROBABILITY_PREFIX
from convoy.models.base import Classifier
from convoy.reporting import inspection, model_charts
from convoy.reporting.evaluated_images import Images, list_label_errors
from convoy.reporting.figures import (
    Figure,
    Tile,
    draw_safely,
    encode_image,
    encode_strip,
    make_chart,
    overlay_evidence,
    scale_to_unit,
)
from convoy.training.record import TrainingRecord

MAX_SAMPLES, MAX_MISTAKES, MAX_UNCERTAIN, MAX_LABEL_ERRORS, MAX_EXPLAINED = 12, 24, 12, 24, 6  # images
MAX_FILTERS, MAX_MAPS, MAX_BLOCKS, MAX_CONFUSIONS = 60, 12, 12, 15
FILTER_SIDE = 80  # pixels


@dataclasses.dataclass(frozen=True)
class ModelResults:
    """Everything that the section about one architecture shows."""

    name: str
    record: TrainingRecord
    history: pd.DataFrame
    metrics: dict[str, float]
    intervals: pd.DataFrame  # metric, value, low, high
    per_class: pd.DataFrame
    test: Images
    val: Images
    load: Callable[[], Classifier]  # loads the network, in evaluation mode on the CPU

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes."""
        return self.record.dataset_info.classes

    @property
    def held_out(self) -> dict[str, Images]:
        """Return the images that the network was not trained on, by their split."""
        return {"val": self.val, "test": self.test}

    def name_predictions(self) -> pd.DataFrame:
        """Return a table of test images with the columns actual and predicted, both names of classes."""
        names = np.array(self.classes, dtype=object)
        return pd.DataFrame({"actual": names[self.test.labels], "predicted": names[self.test.predicted]})


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report with its own heading."""

    anchor: str
    title: str
    figures: list[Figure]
    intro: str = ""
    short_title: str = ""  # in the list of sections


def describe_model(results: ModelResults) -> Section:
    """Draw all figures of one architecture."""
    figures = [draw_safely(title, lambda draw=draw: draw(results)) for title, draw in FIGURES.items()]  # type: ignore[misc]
    return Section(results.name, results.name, figures, _summarize(results))


def _summarize(results: ModelResults) -> str:
    record = results.record
    best = f" Epoch {record.best.epoch} of {record.train.max_epochs} was kept." if record.best else ""
    wrong, count = len(results.test.mistakes), len(results.test.labels)
    return (
        f"{record.parameters:,} parameters, {record.macs / 1e6:,.1f} million multiply-accumulate operations for one "
        f"image.{best} {wrong:,} of {count:,} test images are classified wrongly."
    )


def draw_learning(results: ModelResults) -> Figure:
    """Draw the learning curves."""
    history, best = results.history, results.record.best
    first, last = history["val_accuracy"].iloc[0], history["val_accuracy"].max()
    kept = f", and epoch {best.epoch} is kept" if best else ""
    return make_chart(
        "Learning curves",
        model_charts.draw_learning_curves(history, best.epoch if best else None),
        f"Accuracy, loss and learning rate over {len(history)} epochs. Accuracy in validation goes from {first:.3f} "
        f"to {last:.3f} at best{kept}.",
        "Augmentation and dropout make training images harder, so that training may look worse than validation.",
    )


def draw_confusion(results: ModelResults) -> Figure:
    """Draw the confusion matrix."""
    predictions = results.name_predictions()
    shown = model_charts.select_classes(predictions, results.classes)
    confusions = model_charts.count_confusions(predictions)
    largest = confusions.head(1).to_dict("records")
    text = "".join(f" Most frequent: {row['actual']} taken for {row['predicted']}, {row['images']}." for row in largest)
    note = "Correct predictions are blue, mistakes orange."
    if len(shown) < len(results.classes):
        note += f" Of {len(results.classes)} classes, the {len(shown)} with the most mistakes are shown."
    return make_chart(
        "Confusion matrix",
        model_charts.draw_confusion_matrix(predictions, shown),
        f"Test images by actual and predicted class; {confusions['images'].sum()} mistakes.{text}",
        note,
    )


def list_confusions(results: ModelResults) -> Figure:
    """List the most frequent mistakes."""
    table = model_charts.count_confusions(results.name_predictions())
    shown = table.head(MAX_CONFUSIONS).rename(columns={"fraction": "of the class"})
    shown["of the class"] = [f"{fraction:.1%}" for fraction in shown["of the class"]]
    more = f"{len(table) - len(shown)} more pairs of classes are confused." if len(table) > len(shown) else ""
    return Figure("Largest confusions", note=more if len(table) else "There are no mistakes.", table=shown)


def draw_class_metrics(results: ModelResults) -> Figure:
    """Draw precision, recall and F1 of each class."""
    tested = results.per_class[results.per_class["images"] > 0]
    worst = tested.sort_values(["f1", "class"]).iloc[0]
    count = len(tested)
    shown = min(count, model_charts.MAX_CLASSES)
    return make_chart(
        "Precision, recall and F1 by class",
        model_charts.draw_class_metrics(results.per_class),
        f"Precision, recall and F1 of {shown} classes with their intervals. The lowest F1 is {worst['f1']:.3f}, of "
        f"{worst['class']}.",
        "" if shown == count else f"The {shown} classes with the lowest F1; per_class.csv has all {count}.",
    )


def draw_reliability(results: ModelResults) -> Figure:
    """Draw the reliability diagram."""
    error = results.metrics["calibration_error"]
    return make_chart(
        "Reliability",
        model_charts.draw_reliability(results.test.confidence, results.test.is_correct),
        f"Accuracy of test images by the confidence of their prediction. The calibration error is {error:.4f}.",
        f"Calibration error {error:.4f}. Below the diagonal, predictions are more confident than they are correct.",
    )


def draw_coverage(results: ModelResults) -> Figure:
    """Draw accuracy against coverage."""
    coverage, accuracy = model_charts.accuracy_by_coverage(results.test.confidence, results.test.is_correct)
    at = accuracy[np.searchsorted(coverage, 0.9)]
    return make_chart(
        "Accuracy against coverage",
        model_charts.draw_coverage(results.test.confidence, results.test.is_correct),
        f"Accuracy on the most certain images against their fraction: {at:.4f} on the most certain 90%, "
        f"{accuracy[-1]:.4f} on all.",
        f"If the least certain 10% go to a person, {at:.4f} of the others are correct.",
    )


def show_mistakes(results: ModelResults) -> Figure:
    """Show the most confident mistakes."""
    mistakes = results.test.mistakes
    chosen = mistakes[:MAX_MISTAKES]
    note = f"{len(chosen)} of {len(mistakes)} mistakes." if len(mistakes) else "There are no mistakes."
    return Figure("Most confident mistakes", note=note, tiles=_make_tiles(results, chosen), is_wide=True)


def show_samples(results: ModelResults) -> Figure:
    """Show test images from the first to the last, with their predictions."""
    count = len(results.test.labels)
    chosen = np.linspace(0, count - 1, min(MAX_SAMPLES, count)).round().astype(int)
    return Figure("Sample predictions", tiles=_make_tiles(results, chosen), is_wide=True)


def show_uncertain(results: ModelResults) -> Figure:
    """Show the least certain images."""
    chosen = np.argsort(results.test.confidence, kind="stable")[:MAX_UNCERTAIN]
    return Figure("Least certain images", tiles=_make_tiles(results, chosen), is_wide=True)


def show_label_errors(classes: Sequence[str], splits: Mapping[str, Images], method: str) -> Figure:
    """Show the images whose label is probably wrong.

    Args:
        classes: Names of the classes.
        splits: Images of the validation and test splits, by the name of the split.
        method: How they are found, for the note.
    """
    table = list_label_errors(classes, splits)
    tiles = [
        Tile(
            encode_image(splits[row["split"]].pixels[row["row"]]),
            (f"label {row['label']}", f"rather {row['suggested']}", f"margin {row['margin']:.2f}, {row['split']}"),
            f"{row['split']} image labelled {row['label']}, probably {row['suggested']}",
            row["path"],
        )
        for row in table.head(MAX_LABEL_ERRORS).to_dict("records")
    ]
    candidates = f"{len(tiles)} of {len(table)} candidates" if len(table) else "No candidates"
    note = f"{candidates} among validation and test images, by {method}. Look at them before you trust a label."
    return Figure("Probable label errors", note=note, tiles=tiles, is_wide=True)


def show_filters(results: ModelResults) -> Figure:
    """Show the filters of the first convolution."""
    filters = inspection.first_filters(results.load())
    if filters is None:
        return Figure("First filters", note="The network has no convolution.")
    count, channels, height, width = filters.shape
    shown = filters[:MAX_FILTERS]
    if channels == 3:
        maps = scale_to_unit(shown).transpose(0, 2, 3, 1)
        note = "Each filter in its colours."
    else:
        # Orange is negative, purple positive, and zero is white.
        maps = shown[:, 0] / np.maximum(np.abs(shown).max(axis=(1, 2, 3)), 1e-12)[:, None, None] / 2 + 0.5
        note = "Orange weights are negative, purple ones positive."
    source = encode_strip(maps, FILTER_SIDE // height * height, 12, "PuOr")
    alt = f"{len(shown)} filters of {height}x{width} pixels that the network has learned"
    more = f"{len(shown)} of {count}" if len(shown) < count else f"{count}"
    tile = Tile(source, (f"{more} filters of {channels}x{height}x{width}",), alt, is_wide=True)
    return Figure("Filters of the first convolution", note=note, tiles=[tile], is_wide=True)


def show_feature_maps(results: ModelResults) -> Figure:
    """Show one image on its way through the network."""
    correct = np.flatnonzero(results.test.is_correct)
    candidates = correct if len(correct) else np.arange(len(results.test.labels))
    row = int(candidates[np.argmax(results.test.confidence[candidates])])
    pixels = results.test.pixels[row]
    blocks = inspection.compute_feature_maps(results.load(), np.asarray(pixels))
    if len(blocks) > MAX_BLOCKS:
        blocks = [blocks[at] for at in np.linspace(0, len(blocks) - 1, MAX_BLOCKS).round().astype(int)]
    shape = "x".join(str(length) for length in np.moveaxis(pixels, 2, 0).shape)
    label = results.classes[results.test.labels[row]]
    tiles = [Tile(encode_image(pixels), ("input", shape), f"Image of {label}", results.test.paths[row])]
    for block in blocks:
        # The maps with the most structure say the most.
        order = np.argsort(-block.values.std(axis=(1, 2)), kind="stable")[:MAX_MAPS]
        shape = "x".join(str(length) for length in block.values.shape)
        values = block.values[np.sort(order)]
        # Maps of a single pixel have no range of their own.
        maps = scale_to_unit(values) if values[0].size > 1 else scale_to_unit(values[None])[0]
        strip = encode_strip(maps, 64, MAX_MAPS, "viridis")
        alt = f"{len(order)} feature maps after {block.layer}, {shape}"
        tiles.append(Tile(strip, (f"{block.layer}: {block.kinds}", shape), alt, is_wide=True))
    note = (
        f"The feature maps of the test image that is classified as {label} with the greatest confidence, after each "
        f"block: up to {MAX_MAPS} maps with the most structure, each in its own range. Shapes are "
        "channels x height x width."
    )
    return Figure("Feature maps of one image", note=note, tiles=tiles, is_wide=True)


def show_evidence(results: ModelResults) -> Figure:
    """Show where the network sees evidence for its prediction, by Grad-CAM."""
    test = results.test
    wrong = test.mistakes[:MAX_EXPLAINED]
    correct = np.flatnonzero(test.is_correct)
    # Of each class one, as far as there is room.
    first = correct[np.unique(test.labels[correct], return_index=True)[1]]
    correct = first[np.linspace(0, len(first) - 1, min(MAX_EXPLAINED, len(first))).round().astype(int)]
    rows = np.concatenate([correct, wrong])
    evidence, layer = inspection.compute_grad_cam(results.load(), np.asarray(test.pixels[rows]), test.predicted[rows])
    tiles = []
    for row, found in zip(rows, evidence, strict=True):
        predicted, actual = results.classes[test.predicted[row]], results.classes[test.labels[row]]
        verdict = f"{predicted}, correct" if predicted == actual else f"{predicted}, actually {actual}"
        alt = f"Image of {actual}, and where the network sees {predicted}"
        tiles.append(Tile(overlay_evidence(test.pixels[row], found), (verdict,), alt, test.paths[row], is_pair=True))
    note = (
        f"Grad-CAM at {layer}: bright parts raise the logit of the predicted class. Correct predictions come first, "
        f"then the most confident mistakes. The layer has {evidence.shape[1]}x{evidence.shape[2]} pixels, so that it "
        "locates coarsely."
    )
    return Figure("Where the network looks", note=note, tiles=tiles, is_wide=True)


def list_layers(results: ModelResults) -> Figure:
    """List the layers with their shapes, parameters and MACs."""
    table = inspection.list_layers(results.load())
    total = {"layer": "total", "type": "", "output": "", **table[["parameters", "macs"]].sum().to_dict()}
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    note = "Shapes are channels x height x width. Normalisation and activations have no MACs here."
    return Figure("Layers", note=note, table=table.rename(columns={"macs": "MACs"}), is_wide=True, is_folded=True)


FIGURES: dict[str, Callable[[ModelResults], Figure]] = {
    "Learning curves": draw_learning,
    "Confusion matrix": draw_confusion,
    "Largest confusions": list_confusions,
    "Precision, recall and F1 by class": draw_class_metrics,
    "Reliability": draw_reliability,
    "Accuracy against coverage": draw_coverage,
    "Sample predictions": show_samples,
    "Most confident mistakes": show_mistakes,
    "Least certain images": show_uncertain,
    "Probable label errors": lambda results: show_label_errors(results.classes, results.held_out, "confident learning"),
    "Filters of the first convolution": show_filters,
    "Feature maps of one image": show_feature_maps,
    "Where the network looks": show_evidence,
    "Layers": list_layers,
}


def _make_tiles(results: ModelResults, rows: np.ndarray) -> list[Tile]:
    """Return the test images in some rows with the most probable classes of each."""
    images, tiles = results.test, []
    for row in rows:
        ranked = np.argsort(-images.probabilities[row], kind="stable")
        actual, first = images.labels[row], ranked[0]
        lines = [f"{results.classes[first]} {images.probabilities[row, first]:.1%}"]
        if actual == first:
            second = ranked[1]
            lines += [f"or {results.classes[second]} {images.probabilities[row, second]:.1%}", "correct"]
        else:
            lines.append(f"actually {results.classes[actual]} {images.probabilities[row, actual]:.1%}")
        alt = f"Image of {results.classes[actual]}, predicted as {results.classes[first]}"
        tiles.append(Tile(encode_image(images.pixels[row]), tuple(lines), alt, images.paths[row]))
    return tiles


def class_probabilities(predictions: pd.DataFrame, classes: list[str]) -> np.ndarray:
    """Return the probabilities (N, K) in a table of predictions."""
    return predictions[[f"{PROBABILITY_PREFIX}{name}" for name in classes]].to_numpy()
