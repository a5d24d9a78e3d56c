"""preprocess: images of one size, split for training, validation and test, and described."""

from convoy.config import Whole
from convoy.datasets import Packed
from convoy.preprocessing import Preprocess, prepare
from pipeline.stage import Stage, main


def preprocess(stage: Stage) -> None:
    """Resize, split and describe the images."""
    params = stage.typed(Preprocess, "preprocess")
    seed = stage.typed(Whole, "seed")
    prepare(Packed.load(stage.input("fetch")), params, seed, stage.scratch)


if __name__ == "__main__":
    main("preprocess", preprocess)
