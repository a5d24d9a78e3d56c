"""The function that trains a classifier with a Lightning Trainer."""

import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
import torch.utils.deterministic
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from torch import Tensor

from convoy.core.errors import ConvoyError
from convoy.core.malloc import keep_memory
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.callbacks import EmaWeights, EpochLog, SeedSteps, StopEarly
from convoy.training.checkpoint import AtomicCheckpointIO, ResumeCheckpoint, read_checkpoint
from convoy.training.datamodule import ImageDataModule
from convoy.training.divergence import StopOnDivergence, TrainingDiverged
from convoy.training.history import EpochHistory
from convoy.training.module import ClassifierModule
from convoy.training.record import FailureInfo, ResolvedTrainer
from convoy.training.sampler import compute_class_weights
from convoy.training.termination import GracefulExit

# Batches between two updates of the progress bar; updating it after each would take a third of the time of LeNet.
PROGRESS_REFRESH_RATE = 20
# Parts of torch's error messages, and what to do about them.
BATCH_NORM_ERROR = "Expected more than 1 value per channel"
NONDETERMINISTIC_ERROR = "does not have a deterministic implementation"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a training run; if it failed, it covers the epochs before the failure."""

    weights: dict[str, Tensor]  # state dict of the best epoch, on the CPU
    history: list[dict[str, float]]  # one row per epoch, with the keys `COLUMNS`; epochs count from 1
    best: dict[str, float]  # the row of `history` that is best by train.selection_metric, then by val_loss
    stopped: str  # setting that ended the training (max_epochs, patience or max_time), or "failure"
    failure: FailureInfo | None


def fit(
    classifier: Classifier,
    data: ImageDataModule,
    params: TrainConfig,
    hardware: ResolvedTrainer,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
    **arguments: Any,
) -> TrainResult:
    """Train a classifier and keep the weights of the epoch with the best validation metrics.

    The result is bit-identical for equal settings, data, package versions, instruction set and number of threads. A
    training that resumes from a checkpoint ends bit-identical to one that was never interrupted. On SIGTERM, the state
    is saved and the process exits with status 143.

    Args:
        classifier: The network; it is trained in place.
        data: Training and validation images.
        params: Settings that all architectures share.
        hardware: Hardware, precision and number of threads.
        checkpoint: File that the state is saved to, and resumed from if it exists. None disables checkpoints.
        callbacks: More callbacks of the Trainer. They must not draw random numbers.
        **arguments: More arguments of the Trainer, instead of those that follow from `hardware`.

    Returns:
        The best weights, the history and the reason why the training stopped. If the training
        diverged, the result holds the failure.

    Raises:
        ConvoyError: If a batch does not fit into the memory of the GPU, is too small for batch norm, or needs an
            operation that is not deterministic.
    """
    module = make_module(classifier, data, hardware)
    state = read_checkpoint(checkpoint, module, params.max_epochs) if checkpoint else None
    epochs_done, steps_done = (state["epoch"], state["global_step"]) if state else (0, 0)
    # Lightning reads the file itself, and this copy of the weights would take memory as long as the training lasts.
    resume_from, state = checkpoint if state else None, None
    history, exit = EpochHistory(params.selection_metric), GracefulExit()
    early_stopping = StopEarly(params.selection_metric, params.patience)
    own: list[Callback] = [
        SeedSteps(params.seed),
        history,
        *([EmaWeights(classifier.recipe.ema_decay)] if classifier.recipe.ema_decay else []),
        StopOnDivergence(len(classifier.info.classes)),
        *([early_stopping] if params.patience else []),
        *progress_callbacks(classifier, history),
        exit,
        ResumeCheckpoint(checkpoint, params.checkpoint_minutes, exit, steps_done),
    ]
    trainer = make_trainer(
        classifier,
        hardware,
        max_epochs=params.max_epochs,
        max_time=hardware.max_time,
        # There is a result even if the time was up before.
        min_epochs=1,
        callbacks=[*own, *callbacks],
        **arguments,
    )
    if resume_from:
        print(f"resuming after {epochs_done} epochs and {steps_done} steps", flush=True)
    failure = None
    with exit.handle(trainer), explain_errors(classifier):
        try:
            trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
        except TrainingDiverged as diverged:
            failure = diverged.failure
    if failure:
        stopped = "failure"
    elif len(history.rows) == params.max_epochs:
        stopped = "max_epochs"
    else:
        stopped = "patience" if params.patience and early_stopping.is_exhausted else "max_time"
    return TrainResult(history.weights, history.rows, history.best, stopped, failure)


def make_module(classifier: Classifier, data: ImageDataModule, hardware: ResolvedTrainer) -> ClassifierModule:
    """Create the Lightning module of a classifier, with class weights if its recipe asks for them."""
    weights = None
    if classifier.recipe.class_balance == "weighted_loss":
        balanced = compute_class_weights(data.train.labels, len(classifier.info.classes))
        weights = torch.tensor(balanced, dtype=torch.float32)
    # The images are stored with the channels last.
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ClassifierModule(classifier, weights, compile=hardware.compile)


def make_trainer(classifier: Classifier, hardware: ResolvedTrainer, **arguments: Any) -> lightning.Trainer:
    """Create a Lightning Trainer whose results are reproducible.

    Args:
        classifier: The network, whose recipe has the settings of the optimization.
        hardware: Hardware, precision and number of threads.
        **arguments: More arguments of the Trainer, instead of those that follow from `hardware`.
    """
    # Lightning reports its profile as information.
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO if hardware.profiler else logging.WARNING)
    # Lightning 2.6 emits this warning on torch 2.15.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    # The images are in memory, so there is nothing for workers to do.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(hardware.threads)
    keep_memory()
    # Compute float32 in full precision, as inference does.
    torch.backends.cudnn.allow_tf32 = False
    defaults: dict[str, Any] = {
        "accelerator": hardware.accelerator,
        "devices": hardware.devices,
        "num_nodes": hardware.num_nodes,
        "strategy": hardware.strategy,
        "precision": hardware.precision,
        "sync_batchnorm": hardware.sync_batchnorm,
        "profiler": hardware.profiler,
        "accumulate_grad_batches": classifier.recipe.accumulate_grad_batches,
        "gradient_clip_val": classifier.recipe.grad_clip_norm or None,
        "deterministic": hardware.deterministic,
        "plugins": [AtomicCheckpointIO()],
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    trainer = lightning.Trainer(**defaults | arguments)
    # We never read uninitialised memory, and filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return trainer


def progress_callbacks(classifier: Classifier, history: EpochHistory) -> list[Callback]:
    """Return a progress bar if standard error is a terminal, and a line per epoch for a log."""
    bar = sys.stderr.isatty()
    log = (
        [EpochLog(classifier.name or type(classifier).__name__.lower(), history)]
        if not (bar and sys.stdout.isatty())
        else []
    )
    return [*([TQDMProgressBar(PROGRESS_REFRESH_RATE)] if bar else []), *log]


@contextlib.contextmanager
def explain_errors(classifier: Classifier) -> Iterator[None]:
    """Raise ConvoyError for errors of torch that other settings avoid."""
    name = classifier.name or type(classifier).__name__.lower()
    batch_size, accumulate = f"model.{name}.recipe.batch_size", f"model.{name}.recipe.accumulate_grad_batches"
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConvoyError(
            f"{name}: a batch does not fit into the memory of the GPU: double {accumulate}, or halve {batch_size}"
        ) from None
    except (ValueError, RuntimeError) as error:
        if BATCH_NORM_ERROR in str(error):
            problem = "batch norm can't be trained on one image at a time"
            raise ConvoyError(f"{name}: {problem}: raise {batch_size}, or lower {accumulate}") from None
        if NONDETERMINISTIC_ERROR in str(error):
            raise ConvoyError(f"{name}: {str(error).partition('. ')[0]}: train it with trainer=cpu") from None
        raise
