"""Training: a classifier and its data through Lightning, the best epoch by validation kept."""

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

from convoy.data.malloc import keep_memory
from convoy.errors import ConvoyError
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig, TrainConfig
from convoy.training.augmentation import augment, mix
from convoy.training.checkpoint import Checkpoint, State, merit
from convoy.training.datamodule import ImageData
from convoy.training.hardware import ResolvedTrainer
from convoy.training.progress import Progress
from convoy.training.sampler import class_weights

TERMINATED = 128 + signal.SIGTERM  # exit code, as a shell says it
GRACE = 8  # seconds from SIGTERM until the process ends, whether a step has ended or not
MEET = 0.5  # seconds, after which processes that train together agree on whether to save and to end
ONE_VALUE = "Expected more than 1 value per channel"  # is what torch says of a mean over one number
EXPLODED = 1000  # times the loss of a guess among all classes
COLUMNS = ["epoch", "lr", "train_accuracy", "train_loss", "val_accuracy", "val_loss"]  # of the history

Tell = Callable[[dict[str, float]], None]  # is given each row of the history


@dataclasses.dataclass(frozen=True)
class FailureInfo:
    """Why a training came to nothing."""

    reason: str
    epoch: int  # from 1
    step: int  # of the whole training, from 1
    lr: float  # of that step

    def words(self, architecture: str) -> str:
        """What to tell the user."""
        return (
            f"{architecture} failed in epoch {self.epoch}, step {self.step}, at a learning rate of {self.lr:.3g}: "
            f"{self.reason}. Lower model.{architecture}.recipe.lr, lengthen its warmup or set its clip_norm to 1.0"
        )


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What training leaves. Of one that failed: the epochs before, and the failure."""

    weights: dict[str, Tensor]  # of the best epoch, on the CPU
    history: list[dict[str, float]]  # for each epoch, from 1: epoch, lr, and loss and accuracy on train and val
    best: dict[str, float]  # the row of `history` with the highest val_accuracy, then the lowest val_loss
    stopped: str  # the setting that ended it: max_epochs, patience or max_minutes; or failure
    failure: FailureInfo | None


def fit(
    classifier: Classifier,
    data: ImageData,
    params: TrainConfig,
    choice: ResolvedTrainer,
    checkpoint: Checkpoint | None = None,
    tell: Tell = lambda row: None,
) -> TrainResult:
    """Train `classifier` on `data`: the same bits for the same settings, data, versions, instruction set and threads.

    It begins where `checkpoint` was left, and ends in the same bits as if it had never been interrupted. `tell` is
    called when an epoch ends, and at once for those before the checkpoint. SIGTERM saves and exits with 143. Raises
    ConvoyError where a batch does not fit into the GPU's memory, or is too small for batch norm.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning 2.6 on torch 2.15
    torch.set_num_threads(choice.threads)
    keep_memory()
    torch.backends.cudnn.allow_tf32 = False  # what is said to be float32 is, as where it will answer
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the pixels come
    training = ClassifierModule(classifier, data, params, choice, checkpoint, tell)
    trainer = lightning.Trainer(
        accelerator="gpu" if choice.accelerator == "gpu" else "cpu",
        devices=choice.devices,
        num_nodes=choice.nodes,
        strategy="ddp" if choice.devices * choice.nodes > 1 else "auto",
        max_epochs=-1,  # Training says when it is enough
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we read none, and it costs time
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
    if not fits:  # only here, where the error no longer holds what has filled the memory
        raise ConvoyError(too_large(classifier, data, choice))
    return training.trained()


@contextlib.contextmanager
def terminated_softly(training: "ClassifierModule", trainer: lightning.Trainer) -> Iterator[None]:
    """SIGTERM lets the step under way end and its outcome be saved, and then ends all processes of the training."""

    def soften(number: int, frame: FrameType | None) -> None:
        if training.terminated:
            return
        training.terminated = True
        if training.rank == 0:
            with contextlib.suppress(OSError):  # not by print, which it may have interrupted
                os.write(2, b"SIGTERM: the training saves its state and ends; run again, it goes on from there\n")
        signal.signal(signal.SIGALRM, force)
        # again each second: what is raised in a destructor or the callback of a weak reference, Python drops
        signal.setitimer(signal.ITIMER_REAL, GRACE, 1)
        if trainer.strategy.launcher:
            trainer.strategy.launcher.kill(number)  # the processes that were started from here are told, too

    def force(number: int, frame: FrameType | None) -> None:
        forced.append(time.monotonic())
        if forced[-1] > forced[0] + GRACE:
            os._exit(training.exit_status)
        training.exit()

    forced: list[float] = []
    try:
        before = signal.signal(signal.SIGTERM, soften)
    except ValueError:  # not in the main thread, which alone is told of signals
        yield
        return
    training.soften = soften
    try:
        yield
    except SIGTERMException:  # of Lightning, in the moment before `on_train_start`
        training.exit()
    finally:
        if training.terminated:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)
    if training.terminated:
        training.exit()


