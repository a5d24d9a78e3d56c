"""The train stage in a separate process, for tests that stop it at any moment."""

import signal
import sys
from pathlib import Path

import torch

import convoy.models.lenet
import convoy.models.resnet
from pipeline.stage import Stage
from pipeline.train import train

IMPORTED = (convoy.models.lenet, convoy.models.resnet)


def run_train_stage(root: Path, architecture: str) -> None:
    """Run the train stage of the project in `root`, as its command does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    Stage(root, "train", architecture).run(train)
