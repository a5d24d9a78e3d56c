"""The Lightning module that trains a classifier, and the function that runs the training."""

import contextlib
import copy
import dataclasses
import gc
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as lightning
import torch
import torch.utils.deterministic
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.nn import functional

from convoy.core.errors import ConvoyError
from convoy.core.malloc import keep_memory
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig, TrainConfig
from convoy.training.augmentation import augment, mix
from convoy.training.checkpoint import Checkpoint, State, merit
from convoy.training.datamodule import ImageData
from convoy.training.hardware import ResolvedTrainer
from convoy.training.progress import Progress
from convoy.training.sampler import class_weights

# Exit code of a process that SIGTERM ended, as shells report it.
TERMINATED = 128 + signal.SIGTERM
# Time from SIGTERM until the process ends, even if the current step has not finished.
GRACE = 8  # seconds
# Interval at which processes that train together agree on whether to save and whether to end.
MEET = 0.5  # seconds
# Part of torch's error message for a batch norm over a single value.
ONE_VALUE = "Expected more than 1 value per channel"
# The loss is considered exploded above this multiple of the loss of random guessing.
EXPLODED = 1000
# Keys of a row of the training history.
COLUMNS = ["epoch", "lr", "train_accuracy", "train_loss", "val_accuracy", "val_loss"]