class TrainingDiverged(Exception):
    """The training came to nothing; `Training.failure` says why."""


class ClassifierModule(lightning.LightningModule):
    """A classifier in training: what Lightning calls, and all that a checkpoint must hold.

    It takes optimizer steps by itself, some in each call of Lightning's. Loss and accuracy are summed on the device,
    and read once an epoch (once a second for a terminal).
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
        self.average: Classifier | None = None  # the running mean of the weights, where the recipe wants one
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
        self.soften: Callable[[int, FrameType | None], None] | None = None  # what SIGTERM does
        self.terminated = False
        self.stopped = ""  # the setting that ended the training
        self.failure: FailureInfo | None = None
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}
        self.sums = torch.zeros(3)  # of the epoch under way: loss, right answers, images
        self.bad_step = torch.tensor(-1)  # the first with a loss that is no number or too large
        self.minutes = 0.0  # trained by processes before this one
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

    # What is kept

    def state(self) -> dict[str, Any]:
        """All that the training depends on from here, as tensors and plain values."""
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
        """Raise ValueError where a checkpoint holds what can't be a state of this training."""
        found = State(**state)
        if (found.average is None) != (self.average is None):
            raise ValueError("average: this training keeps one, or none")
        # as many images in a step as later, when the processes that train together share a batch
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
        if self.rank == 0:  # they are the sums of all processes
            self.sums = state["sums"]
        self.bad_step = state["bad_step"]
        self.history, self.best, self.weights = state["history"], state["best"], state["weights"]
        print(f"going on after {self.data.epoch} epochs and {self.data.step} steps", flush=True)

    def trained(self) -> TrainResult:
        """What has come of it."""
        stopped = "failure" if self.failure else self.stopped or self.reason_to_stop(self.minutes)
        return TrainResult(self.weights, self.history, self.best, stopped, self.failure)

    def reason_to_stop(self, spent: float) -> str:
        """The setting that says so after so many minutes, or ""."""
        since = self.data.epoch - int(self.best.get("epoch", 0))
        if self.data.epoch >= self.params.max_epochs:
            return "max_epochs"
        if self.params.patience and since >= self.params.patience:
            return "patience"
        if self.params.max_minutes and self.data.epoch and spent * (1 + 1 / self.data.epoch) > self.params.max_minutes:
            return "max_minutes"  # another epoch as long as those before would pass it
        return ""

    def _minutes(self) -> float:
        return self.minutes + (time.monotonic() - self.began) / 60

    # What Lightning calls

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = make_optimizer(self.classifier)
        if self.optimizer_state:
            # the groups follow from the settings and the step
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": self.optimizer_state, "param_groups": groups})
        return self.optimizer

    def on_fit_start(self) -> None:
        self._check_level()
        self.data.share(self.device, self.global_rank, self.trainer.world_size)
        self.sums, self.bad_step = self.sums.to(self.device), self.bad_step.to(self.device)

    def _check_level(self) -> None:
        """Raises ConvoyError where processes that train together begin at different steps."""
        done = self.data.epoch * self.data.steps + self.data.step
        ends = torch.tensor([done, -done], device=self.device)
        last, first = self.trainer.strategy.reduce(ends, reduce_op="max").tolist()
        if last != -first:
            raise ConvoyError(
                f"the machines begin at different steps, {-first} and {last}, since not all have the checkpoint: let "
                "artifacts/.checkpoints be on a disk that they share, or remove it on all of them"
            )

    def on_train_start(self) -> None:
        if self.soften:  # Lightning has put a handler of its own before it, which ends all at once and saves nothing
            signal.signal(signal.SIGTERM, self.soften)

    def on_train_epoch_start(self) -> None:
        self.met, self.meeting = (time.monotonic(), self.data.step), self.data.step + 1
        self.classifier.train()
        if self.recipe.body_lr == 0:  # a frozen body stays as it is, its running means too
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
        if self.trainer.world_size > 1:  # what is kept are the running means of the first process
            for buffer in (self.average or self.classifier).buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, rows: np.ndarray) -> None:
        pixels, labels = self.data.held_val.take(rows)
        self.val_sums += batch_metrics(
            (self.average or self.classifier)(pixels), labels
        )  # in float32, as it will be used
        if self.terminated and self.trainer.world_size == 1:  # all steps of the epoch are done, and it will begin again
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
        self.stopped = self.trainer.strategy.broadcast(self.reason_to_stop(self._minutes()))  # as the first clock says
        self.trainer.should_stop = self.stopped != ""

    # A step

    def lr(self, step: int) -> float:
        """The learning rate of the heads in `step` of the whole training, from 0."""
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
        """A batch in as many parts as the recipe says, as equal as may be: batch norm would fail on one image."""
        count = min(self.recipe.accumulate, len(labels))
        return zip(pixels.tensor_split(count), labels.tensor_split(count), strict=True)

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """The sum of what is minimised over images (N, H, W, C) uint8 with labels (N,), changed as the recipe says."""
        recipe = self.recipe
        pixels = augment(pixels, recipe.augment)  # not in bfloat16, whose 8 bits are too few for a place in an image
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
        """Make all that is drawn in this step of the whole training, from 0, a function of it."""
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

    # Between steps

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
        """Whether one of the processes wants to save, or was told to end. They meet after the same step, twice a second
        by the slowest."""
        now, (before, step) = time.monotonic(), self.met
        asked = [self._save_is_due(), self.terminated, (now - before) / (self.data.step - step)]
        said = self.trainer.strategy.reduce(torch.tensor(asked, device=self.device), reduce_op="max")
        due, terminated, seconds = said.tolist()
        self.met, self.meeting = (now, self.data.step), self.data.step + max(1, min(1000, int(MEET / seconds)))
        return bool(due), bool(terminated)

    @property
    def exit_status(self) -> int:
        """Of this process after SIGTERM; 0 of one that another has started, or Lightning would kill that one."""
        return TERMINATED if os.environ.get("LOCAL_RANK", "0") == "0" else 0

    def exit(self) -> NoReturn:
        """End this process as SIGTERM does."""
        sys.exit(self.exit_status)

    def _save_is_due(self) -> bool:
        return time.monotonic() - self.saved > 60 * self.params.checkpoint_minutes

    def _save(self) -> None:
        self.saved = time.monotonic()
        # one process writes for all, and after a restart goes on from the sums of all
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
    """The summed loss (`loss`, where it is known), right answers and images of a batch: (3,) on its device."""
    if loss is None:
        loss = functional.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss, correct, torch.full_like(correct, len(labels))])


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate at `step` of `steps`: linear for `warmup` of them, then a cosine to 0
    (Loshchilov & Hutter 2017, without restarts)."""
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def make_optimizer(classifier: Classifier) -> torch.optim.Optimizer:
    """The recipe's optimizer. Norms and biases do not decay; `share` of a group is its part of the learning rate."""
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
    """The names of what the recipe's optimizer keeps of each parameter from its first step on."""
    if recipe.optimizer == "adamw":
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if recipe.momentum else set()


