"""The pictures of the lesson."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.signal
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from convoy import models
from convoy.core.artifact_names import DATASET_INFO, LEADERBOARD, RECORD, WEIGHTS
from convoy.core.yaml_parser import parse_yaml
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.reporting import inspection
from convoy.reporting.report import architecture_colour
from convoy.training.record import TrainingRecord

OUTPUT = Path(__file__).parent
ROOT = Path(__file__).parents[2]
ARTIFACTS = Path("artifacts")
BLUE, ORANGE, INK, FAINT = "#0072b2", "#e69f00", "#24292f", "#6e7781"
WIDTH = 8.6  # inches of 100 pixels

# The sizes in conf/model/ of a new clone, which the text of the lesson is about; yours may be others.
NETWORKS = parse_yaml("""
lenet: {c1: 6, c3: 16, c5: 120, f6: 84}
alexnet: {widths: [12, 32, 48, 48, 32], stem_kernel: 5, stem_stride: 1, stem_padding: 2, response_norm: true, pool: 3,
  hidden: 256, dropout: 0.5}
vgg: {stacks: [[1, 16], [1, 32], [2, 64], [2, 128]], batch_norm: true, pool: 2, hidden: 256, dropout: 0.5}
googlenet: {width: 0.25, third_kernel: 5, stem_kernel: 3, stem_stride: 1, stem_pools: true, dropout: 0.2,
  auxiliary_dropout: 0.5}
