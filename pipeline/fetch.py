"""fetch: the labelled images of data/, or a set that torchvision knows, decoded, checked and packed."""

from convoy import datasets
from pipeline.stage import Stage, main


def fetch(stage: Stage) -> None:
    """Decode, check and pack the labelled images."""
    params = stage.typed(datasets.Dataset, "dataset")
    source = datasets.read(params, stage.root / "data", stage.home / "downloads")
    datasets.pack(source, params.name, stage.scratch)


if __name__ == "__main__":
    main("fetch", fetch)