@torch.no_grad()
def update_ema(average: Classifier, classifier: Classifier, decay: float) -> None:
    """Move `average` towards the weights of `classifier`, by 1 - decay of the way; its buffers become the same."""
    torch._foreach_lerp_(list(average.parameters()), list(classifier.parameters()), 1 - decay)
    for kept, current in zip(average.buffers(), classifier.buffers(), strict=True):
        kept.copy_(current)


def too_large(classifier: Classifier, data: ImageData, choice: ResolvedTrainer) -> str:
    """What to say of a batch that does not fit into the memory of the GPU: which one does."""
    gc.collect()
    name, processes = type(classifier).__name__.lower(), choice.devices * choice.nodes
    part = math.ceil(classifier.recipe.batch_size / processes)
    size = math.ceil(part / classifier.recipe.accumulate)
    classifier.to(data.held_train.device)  # from where Lightning has put it
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
    """What to say of a batch that comes to one image at a time, and that to one pixel."""
    name = type(classifier).__name__.lower()
    return (
        f"{name}: batch norm can't be trained on one image at a time: raise model.{name}.recipe.batch_size, or lower "
        f"model.{name}.recipe.accumulate"
    )


def fits_in_memory(classifier: Classifier, data: ImageData, choice: ResolvedTrainer, size: int) -> bool:
    """Whether the gradients of a batch of `size` images can be had."""
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