resnet: {block: basic, blocks: [2, 2, 2, 2], widths: [16, 32, 64, 128], stem_kernel: 3, stem_stride: 1, stem_pool: true}
""")


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=100, layout="constrained", facecolor="white")


def _save(figure: Figure, name: str) -> None:
    figure.savefig(OUTPUT / name, metadata={"Software": None})


def _show(axes: Axes, values: np.ndarray, title: str, colours: str = "gray", **limits: float) -> None:
    axes.imshow(values, cmap=colours, interpolation="nearest", **limits)
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_axis_off()


def digit() -> np.ndarray:
    """A three of the bundled sample, (32, 32) in [0, 1]."""
    with zipfile.ZipFile(ROOT / "samples/digits.zip") as archive:
        content = archive.read("digits/3/0003.png")
    image = Image.open(io.BytesIO(content)).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(image) / 255


def modes(signal: np.ndarray, kernel: np.ndarray, name: str) -> None:
    """Draw the three modes under the signal, each value where the middle of the kernel is."""
    figure = _figure(4.2)
    rows = figure.subplots(4, 1, sharex=True, sharey=True)
    middle = (len(kernel) - 1) // 2
    starts = {"full": -middle, "same": 0, "valid": len(kernel) - 1 - middle}
    rows[0].bar(range(len(signal)), signal, color=FAINT)
    rows[0].set_ylabel("signal")
    for axes, (mode, start) in zip(rows[1:], starts.items(), strict=True):
        result = np.convolve(signal, kernel, mode)
        positions = np.arange(len(result)) + start
        inside = (positions >= middle) & (positions < len(signal) - middle)
        axes.bar(positions, result, color=[BLUE if each else ORANGE for each in inside])
        axes.set_ylabel(mode)
    rows[3].set_xlabel("position; orange: the kernel sticks out over the border, where there are zeros")
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, name)


def filtered(image: np.ndarray, kernels: Mapping[str, np.ndarray], name: str) -> None:
    """Draw an image beside the results of kernels, with each kernel below its result."""
    figure = _figure(3.9)
    grid = figure.subplots(2, len(kernels) + 1, height_ratios=(3, 1.6))
    _show(grid[0, 0], image, "the image")
    grid[1, 0].set_axis_off()
    for column, (title, kernel) in enumerate(kernels.items(), 1):
        _show(grid[0, column], scipy.signal.convolve2d(image, kernel, "valid"), title)
        most = np.abs(kernel).max()
        _show(grid[1, column], kernel, "", "PuOr", vmin=-most, vmax=most)
        for (row, at), value in np.ndenumerate(kernel):
            text = f"{value * 256:.0f}" if title == "blur" else f"{value:.0f}"
            colour = "white" if abs(value) > 0.6 * most else INK
            grid[1, column].text(at, row, text, ha="center", va="center", fontsize=7, color=colour)
        grid[1, column].set_title("kernel, in 1/256" if title == "blur" else "kernel", fontsize=8, color=FAINT)
    _save(figure, name)


def layer_tables() -> dict[str, pd.DataFrame]:
    """The tables of layers of all architectures, for grey images of 32x32 pixels."""
    recipe = parse_yaml((ROOT / "conf/recipe/default.yaml").read_text())
    info = DatasetInfo("digits", [str(number) for number in range(10)], 32, 1, [0.5], [0.5])
    tables = {}
    for name, sizes in NETWORKS.items():
        settings = {**sizes, "module": name, "size": info.size, "init": "scratch", "recipe": recipe}
        tables[name] = inspection.list_layers(models.build(name, settings, info).eval())
    return tables


def architectures(tables: Mapping[str, pd.DataFrame], name: str) -> None:
    """Draw the size of the maps, the parameters and the work of each layer that learns."""
    figure = _figure(1.25 * len(tables) + 0.6)
    grid = figure.subplots(len(tables), 3, squeeze=False)
    titles = ("height of the maps, pixels", "parameters", "MACs")
    for row, (network, table) in zip(grid, tables.items(), strict=True):
        learned = table[table["type"].isin(["Conv2d", "Linear"])]
        is_dense = (learned["type"] == "Linear").to_numpy()
        heights = [int(shape.split("x")[1]) if "x" in shape else 1 for shape in learned["output"]]
        for axes, values, title in zip(row, (heights, learned["parameters"], learned["macs"]), titles, strict=True):
            colours = np.where(is_dense, FAINT, architecture_colour(network))
            axes.bar(range(len(learned)), values, color=colours)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=7, colors=FAINT)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
            axes.yaxis.get_offset_text().set_fontsize(7)
            if network == next(iter(tables)):
                axes.set_title(title, fontsize=9, color=INK)
        row[0].set_ylabel(network, fontsize=10, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("layer; grey: fully connected", fontsize=8, color=FAINT)
    _save(figure, name)


def trained_network() -> tuple[Classifier, TrainingRecord, np.ndarray]:
    """The best network of the last run, its record, and a test image (H, W, C) that it classifies correctly."""
    leaderboard = ARTIFACTS / "register" / LEADERBOARD
    trained = ARTIFACTS / "train"
    best = pd.read_csv(leaderboard)["model"][0] if leaderboard.exists() else sorted(trained.iterdir())[0].name
    record = TrainingRecord.load(trained / best / RECORD)
    info = record.dataset_info
    network = models.restore(record.architecture, record.settings, info, trained / best / WEIGHTS)
    prepared = DatasetInfo.load(ARTIFACTS / "preprocess" / DATASET_INFO)
    # A network may have a size of its own.
    test = Images.load(ARTIFACTS / ("preprocess" if info.size == prepared.size else f"resize/{info.size}"), "test")
    probabilities = models.base.predict(network, np.asarray(test.pixels[:200]), 200)
    correct = np.flatnonzero(probabilities.argmax(axis=1) == test.labels[:200])
    row = correct[0] if len(correct) else 0
    return network, record, np.asarray(test.pixels[row])


def filters(network: Classifier, blur: np.ndarray, name: str) -> None:
    """Draw a blur and learned filters of the first layer, each with its spectrum."""
    learned = inspection.first_filters(network)[:, 0]
    # Those with the largest weights do most.
    chosen = np.argsort(-np.abs(learned).sum(axis=(1, 2)), kind="stable")[:5]
    shown = {"hand-made blur": blur, **{f"learned, number {number}": learned[number] for number in chosen}}
    figure = _figure(3.4)
    grid = figure.subplots(2, len(shown))
    for column, (title, kernel) in enumerate(shown.items()):
        most = np.abs(kernel).max()
        _show(grid[0, column], kernel, title, "PuOr", vmin=-most, vmax=most)
        spectrum = np.abs(np.fft.fftshift(np.fft.fft2(kernel, (32, 32))))
        _show(grid[1, column], spectrum, "spectrum", "viridis")
    figure.supxlabel(
        "weights: orange is negative, purple positive; spectrum: the middle is what changes slowly",
        fontsize=8,
        color=FAINT,
    )
    _save(figure, name)


def feature_maps(network: Classifier, image: np.ndarray, name: str) -> None:
    """Draw the feature maps of an image after each block."""
    blocks = inspection.compute_feature_maps(network, image)
    figure = _figure(0.95 * (len(blocks) + 1))
    grid = figure.subplots(len(blocks) + 1, 9, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    _show(grid[0, 1], image.squeeze(), "")
    grid[0, 0].text(1, 0.5, f"input\n{'x'.join(map(str, image.shape))}", ha="right", va="center", fontsize=8)
    for row, block in zip(grid[1:], blocks, strict=True):
        shape = "x".join(str(length) for length in block.values.shape)
        row[0].text(1, 0.5, f"{block.layer}\n{shape}", ha="right", va="center", fontsize=8, color=INK)
        most = np.argsort(-block.values.std(axis=(1, 2)), kind="stable")[:8]
        for axes, number in zip(row[1:], np.sort(most), strict=False):
            # Maps of a single pixel have no range of their own.
            values = block.values if block.values[0].size == 1 else block.values[number]
            _show(axes, block.values[number], "", "viridis", vmin=values.min(), vmax=values.max())
    _save(figure, name)
