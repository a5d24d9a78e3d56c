"""The function that trains a classifier with a Lightning Trainer."""

import logging
import warnings

import pytorch_lightning as lightning
import torch
import torch.utils.deterministic

from convoy.core.errors import ConvoyError
from convoy.core.malloc import keep_memory
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.batch_size_errors import BATCH_NORM_ERROR, describe_too_large, describe_too_small
from convoy.training.checkpoint import Checkpoint
from convoy.training.datamodule import ImageData
from convoy.training.module import ClassifierModule, EpochCallback
from convoy.training.record import ResolvedTrainer
from convoy.training.result import TrainingDiverged, TrainResult


def fit(
    classifier: Classifier,
    data: ImageData,
    params: TrainConfig,
    hardware: ResolvedTrainer,
    checkpoint: Checkpoint | None = None,
    on_epoch_end: EpochCallback = lambda row: None,
) -> TrainResult:
    """Train a classifier and keep the weights of the epoch with the best validation metrics.

    The result is bit-identical for equal settings, data, package versions, instruction set and number of threads. A
    training that resumes from a checkpoint ends bit-identical to one that was never interrupted. On SIGTERM, the state
    is saved and the process exits with status 143.

    Args:
        classifier: The network; it is trained in place.
        data: Training and validation images.
        params: Settings that limit the length of the training.
        hardware: Hardware, precision and number of threads.
        checkpoint: Where the state is saved, and resumed from if it exists. None disables checkpoints.
        on_epoch_end: Called with the history's row at the end of each epoch, and immediately for epochs before the
            checkpoint.

    Returns:
        The best weights, the history and the reason why the training stopped. If the training
        diverged, the result holds the failure.

    Raises:
        ConvoyError: If a batch does not fit into the memory of the GPU, or is too small for batch norm.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Lightning 2.6 emits this warning on torch 2.15.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    torch.set_num_threads(hardware.threads)
    keep_memory()
    # Compute float32 in full precision, as inference does.
    torch.backends.cudnn.allow_tf32 = False
    # The images are stored with the channels last.
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module = ClassifierModule(classifier, data, params, hardware, checkpoint, on_epoch_end)
    trainer = lightning.Trainer(
        accelerator="gpu" if hardware.accelerator == "gpu" else "cpu",
        devices=hardware.devices,
        num_nodes=hardware.nodes,
        strategy="ddp" if hardware.devices * hardware.nodes > 1 else "auto",
        # `ClassifierModule.on_train_epoch_end` decides when to stop.
        max_epochs=-1,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    # We never read uninitialised memory, and filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    is_out_of_memory = False
    if not module.stopped:
        with module.sigterm.handle(trainer):
            try:
                trainer.fit(module, data)
            except torch.OutOfMemoryError:
                is_out_of_memory = True
            except TrainingDiverged:
                pass
            except ValueError as error:
                if BATCH_NORM_ERROR not in str(error):
                    raise
                raise ConvoyError(describe_too_small(classifier)) from None
            finally:
                module.progress.close()
    # Not in the except block, where the error still references the tensors that fill the memory.
    if is_out_of_memory:
        raise ConvoyError(describe_too_large(classifier, data, hardware))
    return module.make_result()