# Callback that receives each row of the training history.
Tell = Callable[[dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class FailureInfo:
    """Reason and position of the failure of a training."""

    reason: str
    epoch: int  # from 1
    step: int  # of the complete training, from 1
    lr: float  # of that step

    def words(self, architecture: str) -> str:
        """Return the message for the user, which suggests how to fix the failure."""
        return (
            f"{architecture} failed in epoch {self.epoch}, step {self.step}, at a learning rate of {self.lr:.3g}: "
            f"{self.reason}. Lower model.{architecture}.recipe.lr, lengthen its warmup or set its clip_norm to 1.0"
        )


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a training; if it failed, it covers the epochs before the failure."""

    weights: dict[str, Tensor]  # state dict of the best epoch, on the CPU
    history: list[dict[str, float]]  # one row per epoch, with the keys `COLUMNS`; epochs count from 1
    best: dict[str, float]  # the row of `history` with the highest val_accuracy, then the lowest val_loss
    stopped: str  # setting that ended the training (max_epochs, patience or max_minutes), or "failure"
    failure: FailureInfo | None


def fit(
    classifier: Classifier,
    data: ImageData,
    params: TrainConfig,
    choice: ResolvedTrainer,
    checkpoint: Checkpoint | None = None,
    tell: Tell = lambda row: None,
) -> TrainResult:
    """Train a classifier and keep the weights of the epoch with the best validation metrics.

    The result is bit-identical for equal settings, data, package versions, instruction set and number of threads. A
    training that resumes from a checkpoint ends bit-identical to one that was never interrupted. On SIGTERM, the state
    is saved and the process exits with status 143.

    Args:
        classifier: The network; it is trained in place.
        data: Training and validation images.
        params: Settings that limit the length of the training.
        choice: Hardware, precision and number of threads.
        checkpoint: Where the state is saved, and resumed from if it exists. None disables checkpoints.
        tell: Called with the history's row at the end of each epoch, and immediately for epochs before the checkpoint.

    Returns:
        The best weights, the history and the reason why the training stopped. If the training
        diverged, the result holds the failure.

    Raises:
        ConvoyError: If a batch does not fit into the memory of the GPU, or is too small for batch norm.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Lightning 2.6 emits this warning on torch 2.15.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    torch.set_num_threads(choice.threads)
    keep_memory()
    # Compute float32 in full precision, as inference does.
    torch.backends.cudnn.allow_tf32 = False
    # The images are stored with the channels last.
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training = ClassifierModule(classifier, data, params, choice, checkpoint, tell)
    trainer = lightning.Trainer(
        accelerator="gpu" if choice.accelerator == "gpu" else "cpu",
        devices=choice.devices,
        num_nodes=choice.nodes,
        strategy="ddp" if choice.devices * choice.nodes > 1 else "auto",
        # `ClassifierModule.reason_to_stop` decides when to stop.
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
    fits = True
    if training.reason_to_stop(training.minutes) == "":
        with terminated_softly(training, trainer):
            try:
                trainer.fit(training, data)
            except torch.OutOfMemoryError:
                fits = False
            except TrainingDiverged:
                pass
            except ValueError as error:
                if ONE_VALUE not in str(error):
                    raise
                raise ConvoyError(too_small(classifier)) from None
            finally:
                training.progress.close()
    # Not in the except block, where the error still references the tensors that fill the memory.
    if not fits:
        raise ConvoyError(too_large(classifier, data, choice))
    return training.trained()


@contextlib.contextmanager
def terminated_softly(training: "ClassifierModule", trainer: lightning.Trainer) -> Iterator[None]:
    """Handle SIGTERM by finishing the current step, saving the state and ending all processes of the training."""

    def soften(number: int, frame: FrameType | None) -> None:
        if training.terminated:
            return
        training.terminated = True
        if training.rank == 0:
            # The signal may have interrupted a call of print, which is not reentrant.
            with contextlib.suppress(OSError):
                os.write(2, b"SIGTERM: the training saves its state and ends; run again, it goes on from there\n")
        signal.signal(signal.SIGALRM, force)
        # Repeat the alarm each second, because Python drops exceptions that are raised in a destructor or in the
        # callback of a weak reference.
        signal.setitimer(signal.ITIMER_REAL, GRACE, 1)
        if trainer.strategy.launcher:
            # Pass the signal on to the processes that this process started.
            trainer.strategy.launcher.kill(number)

    def force(number: int, frame: FrameType | None) -> None:
        forced.append(time.monotonic())
        if forced[-1] > forced[0] + GRACE:
            os._exit(training.exit_status)
        training.exit()

    forced: list[float] = []
    try:
        before = signal.signal(signal.SIGTERM, soften)
    # Only the main thread can set a signal handler.
    except ValueError:
        yield
        return
    training.soften = soften
    try:
        yield
    # Lightning raises this if the signal arrives just before `on_train_start`.
    except SIGTERMException:
        training.exit()
    finally:
        if training.terminated:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)
    if training.terminated:
        training.exit()


class TrainingDiverged(Exception):
    """Raised when the training diverges; `ClassifierModule.failure` holds the details."""


class ClassifierModule(lightning.LightningModule):
    """Lightning module that trains a classifier and holds the complete state of the training.

    It optimizes manually and takes several optimizer steps per call of `training_step`. Loss and accuracy are summed on
    the device and read once per epoch, or once per second if progress is shown in a terminal.

    The arguments are those of `fit`.
    """

    class_weights: Tensor

    def __init__(
        self,
        classifier: Classifier,
        data: ImageData,
        params: TrainConfig,
        choice: ResolvedTrainer,
        checkpoint: Checkpoint | None,
        tell: Tell = lambda row: None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.classifier = classifier
        self.data = data
        self.params = params
        self.choice = choice
        self.checkpoint = checkpoint
        self.tell = tell
        self.recipe = classifier.recipe
        if self.recipe.body_lr == 0:
            for name, parameter in classifier.named_parameters():
                parameter.requires_grad_(classifier.is_head(name))
        # The exponential moving average of the weights, if the recipe asks for one.
        self.average: Classifier | None = None
        if self.recipe.ema:
            self.average = copy.deepcopy(classifier).requires_grad_(False)
        self.heads: Callable[[Tensor], list[tuple[float, Tensor]]] = classifier.heads
        if choice.compile:
            self.heads = torch.compile(classifier.heads)
        classes = len(classifier.task.classes)
        weights = class_weights(data.train.labels, classes) if self.recipe.balance == "loss" else np.ones(classes)
        self.register_buffer("class_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)
        self.explosion = EXPLODED * math.log(max(2, classes))
        self.total = params.max_epochs * data.steps

        self.rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
        # The handler of SIGTERM.
        self.soften: Callable[[int, FrameType | None], None] | None = None
        self.terminated = False
        # The setting that ended the training.
        self.stopped = ""
        self.failure: FailureInfo | None = None
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}
        # Sums over the current epoch: loss, correct predictions, images.
        self.sums = torch.zeros(3)
        # The first step with a loss that is NaN or too large; -1 if there is none.
        self.bad_step = torch.tensor(-1)
        # Training time of earlier processes.
        self.minutes = 0.0
        self.optimizer_state: dict[str, Any] | None = None
        self.began = self.saved = self.looked = time.monotonic()
        if state := checkpoint.load(self._check) if checkpoint else None:
            self._restore(state)
            for row in self.history:
                tell(row)
        images = data.batches.batch_size
        seen = (data.epoch * data.steps + data.step) * images
        self.progress = Progress(
            type(classifier).__name__.lower(),
            self.total * images,
            params.max_epochs,
            seen,
            silent=self.rank > 0,
        )

    # State and result

    def state(self) -> dict[str, Any]:
        """Return the state that the rest of the training depends on, as tensors and plain values."""
        return {
            "epoch": self.data.epoch,
            "step": self.data.step,
            "minutes": self._minutes(),
            "classifier": self.classifier.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict()["state"],
            "sums": self.sums,
            "bad_step": self.bad_step,
            "history": self.history,
            "best": self.best,
            "weights": self.weights,
        }

    def _check(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the contents of a checkpoint cannot be a state of this training."""
        found = State(**state)
        if (found.average is None) != (self.average is None):
            raise ValueError("average: this training keeps one, or none")
        # Divide the batch among the processes as in training, so that a step has the same number of images.
        ranks = self.choice.devices * self.choice.nodes
        batch_size = self.data.batches.batch_size // ranks * ranks
        found.check(
            epochs=self.params.max_epochs,
            steps=len(self.data.train) // batch_size,
            batch_size=batch_size,
            columns=COLUMNS,
            weights=self.classifier.state_dict(),
            parameters=[each for group in make_optimizer(self.classifier).param_groups for each in group["params"]],
            kept=kept_by_optimizer(self.recipe),
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.data.epoch, self.data.step = state["epoch"], state["step"]
        self.minutes = state["minutes"]
        self.classifier.load_state_dict(state["classifier"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer_state = state["optimizer"]
        # The saved sums are over all processes, so only one process may restore them.
        if self.rank == 0:
            self.sums = state["sums"]
        self.bad_step = state["bad_step"]
        self.history, self.best, self.weights = state["history"], state["best"], state["weights"]
        print(f"going on after {self.data.epoch} epochs and {self.data.step} steps", flush=True)

    def trained(self) -> TrainResult:
        """Return the result of the training."""
        stopped = "failure" if self.failure else self.stopped or self.reason_to_stop(self.minutes)
        return TrainResult(self.weights, self.history, self.best, stopped, self.failure)

    def reason_to_stop(self, spent: float) -> str:
        """Return the setting that ends the training after the current epoch, or an empty string.

        Args:
            spent: Training time so far, in minutes.
        """
        since = self.data.epoch - int(self.best.get("epoch", 0))
        if self.data.epoch >= self.params.max_epochs:
            return "max_epochs"
        if self.params.patience and since >= self.params.patience:
            return "patience"
        if self.params.max_minutes and self.data.epoch and spent * (1 + 1 / self.data.epoch) > self.params.max_minutes:
            # Another epoch as long as the average epoch so far would exceed the limit.
            return "max_minutes"
        return ""

    def _minutes(self) -> float:
        return self.minutes + (time.monotonic() - self.began) / 60

    # Hooks of Lightning

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = make_optimizer(self.classifier)
        if self.optimizer_state:
            # The checkpoint has no parameter groups, because they follow from the settings and the step.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": self.optimizer_state, "param_groups": groups})
        return self.optimizer

    def on_fit_start(self) -> None:
        self._check_level()
        self.data.share(self.device, self.global_rank, self.trainer.world_size)
        self.sums, self.bad_step = self.sums.to(self.device), self.bad_step.to(self.device)

    def _check_level(self) -> None:
        """Raise ConvoyError if processes that train together start at different steps."""
        done = self.data.epoch * self.data.steps + self.data.step
        ends = torch.tensor([done, -done], device=self.device)
        last, first = self.trainer.strategy.reduce(ends, reduce_op="max").tolist()
        if last != -first:
            raise ConvoyError(
                f"the machines begin at different steps, {-first} and {last}, since not all have the checkpoint: let "
                "artifacts/.checkpoints be on a disk that they share, or remove it on all of them"
            )

    def on_train_start(self) -> None:
        # Lightning has replaced our handler by its own, which ends the process immediately without saving.
        if self.soften:
            signal.signal(signal.SIGTERM, self.soften)

    def on_train_epoch_start(self) -> None:
        self.met, self.meeting = (time.monotonic(), self.data.step), self.data.step + 1
        self.classifier.train()
        # The batch norms of a frozen backbone must not update their running statistics.
        if self.recipe.body_lr == 0:
            for name, layer in self.classifier.named_modules():
                if isinstance(layer, torch.nn.BatchNorm2d) and not self.classifier.is_head(name):
                    layer.eval()

    def training_step(self, steps: range) -> None:
        for step in steps:
            self._step(step)
            self._between_steps()
        if steps:
            self.progress.advance(self.data.epoch + 1, len(steps) * self.data.batches.batch_size, self._loss_so_far)

    def on_validation_epoch_start(self) -> None:
        self.val_sums = torch.zeros(3, device=self.device)
        # Validate with the running statistics of the first process, which are the ones that are saved.
        if self.trainer.world_size > 1:
            for buffer in (self.average or self.classifier).buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, rows: np.ndarray) -> None:
        pixels, labels = self.data.held_val.take(rows)
        # In float32, as in inference.
        self.val_sums += batch_metrics((self.average or self.classifier)(pixels), labels)
        # All training steps of the epoch are done, so a resumed training only repeats the validation.
        if self.terminated and self.trainer.world_size == 1:
            self._save()
            self.exit()

    def on_train_epoch_end(self) -> None:
        everywhere = self.trainer.strategy.reduce(torch.stack([self.sums, self.val_sums]), reduce_op="sum")
        self._fail_if_bad()
        (loss, correct, count), (val_loss, val_correct, val_count) = everywhere.tolist()
        row = {
            "epoch": self.data.epoch + 1,
            "lr": self.lr(self.data.epoch * self.data.steps + self.data.steps - 1),
            "train_accuracy": correct / count,
            "train_loss": loss / count,
            "val_accuracy": val_correct / val_count,
            "val_loss": val_loss / val_count,
        }
        if not math.isfinite(row["val_loss"]):
            self._fail((self.data.epoch + 1) * self.data.steps - 1, "the validation loss is no number")
        self.history.append(row)
        if not self.best or merit(row) > merit(self.best):
            self.best = row
            kept = (self.average or self.classifier).state_dict()
            self.weights = {
                name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, value in kept.items()
            }
        self.data.epoch += 1
        self.data.step = 0
        self.sums = torch.zeros(3, device=self.device)
        self.progress.end(row)
        self.tell(row)
        self._save()
        if self.trainer.strategy.reduce_boolean_decision(self.terminated, all=False):
            self.exit()
        # The clock of the first process decides for all processes.
        self.stopped = self.trainer.strategy.broadcast(self.reason_to_stop(self._minutes()))
        self.trainer.should_stop = self.stopped != ""

    # Optimizer step

    def lr(self, step: int) -> float:
        """Return the learning rate of the heads at `step`, counted from 0 over the complete training."""
        return self.recipe.lr * warm_cosine(step, self.total, self.recipe.warmup)

    def _step(self, step: int) -> None:
        recipe = self.recipe
        number = self.data.epoch * self.data.steps + step
        self.seed(number)
        self._set_rate(number)
        pixels, labels = self.data.batch(step)
        total = torch.zeros((), device=self.device)
        for piece in self.pieces(pixels, labels):
            loss = self.loss(*piece) / len(labels)
            self.manual_backward(loss)
            total += loss.detach()
        if recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.classifier.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            update_ema(self.average, self.classifier, min(recipe.ema, (1 + number) / (10 + number)))
        good = (self.bad_step >= 0) | (total < self.explosion)
        self.bad_step = torch.where(good, self.bad_step, number)
        self.data.step = step + 1

    def pieces(self, pixels: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Split a batch into the micro-batches that `accumulate` asks for.

        Their sizes differ by one image at most, because batch norm would fail on a leftover of one image.

        Args:
            pixels: Images (N, H, W, C) uint8.
            labels: Labels (N,) int64.

        Returns:
            The pixels and labels of each micro-batch.
        """
        count = min(self.recipe.accumulate, len(labels))
        return zip(pixels.tensor_split(count), labels.tensor_split(count), strict=True)

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Augment images as the recipe asks, and compute their training loss.

        The batch's metrics are added to `sums`.

        Args:
            pixels: Images (N, H, W, C) uint8.
            labels: Labels (N,) int64.

        Returns:
            The loss, a scalar, summed over the images and weighted over the heads.
        """
        recipe = self.recipe
        # Outside of autocast, because the 8 significant bits of bfloat16 are too few for a coordinate in an image.
        pixels = augment(pixels, recipe.augment)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.choice.precision == "bfloat16"):
            x = self.classifier.normalise(pixels)
            x, targets = mix(x, labels, len(self.class_weights), recipe.augment)
            heads = [(weight, logits.float()) for weight, logits in self.heads(x)]
        smoothing, weights = recipe.label_smoothing, self.class_weights if recipe.balance == "loss" else None
        losses = [
            functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")
            for _, logits in heads
        ]
        plain = losses[0].detach() if targets is labels and not smoothing and weights is None else None
        self.sums += batch_metrics(heads[0][1].detach(), labels, plain)
        return torch.stack([weight * loss for (weight, _), loss in zip(heads, losses, strict=True)]).sum()

    def seed(self, number: int) -> None:
        """Seed torch's random generators for one step, so that a resumed training draws the same numbers.

        Args:
            number: Step, counted from 0 over the complete training.
        """
        state = np.random.SeedSequence([self.data.seed, number, self.data.rank]).generate_state(1, np.uint64)
        seed = int(state[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _set_rate(self, number: int) -> None:
        share = warm_cosine(number, self.total, self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * share * group["share"]
            if self.recipe.schedule == "one_cycle":
                momentum = max(0.0, self.recipe.momentum - 0.1 * share)
                if self.recipe.optimizer == "sgd":
                    group["momentum"] = momentum
                else:
                    group["betas"] = (momentum, 0.999)

    # Checkpoints, SIGTERM and failures

    def _between_steps(self) -> None:
        if self.trainer.world_size == 1:
            due, terminated = self._save_is_due(), self.terminated
            if time.monotonic() > self.looked + 1:
                self._fail_if_bad()
        elif self.data.step == self.meeting:
            due, terminated = self._agree()
        else:
            return
        if due or terminated:
            self._fail_if_bad()
            self._save()
        if terminated:
            self.exit()

    def _agree(self) -> tuple[bool, bool]:
        """Return whether any process wants to save, and whether any process has received SIGTERM.

        All processes call this after the same step, every `MEET` seconds as measured by the slowest one.
        """
        now, (before, step) = time.monotonic(), self.met
        asked = [self._save_is_due(), self.terminated, (now - before) / (self.data.step - step)]
        said = self.trainer.strategy.reduce(torch.tensor(asked, device=self.device), reduce_op="max")
        due, terminated, seconds = said.tolist()
        self.met, self.meeting = (now, self.data.step), self.data.step + max(1, min(1000, int(MEET / seconds)))
        return bool(due), bool(terminated)

    @property
    def exit_status(self) -> int:
        """Return the exit status of this process after SIGTERM.

        It is 0 in a process that another one has started; otherwise Lightning would kill the one that started it.
        """
        return TERMINATED if os.environ.get("LOCAL_RANK", "0") == "0" else 0

    def exit(self) -> NoReturn:
        """End this process with the exit status of a process that SIGTERM ended."""
        sys.exit(self.exit_status)

    def _save_is_due(self) -> bool:
        return time.monotonic() - self.saved > 60 * self.params.checkpoint_minutes

    def _save(self) -> None:
        self.saved = time.monotonic()
        # One process writes the checkpoint for all, and after a restart it resumes from the sums over all.
        sums = self.trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        if self.checkpoint and self.global_rank == 0:
            try:
                self.checkpoint.save(self.state() | {"sums": sums})
            except OSError as error:
                print(f"no checkpoint could be written ({error}); the training goes on", flush=True)

    def _loss_so_far(self) -> float:
        loss, _, count = self.sums.tolist()
        return loss / count

    def _fail_if_bad(self) -> None:
        self.looked = time.monotonic()
        step = int(self.trainer.strategy.reduce(self.bad_step.clone(), reduce_op="max"))
        if step >= 0:
            self._fail(step, "the loss is no number, or a thousand times that of a guess")

    def _fail(self, step: int, reason: str) -> None:
        self.failure = FailureInfo(reason, step // self.data.steps + 1, step + 1, self.lr(step))
        raise TrainingDiverged(reason)


def batch_metrics(logits: Tensor, labels: Tensor, loss: Tensor | None = None) -> Tensor:
    """Compute the metrics of a batch as sums over its images.

    Args:
        logits: Logits (N, K).
        labels: Labels (N,) int64.
        loss: The summed cross-entropy, if it is already known.

    Returns:
        The loss, the number of correct predictions and the number of images, as (3,) float32 on the batch's device.
    """
    if loss is None:
        loss = functional.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss, correct, torch.full_like(correct, len(labels))])


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """Compute the learning rate at a step, as a fraction of the peak learning rate.

    It rises linearly during the warm-up and then follows a cosine to 0 (Loshchilov & Hutter 2017, without restarts).

    Args:
        step: Step, from 0.
        steps: Number of steps of the complete training.
        warmup: Fraction of the steps used for the warm-up, in [0, 1].

    Returns:
        The fraction, in [0, 1].
    """
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def make_optimizer(classifier: Classifier) -> torch.optim.Optimizer:
    """Create the optimizer of the classifier's recipe.

    Biases and normalisation layers have no weight decay. Each parameter group's entry `share` is its fraction of the
    learning rate.
    """
    recipe = classifier.recipe
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in classifier.named_parameters():
        share = 1.0 if classifier.is_head(name) else recipe.body_lr
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        if parameter.requires_grad:
            groups.setdefault((share, decay), []).append(parameter)
    tables = [{"params": group, "share": share, "weight_decay": decay} for (share, decay), group in groups.items()]
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(tables, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=True)
    return torch.optim.AdamW(tables, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=True)


def kept_by_optimizer(recipe: RecipeConfig) -> set[str]:
    """Return the keys of the state that the recipe's optimizer has for each parameter after its first step."""
    if recipe.optimizer == "adamw":
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if recipe.momentum else set()


@torch.no_grad()
def update_ema(average: Classifier, classifier: Classifier, decay: float) -> None:
    """Update the exponential moving average of a classifier's weights in place.

    Args:
        average: The classifier that holds the average; its buffers become copies of those of `classifier`.
        classifier: The classifier that is trained.
        decay: Weight of the old average, in [0, 1).
    """
    torch._foreach_lerp_(list(average.parameters()), list(classifier.parameters()), 1 - decay)
    for kept, current in zip(average.buffers(), classifier.buffers(), strict=True):
        kept.copy_(current)


def too_large(classifier: Classifier, data: ImageData, choice: ResolvedTrainer) -> str:
    """Return the error message for a batch that exceeds the GPU's memory, with settings that fit."""
    gc.collect()
    name, processes = type(classifier).__name__.lower(), choice.devices * choice.nodes
    part = math.ceil(classifier.recipe.batch_size / processes)
    size = math.ceil(part / classifier.recipe.accumulate)
    # Lightning may have moved it to another device.
    classifier.to(data.held_train.device)
    fits = size // 2
    while fits and not fits_in_memory(classifier, data, choice, fits):
        fits //= 2
    said = f"{name}: a batch of {size} images does not fit into the memory of the GPU"
    if not fits:
        return f"{said}, and neither does one image: take smaller images, or a smaller network"
    pieces = math.ceil(part / fits)
    return (
        f"{said}, but {fits} do: set model.{name}.recipe.batch_size={fits * processes}, "
        f"or model.{name}.recipe.accumulate={pieces} to keep the batch"
    )


def too_small(classifier: Classifier) -> str:
    """Return the error message for a batch norm that gets one image at a time, reduced to one pixel."""
    name = type(classifier).__name__.lower()
    return (
        f"{name}: batch norm can't be trained on one image at a time: raise model.{name}.recipe.batch_size, or lower "
        f"model.{name}.recipe.accumulate"
    )


def fits_in_memory(classifier: Classifier, data: ImageData, choice: ResolvedTrainer, size: int) -> bool:
    """Return whether computing the gradients of a batch of `size` images fits into memory."""
    classifier.zero_grad()
    rows = np.arange(size) % len(data.train)
    try:
        pixels, _ = data.held_train.take(rows)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=choice.precision == "bfloat16"):
            heads = classifier.heads(classifier.normalise(pixels))
        torch.stack([logits.float().sum() for _, logits in heads]).sum().backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        classifier.zero_grad()
        torch.cuda.empty_cache()
    return True
