"""evaluate: one trained architecture on the test images, which no training saw."""

import json

import pandas as pd
import torch

from convoy import models
from convoy.classifier import predict
from convoy.datamodule import Images
from convoy.evaluation import Evaluate, per_class, predictions, scores
from convoy.task import Task
from pipeline.stage import Stage, main


def evaluate(stage: Stage) -> None:
    """Judge one trained architecture."""
    params = stage.typed(Evaluate, "evaluate")
    trained, prepared = stage.input(f"train/{stage.item}"), stage.input("preprocess")
    record = json.loads((trained / "record.json").read_text())
    task = Task(**record["task"])
    classifier = models.restore(record["architecture"], record["settings"], task, trained / "weights.safetensors")

    torch.set_num_threads(record["train"]["threads"])  # part of what makes the same bits
    if record["train"]["accelerator"] in ("auto", "gpu") and torch.cuda.is_available():
        classifier.cuda()

    test = Images.load(prepared, "test")
    images = pd.read_parquet(prepared / "images.parquet").query("split == 'test'")
    probabilities = predict(classifier, test.pixels, params.batch_size)

    table = predictions(task.classes, images, probabilities)
    table.to_parquet(stage.scratch / "predictions.parquet", index=False)
    table[["actual", "predicted"]].to_csv(stage.scratch / "confusion.csv", index=False)
    per_class(task.classes, test.labels, probabilities).to_csv(stage.scratch / "per_class.csv", index=False)
    figures = scores(test.labels, probabilities)
    (stage.scratch / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{stage.item}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    main("evaluate", evaluate, "architecture")
