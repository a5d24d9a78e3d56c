"""The model card of a registered model: what it is, how to use it, and what it is not for."""

from convoy.training.record import TrainingRecord

MAX_LISTED_CLASSES = 100

TEMPLATE = """\
# {name}

Classifies an image as one of {count} classes: {classes}.

It was trained by convoy on the data set `{data}` ({images:,} images, {train:,} of them for training). Each version is
one trained network; its page begins with the verdict on its promotion, and its run has the metrics with their
confidence intervals. The alias `champion` is the version in use.

## Load and call it

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/{name}@champion")
with open("photo.jpg", "rb") as file:
    print(model.predict([file.read()]))  # label, probability, and the probabilities of all classes
```

On the command line: `convoy predict photo.jpg`. Images may have any size: preprocessing is part of the model, which
reduces them to {size}x{size} pixels, {colours}.

## Intended use and limits

* It is meant for images like those of its data set. Every image is given one of these classes, an image of something
  else, too.
* Its probabilities were checked on validation images of the same data set. On other images it may be too confident.
* Metrics of classes with few test images are uncertain: see `per_class.csv` in the run.
"""


def describe_model(name: str, record: TrainingRecord) -> str:
    """Write the card of a registered model as Markdown.

    Args:
        name: Name of the registered model.
        record: Training record of its newest version.
    """
    info, data = record.dataset_info, record.data
    more = f" and {len(info.classes) - MAX_LISTED_CLASSES} more" if len(info.classes) > MAX_LISTED_CLASSES else ""
    return TEMPLATE.format(
        name=name,
        count=len(info.classes),
        classes=", ".join(f"`{label}`" for label in info.classes[:MAX_LISTED_CLASSES]) + more,
        data=f"{data.name}@{data.digest}",
        images=data.profile.get("images", 0),
        train=data.profile.get("train", 0),
        size=info.size,
        colours="grey" if info.channels == 1 else "in colour",
    )
