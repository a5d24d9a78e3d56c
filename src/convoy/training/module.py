"""The Lightning module that trains a classifier."""

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.augmentation import augment, mix
from convoy.training.backbone import freeze_backbone, freeze_running_statistics
from convoy.training.checkpoint import Checkpoint, State, ranking_key
from convoy.training.datamodule import ImageData, split_batch
from convoy.training.early_stopping import find_reason_to_stop
from convoy.training.losses import batch_metrics, compute_loss
from convoy.training.optimizers import compute_lr_fraction, make_optimizer, optimizer_state_keys, set_lr, update_ema
from convoy.training.process_sync import ProcessSync, check_same_step
from convoy.training.progress import Progress
from convoy.training.record import FailureInfo, ResolvedTrainer
from convoy.training.result import COLUMNS, TrainingDiverged, TrainResult
from convoy.training.sampler import compute_class_weights
from convoy.training.seeding import seed_step
from convoy.training.termination import SigtermHandler, exit_after_sigterm

# Multiple of the loss of random guessing above which the training is considered to diverge.
MAX_LOSS_RATIO = 1000

# Callback that receives each row of the training history.
EpochCallback = Callable[[dict[str, float]], None]


class ClassifierModule(lightning.LightningModule):
    """Lightning module that trains a classifier and holds the complete state of the training.

    It optimizes manually and takes several optimizer steps per call of `training_step`. Loss and accuracy are summed on
    the device and read once per epoch, or once per second if progress is shown in a terminal.

    The arguments are those of `fit`.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        classifier: Classifier,
        data: ImageData,
        params: TrainConfig,
        hardware: ResolvedTrainer,
        checkpoint: Checkpoint | None = None,
        on_epoch_end: EpochCallback = lambda row: None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.classifier = classifier
        self.data = data
        self.params = params
        self.hardware = hardware
        self.checkpoint = checkpoint
        self.on_epoch_end = on_epoch_end
        self.recipe = classifier.recipe
        if self.recipe.backbone_lr_scale == 0:
            freeze_backbone(classifier)
        # The exponential moving average of the weights, if the recipe asks for one.
        self.average = copy.deepcopy(classifier).requires_grad_(False) if self.recipe.ema_decay else None
        heads = classifier.weighted_heads
        self.weighted_heads = torch.compile(heads) if hardware.compile else heads
        classes = len(classifier.info.classes)
        weights = None
        if self.recipe.class_balance == "weighted_loss":
            weights = torch.tensor(compute_class_weights(data.train.labels, classes), dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.max_loss = MAX_LOSS_RATIO * math.log(max(2, classes))
        self.total_steps = params.max_epochs * data.steps

        rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
        self.sigterm = SigtermHandler(rank)
        self.failure: FailureInfo | None = None
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}
        # Sums over the current epoch: loss, correct predictions, images.
        self.running_totals = torch.zeros(3)
        # The first step with a loss that is NaN or too large; -1 if there is none.
        self.first_bad_step = torch.tensor(-1)
        # Training time of earlier processes.
        self.earlier_minutes = 0.0
        self.optimizer_state: dict[str, Any] | None = None
        self.started = self.last_save = self.last_loss_check = time.monotonic()
        if state := checkpoint.load(self._validate) if checkpoint else None:
            self._restore(state, rank)
            for row in self.history:
                on_epoch_end(row)
        # The setting that ends the training, or an empty string.
        self.stopped = self._find_reason_to_stop(self.earlier_minutes)
        batch_size, name = data.sampler.batch_size, type(classifier).__name__.lower()
        images_done = (data.epoch * data.steps + data.step) * batch_size
        self.progress = Progress(name, self.total_steps * batch_size, params.max_epochs, images_done, silent=rank > 0)

    # State and result

    def capture_state(self) -> dict[str, Any]:
        """Return the state that the rest of the training depends on, as tensors and plain values."""
        return {
            "epoch": self.data.epoch,
            "step": self.data.step,
            "minutes": self._elapsed_minutes(),
            "classifier": self.classifier.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict()["state"],
            "running_totals": self.running_totals,
            "first_bad_step": self.first_bad_step,
            "history": self.history,
            "best": self.best,
            "weights": self.weights,
        }

    def _validate(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the contents of a checkpoint cannot be a state of this training."""
        loaded = State(**state)
        if (loaded.average is None) != (self.average is None):
            raise ValueError("average: recipe.ema_decay is enabled in only one of the two trainings")
        # Divide the batch among the processes as in training, so that a step has the same number of images.
        processes = self.hardware.devices * self.hardware.nodes
        batch_size = self.data.sampler.batch_size // processes * processes
        loaded.check(
            epochs=self.params.max_epochs,
            steps=len(self.data.train) // batch_size,
            batch_size=batch_size,
            columns=COLUMNS,
            weights=self.classifier.state_dict(),
            parameters=[each for group in make_optimizer(self.classifier).param_groups for each in group["params"]],
            state_keys=optimizer_state_keys(self.recipe),
        )

    def _restore(self, state: dict[str, Any], rank: int) -> None:
        self.data.epoch, self.data.step = state["epoch"], state["step"]
        self.earlier_minutes = state["minutes"]
        self.classifier.load_state_dict(state["classifier"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer_state = state["optimizer"]
        # The saved totals are over all processes, so only one process may restore them.
        if rank == 0:
            self.running_totals = state["running_totals"]
        self.first_bad_step = state["first_bad_step"]
        self.history, self.best, self.weights = state["history"], state["best"], state["weights"]
        print(f"resuming after {self.data.epoch} epochs and {self.data.step} steps", flush=True)

    def make_result(self) -> TrainResult:
        """Return the result of the training."""
        stopped = "failure" if self.failure else self.stopped
        return TrainResult(self.weights, self.history, self.best, stopped, self.failure)

    def _find_reason_to_stop(self, minutes: float) -> str:
        return find_reason_to_stop(self.params, self.data.epoch, self.best, minutes)

    def _elapsed_minutes(self) -> float:
        return self.earlier_minutes + (time.monotonic() - self.started) / 60

    # Hooks of Lightning

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create the optimizer, with its state from the checkpoint if there is one."""
        self.optimizer = make_optimizer(self.classifier)
        if self.optimizer_state:
            # The checkpoint has no parameter groups, because they follow from the settings and the step.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": self.optimizer_state, "param_groups": groups})
        return self.optimizer

    def on_fit_start(self) -> None:
        """Move the state to the device and select this process's part of the data."""
        check_same_step(self.trainer.strategy, self.data.epoch * self.data.steps + self.data.step)
        self.data.set_rank(self.device, self.global_rank, self.trainer.world_size)
        self.running_totals = self.running_totals.to(self.device)
        self.first_bad_step = self.first_bad_step.to(self.device)

    def on_train_start(self) -> None:
        """Replace Lightning's handler of SIGTERM by our own."""
        self.sigterm.reinstall()

    def on_train_epoch_start(self) -> None:
        """Switch to training mode, except for the batch norms of a frozen backbone."""
        self.sync = ProcessSync(self.trainer.strategy, self.data.step)
        self.classifier.train()
        if self.recipe.backbone_lr_scale == 0:
            freeze_running_statistics(self.classifier)

    def training_step(self, steps: range) -> None:
        """Take several optimizer steps, and save or exit between them if needed."""
        for step in steps:
            self._step(step)
            self._between_steps()
        if steps:
            self.progress.advance(self.data.epoch + 1, len(steps) * self.data.sampler.batch_size, self._loss_so_far)

    def on_validation_epoch_start(self) -> None:
        """Reset the validation metrics, and share the running statistics of the first process."""
        self.val_totals = torch.zeros(3, device=self.device)
        # Validate with the running statistics of the first process, which are the ones that are saved.
        if self.trainer.world_size > 1:
            for buffer in (self.average or self.classifier).buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, rows: np.ndarray) -> None:
        """Add the metrics of a validation batch to `val_totals`."""
        pixels, labels = self.data.val_store.gather(rows)
        # In float32, as in inference.
        self.val_totals += batch_metrics((self.average or self.classifier)(pixels), labels)
        # All training steps of the epoch are done, so a resumed training only repeats the validation.
        if self.sigterm.was_received and self.trainer.world_size == 1:
            self._save()
            exit_after_sigterm()

    def on_train_epoch_end(self) -> None:
        """Append the epoch to the history, keep the best weights, save the state and decide whether to stop."""
        totals = self.trainer.strategy.reduce(torch.stack([self.running_totals, self.val_totals]), reduce_op="sum")
        self._fail_if_diverged()
        (loss, correct, count), (val_loss, val_correct, val_count) = totals.tolist()
        row = {
            "epoch": self.data.epoch + 1,
            "lr": self.recipe.lr * self._lr_fraction((self.data.epoch + 1) * self.data.steps - 1),
            "train_accuracy": correct / count,
            "train_loss": loss / count,
            "val_accuracy": val_correct / val_count,
            "val_loss": val_loss / val_count,
        }
        if not math.isfinite(row["val_loss"]):
            self._fail((self.data.epoch + 1) * self.data.steps - 1, "the validation loss is NaN or infinite")
        self.history.append(row)
        if not self.best or ranking_key(row) > ranking_key(self.best):
            self.best = row
            self.weights = {
                name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, value in (self.average or self.classifier).state_dict().items()
            }
        self.data.epoch += 1
        self.data.step = 0
        self.running_totals = torch.zeros(3, device=self.device)
        self.progress.end_epoch(row)
        self.on_epoch_end(row)
        self._save()
        if self.trainer.strategy.reduce_boolean_decision(self.sigterm.was_received, all=False):
            exit_after_sigterm()
        # The clock of the first process decides for all processes.
        self.stopped = self.trainer.strategy.broadcast(self._find_reason_to_stop(self._elapsed_minutes()))
        self.trainer.should_stop = self.stopped != ""

    # Optimizer step

    def _lr_fraction(self, global_step: int) -> float:
        return compute_lr_fraction(global_step, self.total_steps, self.recipe.warmup_fraction)

    def _step(self, step: int) -> None:
        recipe = self.recipe
        global_step = self.data.epoch * self.data.steps + step
        seed_step(self.data.seed, global_step, self.data.rank, self.device)
        self._set_lr(global_step)
        pixels, labels = self.data.batch(step)
        total = torch.zeros((), device=self.device)
        for micro_batch in split_batch(pixels, labels, recipe.accumulate_grad_batches):
            loss = self.compute_loss(*micro_batch) / len(labels)
            self.manual_backward(loss)
            total += loss.detach()
        if recipe.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.classifier.parameters(), recipe.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            update_ema(self.average, self.classifier, min(recipe.ema_decay, (1 + global_step) / (10 + global_step)))
        is_unchanged = (self.first_bad_step >= 0) | (total < self.max_loss)
        self.first_bad_step = torch.where(is_unchanged, self.first_bad_step, global_step)
        self.data.step = step + 1

    def compute_loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Augment images as the recipe asks, and compute their training loss.

        The batch's metrics are added to `running_totals`.

        Args:
            pixels: Images (N, H, W, C) uint8.
            labels: Labels (N,) int64.

        Returns:
            The loss, a scalar, summed over the images and weighted over the heads.
        """
        recipe = self.recipe
        # Outside of autocast, because the 8 significant bits of bfloat16 are too few for a coordinate in an image.
        pixels = augment(pixels, recipe.augment)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.hardware.precision == "bfloat16"):
            x = self.classifier.normalise(pixels)
            x, targets = mix(x, labels, len(self.classifier.info.classes), recipe.augment)
            heads = [(weight, logits.float()) for weight, logits in self.weighted_heads(x)]
        loss, metrics = compute_loss(heads, labels, targets, self.class_weights, recipe.label_smoothing)
        self.running_totals += metrics
        return loss

    def _set_lr(self, global_step: int) -> None:
        set_lr(self.optimizer, self.recipe, self._lr_fraction(global_step))

    # Checkpoints, SIGTERM and failures

    def _between_steps(self) -> None:
        is_save_due, was_terminated = self._is_save_due(), self.sigterm.was_received
        if self.trainer.world_size == 1:
            if time.monotonic() > self.last_loss_check + 1:
                self._fail_if_diverged()
        elif self.data.step == self.sync.next_sync:
            is_save_due, was_terminated = self.sync.agree(self.data.step, is_save_due, was_terminated)
        else:
            return
        if is_save_due or was_terminated:
            self._fail_if_diverged()
            self._save()
        if was_terminated:
            exit_after_sigterm()

    def _is_save_due(self) -> bool:
        return time.monotonic() - self.last_save > 60 * self.params.checkpoint_minutes

    def _save(self) -> None:
        self.last_save = time.monotonic()
        # One process writes the checkpoint for all, and after a restart it resumes from the totals over all.
        totals = self.trainer.strategy.reduce(self.running_totals.clone(), reduce_op="sum")
        if self.checkpoint and self.global_rank == 0:
            try:
                self.checkpoint.save(self.capture_state() | {"running_totals": totals})
            except OSError as error:
                print(f"no checkpoint could be written ({error}); the training continues", flush=True)

    def _loss_so_far(self) -> float:
        loss, _, count = self.running_totals.tolist()
        return loss / count

    def _fail_if_diverged(self) -> None:
        self.last_loss_check = time.monotonic()
        step = int(self.trainer.strategy.reduce(self.first_bad_step.clone(), reduce_op="max"))
        if step >= 0:
            self._fail(step, "the loss is NaN, or a thousand times the loss of random guessing")

    def _fail(self, step: int, reason: str) -> None:
        lr = self.recipe.lr * self._lr_fraction(step)
        self.failure = FailureInfo(reason, step // self.data.steps + 1, step + 1, lr)
        raise TrainingDiverged(reason)
