"""evaluate: one trained architecture on the test images, which no training saw."""

import json

import numpy as np
import pandas as pd
import torch

from convoy import models
from convoy.batches import Images
from convoy.classifier import predict
from convoy.evaluation import Evaluate, per_class, predictions, scores
from convoy.task import Task
from pipeline.stage import Stage, main


def evaluate(stage: Stage) -> None:
    """Judge one trained architecture."""
    params = stage.typed(Evaluate, "evaluate")
    trained, prepared = stage.input(f"train/{stage.item}"), stage.input("preprocess")
    record = json.loads((trained / "record.json").read_text())
    task = Task(**record["task"])
    test = Images.load(prepared, "test")
    images = pd.read_parquet(prepared / "images.parquet").query("split == 'test'")
    if record["failure"]:  # there is nothing to judge, and that is its result
        test, images = Images(test.pixels[:0], test.labels[:0]), images[:0]
        probabilities, figures = np.empty((0, len(task.classes))), {}
    else:
        classifier = models.restore(record["architecture"], record["settings"], task, trained / "weights.safetensors")
        torch.set_num_threads(record["trainer"]["threads"])  # part of what makes the same bits
        if record["trainer"]["accelerator"] == "gpu" and torch.cuda.is_available():
            classifier.cuda()
        probabilities = predict(classifier, test.pixels, params.batch_size)
        figures = scores(test.labels, probabilities)

    table = predictions(task.classes, images, probabilities)
    table.to_parquet(stage.scratch / "predictions.parquet", index=False)
    table[["actual", "predicted"]].to_csv(stage.scratch / "confusion.csv", index=False)
    per_class(task.classes, test.labels, probabilities).to_csv(stage.scratch / "per_class.csv", index=False)
    (stage.scratch / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    said = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{stage.item}: {said or 'its training failed'}")


if __name__ == "__main__":
    main("evaluate", evaluate, "architecture")
