"""The training record: what later stages, other training runs and MLflow need to know about a training run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from convoy.core.artifact_names import RECORD
from convoy.core.config import Name, describe_validation_error
from convoy.core.errors import ConvoyError
from convoy.core.renamed_settings import rename_model_settings
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.recipe import TrainConfig

# Names of the fields in format 1, which had no field `format`.
RENAMED = {"task": "dataset_info", "identity": "fingerprint", "init": "initial_weights", "multiply_adds": "macs"}
# Environment variables that restrict the instruction sets of torch and of oneDNN. They are part of `environment`.
ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


@dataclasses.dataclass(frozen=True)
class ResolvedTrainer:
    """Hardware settings without `auto`; results are bit-identical only if all of them are equal."""

    accelerator: str  # cpu or gpu
    devices: int  # GPUs or CPU processes per machine
    num_nodes: int  # machines
    strategy: str  # auto or ddp
    precision: str  # 32-true or bf16-mixed
    sync_batchnorm: bool
    compile: bool
    threads: int  # per process
    max_time: str | None = None  # DD:HH:MM:SS
    profiler: str | None = None
    # As in Lightning: "warn" for a network on a GPU that needs an operation without a deterministic implementation.
    deterministic: Literal[True, "warn"] = True


@dataclasses.dataclass(frozen=True)
class DatasetVersion:
    """The version of the data set that a model was trained on."""

    name: str
    digest: str  # at most 36 characters; name and digest together identify the data in MLflow
    source: str  # where it comes from, such as "data.dvc"
    profile: Mapping[str, int]  # counts of images, classes, train, val, test, ...
    split_seed: int  # of the random splits


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The weights that a training run started from. For random weights all fields but the first have their default."""

    init: str  # the setting `init`
    source: str = ""  # description of the model or file
    sha256: str = ""  # of the weights
    verified: bool = False  # whether torchvision or MLflow confirms the checksum
    head: Literal["kept", "new"] = "new"
    # Digests of the data versions that the weights, and those that they started from, were trained on. "" stands for
    # data that is not known.
    lineage: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FailureInfo:
    """Reason and position of the failure of a training run."""

    reason: str
    epoch: int  # from 1
    step: int  # of the complete training, from 1
    lr: float  # of that step

    def describe(self, architecture: str) -> str:
        """Return the message for the user, which suggests how to fix the failure."""
        return (
            f"{architecture} failed in epoch {self.epoch}, step {self.step}, at a learning rate of {self.lr:.3g}: "
            f"{self.reason}. Lower model.{architecture}.recipe.lr, raise its warmup_fraction or set its grad_clip_norm "
            "to 1.0"
        )


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """Metrics of an epoch, as in a row of history.csv."""

    epoch: int  # from 1
    lr: float  # of the last step
    train_accuracy: float
    train_loss: float
    val_accuracy: float
    val_loss: float
    # At most one, if it is train.selection_metric.
    val_balanced_accuracy: float | None = None
    val_macro_f1: float | None = None


class TrainingRecord(BaseModel):
    """Everything about one training but its weights and its history.

    The train stage writes it to record.json. It belongs to every registered model, so records of earlier formats are
    upgraded when they are read.
    """

    # NaN and infinity are written by these names, which JSON lacks, rather than as null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format: Literal[3] = 3
    architecture: Name
    settings: dict[str, Any]  # of the architecture, as in params.yaml
    train: TrainConfig
    trainer: ResolvedTrainer
    dataset_info: DatasetInfo
    data: DatasetVersion
    fingerprint: str  # sha256 of settings, data, code, hardware and initial weights
    initial_weights: InitialWeights
    parameters: int  # trainable numbers of the network
    macs: int  # multiply-accumulate operations for one image
    environment: dict[str, str | int]  # package versions and hardware
    # The following are unknown while the training runs.
    best: EpochMetrics | None = None  # the epoch whose weights were kept; None if the first epoch failed
    stopped: str = ""  # setting that ended the training: max_epochs, patience or max_time; or "failure"
    failure: FailureInfo | None = None

    @property
    def lineage(self) -> list[str]:
        """Digests of all data versions that the weights were trained on, including those of their initial weights."""
        return sorted({*self.initial_weights.lineage, self.data.digest})

    @property
    def earlier_data(self) -> list[str]:
        """Digests of the data versions that only the initial weights were trained on."""
        return [digest for digest in self.initial_weights.lineage if digest != self.data.digest]

    def save(self, file: Path) -> None:
        """Write the record as JSON."""
        file.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def parse(cls, text: str | bytes, name: str = RECORD) -> "TrainingRecord":
        """Read a record of this or an earlier format from JSON.

        Args:
            text: Content of record.json.
            name: Name of the file, for messages.

        Raises:
            ConvoyError: If the text is no training record, or was written by a newer version of convoy.
        """
        try:
            found = pydantic.TypeAdapter(dict[str, Any]).validate_json(text)
            if found.get("format", 1) not in (1, 2, 3):
                raise ConvoyError(f"{name}: format {found['format']} is not known here: update this project's code")
            if "format" not in found:
                found = _upgrade_format_1(found)
            if found["format"] == 2:
                found = _upgrade_format_2(found)
            return cls.model_validate_json(json.dumps(found), strict=True, extra="forbid")
        except pydantic.ValidationError as error:
            raise ConvoyError(f"{name} is not the record of a training ({describe_validation_error(error)})") from None

    @classmethod
    def load(cls, file: Path) -> "TrainingRecord":
        """Read a record of this or an earlier format from a file.

        Raises:
            ConvoyError: If the file can't be read or is no training record.
        """
        try:
            text = file.read_bytes()
        except OSError as error:
            raise ConvoyError(f"{file} is missing or can't be read ({error.strerror})") from None
        return cls.parse(text, str(file))


def _upgrade_format_1(found: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record of format 1, which had one seed and other names, into format 2."""
    record = {RENAMED.get(name, name): value for name, value in found.items()}
    # One seed was that of the splits and of the training.
    seed = record.pop("seed", None)
    for name, more in (("train", {"seed": seed}), ("data", {"split_seed": seed})):
        if isinstance(record.get(name), dict):
            record[name] |= more
    if isinstance(record.get("settings"), dict):
        record["settings"] = rename_model_settings(record["settings"])
    start = record.get("initial_weights", {"init": "unknown"})
    if isinstance(start, dict) and start.get("init") != "scratch":
        # Early records do not say what the initial weights had been trained on.
        start = {"lineage": [""], **start}
    return {**record, "format": 2, "initial_weights": start, "best": record.get("best") or None}


def _upgrade_format_2(found: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record of format 2, whose hardware settings had names of their own, into format 3."""
    record = dict(found)
    minutes = 0.0
    if isinstance(record.get("train"), dict):
        minutes = record["train"].pop("max_minutes", 0.0)
    if isinstance(trainer := record.get("trainer"), dict):
        nodes, precision = trainer.pop("nodes", 1), trainer.get("precision")
        hours, minutes = divmod(round(minutes), 60)
        trainer |= {
            "num_nodes": nodes,
            "strategy": "ddp" if trainer.get("devices") != 1 or nodes != 1 else "auto",
            "precision": {"float32": "32-true", "bfloat16": "bf16-mixed"}.get(str(precision), precision),
            "sync_batchnorm": False,
            "max_time": f"00:{hours:02}:{minutes:02}:00" if hours or minutes else None,
        }
    if record.get("stopped") == "max_minutes":
        record["stopped"] = "max_time"
    return {**record, "format": 3}
